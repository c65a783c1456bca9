"""ONNX graphs that are built node by node instead of traced."""
