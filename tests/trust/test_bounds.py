"""Messages of errors: one printable line of bounded length, whatever the values in it are."""

from __future__ import annotations

import pickle

import pytest

from hf_optim import CheckpointError, DataError, ModelError, OptimError, RecipeError
from hf_optim.errors import MAX_MESSAGE, NumericalError, printable
from hf_optim.trust.bounds import first_line


@pytest.mark.parametrize("kind", [OptimError, RecipeError, DataError, ModelError, NumericalError, CheckpointError])
def test_a_message_is_one_bounded_printable_line(kind):
    error = kind("start \x1b[31m\u202e\x00\n" + "x" * 10_000 + "\ud800 end")
    assert str(error).startswith("start \\x1b[31m\\u202e\\x00 xxx")
    assert str(error).endswith("x\\ud800 end")
    assert len(str(error)) <= MAX_MESSAGE
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_a_plain_message_stays_as_it_is():
    assert str(CheckpointError("no weights in /a  b (é)")) == "no weights in /a  b (é)"
    assert CheckpointError().args == ()
    assert printable("a" * 100, 100) == "a" * 100


class Broken(Exception):
    def __str__(self):
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("first\nsecond"), "first"),
        (ValueError("\n  \n first"), "first"),
        (ValueError("a class is wrong:\n    it has no name\n more"), "a class is wrong: it has no name"),
        (KeyError("weight_map"), "KeyError: 'weight_map'"),
        (IndexError("list index out of range"), "IndexError: list index out of range"),
        (RuntimeError(), "RuntimeError"),
        (RecursionError("maximum recursion depth exceeded"), "it is nested too deeply"),
        (ValueError("\x1b[2J" + "x" * 5000), None),
        (Broken(), "Broken"),
    ],
)
def test_the_first_line_of_an_error_of_others(error, line):
    found = first_line(error)
    assert found == line or line is None
    assert found.isprintable()
    assert len(found) <= 320
    assert first_line(error, typed=True).startswith(type(error).__name__)
