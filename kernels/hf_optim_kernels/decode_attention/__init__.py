"""``decode_attention``: attention of a few queries to a long key/value cache, read once, with grouped queries."""
