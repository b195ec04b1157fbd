"""Results of benchmarks are input: each value has the type of its field, or the file is refused."""

from __future__ import annotations

import json

import pytest

from hf_optim import OptimError
from hf_optim.cli import main
from hf_optim.evaluation.bench import environment, table
from hf_optim.evaluation.bench.results import FILE, Results
from hf_optim.testing.fuzz.example_files import bench_results

CHANGES = {
    "rows": (5, "rows is 5, not a list"),
    "rows.0": ("x", r"rows\[0\] is 'x', not a mapping"),
    "rows.0.graph_us": ("fast", r"'graph_us' of rows\[0\] is 'fast'"),
    "rows.0.N": (1.5, r"'N' of rows\[0\] is 1.5"),
    "rows.0.role": ("best", r"'role' of rows\[0\] is 'best'"),
    "rows.0.new": (1, r"'new' of rows\[0\]"),
    "decode.0.kernels": ({"a": "b"}, "'kernels'"),
    "ceilings": ({"copy": None}, "'ceilings'"),
    "left_out": ([1], "'left_out'"),
    "schema": (2, "of schema 2"),
}


@pytest.mark.parametrize("place", CHANGES)
def test_a_value_of_another_type_is_named(place, tmp_path):
    data = json.loads(json.dumps(bench_results()))
    table.publish(Results.from_json(data), tmp_path)
    value, message = CHANGES[place]
    *path, last = [int(part) if part.isdigit() else part for part in place.split(".")]
    holder = data
    for part in path:
        holder = holder[part]
    holder[last] = value
    (tmp_path / FILE).write_text(json.dumps(data))
    with pytest.raises(OptimError, match=message):
        Results.load(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "nothing"], "no operator 'nothing'"),
        (["--end-to-end", "tiny", "--scheme", "w9"], "no scheme 'w9'"),
        (["--end-to-end", "no/such-model"], "no/such-model"),
        (["--output", "file.txt"], "is a file, not a directory"),
        (["--output", "file.txt/x"], "cannot write to file.txt/x"),
        (["--output", "bench", "--append"], "corrupt"),
        (["--time-limit", "nan"], "number of seconds"),
    ],
)
def test_bench_refuses_before_it_measures(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(environment, "start_results", lambda command: pytest.fail("something was measured"))
    (tmp_path / "file.txt").write_text("kept")
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / FILE).write_text("{")
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err
