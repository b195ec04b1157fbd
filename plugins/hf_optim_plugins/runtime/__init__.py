"""Techniques that change how a model runs, and none of its weights."""
