"""Backends: ONNX graphs to something that runs."""
