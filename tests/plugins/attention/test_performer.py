"""FAVOR+ against sums over pairs of tokens written from the paper, and against softmax attention."""

from __future__ import annotations

import feature_oracle
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_bert, tiny_gpt2, tiny_llama, tiny_opt
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, DynamicCache

import hf_optim
from hf_optim import ModelError, RecipeError
from hf_optim.toolkit import compat
from hf_optim_plugins.attention import _linear_kernel, _linear_scan, _performer_attention
from hf_optim_plugins.attention._feature_draws import generator_for, orthogonal_features
from hf_optim_plugins.attention._performer_attention import performer_attention

IDS = torch.randint(3, 60, (2, 23), generator=torch.Generator().manual_seed(0))
DECODERS = [tiny_llama, tiny_gpt2, tiny_opt]


def performer(model, *more, **fields):
    return hf_optim.optimize(model, [{"technique": "performer", "features": 12, **fields}, *more])


def features_of(model):
    return [module.learned for module in model.modules() if hasattr(module, "is_causal")]


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def weights(features, width, heads=1, seed=0):
    return orthogonal_features(heads, features, width, generator_for(seed), "chi")


# -- the formula -----------------------------------------------------------------------------------------------------


@pytest.mark.many
@pytest.mark.parametrize("kernel", ["softmax", "relu"])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("build", [*DECODERS, tiny_bert])
def test_outputs_and_gradients_are_those_of_the_oracle(build, learned, kernel):
    model = performer(build().double(), kernel=kernel, learned=learned)
    own = [part.weight for part in features_of(model)]
    given = [weight.detach().clone().requires_grad_() for weight in own]

    def compute(module, query, key, value, scale):
        return feature_oracle.performer(query, key, value, given[module.layer_idx], scale, module.is_causal, kernel)

    extra = list(zip(own, given, strict=True)) if learned else []
    feature_oracle.assert_same_outputs_and_gradients(model, build().double(), compute, IDS, extra)


def test_the_constants_of_the_published_code_in_an_encoder():
    model = performer(tiny_bert().double(), kernel="softmax_authors")
    given = [part.weight for part in features_of(model)]

    def compute(module, query, key, value, scale):
        return feature_oracle.performer(query, key, value, given[module.layer_idx], scale, False, "softmax_authors")

    feature_oracle.assert_same_outputs_and_gradients(model, tiny_bert().double(), compute, IDS)


@pytest.mark.parametrize("kernel", ["softmax", "relu"])
@pytest.mark.parametrize(("chunk", "piece"), [(4, 4096), (4, 12), (128, 10)])
def test_chunks_and_pieces_change_nothing(kernel, chunk, piece, monkeypatch):
    q, k, v = drawn(2, 6, 29, 8), drawn(2, 3, 29, 8, seed=1), drawn(2, 3, 29, 5, seed=2)
    q, k, v = (part.double().requires_grad_() for part in (q, k, v))
    w = weights(20, 8, 3)
    valid = torch.arange(29) < torch.tensor([[29], [11]])
    monkeypatch.setattr(_linear_scan, "CHUNK", chunk)
    monkeypatch.setattr(_performer_attention, "PIECE", piece)
    found, _ = performer_attention(q, k, v, w, 0.4, True, kernel, valid)
    expected = feature_oracle.performer(q, k, v, w, 0.4, True, kernel) * valid[:, None, :, None]
    torch.testing.assert_close(found, expected)
    slope = drawn(*found.shape, seed=5).double()
    own, other = (torch.autograd.grad((out * slope).sum(), (q, k, v)) for out in (found, expected))
    for one, two in zip(own, other, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("causal", [True, False])
def test_the_error_against_softmax_attention_falls_as_one_over_the_root_of_the_features(causal):
    counts, errors = (16, 64, 256, 1024), []
    q, k, v = (0.35 * drawn(1, 1, 48, 16, seed=seed, dtype=torch.float64) for seed in range(3))
    exact = scaled_dot_product_attention(q, k, v, is_causal=causal)
    for count in counts:
        draws = [weights(count, 16, seed=seed) for seed in range(40)]
        found = torch.stack([performer_attention(q, k, v, draw, 0.25, causal)[0] for draw in draws])
        errors.append((found - exact).square().mean().sqrt())
    x, y = torch.tensor(counts).double().log(), torch.stack(errors).log()
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    assert -0.56 < slope < -0.44
    assert errors[-1] < 0.06 * exact.std()


def test_orthogonal_features_have_less_error_than_independent_ones():
    q, k, v = (0.7 * drawn(1, 1, 32, 16, seed=seed, dtype=torch.float64) for seed in range(3))
    exact = scaled_dot_product_attention(q, k, v)

    def error(draw):
        each = [
            (performer_attention(q, k, v, draw(seed), 0.25, False)[0] - exact).square().mean() for seed in range(60)
        ]
        return torch.stack(each).mean()

    independent = error(lambda seed: drawn(1, 16, 16, seed=seed, dtype=torch.float64))
    assert error(lambda seed: weights(16, 16, seed=seed)) < 0.9 * independent


def test_rows_of_w_are_orthogonal_in_blocks_and_of_the_norms_that_were_asked():
    w = orthogonal_features(2, 20, 8, generator_for(3), "fixed")
    assert w.shape == (2, 20, 8)
    gram = w @ w.mT
    for begin in (0, 8, 16):
        block = gram[:, begin : begin + 8, begin : begin + 8]
        torch.testing.assert_close(block, 8 * torch.eye(block.shape[-1], dtype=w.dtype).expand_as(block))
    norms = orthogonal_features(1, 4096, 8, generator_for(3), "chi").norm(dim=-1)
    assert abs(float(norms.square().mean()) - 8) < 0.3
    assert abs(float(norms.std()) - 0.6967) < 0.05  # of chi with 8 degrees of freedom
    rows = orthogonal_features(1, 4096, 8, generator_for(4), "chi")[0]
    assert float(rows.mean(0).abs().max()) < 0.06  # no direction is preferred


# -- stability and order ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["softmax", "relu"])
def test_steps_and_segments_are_the_parallel_form(kernel):
    q, k, v = drawn(2, 4, 300, 16), 2 * drawn(2, 2, 300, 16, seed=1), drawn(2, 2, 300, 16, seed=2)
    w = weights(32, 16, 2).float()
    whole, last = performer_attention(q, k, v, w, 0.25, True, kernel)
    state, parts = None, []
    for begin, end in [(0, 150), *((i, i + 1) for i in range(150, 170)), (170, 300)]:
        cut = [part[:, :, begin:end] for part in (q, k, v)]
        out, state = performer_attention(*cut, w, 0.25, True, kernel, None, state)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-5, atol=1e-5)
    for one, two in zip(state, last, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5 * float(two.abs().max()))


