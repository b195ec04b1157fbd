"""Mixture layers with a capacity, computed token by token: what the tests of capacities compare with."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hf_optim.toolkit.experts import registry


@contextmanager
def without_other_users() -> Iterator[None]:
    """Let the registry have no users inside the context but those made there: models of other tests may live long."""
    others, registry._users = registry._users, weakref.WeakSet()
    registry._remove_unused()
    try:
        yield
    finally:
        registry._users = others
        for module in list(others):
            registry.use(module)


def is_registered():
    """Return True if the function of a capacity is in transformers' registry, once models without owner are gone."""
    gc.collect()
    return "hf_optim" in ALL_EXPERTS_FUNCTIONS


def expert_output(module, expert, x):
    """Return the output of one expert for the rows ``x``, with the matrices read one by one."""
    turn = (lambda w: w.T) if module.is_transposed else (lambda w: w)
    up, name = (module.gate_up_proj, "gate_up_proj") if module.has_gate else (module.up_proj, "up_proj")
    biases = (getattr(module, f"{key}_bias")[expert] if module.has_bias else None for key in (name, "down_proj"))
    first, second = biases
    inner = F.linear(x, turn(up[expert]), first)
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    return F.linear(inner, turn(module.down_proj[expert]), second)


def give_slots(index, weights, limit, real=None, priority=None):
    """Return which pairs ``[T, k]`` get one of the ``limit`` slots of their expert."""
    tokens, top_k = index.shape
    weights = weights.detach()
    key = {None: lambda w: 0.0, "top1": lambda w: -max(w), "sum": lambda w: -sum(w)}[priority]
    order = sorted(range(tokens), key=lambda t: key(weights[t].tolist()))
    kept, used = torch.zeros_like(index, dtype=torch.bool), {}
    for choice in range(top_k):
        for token in order:
            column = sorted(range(top_k), key=lambda j: -float(weights[token, j]))[choice]
            expert = int(index[token, column])
            if real is not None and not real[token]:
                continue
            kept[token, column] = used.get(expert, 0) < limit
            used[expert] = used.get(expert, 0) + 1
    return kept


@contextmanager
def oracle_of(model, limit, real=None, priority=None):
    """Let a model compute its mixture layers token by token; ``limit`` maps a number of tokens to slots.

    Yields a list of the kept pairs of every layer call.
    """
    calls = []

    def forward(self, hidden, index, weights):
        rows = None if real is None else real.reshape(-1)
        count = len(hidden) if rows is None else int(rows.sum())
        kept = give_slots(index, weights, limit(count), rows, priority)
        calls.append(kept)
        out = torch.zeros_like(hidden)
        for token, column in kept.nonzero().tolist():
            part = expert_output(self, int(index[token, column]), hidden[token : token + 1])[0]
            out[token] = out[token] + (part * weights[token, column]).to(out.dtype)
        return out

    former = model.get_experts_implementation()
    ALL_EXPERTS_FUNCTIONS.register("oracle", forward)
    model.set_experts_implementation("oracle")
    try:
        yield calls
    finally:
        model.set_experts_implementation(former)
        ALL_EXPERTS_FUNCTIONS._global_mapping.pop("oracle")
