"""What several kernels share: cached launches, tuned tiles, codes as numbers, benchmarks."""
