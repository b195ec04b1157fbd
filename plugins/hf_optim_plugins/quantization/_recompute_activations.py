"""The numbers that quantizers of activations report, recomputed (``Technique.recompute``): grids, sites, groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from hf_optim.toolkit import topology


def grid_of(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale and zero point of the asymmetric 8-bit grid of all inputs, float32."""
    low, high = inputs.min().clamp_max(0).float(), inputs.max().clamp_min(0).float()
    scale = (high - low) / 255
    return scale, (-128 - low / scale).round()


def divergence(case: Any, grids: Mapping[str, tuple[Tensor, Tensor]]) -> float:
    """Return the mean Kullback-Leibler divergence of the original if these inputs are rounded, in nats per position."""

    def rounding(scale: Tensor, zero: Tensor) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any) -> Any:
            return (((args[0] / scale).round() + zero).clamp(-128, 127) - zero) * scale, *args[1:]

        return hook

    expected = case.outputs(case.before)
    with ExitStack() as stack:
        for name, grid in grids.items():
            module = case.before.get_submodule(name)
            stack.callback(module.register_forward_pre_hook(rounding(*grid)).remove)
        found = case.outputs(case.before)
    shares = []
    for old, new in zip(expected, found, strict=True):
        p, q = old.double().log_softmax(-1), new.double().log_softmax(-1)
        shares.append(float((p.exp() * (p - q)).sum(-1).mean()))
    return sum(shares) / len(shares)


def sites_of(case: Any, names: list[str]) -> dict[str, list[str]]:
    """Return the linears that read one tensor, by the first of them in order of execution."""
    seen: dict[int, list[str]] = {}
    kept: list[Tensor] = []  # a tensor that is freed could give its id to another

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            kept.append(args[0])
            seen.setdefault(id(args[0]), []).append(name)

        return hook

    with ExitStack() as stack, torch.no_grad():
        for name in names:
            stack.callback(case.before.get_submodule(name).register_forward_pre_hook(note(name)).remove)
        case.before(**case.batches[0])
    return {members[0]: members for members in seen.values()}


def mixed_precision(case: Any, sites: str) -> dict[str, Any]:
    """Return the sites of ``mixed_precision``, and the divergence with each of them rounded, all, and those chosen."""
    reads = sites_of(case, case.names)
    inputs = case.inputs(case.before, case.names)
    grids = {name: grid_of(inputs[name]) for name in case.names}
    schemes = {name: case.stored.get_submodule(name).quantization_scheme for name in case.names}
    wide = [name for name in reads if schemes[name].input_activations is None]
    alone = {name: divergence(case, {each: grids[each] for each in reads[name]}) for name in reads}
    rest = {each: grids[each] for name, members in reads.items() if name not in wide for each in members}
    return {
        "sites": len(reads),
        "sites_with_16_bits": len(wide),
        "with_16_bits": sorted(wide, key=lambda name: -alone[name]),
        "divergence": divergence(case, rest),
        "divergence_all_8_bits": divergence(case, grids),
        "ranking": alone,
        "read_by": reads,
    }


def peg(case: Any) -> dict[str, Any]:
    """Return the counts of ``peg`` and the noise of its grids, from the scales in the checkpoint.

    The width of a group is 255 steps of its scale. That of the whole input is measured on the original model; it does
    not depend on the order of the channels.
    """
    modules = {name: module for name, module in case.stored.named_modules() if getattr(module, "groups", 0)}
    inputs = case.inputs(case.before, modules)
    shares = []
    for name, module in modules.items():
        scale, group = module.input_scale.double(), module.input_group.long()
        low, high = inputs[name].min().clamp_max(0), inputs[name].max().clamp_min(0)
        shares.append(float((255 * scale[group]).square().sum() / (len(group) * (high - low) ** 2)))
    linears = [name for name in modules if topology.is_linear(case.before.get_submodule(name))]
    trace = topology.trace(case.before)
    stream = topology.find_residual_stream(trace)
    shared = {*stream.readers, *stream.norms}
    consumers = {pair.consumer for pair in topology.find_linear_pairs(trace)} & set(modules) - shared
    table = "get_input_embeddings"
    old, new = (getattr(model, table)().weight.detach() for model in (case.before, case.stored))
    moved = not torch.equal(old, new) and torch.equal(old.sort(1).values, new.sort(1).values)
    return {
        "linear_inputs": len(linears),
        "residual_sums": len(modules) - len(linears),
        "orders_folded": int(moved) + len(consumers),
        "groups": max(module.input_scale.numel() for module in modules.values()),
        "noise_against_one_group": sum(shares) / len(shares),
    }
