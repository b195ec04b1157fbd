"""Layer-by-layer distillation: lr 0 is rounding, no block's loss rises, what it does not change, and its effect."""

from __future__ import annotations

import copy

import pytest
import torch
from exported import exported
from real_stories import windows
from tiny_models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from torch import nn
from transformers import AutoModelForCausalLM

from hf_optim import (
    Contract,
    ModelError,
    NumericalError,
    Reload,
    Technique,
    compressed,
    hookimpl,
    optimize,
    run_of,
    technique,
)
from hf_optim.testing.trait_checks import holds
from hf_optim.toolkit.modules.modes import eval_mode
from hf_optim.toolkit.pruning.masks import parameter_has_nm_pattern
from hf_optim_plugins.quantization.lkd import LKD, grid_on

IDS = torch.randint(0, 64, (16, 24), generator=torch.Generator().manual_seed(0))
FEW = {"steps": 12, "batch_size": 8, "learning_rate": 2e-3}


def distilled(model, *steps, **fields):
    return optimize(model, [*steps, {"technique": "lkd", **FEW, **fields}], calibration=IDS)


def same(first, second) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def losses(model) -> dict[str, list[float]]:
    return next(entry["losses"] for entry in run_of(model).record.steps.values() if "losses" in entry)


@pytest.mark.many
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "fields",
    [
        {"bits": 3, "group_size": 16},
        {"bits": 4, "group_size": None, "symmetric": False},
        {"bits": 8, "group_size": None, "activations": "int8"},
        {"bits": 2, "group_size": 8, "observer": "mse"},
    ],
)
def test_without_a_learning_rate_it_is_rounding(fields, dtype):
    plain = optimize(tiny_llama().to(dtype), {"technique": "rtn", **fields}, calibration=IDS)
    model = distilled(tiny_llama().to(dtype), **fields, learning_rate=0.0)
    assert same(model, plain)
    assert all(first == last for first, last in losses(model).values())
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, plain(IDS).logits)


@pytest.mark.parametrize("learn_scales", [False, True])
def test_without_a_learning_rate_the_codes_of_a_quantizer_stay(learn_scales):
    quantizer = {"technique": "gptq", "bits": 3, "group_size": 16, "symmetric": False}
    model = distilled(tiny_llama(), quantizer, learning_rate=0.0, learn_scales=learn_scales)
    assert same(model, optimize(tiny_llama(), quantizer, calibration=IDS))


def block_losses(model) -> list[float]:
    """Return the mean squared error of every block on the original model's inputs, by hooks on the original."""
    dense, seen = tiny_llama(), {}
    for index, block in enumerate(dense.model.layers):
        block.register_forward_hook(
            lambda m, a, k, out, index=index: seen.update({index: (a, k, out)}), with_kwargs=True
        )
    with eval_mode(dense), eval_mode(model):
        dense(IDS, use_cache=False)
        found = []
        for index, block in enumerate(model.model.layers):
            args, kwargs, out = seen[index]
            found.append(float((block(*args, **kwargs) - out).double().square().mean()))
    return found


@pytest.mark.parametrize("rate", [2e-3, 10.0])
@pytest.mark.parametrize("train", ["block", "weights"])
def test_the_loss_of_no_block_rises_and_is_the_one_reported(train, rate):
    fields = {"bits": 3, "group_size": 16, "train": train}
    before = block_losses(distilled(tiny_llama(), **fields, learning_rate=0.0))
    model = distilled(tiny_llama(), **fields, learning_rate=rate)
    after = block_losses(model)
    reported = list(losses(model).values())
    assert [first for first, _ in reported] == pytest.approx(before, rel=1e-4)
    assert [last for _, last in reported] == pytest.approx(after, rel=1e-4)
    if rate == 10.0:
        assert all(new <= old * (1 + 1e-6) for old, new in zip(before, after, strict=True))
    else:
        assert all(new < 0.9 * old for old, new in zip(before, after, strict=True))


