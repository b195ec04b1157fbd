"""Coverage counts weights: every one once, and what is left alone by role adds up with what a step changed."""

from __future__ import annotations

import logging
import re

import pytest
from renamed_families import FAMILIES, TEXT, TOKENS, build_family
from tiny_models import tiny_bert, tiny_gpt2, tiny_llama, tiny_mixtral, tiny_t5, tiny_vit
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

import hf_optim
from hf_optim.evaluation.cards import sections
from hf_optim.runs.coverage import left_alone_lines
from hf_optim.runs.record import Record


def tiny_qwen2_vl():
    tower = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 8, "mlp_ratio": 2}
    rope = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config={**TEXT, **rope}, vision_config=tower, **TOKENS))


TIED = "output head: its weight is that of the token embeddings"
VECTORS = "norms, biases and other vectors"
IMAGE = {"position embeddings", "patch embedding", VECTORS}
ARCHITECTURES = {
    "llama": (tiny_llama, {"output head", "token embeddings", VECTORS}),
    "bert with pooler": (
        tiny_bert,
        {"output head", "pooler", "token embeddings", "position embeddings", VECTORS},
    ),
    "vit": (tiny_vit, {"output head", *IMAGE}),
    "clip": (FAMILIES["clip"][0], {"projector", "token embeddings", *IMAGE}),
    "llava": (FAMILIES["llava"][0], {"output head", "vision tower", "projector", "token embeddings", *IMAGE}),
    "qwen2-vl": (
        tiny_qwen2_vl,
        {"output head", "vision tower", "projector", "token embeddings", "patch embedding", VECTORS},
    ),
    "whisper": (FAMILIES["whisper"][0], {TIED, "position embeddings", "convolutions", VECTORS}),
    "t5": (tiny_t5, {TIED, "position embeddings", VECTORS}),
    "mixtral": (tiny_mixtral, {"router", "output head", "token embeddings", VECTORS}),
    "gpt2": (tiny_gpt2, {TIED, "position embeddings", VECTORS}),
    "mamba": (FAMILIES["mamba"][0], {TIED, "convolutions", "other matrices", VECTORS}),
    "gemma3": (FAMILIES["gemma3"][0], {TIED, "vision tower", "projector", "pooler", *IMAGE}),
}


def optimized(model, **fields):
    step = {"technique": "rtn", "bits": 8, **fields}
    if type(model).__name__.startswith("GPT2"):
        step["technique"] = "magnitude"
        del step["bits"]
    return hf_optim.run_of(hf_optim.optimize(model, step))


@pytest.mark.many
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_was_changed_and_what_was_left_alone_are_the_model(name, caplog):
    build, roles = ARCHITECTURES[name]
    model = build()
    total = sum(parameter.numel() for parameter in model.parameters())
    names = {n for n, _ in model.named_parameters(remove_duplicate=False)}
    with caplog.at_level(logging.INFO, logger="hf_optim"):
        run = optimized(model)
    ((label, entry),) = run.record.coverage.items()
    parts = entry["left_alone"]
    assert set(parts) == roles
    assert entry["weights_touched"] > 0
    assert entry["weights_touched"] + sum(part["weights"] for part in parts.values()) == entry["weights_total"] == total
    assert all(part["reason"] for part in parts.values())
    for part in parts.values():  # every name is that of a module or parameter
        assert all(any(n == each or n.startswith(f"{each}.") for n in names) for each in part["names"])

    # The terminal: one line a role.
    lines = [m for m in caplog.messages if "left alone: " in m]
    told = [int(re.search(r", ([\d,]+) weights \(", line)[1].replace(",", "")) for line in lines]
    assert len(lines) == len(parts)
    assert sum(told) + entry["weights_touched"] == total
    assert all(line.startswith(label) for line in lines)

    # The card: one row a role, and the record is read back with it.
    card = sections.coverage(Record(**{"coverage": run.record.coverage}))
    rows = re.findall(r"^\| (.+?) \| ([\d,]+) \| [\d.]+ % \| .+ \|$", card, re.MULTILINE)
    assert {role for role, _ in rows} == set(parts)
    assert sum(int(weights.replace(",", "")) for _, weights in rows) + entry["weights_touched"] == total


def test_a_tower_is_a_warning_unless_skip_names_it(caplog):
    optimized(build_family("llava")[0])
    assert "left alone: vision tower, 16,384 weights (31.2 %)" in caplog.text
    assert "model.vision_tower.encoder.layers.*.mlp.fc1" in caplog.text
    caplog.clear()
    optimized(build_family("llava")[0], skip=["*vision_tower*"])
    assert "vision tower" not in caplog.text
    optimized(build_family("llava")[0], targets=["Linear", "*vision_tower*"])
    assert "vision tower" not in caplog.text


