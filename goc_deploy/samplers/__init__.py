"""Samplers as tables of coefficients: `table` has the entry, `solvers` the formulas."""

from goc_deploy.samplers.chosen_timesteps import refined_table, table_at
from goc_deploy.samplers.table import (
    MAX_LAGS,
    SAMPLER_GRAMMAR,
    SamplerTable,
    default_sampler,
    sampler_misfit,
    sampler_table,
)

__all__ = [
    "MAX_LAGS",
    "SAMPLER_GRAMMAR",
    "SamplerTable",
    "default_sampler",
    "refined_table",
    "sampler_misfit",
    "sampler_table",
    "table_at",
]