def test_after_a_quantizer_scheme_and_grid_stay_and_codes_change():
    quantizer = {"technique": "rtn", "bits": 3, "group_size": 16, "activations": "int8"}
    plain = optimize(tiny_llama(), quantizer, calibration=IDS)
    model = distilled(tiny_llama(), quantizer, bits=8, learning_rate=1e-2)
    moved = 0
    for name, layer in compressed.quantized_modules(model).items():
        other = plain.get_submodule(name)
        assert layer.quantization_scheme == other.quantization_scheme
        assert torch.equal(layer.weight_scale, other.weight_scale)
        assert torch.equal(grid_on(layer).nearest(layer.weight.detach()), layer.weight)
        moved += int((layer.weight != other.weight).sum())
    assert moved > 50
    assert all(last < first for first, last in losses(model).values())
    assert [first for first, _ in losses(model).values()] == pytest.approx(block_losses(plain), rel=1e-4)


def test_learned_scales_change_after_a_quantizer_too():
    quantizer = {"technique": "gptq", "bits": 2, "group_size": 16}
    plain = optimize(tiny_llama(), quantizer, calibration=IDS)
    model = distilled(tiny_llama(), quantizer, learn_scales=True)
    pairs = [
        (m.weight_scale, plain.get_submodule(n).weight_scale) for n, m in compressed.quantized_modules(model).items()
    ]
    assert all(not torch.equal(a, b) for a, b in pairs)
    assert all(bool((a > 0).all()) for a, _ in pairs)


def test_untrained_parameters_and_flags_do_not_change():
    source = tiny_llama()
    source.model.layers[1].input_layernorm.weight.requires_grad_(False)
    dense = copy.deepcopy(source)
    model = distilled(source, bits=3, group_size=16, skip=["*.0.*"])
    trained = compressed.quantized_modules(model)
    assert len(trained) == 7
    for name, parameter in dense.named_parameters():
        now = model.get_parameter(name)
        if name.removesuffix(".weight") not in trained:
            assert now.requires_grad == parameter.requires_grad, name
            assert torch.equal(now, parameter) == (not name.startswith("model.layers.1.")), name
        assert now.grad is None
    weights = distilled(copy.deepcopy(dense), bits=3, group_size=16, train="weights")
    for name, parameter in dense.named_parameters():
        if "norm" in name:
            assert torch.equal(weights.get_parameter(name), parameter)


def test_masks_are_kept():
    model = distilled(tiny_llama(), {"technique": "nm"}, bits=4, group_size=16)
    run = run_of(model)
    assert {str(trait) for trait in run.traits} >= {"sparse", "sparse-nm", "quantized"}
    assert all(holds(trait, run) for trait in run.traits)
    assert all(parameter_has_nm_pattern(model, name, 2, 4) for name in run.nm_patterns)
    assert all(last < first for first, last in losses(model).values())
    # Trained without the masks, the blocks would be better until the end of the stage zeroes their weights again.
    assert [last for _, last in losses(model).values()] == pytest.approx(block_losses(model), rel=1e-4)


def test_the_card_has_the_loss_of_every_block_before_and_after():
    model = distilled(tiny_llama(), bits=3, group_size=16)
    sections = exported(model)
    (text,) = sections.paragraphs.values()
    assert text.startswith("Each of 2 quantized blocks was trained for 12 steps")
    (table,) = sections.tables.values()
    before = block_losses(distilled(tiny_llama(), bits=3, group_size=16, learning_rate=0.0))
    assert table[0] == ["block", "before", "after"]
    for row, block, first, last in zip(table[1:], range(2), before, block_losses(model), strict=True):
        assert row[0] == f"`model.layers.{block}`"
        assert [float(cell) for cell in row[1:]] == pytest.approx([first, last], rel=1e-3)
        assert last < 0.9 * first


@technique("bits_two", family="toy", contract=Contract(), reload=Reload.STOCK_DENSE)
class BitsTwo(Technique):
    """Assigns 2 bits to one layer."""

    def needs_data(self):
        return False

    @hookimpl
    def calibrate(self, run, scope):
        run.bit_plan["model.layers.0.mlp.up_proj"] = 2
        yield


def test_assigned_bits_take_precedence():
    model = optimize(tiny_llama(), [BitsTwo(), LKD(bits=4, group_size=16, **FEW)], calibration=IDS)
    found = {name: m.quantization_scheme.weights.num_bits for name, m in compressed.quantized_modules(model).items()}
    assert found.pop("model.layers.0.mlp.up_proj") == 2
    assert set(found.values()) == {4}