def test_old_keys_of_the_record_stay(tmp_path):
    model = hf_optim.optimize(tiny_llama(), {"technique": "rtn", "bits": 8})
    model.save_pretrained(tmp_path)
    (entry,) = Record.read(tmp_path).coverage.values()
    assert entry["skipped"] == {"output head": ["lm_head"]}
    assert entry["left_alone"]["output head"]["names"] == ["lm_head"]
    del entry["left_alone"]  # a record of before
    assert "skipped 1: output head (`lm_head`)" in sections.coverage(Record(coverage={"step 1 (rtn)": entry}))


def test_layers_that_targets_leave_out_are_named():
    run = optimized(tiny_llama(), targets=["*.mlp.*"])
    (entry,) = run.record.coverage.values()
    assert entry["left_alone"]["layers of the blocks"]["reason"] == "targets and skip leave them out"
    assert len(entry["left_alone"]["layers of the blocks"]["names"]) == 8


def test_a_step_gives_its_own_reason():
    run = optimized(build_family("gemma3")[0], targets=["Linear", "*vision_tower*"])
    (entry,) = run.record.coverage.values()
    role = "pooler: nn.MultiheadAttention reads its weight without calling it"
    assert entry["left_alone"][role]["names"] == ["model.vision_tower.head.attention.out_proj"]


def test_steps_that_left_the_same_share_a_table_on_the_card():
    model = hf_optim.optimize(tiny_llama(), [{"technique": "magnitude"}, {"technique": "rtn", "bits": 8}])
    record = hf_optim.run_of(model).record
    assert sections.coverage(record).count("| left alone |") == 1
    model = hf_optim.optimize(
        tiny_llama(), [{"technique": "magnitude"}, {"technique": "rtn", "bits": 8, "targets": ["Linear", "lm_head"]}]
    )
    text = sections.coverage(hf_optim.run_of(model).record)
    assert text.count("| left alone |") == 2
    assert "step 1 (magnitude):" in text


@pytest.mark.parametrize("step", [{"technique": "rtn", "group_size": 8}, {"technique": "magnitude"}])
def test_the_total_is_the_model_as_it_came(step):
    model = tiny_llama()
    total = sum(p.numel() for p in model.parameters())
    linears = sum(p.numel() for name, p in model.named_parameters() if "proj" in name)
    record = hf_optim.run_of(hf_optim.optimize(model, step)).record
    (coverage,) = record.coverage.values()
    assert (coverage["weights_touched"], coverage["weights_total"]) == (linears, total)
    assert coverage["share"] == pytest.approx(linears / total, abs=1e-6)


def test_lines_are_printable():
    part = {"reason": "a\x1b[31m\nb", "names": ["x\x1b]0;y"], "weights": 1}
    entry = {"weights_total": 2, "left_alone": {"ro\nle": part}}
    (line,) = left_alone_lines(entry).values()
    assert line.isprintable()


@pytest.mark.parametrize(
    "fields", [{"bits": 4}, {"bits": 4, "symmetric": False}, {"bits": 4, "activations": "int8"}, {"bits": 3}], ids=str
)
def test_groups_that_do_not_fit_tell_the_bits_of_a_weight(tmp_path, caplog, fields):
    model = tiny_llama(intermediate_size=172)
    fields = {"technique": "rtn", "group_size": 32, **fields}
    model = hf_optim.optimize(model, fields)
    model.save_pretrained(tmp_path)
    (entry,) = Record.read(tmp_path).coverage.values()
    (group,) = entry["groups"]
    assert group["layers"] == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    assert (group["inputs"], group["group_size"]) == (172, 4)

    from safetensors.torch import load_file

    stored = load_file(tmp_path / "model.safetensors").items()
    sizes = [8 * t.nbytes for n, t in stored if n.startswith("model.layers.0.mlp.down_proj") and "shape" not in n]
    bits = sum(sizes) / (32 * 172)
    assert group["bits_per_weight"] == pytest.approx(bits, abs=1e-3)
    told = f"groups of 4: {bits:.1f} bits a weight with scales, more than int8 takes: use group_size 43 or 86"
    assert told in caplog.text  # the log, at warning level
    assert told in (tmp_path / "README.md").read_text()


def test_groups_of_a_later_step_are_not_told_of_an_earlier_one():
    steps = [{"technique": "awq", "group_size": 128}, {"technique": "rtn", "bits": 4, "group_size": 16}]
    model = tiny_llama()
    run = hf_optim.run_of(hf_optim.optimize(model, steps, calibration=[model.dummy_inputs]))
    assert run.record.notes == []


def test_groups_that_fit_say_nothing(caplog):
    run = hf_optim.run_of(hf_optim.optimize(tiny_llama(), {"technique": "rtn", "bits": 4, "group_size": 16}))
    (entry,) = run.record.coverage.values()
    assert "groups" not in entry
    assert run.record.notes == []
