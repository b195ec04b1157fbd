"""Tiny configurations of any architecture: the default configuration of a class, with every size made small.

Sizes are recognised by their field names, at every depth of a configuration. The rules keep what the sizes of one
configuration owe each other: heads divide widths, token ids stay inside the vocabulary, lists have one entry per layer
and every kind of layer is among those that are left. ``exceptions`` has what no rule serves.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

from .exceptions import FIELDS

WIDTH, HEADS, KV_HEADS, HEAD_DIM, INNER, EXPERT_INNER, LAYERS = 64, 4, 2, 16, 96, 32, 2
VOCABULARY, POSITIONS, EXPERTS, IMAGE, PATCH, WINDOW = 192, 64, 4, 32, 8, 32

_WIDTHS = (
    r"(\w+_)?(hidden_size|d_model|n_embd|model_dim|dim_model|embed_dim|embedding_size|emb_dim|hidden_dim)|"
    r"word_embed_proj_dim|\w*projection_dim|\w*projector_dim|lm_d_model|n_embed|pooler_output_size|lru_width|"
    r"pooler_hidden_size|cross_attention_hidden_size|codevector_dim|proj_codevector_dim|image_token_embed_dim|"
    r"xvector_output_dim|adapter_(in|out)_dim|dim|dim_model_base|hidden_size_\w+|\w+_hidden_size|width|embedding_dim|d_latents|"
    r"project_dim|\w*_output_dim|\w+_embed_dim|d_embed|modal_hidden_size|n_hidden"
)
_LAYERS = (
    r"(\w+_)?(num_hidden_layers|num_layers|n_layers?|encoder_layers|decoder_layers|num_blocks)|depth|"
    r"num_(encoder|decoder)_layers|\w+_depth|num_self_attends_per_block|\w*num_hidden_layers\w*|num_global_layers|"
    r"num_layers_per_stack|speech_decoder_postnet_layers|max_window_layers|num_kv_shared_layers|n_blocks|layers"
)
# (whole name of a field, its value if it is larger).
_RULES: tuple[tuple[str, int], ...] = (
    (r"mamba_num_heads|mamba_n_heads|n_mamba_heads", 2 * WIDTH // HEAD_DIM),
    (r"mamba_d_ssm", 2 * WIDTH),
    (r"(\w+_)?(num_key_value_heads|num_kv_heads|n_head_kv|n_kv_heads|num_query_groups)", KV_HEADS),
    (r"(\w+_)?(num_attention_heads|attention_heads|num_heads|n_heads?|\w*_n_heads|num_attention_heads_\w+)", HEADS),
    (r"(\w+_)?(linear_num_(key|value)_heads|linear_num_heads)", HEADS),
    (r"kv_lora_rank|q_lora_rank|o_lora_rank|\w+_lora_rank|\w+_lora_dim", 32),
    (r"qk_head_dim", 2 * HEAD_DIM),
    (
        r"(\w+_)?(head_dim|d_head|d_kv|head_size|dim_head|d_head|d_rel|headdim|attention_head_size)|"
        r"\w+_head_dim|rotary_dim",
        HEAD_DIM,
    ),
    (
        r"\w*(moe|expert|experts|share_expert)\w*_(intermediate_size|hidden_size|dim|ffn_dim|ffn_hidden_size)",
        EXPERT_INNER,
    ),
    (
        r"\w*(intermediate_size|ffn_dim|ffn_hidden_size|inner_dim|inner_size|d_ff|d_inner|mlp_dim|intermediate_dim)|"
        r"n_inner|feed_forward_size|dff|dim_ff",
        INNER,
    ),
    (r"\w*moe_layer_freq|decoder_sparse_step", 1),
    (r"codebook_size", 128),
    (
        r"\w*vocab_size\w*|num_embeddings|codebook_vocab_size|unpadded_vocab_size|\w+_vocab_size|vocab_offset",
        VOCABULARY,
    ),
    (_WIDTHS, WIDTH),
    (_LAYERS, LAYERS),
    (
        r"\w*max_position_embeddings|n_positions|max_seq_len|max_sequence_length|n_ctx|seq_length|"
        r"max_target_positions|context_length|model_max_length|max_2d_position_embeddings|"
        r"\w*num_position_embeddings|max_\w+_positions",
        POSITIONS,
    ),
    (
        r"num_experts|n_routed_experts|num_local_experts|moe_num_experts|n_experts|\w+_num_experts|"
        r"num_\w*experts|zero_expert_num",
        EXPERTS,
    ),
    (
        r"num_experts_per_tok(en)?|moe_topk|moe_top_k|moe_k|top_k_experts|n_activated_experts|expert_top_k|"
        r"topk|ffn_top_k|router_topk|num_selected_experts",
        2,
    ),
    (
        r"n_group|topk_group|n_groups|num_expert_groups?|mamba_n_groups|num_limited_groups|n_shared_experts|"
        r"first_k_dense_replace",
        1,
    ),
    (r"num_dense_layers|first_num_dense_layers|num_hash_layers|n_hash_layers", 1),
    (r"image_size|img_size|input_size|crop_size|resolution|max_img_size|max_image_size", IMAGE),
    (
        r"(sliding|attention|local)?_?window(_size)?|sliding_window_size|local_attention|"
        r"attention_window_size|local_radius",
        WINDOW,
    ),
    (r"chunk_size|\w+_chunk_size|max_inference_chunksize", 16),
    (r"patch_size", PATCH),
    (r"(\w+_)?(num_mel_bins|n_mels|n_mel_bins|mel_bins|input_feat_per_channel)", 16),
    (r"state_size|ssm_state_size|mamba_d_state|d_state|\w*_state_dim", 16),
    (r"time_step_rank|mamba_dt_rank", 16),
    (r"base_channels|latent_channels|num_groups", 32),
    (
        r"num_filters|conv_channels|\w*conv_channels|\w*_conv_channel|nemo_conv_channels|ext_pw_out_channel|"
        r"depthwise_separable_out_channel|num_codevectors_per_group|stem_out_channels|embedding_size|"
        r"\w+_units|\w+_channels|post_conv_\w+_channels",
        16,
    ),
    (r"num_codebooks|num_quantizers", 4),
    (r"num_query_tokens|\w*num_latents|num_queries", 8),
    (r"laurel_rank|adapter_rank|\w+_rank", 16),
    (r"index_topk|index_kpool", 8),
    (r"prompt_length|num_landmarks|segment_means_seq_len|num_global_tokens|num_conv_pos_embeddings|codebook_dim", 16),
    (r"num_conv_pos_embedding_groups", 4),
)  # fmt: skip
_COMPILED = [(re.compile(pattern), value) for pattern, value in _RULES]
_COUNTS = re.compile(
    r"depths|\w*num_blocks|stage_numb_of_layers|n_attn_blocks|num_block_repeats|block_repeats|block_sizes|layers"
)
_CHANNELS = re.compile(
    r"\w*(hidden_sizes|embed_dims?|channels|conv_dim|tdnn_dim|attn_unit_dims|hidden_dims|dims|num_feats|projection_dim)"
)
_LAYER_INDICES = re.compile(
    r"\w*(layer_ids|indexes|indices|layers_indices|target_layers|source_layers|cross_attention_layers|summary_idxs|moe_layers)"
)
_TOKEN = re.compile(r"\w*(token_id|token_index|token_ids|_pad_id|_id|image_patch_id|mask_index)")
_DERIVED = ("stage_names", "out_features", "out_indices", "architectures", "transformers_version", "dtype")
_MISSING = {
    "head_dim": HEAD_DIM,
    "num_experts_per_tok": 2,
    "num_key_value_heads": HEADS,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
}
"""Sizes for fields without a default that the forward needs."""
_COUNT_NAMES = (
    *("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "num_decoder_layers", "depth"),
)


def tiny_config(config_class: Any, name: str = "") -> Any:
    """Return the smallest useful configuration of a class.

    Args:
        config_class: a class of configurations.
        name: of the class of models to build, for what ``exceptions`` has for it alone.
    """
    given = {**FIELDS.get(config_class.__name__, {}), **FIELDS.get(name, {})}
    if "__build__" in given:
        return given["__build__"](tiny_config)
    fields = shrink(config_class(**given.pop("__default__", {})).to_dict())
    for path, value in given.items():
        _set(fields, path.split("."), value)
    config = config_class.from_dict(fields)
    text = config.get_text_config()
    if "SequenceClassification" in name and getattr(text, "pad_token_id", None) is None:
        text.pad_token_id = config.pad_token_id = 0  # the head looks for the last token that is not padding
    return config


def shrink(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a configuration with every size made small."""
    return _shrink(copy.deepcopy(dict(fields)), {})


