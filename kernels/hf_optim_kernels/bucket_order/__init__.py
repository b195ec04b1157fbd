"""``bucket_order``: buckets of vectors, by hashing or the nearest centroid, and tokens in the order of buckets."""
