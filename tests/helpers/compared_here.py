"""A fixture: the children of ``hf-optim compare`` run in this process, since importing takes longer than their work."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from typing import Any

import pytest


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that would have been started, in their order."""
    import torch

    from hf_optim.cli import main
    from hf_optim.cli.jobs import comparing, timed_models

    started = []

    def run(command: list[str], what: str, *, own_code: bool) -> dict[str, Any]:
        out = io.StringIO()
        started.append(command)
        if what == "times":
            listed = json.loads(command[3])
            found = timed_models.time_candidates(
                [timed_models.Candidate(**one) for one in listed["candidates"]], torch.device("cpu")
            )
            return json.loads(json.dumps(found))
        with redirect_stdout(out):
            assert main(command[3:]) == 0
        return json.loads(out.getvalue())

    monkeypatch.setattr(comparing, "json_of", run)
    return started
