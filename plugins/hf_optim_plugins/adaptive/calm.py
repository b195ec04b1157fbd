"""Early exits in generation: a token leaves at the first exit that is confident of it, with a bound on what that costs.

    token t leaves after block l if  c_l(t) >= lambda_t,   E[ loss(early output, full output) ] <= delta
    "code":   lambda_t = 0.9 lambda + 0.1 lambda exp(-tau t / N)
    "paper":  lambda_t = min(1, max(0, 0.9 lambda + 0.1 exp(-tau t / N)))

Schuster et al., "Confident Adaptive Language Modeling", arXiv 2207.07061, sections 3 and 4. c_l is the gap of the two
largest probabilities of the exit (``softmax_gap``), the largest (``softmax_max``: in the authors' code, not in the
paper), the cosine of the states after block l and the one before (``state``), or a trained linear function of the state
(``classifier``). lambda is the lowest of some thresholds for which Learn-then-Test proves the bound at level epsilon:
from the highest down, each is tested by the p-value of Hoeffding and Bentkus, until one is not proven.

- The keys and values of the blocks that a token leaves out are made of the state with which it left. The authors' code
  (t5x) takes the state of the first exit for all.
- The two decays differ in the second term: the authors' code multiplies it by lambda, too.
- Decoders alone; the paper's models are encoder-decoders (T5). The prompt, and the first new token with it, run at full
  depth, as the paper's encoder does. A batch does not wait for its slowest row.
- Exits are read by the model's own norm and head, or by those that the model was trained with. Where it was trained
  without exits, early ones are seldom right, and the bound leaves few tokens to gain.
- The classifier has weights for each exit and is fitted to the end, on rows that the calibration does not use.

``lossless``: the exit drafts tokens and the full model verifies them (Zhang et al., arXiv 2309.08168; Elhoushi et al.,
arXiv 2404.16710): its own tokens, with nothing to guarantee.

The weights are unchanged. The setting, with the certificate of what was proven, is an entry of ``config.json`` that
stock transformers ignores; ``hf_optim.generate`` reads it. STOCK_DENSE.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_optim import (
    Card,
    Contract,
    DataError,
    ModelError,
    Paper,
    RecipeError,
    Reload,
    Run,
    Scope,
    Technique,
    early_exit,
    hookimpl,
    option,
    technique,
    traits,
)
from hf_optim.toolkit.modules import eval_mode

# Thresholds to test where none are named. Successive states of a residual stream are nearly parallel.
CANDIDATES = tuple(round(1 - 0.05 * step, 2) for step in range(1, 20))
CANDIDATES_OF_STATES = (0.999, 0.998, 0.995, 0.99, 0.985, 0.98, 0.97, 0.96, 0.95, 0.93, 0.9, 0.85, 0.8, 0.7, 0.5)


@technique(
    "calm",
    family="adaptive",
    paper=Paper("2207.07061", "Confident Adaptive Language Modeling", 2022),
    contract=Contract(keeps={traits.SPARSE, traits.SPARSE_NM}, owns={"generation"}),
    reload=Reload.STOCK_DENSE,
)
class CALM(Technique):
    """Let tokens leave the model early in generation, with a guarantee; the weights are unchanged.

    Attributes:
        guarantee: ``consistency`` bounds the distance of the outputs from the full model's, ``risk`` by how much they
            are further from references than the full model's; ``none`` takes a ``threshold`` as it is.
        delta: the bound on the expected loss.
        epsilon: the probability that the bound is wrong, over calibration sets.
        distance: between token sequences: ``rouge_l`` (1 - F1 of the longest common subsequence) or ``edit_distance``.
        confidence: of an exit.
        layers: indices of the blocks after which a token may leave, from 0; empty for all exits of the model.
        threshold: of the confidence, without a guarantee; above 1 no token leaves.
        candidates: thresholds to test, falling; empty for 0.95 to 0.05 (0.999 to 0.5 for ``state``).
        decay: of the threshold with the number of generated tokens: ``none``, or the form of the ``code`` or ``paper``.
        temperature: tau of the decay.
        length: the limit of new tokens that the guarantee, and N of the decay, are for.
        prompt: tokens of each prompt; a row of the calibration data is a prompt, and its reference behind it.
        lossless: the one exit in ``layers`` drafts, and the full model verifies: its own tokens.
        drafts: the most tokens drafted at once.
        draft_threshold: drafting ends where no row is as confident; 0 drafts always.
    """

    guarantee: Literal["consistency", "risk", "none"] = "consistency"
    delta: float = option(0.1, low=1e-6, high=0.999999)
    epsilon: float = option(0.05, low=1e-9, high=0.5)
    distance: Literal["rouge_l", "edit_distance"] = "rouge_l"
    confidence: Literal["softmax_gap", "softmax_max", "state", "classifier"] = "softmax_gap"
    layers: tuple[int, ...] = ()
    threshold: float | None = None
    candidates: tuple[float, ...] = ()
    decay: Literal["none", "code", "paper"] = "none"
    temperature: float = option(4.0, low=0.0, high=1e6)
    length: int = option(64, low=1, high=1 << 20)
    prompt: int = option(32, low=1, high=1 << 20)
    lossless: bool = False
    drafts: int = option(4, low=1, high=64)
    draft_threshold: float = option(0.0, low=0.0, high=1.0)

    @classmethod
    def for_testing(cls) -> Technique:
        return cls.from_dict({"guarantee": "none", "threshold": 0.5, "length": 16})

    @property
    def settings(self) -> early_exit.EarlyExit:
        """What ``hf_optim.generate`` reads, before the calibration."""
        return early_exit.EarlyExit(
            confidence=self.confidence, threshold=2.0 if self.threshold is None else self.threshold,
            layers=self.layers, decay=self.decay, temperature=self.temperature, length=self.length,
            lossless=self.lossless, drafts=self.drafts, draft_threshold=self.draft_threshold,
        )  # fmt: skip

    @property
    def bound(self) -> early_exit.Bound:
        """What is to be proven."""
        default = CANDIDATES_OF_STATES if self.confidence == "state" else CANDIDATES
        guarantee = self.guarantee if self.calibrates else early_exit.GUARANTEES[0]
        return early_exit.Bound(self.delta, self.epsilon, guarantee, self.distance, self.candidates or default)

    def validate(self) -> None:
        _ = self.settings
        if self.lossless:
            if self.threshold is not None:
                raise RecipeError("calm: lossless drafts have a draft_threshold, and no threshold")
            return
        if self.guarantee == "none" and self.threshold is None:
            raise RecipeError("calm: without a guarantee, name the threshold at which tokens leave")
        if self.guarantee != "none" and self.threshold is not None:
            raise RecipeError(
                f"calm: a threshold of {self.threshold:g} that no calibration has proven guarantees no "
                f"{self.guarantee}: leave threshold out, so that it is calibrated, or set guarantee: none"
            )
        try:
            _ = self.bound
        except RecipeError as error:
            raise RecipeError(f"calm: {error}") from error

    @property
    def calibrates(self) -> bool:
        """True if the threshold is to be calibrated."""
        return self.guarantee != "none" and not self.lossless

    def needs_data(self) -> bool:
        return self.calibrates or self.confidence == "classifier"

    def needs_whole_model(self) -> bool:
        return True

    def check_model(self, model: PreTrainedModel, label: str) -> None:
        self._require(model, label)

    def _require(self, model: PreTrainedModel, label: str) -> None:
        """Raise ``ModelError`` for a model that does not decode, or has no such exits."""
        if not model.can_generate():
            raise ModelError(f"{label}: {type(model).__name__} does not generate, so that no token can leave early")
        try:
            early_exit.Stack(model, self.settings)
        except ModelError as error:
            raise ModelError(f"{label}: {error}") from error

    @hookimpl
    def calibrate(self, run: Run, scope: Scope):
        if not self.needs_data():
            return
        rows: list[Tensor] = []

        def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ids = kwargs.get("input_ids", args[0] if args else None)
            if ids is None:
                raise DataError(f"{run.label(self)}: the calibration batches have no input_ids to make prompts of")
            mask = kwargs.get("attention_mask")
            mask = torch.ones_like(ids) if mask is None else mask
            rows.extend(row[valid.bool()].cpu() for row, valid in zip(ids, mask, strict=True))

        handle = run.model.register_forward_pre_hook(note, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
        run.state(self).rows = rows

    @hookimpl
    def finalize_model(self, run: Run) -> None:
        model, label = run.model, run.label(self)
        self._require(model, label)
        settings = self.settings
        with eval_mode(model):
            stack = early_exit.Stack(model, settings)
            try:
                stack.prove()
                if self.needs_data():
                    settings = self._calibrated(model, stack, self._rows(run, label))
            except ModelError as error:
                raise ModelError(f"{label}: {error}") from error
        early_exit.set_settings(model.config, settings)
        run.report(self, **figures(settings, stack.layers, stack.count))

    def _rows(self, run: Run, label: str) -> list[Tensor]:
        """Return the rows of the calibration data that are long enough."""
        needed = self.prompt + (self.length if self.guarantee == "risk" else 0)
        found = run.state(self).rows
        rows = [row for row in found if len(row) >= needed]
        if not rows:
            longest = max((len(row) for row in found), default=0)
            raise DataError(
                f"{label}: a prompt takes {needed} tokens, and the longest row of the calibration data has {longest}: "
                "set prompt lower, or a longer seq_len of the data"
            )
        if len(rows) == 1 and self.confidence == "classifier" and self.calibrates:
            raise DataError(
                f"{label}: one row of the calibration data is as long as a prompt ({needed} tokens): the classifier "
                "and its threshold need rows of their own"
            )
        if len(rows) < len(found):
            run.warn(self, f"{len(found) - len(rows)} rows of the calibration data are shorter than a prompt.")
        different, _ = early_exit.distinct([row[:needed] for row in rows])
        if len(different) < len(rows):
            run.warn(
                self, f"{len(rows) - len(different)} prompts occurred before and prove nothing: they are left out."
            )
        return rows

    def _calibrated(self, model: Any, stack: early_exit.Stack, rows: list[Tensor]) -> early_exit.EarlyExit:
        settings = self.settings
        if self.confidence == "classifier":
            # What the classifier was fitted to must not prove its threshold.
            half = len(rows) // 2 if self.calibrates else len(rows)
            settings = _with_classifier(model, stack, rows[:half], settings)
            rows = rows[half:]
        if not self.calibrates:
            return settings
        prompts = [row[: self.prompt] for row in rows]
        references = [row[self.prompt : self.prompt + self.length] for row in rows] if self.guarantee == "risk" else []
        return early_exit.calibrate(model, prompts, self.bound, settings, references)

    def recompute(self, case: Any) -> dict[str, Any]:
        settings = early_exit.settings_of(case.after.config)
        assert settings is not None
        stack = early_exit.Stack(case.after, settings)
        return figures(settings, stack.layers, stack.count)

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        figures = run.reported(self)
        if not figures:
            return
        if self.confidence == "classifier":
            early_exit.save_classifier(run.model, directory)
        measured = "Quality, memory and times in the results, where there are any, are those of all blocks."
        card.paragraph("Early exits", f"{_card_text(figures)} {measured}")
        if tested := figures.get("tested"):
            rows = [[threshold, mean, p_value] for threshold, mean, p_value in tested]
            card.table("Thresholds tested", ["threshold", "mean loss", "p-value"], rows)


def _with_classifier(
    model: Any, stack: early_exit.Stack, rows: list[Tensor], settings: early_exit.EarlyExit
) -> early_exit.EarlyExit:
    from dataclasses import replace

    found = [early_exit.states_and_labels(stack, row[None].to(model.device), None) for row in rows]
    states, labels = (torch.cat(each, dim=1) for each in zip(*found, strict=True))
    return replace(settings, classifier=early_exit.set_classifier(model, early_exit.fit(states, labels)))


def figures(settings: early_exit.EarlyExit, layers: tuple[int, ...], blocks: int) -> dict[str, Any]:
    """Return what is reported: the exits, and what was proven."""
    found: dict[str, Any] = {"blocks": blocks, "layers": list(layers), "confidence": settings.confidence}
    if settings.lossless:
        return found | {"lossless": True, "drafts": settings.drafts}
    found |= {"threshold": settings.threshold, "decay": settings.decay, "length": settings.length}
    if (proven := settings.certificate) is None:
        return found
    names = ("guarantee", "distance", "delta", "epsilon", "examples", "prompt", "mean", "p_value", "model")
    return found | {name: getattr(proven, name) for name in names} | {"tested": [list(each) for each in proven.tested]}


def _card_text(figures: dict[str, Any]) -> str:
    places = ", ".join(map(str, figures["layers"]))
    if figures.get("lossless"):
        return (
            f"In `hf_optim.generate`, the exit after block {places} of {figures['blocks']} (from 0) drafts up to "
            f"{figures['drafts']} tokens, which the full model verifies: the tokens are the full model's. The step "
            "changed no weight."
        )
    how = {
        "softmax_gap": "gap of the two largest probabilities",
        "softmax_max": "largest probability",
        "state": "cosine of successive states",
        "classifier": "trained classifier",
    }[figures["confidence"]]
    fading = "" if figures["decay"] == "none" else f", falling over {figures['length']} tokens ({figures['decay']})"
    text = (
        f"In `hf_optim.generate`, a token leaves after block {places} of {figures['blocks']} (from 0) where the "
        f"confidence ({how}) reaches {figures['threshold']:g}{fading}. The step changed no weight."
    )
    if "delta" not in figures:
        return f"{text} The threshold was given, and nothing is guaranteed."
    of = "the full model's output" if figures["guarantee"] == "consistency" else "what the full model loses"
    return (
        f"{text} Calibrated on {figures['examples']} prompts of {figures['prompt']} tokens: the expected loss "
        f"({figures['distance']}, beside {of}) of greedy decoding with a limit of {figures['length']} new tokens is "
        f"at most {figures['delta']:g}, at level {figures['epsilon']:g} (mean {figures['mean']:.4g}, p-value "
        f"{figures['p_value']:.2g}), for prompts from the same source and for these weights."
    )


@hookimpl
def register_techniques(register) -> None:
    register(CALM)
