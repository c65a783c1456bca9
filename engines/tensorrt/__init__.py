"""TensorRT: `selection.tensorrt_backend` is the entry to run, `store.build_engines` to build."""
