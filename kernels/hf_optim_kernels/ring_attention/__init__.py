"""Attention of a new token to the nearest keys of each head, which are held in rings."""
