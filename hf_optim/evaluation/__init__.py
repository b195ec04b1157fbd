"""Metrics, latency, sizes, and how they are reported."""
