"""The conformance suite that every technique passes: ``pytest --hf-optim NAME``."""