def test_nothing_comes_from_the_future_not_even_a_rounding(monkeypatch):
    monkeypatch.setattr(_linear_scan, "CHUNK", 8)
    q, k, v, w = drawn(1, 2, 30, 8), drawn(1, 2, 30, 8, seed=1), drawn(1, 2, 30, 8, seed=2), weights(20, 8, 2).float()
    before, _ = performer_attention(q, k, v, w, 0.35, True)
    for place in (1, 7, 8, 20, 29):
        for factor in (0.0, 40.0):  # a key whose features are far above all earlier ones
            other = [part.clone() for part in (q, k, v)]
            for part in other:
                part[:, :, place] = factor * part[:, :, place] + 1
            after, _ = performer_attention(*other, w, 0.35, True)
            assert torch.equal(after[:, :, :place], before[:, :, :place])
            assert not torch.equal(after[:, :, place], before[:, :, place])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("causal", [True, False])
def test_features_that_overflow_any_dtype_are_computed(causal, dtype):
    q, k = 6 * drawn(1, 2, 40, 8), 6 * drawn(1, 2, 40, 8, seed=1)  # exponents of more than 100
    k = k * torch.linspace(0.2, 1.5, 40)[:, None]
    v, w = drawn(1, 2, 40, 8, seed=2), weights(24, 8, 2)
    q, k, v = (part.to(dtype).requires_grad_() for part in (q, k, v))
    found, state = performer_attention(q, k, v, w, 1.0, causal)
    expected, _ = performer_attention(q.double(), k.double(), v.double(), w, 1.0, causal)
    assert found.dtype == dtype
    assert state is None or state.state.dtype == torch.float32
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 1e-3}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    assert all(part.isfinite().all() for part in torch.autograd.grad(found.float().square().sum(), (q, k, v)))


def test_queries_beyond_the_range_of_float32_are_not_given_zeros_in_silence():
    q, k = (40 * drawn(1, 1, 60, 64, seed=seed) for seed in (1, 2))
    found, _ = performer_attention(q, k, drawn(1, 1, 60, 64), weights(64, 64).float(), 0.125, True)
    exact, _ = performer_attention(q.double(), k.double(), drawn(1, 1, 60, 64), weights(64, 64), 0.125, True)
    lost = found.isnan().any(-1)
    assert lost.any()
    assert not exact.isnan().any()
    assert found[~lost].any(-1).all()


