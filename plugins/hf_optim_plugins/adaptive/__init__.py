"""Models whose computation depends on the input."""
