"""Wrong arguments: one line that names the command, the wrong word and the nearest right one."""

from __future__ import annotations

import pytest
from tiny_models import tiny_llama

from hf_optim.cli import COMMANDS, main


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("compres model", "hf-optim: argument COMMAND: invalid choice: 'compres'"),
        ("compres model", "did you mean 'compress'? (see `hf-optim --help`)"),
        (
            "compress m --recipe w8a8 --output o --calibraton x",
            "hf-optim compress: unrecognized arguments: --calib",
        ),
        (
            "compress m --recipe w8a8 --output o --calibraton=x",
            "did you mean '--calibration'? (see `hf-optim comp",
        ),
        ("eval m --dtype bfloat61", "argument --dtype: invalid choice: 'bfloat61'"),
        ("eval m --dtype bfloat61", "did you mean 'bfloat16'?"),
        ("list gptq more", "hf-optim list: unrecognized arguments: more (see `hf-optim list --help`)"),
        ("compress m --recipe w8a8", "the following arguments are required: --output"),
        ("compress m --recipe w8a8 --output o --samples 0", "argument --samples: '0' is not a whole number >= 1"),
    ],
)
def test_a_wrong_argument_is_one_line_with_the_nearest_right_one(line, said, capsys):
    with pytest.raises(SystemExit) as caught:
        main(line.split())
    printed = capsys.readouterr()
    assert caught.value.code == 2
    assert said in printed.err
    assert len(printed.err.splitlines()) == 1
    assert not printed.out


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_leaves_an_argument_over(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "a", "b", "c", "--no-such-option"])
    assert f"hf-optim {command}: " in capsys.readouterr().err


@pytest.mark.parametrize("kept", [False, True])
def test_an_interrupted_run_says_how_to_continue_if_a_part_of_it_is_kept(kept, tmp_path, monkeypatch, capsys):
    tiny_llama().save_pretrained(tmp_path / "m")

    def interrupted(job):
        home = tmp_path / ".out.journal"
        home.mkdir()
        (home / "journal.json").write_text("{}")
        if kept:
            (home / "block.safetensors").write_bytes(b"")
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_optim.cli.jobs.compress.compress", interrupted)
    assert main(["compress", str(tmp_path / "m"), "--recipe", "w8a8", "--output", str(tmp_path / "out")]) == 130
    said = capsys.readouterr().err
    assert ("the same command with --resume continues" in said) == kept
    assert said.endswith("hf-optim: interrupted\n")