@pytest.mark.parametrize("causal", [True, False])
def test_padding_is_not_seen_and_rows_without_tokens_are_zero(causal):
    parts = [drawn(3, 2, 11, 8, seed=seed).requires_grad_() for seed in range(3)]
    w, lengths = weights(20, 8, 2).float(), (11, 4, 0)
    valid = torch.arange(11) < torch.tensor(lengths)[:, None]
    found, _ = performer_attention(*parts, w, 0.35, causal, "softmax", valid)
    for row, length in enumerate(lengths):
        assert not found[row, :, length:].any()
        alone = [part[row : row + 1, :, :length] for part in parts]
        if length:
            expected, _ = performer_attention(*alone, w, 0.35, causal)
            torch.testing.assert_close(found[row : row + 1, :, :length], expected, rtol=1e-5, atol=1e-6)
    grads = torch.autograd.grad(found.square().sum(), parts)
    assert all(grad.isfinite().all() and not grad[2].any() and not grad[1, :, 4:].any() for grad in grads)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [True, False])
def test_an_installed_kernel_computes_the_same_and_continues_the_same_state(causal, padded, monkeypatch):
    pytest.importorskip("hf_optim_kernels.linear_attention.op", reason="the kernel is not installed")
    parts = [drawn(2, heads, 30, 8, seed=heads).requires_grad_() for heads in (4, 2, 2)]
    w, valid = weights(20, 8, 2).float(), torch.arange(30) < torch.tensor([[30], [13]]) if padded else None
    given = (w, 0.35, causal, "softmax", valid)
    plain, before = performer_attention(*parts, *given)
    monkeypatch.setattr(_linear_kernel, "LINEAR_KERNEL_DEVICES", ("cpu",))
    kernel = _linear_kernel._linear_kernel()
    calls = []
    for name in ("linear_attention", "step"):
        original = getattr(kernel, name)
        count = lambda *args, name=name, original=original: calls.append(name) or original(*args)  # noqa: E731
        monkeypatch.setattr(kernel, name, count)
    found, _ = performer_attention(*parts, *given, keeps=False)
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)
    own, other = (torch.autograd.grad(out.square().sum(), parts) for out in (found, plain))
    torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)
    performer_attention(*parts, w.clone().requires_grad_(), 0.35, causal)  # the kernel has no gradient of W
    assert calls == ["linear_attention"]
    if causal:
        _, carried = performer_attention(*parts, *given)  # nor has it one of the state
        assert carried.state.requires_grad
        assert calls == ["linear_attention"]
        with torch.no_grad():
            _, after = performer_attention(*parts, *given)
        calls.pop()
        one = [part[:, :, :1].detach() for part in parts]
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            by_kernel, _ = performer_attention(*one, w, 0.35, True, state=after)
            monkeypatch.setattr(_linear_kernel, "LINEAR_KERNEL_DEVICES", ())
            expected, _ = performer_attention(*one, w, 0.35, True, state=before)
        torch.testing.assert_close(by_kernel, expected, rtol=1e-5, atol=1e-5)
        assert calls == ["linear_attention", "step"]


# -- in models -------------------------------------------------------------------------------------------------------


@pytest.mark.many
@pytest.mark.parametrize("build", DECODERS)
def test_decoding_with_sums_is_the_forward_of_the_whole_row(build):
    model = performer(build(), kernel="softmax").eval()
    mask = torch.ones_like(IDS)
    mask[1, :6] = 0
    places = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        whole = model(IDS, attention_mask=mask, position_ids=places, use_cache=False).logits
        cache, parts = DynamicCache(config=model.config), []
        for begin, end in [(0, 9), *((i, i + 1) for i in range(9, 23))]:
            out = model(
                IDS[:, begin:end], attention_mask=mask[:, :end], position_ids=places[:, begin:end],
                **{compat.CACHE: cache},
            )  # fmt: skip
            parts.append(out.logits)
        sizes = {layer.nbytes() for layer in cache.layers}
        beams = model.generate(IDS, attention_mask=mask, max_new_tokens=4, num_beams=3)
    kept = mask.bool()
    torch.testing.assert_close(torch.cat(parts, 1)[kept], whole[kept], rtol=1e-5, atol=1e-5)
    key_heads, width = model.config.attention_pattern["key_heads"], 8
    assert sizes == {2 * key_heads * (12 * (width + 1) * 4 + 4)}  # whatever was read
    assert beams.shape[1] > 23


def test_one_seed_makes_one_model_and_layers_differ():
    first, same, other = (performer(tiny_llama(), seed=seed) for seed in (1, 1, 2))
    for one, two, three in zip(*(features_of(model) for model in (first, same, other)), strict=True):
        assert torch.equal(one.weight, two.weight)
        assert not torch.equal(one.weight, three.weight)
    assert not torch.equal(features_of(first)[0].weight, features_of(first)[1].weight)


