"""ONNX graphs that are written node by node instead of traced."""
