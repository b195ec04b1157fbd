"""Queries, keys and values of few weights: a multiplicative layer, and convolutions over length and modules.

    y[t, s, m] = sum_i x[t, i] D[i, s] E[i, m] + b[s, m]                        one, shared by queries, keys and values
    q[t, s, o] = sum over l, r, m of  K[l, r, m, o] y[t - l, s + r, m] + c[o]   l = 0, 1, 2 and r = -1, 0, 1

Values have a kernel of one module (r = 0). Jaszczur et al., arXiv 2111.12763, section 3.2.

This file is stored beside checkpoints, so it imports only torch and transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_optim.toolkit.modules import ThreadValue, mixed

from ._held_parts import ROWS, TokenRows, hold, require_rows

CONCAT = ("none", "fixed", "original")
OUTPUT = ("none", "mult", "multconv", "dense")
LAYOUTS = (  # names in an attention module: of what projects queries, keys and values, and of the output
    (("q_proj", "k_proj", "v_proj"), "o_proj"),
    (("q_proj", "k_proj", "v_proj"), "out_proj"),
    (("qkv_proj",), "o_proj"),
    (("c_attn",), "c_proj"),
)
FEW = 4  # tokens for each module up to which the two factors are multiplied one after the other
STATE = "sparse_qkv"


@dataclass(frozen=True)
class QkvSettings:
    """What the configuration says of the projections; see the fields of the technique.

    Attributes:
        width, query, key: features of the hidden state, of all queries and of all keys, each a multiple of ``modules``.
    """

    modules: int
    kernel: int
    concat: str
    output: str
    share_qk: bool
    width: int
    query: int
    key: int

    @classmethod
    def read(cls, settings: Any) -> QkvSettings:
        """Return the settings of a configuration, which has all of them. Raises ``ValueError`` for any others."""
        if not isinstance(settings, Mapping) or set(settings) != set(cls.__dataclass_fields__):
            raise ValueError(f"sparse projections need the settings {', '.join(cls.__dataclass_fields__)}")
        for name in ("modules", "kernel", "width", "query", "key"):
            if type(settings[name]) is not int or not 1 <= settings[name] <= 2**24:
                raise ValueError(f"sparse projections have {name}={str(settings[name])[:40]!r}, not a whole number")
        found = cls(**settings)
        for name in ("width", "query", "key"):
            if getattr(found, name) % found.modules:
                raise ValueError(
                    f"{found.modules} modules do not divide the {getattr(found, name)} features of the {name}"
                )
        if found.concat not in CONCAT or found.output not in OUTPUT or not isinstance(found.share_qk, bool):
            raise ValueError("sparse projections have an unknown concat, output or share_qk")
        if found.output == "none" and found.query != found.width:
            raise ValueError(f"without an output projection the heads have {found.query} features for {found.width}")
        if found.kernel > 64:
            raise ValueError("the kernel of the convolutions has at most 64 tokens")
        return found


class Multiplicative(nn.Module):
    """``y[s, m] = sum_i x[i] D[i, s] E[i, m] + b[s, m]``: in S d + d M weights.

    Attributes:
        gating: D, ``[S, d]``; begins as N(0, 0.5^2).
        projection: E, ``[d, M]``; begins uniform as by Glorot.
        bias: b, ``[S M]``; begins as N(0, 1e-6^2).
    """

    def __init__(self, modules: int, width: int, out: int) -> None:
        super().__init__()
        self.gating = nn.Parameter(torch.empty(modules, width))
        self.projection = nn.Parameter(torch.empty(width, out // modules))
        self.bias = nn.Parameter(torch.empty(out))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights as the authors do."""
        nn.init.normal_(self.gating, std=0.5)
        nn.init.xavier_uniform_(self.projection)
        nn.init.normal_(self.bias, std=1e-6)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return ``[..., S, M]`` of ``[..., d]``."""
        modules, width = self.gating.shape
        if hidden.numel() <= FEW * width:
            made = (hidden[..., None, :] * self.gating) @ self.projection
        else:  # the matrix of all d x S M products is made once, for many tokens
            matrix = (self.gating.T[:, :, None] * self.projection[:, None]).flatten(1)
            made = (hidden @ matrix).unflatten(-1, (modules, -1))
        return made + self.bias.view(modules, -1)


class ModuleConvolution(nn.Module):
    """A causal convolution over length and modules, with the same kernel for all modules.

    Attributes:
        weight: ``[out, in, tokens, modules]``, the last of the tokens the present one; begins as by Glorot.
        bias: ``[out]``; begins as N(0, 1e-6^2).
    """

    def __init__(self, inputs: int, outputs: int, tokens: int, modules: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, tokens, modules))
        self.bias = nn.Parameter(torch.empty(outputs))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights as the authors do."""
        nn.init.xavier_uniform_(self.weight)
        nn.init.normal_(self.bias, std=1e-6)

    def forward(self, longer: Tensor, rows: TokenRows) -> Tensor:
        """Return ``[B, N, S, out]`` of ``[B, tokens - 1 + N, S, in]``, whose first places precede the tokens."""
        tokens, modules = self.weight.shape[2:]
        count, half = longer.shape[1] - tokens + 1, modules // 2
        if rows.documents is not None:
            return self._of_documents(longer, rows, count)
        if count == 1:  # windows are smaller than the kernel that a convolution would reorder
            taps = functional.pad(longer, (0, 0, half, half)).unfold(2, modules, 1)  # [B, tokens, S, in, modules]
            taps = taps.permute(0, 2, 3, 1, 4).flatten(2)
            return functional.linear(taps, self.weight.flatten(1), self.bias)[:, None]
        made = functional.conv2d(longer.permute(0, 3, 1, 2), self.weight, self.bias, padding=(0, half))
        return made.permute(0, 2, 3, 1)

    def _of_documents(self, longer: Tensor, rows: TokenRows, count: int) -> Tensor:
        """Compute each distance by itself: a token reads none of another document."""
        tokens, modules = self.weight.shape[2:]
        made: Tensor | None = None
        for tap in range(tokens):
            one = functional.conv2d(
                longer[:, tap : tap + count].permute(0, 3, 1, 2), self.weight[:, :, tap : tap + 1],
                padding=(0, modules // 2),
            ).permute(0, 2, 3, 1)  # fmt: skip
            if tap < tokens - 1:
                same = rows.same_document(tokens - 1 - tap)
                assert same is not None
                one = one.masked_fill(~same[:, :, None, None], 0)
            made = one if made is None else made + one
        assert made is not None
        return made + self.bias


class SparseQKV(nn.Module):
    """The projections of one attention.

    Attributes:
        shared: the multiplicative layer that queries, keys and values share.
        query, key, value: convolutions; None for keys that are the queries.
        output_name: of the output projection in the attention.
    """

    output_name = ""

    def __init__(self, settings: QkvSettings) -> None:
        super().__init__()
        own, modules = settings, settings.modules
        self.settings = own
        width = own.width // modules
        self.shared = Multiplicative(modules, own.width, own.width)
        self.query = ModuleConvolution(width, own.query // modules, own.kernel, 3)
        self.key = None if own.share_qk else ModuleConvolution(width, own.key // modules, own.kernel, 3)
        more = 1 if own.concat == "none" else 2
        self.value = ModuleConvolution(more * width, own.key // modules, own.kernel, 1)

    def forward(
        self, hidden: Tensor, rows: TokenRows, held: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor, dict[str, Tensor]]:
        """Return queries, keys and values ``[B, N, features]``, and what the next tokens read of these.

        Padding is zero for its neighbours, as the places before the first token of a row are.

        Args:
            hidden: ``[B, N, d]``.
            rows: says which tokens are padding, and which are of one document.
            held: of the tokens before.
        """
        own = self.settings
        parts = {"made": rows.cleared(self.shared(hidden))}
        if own.concat != "none":
            parts["hidden"] = rows.cleared(hidden)
        before = own.kernel - 1
        longer = {
            name: functional.pad(part, (0, 0) * (part.dim() - 2) + (before, 0))
            if held is None
            else torch.cat([held[name].to(part), part], 1)
            for name, part in parts.items()
        }
        made = longer["made"]
        query = self.query(made, rows).flatten(2)
        key = None if self.key is None else self.key(made, rows).flatten(2)
        value = self.value(self._with_hidden(made, longer.get("hidden")), rows).flatten(2)
        return query, key, value, {name: part[:, part.shape[1] - before :].detach() for name, part in longer.items()}

    def _with_hidden(self, made: Tensor, hidden: Tensor | None) -> Tensor:
        """Return what values read: the shared output, with the hidden state beside it where the settings say so."""
        if hidden is None:
            return made
        if self.settings.concat == "fixed":
            return torch.cat([made, hidden.unflatten(-1, (self.settings.modules, -1))], -1)
        return torch.cat([made.flatten(2), hidden], -1).unflatten(-1, (self.settings.modules, -1))


class Handed(nn.Module):
    """Stands where a layer projected the hidden state: it returns what was computed before. It has no weights."""

    out_features: int

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out_features = width
        self.held = ThreadValue()

    def forward(self, hidden: Tensor) -> Tensor:
        """Return what is held, once."""
        made = self.held.take()
        if made is None:
            raise ValueError("a projection of this attention is read twice, or by another module: it is made once")
        return made


class Unchanged(nn.Module):
    """Stands where an output projection was: the authors have none."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Return ``hidden``."""
        return hidden


class MultiplicativeOutput(Multiplicative):
    """An output projection that is a multiplicative layer."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Return ``[..., d]`` of ``[..., d]``."""
        return super().forward(hidden).flatten(-2)


class ConvolvedOutput(nn.Module):
    """An output projection that is a multiplicative layer and a convolution over length and modules.

    Attributes:
        product: the multiplicative layer.
        mix: the convolution; a token reads the products of those before it, which are held beside the cache.
        before: which tokens are padding, and the products of the tokens before: left for the next call.
        after: what the tokens behind read: left by the last call.
    """

    def __init__(self, settings: QkvSettings) -> None:
        super().__init__()
        width = settings.width // settings.modules
        self.product = Multiplicative(settings.modules, settings.query, settings.width)
        self.mix = ModuleConvolution(width, width, settings.kernel, 3)
        self.before: Any = ThreadValue()
        self.after = ThreadValue()

    def forward(self, hidden: Tensor) -> Tensor:
        """Return ``[B, N, d]`` of ``[B, N, heads]``."""
        given: Any = self.before.take()
        if given is None:
            raise ValueError("an output projection by a convolution is read twice, or by another module")
        rows, held = given
        made, reach = rows.cleared(self.product(hidden)), self.mix.weight.shape[2] - 1
        longer = functional.pad(made, (0, 0, 0, 0, reach, 0)) if held is None else torch.cat([held.to(made), made], 1)
        self.after.leave(longer[:, longer.shape[1] - reach :].detach())
        return self.mix(longer, rows).flatten(2)


class SparseProjections(nn.Module):
    """Mixin of an attention module of transformers, whose queries, keys and values are those of ``sparse_qkv``."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        rows = require_rows(kwargs, "attention with sparse projections")
        kwargs = {name: value for name, value in kwargs.items() if name != ROWS}
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        part: Any = self.sparse_qkv
        layer = hold((*args, *kwargs.values()), getattr(self, "layer_idx", None))
        held = None if layer is None else layer.take(STATE, rows.seen, len(hidden))
        query, key, value, after = part(hidden, rows, held)
        hand_over(self, query, key, value)
        last = getattr(self, part.output_name, None)
        if isinstance(last, ConvolvedOutput):
            last.before.leave((rows, None if held is None else held["output"]))
        found = super().forward(*args, **kwargs)
        if isinstance(last, ConvolvedOutput):
            after["output"] = last.after.take()
        if layer is not None:
            layer.put(STATE, rows.seen + hidden.shape[1], after)
        return found


def hand_over(module: Any, query: Tensor, key: Tensor | None, value: Tensor) -> None:
    """Give the projections of an attention module what they return next."""
    own: QkvSettings = module.sparse_qkv.settings
    if key is None:
        same = own.query == own.key
        key = query if same else value.new_zeros(1).expand(*value.shape)
    names = module.sparse_qkv_names
    if len(names) == 1:
        module.get_submodule(names[0]).held.leave(torch.cat([query, key, value], -1))
        return
    for name, made in zip(names, (query, key, value), strict=True):
        module.get_submodule(name).held.leave(made)


def layout_of_projections(module: nn.Module) -> tuple[tuple[str, ...], str] | None:
    """Return the names of what projects queries, keys and values, and of the output; None if they are others."""
    for names, output in LAYOUTS:
        if all(isinstance(getattr(module, name, None), nn.Module) for name in (*names, output)):
            return names, output
    return None


def sparsify_projections(module: Any, settings: QkvSettings, mixin: type = SparseProjections) -> None:
    """Replace the projections of an attention module of transformers, in place. Raises ``ValueError`` if it has others.

    The new weights have the device and dtype of those before.
    """
    found = layout_of_projections(module)
    if found is None:
        raise ValueError(f"{type(module).__name__} projects queries, keys and values in layers of unknown names")
    names, output = found
    weight = next(module.get_submodule(names[0]).parameters())
    about: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    module.sparse_qkv = SparseQKV(settings).to(**about).train(module.training)
    module.sparse_qkv_names = names
    module.sparse_qkv.output_name = output
    sizes = (settings.query, settings.key, settings.key)
    for name, size in zip(names, (sum(sizes),) if len(names) == 1 else sizes, strict=True):
        setattr(module, name, Handed(size).train(module.training))
    if settings.output == "none":
        setattr(module, output, Unchanged().train(module.training))
    elif settings.output == "mult":
        made = MultiplicativeOutput(settings.modules, settings.query, settings.width)
        setattr(module, output, made.to(**about).train(module.training))
    elif settings.output == "multconv":
        setattr(module, output, ConvolvedOutput(settings).to(**about).train(module.training))
    module.__class__ = mixed(mixin, type(module))  # type: ignore[arg-type]
