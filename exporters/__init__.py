"""Checkpoint to ONNX: load, recognize, lower and verify a model (needs the ``export`` extra)."""
