"""Longer positions: a model reads inputs that are longer than those it was trained on.

    copy:         new[i] = old[i mod n]
    interpolate:  new[i] = old[i (n - 1) / (N - 1)],   linear between rows        (n old positions, N new ones)

for tables of learned positions (BERT, RoBERTa, GPT-2, OPT ...). People make long encoders of BERT and RoBERTa by
copying (Beltagy et al., "Longformer", arXiv 2004.05150, section 5): near tokens keep their distances, and inputs up to
the old length their outputs, to the bit. Models with rotary positions are scaled by ``rope_parameters`` of
transformers: ``linear`` (Chen et al., "Extending Context Window of Large Language Models via Positional Interpolation",
arXiv 2306.15595), ``ntk`` (a larger base), ``dynamic`` (the same, by the length of the input) and ``yarn`` (arXiv
2309.00071). Models that see only distances (ALiBi, relative biases) have nothing to extend.

Only shapes and fields of the configuration change, so the result is of the same stock class. STOCK_ARCH. It goes well
before sparse attention in a recipe: full attention at the new length costs the square of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PretrainedConfig, PreTrainedModel

from hf_optim import Card, Contract, ModelError, Paper, Reload, Run, Technique, hookimpl, option, technique
from hf_optim.toolkit.attention import hidden_states

from ._position_tables import copied, extend, find_table, interpolated
from ._rotary_scaling import METHODS, rescale, rotary_parameters, scaled

LONGEST = 2**24
TOKENIZER = "tokenizer_config.json"


@technique(
    "extend_positions",
    family="attention",
    paper=Paper("2306.15595", "Extending Context Window of Large Language Models via Positional Interpolation", 2023),
    contract=Contract(owns={"positions"}),
    reload=Reload.STOCK_ARCH,
)
class ExtendPositions(Technique):
    """Extend the positions of a model.

    Attributes:
        length: tokens that the model reads afterwards, more than now.
        method: ``copy`` or ``interpolate`` for tables of learned positions, ``linear``, ``ntk``, ``dynamic`` or
            ``yarn`` for rotary ones; ``auto`` is ``copy`` or ``yarn``.
    """

    length: int = option(4096, low=2, high=LONGEST)
    method: Literal["auto", "copy", "interpolate", "linear", "ntk", "dynamic", "yarn"] = "auto"

    @classmethod
    def for_testing(cls) -> Technique:
        return cls.from_dict({"length": 96})

    def check_model(self, model: PreTrainedModel, label: str) -> None:
        self._check(model.config, label)

    def _check(self, config: PretrainedConfig, label: str) -> None:
        """Raise ``ModelError`` for models that cannot read longer inputs, or already do."""
        known = getattr(config, "max_position_embeddings", None)
        if config.is_encoder_decoder or config.get_text_config() is not config or not hasattr(config, "vocab_size"):
            raise ModelError(
                f"{label}: the positions of {config.model_type} are not those of one sequence of tokens; this "
                "architecture is not supported"
            )
        if getattr(config, "alibi", False) or not isinstance(known, int):
            raise ModelError(
                f"{label}: {config.model_type} has no table of positions and no rotary ones: it sees distances alone "
                "(ALiBi, relative biases), and takes longer inputs as they are"
            )
        if rotary_parameters(config) is not None:
            if self.method in ("copy", "interpolate"):
                raise ModelError(
                    f"{label}: {config.model_type} has rotary positions, which are not a table: choose one of "
                    f"{', '.join(METHODS)}"
                )
            scaled(config, self._rotary_method(), self.length, label)
        elif self.method in METHODS:
            raise ModelError(f"{label}: {config.model_type} has no rotary positions: choose copy or interpolate")

    def _rotary_method(self) -> str:
        return "yarn" if self.method == "auto" else self.method

    def _require_longer(self, before: int, label: str) -> None:
        if self.length <= before:
            raise ModelError(f"{label}: the model has {before} positions already: set length above that")

    @hookimpl
    def prepare_load(self, run: Run, load_kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
        self._check(run.config, run.label(self))
        return None

    @hookimpl
    def transform_model(self, run: Run) -> None:
        model, label = run.model, run.label(self)
        if rotary_parameters(model.config) is None:
            method, before = self._extend_table(model, label)
        else:
            method, before = self._rotary_method(), model.config.max_position_embeddings
            self._require_longer(before, label)
            rescale(model, *scaled(model.config, method, self.length, label), label)
        run.report(
            self,
            method=method,
            positions_before=before,
            positions=self.length,
            max_position_embeddings=model.config.max_position_embeddings,
        )

    def _extend_table(self, model: PreTrainedModel, label: str) -> tuple[str, int]:
        """Extend the table of a model; return the method and how many positions it had. Raises ``ModelError``."""
        method = "interpolate" if self.method == "interpolate" else "copy"
        table = find_table(model, label)
        if table is None:
            raise ModelError(
                f"{label}: {type(model).__name__} reads no table of learned positions, and has no rotary ones; this "
                "architecture is not supported"
            )
        self._require_longer(table.positions, label)
        tokens = next(token for token in range(model.config.vocab_size) if token != model.config.pad_token_id)
        text = {"input_ids": torch.full((1, min(table.positions, 64)), tokens, device=model.device)}
        expected = hidden_states(model, text)
        with torch.no_grad():
            old: Any = model.get_submodule(table.name).weight
            rows = (interpolated if method == "interpolate" else copied)(old, table.offset, self.length)
        extend(model, table, rows, label)
        if method == "copy" and not torch.equal(hidden_states(model, text), expected):
            raise ModelError(
                f"{label}: with longer positions {type(model).__name__} no longer computes what it did up to the old "
                "length; this architecture is not supported"
            )
        return method, table.positions

    def recompute(self, case: Any) -> dict[str, Any]:
        config, before = case.config, case.before.config
        rope = config.get("rope_parameters") or {}
        method = {"default": "ntk", None: self.method}.get(rope.get("rope_type"), rope.get("rope_type"))
        length = config.get("max_position_embeddings") or config["n_positions"]
        return {
            "method": "copy" if method == "auto" else method,
            "positions_before": before.max_position_embeddings,
            "positions": round(rope["factor"] * length) if method == "dynamic" else length,
            "max_position_embeddings": length,
        }

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        figures = run.reported(self)
        tokenizer, more = directory / TOKENIZER, ""
        if tokenizer.exists():
            fields = json.loads(tokenizer.read_text(encoding="utf-8"))
            fields["model_max_length"] = figures["positions"]
            tokenizer.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        else:
            more = f" Give its tokenizer `model_max_length={figures['positions']}`."
        card.paragraph(
            "Longer positions",
            f"The model reads {figures['positions']} tokens in place of {figures['positions_before']} "
            f"(`{figures['method']}`). This step has not trained it on the new positions.{more}",
        )


@hookimpl
def register_techniques(register) -> None:
    register(ExtendPositions)
