"""Figures of techniques with other fields than the suite's, and that wrong figures on record and card are found."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import TINY

import hf_optim
from hf_optim import Contract, Reload, Technique, hookimpl, run_of, technique
from hf_optim.recipes.catalogue import catalogue
from hf_optim.testing import tiny_runs
from hf_optim.testing.card_figures import scrambled, unexplained
from hf_optim.testing.conformance_records import assert_card_follows, assert_recomputed, case_of
from hf_optim.testing.recompute import differences

QUICK = {"initial": 0.2, "gate_learning_rate": 0.5, "end": 0}
VARIANTS = {
    "gptq with assigned bits": [
        {"technique": "gptq", "group_size": 16},
        {"technique": "qbert", "assign_only": True, "budget": 3.3, "iterations": 3},
    ],
    "gptq of experts": [{"technique": "gptq", "group_size": 16}],
    "zeroquant, 6 bits": [{"technique": "zeroquant", "bits": 6}],
    "logit_kd with a cache": [{"technique": "logit_kd", "top_k": 3, "cache": "CACHE"}, {"technique": "gmp"}],
    "nm within a budget, by the output": [{"technique": "nm", "budget": 0.5, "scope": "model"}],
    "nm within a budget, by the layers": [{"technique": "nm", "budget": 0.6, "scope": "model", "sensitivity": "layer"}],
    "obq, scales by mse": [{"technique": "obq", "bits": 3, "group_size": 16, "observer": "mse"}],
    "qbert, few bits": [{"technique": "qbert", "budget": 3.3, "iterations": 3, "assign": "rank"}],
    "lkd at 2 bits": [{"technique": "lkd", "bits": 2, "group_size": 8, "steps": 10, "learning_rate": 2e-3}],
    "peg, few even groups": [{"technique": "peg", "groups": 3, "split": "even"}],
    "mixed_precision with 16 bits": [{"technique": "mixed_precision", "tolerance": 1e-4}],
    "gobo at 2 bits": [{"technique": "gobo", "bits": 2, "threshold": -1.0}],
    "qat with inputs": [{"technique": "qat", "bits": 3, "activations": "int8", "skip": ["*.0.*"]}],
    "smoothquant without pairs": [{"technique": "smoothquant", "pairs": False, "alpha": 0.7}, {"technique": "rtn"}],
    "zeroquant with assigned bits": [
        {"technique": "zeroquant"},
        {"technique": "qbert", "assign_only": True, "budget": 3.3, "iterations": 3},
    ],
    "l0 of weights": [{"technique": "l0", **QUICK}],
    "l0 of neurons": [{"technique": "l0", **QUICK, "on": "neurons", "initial": 0.5, "sparsity": 0.4}],
    "l0 of heads": [{"technique": "l0", **QUICK, "on": "heads", "initial": 0.5, "sparsity": 0.5}],
    "variational_dropout": [{"technique": "variational_dropout", "initial": -3.5}],
    "structured, all kinds": [{"technique": "structured", "heads": 1, "neurons": 0.5, "layers": 1}],
    "permutation by activations": [
        {"technique": "channel_permutation", "score": "activation", "tries": 0, "starts": 4, "where": ["neurons"]}
    ],
    "nm with 1 of 4": [{"technique": "nm", "keep": 1, "score": "activation"}],
    "magnitude, global": [{"technique": "magnitude", "scope": "global", "sparsity": 0.37}],
    "magnitude of a teacher": [{"technique": "magnitude", "skip": ["*.1.mlp.*"]}, {"technique": "distilbert"}],
    "gmp of a teacher": [{"technique": "gmp", "sparsity": 0.3}, {"technique": "distilbert"}],
    "nm of experts": [{"technique": "nm"}],
    "permutation of experts": [{"technique": "channel_permutation", "tries": 0, "starts": 4, "where": ["residual"]}],
    "top_kast of experts": [{"technique": "top_kast", "sparsity": 0.5}],
    "nm of experts to be": [{"technique": "nm"}, {"technique": "upcycle", "experts": 3}],
    "magnitude of what shrinks": [{"technique": "magnitude"}, {"technique": "structured", "neurons": 0.5, "layers": 1}],
    "distilbert by index": [{"technique": "distilbert", "layers": [1]}],
    "upcycle": [{"technique": "upcycle", "experts": 4, "top_k": 1}],
    "local": [{"technique": "local", "window": 5}],
    "blockwise with shifts": [{"technique": "blockwise", "block": 7, "shifts": [0, 1]}],
    "dilated by layer": [{"technique": "dilated", "window": 3, "dilation": [1, 4], "by": "layer"}],
    "sparse_transformer by head": [
        {"technique": "sparse_transformer", "stride": 6, "vertices": 2, "rotate": 3, "steps": "heads"}
    ],
    "sparse_transformer by layer": [
        {"technique": "sparse_transformer", "pattern": "strided", "stride": 6, "steps": "layers"}
    ],
}


def finished(model, steps, folder):
    """Return the model after a recipe, trained for a few steps if it trains."""
    model = hf_optim.optimize(model, steps, calibration=[tiny_runs.inputs_for(model, seed=s) for s in range(3)])
    while run_of(model).stage is not None:
        entered = run_of(model).stage_entered
        model = tiny_runs.train(model, folder) if entered else hf_optim.advance(model)
    return model


@pytest.mark.many
@pytest.mark.parametrize("variant", VARIANTS)
def test_figures_follow_from_the_checkpoint(variant, tmp_path):
    first, *others = VARIANTS[variant]
    # What assigns bits goes first.
    steps = sorted([first, *others], key=lambda step: "assign_only" not in step)
    steps = [{**step, "cache": str(tmp_path / "cache")} if "cache" in step else step for step in steps]
    architecture = "mixtral" if variant.endswith("of experts") else "llama"
    model = finished(TINY[architecture](), steps, tmp_path / "training")
    case = case_of(model, architecture, tmp_path / "out", catalogue().get(first["technique"]))
    assert_recomputed(case)
    assert_card_follows(case)
    assert case.run.reported(case.step)


# -- the checks themselves --------------------------------------------------------------------------------------------
@technique("shrinker", family="toy", contract=Contract(), reload=Reload.STOCK_DENSE)
class Shrinker(Technique):
    """Halves the head, and reports its norm.

    Attributes:
        factor: of what it reports.
        computes: what ``recompute`` returns.
        source: where the number on the card comes from.
    """

    factor: float = 1.0
    computes: str = "norm"
    source: str = "record"

    def needs_data(self):
        return False

    @hookimpl
    def calibrate(self, run, scope):
        yield
        run.state(self).norm = float(scope.model.lm_head.weight.detach().norm()) / 2
        with torch.no_grad():
            scope.model.lm_head.weight.div_(2)

    def needs_whole_model(self):
        return True

    @hookimpl
    def finalize_model(self, run):
        run.cover(self, ["lm_head"])
        run.report(self, norm=self.factor * run.state(self).norm, layers={"lm_head": [3.25, 4.5]})

    def recompute(self, case):
        known = {"norm": float(case.after.lm_head.weight.detach().norm()), "layers": {"lm_head": [3.25, 4.5]}}
        return {name: known[name] for name in known if name in self.computes or name == "layers"}

    @hookimpl
    def export(self, run, directory, card):
        norm = {
            "record": lambda: run.reported(self)["norm"],
            "model": lambda: float(run.model.lm_head.weight.detach().norm()),
            "state": lambda: run.state(self).norm,
            "arithmetic": lambda: 3 * run.reported(self)["norm"],
        }[self.source]()
        first, last = run.reported(self)["layers"]["lm_head"]
        card.paragraph("Norm", f"The norm is {norm:.4f}.")
        card.table("Layers", ["layer", "before", "after"], [["`lm_head`", f"{first:.2f}", f"{last:.2f}"]])


def shrunk(tmp_path, **fields):
    model = hf_optim.optimize(TINY["llama"](), Shrinker(**fields))
    return case_of(model, "llama", tmp_path, Shrinker)


def test_a_right_figure_passes(tmp_path):
    case = shrunk(tmp_path)
    assert_recomputed(case)
    assert_card_follows(case)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"factor": 1.01}, r"shrinker.norm: [\d.]+ in the record, [\d.]+ recomputed"),
        ({"computes": "nothing"}, r"shrinker.norm: [\d.]+ in the record, which nothing recomputes"),
    ],
)
def test_a_wrong_or_uncomputed_figure_of_the_record_fails(fields, message, tmp_path):
    with pytest.raises(AssertionError, match=message):
        assert_recomputed(shrunk(tmp_path, **fields))


@pytest.mark.parametrize("source", ["model", "state", "arithmetic"])
def test_a_figure_of_the_card_from_elsewhere_fails(source, tmp_path):
    with pytest.raises((AssertionError, AttributeError)):
        assert_card_follows(shrunk(tmp_path, source=source))


def test_differences_name_what_is_wrong_missing_and_left_over():
    record = {"a": 1, "b": {"x": 0.5, "y": 2.0}, "c": [1, 2], "text": "free", "names": ["one"]}
    assert differences(record, {"a": 1, "b": {"x": 0.5, "y": 2.0}, "c": [1, 2]}) == []
    assert len(differences(record, {"a": 1.0, "b": {"x": 0.5, "y": 2.0}, "c": [1, 2]})) == 1  # a count is an int
    assert len(differences(record, {"b": {"x": 0.501, "y": 2.0}, "c": [1]})) == 3
    assert len(differences(record, {"a": 1, "b": {"x": 0.5, "y": 2.0, "z": 1}, "c": [1, 2], "names": ["two"]})) == 2


def test_swapped_columns_and_numbers_of_other_layers_are_unexplained():
    entry = {"losses": {"h.0": [0.25, 0.125], "h.1": [0.75, 0.5]}, "mean": 0.4}

    def table(record, swap=False, other=False):
        pairs = list(record["losses"].values())
        pairs = pairs[::-1] if other else pairs
        rows = [
            [f"`{name}`", *(f"{v:.4e}" for v in (pair[::-1] if swap else pair))]
            for name, pair in zip(record["losses"], pairs, strict=True)
        ]
        return [{"kind": "table", "title": "t", "header": ["block", "before", "after"], "rows": rows}]

    changed = scrambled(copy.deepcopy(entry))
    assert unexplained(table(changed), table(entry), changed) == []
    assert len(unexplained(table(changed, swap=True), table(entry, swap=True), changed)) == 4
    assert len(unexplained(table(changed, other=True), table(entry, other=True), changed)) == 4
