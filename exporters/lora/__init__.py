"""Merging LoRA weights into a checkpoint while it is read."""
