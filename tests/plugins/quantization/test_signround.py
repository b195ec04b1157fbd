"""SignRound: no step is rounding to nearest, the descent against one written out, what it keeps, and its effect."""

from __future__ import annotations

import copy

import pytest
import torch
from exported import exported
from real_stories import windows
from tiny_models import tiny_bert, tiny_gpt2, tiny_llama, tiny_mixtral, tiny_t5
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from hf_optim import ModelError, NumericalError, RecipeError, compressed, optimize, run_of
from hf_optim.testing.trait_checks import holds
from hf_optim.toolkit.modules.modes import eval_mode
from hf_optim.toolkit.pruning.masks import parameter_has_nm_pattern

IDS = torch.randint(0, 64, (16, 24), generator=torch.Generator().manual_seed(0))
FEW = {"steps": 12, "batch_size": 16}


def learned(model, *steps, data=IDS, **fields):
    return optimize(model, [*steps, {"technique": "signround", **FEW, **fields}], calibration=data)


def same(first, second) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def losses(model) -> dict[str, list[float]]:
    return next(entry["losses"] for entry in run_of(model).record.steps.values() if "losses" in entry)


def codes_of(model) -> dict[str, torch.Tensor]:
    """Return the codes of quantized layers, from their weights and scales."""
    found = {}
    for name, layer in compressed.quantized_modules(model).items():
        parts = layer.weight.detach().unflatten(-1, (layer.weight_scale.shape[1], -1))
        found[name] = (parts / layer.weight_scale.unsqueeze(-1)).round().flatten(1)
    return found


@pytest.mark.many
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "fields",
    [
        {"bits": 3, "group_size": 16},
        {"bits": 4, "group_size": None, "symmetric": False},
        {"bits": 8, "group_size": None, "activations": "int8"},
        {"bits": 2, "group_size": 8, "observer": "mse", "range_rate": 0.0},
    ],
)
def test_without_a_step_it_is_rounding(fields, dtype):
    given = {key: value for key, value in fields.items() if key != "range_rate"}
    plain = optimize(tiny_llama().to(dtype), {"technique": "rtn", **given}, calibration=IDS)
    model = learned(tiny_llama().to(dtype), **fields, steps=0)
    assert same(model, plain)
    assert all(first == last for first, last in losses(model).values())


def fake(weight, offset, low, high, size, signed=False):
    """Return a weight on 3 bits, equation 3 of the paper for a symmetric grid, with the straight-through gradient.

    With ``signed`` the end that is larger in magnitude is the code -4.
    """
    parts = weight.view(len(weight), -1, size)
    scale = torch.where(high > -low, high, low) / -4 if signed else torch.maximum(high, -low) * 2 / 7
    codes = parts / scale + offset.view(parts.shape)
    codes = (codes + (codes.round() - codes).detach()).clamp(-4, 3)
    return (codes * scale).view(weight.shape)


OURS = {
    "signed_scales": True,
    "optimizer": "adam",
    "largest_offset": None,
    "learning_rate": 0.2,
    "range_rate": 0.02,
    "tune_norms": True,
    "norm_rate": 0.01,
}


