"""Transformer-XL on the weights of a tiny Llama, segment by segment as in the paper, in plain operations."""

from __future__ import annotations

import torch


def sinusoid(distance, width):
    angles = torch.tensor([distance * 10000 ** (-2 * t / width) for t in range(width // 2)], dtype=torch.float64)
    return torch.cat([angles.sin(), angles.cos()])


def rotated(part, begin, theta=10000.0):
    """Return ``[B, H, n, D]`` with rotary positions from ``begin`` on, halves turned against each other.

    Sines and cosines are rounded to float32, as transformers computes them.
    """
    half = part.shape[-1] // 2
    frequency = 1.0 / theta ** (torch.arange(0, 2 * half, 2, dtype=torch.float32) / (2 * half))
    angle = torch.outer(torch.arange(begin, begin + part.shape[2], dtype=torch.float32), frequency)
    cos, sin = angle.cos().double(), angle.sin().double()
    a, b = part[..., :half], part[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def split(part, heads):
    return part.unflatten(-1, (heads, -1)).transpose(1, 2)


def logits_of(model, ids, size, memory, relative=None, clamp=None):
    """Return the logits of a Llama in float64, ``[B, N, V]``.

    Args:
        model: a stock ``LlamaForCausalLM``.
        relative: for each layer the weights ``(W_r, u, v)``; None: rotary positions of the whole text.
        clamp: of distances.
    """
    config, body = model.config, model.model
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    memories = [None] * config.num_hidden_layers
    found = []
    for begin in range(0, ids.shape[1], size):
        states = body.embed_tokens(ids[:, begin : begin + size])
        for number, layer in enumerate(body.layers):
            own = layer.self_attn
            normed = layer.input_layernorm(states)
            query = split(own.q_proj(normed), heads)
            if relative is None:
                query = rotated(query, begin)
                key, value = rotated(split(own.k_proj(normed), groups), begin), split(own.v_proj(normed), groups)
                now = (key, value)
                if memories[number] is not None:
                    key, value = (torch.cat(pair, 2) for pair in zip(memories[number], now, strict=True))
                memories[number] = tuple(part[:, :, -memory:].detach() for part in (key, value))
            else:
                held = normed if memories[number] is None else torch.cat([memories[number], normed], 1)
                memories[number] = held[:, -memory:].detach()
                key, value = split(own.k_proj(held), groups), split(own.v_proj(held), groups)
            key, value = (part.repeat_interleave(heads // groups, 1) for part in (key, value))
            rows = []
            for i in range(query.shape[2]):
                last = key.shape[2] - query.shape[2] + i
                if relative is None:
                    scores = torch.einsum("bhd,bhkd->bhk", query[:, :, i], key[:, :, : last + 1])
                else:
                    projection, u, v = relative[number]
                    far = [min(last - j, clamp or last) for j in range(last + 1)]
                    table = torch.stack([sinusoid(d, config.hidden_size) for d in far])
                    turned = (table @ projection.T).unflatten(1, (heads, -1))
                    scores = torch.einsum("bhd,bhkd->bhk", query[:, :, i] + u, key[:, :, : last + 1])
                    scores = scores + torch.einsum("bhd,khd->bhk", query[:, :, i] + v, turned)
                weights = (scores / query.shape[-1] ** 0.5).softmax(-1)
                rows.append(torch.einsum("bhk,bhkd->bhd", weights, value[:, :, : last + 1]))
            states = states + own.o_proj(torch.stack(rows, 1).flatten(2))
            states = states + layer.mlp(layer.post_attention_layernorm(states))
        found.append(model.lm_head(body.norm(states)))
    return torch.cat(found, 1)


def attended(query, key, value, first=None):
    """Return ``[B, H, n, D]``; the queries are the last keys, or see all keys if ``first`` is ``all``."""
    group, rows = query.shape[1] // key.shape[1], []
    key, value = (part.repeat_interleave(group, 1) for part in (key, value))
    for i in range(query.shape[2]):
        last = key.shape[2] if first == "all" else key.shape[2] - query.shape[2] + i + 1
        scores = torch.einsum("bhd,bhkd->bhk", query[:, :, i], key[:, :, :last]) / query.shape[-1] ** 0.5
        rows.append(torch.einsum("bhk,bhkd->bhd", scores.softmax(-1), value[:, :, :last]))
    return torch.stack(rows, 2)


def compressive_logits_of(model, ids, size, memory, most, ratio, compress, decode=None, task=False):
    """Return the logits of a Llama with a compressed memory, and the losses of compression by name.

    Args:
        model: a stock ``LlamaForCausalLM`` in float64.
        size, memory, most, ratio: tokens of a segment and of the memory, slots, tokens of a slot.
        compress: ``compress(layer, window)`` returns ``[B, d]`` of ``[B, ratio, d]``.
        decode: ``decode(layer, slot)`` returns ``[B, ratio, d]``; None without a decoder.
        task: the gradient of the task reaches the compression.
    """
    config, body = model.config, model.model
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    inputs: list[list] = [[] for _ in body.layers]  # of all tokens so far, without gradient
    held = [None] * config.num_hidden_layers
    read_less, lost = [[] for _ in body.layers], [[] for _ in body.layers]
    found = []
    for begin in range(0, ids.shape[1], size):
        states = body.embed_tokens(ids[:, begin : begin + size])
        for number, layer in enumerate(body.layers):
            own = layer.self_attn
            normed = layer.input_layernorm(states)
            query = rotated(split(own.q_proj(normed), heads), begin)
            key, value = rotated(split(own.k_proj(normed), groups), begin), split(own.v_proj(normed), groups)
            old = (key[:, :, :0], value[:, :, :0]) if held[number] is None else held[number]
            windows = range(max(0, begin - memory) // ratio)
            slots = []
            for w in windows[-most:]:
                made = compress(number, torch.stack(inputs[number][w * ratio : (w + 1) * ratio], 1))
                made = (made if task else made.detach())[:, None]
                slots.append(
                    (rotated(split(own.k_proj(made), groups), (w + 1) * ratio - 1), split(own.v_proj(made), groups))
                )
            parts = [*slots, tuple(part[:, :, -memory:] for part in old), (key, value)]
            out = attended(query, torch.cat([k for k, _ in parts], 2), torch.cat([v for _, v in parts], 2))
            held[number] = tuple(torch.cat([a, b.detach()], 2) for a, b in zip(old, (key, value), strict=True))
            inputs[number] += list(normed.detach().unbind(1))
            leaving = range(max(0, begin - memory), begin + size - memory)
            if normed.shape[1] == size and len(leaving):
                made = [
                    compress(number, torch.stack(inputs[number][at : at + ratio], 1))[:, None]
                    for at in leaving[::ratio]
                ]
                new = [
                    torch.cat([rotated(split(m @ own.k_proj.weight.detach().T, groups), at + ratio - 1)
                               for m, at in zip(made, leaving[::ratio], strict=True)], 2),
                    torch.cat([split(m @ own.v_proj.weight.detach().T, groups) for m in made], 2),
                ]  # fmt: skip
                before = [part[:, :, leaving.start : leaving.stop] for part in held[number]]
                asked = query.detach()
                gap = attended(asked, *before, "all") - attended(asked, *new, "all")
                read_less[number].append(gap.square().mean())
            states = states + own.o_proj(out.transpose(1, 2).flatten(2))
            states = states + layer.mlp(layer.post_attention_layernorm(states))
        found.append(model.lm_head(body.norm(states)))
    if decode is not None:
        for number, tokens in enumerate(inputs):
            for at in range(0, len(tokens) // ratio * ratio, ratio):
                window = torch.stack(tokens[at : at + ratio], 1)
                lost[number].append((decode(number, compress(number, window)) - window).square().mean())
    losses = {
        name: torch.stack([torch.stack(each).mean() for each in part]).mean()
        for name, part in (("attention", read_less), ("autoencoding", lost))
        if all(part)
    }
    return torch.cat(found, 1), losses
