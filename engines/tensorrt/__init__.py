"""TensorRT: `selection.tensorrt_backend` runs engines, `store.build_engines` builds them."""