def _shrink(fields: dict[str, Any], ids: dict[int, int]) -> dict[str, Any]:
    fields = {key: value for key, value in fields.items() if key not in _DERIVED}
    kept = _kept_layers(fields)
    multi_head = fields.get("num_attention_heads") == fields.get("num_key_value_heads")
    found: dict[str, Any] = {}
    for key, value in fields.items():
        if not isinstance(key, str):
            found[key] = value
            continue
        if isinstance(value, dict) and key in ("id2label", "label2id"):
            continue
        if key == "per_layer_config" and isinstance(value, dict) and kept:
            chosen = {int(layer): _shrink(own, ids) for layer, own in value.items()}
            found[key] = {f"{new:02}": chosen[old] for new, old in enumerate(kept[1]) if old in chosen}
        elif isinstance(value, dict):
            found[key] = _shrink(value, ids)
        elif isinstance(value, (list, tuple)) and value:
            found[key] = _list(key, list(value), kept, ids)
        else:
            found[key] = _scalar(key, value, ids)
    if kept:
        for key in _COUNT_NAMES:
            if isinstance(found.get(key), int) and len(kept[1]) != LAYERS and fields[key] == kept[0]:
                found[key] = len(kept[1])
    if multi_head and isinstance(found.get("num_attention_heads"), int):
        found["num_key_value_heads"] = found["num_attention_heads"]
    return found


