"""Sparse feed-forward layers of the Scaling Transformer: of each block of N units a token computes one.

    y = (max(0, x W1) * m) W2 + b2          m: in each block of N units one 1, elsewhere 0
    m = argmax over the block of  (x C1) C2 + c

The controller is linear and of low rank. In training, the choice is the argmax of ``log_softmax(l) + 0.1 g`` with
Gumbel noise g and the gradient of the softmax; 30 % of the calls of a layer take it, the others take the softmax as m.
In inference it is the argmax, and a token reads its units alone: one row of W1, and one of W2, which is stored
transposed, for each block.

Jaszczur, Chowdhery, Mohiuddin, Kaiser, Gajewski, Michalewski, Kanerva, "Sparse is Enough in Scaling Transformers",
arXiv 2111.12763. What is not in the paper:

- The conversion of a dense layer. The paper trains from scratch (``start: random``). Here the controller first learns,
  on calibration data, which unit of a block contributes most, ``|a| |W2 row|``; then the model is trained on.
- Which units form a block (``arrangement``): of a converted layer those that are seldom needed together. Without
  sparsity this is an exact permutation of the dense layer.
- Activations other than ReLU, biases b1, and gates: a unit of a gated layer is a row of gate, up and down projection.
- Codes of the units, of 8 or 4 bits.

The authors' code (Trax) multiplies by the softmax if asked (``controller_output``), scales W2 by sqrt(N) at the start
(``kernel_scaling``), and has the rows of W2 in another order than those of W1. Here both have the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_optim import Contract, ModelError, Paper, RecipeError, Reload, Technique, hookimpl, option, technique, traits
from hf_optim.checkpoints.remote_code import RemoteCode, convert, converted_skeleton, generate, joined, require_own_code
from hf_optim.toolkit import topology
from hf_optim.toolkit.modules import (
    feed_forward_inlets,
    main_output,
    relative_difference,
    replace,
    rounding_tolerance,
    thread_values,
)
from hf_optim.toolkit.statistics import sample_feed_forwards
from hf_optim.toolkit.topology import (
    FeedForward,
    NoInputsError,
    dummy_inputs,
    inlet_entries,
    place_layer,
    weight_out_in,
)

from . import _sparse_ffn_codes, _sparse_ffn_kernel, _sparse_ffn_modules, _sparse_ffn_record
from ._sparse_ffn_controller import Units, contributions, exclusive_order, train_controller

if TYPE_CHECKING:
    from hf_optim import Card, Run, Scope


@technique(
    "sparse_ffn",
    family="sparsity",
    paper=Paper("2111.12763", "Sparse is Enough in Scaling Transformers", 2021),
    contract=Contract(
        needs={traits.FLOAT_WEIGHTS},
        forbids={traits.MOE, traits.QUANTIZED},
        owns={"feed-forward"},
    ),
    reload=Reload.REMOTE_CODE,
)
class SparseFFN(Technique):
    """Let a controller pick one unit of each block in feed-forward layers, and compute these alone.

    Attributes:
        targets: the last linear layers of the feed-forward layers to change, by class, name or pattern.
        skip: patterns of such layers to leave dense.
        block: N, units of a block, a divisor of the units of each layer. 1 keeps the dense layer.
        rank: of the controller; None takes the width over N, as in the paper.
        start: ``dense`` converts the layers of the model; ``random`` draws all of their weights, for training from
            scratch.
        arrangement: which units form a block of a converted layer: those that are seldom needed together
            (``exclusive``), or those that follow each other (``given``).
        controller_bias: give the logits a bias.
        controller_output: multiply a unit by the softmax of its choice.
        kernel_scaling: multiply random W2 by sqrt(N).
        temperature: T of the Gumbel noise in training.
        hard_share: share of a layer's calls in training that pick; the others mix by the softmax.
        gather_rows: most tokens of a call that read chosen rows alone; more compute all units. None: by N.
        bits: of the units' weights when the stage is complete: 8 or 4, in rows of codes; 16 leaves floats.
        group_size: weights of a row with one scale; None: all of them.
        tokens: size of the sample of calibration tokens for blocks and controllers; up to twice as many are kept.
        epochs: of a controller on this sample.
        seed: of controllers and random weights.
    """

    targets: tuple[str, ...] = ("Linear",)
    skip: tuple[str, ...] = ()
    block: int = option(32, low=1, high=65536)
    rank: int | None = option(None, low=1)
    start: Literal["dense", "random"] = "dense"
    arrangement: Literal["exclusive", "given"] = "exclusive"
    controller_bias: bool = True
    controller_output: bool = False
    kernel_scaling: bool = False
    temperature: float = option(0.1, low=0.0)
    hard_share: float = option(0.3, low=0.0, high=1.0)
    gather_rows: int | None = option(None, low=0, high=65536)
    bits: Literal[16, 8, 4] = 16
    group_size: int | None = option(None, low=2)
    tokens: int = option(4096, low=2)
    epochs: int = option(10, low=0)
    seed: int = option(0, low=0, high=2**63 - 1)

    remote_code: ClassVar[RemoteCode] = RemoteCode(
        name="sparse_ffn",
        source=joined(
            replace, thread_values, feed_forward_inlets, _sparse_ffn_codes, _sparse_ffn_kernel, _sparse_ffn_modules
        ),
        field=_sparse_ffn_modules.SparseFFNModules.replaced_field,
        model_base=_sparse_ffn_modules.SparseFFNModules.__name__,
    )

    @classmethod
    def for_testing(cls) -> Technique:
        return cls.from_dict({"block": 4, "rank": 4, "epochs": 2})

    def validate(self) -> None:
        if self.block == 1 and self.rank is not None:
            raise RecipeError(
                f"sparse_ffn: with block 1 there is nothing to choose, so a controller of rank {self.rank} has no use; "
                "leave out rank"
            )
        if self.kernel_scaling and self.start == "dense":
            raise RecipeError("sparse_ffn: kernel_scaling is for weights that are drawn (start='random')")
        if self.group_size is not None and self.bits == 16:
            raise RecipeError("sparse_ffn: group_size is of codes; set bits to 8 or 4")

    def needs_data(self) -> bool:
        return self.start == "dense" and self.block > 1

    def needs_whole_model(self) -> bool:
        return True

    def changes_architecture(self) -> bool:
        return True

    def check_model(self, model: PreTrainedModel, label: str) -> None:
        try:
            self._layers(model, label)
        except NoInputsError:
            return  # calibration data may have them

    def model_after(self, model: PreTrainedModel, label: str) -> PreTrainedModel | None:
        try:
            layers, _ = self._layers(model, label)
        except NoInputsError:
            return None
        entries = {layer.down: self._entry(model, layer, label) for layer in layers}
        return converted_skeleton(model, self.remote_code, {"modules": {**inlet_entries(layers), **entries}})

    # -- which layers -------------------------------------------------------------------------------------------------
    def _layers(self, model: PreTrainedModel, label: str) -> tuple[list[FeedForward], dict[str, list[str]]]:
        """Return the feed-forward layers to change, and what is left dense, by reason. Raises ``ModelError``."""
        chosen, skipped = topology.select_feed_forwards(model, self.targets, self.skip, label, "to make sparse")
        for layer in chosen:
            self._entry(model, layer, label)
        require_own_code(model, self.remote_code, label)
        return chosen, skipped

    def _entry(self, model: PreTrainedModel, layer: FeedForward, label: str, bits: int = 16) -> dict[str, Any]:
        """Return what the configuration says of a layer. Raises ``ModelError`` if its sizes do not fit."""
        units, down = units_of(model, layer), weight_out_in(model.get_submodule(layer.down))
        width, out = units.up[0].shape[1], down.shape[0]
        rank = 0 if self.block == 1 else self.rank or max(1, width // self.block)
        if len(layer) % self.block:
            raise ModelError(
                f"{label}: blocks of {self.block} units do not divide the {len(layer)} units of {layer.down}; set "
                f"block to a divisor: {divisors(len(layer))}"
            )
        if rank > width:
            raise ModelError(
                f"{label}: a controller of rank {rank} is no smaller than a full one for the {width} inputs of "
                f"{layer.producers[0]}; set rank to at most {width}"
            )
        entry = {
            "block": self.block,
            "rank": rank,
            "neurons": len(layer),
            "width": width,
            "out": out,
            "act": layer.activation,
            "gated": layer.gate is not None,
            "bias": units.up[1] is not None or (units.gate is not None and units.gate[1] is not None),
            "out_bias": model.get_submodule(layer.down).bias is not None,
            "controller_bias": self.controller_bias,
            "controller_output": self.controller_output,
            "temperature": self.temperature,
            "hard_share": self.hard_share,
            "gather_rows": self._gather_rows(),
            "bits": bits,
            "group": self.group_size,
            "inlets": list(layer.producers),
        }
        try:
            return _sparse_ffn_modules.sparse_ffn_settings({**entry, "bits": self.bits}) | {"bits": bits}
        except ValueError as error:
            raise ModelError(f"{label}: {layer.down}: {error}") from error

    def _gather_rows(self) -> int:
        """Return up to how many tokens read chosen rows: more of them read most rows of a block between them."""
        return _sparse_ffn_modules.gathered_tokens(self.block) if self.gather_rows is None else self.gather_rows

    # -- the work -----------------------------------------------------------------------------------------------------
    @hookimpl
    def calibrate(self, run: Run, scope: Scope) -> Iterator[None]:
        model, label = scope.model, run.label(self)
        layers, skipped = self._layers(model, label)
        samples: dict[str, Tensor] = {}
        if self.needs_data():
            samples, layers, unreached = yield from sample_feed_forwards(model, layers, label, self.tokens)
            skipped |= unreached
        else:
            yield
        expected = main_output(model, dummy_inputs(model)) if self.start == "dense" else None
        made = self._replace(run, layers, samples)
        if expected is not None:
            self._verify(model, made, expected, label)
        run.cover(self, made, skipped)
        figures = run.state(self).figures
        del run.state(self).figures
        run.report(self, layers=figures, **_sparse_ffn_record.totals(figures))

    @torch.no_grad()
    def _replace(self, run: Run, layers: list[FeedForward], samples: dict[str, Tensor]) -> dict[str, Any]:
        """Replace the linear layers of the feed-forward layers; return the new modules by name of the last one."""
        model, label = run.model, run.label(self)
        code: Any = generate(self.remote_code, type(model.config))  # type: ignore[arg-type]
        entries: dict[str, dict[str, Any]] = {}
        made: dict[str, Any] = {}
        run.state(self).figures = {}
        for layer in layers:
            entry, x = self._entry(model, layer, label), samples.pop(layer.down, None)
            last: Any = model.get_submodule(layer.down)
            about = {"dtype": last.weight.dtype, "device": last.weight.device}
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed + len(made))
                ffn = code.PlacedSparseFFN(entry, about)
                if self.start == "random":
                    ffn.reset_parameters(getattr(model.config, "initializer_range", 0.02), self.kernel_scaling)
            before = sum(p.numel() for n in (layer.down, *layer.producers) for p in model.get_submodule(n).parameters())
            if self.start == "dense":
                self._fill(ffn, units_of(model, layer), last.bias, x, label)
            run.state(self).figures[layer.down] = {
                "units": len(layer),
                "block": self.block,
                "rank": entry["rank"],
                "bits": self.bits,
                "parameters": before,
                "computed": _sparse_ffn_record.computed_numbers(ffn),
                **({} if x is None else {"tokens": len(x), **_sparse_ffn_record.choice_figures(ffn, x)}),
            }
            for name in (layer.down, *layer.producers):
                run.masks.pop(f"{name}.weight", None)
                run.nm_patterns.pop(f"{name}.weight", None)
            place_layer(model, layer, ffn, code.Inlet)
            entries[layer.down], made[layer.down] = entry, ffn
        convert(model, self.remote_code, {"modules": {**inlet_entries(layers), **entries}})
        return made

    def _fill(self, ffn: Any, units: Units, bias: Tensor | None, x: Tensor | None, label: str) -> None:
        """Copy a dense layer into ``ffn``, its units in blocks, and train the controller on inputs ``x``."""
        order = torch.arange(len(units.down), device=units.down.device)
        if x is not None:
            mass = contributions(x, units, ffn.act_fn)
            if self.arrangement == "exclusive":
                order = exclusive_order(mass, self.block)
            found = train_controller(
                x, mass[:, order], self.block, ffn.entry["rank"], self.controller_bias, self.epochs, self.seed, label
            )
            ffn.controller_in.copy_(found.first)
            ffn.controller_out.copy_(found.second)
            if self.controller_bias:
                ffn.controller_bias.copy_(found.bias)
        for name, part in (("up", units.up), ("gate", units.gate)):
            if part is not None:
                getattr(ffn, name).copy_(part[0][order])
                if ffn.entry["bias"]:
                    getattr(ffn, f"{name}_bias").copy_(0 if part[1] is None else part[1][order])
        ffn.down.copy_(units.down[order])
        if bias is not None:
            ffn.bias.copy_(bias)

    def _verify(self, model: PreTrainedModel, made: dict[str, Any], expected: Tensor, label: str) -> None:
        """Raise ``ModelError`` unless the model computes what the dense one did, with all units on."""
        settings = {name: ffn.entry for name, ffn in made.items()}
        for ffn in made.values():
            ffn.entry = {**ffn.entry, "block": 1}
        found = main_output(model, dummy_inputs(model))
        for name, ffn in made.items():
            ffn.entry = settings[name]
        gap = relative_difference(found, expected)
        if not gap <= rounding_tolerance(model):
            raise ModelError(
                f"{label}: with all units on, {type(model).__name__} does not compute what the dense model computes "
                f"(relative difference {gap:.1e}); this architecture is not supported"
            )

    @hookimpl
    def finalize_model(self, run: Run) -> None:
        if self.bits < 16:
            model: Any = run.model
            model.encode_units(self.bits, self.group_size)

    def recompute(self, case: Any) -> dict[str, Any]:
        return _sparse_ffn_record.recompute(case, self.needs_data())

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        _sparse_ffn_record.write(run.reported(self), card)


def units_of(model: PreTrainedModel, layer: FeedForward) -> Units:
    """Return the units of a dense feed-forward layer, row by row."""

    def rows(part: Any) -> tuple[Tensor, Tensor | None]:
        module: Any = model.get_submodule(part.name)
        bias = None if module.bias is None else module.bias.detach()[part.index]
        return weight_out_in(module).detach()[part.index], bias

    down = weight_out_in(model.get_submodule(layer.down)).detach()[:, layer.columns]
    return Units(rows(layer.up), rows(layer.gate) if layer.gate else None, down.t())


def divisors(number: int) -> str:
    """Return the divisors of a number above 1, as text; of many the middle ones are left out."""
    found = [str(n) for n in range(2, number + 1) if number % n == 0]
    return ", ".join(found if len(found) <= 12 else [*found[:6], "...", *found[-6:]])


@hookimpl
def register_techniques(register) -> None:
    register(SparseFFN)