@pytest.mark.parametrize(("inputs", "fields"), [("quantized", {}), ("dense", {}), ("quantized", OURS)])
def test_it_is_the_descent_written_out(inputs, fields):
    """The paper's, and ours. Every step sees all data here, so that the best state can be found step by step."""
    steps, size, ours = 6, 16, bool(fields)
    model = learned(tiny_llama().double(), bits=3, group_size=size, steps=steps, inputs=inputs, **fields)
    dense, mixed = tiny_llama().double(), tiny_llama().double()
    seen, expected = {}, {}
    for index, block in enumerate(dense.model.layers):
        block.register_forward_hook(lambda m, a, out, i=index: expected.update({i: out}))
    with eval_mode(dense):
        dense(IDS, use_cache=False)
    for index in range(2):
        source = mixed if inputs == "quantized" else dense
        handle = source.model.layers[index].register_forward_pre_hook(
            lambda m, a, k: seen.update({"now": (a, {**k, "use_cache": False})}), with_kwargs=True
        )
        with eval_mode(source):
            source(IDS, use_cache=False)
        handle.remove()
        block = mixed.model.layers[index].eval()
        weights = {n: p.detach() for n, p in block.named_parameters() if p.dim() == 2}
        offsets = {n: torch.zeros_like(w, requires_grad=True) for n, w in weights.items()}
        ends = {n: torch.aminmax(w.view(len(w), -1, size), dim=-1, keepdim=True) for n, w in weights.items()}
        shares = {n: torch.ones_like(e[0], requires_grad=True) for n, e in ends.items()}
        vectors = {n: p.detach().clone().requires_grad_() for n, p in block.named_parameters() if p.dim() == 1 and ours}

        def loss_and_weights(
            block=block, weights=weights, offsets=offsets, ends=ends, shares=shares, index=index, vectors=vectors
        ):
            made = {
                n: fake(w, offsets[n], ends[n][0] * shares[n], ends[n][1] * shares[n], size, ours)
                for n, w in weights.items()
            }
            made |= vectors
            args, kwargs = seen["now"]
            out = functional_call(block, made, args, kwargs)
            out, target = (value[0] if isinstance(value, tuple) else value for value in (out, expected[index]))
            return (out.float() - target.float()).square().mean(), made  # as block_reconstruction: float32

        states = []
        leaves = [*offsets.values(), *shares.values(), *vectors.values()]
        rates = {"offsets": (offsets, 0.2), "shares": (shares, 0.02), "vectors": (vectors, 0.01)}
        groups = [{"params": list(found.values()), "lr": rate} for found, rate in rates.values()]
        adam = torch.optim.Adam(groups, betas=(0.9, 0.99)) if ours else None
        for step in range(steps + 1):
            loss, made = loss_and_weights()
            states.append((float(loss.detach()), {n: w.detach().clone() for n, w in made.items()}))
            if step == steps:
                break
            gradients = torch.autograd.grad(loss, leaves)
            with torch.no_grad():
                for leaf, gradient in zip(leaves, gradients, strict=True):
                    if ours:
                        leaf.grad = gradient
                    else:
                        leaf -= (1 - step / steps) / steps * gradient.sign()
                if ours:
                    for group, (_, rate) in zip(adam.param_groups, rates.values(), strict=True):
                        group["lr"] = rate * (1 - step / steps)
                    adam.step()
                for offset in offsets.values() if not ours else ():
                    offset.clamp_(-0.5, 0.5)
                for share in shares.values():
                    share.clamp_(0.05, 1.0)
        _, best = min(states, key=lambda state: state[0])
        for name, weight in best.items():
            block.get_parameter(name).data.copy_(weight)
            mine = model.model.layers[index].get_parameter(name)
            torch.testing.assert_close(mine, weight, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bits", [4, 3])
def test_negative_scales_are_read_by_stock_transformers_and_by_kernels(bits, tmp_path):
    model = learned(tiny_llama(), bits=bits, group_size=16, signed_scales=True)
    scales = torch.cat([layer.weight_scale.flatten() for layer in compressed.quantized_modules(model).values()])
    assert 0.3 < float((scales < 0).float().mean()) < 0.7
    assert all(float(codes.min()) == -(2 ** (bits - 1)) for codes in codes_of(model).values())
    model.save_pretrained(tmp_path)
    with eval_mode(model):
        expected = model(IDS).logits
    for config in (None, "auto"):
        kept = {} if config is None else {"optim_config": config}
        with eval_mode(again := AutoModelForCausalLM.from_pretrained(tmp_path, **kept)):
            torch.testing.assert_close(again(IDS).logits, expected, rtol=0, atol=1e-5)


def block_losses(model, data=IDS, tiny=tiny_llama) -> list[float]:
    """Return the error of every block against the original model's, on the inputs that ``model`` gives it."""
    dense, expected, found = tiny(), {}, {}
    for index, block in enumerate(dense.model.layers):
        block.register_forward_hook(lambda m, a, out, i=index: expected.update({i: out}))
    handles = [
        block.register_forward_hook(lambda m, a, out, i=index: found.update({i: out}))
        for index, block in enumerate(model.model.layers)
    ]
    with eval_mode(dense), eval_mode(model):
        dense(data, use_cache=False)
        model(data, use_cache=False)
    for handle in handles:
        handle.remove()
    return [float((found[i] - expected[i]).double().square().mean()) for i in range(2)]


def test_the_loss_of_no_block_rises_and_is_the_one_reported():
    for rate in (None, 10.0):
        model = learned(tiny_llama(), bits=3, group_size=16, learning_rate=rate)
        assert all(last <= first for first, last in losses(model).values())
        assert [last for _, last in losses(model).values()] == pytest.approx(block_losses(model), rel=1e-4)
    model = learned(tiny_llama(), bits=3, group_size=16)
    assert all(last < 0.6 * first for first, last in losses(model).values())


def test_with_a_fixed_range_a_code_moves_by_at_most_one():
    plain = codes_of(optimize(tiny_llama(), {"technique": "rtn", "bits": 3, "group_size": 16}))
    moved = codes_of(learned(tiny_llama(), bits=3, group_size=16, range_rate=0.0))
    differences = torch.cat([(moved[name] - plain[name]).abs().flatten() for name in plain])
    assert float(differences.max()) == 1
    assert 0.02 < float(differences.mean()) < 0.6


def test_masks_are_kept():
    model = learned(tiny_llama(), {"technique": "nm"}, bits=4, group_size=16)
    run = run_of(model)
    assert {str(trait) for trait in run.traits} >= {"sparse", "sparse-nm", "quantized"}
    assert all(holds(trait, run) for trait in run.traits)
    assert all(parameter_has_nm_pattern(model, name, 2, 4) for name in run.nm_patterns)
    assert all(last < first for first, last in losses(model).values())


def test_experts_are_learned_with_their_block(tmp_path):
    model = learned(tiny_mixtral(), bits=3, group_size=16)
    assert all(last < 0.8 * first for first, last in losses(model).values())
    with eval_mode(model):
        expected = model(IDS).logits
    model.save_pretrained(tmp_path)
    with eval_mode(again := AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)):
        torch.testing.assert_close(again(IDS).logits, expected, rtol=0, atol=1e-5)


