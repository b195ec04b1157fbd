"""What commands print is printable: names may come from a stranger's checkpoint or recipe."""

from __future__ import annotations

import json
import logging

from safetensors.torch import load_file, save_file

from hf_optim.cli import _logging, main
from hf_optim.cli.table import format_table
from hf_optim.testing.models import tiny_llama

ESCAPE = "\x1b[2J\u202e"


def test_tables_and_logs_escape_control_characters(capsys):
    assert ESCAPE[0] not in format_table(("name", "value"), [(f"a{ESCAPE}", f"b{ESCAPE}")])
    with _logging(False):
        logging.getLogger("hf_optim.x").warning("the tensor %s\nis new", f"a{ESCAPE}")
    assert capsys.readouterr().err == "the tensor a\\x1b[2J\\u202e\nis new\n"


def test_names_of_tensors_in_notes_are_escaped(tmp_path, capsys):
    tiny_llama().save_pretrained(tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors[f"vision.{ESCAPE}"] = tensors["model.norm.weight"].clone()
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "r.json").write_text(json.dumps({"steps": [{"technique": "rtn", "targets": [f"x{ESCAPE}"]}]}))
    for recipe in ("rtn", str(tmp_path / "r.json")):
        main(["check", recipe, "--model", str(tmp_path / "model")])
        printed = "".join(capsys.readouterr())
        assert "\\x1b[2J" in printed
        assert "\x1b" not in printed
