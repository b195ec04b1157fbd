"""The conformance suite for techniques (``pytest --hf-optim NAME``), and tools for tests."""
