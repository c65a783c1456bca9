"""The runtime: an engine directory to images. Needs no torch on the ONNX Runtime path."""
