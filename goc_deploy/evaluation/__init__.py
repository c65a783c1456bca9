"""Comparison of plans with no cache: sample, compare, measure, report. See `evaluate.evaluate`."""
