"""Generation in which a decoding step is one captured CUDA graph, through transformers' ``custom_generate``."""
