"""Calibration on an engine directory: images without cache, measured schedules and fitted coefficients."""
