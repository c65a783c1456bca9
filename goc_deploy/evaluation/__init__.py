"""Plans against no cache: sample, compare, measure, report. `goc_deploy.evaluation.evaluate` is the entry."""
