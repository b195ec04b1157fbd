"""Mixtures of experts under the streamed driver: same output as the blockwise driver, and resumable."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers
from streamed_and_blockwise import assert_same_checkpoint, blockwise, random_batches, recipe_of, streamed
from tiny_models import DECODER, tiny_mixtral
from torch import nn
from transformers import AutoModelForCausalLM

import hf_optim
from hf_optim import Contract, ModelError, Reload, Technique, hookimpl, technique
from hf_optim.calibration.streamed import driver
from hf_optim.checkpoints.source import ModelSource
from hf_optim.cli.jobs import preflight
from hf_optim.cli.jobs.plan import Plan
from hf_optim.compressed.experts import expert_schemes
from hf_optim.compressed.packed.packed_experts import PackedExperts
from hf_optim.recipes.traits import BITS_ASSIGNED, QUANTIZED
from hf_optim.testing.models import _build
from hf_optim.toolkit.checkpoint.safetensors import SafetensorsHeaders
from hf_optim.toolkit.pruning.masks import has_nm_pattern
from hf_optim.toolkit.topology.experts import expert_linears, fused_experts

RTN = {"technique": "rtn", "bits": 4, "group_size": 16}
GPTQ = {"technique": "gptq", "bits": 4, "group_size": 16}


def qwen3_moe() -> nn.Module:
    """A model whose first block is dense; the others have five experts."""
    config = {**DECODER, "moe_intermediate_size": 24, "num_experts_per_tok": 2, "head_dim": 8, "mlp_only_layers": [0]}
    config |= {"num_hidden_layers": 3, "num_experts": 5}
    return _build(transformers.Qwen3MoeForCausalLM, transformers.Qwen3MoeConfig(**config), 0)


def granite_moe() -> nn.Module:
    """A model whose checkpoints do not store one matrix per expert."""
    config = transformers.GraniteMoeConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2)
    return _build(transformers.GraniteMoeForCausalLM, config, 0)


MODELS = {"mixtral": lambda: tiny_mixtral(num_hidden_layers=3), "qwen3": qwen3_moe}
CASES = {
    "mixtral, rtn": ("mixtral", (RTN,)),
    "mixtral, gptq": ("mixtral", (GPTQ,)),
    "mixtral, w8a8 static": ("mixtral", ({"technique": "rtn", "activations": "int8", "dynamic": False},)),
    "mixtral, fp8 beside experts": ("mixtral", ({"technique": "rtn", "format": "fp8"},)),
    "qwen3, rtn": ("qwen3", (RTN,)),
    "mixtral, nm by inputs + gptq": ("mixtral", ({"technique": "nm", "score": "activation"}, GPTQ)),
    "qwen3, nm + gptq in order": ("qwen3", ({"technique": "nm"}, {**GPTQ, "bits": 3, "true_sequential": True})),
}


@technique(
    "assigning", family="testing", contract=Contract(adds={BITS_ASSIGNED}, owes={QUANTIZED}), reload=Reload.STOCK_DENSE
)
class Assigning(Technique):
    """Assigns bits block by block."""

    @hookimpl
    def calibrate(self, run, scope):
        yield from ()
        run.bit_plan |= dict.fromkeys(scope.linears, 4)


class Stop(Exception):
    """Simulates a kill."""


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    monkeypatch.setattr("hf_optim.evaluation.cards.card.Card._draw_plots", lambda self, directory: [])


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    """Checkpoints with several shards, so that the matrices of one expert stack are in different files."""
    made = {}
    for name, make in MODELS.items():
        made[name] = tmp_path_factory.mktemp(name)
        make().save_pretrained(made[name], max_shard_size="20KB")
    return made


@pytest.mark.many
@pytest.mark.parametrize("case", CASES)
def test_it_writes_what_the_blockwise_driver_writes(case, homes, stock, tmp_path):
    name, steps = CASES[case]
    batches = random_batches(MODELS[name]())
    ours = streamed(homes[name], steps, batches, tmp_path / "ours")
    model = blockwise(homes[name], steps, batches, tmp_path / "theirs")
    theirs = hf_optim.run_of(model)
    assert_same_checkpoint(tmp_path / "ours", tmp_path / "theirs")
    if steps[0]["technique"] == "nm":
        views = expert_linears(model)
        assert all(has_nm_pattern(view.weight, 2, 4) for view in views.values())
        assert views.keys() <= ours.record.steps["0"]["layers"].keys()
    assert (ours.record.steps, ours.record.coverage, ours.record.notes) == (
        theirs.record.steps,
        theirs.record.coverage,
        theirs.record.notes,
    )
    with torch.no_grad():
        expected = model(**batches[0]).logits
    _, logits = stock.logits(tmp_path / "ours", "AutoModelForCausalLM", batches[0])
    assert torch.equal(logits, expected)


# What the codes of experts run on: PyTorch's packed operators on a CPU, and Triton kernels.
@pytest.mark.many(every=4)
@pytest.mark.filterwarnings("ignore::hf_optim.KernelWarning")
@pytest.mark.parametrize(
    ("device", "kernel"),
    [
        ("cpu", "packed experts (PyTorch's CPU operators), 4-bit"),
        pytest.param("cuda", "packed experts (Triton), ", marks=pytest.mark.gpu),
    ],
    ids=["cpu", "cuda"],
)
@pytest.mark.parametrize("step", [RTN, GPTQ], ids=["rtn", "gptq"])
def test_the_experts_it_wrote_run_on_their_codes(step, device, kernel, tmp_path):
    load = functools.partial(AutoModelForCausalLM.from_pretrained, tmp_path / "out", dtype=torch.bfloat16)
    dense = tiny_mixtral(intermediate_size=64, num_hidden_layers=3)
    dense.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    batches = random_batches(dense)
    streamed(tmp_path / "dense", ({**step, "group_size": 32},), batches, tmp_path / "out")
    stock, model = load().to(device), load(optim_config="auto").to(device)
    for layer in stock.model.layers:
        layer.mlp.gate.to(torch.bfloat16)  # stock transformers 5.17 leaves it in the file's dtype, in which it fails
    assert sum(isinstance(module, PackedExperts) for module in model.modules()) == 3
    rows = [row for row in hf_optim.report(model) if row.experts]
    assert len(rows) == 6
    assert all(row.kernel.startswith(kernel) for row in rows)
    with torch.no_grad():
        given = {name: value.to(device) for name, value in batches[0].items()}
        ours, theirs = (one(**given).logits.float() for one in (model, stock))
    assert 0 < float((ours - theirs).norm() / theirs.norm()) < 5e-2


def stop_in(monkeypatch, name, at):
    """Make a method of the driver raise at its ``at``-th call."""
    stock_method, calls = getattr(driver.StreamedDriver, name), []

    def method(*args, **kwargs):
        calls.append(args)
        if len(calls) == at:
            raise Stop
        return stock_method(*args, **kwargs)

    monkeypatch.setattr(driver.StreamedDriver, name, method)


@pytest.mark.many(every=4)
@pytest.mark.parametrize(
    ("name", "place", "at", "step"),
    [
        ("mixtral", "_compute_outputs", 2, GPTQ),
        ("qwen3", "_calibrate_non_blocks", 1, GPTQ),
        # Outputs of the original blocks are computed, too.
        ("mixtral", "_compute_outputs", 4, {"technique": "signround", "group_size": 16, "steps": 6}),
    ],
    ids=["mixtral", "qwen3", "mixtral, signround"],
)
def test_a_stopped_run_resumes_with_the_same_bytes(name, place, at, step, homes, tmp_path, monkeypatch):
    batches = random_batches(MODELS[name]())
    streamed(homes[name], (step,), batches, tmp_path / "undisturbed")
    with monkeypatch.context() as patch:
        stop_in(patch, place, at)
        with pytest.raises(Stop):
            streamed(homes[name], (step,), batches, tmp_path / "stopped")
    run = streamed(homes[name], (step,), batches, tmp_path / "stopped", resume=True)
    assert run.record.stages[0]["blocks"] == (1 if place == "_compute_outputs" else 0)
    for path in (tmp_path / "undisturbed").glob("*.safetensors"):
        assert (tmp_path / "stopped" / path.name).read_bytes() == path.read_bytes(), path.name
    config = "config.json"
    assert (tmp_path / "stopped" / config).read_bytes() == (tmp_path / "undisturbed" / config).read_bytes()


def test_the_state_file_of_a_block_has_no_decoded_weights(homes, tmp_path, monkeypatch):
    stop_in(monkeypatch, "_calibrate_non_blocks", 1)
    with pytest.raises(Stop):
        streamed(homes["mixtral"], (RTN,), None, tmp_path / "out")
    for path in (tmp_path / ".out.journal").glob("state-*.safetensors"):
        kept = {key for key in SafetensorsHeaders([path]).entries if key.startswith("kept.")}
        assert {key for key in kept if "experts" in key} == {
            "kept.mlp.experts.down_proj_scale",
            "kept.mlp.experts.gate_up_proj_scale",
        }


# -- refusals ----------------------------------------------------------------------------------------------------------
def look(home, *steps):
    source, recipe = ModelSource(str(home)), recipe_of(steps, "streamed")
    return preflight.preflight(Plan(source, recipe))


def test_experts_that_stock_cannot_read_are_refused_before_a_block_is_read(homes, tmp_path):
    granite_moe().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"step 1 \(rtn\).*has no conversion.*fp8"):
        look(tmp_path, RTN)
    look(tmp_path, {"technique": "rtn", "format": "fp8"})
    look(tmp_path, {"technique": "rtn", "bits": None, "activations": "int8"})
    with pytest.raises(ModelError, match="without zero points only"):
        look(homes["mixtral"], {**GPTQ, "symmetric": False})
    with pytest.raises(ModelError, match=r"leave out 24, such as model\.layers\.0.mlp\.experts\.0\.gate_up_proj"):
        look(homes["mixtral"], {**RTN, "targets": ["*self_attn*"]})
    assert look(homes["mixtral"], RTN).notes == []


def test_bits_that_vary_are_refused(homes):
    with pytest.raises(ModelError, match=r"step 2 \(rtn\): other bits are assigned.*blockwise"):
        look(homes["mixtral"], Assigning(), RTN)


def test_a_block_of_another_scheme_is_not_written(homes, tmp_path, monkeypatch):
    from hf_optim_plugins.quantization.rtn import RTN as Rounding

    # Simulates a step that assigns different bits to blocks without declaring it in its contract.
    monkeypatch.setattr(Rounding, "_bits", lambda self, run, name: 8 if ".layers.1." in name else 4)
    with pytest.raises(ModelError, match=r"experts of model\.layers\.1 are quantized by another scheme.*blockwise"):
        streamed(homes["mixtral"], (RTN,), None, tmp_path / "out")
    assert not (tmp_path / ".out.journal" / "state-00002.safetensors").exists()


@technique("spoiling", family="testing", contract=Contract(keeps={QUANTIZED}), reload=Reload.STOCK_DENSE)
class Spoiling(Technique):
    """Writes into quantized experts."""

    @hookimpl
    def calibrate(self, run, scope):
        yield from ()
        for stack in fused_experts(scope.module).values():
            assert expert_schemes(stack)
            stack.down_proj.data[0] += 0.01


def test_experts_that_changed_after_they_were_quantized_are_refused(homes, tmp_path):
    with pytest.raises(ModelError, match=r"model\.layers\.0\.mlp\.experts has changed since"):
        streamed(homes["mixtral"], (RTN, Spoiling()), None, tmp_path / "out")
