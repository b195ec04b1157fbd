"""``run_attention``: attention of sorted queries to runs of sorted keys, in rounds whose pairs count once."""