def experts_first():
    """A decoder whose blocks name their experts before their attention."""
    model = tiny_mixtral()
    for block in model.model.layers:
        block.self_attn = block._modules.pop("self_attn")
    return model


@pytest.mark.parametrize("tiny", [tiny_mixtral, experts_first])
def test_beside_experts_the_inputs_of_linear_layers_are_rounded_while_they_are_learned(tiny):
    model = learned(tiny(), bits=3, group_size=16, activations="int8")
    assert [last for _, last in losses(model).values()] == pytest.approx(block_losses(model, tiny=tiny), rel=1e-4)


def test_targets_may_name_experts_alone():
    model = learned(tiny_mixtral(), bits=3, group_size=16, targets=["*experts*"])
    assert all(last < first for first, last in losses(model).values())


def test_encoders_and_both_stacks_of_t5():
    batches = [{"input_ids": IDS[:4], "attention_mask": (IDS[:4] > 5).long()}] * 2
    for model, blocks in ((tiny_bert(), 2), (tiny_t5(), 4)):
        found = losses(learned(model, data=batches, bits=4, group_size=16))
        assert len(found) == blocks
        assert all(last < first for first, last in found.values())


def test_padding_does_not_count():
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    mask[::2, 15:] = 0
    batches = [{"input_ids": ids, "attention_mask": mask}]
    others = [{"input_ids": torch.where(mask.bool(), ids, (ids + 7) % 64), "attention_mask": mask}]
    made = [learned(tiny_llama(), data=data, bits=3, group_size=16) for data in (batches, others)]
    assert same(*made)


