"""``kv_cache``: a key/value cache of 4 or 8 bits: quantized where it is written, decoded inside decode attention."""
