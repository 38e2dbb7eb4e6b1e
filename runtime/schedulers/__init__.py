"""Samplers as tables: diffusers' solvers, each reduced to one linear update per UNet evaluation."""

from runtime.schedulers.config import SCHEDULERS, names
from runtime.schedulers.make import inversion_table, make_table, signal_and_sigma
from runtime.schedulers.table import Table

__all__ = ["SCHEDULERS", "Table", "inversion_table", "make_table", "names", "signal_and_sigma"]
