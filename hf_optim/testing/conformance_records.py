"""Figures in the conformance suite: the record is recomputed, and the numbers of the card are those of the record.

``testing.plugin`` runs it with the rest of the suite (``testing.conformance``).
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from hf_optim import Technique
from hf_optim.evaluation.cards.card import Card
from hf_optim.evaluation.sizes import bytes_on_disk
from hf_optim.runs.record import Record
from hf_optim.runs.run import Run, run_of
from hf_optim.testing.card_figures import scrambled, title, unexplained
from hf_optim.testing.conformance import attempts, quiet
from hf_optim.testing.models import TINY
from hf_optim.testing.recompute import Case, differences
from hf_optim.testing.tiny_runs import AUTO, Attempts, inputs_for
from hf_optim.toolkit import topology

__all__ = [
    "attempts",
    "quiet",
    "saved",
    "test_every_number_of_the_card_is_derived_from_the_record",
    "test_every_number_of_the_record_is_recomputed",
]


@pytest.fixture(scope="module")
def saved(attempts: Attempts, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the case of a technique on the first model that it supports; saved once for a file of tests."""
    cases: dict[type[Technique], Case] = {}

    def case(cls: type[Technique]) -> Case:
        if cls not in cases:
            architecture, model = attempts.first(cls)
            cases[cls] = case_of(model, architecture, tmp_path_factory.mktemp(cls.spec.name), cls)
        return cases[cls]

    return case


def case_of(model: Any, architecture: str, folder: Path, cls: type[Technique], before: Any = None) -> Case:
    """Save a finished model and return it with its record, for the first step of ``cls`` in its recipe."""
    run = run_of(model)
    step = next(step for step in run.recipe.steps if isinstance(step, cls))
    model.save_pretrained(folder)
    source = TINY[architecture]() if before is None else before
    batches = [inputs_for(source, seed=seed) for seed in range(3)]
    return Case(source, run, step, folder, AUTO.get(architecture, "AutoModelForCausalLM"), batches)


def assert_recomputed(case: Case) -> None:
    """Assert that every number of a step on the record in ``hf_optim.json`` follows from its checkpoint."""
    record = Record.read(case.folder)
    entry = dict(record.steps.get(str(case.run.index(case.step)), {}))
    assert entry.pop("technique", case.step.name) == case.step.name
    wrong = differences(entry, case.step.recompute(case), case.step.name)
    assert not wrong, (
        f"the record of {case.step.name} does not follow from its checkpoint (see Technique.recompute):\n"
        + "\n".join(wrong)
    )
    assert record.measured["after"]["bytes_on_disk"] == bytes_on_disk(case.folder)
    assert record.base_model["parameters"] == case.before.num_parameters()
    label = case.run.label(case.step)
    assert (label in record.coverage) == bool(case.names), f"{label} records no coverage (Run.cover)"
    # Coverage is that of the model at the end of the step's stage.
    later = case.run.recipe.steps[case.run.index(case.step) + 1 :]
    if case.names and not any(step.changes_architecture() for step in later):
        _assert_coverage(case, record.coverage[label])


def _assert_coverage(case: Case, coverage: dict[str, Any]) -> None:
    """Compare the counts of weights with those of the checkpoint, whose matrices are counted by shape."""
    touched, total = coverage["weights_touched"], coverage["weights_total"]
    assert coverage["share"] == round(touched / total, 6)
    assert 0 <= touched <= total
    parameters = dict(case.after.named_parameters())
    assert total == sum(parameter.numel() for parameter in parameters.values())
    linears = [name for name in case.names if f"{name}.weight" in parameters]
    if len(linears) == len(case.names) and all(topology.is_linear(case.after.get_submodule(n)) for n in linears):
        assert touched == sum(parameters[f"{name}.weight"].numel() for name in linears)


def test_every_number_of_the_record_is_recomputed(cls: type[Technique], saved: Any) -> None:
    """From the checkpoint, the model before it and forwards with hooks; a number that nothing computes is an error."""
    assert_recomputed(saved(cls))


def assert_card_follows(case: Case) -> None:
    """Assert that what a step adds to the card follows from its entry of the record, number by number."""
    record = Record.read(case.folder)
    if not case.step.implements("export"):
        return
    shown = _sections(case, record)
    saved = {title(section): section for section in record.sections}
    for section in shown:
        # The keys of a record are sorted, and with them rows that have no other order.
        assert _by_row(section) == _by_row(saved[title(section)]), "written from something else than the record"
    key = str(case.run.index(case.step))
    changed = copy.deepcopy(record)
    changed.steps[key] = scrambled(record.steps.get(key, {}))
    wrong = unexplained(_sections(case, changed), shown, changed.steps[key])
    assert not wrong, f"{case.step.name} shows numbers on the card that are none of its record: {wrong}"


def _sections(case: Case, record: Record) -> list[dict[str, Any]]:
    """Return the sections that a step adds if there is only the record: no state, no masks, the model not optimized."""
    alone = Run(case.run.recipe, case.before.config, case.run.manager)
    alone.record, alone._covered = copy.deepcopy(record), case.run._covered
    alone.record.sections = []
    object.__setattr__(alone, "_model", case.before)  # without a link: the model has no run
    case.step.export(run=alone, directory=case.folder, card=Card(alone.record, case.folder))  # type: ignore[attr-defined]
    return alone.record.sections


def _by_row(section: dict[str, Any]) -> dict[str, Any]:
    return {**section, "rows": sorted(section.get("rows", ()), key=str)}


def test_every_number_of_the_card_is_derived_from_the_record(cls: type[Technique], saved: Any) -> None:
    """Export again with a run that has nothing but its record, and with a record whose numbers are others."""
    assert_card_follows(saved(cls))
