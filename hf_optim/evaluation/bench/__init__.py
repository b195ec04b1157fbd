"""Benchmarks: each kernel against its peers, and decoding and prefill of models; as JSON, tables and a plot."""
