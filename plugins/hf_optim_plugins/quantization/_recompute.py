"""What several quantizers report, recomputed (``Technique.recompute``): layers by bits, errors of layers and blocks."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from hf_optim.toolkit import topology


def layers_by_bits(case: Any) -> dict[str, int]:
    """Return how many layers have weights of how many bits, from the schemes in ``config.json``.

    Experts are not modules with a scheme: theirs is that of the configuration, which has one in the suite's recipes.
    """
    bits = dict(case.bits())
    if experts := [name for name in case.names if name not in bits]:
        groups = case.config["quantization_config"]["config_groups"].values()
        (width,) = {group["weights"]["num_bits"] for group in groups}
        bits |= dict.fromkeys(experts, width)
    return {str(width): count for width, count in sorted(Counter(bits.values()).items())}


def output_errors(case: Any) -> dict[str, Any]:
    """Return ``‖(Q - W) X‖² / ‖W X‖²`` of every layer, on the inputs of a blockwise run, and the mean over layers."""
    errors: dict[str, float] = {}
    few: dict[str, int] = {}
    for block, mixed in case.sequential():
        names = [name for name in case.names if block.holds(name)]
        views = topology.expert_linears(mixed)
        grams = {name: rows.T @ rows for name, rows in case.inputs(mixed, [n for n in names if n not in views]).items()}
        for name, (tokens, routed) in _tokens(case, mixed, {n: views[n] for n in names if n in views}).items():
            own, every = (views[name].inputs_for(rows).double() for rows in (routed, tokens))
            grams[name] = own.T @ own
            if missing := max(0, own.shape[1] - len(own)):
                few[name] = len(own)
                grams[name] += every.T @ every * (missing / len(every))
        for name, gram in grams.items():
            dense, coded = (case.weight(model, name) for model in (case.before, case.after))
            change = coded - dense
            errors[name] = float(((change @ gram) * change).sum() / ((dense @ gram) * dense).sum())
    found = {"relative_error": errors, "mean_relative_error": sum(errors.values()) / len(errors)}
    return {**found, "experts_with_few_tokens": few} if few else found


def _tokens(case: Any, model: nn.Module, views: Mapping[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return for every matrix of an expert the tokens that its layer reads, and those that the router sends to it."""
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {view.experts_name: [] for view in views.values()}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            tokens, chosen = [*args, *kwargs.values()][:2]
            calls[name].append((tokens.detach().reshape(-1, tokens.shape[-1]), chosen))

        return hook

    with ExitStack() as stack:
        for name in calls:
            handle = model.get_submodule(name).register_forward_pre_hook(keep(name), with_kwargs=True)
            stack.callback(handle.remove)
        case.outputs(model)
    joined = {name: [torch.cat(parts) for parts in zip(*pairs, strict=True)] for name, pairs in calls.items()}
    return {
        name: (tokens, tokens[(chosen == view.index).any(-1)])
        for name, view in views.items()
        for tokens, chosen in [joined[view.experts_name]]
    }


def block_losses(case: Any, model: nn.Module) -> dict[str, float]:
    """Return the mean squared error of every block of ``model`` on the inputs of the original one."""
    blocks = topology.blocks(case.before)
    calls: dict[str, list[Any]] = {block.name: [] for block in blocks}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            calls[name].append((args, kwargs, out))

        return hook

    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.module.register_forward_hook(keep(block.name), with_kwargs=True).remove)
        case.outputs(case.before)
    return {block.name: _mean_loss(model.get_submodule(block.name), calls[block.name]) for block in blocks}


def sequential_losses(case: Any, model: nn.Module) -> dict[str, float]:
    """Return the mean squared error of every block of ``model`` on the inputs that the changed blocks before it give.

    The outputs to match are those of the original block in the original model.
    """
    expected: dict[str, list[Any]] = {}
    with ExitStack() as stack:
        for block in topology.blocks(case.before):
            calls = expected.setdefault(block.name, [])
            stack.callback(
                block.module.register_forward_hook(lambda module, args, out, calls=calls: calls.append(out)).remove
            )
        case.outputs(case.before)
    losses = {}
    for block, mixed in case.sequential():
        seen: list[Any] = []
        handle = mixed.get_submodule(block.name).register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen: seen.append((args, kwargs)), with_kwargs=True
        )
        with ExitStack() as stack:
            stack.callback(handle.remove)
            case.outputs(mixed)
        calls = [(args, kwargs, out) for (args, kwargs), out in zip(seen, expected[block.name], strict=True)]
        losses[block.name] = _mean_loss(model.get_submodule(block.name), calls)
    return losses


@torch.no_grad()
def _mean_loss(block: nn.Module, calls: Sequence[tuple[Any, Any, Any]]) -> float:
    """Return the mean squared error of a block over calls: arguments, keyword arguments, and the output to match."""
    errors = []
    for args, kwargs, out in calls:
        # The cache already holds the keys of the pass that was recorded.
        made = block(*args, **{key: None if isinstance(value, Cache) else value for key, value in kwargs.items()})
        first, second = (value[0] if isinstance(value, tuple) else value for value in (made, out))
        errors.append(float((first.double() - second.double()).square().mean()))
    return sum(errors) / len(errors)


def rounded(case: Any, bits: int, group_size: int | None) -> nn.Module:
    """Return the original model with the weights in ``case.names`` rounded to symmetric groups of inputs."""
    model = copy.deepcopy(case.before)
    for name in case.names:
        weight = model.get_parameter(f"{name}.weight")
        size = group_size or weight.shape[1]
        size = max(n for n in range(1, min(size, weight.shape[1]) + 1) if weight.shape[1] % n == 0)
        groups = weight.detach().reshape(len(weight), -1, size)
        scale = (groups.abs().amax(-1, keepdim=True) / ((2**bits - 1) / 2)).float()
        codes = (groups / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        with torch.no_grad():
            weight.copy_((codes * scale).reshape_as(weight))
    return model
