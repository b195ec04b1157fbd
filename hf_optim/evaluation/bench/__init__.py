"""Measuring the kernels: every operator beside its peers, and the decoding of a whole model; JSON, tables, a plot."""

from __future__ import annotations

from .results import Results, Row

__all__ = ["Results", "Row"]
