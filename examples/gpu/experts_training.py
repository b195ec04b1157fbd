"""The backward of experts, for ``experts.py training``: gradients against float64, then times of a step."""

from __future__ import annotations

import functools
import itertools

import torch
from experts_cases import SHAPES, TUNED, batch, layers, situations
from experts_tiles import short_name
from experts_ways import timed, transformers_call, transformers_module

from hf_optim_kernels.common import benchmark
from hf_optim_kernels.experts import launch, naive, op, routing, training
from hf_optim_kernels.experts.launch import Tiles
from hf_optim_kernels.experts.naive import Weights

TIMED = [
    *itertools.product(TUNED, (512, 4096)),
    ("olmoe", 4096),
    ("deepseek-v2-lite", 4096),
]  # the last two are held out
OUTER_TILES = [
    Tiles(*t) for t in ((128, 256, 8, 3), (128, 128, 8, 4), (128, 128, 4, 3), (256, 128, 8, 3), (64, 256, 4, 3))
]


def check_gradients():
    """Relative errors of all gradients of a layer against float64, and whether two runs have equal bits."""
    found = {}
    for name, tokens in itertools.product(("qwen3-30b-a3b", "gpt-oss-20b", "deepseek-v2-lite"), (3, 300)):
        shape, given, (hidden, chosen, weights) = SHAPES[name], layers(name, 1)[0], batch(name, tokens)
        chosen[::3, 1] = shape.experts  # computed by none
        grad = torch.randn_like(hidden)
        parts = [hidden, weights, *(t for t in given[:4] if t is not None)]
        own, again = (_gradients(op.training_mixture, shape, parts, chosen, grad) for _ in range(2))
        wide = [part.double() for part in parts]
        right = _gradients(naive.mixture, shape, wide, chosen, grad.double())
        names = ("hidden", "weights", "up", "down", "up_bias", "down_bias")
        errors = {key: float((a.double() - b).norm() / b.norm()) for key, a, b in zip(names, own, right, strict=False)}
        same = all(torch.equal(a, b) for a, b in zip(own, again, strict=True))
        found[f"{name} {tokens}"] = {**errors, "same": same}
        print(
            name,
            tokens,
            {k: v if k == "same" else f"{v:.1e}" for k, v in found[f"{name} {tokens}"].items()},
            flush=True,
        )
        del own, again, wide, right
        layers.cache_clear()
    return found


def time_steps():
    """Microseconds of forward and backward of a layer: with the gradients of its matrices, and with frozen ones."""
    from hf_optim.toolkit.experts import expert_product

    found = {}
    for (name, tokens), frozen in itertools.product(TIMED, (False, True)):
        shape, (given, hidden, chosen, weights) = SHAPES[name], situations(name, tokens)[0]
        module = transformers_module(shape, given).requires_grad_(not frozen)
        hidden.requires_grad_(), weights.requires_grad_()
        ways = {"ours": lambda *a, m=module: expert_product(m, *a, True)}
        ways |= {key: transformers_call(shape, key, given, module=module) for key in ("grouped_mm", "eager")}
        grad, asked = torch.randn_like(hidden), [hidden, weights, *([] if frozen else module.parameters())]

        def step(way):
            torch.autograd.grad(way(hidden, chosen, weights), asked, grad)

        def replayed(way):
            return benchmark.graph_time([functools.partial(step, way)]).us

        row = {key: timed([functools.partial(step, way)], captured=False) for key, way in ways.items()}
        for key in ("ours", "grouped_mm"):
            try:
                row[f"{key}, replayed"] = replayed(ways[key])
            except Exception as problem:
                row[f"{key}, replayed"] = f"{type(problem).__name__}: {str(problem)[:80]}"
        found[f"{name} {tokens}{' frozen' if frozen else ''}"] = row
        print(name, tokens, "frozen" if frozen else "", row, flush=True)
        layers.cache_clear()
    return found


def try_outer_tiles():
    """Microseconds of the sums of outer products, by tiles."""
    found = {}
    for name, tokens in itertools.product(TUNED, (512, 4096)):
        shape, (given, hidden, chosen, _) = SHAPES[name], situations(name, tokens)[0]
        block = launch.block_rows(tokens * shape.top_k, shape.experts)
        route, out = routing.route(chosen, shape.experts, block), torch.empty_like(given.up)
        rows = torch.randn(tokens * shape.top_k, given.up.shape[1], device="cuda", dtype=torch.bfloat16)
        row = found[f"{name} {tokens}"] = {}
        for tiles in OUTER_TILES:
            run = functools.partial(
                training.outer_product, rows, hidden, route, None, out, None, (0, shape.top_k), tiles
            )  # fmt: skip
            row[short_name(tiles)] = timed([run])
        print(name, tokens, row, flush=True)
        layers.cache_clear()
    return found


def _gradients(mixture, shape, parts, chosen, grad):
    """The gradients of hidden states, weights, matrices and biases, in this order."""
    hidden, weights, *matrices = (part.detach().requires_grad_() for part in parts)
    given = Weights(*matrices, *[None] * (4 - len(matrices)), shape.transposed)
    return torch.autograd.grad(mixture(hidden, chosen, weights, given, shape.gate), [hidden, weights, *matrices], grad)
