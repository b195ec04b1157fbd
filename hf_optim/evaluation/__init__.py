"""Metrics, latency and sizes of models, and how they are reported: model cards (``cards``), benchmarks (``bench``)."""