def test_random_tokens_suffice_and_no_labels_are_needed():
    random = {"calibration": {"dataset": "random", "samples": 16, "seq_len": 24}}
    model = optimize(tiny_llama(), {"steps": [{"technique": "lkd", "bits": 3, "group_size": 16, **FEW}], **random})
    assert all(last < first for first, last in losses(model).values())


def test_it_is_deterministic_and_the_seed_counts():
    first, second, other = (distilled(tiny_llama(), bits=3, group_size=16, seed=seed) for seed in (0, 0, 1))
    assert same(first, second)
    assert not same(first, other)


@pytest.mark.slow
def test_encoders_and_both_stacks_of_t5():
    batches = [{"input_ids": IDS[:4], "attention_mask": (IDS[:4] > 5).long()}] * 2
    step = {"technique": "lkd", "bits": 4, "group_size": 16, **FEW}
    for model, blocks in ((tiny_bert(), 2), (tiny_t5(), 4)):
        found = losses(optimize(model, step, calibration=batches))
        assert len(found) == blocks
        assert all(last <= first for first, last in found.values())


def test_a_quantized_checkpoint_is_refused(tmp_path):
    optimize(tiny_llama(), {"technique": "rtn", "bits": 4, "group_size": 16}).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"step 1 \(lkd\).*no original block to match"):
        optimize(loaded, {"technique": "lkd", **FEW}, calibration=IDS)


def test_refusals_give_the_reason():
    with pytest.raises(ModelError, match=r"step 1 \(lkd\).*driver: blockwise"):
        optimize(tiny_llama(), {"steps": [{"technique": "lkd"}], "driver": "whole_model"}, calibration=IDS)
    with pytest.raises(ModelError, match=r"step 1 \(lkd\).*Conv1D"):
        optimize(tiny_gpt2(), {"technique": "lkd", **FEW}, calibration=IDS)
    model = tiny_llama()
    model.model.layers[1].input_layernorm.weight.data[0] = 3e38  # finite, but its products are not
    with pytest.raises(NumericalError, match=r"step 1 \(lkd\): model\.layers\.1 gave NaN"):
        distilled(model, bits=4, group_size=16)
    assert all(type(m) is nn.Linear for m in model.model.layers[1].mlp.children() if isinstance(m, nn.Linear))


def test_a_failure_in_training_leaves_plain_layers(monkeypatch):
    from hf_optim_plugins.quantization import lkd

    def fail(*args, **kwargs):
        raise RuntimeError("no more")

    monkeypatch.setattr(lkd.block_reconstruction, "reconstruct_block", fail)
    model = tiny_llama()
    with pytest.raises(RuntimeError, match="no more"):
        distilled(model)
    assert all(type(m) is nn.Linear for m in model.modules() if isinstance(m, nn.Linear))


def test_the_head_outside_the_blocks_is_listed_as_skipped():
    model = distilled(tiny_llama(), targets=["lm_head", "Linear"], bits=4, group_size=16)
    _, skipped = run_of(model).covered(run_of(model).recipe.steps[0])
    assert skipped == {"it lies outside the blocks": {"lm_head"}}


@pytest.mark.real_model
def test_it_improves_on_rounding_and_on_other_steps(shared_models, shared_data):
    """babyllama-1m at 2 bits, on a small part of the evaluation text: alone, and after another step."""
    from hf_optim.evaluation.evaluate import perplexity

    home = shared_models / "babyllama-1m"
    calibration = windows(home, shared_data, "calibration", 16)
    held_out = windows(home, shared_data, "eval", 16)
    dense = AutoModelForCausalLM.from_pretrained(home, dtype=torch.float32).eval()
    quantizer = {"technique": "gptq", "bits": 2, "group_size": 32}
    step = LKD(bits=2, group_size=32, steps=40, batch_size=8, learning_rate=1e-3, learn_scales=True)
    recipes = {"gptq": [quantizer], "gptq, lkd": [quantizer, step], "lkd": [step]}
    found = {
        name: perplexity(optimize(copy.deepcopy(dense), steps, calibration=calibration), held_out)["perplexity"]
        for name, steps in recipes.items()
    }
    assert found["gptq, lkd"] < 0.95 * found["gptq"]
    assert found["lkd"] < 0.95 * found["gptq"]
