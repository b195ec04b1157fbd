"""Pure maths and model analysis, by family. Knows nothing of recipes and runs."""
