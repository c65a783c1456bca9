"""Samplers as tables of coefficients: `sampler_spec` has the entry, `solvers` the formulas."""

from goc_deploy.samplers.chosen_timesteps import refined_table, table_at
from goc_deploy.samplers.sampler_spec import (
    SAMPLER_GRAMMAR,
    default_sampler,
    sampler_misfit,
    sampler_table,
    switch_step,
)
from goc_deploy.samplers.table import MAX_LAGS, SamplerTable

__all__ = [
    "MAX_LAGS",
    "SAMPLER_GRAMMAR",
    "SamplerTable",
    "default_sampler",
    "refined_table",
    "sampler_misfit",
    "sampler_table",
    "switch_step",
    "table_at",
]
