"""Pure maths and model analysis, by family, independent of recipes and runs."""
