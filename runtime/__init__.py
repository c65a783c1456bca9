"""The runtime: an engine directory to images. With ONNX Runtime it does not need torch."""
