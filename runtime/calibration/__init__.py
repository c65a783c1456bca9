"""Calibration on an engine directory: uncached images, measured schedules, fitted coefficients."""
