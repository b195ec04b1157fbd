"""What the rules of ``configurations`` do not serve, by configuration class or by model class."""

from __future__ import annotations

from typing import Any

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_MROPE = {"text_config.rope_parameters.mrope_section": [2, 3, 3]}
_DOWN = ["Subsample", 8, 4, 2, 2, 2]
_CODEC = {
    "hidden_size": 32,
    "num_filters": 8,
    "codebook_size": 128,
    "codebook_dim": 16,
    "upsample_groups": 32,
    "vector_quantization_hidden_dimension": 16,
}
_QWEN4 = {
    **{"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8},
    **{"indexer_compress_ratio": 4, "ngram_vocab_size_base": 64, "hc_lowrank": 16, "split_ngram_parts": 4},
}

# Configuration or model class -> {path of a field: value}. ``...`` leaves the field out, so that its default is taken.
FIELDS: dict[str, dict[str, Any]] = {
    "Apertus1p5Config": {"audio_config.codebook_dim": 64},
    "Blip2Config": {"image_token_index": 190},
    "InstructBlipConfig": {"image_token_index": 190},
    "InstructBlipVideoConfig": {"video_token_index": 190},
    "Llama4Config": {
        **{"vision_config.intermediate_size": 256, "vision_config.projector_input_dim": 64},
        **{"vision_config.projector_output_dim": 64, "vision_config.vision_output_dim": 64},
    },
    "BitConfig": {"num_groups": 4, "embedding_size": 16},
    "BltConfig": {"encoder_hash_byte_group_vocab": 192},
    "ChameleonConfig": {"vocabulary_map": {"<image>": 190, "<reserved08707>": 189, "IMGIMGAZ": 188, "IMGIMGBZ": 187}},
    "CohereCompassTextConfig": {"rope_parameters": {"full_attention": _ROPE}},
    "CohereCompassConfig": {"text_config.rope_parameters": {"full_attention": _ROPE}},
    "BambaConfig": {"attn_layer_indices": [1]},
    "GraniteMoeHybridConfig": {"layer_types": ["mamba", "attention"]},
    "HunYuanMoEV1Config": {"num_experts": 4, "moe_topk": 2},
    "CvtConfig": {
        "embed_dim": [16, 32, 48],
        "num_heads": [1, 2, 2],
        "depth": [1, 2, 3],
        "cls_token": [False, False, True],
    },
    "DbrxConfig": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "DeepseekOcr2Config": {"text_config.mlp_layer_types": ["dense", "sparse"]},
    "DonutSwinConfig": {"depths": [1, 1], "num_heads": [2, 2], "window_size": 2},
    "DoryConfig": {
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp", "sliding_attention", "mlp"],
        "n_input_layers": 2,
        "n_recurrent_layers": 2,
        "n_output_layers": 2,
    },
    "Dots3NoteConfig": {"text_config.per_layer_config.02.head_dim": 32},
    "Dots3NoteTextConfig": {"per_layer_config.02.head_dim": 32},
    "EfficientNetConfig": {
        **{"width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 320},
        **{"in_channels": ..., "out_channels": ..., "num_block_repeats": ...},
    },
    "Ernie4_5_VLMoeConfig": {"text_config.rope_parameters.mrope_section": [3, 3, 2]},
    "EsmConfig": {"vocab_size": 192, "mask_token_id": 5, "pad_token_id": 1},
    "FalconH1Config": {"mamba_d_head": 16, "mamba_n_heads": 8},
    "FunAsrNanoConfig": {"adaptor_config.intermediate_size": 16},
    "Gemma4AssistantConfig": {
        "__default__": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}}
    },
    "Glm46VConfig": _MROPE,
    "Glm4vConfig": _MROPE,
    "Glm4vMoeConfig": {"text_config.rope_parameters.mrope_section": [2, 1, 1]},
    "GlmOcrConfig": _MROPE,
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "Granite4VisionConfig": {
        **{"deepstack_layer_map": [[0, 0]], "downsample_rate": "2/4", "spatial_target_layers": [1]},
        "image_grid_pinpoints": [[32, 32]],
    },
    "HrmTextConfig": {"num_hidden_layers": 16, "num_layers_per_stack": 2},
    "HunYuanVLConfig": {"text_config.rope_parameters.mrope_section": [2, 2, 2, 2]},
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "KyutaiSpeechToTextConfig": {f"codec_config.{key}": value for key, value in _CODEC.items()},
    "LayoutLMv3Config": {"coordinate_size": 10, "shape_size": 12},
    "LevitConfig": {
        **{
            "image_size": 64,
            "patch_size": 16,
            "hidden_sizes": [32, 32, 48],
            "num_attention_heads": [2, 2, 2],
            "key_dim": [8, 8, 8],
        },
        "down_ops": [_DOWN, _DOWN],
    },
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "LiltConfig": {"hidden_size": 96},
    "Mamba2Config": {"num_heads": 8},
    "Mistral4Config": {"head_dim": 32},
    "MistralLarge4TextConfig": {},
    "MobileBertConfig": {
        **{"hidden_size": 64, "embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32},
    },
    "MobileViTV2Config": {"image_size": 64},
    "Molmo2Config": {"adapter_config.vision_feature_layer": [1, 0]},
    "MoonshineConfig": {f"{part}_num_key_value_heads": 4 for part in ("encoder", "decoder")},
    "MoonshineStreamingConfig": {"num_key_value_heads": 4},
    "MoshiConfig": {f"audio_encoder_config.{key}": value for key, value in _CODEC.items()},
    "MuseSparkConfig": {
        **{"audio_config.patch_sizes": [16, 6], "audio_config.hidden_sizes": [16, 32]},
        **{"audio_config.depths": [1, 1], "audio_config.num_hidden_layers": 2},
    },
    "PaddleOCRVLConfig": _MROPE,
    "PerceiverConfig": {"d_latents": 64, "d_model": 64, "qk_channels": 32, "v_channels": 64},
    "Qwen2_5OmniThinkerConfig": _MROPE,
    "Qwen2_5_VLConfig": _MROPE,
    "Qwen2VLConfig": _MROPE,
    "Qwen4ExpConfig": {f"text_config.{key}": value for key, value in _QWEN4.items()},
    "Qwen4ExpTextConfig": _QWEN4,
    "RecurrentGemmaConfig": {"num_hidden_layers": 3},
    "ReformerConfig": {
        **{"axial_pos_shape": [8, 8], "axial_pos_embds_dim": [32, 32], "attn_layers": ["local", "lsh"]},
        **{"local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8, "num_hidden_layers": 2, "num_buckets": 2},
    },
    "ReformerModelWithLMHead": {"is_decoder": True},
    "Emu3Config": {"vocabulary_map": {"<image>": 190, "<|extra_200|>": 189, "<|visual token 000000|>": 180}},
    "ShieldGemma2Config": {"yes_token_index": 7, "no_token_index": 9},
    "Step3p7Config": {"text_config.sliding_window": 32},
    "SwinConfig": {"depths": [1, 1], "num_heads": [2, 2], "window_size": 2},
    "Swinv2Config": {"depths": [1, 1], "num_heads": [2, 2], "window_size": 2},
    "VibeVoiceAsrConfig": {
        "acoustic_tokenizer_chunk_size": 3200,
        **{f"{part}_tokenizer_encoder_config.num_filters": 4 for part in ("acoustic", "semantic")},
    },
    "VibeVoiceConfig": {"audio_config.num_filters": 2, "semantic_model_config.num_filters": 2},
    "xLSTMConfig": {"qk_dim_factor": 1.0},
    "XmodConfig": {"default_language": "en_XX"},
    "ZambaConfig": {
        **{"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
        **{"attention_hidden_size": 128, "attention_head_dim": 32, "n_mamba_heads": 2},
    },
    "Zamba2Config": {
        **{"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4, "hybrid_layer_ids": [1, 3]},
        **{"attention_hidden_size": 128, "attention_head_dim": 32, "mamba_headdim": 16, "n_mamba_heads": 8},
    },
}
