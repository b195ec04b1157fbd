"""AWQ: exact before quantization, the search against a search over outputs, and its effect after it."""

from __future__ import annotations

import copy

import pytest
import torch
from real_stories import windows
from tiny_models import TINY, tiny_bert, tiny_llama, tiny_mixtral
from transformers import AutoModelForCausalLM

from hf_optim import OptimConfig, RecipeError, Scope, optimize
from hf_optim.lifecycle.stages import start_run
from hf_optim.toolkit import topology
from hf_optim.toolkit.quantization import GridSpec
from hf_optim.toolkit.topology.linear_layers import weight_out_in
from hf_optim_plugins.quantization.awq import AWQ, POINTS, SHARES, channel_scale, clipped, output_loss, rounded

IDS = torch.randint(3, 60, (6, 20), generator=torch.Generator().manual_seed(0))


def inputs_of(model):
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, value in topology.dummy_inputs(model).items():
        shape = (4, *value.shape[1:])
        drawn = torch.randn(shape, generator=generator).to(value) if value.is_floating_point() else None
        made[name] = torch.randint(3, 60, shape, generator=generator) if drawn is None else drawn
    return made


def scaled_(model, inputs, **fields):
    """Call the hook over the whole model, and return the run with its record."""
    recipe = OptimConfig.parse([AWQ(**{"bits": 3, "group_size": 16, **fields})])
    run = start_run(recipe, model.config)
    run.model = model
    steps = recipe.steps[0].calibrate(run, Scope("", model, model))
    with torch.no_grad():
        for _ in steps:
            model(**inputs)
    return run


@pytest.mark.many(every=4)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt", "vit", "t5", "bert"])
def test_scales_leave_the_outputs_as_they_are(family):
    model = TINY[family]().double()
    inputs = inputs_of(model)
    with torch.no_grad():
        before, start = model(**inputs).logits, copy.deepcopy(model.state_dict())
        run = scaled_(model, inputs, clip=False)
        touched, _ = run.covered(run.recipe.steps[0])
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, start[name])}
        assert {f"{name}.weight" for name in touched} & changed
        torch.testing.assert_close(model(**inputs).logits, before, rtol=0, atol=1e-10)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_scale_is_the_papers_and_the_error_is_that_of_the_outputs():
    generator = torch.Generator().manual_seed(1)
    weight, rows = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((12, 32), (50, 32)))
    rows[:, 3] *= 30
    spec = GridSpec(3, strategy="group", group_size=16)
    means = rows.abs().mean(0)
    scale = means**0.35
    scale = scale / (scale.max() * scale.min()).sqrt()
    torch.testing.assert_close(channel_scale(means, 0.35), scale)
    wide = (weight * scale).view(12, 2, 16)
    step = wide.abs().amax(-1, keepdim=True) / 3.5
    coded = ((wide / step).round().clamp(-4, 3) * step).view(12, 32)
    expected = float(((rows / scale) @ coded.T - rows @ weight.T).square().sum())
    assert output_loss(weight, rows.T @ rows, scale, spec) == pytest.approx(expected, rel=1e-9)
    assert bool((channel_scale(torch.tensor([0.0, 2.0, 3.0]), 0.5) > 0).all())


def test_the_exponent_is_the_best_of_all():
    """The scale of a norm is what its gain was divided by; of all exponents it has the smallest error."""
    model, start = tiny_llama().double(), tiny_llama().double()
    norm = model.model.layers[0].input_layernorm
    with torch.no_grad():
        start.model.layers[0].input_layernorm.weight[5] *= 40
        model.load_state_dict(start.state_dict())
    seen = []
    start.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda m, a: seen.append(a[0].flatten(0, 1)))
    start(IDS)
    rows = seen[0].detach()
    scaled_(model, {"input_ids": IDS}, clip=False, pairs=False)
    scale = (start.model.layers[0].input_layernorm.weight / norm.weight).detach()
    spec = GridSpec(3, strategy="group", group_size=16)
    weights = [getattr(start.model.layers[0].self_attn, f"{n}_proj").weight.detach() for n in "qkv"]

    def error(s):
        return sum(float(((rows / s) @ rounded(w * s, spec).T - rows @ w.T).square().sum()) for w in weights)

    candidates = [channel_scale(rows.abs().mean(0), number / POINTS) for number in range(POINTS)]
    errors = [error(candidate) for candidate in candidates]
    chosen = [number for number, each in enumerate(candidates) if torch.allclose(each, scale, rtol=1e-9)]
    assert chosen == [errors.index(min(errors))]
    assert min(errors) < 0.8 * errors[0]


