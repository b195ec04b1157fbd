"""``linear_attention``: attention by random features, forward and backward, by chunks, and by a step of one token."""
