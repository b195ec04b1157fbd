"""Numbers: metrics, latency, sizes, and how they are reported."""
