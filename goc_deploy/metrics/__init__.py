"""Metric formulas in plain NumPy: arrays in, numbers out. `goc_deploy.evaluation` feeds them."""
