"""Backends, which make ONNX graphs executable."""
