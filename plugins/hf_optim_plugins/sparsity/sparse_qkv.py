"""Sparse projections of queries, keys and values: a multiplicative layer shared by all, and three small convolutions.

    y[s, m] = sum_i x[i] D[i, s] E[i, m] + b[s, m],     s: one of S modules, m: one of M = d / S features of a module
    q = conv(y), k = conv(y): 3 tokens x 3 modules,     v = conv(y): 3 tokens x 1 module,     causal in the length

Jaszczur, Chowdhery, Mohiuddin, Kaiser, Gajewski, Michalewski, Kanerva, "Sparse is Enough in Scaling Transformers",
arXiv 2111.12763, section 3.2, by the code of its authors (Trax): one shared multiplicative layer, gates drawn from
N(0, 0.5^2), projections uniform as by Glorot, biases, **no output projection**. The layer represents every permutation
of its input exactly (D says in which module an input lands, E at which place), and has S d + d^2 / S + 21 (d / S)^2
weights where four dense projections have 4 d^2.

- ``concat`` gives values the hidden state beside y: ``fixed`` module by module, ``original`` as the authors' first
  experiments, without regard to modules.
- ``output``: ``none`` as in the paper; ``mult`` is another multiplicative layer, ``multconv`` one with a convolution
  behind it; ``dense`` keeps the projection of the model (not the paper's, for a pretrained model).
- ``share_qk``: keys are the queries, for models with as many key heads as query heads.
- Heads: queries are cut into the heads of the model in the order of their features, so that with S heads a module is a
  head. With fewer key heads than query heads (GQA), the kernels of keys and values have fewer outputs in each module:
  S must divide d and the features of all queries and of all keys.
- Convolutions end the independence of the projections of a token from its neighbours. A padded position is zero for
  its neighbours, as places before the first token are, so padding on either side changes nothing; documents of packed
  rows (by ``position_ids``) do not read each other. Padding between tokens of a row counts as places.
- Decoding: a cache holds y of the last two tokens of each layer (with ``concat``, the hidden states as well) beside
  keys and values. It cannot be cropped, since y of earlier tokens is gone.

Trained from scratch in the paper. A pretrained model is converted as follows: ``distill_steps`` lets the projections of
each layer learn the queries, keys and values of the dense ones on calibration data; the model then needs training. With
``distill_steps: 0`` the new weights are as drawn, for training from scratch. The checkpoint brings its own code.
REMOTE_CODE.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from transformers import PreTrainedModel

from hf_optim import (
    Card,
    Contract,
    ModelError,
    Paper,
    Reload,
    Run,
    Scope,
    Technique,
    hookimpl,
    option,
    technique,
    traits,
)
from hf_optim.checkpoints.remote_code import RemoteCode, convert, joined, require_own_code
from hf_optim.toolkit.attention import (
    hidden_states,
    require_on_interface,
    require_self_attention,
)
from hf_optim.toolkit.modules import (
    mixed_classes,
    relative_difference,
    remote_code_guard,
    rounding_tolerance,
    thread_values,
)
from hf_optim.toolkit.topology import dummy_inputs

from . import _held_parts, _sparse_qkv_model, _sparse_qkv_modules
from ._small_start import begin_small
from ._sparse_qkv_fit import ProjectionFit, handing_dense
from ._sparse_qkv_layout import dense_projections, require_decoder, settings_for


@technique(
    "sparse_qkv",
    family="sparsity",
    paper=Paper("2111.12763", "Sparse is Enough in Scaling Transformers", 2021),
    contract=Contract(
        needs={traits.FLOAT_WEIGHTS},
        forbids={traits.QUANTIZED, traits.SPARSE_ATTENTION, traits.TIED_BLOCKS},
        owns={"attention"},
    ),
    reload=Reload.REMOTE_CODE,
)
class SparseQKV(Technique):
    """Compute queries, keys and values by a multiplicative layer and convolutions. The model has to be trained.

    Attributes:
        modules: S, of which each has 1/S of the features; None: as many as the model has query heads.
        kernel: tokens that a convolution reads, the present one among them.
        concat: what values read beside the shared output: nothing, or the hidden state, by module (``fixed``) or as in
            the authors' first experiments (``original``).
        output: the output projection: ``none``, a multiplicative layer (``mult``), with a convolution behind
            it (``multconv``), or that of the model (``dense``).
        share_qk: keys are the queries.
        distill_steps: optimizer steps in which the projections learn the dense ones, one for each calibration batch; 0
            for none, which needs no data.
        distill_rate: highest learning rate of these steps.
        small_start: values begin as small as other layers of the model do when they are drawn; False: as large as the
            authors', whose embeddings are of size 1.
        seed: of the new weights.
    """

    modules: int | None = option(None, low=1, high=65536)
    kernel: int = option(3, low=1, high=64)
    concat: Literal["none", "fixed", "original"] = "none"
    output: Literal["none", "mult", "multconv", "dense"] = "none"
    share_qk: bool = False
    distill_steps: int = option(0, low=0)
    distill_rate: float = option(3e-3, above=0.0)
    small_start: bool = True
    seed: int = option(0, low=0, high=2**31 - 1)

    remote_code: ClassVar[RemoteCode] = RemoteCode(
        name="sparse_qkv",
        source=joined(
            remote_code_guard, mixed_classes, thread_values, _held_parts, _sparse_qkv_modules, _sparse_qkv_model
        ),
        config_base=_sparse_qkv_model.SparseQkvConfig.__name__,
        field=_sparse_qkv_model.SPARSE_QKV,
        model_base=_sparse_qkv_model.SparseQkvModel.__name__,
    )

    def needs_data(self) -> bool:
        return self.distill_steps > 0

    def needs_whole_model(self) -> bool:
        return True

    def _settings(self, model: PreTrainedModel, label: str) -> dict[str, Any]:
        about = {name: getattr(self, name) for name in ("kernel", "concat", "output", "share_qk")}
        return settings_for(model, self.modules, about, label)

    def check_model(self, model: PreTrainedModel, label: str) -> None:
        require_on_interface(model, label)
        require_decoder(model, label)
        require_own_code(model, self.remote_code, label)
        self._settings(model, label)

    @hookimpl
    def prepare_load(self, run: Run, load_kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
        require_self_attention(run.config, run.label(self))
        return None

    @hookimpl
    def transform_model(self, run: Run) -> PreTrainedModel:
        model, label = run.model, run.label(self)
        self.check_model(model, label)
        settings = self._settings(model, label)
        before = model.num_parameters()
        inputs = dummy_inputs(model.base_model)  # type: ignore[arg-type]
        expected = hidden_states(model, inputs)
        dense = dense_projections(model, settings)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            _sparse_qkv_model.add_sparse_projections(model, settings)
        if self.small_start:
            begin_small(model, getattr(model.config, "initializer_range", 0.02))
        convert(model, self.remote_code, settings)
        with handing_dense(dense):
            gap = relative_difference(hidden_states(model, inputs), expected)
        if not gap <= rounding_tolerance(model):
            raise ModelError(
                f"{label}: with its dense projections handed over, {type(model).__name__} does not compute what it did "
                f"(relative difference {gap:.1e}): its attention is not one of projections alone; this architecture is "
                "not supported"
            )
        if self.distill_steps:
            run.state(self).dense = dense
        run.record.reload = Reload.REMOTE_CODE.name
        run.report(
            self,
            **settings,
            layers=len(dense),
            parameters_before=before,
            parameters_after=model.num_parameters(),
            share_of_parameters=model.num_parameters() / before,
            model_class=type(model).__name__,
        )
        return model

    @hookimpl
    def calibrate(self, run: Run, scope: Scope) -> Iterator[None]:
        if not self.distill_steps:
            return
        dense = run.state(self).dense
        fit = ProjectionFit(dense, run.label(self), self.distill_steps, self.distill_rate)
        with handing_dense(dense, projections=False), fit:
            yield from fit.passes()
        run.report(self, distillation=fit.figures())

    def recompute(self, case: Any) -> dict[str, Any]:
        before = sum(parameter.numel() for parameter in case.before.parameters())
        after = sum(parameter.numel() for parameter in case.after.parameters())
        return {
            **case.config["sparse_qkv"],
            "layers": len(case.config["layer_types"]),
            "parameters_before": before,
            "parameters_after": after,
            "share_of_parameters": after / before,
            "model_class": case.config["architectures"][0],
        }

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        figures = run.reported(self)
        found = figures.get("distillation")
        learned = (
            ""
            if not found
            else f" They learned those of the dense model in {found['steps']} steps on the calibration data: the "
            f"squared error fell from {found['before']:.1%} to {found['after']:.1%} of their squares."
        )
        card.paragraph(
            "Sparse projections",
            f"Queries, keys and values come from a multiplicative layer of {figures['modules']} modules and "
            f"convolutions over {figures['kernel']} tokens: {figures['parameters_before']:,} parameters became "
            f"{figures['parameters_after']:,} ({figures['share_of_parameters']:.1%}).{learned}",
        )


@hookimpl
def register_techniques(register) -> None:
    register(SparseQKV)
