"""Adaptive computation time: each token decides after each step of a Universal Transformer whether it takes another.

    p_n = sigmoid(w s_n + b),   N = min { n : p_1 + ... + p_n >= 1 - eps },  at most the steps of the model
    R = 1 - (p_1 + ... + p_{N-1}),   y = p_1 s_1 + ... + p_{N-1} s_{N-1} + R s_N,   loss + ponder_cost * mean(N + R)

Graves, "Adaptive Computation Time for Recurrent Neural Networks", arXiv 1603.08983, sections 2 and 2.1; per token and
over depth as in Dehghani et al., "Universal Transformers", arXiv 1807.03819, section 2.2. s_n is the state of a token
after step n. The authors' code (tensor2tensor) differs, by options:

- ``mix: t2t``: y = p_n s_n + (1 - p_n) y, step after step from y = 0, in place of the sum. Its weights do not add up
  to 1.
- ``halted: recomputed``: a token that has halted is transformed further, and others attend to that. In the paper its
  state is ``copied``.
- ``reads: before``: p_n is computed from the input of step n, with its signals.
- There, a token that never reaches 1 - eps has no remainder: its weights sum to less than 1, to nearly nothing for
  small p. Here the remainder is that of the last step in all cases, as in Graves.

What a halted token costs: in evaluation, rows and tokens that run are gathered, and the queries, the output projection
and the feed-forward layer are computed for them alone. Others still attend to a halted token, so each later step has
its keys and values: the projections of its last state, with that step's signals. With ``step_signal: none`` and one
block they stay the same, and are computed once. When all tokens have halted, the steps end; with a cache, their keys
are still computed for the steps that are left, since a later token may take them. So decoding gives what one pass over
all gives. With ``copied``, a row does not depend on what else is in its batch. Training computes all tokens in all
steps, as a process group of several ranks does.

Only tied blocks can halt: what a token keeps is one state that a step refines. The states of a stack of different
blocks, of which each reads what the one before it wrote, do not estimate the same thing; a sum of them, or the
state of layer 3 as a key in layer 7, is nothing that the pretrained layers know. So the model must be one of
``universal_transformer``.

The checkpoint brings its own code. REMOTE_CODE.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from transformers import PreTrainedModel, TrainerCallback

from hf_optim import Card, Contract, ModelError, Paper, Reload, Run, Technique, hookimpl, option, technique, traits
from hf_optim.checkpoints.remote_code import RemoteCode, convert, generate, joined, revert, stock_class
from hf_optim.toolkit.modules import (
    eval_mode,
    main_output,
    mixed_classes,
    own_loss,
    relative_difference,
    remote_code_guard,
    rounding_tolerance,
    tied_blocks,
)
from hf_optim.toolkit.topology import dummy_inputs

from . import _act_model, _chosen_tokens, _halted_attention, _halting, _halting_kernel


@technique(
    "act",
    family="adaptive",
    paper=Paper("1603.08983", "Adaptive Computation Time for Recurrent Neural Networks", 2016),
    contract=Contract(
        needs={traits.FLOAT_WEIGHTS, traits.TIED_BLOCKS},
        forbids={traits.QUANTIZED},
        keeps={traits.SPARSE, traits.SPARSE_NM},
        owns={"attention", "halting"},
    ),
    reload=Reload.REMOTE_CODE,
)
class ACT(Technique):
    """Let each token halt after as many steps of a Universal Transformer as it needs.

    Attributes:
        epsilon: a token halts when its probabilities reach 1 - epsilon, so that one step can be enough.
        bias: of the halting unit at the start, whose weights begin at zero: sigmoid(1) = 0.73 makes it two steps.
        mix: of the states of a token's steps to the output: Graves' weighted sum, or that of the authors' code.
        halted: what others see of a halted token: its state ``copied``, or ``recomputed`` on, which saves nothing.
        reads: the halting unit reads the state ``after`` a step, as in Graves, or ``before`` it.
        ponder_cost: coefficient of the mean of steps + remainder in the training loss.
    """

    epsilon: float = option(0.01, low=0.0, high=0.5)
    bias: float = option(1.0, low=-100.0, high=100.0)
    mix: Literal["graves", "t2t"] = "graves"
    halted: Literal["copied", "recomputed"] = "copied"
    reads: Literal["after", "before"] = "after"
    ponder_cost: float = option(0.01, low=0.0, high=1e6)

    remote_code: ClassVar[RemoteCode] = RemoteCode(
        name="act",
        source=joined(
            remote_code_guard,
            mixed_classes,
            own_loss,
            tied_blocks,
            _chosen_tokens,
            _halted_attention,
            _halting_kernel,
            _halting,
            _act_model,
        ),
        config_base=_act_model.HaltingConfig.__name__,
        field=_act_model.ACT,
        model_base=_act_model.HaltingModel.__name__,
        takes_over="universal_transformer",
    )

    def check_model(self, model: PreTrainedModel, label: str) -> None:
        _require_tied(model, label)

    @hookimpl
    def transform_model(self, run: Run) -> PreTrainedModel:
        model, label = run.model, run.label(self)
        _require_tied(model, label)
        tied = tied_blocks.read_tied_blocks(getattr(model.config, tied_blocks.FIELD))
        fields = {name: getattr(self, name) for name in ("epsilon", "bias", "mix", "halted", "reads", "ponder_cost")}
        settings = {"tied": tied, **fields}
        code: Any = generate(self.remote_code, stock_class(type(model.config)))  # type: ignore[arg-type]
        inputs = dummy_inputs(model)
        expected = main_output(model, inputs)
        _halt(model, settings, code)
        convert(model, self.remote_code, settings)
        model.set_attn_implementation(code.NAME)
        _prove(model, inputs, expected, label)
        run.record.reload = Reload.REMOTE_CODE.name
        run.report(self, steps=tied["steps"], mix=self.mix, halted=self.halted, model_class=type(model).__name__)
        return model

    @hookimpl
    def training_callbacks(self, run: Run) -> list[TrainerCallback]:
        return [CountSteps(self, run)]

    @hookimpl
    def finalize_model(self, run: Run) -> None:
        counts = getattr(run.state(self), "counts", None)
        if counts and sum(counts):
            tokens = sum(counts)
            mean = sum(steps * count for steps, count in enumerate(counts)) / tokens
            run.report(self, tokens=tokens, mean_steps=mean, tokens_by_steps=counts[1:])

    def recompute(self, case: Any) -> dict[str, Any]:
        settings = case.config["act"]
        return {
            "steps": len(case.config["layer_types"]),
            "mix": settings["mix"],
            "halted": settings["halted"],
            "model_class": case.config["architectures"][0],
        }

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        figures = run.reported(self)
        how = "" if figures["halted"] == "copied" else " Tokens that had halted were computed on."
        card.paragraph(
            "Adaptive computation time",
            f"Tokens were let halt after 1 to {figures['steps']} steps.{how}",
        )
        if "mean_steps" in figures:
            card.paragraph(
                "Steps",
                f"In the last epoch of training, a token took {figures['mean_steps']:.2f} steps on average, over "
                f"{figures['tokens']:,} tokens.",
            )
            rows = [[steps, count] for steps, count in enumerate(figures["tokens_by_steps"], 1)]
            card.table("Tokens by steps", ["steps", "tokens"], rows)


class CountSteps(TrainerCallback):
    """Counts tokens by the steps they take, in the last epoch of a training, and keeps the counts for the record."""

    def __init__(self, step: ACT, run: Run) -> None:
        self._step, self._run = step, run

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        passage = _act_model.passage_of(self._run.model)
        device = next(self._run.model.parameters()).device
        passage.tally = torch.zeros(passage.rule.steps + 1, dtype=torch.int64, device=device)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        passage = _act_model.passage_of(self._run.model)
        if passage.tally is not None:
            self._run.state(self._step).counts = passage.tally.tolist()
        passage.tally = None


def _require_tied(model: PreTrainedModel, label: str) -> None:
    """Raise ``ModelError`` unless the model is one of ``universal_transformer``."""
    if not isinstance(getattr(model.config, tied_blocks.FIELD, None), dict) or not tied_blocks.has_steps(model):
        raise ModelError(
            f"{label}: {type(model).__name__} does not apply its blocks in steps that a token could halt between: make "
            "universal_transformer an earlier step of the recipe, without convert_to"
        )
    if not type(model)._can_set_attn_implementation():
        raise ModelError(
            f"{label}: {type(model).__name__} does not take its attention from transformers' AttentionInterface, by "
            "which halted tokens are left out; this architecture is not supported"
        )


def _halt(model: PreTrainedModel, settings: dict[str, Any], code: Any) -> None:
    """Make steps in which tokens halt of the steps of a model, in place; it gets the classes of transformers back.

    ``code`` is the generated module, whose attention the model will have.
    """
    layers: Any = model.base_model.get_submodule(settings["tied"]["blocks"])
    steps = list(layers)
    stack, signals = [step.block for step in steps], steps[0].signals
    revert(model)
    for module in model.modules():  # the code of universal_transformer, maybe that of a checkpoint, notes no more
        if type(module).__bases__[0].__name__ == tied_blocks.NotesInputs.__name__:
            module.__class__ = type(module).__bases__[1]
    for number, block in enumerate(stack):
        layers[number] = block
    made = code.add_halting(model, settings)
    for name, parameter in signals.named_parameters():
        made[0].own_signals.register_parameter(name, parameter)


@torch.no_grad()
def _prove(model: PreTrainedModel, inputs: dict[str, Any], expected: Any, label: str) -> None:
    """Raise ``ModelError`` unless the model without halting is what it was, and leaving out halted tokens is exact."""
    passage = _act_model.passage_of(model)
    unit: Any = next(module.halting_unit for module in model.modules() if "halting_unit" in module._modules)
    state = {name: value.clone() for name, value in unit.state_dict().items()}
    unit.bias.fill_(-float("inf"))
    gaps = [relative_difference(main_output(model, inputs), expected)]
    rows = {name: _rows(value) for name, value in inputs.items()}
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(unit.weight.shape, generator=generator, dtype=torch.float64)
    with eval_mode(model):
        hidden = model.base_model(**rows)[0].double()
    unit.weight.copy_(
        (2 * direction / (direction.norm() * hidden.square().mean().sqrt().clamp_min(1e-6))).to(unit.weight)
    )
    unit.bias.zero_()
    outputs = []
    for whole in (True, False):
        passage.whole = whole
        with eval_mode(model):
            outputs.append(model.base_model(**rows)[0].double())
    passage.whole = False
    gaps.append(relative_difference(outputs[1], outputs[0]))
    unit.load_state_dict(state)
    passage.pondered = None
    if not max(gaps) <= rounding_tolerance(model):
        raise ModelError(
            f"{label}: halting changes more in {type(model).__name__} than which steps its tokens take (relative "
            f"differences {gaps[0]:.1e} and {gaps[1]:.1e}); this architecture is not supported"
        )


def _rows(value: torch.Tensor) -> torch.Tensor:
    """Return three rows of inputs that differ."""
    if value.is_floating_point():
        return torch.cat([value, value.flip(-1) + 1, value.flip(-2)])
    return torch.cat([value, value.roll(1, 1), value.roll(3, 1)])


@hookimpl
def register_techniques(register) -> None:
    register(ACT)