def test_clipping_keeps_for_each_group_the_range_with_the_smallest_error():
    generator = torch.Generator().manual_seed(2)
    weight, rows = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((5, 32), (80, 32)))
    weight[:, 3] *= 3
    for spec in (
        GridSpec(2, strategy="group", group_size=8, symmetric=False),
        GridSpec(3, strategy="channel"),
    ):
        found = clipped(weight, rows.T @ rows, spec)
        size = spec.group_size or 32
        assert not torch.equal(found, weight)
        for row in range(5):
            for first in range(0, 32, size):
                part, own = weight[row, first : first + size], rows[:, first : first + size]
                errors = {}
                for share in SHARES:
                    low, high = part.min() * share, part.max() * share
                    if spec.symmetric:
                        high = torch.maximum(high, -low)
                        low = -high
                    kept = part.clamp(low, high)
                    made = rounded(kept[None], GridSpec(spec.bits, symmetric=spec.symmetric))[0]
                    errors[share] = (float((own @ (made - part)).square().sum()), kept)
                best = min(errors.values(), key=lambda pair: pair[0])
                mine = rounded(found[row, first : first + size][None], GridSpec(spec.bits, symmetric=spec.symmetric))[0]
                assert float((own @ (mine - part)).square().sum()) <= best[0] * 1.02


def test_what_it_cannot_scale_has_the_reason():
    model = tiny_bert()
    run = scaled_(model, inputs_of(model), clip=False)
    _, skipped = run.covered(run.recipe.steps[0])
    assert any("the norm that feeds it also feeds something" in reason for reason in skipped)
    model = tiny_mixtral()
    run = scaled_(model, inputs_of(model), clip=False)
    assert run.record.steps["0"]["norms"] == 2


def test_zeros_stay_zero():
    model = optimize(
        tiny_llama(),
        [
            {"technique": "nm"},
            {"technique": "awq", "bits": 4, "group_size": 16},
            {"technique": "rtn", "group_size": 16},
        ],
        calibration=IDS,
    )
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            groups = weight_out_in(module).detach().unflatten(-1, (-1, 4))
            assert int((groups != 0).sum(-1).max()) <= 2


def test_it_must_be_followed_by_a_quantizer():
    with pytest.raises(RecipeError, match="must be followed by a quantization step"):
        optimize(tiny_llama(), {"technique": "awq"}, calibration=IDS)


@pytest.mark.real_model
def test_it_helps_rounding_on_a_real_model(shared_models, shared_data):
    """babyllama-1m at 3 bits, on a small part of the evaluation text."""
    from hf_optim.evaluation.evaluate import perplexity

    home = shared_models / "babyllama-1m"
    calibration = windows(home, shared_data, "calibration", 16)
    held_out = windows(home, shared_data, "eval", 16)
    dense = AutoModelForCausalLM.from_pretrained(home, dtype=torch.float32).eval()
    rtn = {"technique": "rtn", "bits": 3, "group_size": 32}
    recipes = [[rtn], [{"technique": "awq", "bits": 3, "group_size": 32}, rtn]]
    found = [
        perplexity(optimize(copy.deepcopy(dense), steps, calibration=calibration), held_out)["perplexity"]
        for steps in recipes
    ]
    assert found[1] < 0.95 * found[0]
