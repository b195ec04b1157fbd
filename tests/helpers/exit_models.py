"""Small decoders of four blocks, and early exits computed the long way: whole sequences, without a cache."""

from __future__ import annotations

import math

import torch
from tiny_models import tiny_gpt2, tiny_llama, tiny_mixtral, tiny_opt, tiny_qwen2
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForCausalLM, Gemma2Config, Qwen3Config

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}  # fmt: skip
LONG = {"num_hidden_layers": 4, "max_position_embeddings": 128}
MODELS = {
    "llama": lambda: tiny_llama(**LONG),
    "qwen2": lambda: tiny_qwen2(**LONG),
    "qwen3": lambda: AutoModelForCausalLM.from_config(Qwen3Config(**SMALL)),
    "gemma2": lambda: AutoModelForCausalLM.from_config(
        Gemma2Config(**SMALL, sliding_window=7, query_pre_attn_scalar=8, final_logit_softcapping=3.0)
    ),
    "gpt2": lambda: tiny_gpt2(n_layer=4, n_positions=128),
    "opt": lambda: tiny_opt(**LONG),
    "mixtral": lambda: tiny_mixtral(**LONG, experts_implementation="eager"),
}


def decoder(name, double=True):
    torch.manual_seed(2)
    model = MODELS[name]().eval()
    with torch.no_grad():  # logits that differ enough for confidences to spread
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model.double() if double else model


def blocks_of(model):
    base = model.base_model
    return getattr(base, "h", None) or getattr(base, "layers", None) or base.decoder.layers


def head(model, hidden):
    base = model.base_model
    norm = getattr(base, "norm", None) or getattr(base, "ln_f", None) or base.decoder.final_layer_norm
    logits = model.lm_head(norm(hidden))
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def states_with_depths(model, tokens, depths):
    """Return the states of each block, ``[blocks + 1][1, T, width]``; a token keeps its state after its depth."""
    states, depths = [], torch.tensor(depths)

    def freeze(index):
        def hook(module, args, kwargs, output):
            before = args[0] if args else kwargs["hidden_states"]
            if index == 0:
                states.append(before)
            after = output[0] if isinstance(output, tuple) else output
            after = torch.where((depths > index)[None, :, None], after, before)
            states.append(after)
            return (after, *output[1:]) if isinstance(output, tuple) else after

        return hook

    handles = [
        block.register_forward_hook(freeze(index), with_kwargs=True) for index, block in enumerate(blocks_of(model))
    ]
    try:
        model(input_ids=tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return states


def confidence(model, kind, states, layer):
    after, before = states[layer + 1][0, -1], states[layer][0, -1]
    if kind == "state":
        return float(cosine_similarity(after.float(), before.float(), dim=0))
    found = head(model, after).float().softmax(-1).sort(descending=True).values
    return float(found[0] - found[1]) if kind == "softmax_gap" else float(found[0])


def limit(settings, step):
    lam, fading = settings.threshold, math.exp(-settings.temperature * step / settings.length)
    return {"none": lam, "code": 0.9 * lam + 0.1 * lam * fading, "paper": min(1, max(0, 0.9 * lam + 0.1 * fading))}[
        settings.decay
    ]


@torch.no_grad()
def decode_slowly(model, tokens, settings, new):
    """Return greedy tokens ``[1, P + new]`` and the depth of each new one; a prompt ``[1, P]`` without padding."""
    count = len(blocks_of(model))
    depths, taken = [count] * tokens.shape[1], []
    for step in range(new):
        states = states_with_depths(model, tokens, depths)
        depth = count
        if step:
            layers = settings.layers or range(1 if settings.confidence == "state" else 0, count - 1)
            sure = (
                each for each in layers if confidence(model, settings.confidence, states, each) >= limit(settings, step)
            )
            depth = next(sure, count - 1) + 1
        depths[-1] = depth
        taken.append(depth)
        tokens = torch.cat([tokens, head(model, states[depth][:, -1]).float().argmax(-1)[:, None]], dim=1)
        depths.append(count)
    return tokens, taken
