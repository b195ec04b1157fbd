"""What routes, by its effect: each matrix is replaced, and what the experts receive is compared.

Independent of the code under test: nothing is traced, and no role is read from the name of a layer.

- A matrix is a **router** if replacing it changes which tokens an expert receives, or their weights, and leaves the
  tokens themselves unchanged.
- It is the **gate of a shared expert** if whatever replaces it moves the output of its mixture along one direction for
  each token.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

EXPERTS = re.compile(r"Experts$|NaiveMoe$")
"""Classes of transformers that compute experts; what they take is what the router decided."""

Seen = dict[str, list[tuple[Tensor, list[Tensor]]]]
"""Mixture -> for each call the tokens ``[n, H]``, and everything else that its experts received."""


def inputs_for(model: Any) -> dict[str, Tensor]:
    """Return two sequences of tokens, or an image, that a tiny mixture takes."""
    ids = torch.randint(5, 100, (2, 12), generator=torch.Generator().manual_seed(1))
    if model.main_input_name == "pixel_values":
        pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        return {"pixel_values": pixels, "dataset_index": torch.tensor([0, 1])}
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :6].flip(0)
    if "moe_mm_token_type_ids" in inspect.signature(model.forward).parameters:  # images have experts of their own
        inputs["moe_mm_token_type_ids"] = (torch.arange(12) % 3 == 0).int().expand(2, 12)
    return inputs


def run(model: Any) -> None:
    """Run every part of a tiny mixture that has experts."""
    kind = model.config.model_type
    part = {"llama4": "language_model", "qwen3_omni_moe": "thinker"}.get(kind)
    called = model.get_submodule(part) if part else model
    called(**inputs_for(called), **_without_cache(called))
    if kind == "dots3_note":  # the tower has experts, too
        tower = model.model.vision_tower
        tower(torch.rand(16, 3 * tower.config.patch_size**2), grid_thw=torch.tensor([[1, 4, 4]]))


@torch.no_grad()
def find(model: Any) -> tuple[dict[str, str], set[str]]:
    """Return what routes (name of the owner of a matrix -> role), and the mixtures that ran."""
    spy = _Spy(model, lambda: run(model))
    before, base = spy.run()
    found = {}
    for owner, weight in _matrices(model, spy.mixtures):
        if role := _role(spy, owner, weight, before, base):
            found[owner] = role
    spy.remove()
    names = {
        name: found[owner]
        for owner in found
        for name, module in model.named_modules(remove_duplicate=False)
        if module is model.get_submodule(owner)
    }
    tied = {id(model.get_submodule(owner).weight): role for owner, role in found.items()}
    names |= {
        name.rpartition(".")[0]: tied[id(parameter)]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) in tied
    }
    return names, set(before)


def _role(spy: _Spy, owner: str, weight: nn.Parameter, before: Seen, base: dict[str, Tensor]) -> str | None:
    saved, moved = weight.detach().clone(), []
    try:
        for seed in (1, 2):
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
            weight.copy_(noise * 0.3)
            after, outputs = spy.run()
            if any(
                _same_tokens(one, other) and not _same_choice(one, other)
                for name in before
                for one, other in zip(before[name], after.get(name, []), strict=False)
            ):
                return "router"
            holder = spy.holder_of(owner)
            if holder in base and holder in outputs:
                moved.append((outputs[holder] - base[holder]).reshape(-1, base[holder].shape[-1]).double())
    finally:
        weight.copy_(saved)
    return "gate of a shared expert" if len(moved) == 2 and _along_one_line(*moved) else None


def _along_one_line(one: Tensor, other: Tensor) -> bool:
    if one.shape[-1] <= 4 or min(one.norm(dim=-1).min(), other.norm(dim=-1).min()) < 1e-8:
        return False
    return bool((nn.functional.cosine_similarity(one, other, dim=-1).abs() > 1 - 1e-4).all())


def _same_tokens(one: tuple[Tensor, list[Tensor]], other: tuple[Tensor, list[Tensor]]) -> bool:
    """Return True if the experts received no other tokens than before, in any order and number."""
    left, right = (_directions(tokens) if not choice else tokens for tokens, choice in (one, other))
    if not len(left) or not len(right):
        return True
    return bool((torch.cdist(right, left).min(dim=-1).values <= 1e-5 * left.norm(dim=-1).max()).all())


def _same_choice(one: tuple[Tensor, list[Tensor]], other: tuple[Tensor, list[Tensor]]) -> bool:
    """Return True if the experts received the same tokens with the same weights.

    Experts that receive nothing but tokens receive them multiplied by the weights.
    """
    if not one[1]:
        return torch.allclose(one[0].norm(dim=-1), other[0].norm(dim=-1), rtol=1e-3)
    return all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(one[1], other[1], strict=True)
    )


def _directions(tokens: Tensor) -> Tensor:
    norms = tokens.norm(dim=-1, keepdim=True)
    return (tokens / norms.clamp_min(1e-30))[norms[:, 0] > 1e-9]


class _Spy:
    """Runs a model, and records what the experts of each mixture receive and what the modules around them return."""

    def __init__(self, model: nn.Module, forward: Callable[[], Any]) -> None:
        self.forward, self.seen, self.outputs = forward, Seen(), dict[str, Tensor]()
        self.mixtures: list[str] = []
        self.handles: list[Any] = []
        for name, module in model.named_modules():
            if EXPERTS.search(type(module).__name__):
                self.mixtures.append(name)
                self.handles.append(module.register_forward_pre_hook(self._receive(name), with_kwargs=True))
            if hasattr(module, "down_embed"):  # experts that are rows of two embeddings
                self.mixtures.append(name)
                self.handles.append(module.register_forward_pre_hook(self._receive(name), with_kwargs=True))
                self.handles.append(module.down_embed.register_forward_pre_hook(self._choose(name)))
        self.holders = {
            ".".join(parts[:end])
            for parts in (name.split(".") for name in self.mixtures)
            for end in range(1, len(parts))
        }
        for name in self.holders:
            self.handles.append(model.get_submodule(name).register_forward_hook(self._return(name)))

    def run(self) -> tuple[Seen, dict[str, Tensor]]:
        self.seen, self.outputs = {}, {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.forward()
        return self.seen, self.outputs

    def holder_of(self, name: str) -> str:
        """Return the nearest module around a layer that has experts."""
        while name and name not in self.holders:
            name = name.rpartition(".")[0]
        return name

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _receive(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            tokens, *choice = _tensors((args, kwargs))
            rows = tokens.reshape(-1, tokens.shape[-1]).double()
            self.seen.setdefault(name, []).append((rows, [value.double() for value in choice]))

        return hook

    def _choose(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            self.seen[name][-1][1].append(args[0].double())

        return hook

    def _return(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            first = next(iter(_tensors(output)), None)
            if first is not None and first.is_floating_point():
                self.outputs[name] = first

        return hook


def _matrices(model: nn.Module, mixtures: Iterable[str]) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the linear layers and bare 2-D weights of the lists of blocks with mixtures, with the names of the owners.

    What is outside of these lists cannot route: no experts are beside it.
    """
    lists = tuple({re.split(r"(?<=\.)\d+\.", name)[0] for name in mixtures})
    for name, parameter in model.named_parameters():
        owner, _, last = name.rpartition(".")
        embedding = isinstance(model.get_submodule(owner), nn.Embedding)
        if parameter.dim() == 2 and last == "weight" and not embedding and name.startswith(lists):
            yield owner, parameter


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, int) and not isinstance(tree, bool):
        yield torch.tensor(tree)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from _tensors(item)
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from _tensors(item)


def _without_cache(model: Any) -> dict[str, bool]:
    own = inspect.signature(model.forward).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in own.values()) and model.main_input_name == "input_ids"
    return {"use_cache": False} if "use_cache" in own or takes_any else {}
