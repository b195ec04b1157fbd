"""docs/scaling-out.md: its table of techniques is what they declare."""

from __future__ import annotations

import pytest
from conftest import ROOT

from hf_optim import OptimConfig, RecipeError, Technique
from hf_optim.cli import main
from hf_optim.cli.check import parallel_of
from hf_optim.recipes.catalogue import catalogue
from hf_optim.recipes.contract import Contract, Parallel, Reload
from hf_optim.recipes.technique import technique

PAGE = ROOT / "docs" / "scaling-out.md"
MARK = "<!-- table of techniques: tests/docs/test_scaling_out.py -->"


def table() -> str:
    """Return the table of the techniques for which a test shows something."""
    keys = list(Parallel().to_dict())
    rows = [f"| technique | {' | '.join(keys)} |", "|---" * (len(keys) + 1) + "|"]
    for cls in sorted(catalogue().all(), key=lambda cls: cls.spec.name):
        found = cls.spec.parallel.to_dict()
        if cls.__module__.startswith("hf_optim_plugins.") and "yes" in found.values():
            rows.append(f"| `{cls.spec.name}` | {' | '.join(found.values())} |")
    return "\n".join(rows)


def test_the_table_is_what_the_techniques_declare():
    after = PAGE.read_text().split(MARK)[1].strip()
    assert after.startswith(table() + "\n"), f"put this behind the mark:\n{table()}"


def test_every_technique_says_what_ranks_can_share():
    for cls in catalogue().all():
        found = cls.spec.parallel.to_dict()
        trains = cls.spec.trains or any(hasattr(cls, hook) for hook in ("training_callbacks", "training_loss"))
        assert (found["calibration"] != "-") == hasattr(cls, "calibrate"), cls.spec.name
        assert not trains or found["data"] != "-", cls.spec.name
        if cls.spec.reload is Reload.REMOTE_CODE:
            assert found["tensor"] == "no", cls.spec.name


def test_a_recipe_can_do_what_all_of_its_steps_can():
    steps = [{"technique": "gptq"}, {"technique": "lkd", "bits": 2}]
    assert parallel_of(OptimConfig.parse(steps))["calibration"] == "no"
    assert parallel_of(OptimConfig.parse(steps[:1]))["calibration"] == "yes"
    assert parallel_of(OptimConfig.parse([{"technique": "magnitude"}, steps[0]]))["data"] == "yes"


def test_commands_show_it(capsys):
    assert main(["list", "magnitude"]) == 0
    assert "on ranks    calibration" in capsys.readouterr().out
    assert main(["check", "w4a16"]) == 0
    assert "on ranks: calibration yes" in capsys.readouterr().out


@pytest.mark.parametrize("declared", [{"pipeline": "yes"}, {"data": "perhaps"}])
def test_a_wrong_declaration_is_refused(declared):
    with pytest.raises(RecipeError, match="parallel has"):

        @technique("wrong_ranks", family="runtime", contract=Contract(), reload=Reload.STOCK_DENSE, parallel=declared)
        class Wrong(Technique):
            """Declare what does not exist."""