def test_features_are_drawn_again_in_training_alone_and_from_the_saved_state(tmp_path):
    model = performer(tiny_llama(), redraw=2)
    first = features_of(model)[0].weight.clone()

    def train(model, forwards):
        seen = []
        for _ in range(forwards):
            model.train()(IDS, labels=IDS).loss.backward()
            seen.append(features_of(model)[0].weight.clone())
            with torch.no_grad():
                model.eval()(IDS)
                model.train()(IDS)  # no gradients are recorded: an evaluation
        return seen

    seen = train(model, 3)
    assert torch.equal(seen[0], first)
    assert torch.equal(seen[1], first)
    assert not torch.equal(seen[2], first)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    again, straight = train(loaded, 3), train(performer(tiny_llama(), redraw=2), 6)
    assert torch.equal(again[0], seen[2])
    assert all(torch.equal(one, two) for one, two in zip([*seen, *again], straight, strict=True))


def test_features_of_a_checkpoint_stay_where_it_does_not_say_which_draw_they_are(tmp_path):
    model = performer(tiny_llama(), redraw=1).train()
    for _ in range(3):
        model(IDS, use_cache=False)
    model.eval().save_pretrained(tmp_path)
    kept = {name: part for name, part in load_file(tmp_path / "model.safetensors").items() if "draws" not in name}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_gradient_checkpointing_computes_with_the_features_of_its_forward():
    gradients = []
    for checkpointing in (False, True):
        model = performer(tiny_llama(), redraw=1).train()
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
        for _ in range(2):
            model(IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)


# -- distillation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [tiny_llama, tiny_bert])
def test_distillation_brings_outputs_near_those_of_the_dense_model(build, tmp_path):
    batches = [{"input_ids": IDS}]
    step = {"technique": "performer", "features": 16, "learned": True, "distill_steps": 30, "distill_rate": 1e-2}
    model = hf_optim.optimize(build(), [step], calibration=batches).eval()
    dense, plain = build().eval(), performer(build(), features=16).eval()
    with torch.no_grad():
        full = dense(IDS).logits
        far, near = ((each(IDS).logits - full).square().mean() for each in (plain, model))
    assert near < 0.5 * far
    record = hf_optim.run_of(model).record.steps["0"]["distillation"]
    assert record["after"] < 0.2 * record["before"]
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert f"from {record['before']:.1%} to {record['after']:.1%} of the squared outputs" in card


def test_distillation_needs_data_and_logits_are_distilled_after_it(tmp_path):
    from transformers import Trainer, TrainingArguments

    steps = [{"technique": "performer", "features": 12, "distill_steps": 3}, {"technique": "logit_kd", "alpha": 1.0}]
    with pytest.raises(hf_optim.OptimError, match="calibration"):
        hf_optim.optimize(tiny_llama(), steps[:1])
    model = hf_optim.optimize(tiny_llama(), steps, calibration=[{"input_ids": IDS}])
    data = [{"input_ids": row, "labels": row} for row in IDS]
    settings = TrainingArguments(tmp_path, max_steps=8, report_to=[], use_cpu=True, learning_rate=3e-3, logging_steps=1)
    trainer = hf_optim.OptimTrainer(model=model, args=settings, train_dataset=data)
    assert isinstance(trainer, Trainer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    trainer.model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, trainer.model.eval()(IDS).logits)


def test_dropout_of_attention_weights_is_told_not_to_happen(caplog):
    model = tiny_llama()
    model.config.attention_dropout = 0.25
    performer(model)
    assert "attention weights are not formed: in training, none are dropped (0.25 in the dense model)" in caplog.text
    caplog.clear()
    performer(tiny_llama())
    assert "dropped" not in caplog.text


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"features": 0}, "features"),
        ({"learned": True, "redraw": 5}, "not both"),
        ({"distill_trains": "learned"}, "needs learned: true"),
        ({"kernel": "gauss"}, "kernel"),
    ],
)
def test_fields_that_mean_nothing_are_refused(fields, message):
    with pytest.raises(RecipeError, match=message):
        performer(tiny_llama(), **fields)


def test_one_maximum_over_all_keys_is_not_for_causal_models():
    with pytest.raises(ModelError, match="is causal: the published code takes one maximum over all keys"):
        performer(tiny_llama(), kernel="softmax_authors")


def test_settings_of_a_checkpoint_are_checked():
    model = performer(tiny_llama())
    good = model.config.attention_pattern
    for changed, message in [
        ({"features": -1}, "features=-1"),
        ({"kernel": "x" * 99}, "kernel="),
        ({"learned": 1}, "learned="),
        ({"redraw": 2, "learned": True}, "choose one"),
        ({"more": 1}, "does not know"),
    ]:
        model.config.attention_pattern = {**good, **changed}
        with pytest.raises(ValueError, match=message):
            type(model)(model.config)