def test_it_is_deterministic_and_the_seed_counts():
    data = [IDS[n : n + 4] for n in range(0, 16, 4)]
    batches = [{"input_ids": each} for each in data]
    fields = {"bits": 3, "group_size": 16, "batch_size": 4}
    first, second, other = (learned(tiny_llama(), data=batches, **fields, seed=seed) for seed in (0, 0, 1))
    assert same(first, second)
    assert not same(first, other)


@pytest.mark.parametrize("inputs", ["quantized", "dense"])
def test_a_block_is_not_computed_only_to_see_its_inputs(inputs):
    """Without a step: once for the original outputs, once for the loss, and once for the outputs of the result."""
    model, calls = tiny_llama(), []
    model.model.layers[1].mlp.act_fn.register_forward_hook(lambda m, a, out: calls.append(out.device.type))
    learned(model, data=[{"input_ids": IDS[n : n + 4]} for n in range(0, 16, 4)], steps=0, inputs=inputs, group_size=16)
    assert calls.count("cpu") == 3 * 4
    assert "forward" not in model.model.layers[1].__dict__


def test_the_card_has_the_loss_of_every_block():
    sections = exported(learned(tiny_llama(), bits=3, group_size=16))
    (text,) = sections.paragraphs.values()
    assert "2 blocks was learned in 12 steps" in text
    (table,) = sections.tables.values()
    assert table[0] == ["block", "rounded to nearest", "learned"]
    assert [row[0] for row in table[1:]] == ["`model.layers.0`", "`model.layers.1`"]


def test_refusals_give_the_reason(tmp_path):
    with pytest.raises(ModelError, match=r"step 1 \(signround\).*driver: blockwise"):
        optimize(tiny_llama(), {"steps": [{"technique": "signround"}], "driver": "whole_model"}, calibration=IDS)
    with pytest.raises(ModelError, match=r"step 1 \(signround\).*Conv1D"):
        learned(tiny_gpt2())
    with pytest.raises(RecipeError, match=r"signround: signed_scales are those of integers without zero points"):
        learned(tiny_llama(), symmetric=False, signed_scales=True)
    with pytest.raises(RecipeError, match=r"signround: tune_norms needs optimizer: adam"):
        learned(tiny_llama(), tune_norms=True)
    with pytest.raises(ModelError, match=r"zero points"):
        learned(tiny_mixtral(), symmetric=False)
    model = tiny_llama()
    model.model.layers[1].input_layernorm.weight.data[0] = 3e38  # finite, but its products are not
    with pytest.raises(NumericalError, match=r"step 1 \(signround\): model\.layers\.1 gave NaN"):
        learned(model, bits=4, group_size=16)
    optimize(tiny_llama(), {"technique": "rtn", "bits": 4, "group_size": 16}).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=r"step 1 \(signround\).*floating-point weights"):
        learned(AutoModelForCausalLM.from_pretrained(tmp_path))


@pytest.mark.real_model
def test_it_beats_gptq_on_a_real_model(shared_models, shared_data):
    """babyllama-1m at 3 bits, on a small part of the evaluation text."""
    from hf_optim.evaluation.evaluate import perplexity

    home = shared_models / "babyllama-1m"
    calibration = windows(home, shared_data, "calibration", 32)
    held_out = windows(home, shared_data, "eval", 16)
    dense = AutoModelForCausalLM.from_pretrained(home, dtype=torch.float32).eval()
    steps = [
        {"technique": "gptq", "bits": 3, "group_size": 32},
        {"technique": "signround", "bits": 3, "group_size": 32, "steps": 60, "observer": "mse"},
    ]
    found = [
        perplexity(optimize(copy.deepcopy(dense), step, calibration=calibration), held_out)["perplexity"]
        for step in steps
    ]
    assert found[1] < found[0]
