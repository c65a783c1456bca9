"""Calibration on an engine directory: uncached runs, measured schedules, fitted coefficients."""