def _kept_layers(fields: Mapping[str, Any]) -> tuple[int, list[int]] | None:
    """Return the number of layers and which of them to keep, so that every kind of layer is among them."""
    count = next((fields[key] for key in _COUNT_NAMES if isinstance(fields.get(key), int)), None)
    if not count:
        return None
    lists = [v for v in fields.values() if isinstance(v, (list, tuple)) and len(v) == count and count > 4]
    lists = [v for v in lists if isinstance(v[0], (str, bool)) or len(set(map(str, v))) <= 3]
    own = {int(index) for index in fields.get("per_layer_config") or ()}
    kinds: dict[Any, int] = {}
    for index in range(count):
        kinds.setdefault((index in own, *(str(v[index]) for v in lists)), index)
    kept = sorted(kinds.values())
    kept += [i for i in range(count) if i not in kept][: max(0, LAYERS - len(kept))]
    return count, sorted(kept)[: max(LAYERS, len(kinds))]


def _list(key: str, value: list[Any], kept: tuple[int, list[int]] | None, ids: dict[int, int]) -> list[Any]:
    first = value[0]
    if isinstance(first, dict):
        return [_shrink(item, ids) for item in value]
    if any(isinstance(item, list) for item in value):
        return [_list(key, item, kept, ids) if isinstance(item, list) and item else item for item in value]
    if kept and len(value) == kept[0] and kept[0] > 4 and not _LAYER_INDICES.fullmatch(key):
        value = [value[index] for index in kept[1]]
        return [_scalar(key, item, ids) for item in value]
    if not isinstance(first, int) or isinstance(first, bool):
        return value
    if key == "mrope_section" or key.endswith("mrope_section"):
        return [max(1, HEAD_DIM // 2 - 2 * (HEAD_DIM // 6)), *[HEAD_DIM // 6] * 2][: len(value)]
    if _COUNTS.fullmatch(key):
        return [min(item, 1) for item in value]
    if key in ("num_heads", "num_attention_heads"):  # one entry for each stage
        return [min(item, 2) for item in value]
    if _CHANNELS.fullmatch(key):
        return [max(16, item // 8 // 16 * 16) if item > 16 else item for item in value]
    if kept and len(value) == kept[0] and value == list(range(kept[0])):
        return list(range(len(kept[1])))
    if _LAYER_INDICES.fullmatch(key):
        return sorted({min(item, LAYERS - 1) for item in value})
    if _TOKEN.fullmatch(key):
        return [_token(item, ids) for item in value]
    return [_scalar(key, item, ids) for item in value]


def _scalar(key: str, value: Any, ids: dict[int, int]) -> Any:
    if value is None:
        return _MISSING.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if _TOKEN.fullmatch(key):
        return _token(value, ids)
    for pattern, small in _COMPILED:
        if pattern.fullmatch(key):
            return min(value, small)
    return value


def _token(value: int, ids: dict[int, int]) -> int:
    """Return a token id inside the vocabulary, the same one for the same id and another one for another."""
    if not isinstance(value, int) or value < VOCABULARY - 64:
        return value
    return ids.setdefault(value, VOCABULARY - 1 - len(ids))


def _set(fields: dict[str, Any], path: list[str], value: Any) -> None:
    for key in path[:-1]:
        fields = fields.setdefault(key, {})
    if value is ...:
        fields.pop(path[-1], None)
    else:
        fields[path[-1]] = value
