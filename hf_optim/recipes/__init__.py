"""Recipes: techniques, their contracts and traits, and how steps compose."""
