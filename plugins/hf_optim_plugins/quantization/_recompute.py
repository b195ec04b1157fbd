"""The numbers that quantizers report, recomputed for the conformance suite (``Technique.recompute``)."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from hf_optim.toolkit import topology
from hf_optim.toolkit.statistics import enable_double_backward, random_direction, sample_microbatches


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


# -- activations ------------------------------------------------------------------------------------------------------
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


def gobo(case: Any) -> dict[str, Any]:
    """Return the figures of ``gobo`` from the tensors of the checkpoint and the errors of the decoded weights."""
    layers = {}
    for name in case.names:
        dense, coded = case.weight(case.before, name), case.weight(case.after, name)
        centroids = case.tensors[f"{name}.centroids"]
        size, bits = case.bytes_of(name), len(centroids).bit_length() - 1
        if case.before.get_submodule(name).bias is not None:
            assert f"{name}.bias" in case.tensors
        outliers = case.tensors[f"{name}.outliers"].numel()
        layers[name] = {
            "bits": bits,
            "weights": dense.numel(),
            "outliers": outliers,
            "iterations": _iterations(dense, coded, centroids),
            "l1_error": float((coded - dense).abs().sum() / dense.abs().sum()),
            "l2_error": float((coded - dense).norm() / dense.norm()),
            "outlier_share": outliers / dense.numel(),
            "bits_per_weight": 8 * size / dense.numel(),
            "bytes_before": dense.numel() * case.before.get_parameter(f"{name}.weight").element_size(),
            "bytes": size,
        }
    sums = {key: sum(own[key] for own in layers.values()) for key in ("bytes_before", "bytes", "weights", "outliers")}
    return {
        "layers": layers,
        "bytes_before": sums["bytes_before"],
        "bytes": sums["bytes"],
        "bits_per_weight": 8 * sums["bytes"] / sums["weights"],
        "outlier_share": sums["outliers"] / sums["weights"],
    }


def _iterations(dense: Tensor, coded: Tensor, centroids: Tensor) -> int:
    """Return how many steps of the paper's algorithm lead to the centroids of a layer, beginning with equal bins."""
    inner = torch.isin(coded.float(), centroids.float())
    values = dense[inner].sort().values
    ends = [number * len(values) // len(centroids) for number in range(len(centroids) + 1)]
    found = torch.stack([values[a:b].mean() for a, b in itertools.pairwise(ends)])
    sums: list[float] = []
    while True:
        distance = (values[:, None] - found).abs()
        own, code = distance.min(1)
        sums.append(float(own.sum()))
        if len(sums) > 1 and sums[-1] >= sums[-2]:
            return len(sums) - 2
        members = [values[code == number] for number in range(len(found))]
        found = torch.stack([part.mean() if len(part) else old for part, old in zip(members, found, strict=True)])


def smoothquant(case: Any, step: Any) -> dict[str, Any]:
    """Return the counts of ``smoothquant`` and its largest ratios, from the norms and the inputs of every block."""
    norms = pairs = 0
    before, after = [], []
    trace = topology.trace(case.before)
    groups = [group for group in topology.find_norm_groups(trace) if group.exclusive]
    found = [pair for pair in topology.find_linear_pairs(trace) if pair.scalable] if step.pairs else []
    for block, mixed in case.sequential():
        for pair in (pair for pair in found if block.holds(pair.consumer)):
            peak = case.inputs(mixed, [pair.consumer])[pair.consumer].abs().amax(0)
            weight = case.weight(case.before, pair.consumer).abs().amax(0)
            own, columns = _per_channel(pair, peak), _per_channel(pair, weight)
            scale = own**step.alpha / columns ** (1 - step.alpha)
            wide = torch.ones_like(peak)
            for channel, members in enumerate(pair.columns):
                wide[members] = scale[channel]
            pairs += 1
            before.append(_over_median(peak))
            after.append(_over_median(peak / wide))
        for group in (group for group in groups if any(block.holds(name) for name in group.linears)):
            reader = next(iter(group.linears))
            peak = case.inputs(mixed, [reader])[reader].abs().amax(0)
            old, new = (model.get_parameter(f"{group.name}.weight").double() for model in (case.before, case.after))
            norms += 1
            before.append(_over_median(peak))
            after.append(_over_median(peak * (new / old).detach()))
    return {
        "norms": norms,
        "pairs": pairs,
        "peak_over_median_before": max(before),
        "peak_over_median_after": max(after),
    }


def awq(case: Any, step: Any) -> dict[str, Any]:
    """Return the counts of ``awq``, and the largest ratio of two scales of a norm, from the gains before and after."""
    trace = topology.trace(case.before)
    blocks = topology.blocks(case.before)
    inside = [name for name in topology.linears(case.before) if any(block.holds(name) for block in blocks)]
    groups = [g for g in topology.find_norm_groups(trace) if g.exclusive and set(g.linears) <= set(inside)]
    pairs = [pair for pair in topology.find_linear_pairs(trace) if pair.scalable] if step.pairs else []
    ratios = [1.0]
    for group in groups:
        old, new = (model.get_parameter(f"{group.name}.weight").double() for model in (case.before, case.after))
        scale = (old / new).detach()
        ratios.append(float(scale.max() / scale.min()))
    return {"norms": len(groups), "pairs": len(pairs), "largest_ratio": max(ratios)}


def _per_channel(pair: Any, values: Tensor) -> Tensor:
    return torch.stack([values[members].max() for members in pair.columns])


def _over_median(peak: Tensor) -> float:
    return float(peak.max() / peak.median())


def qbert(case: Any, step: Any) -> dict[str, Any]:
    """Return eigenvalues by power iteration on plain double backward, bits and bytes from the checkpoint."""
    bits, layers, parts = case.bits(), {}, sample_microbatches(case.batches, step.shards, step.rows)
    weights = {name: case.before.get_parameter(f"{name}.weight") for name in case.names}
    with enable_double_backward(case.before, weights.values()):
        for name, weight in weights.items():
            values = _eigenvalues(case.before, weight, parts, step)
            mean = sum(values) / len(values)
            std = (sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5
            layers[name] = {"mean": mean, "std": std, "omega": abs(mean) + std, "bits": bits[name]}
    shapes = {name: case.weight(case.before, name).shape for name in case.names}
    sizes = {name: rows * columns for name, (rows, columns) in shapes.items()}
    allowed = {name: int(rows * (_words(columns, step.budget) + 4)) for name, (rows, columns) in shapes.items()}
    return {
        "layers": layers,
        "bytes": sum(map(case.bytes_of, case.names)),
        "bytes_allowed": sum(allowed.values()),
        "mean_bits": sum(sizes[name] * bits[name] for name in case.names) / sum(sizes.values()),
    }


def _eigenvalues(model: nn.Module, weight: Tensor, parts: list[Any], step: Any) -> list[float]:
    """Return the top eigenvalue of the loss's Hessian in a weight on every part; each starts at the last's vector."""
    vector, values = random_direction(weight), []
    for part in parts:
        logits = model(**part).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), part["input_ids"][:, 1:].flatten())
        (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
        vector, value = vector / vector.norm(), 0.0
        for number in range(step.iterations):
            (image,) = torch.autograd.grad((gradient * vector).sum(), weight, retain_graph=True)
            last, value = value, float((vector * image).sum())
            if number and abs(value - last) <= step.tolerance * abs(value):
                break
            vector = image / image.norm()
        values.append(value)
    return values


def _words(columns: int, bits: float) -> float:
    """Return the bytes of a row of codes, packed into words of 32 bits; between whole bits it grows linearly."""

    def whole(width: int) -> int:
        return 4 * -(-columns * width // 32)

    return whole(int(bits)) + (bits - int(bits)) * (whole(int(bits) + 1) - whole(int(bits)))


def rotation(case: Any, step: Any) -> dict[str, Any]:
    """Return how many streams and attentions were rotated, by the weights that changed, and if the head was untied.

    A stream has been rotated if the embedding's columns have other values but the same inner products; an attention if
    its output projection's columns have, or its values' rows where the stream is rotated too.
    """
    old, new = (model.get_input_embeddings() for model in (case.before, case.after))
    turned = old is not None and hasattr(old, "weight") and not torch.allclose(old.weight, new.weight, atol=1e-5)
    heads = [
        pair for pair in topology.find_value_heads(topology.trace(case.before)) if not _same_gram(case, pair, turned)
    ]
    tied = [bool(getattr(model.config, "tie_word_embeddings", False)) for model in (case.before, case.after)]
    return {"streams": int(turned), "attentions": len(heads), "head_untied": tied[0] and not tied[1]}


def _same_gram(case: Any, heads: Any, turned: bool) -> bool:
    """Return True if the values of an attention were not rotated: inner products over the other dimension are kept."""
    old, new = (case.weight(model, heads.producer)[heads.rows.flatten()] for model in (case.before, case.after))
    one, other = (weight @ weight.T for weight in (old, new)) if turned else (old, new)
    return torch.allclose(one, other, atol=1e-5)
