"""``bucket_attention``: attention within chunks of tokens in an order of each head, forward and backward."""
