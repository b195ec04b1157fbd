"""Tiny configurations of any architecture: the default configuration of a class, with every size made small.

Sizes are recognised by their field names, at every depth of a configuration. The rules keep what the sizes of one
configuration owe each other: heads divide widths, token ids stay inside the vocabulary, lists have one entry per layer.
``OVERRIDES`` holds the fields of architectures that no rule serves.
"""

from __future__ import annotations

WIDTH, HEADS, KV_HEADS, HEAD_DIM, INNER, LAYERS = 64, 4, 2, 16, 96, 2
VOCABULARY, POSITIONS, EXPERTS, IMAGE, PATCH = 160, 64, 4, 32, 8

# (pattern of the whole field name, value). The first match counts; a list gets the value in every entry.
RULES: tuple[tuple[str, int], ...] = tuple(
    (rf"^(?:{pattern})$", value)
    for pattern, value in (
        (
            r"(?:encoder_|decoder_|text_|audio_|vision_)?(?:hidden_size|d_model|n_embd|hidden_dim|embed_dim|emb_dim|model_dim|dim_model)",
            WIDTH,
        ),
        (
            r"word_embed_proj_dim|embedding_size|text_embed_dim|output_hidden_size|out_hidden_size|projection_dim|lm_hidden_size|lm_d_model",
            WIDTH,
        ),
        (
            r"(?:\w+_)?num_hidden_layers|n_layers?|num_layers|encoder_layers|decoder_layers|num_decoder_layers|num_encoder_layers|depth|num_blocks",
            LAYERS,
        ),
        (r"(?:\w+_)?(?:num_attention_heads|attention_heads|num_heads|n_heads?)", HEADS),
        (r"(?:\w+_)?(?:num_key_value_heads|num_kv_heads|n_head_kv|n_kv_heads)", KV_HEADS),
        (r"(?:\w+_)?head_dim|d_kv|head_size|attention_head_size", HEAD_DIM),
        (
            r"(?:\w+_)?(?:intermediate_size|ffn_dim|ffn_hidden_size|inner_dim|d_ff|d_inner|mlp_dim|intermediate_dim)",
            INNER,
        ),
        (r"(?:\w+_)?vocab_size(?:_\w+)?", VOCABULARY),
        (
            r"max_position_embeddings|n_positions|max_seq_len|max_sequence_length|n_ctx|seq_length|max_target_positions",
            POSITIONS,
        ),
        (r"num_experts|n_routed_experts|num_local_experts|moe_num_experts|n_experts", EXPERTS),
        (r"num_experts_per_tok|num_experts_per_token|moe_topk|moe_top_k|moe_k|top_k_experts|n_activated_experts", 2),
        (r"image_size|img_size|input_size", IMAGE),
        (r"patch_size", PATCH),
    )
)
