"""Checkpoint to ONNX: loading, recognition, lowering and verification (needs the ``export`` extra)."""
