"""``sparse_attention``: block-sparse attention, forward and backward, of a pattern that is given as data."""
