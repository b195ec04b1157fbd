"""Reformer: attention among tokens that random rotations hash alike, with keys that are the queries at unit length.

    k_j = q_j / |q_j|,   h(x) = argmax([x R; -x R]),   o_i = sum over j in P_i of softmax_j(q_i . k_j) v_j

Kitaev, Kaiser, Levskaya, "Reformer: The Efficient Transformer", arXiv 2001.04451, section 2. ``P_i`` are the tokens of
the chunk of i, and of ``before`` chunks before it, where tokens are sorted by bucket in each of ``rounds`` rounds of
hashing. Scores have no factor 1 / sqrt(d). A token sees itself only where it sees nothing else.

- ``scheme`` says how chunks are cut. ``paper``: over all tokens, sorted by bucket. In a causal model that lets later
  tokens decide which earlier ones are seen, though not what they hold: a later token of a lower bucket moves the
  borders of the chunks behind it. ``bucket``, the default of causal models, cuts each bucket by itself, counted from
  its first token, so that nothing depends on later tokens; the first ``chunk`` tokens see all before them. ``trax`` is
  ``paper`` with two habits of the authors' code and of transformers' Reformer: the first chunk also looks at the last
  one of another round, and a key that several rounds find counts several times (the paper subtracts log N_ij,
  appendix A).
- With ``chunk`` not below the number of tokens, attention is full, with shared queries and keys.
- Rotations are whole numbers in the checkpoint, and hashing is exact: a vector has the same bucket in a batch and
  alone, on every device. ``redraw`` draws others in each step of training, as the authors do.
- Decoding: a cache holds a key and a value of each token, and its buckets. With ``bucket``, decoding gives what a
  forward over all tokens gives. With ``paper`` and ``trax`` a token sees what the last token of such a forward sees,
  but states of earlier tokens are not changed by later ones, as they are there.
- ``reversible``: layers keep two streams, both the embedding at first, and their mean is the output; activations are
  computed again in the backward. That is another function than the model was trained for.

What becomes of a pretrained model: its projection of keys is dropped, or joins that of queries (``shared``); rotary
embeddings turn queries, so a bucket holds tokens that are alike at their distance. Key heads that query heads shared
(GQA) are no longer shared, so a cache grows. It needs training. The checkpoint brings its own code. REMOTE_CODE.
transformers' Reformer is another model: no biases in attention, a norm over both streams at the end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from transformers import PretrainedConfig, PreTrainedModel

from hf_optim import (
    Card,
    Contract,
    ModelError,
    Paper,
    RecipeError,
    Reload,
    Run,
    Technique,
    hookimpl,
    option,
    technique,
    traits,
)
from hf_optim.checkpoints.remote_code import RemoteCode
from hf_optim.toolkit.attention import (
    BUCKET,
    LSH_PAGES,
    MOST_BUCKETS,
    PAPER,
    attentions,
    layout_of,
    prove_layout,
)
from hf_optim.toolkit.topology import NoInputsError, dummy_inputs

from . import _lsh_model
from ._attach import context_length
from ._learned import LearnedTechnique, learned_code
from ._shared_qk import QUERY, heads_of, key_projection, share_

LARGEST_FACTOR = 128  # more buckets are two hashes, as in the authors' code


@technique(
    "reformer",
    family="attention",
    paper=Paper("2001.04451", "Reformer: The Efficient Transformer", 2020),
    contract=Contract(
        needs={traits.FLOAT_WEIGHTS},
        forbids={traits.LOCAL_ATTENTION, traits.SPARSE_ATTENTION, traits.QUANTIZED},
        adds={traits.SPARSE_ATTENTION},
        keeps={traits.SPARSE, traits.SPARSE_NM},
        owns={"attention"},
    ),
    reload=Reload.REMOTE_CODE,
)
class Reformer(LearnedTechnique):
    """Let tokens see those that random rotations hash alike. The model has to be trained afterwards.

    Attributes:
        chunk: tokens of a chunk.
        rounds: of hashing; more find more of the keys that matter, and cost as much again.
        buckets: factors of the number of buckets of a round: even numbers, or 1 alone. Empty: 2 n / chunk for the n
            tokens of the model's context, a power of two.
        before: chunks before its own that a token sees.
        after: chunks behind its own that a token sees, in models that are not causal.
        scheme: ``bucket`` cuts chunks in each bucket, ``paper`` over all tokens sorted by bucket, ``trax`` as the
            authors' code. ``auto``: ``bucket`` for causal models, ``paper`` for others.
        shared: the projection of queries and keys: that of the ``query``, of the ``key``, or their ``mean``.
        reversible: two streams in the layers, whose activations are computed again in the backward.
        redraw: draw other rotations in each step of training, of PyTorch's generator.
        seed: of the rotations.
    """

    chunk: int = option(64, low=2, high=2**20)
    rounds: int = option(4, low=1, high=64)
    buckets: tuple[int, ...] = ()
    before: int = option(1, low=0, high=64)
    after: int = option(0, low=0, high=64)
    scheme: Literal["auto", "bucket", "paper", "trax"] = "auto"
    shared: Literal["query", "mean", "key"] = "query"
    reversible: bool = False
    redraw: bool = False
    seed: int = option(0, low=0, high=2**31 - 1)

    attachment = _lsh_model.LSH
    remote_code: ClassVar[RemoteCode] = learned_code(
        "reformer",
        (*LSH_PAGES, _lsh_model),
        _lsh_model.ReformerBase.__name__,
        _lsh_model.LshModel.__name__,
    )

    @classmethod
    def for_testing(cls) -> Technique:
        return cls.from_dict({"chunk": 4, "rounds": 2, "buckets": [4]})

    def validate(self) -> None:
        if self.buckets and self.buckets != (1,) and any(factor < 2 or factor % 2 for factor in self.buckets):
            raise RecipeError(
                f"reformer: the factors of the number of buckets are even, or 1 alone, not {list(self.buckets)}"
            )
        total = 1
        for factor in self.buckets:
            total *= factor
        if total > MOST_BUCKETS:
            raise RecipeError(f"reformer: at most {MOST_BUCKETS:,} buckets, not {total:,}")

    def contract(self) -> Contract:
        # Projections of queries that are others do not have the zeros of those before.
        keeps = self.spec.contract.keeps if self.shared == QUERY else frozenset[traits.Trait]()
        return dataclasses.replace(self.spec.contract, keeps=keeps)

    def check_model(self, model: PreTrainedModel, label: str) -> None:
        super().check_model(model, label)
        if self.reversible:
            layout_of(model, label)
        self._factors(model.config, label)
        if self.shared != QUERY:
            try:
                heads_of(model, True, label)
            except NoInputsError:
                return  # calibration data may have them

    def _factors(self, config: PretrainedConfig, label: str) -> list[int]:
        """Return the factors of the number of buckets, of which those beyond 128 are two hashes."""
        if self.buckets:
            return list(self.buckets)
        context = context_length(config)
        if context is None:
            raise ModelError(
                f"{label}: {config.model_type} has no fixed context, from which the number of buckets would follow: "
                "set buckets"
            )
        power = max(1, (2 * (context // self.chunk)).bit_length() - 1)
        if 2**power <= LARGEST_FACTOR:
            return [2**power]
        power = min(power, MOST_BUCKETS.bit_length() - 1)
        return [2 ** (power // 2), 2 ** (power - power // 2)]

    def settings_of(self, model: PreTrainedModel, sizes: Mapping[str, int], label: str) -> dict[str, Any]:
        if sizes["causal"] and self.after:
            raise ModelError(
                f"{label}: {type(model).__name__} is causal: it sees no chunk behind a token; set after to 0"
            )
        scheme = (BUCKET if sizes["causal"] else PAPER) if self.scheme == "auto" else self.scheme
        settings = {
            "scheme": scheme,
            "factors": self._factors(model.config, label),
            "rounds": self.rounds,
            "chunk": self.chunk,
            "before": self.before,
            "after": self.after,
            "heads": sizes["heads"],
            "head_width": sizes["head_width"],
            "seed": self.seed,
            "redraw": self.redraw,
            "key_projection": key_projection(model, heads_of(model, self.shared != QUERY, label)),
            "reversible": [],
        }
        if self.reversible:
            settings["reversible"] = layout_of(model, label)
            prove_layout(model, settings["reversible"], dummy_inputs(model.base_model), label)  # type: ignore[arg-type]
        return settings

    def initialize(self, run: Run, model: PreTrainedModel, settings: Mapping[str, Any]) -> None:
        if self.shared != QUERY:
            share_(model, heads_of(model, True, run.label(self)), self.shared)
        if settings["key_projection"]:
            before = model.num_parameters()
            _lsh_model.drop_key_projections(model, settings["key_projection"])
            run.state(self).removed = before - model.num_parameters()

    @hookimpl
    def transform_model(self, run: Run) -> PreTrainedModel:
        model = super().transform_model(run)
        model.set_up_streams()  # type: ignore[operator]
        run.report(
            self,
            weights_removed=getattr(run.state(self), "removed", 0),
            keys_seen_at_most=most_seen(model.config.attention_pattern, all(a.is_causal for a in attentions(model))),
        )
        return model

    def recompute(self, case: Any) -> dict[str, Any]:
        settings = case.config["attention_pattern"]
        before = sum(parameter.numel() for parameter in case.before.parameters())
        rotations = sum(t.numel() for name, t in case.tensors.items() if name.endswith(".learned.rotations"))
        return {
            **settings,
            "layers": len(case.config["layer_types"]),
            "context": case.config["max_position_embeddings"],
            "weights_added": 0,
            "model_class": case.config["architectures"][0],
            "weights_removed": before - sum(t.numel() for t in case.tensors.values()) + rotations,
            "keys_seen_at_most": most_seen(settings, "CausalLM" in case.config["architectures"][0]),
        }

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        figures = run.reported(self)
        buckets = " x ".join(str(factor) for factor in figures["factors"])
        card.paragraph(
            "LSH attention",
            f"A token sees at most {figures['keys_seen_at_most']:,} keys: those of its bucket, of {buckets}, near it "
            f"in chunks of {figures['chunk']}, in {figures['rounds']} rounds of hashing. Keys are the queries at unit "
            f"length, so {figures['weights_removed']:,} weights of keys are gone.",
        )


def most_seen(settings: Mapping[str, Any], causal: bool) -> int:
    """Return how many keys a query sees at most."""
    sides = settings["before"] + 1 + (0 if causal else settings["after"])
    return max(settings["chunk"], settings["rounds"] * sides * settings["chunk"])


@hookimpl
def register_techniques(register) -> None:
    register(Reformer)
