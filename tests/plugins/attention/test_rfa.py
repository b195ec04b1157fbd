"""Random feature attention against sums over pairs of tokens written from the paper, and against softmax attention."""

from __future__ import annotations

import feature_oracle
import pytest
import torch
from tiny_models import tiny_bert, tiny_gpt2, tiny_llama, tiny_opt
from torch.nn.functional import normalize, scaled_dot_product_attention
from transformers import AutoModelForCausalLM, DynamicCache

import hf_optim
from hf_optim import ModelError, RecipeError
from hf_optim.toolkit import compat
from hf_optim_plugins.attention import _linear_kernel, _linear_scan, _rfa_attention
from hf_optim_plugins.attention._rfa_attention import rfa_attention

IDS = torch.randint(3, 60, (2, 23), generator=torch.Generator().manual_seed(0))
ONES = torch.ones(1, 1)
DECODERS = [tiny_llama, tiny_gpt2, tiny_opt]


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def rfa(model, *more, **fields):
    """Return the model with random feature attention whose sigma and gate have been trained a little."""
    model = hf_optim.optimize(model, [{"technique": "rfa", "features": 6, **fields}, *more])
    with torch.no_grad():
        for seed, part in enumerate(features_of(model)):
            for parameter in part.parameters():
                parameter += 0.5 * drawn(*parameter.shape, seed=seed).to(parameter)
    return model


def features_of(model):
    return [module.learned for module in model.modules() if hasattr(module, "is_causal")]


# -- the formula -----------------------------------------------------------------------------------------------------


@pytest.mark.many
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("build", [*DECODERS, tiny_bert])
def test_outputs_and_gradients_are_those_of_the_oracle(build, gate):
    if gate and build is tiny_bert:
        with pytest.raises(ModelError, match="is not causal: the gate forgets earlier tokens"):
            rfa(build(), gate=True)
        return
    model = rfa(build().double(), gate=gate, tau=0.8)
    own = [list(part.parameters()) for part in features_of(model)]
    given = [[p.detach().clone().requires_grad_() for p in each] for each in own]

    def compute(module, query, key, value, scale):
        part, layer = features_of(model)[module.layer_idx], given[module.layer_idx]
        weight = part.pool[: len(layer[0])] * layer[0][:, None] / 0.8
        g = None
        if gate:
            g = torch.sigmoid((value * layer[1][:, None]).sum(-1) + layer[2][:, None])
        return feature_oracle.rfa(query, key, value, weight, module.is_causal, 0.01, g)

    extra = [pair for one, two in zip(own, given, strict=True) for pair in zip(one, two, strict=True)]
    assert len(extra) == (6 if gate else 2)
    feature_oracle.assert_same_outputs_and_gradients(model, build().double(), compute, IDS, extra)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("chunk", "piece"), [(4, 4096), (4, 12), (128, 10)])
def test_chunks_and_pieces_change_nothing(gated, chunk, piece, monkeypatch):
    q, k, v = drawn(2, 6, 29, 8), drawn(2, 3, 29, 8, seed=1), drawn(2, 3, 29, 5, seed=2)
    gate = drawn(2, 3, 29, seed=4).double().sigmoid().log().requires_grad_()
    q, k, v = (part.double().requires_grad_() for part in (q, k, v))
    w = 2 * drawn(3, 5, 8, seed=3).double()
    valid = torch.arange(29) < torch.tensor([[29], [11]])
    monkeypatch.setattr(_linear_scan, "CHUNK", chunk)
    monkeypatch.setattr(_rfa_attention, "PIECE", piece)
    found, _ = rfa_attention(q, k, v, w, ONES, True, 0.05, gate if gated else None, valid)
    expected = feature_oracle.rfa(q, k, v, w, True, 0.05, gate.exp() if gated else None) * valid[:, None, :, None]
    torch.testing.assert_close(found, expected)
    slope = drawn(*found.shape, seed=5).double()
    of = (q, k, v, gate) if gated else (q, k, v)
    own, other = (torch.autograd.grad((out * slope).sum(), of) for out in (found, expected))
    for one, two in zip(own, other, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("causal", [True, False])
def test_the_error_against_softmax_attention_of_unit_vectors_falls_as_one_over_the_root_of_the_features(causal):
    counts, errors = (16, 64, 256, 1024), []
    q, k, v = (drawn(1, 1, 48, 16, seed=seed, dtype=torch.float64) for seed in range(3))
    q, k = 1e3 * normalize(q, dim=-1), 1e3 * normalize(k, dim=-1)  # beside which 0.001 is nothing
    exact = scaled_dot_product_attention(q / 1e3, k / 1e3, v, is_causal=causal, scale=0.25)
    for count in counts:
        draws = [drawn(1, count, 16, seed=seed, dtype=torch.float64) for seed in range(40)]
        found = torch.stack([rfa_attention(q, k, v, draw, ONES / 2, causal, 0.01)[0] for draw in draws])
        errors.append((found - exact).square().mean().sqrt())
    x, y = torch.tensor(counts).double().log(), torch.stack(errors).log()
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    assert -0.56 < slope < -0.44
    assert errors[-1] < 0.06 * exact.std()


# -- stability and order ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True])
def test_steps_and_segments_are_the_parallel_form_on_one_denominator(gated):
    q, k, v = drawn(2, 4, 300, 16), drawn(2, 2, 300, 16, seed=1), drawn(2, 2, 300, 16, seed=2)
    gate = (3 + drawn(2, 2, 300, seed=4)).sigmoid().log() if gated else None
    w = 2.5 * drawn(2, 12, 16, seed=3)  # few features of sharp attention: denominators fall below the floor
    whole, last = rfa_attention(q, k, v, w, ONES, True, 0.05, gate)
    exact, _ = rfa_attention(q, k, v, w, ONES, True, 1e-9, gate)
    assert not torch.allclose(whole, exact, rtol=1e-2, atol=1e-2)  # the floor is reached
    state, parts = None, []
    for begin, end in [(0, 150), *((i, i + 1) for i in range(150, 170)), (170, 300)]:
        cut = [part[:, :, begin:end] for part in (q, k, v)]
        own = None if gate is None else gate[:, :, begin:end]
        out, state = rfa_attention(*cut, w, ONES, True, 0.05, own, None, state)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-5, atol=1e-5)
    for one, two in zip(state, last, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_nothing_comes_from_the_future_not_even_a_rounding(monkeypatch):
    monkeypatch.setattr(_linear_scan, "CHUNK", 8)
    parts = drawn(1, 2, 30, 8), drawn(1, 2, 30, 8, seed=1), drawn(1, 2, 30, 8, seed=2)
    gate, w = drawn(1, 2, 30, seed=3).sigmoid().log(), drawn(2, 5, 8, seed=4)
    for own in (None, gate):
        before, _ = rfa_attention(*parts, w, ONES, True, 0.01, own)
        for place in (1, 7, 8, 20, 29):
            other = [part.clone() for part in parts]
            for part in other:
                part[:, :, place] += 3
            changed = None if own is None else own.clone()
            if changed is not None:
                changed[:, :, place] -= 1
            after, _ = rfa_attention(*other, w, ONES, True, 0.01, changed)
            assert torch.equal(after[:, :, :place], before[:, :, :place])
            assert not torch.equal(after[:, :, place], before[:, :, place])


def test_a_gate_forgets_and_one_that_is_open_does_not():
    q, k, v = (drawn(1, 1, 40, 8, seed=seed).double() for seed in range(3))
    w = drawn(1, 64, 8, seed=3).double()
    full, _ = rfa_attention(q, k, v, w, ONES, True, 1e-9)
    never = torch.full((1, 1, 40), -1e-12, dtype=torch.float64)
    torch.testing.assert_close(rfa_attention(q, k, v, w, ONES, True, 1e-9, never)[0], full, rtol=1e-6, atol=1e-8)
    at_once = torch.full((1, 1, 40), -60.0, dtype=torch.float64)
    torch.testing.assert_close(rfa_attention(q, k, v, w, ONES, True, 1e-9, at_once)[0], v, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("causal", [True, False])
def test_padding_is_not_seen_and_rows_without_tokens_are_zero(causal):
    parts = [drawn(3, 2, 11, 8, seed=seed).requires_grad_() for seed in range(3)]
    w, lengths = drawn(2, 5, 8, seed=4), (11, 4, 0)
    valid = torch.arange(11) < torch.tensor(lengths)[:, None]
    found, _ = rfa_attention(*parts, w, ONES, causal, 0.01, None, valid)
    for row, length in enumerate(lengths):
        assert not found[row, :, length:].any()
        if length:
            alone = [part[row : row + 1, :, :length] for part in parts]
            expected, _ = rfa_attention(*alone, w, ONES, causal, 0.01)
            torch.testing.assert_close(found[row : row + 1, :, :length], expected, rtol=1e-4, atol=1e-5)
    grads = torch.autograd.grad(found.square().sum(), parts)
    assert all(grad.isfinite().all() and not grad[2].any() and not grad[1, :, 4:].any() for grad in grads)


def test_vectors_of_zeros_have_finite_gradients_and_half_precision_sums_in_single():
    q, k, v = (torch.zeros(1, 2, 5, 8, dtype=torch.float16, requires_grad=True) for _ in range(3))
    found, state = rfa_attention(q, k, v, drawn(2, 5, 8), ONES, True, 0.01)
    assert found.dtype == torch.float16
    assert state.sums.dtype == torch.float32
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(found.float().sum(), (q, k, v)))


@pytest.mark.parametrize(
    ("causal", "gated", "padded"), [(True, True, True), (True, False, False), (False, False, True)]
)
def test_an_installed_kernel_computes_the_same_and_continues_the_same_state(causal, gated, padded, monkeypatch):
    pytest.importorskip("hf_optim_kernels.linear_attention.op", reason="the kernel is not installed")
    parts = [drawn(2, heads, 30, 8, seed=heads).requires_grad_() for heads in (4, 2, 2)]
    scale = (1 + drawn(2, 8, seed=7).square()).requires_grad_()
    gate = drawn(2, 2, 30, seed=8).sigmoid().log().requires_grad_() if gated else None
    w, valid = drawn(2, 20, 8, seed=9), torch.arange(30) < torch.tensor([[30], [13]]) if padded else None
    given = (w, scale, causal, 0.05, gate, valid)
    plain, before = rfa_attention(*parts, *given)
    monkeypatch.setattr(_linear_kernel, "LINEAR_KERNEL_DEVICES", ("cpu",))
    kernel, calls = _linear_kernel._linear_kernel(), []
    for name in ("linear_attention", "step"):
        original = getattr(kernel, name)
        count = lambda *args, name=name, original=original: calls.append(name) or original(*args)  # noqa: E731
        monkeypatch.setattr(kernel, name, count)
    found, _ = rfa_attention(*parts, *given, keeps=False)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)
    of = [*parts, scale, *([gate] if gated else [])]
    own, other = (torch.autograd.grad(out.square().sum(), of) for out in (found, plain))
    torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-3)
    assert calls == ["linear_attention"]
    if causal:
        _, carried = rfa_attention(*parts, *given)  # the kernel has no gradient of a state
        assert carried.sums.requires_grad
        assert calls == ["linear_attention"]
        with torch.no_grad():
            _, after = rfa_attention(*parts, *given)
        calls.pop()
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-4)
        with torch.no_grad():
            one = [part[:, :, :1].detach() for part in parts]
            step = (w, scale, True, 0.05, gate[:, :, :1] if gated else None, None)
            by_kernel, after = rfa_attention(*one, *step, after)
            monkeypatch.setattr(_linear_kernel, "LINEAR_KERNEL_DEVICES", ())
            expected, before = rfa_attention(*one, *step, before)
        torch.testing.assert_close(by_kernel, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
        assert calls == ["linear_attention", "step"]


# -- in models -------------------------------------------------------------------------------------------------------


@pytest.mark.many
@pytest.mark.parametrize(("build", "gate"), [(tiny_llama, True), (tiny_gpt2, False), (tiny_opt, True)])
def test_decoding_with_sums_is_the_forward_of_the_whole_row(build, gate):
    model = rfa(build().double(), gate=gate).eval()
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
    torch.testing.assert_close(torch.cat(parts, 1)[kept], whole[kept], rtol=1e-10, atol=1e-11)
    assert sizes == {2 * model.config.attention_pattern["key_heads"] * (2 * 6 * 9 * 8 + 8)}  # whatever was read
    assert beams.shape[1] > 23


def test_training_chooses_among_stored_draws_and_evaluation_has_the_first(tmp_path):
    model = rfa(tiny_llama(), draws=50)
    part = features_of(model)[0]
    assert part.pool.shape == (50, 6, 8)

    def train(model, forwards):
        used = []
        for _ in range(forwards):
            model.train()(IDS, labels=IDS).loss.backward()
            used.append(features_of(model)[0].used.tolist())
        return used

    with torch.no_grad():
        first = model.eval()(IDS).logits
    used = train(model, 4)
    assert used[0] == [0, 1]
    assert len({tuple(each) for each in used}) == 4
    with torch.no_grad():
        assert torch.equal(model.eval()(IDS).logits, first)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert used + train(loaded, 3) == train(rfa(tiny_llama(), draws=50), 7)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(IDS).logits, first)


def test_one_seed_makes_one_model_and_layers_differ():
    first, same, other = (features_of(rfa(tiny_llama(), seed=seed)) for seed in (1, 1, 2))
    for one, two, three in zip(first, same, other, strict=True):
        assert torch.equal(one.pool, two.pool)
        assert not torch.equal(one.pool, three.pool)
    assert not torch.equal(first[0].pool, first[1].pool)


@pytest.mark.parametrize("trains", ["all", "learned"])
def test_distillation_brings_outputs_near_those_of_the_dense_model(trains):
    step = {"technique": "rfa", "features": 32, "distill_steps": 30, "distill_rate": 1e-2, "distill_trains": trains}
    before = tiny_llama().state_dict()
    model = hf_optim.optimize(tiny_llama(), [{**step, "gate": True}], calibration=[{"input_ids": IDS}])
    record = hf_optim.run_of(model).record.steps["0"]["distillation"]
    assert record["after"] < (0.5 if trains == "all" else 0.98) * record["before"]
    same = all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if name in before)
    assert same == (trains == "learned")
    assert not any(torch.equal(part.sigma, torch.ones_like(part.sigma)) for part in features_of(model))


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"features": 0}, "features"), ({"tau": 0.0}, "tau"), ({"floor": -1.0}, "floor"), ({"tau": float("inf")}, "tau")],
)
def test_fields_that_mean_nothing_are_refused(fields, message):
    with pytest.raises(RecipeError, match=message):
        rfa(tiny_llama(), **fields)


def test_each_key_head_has_a_draw():
    with pytest.raises(ModelError, match="draws must be 0 or at least 2, not 1"):
        rfa(tiny_llama(), draws=1)


def test_settings_of_a_checkpoint_are_checked():
    model = rfa(tiny_llama())
    good = model.config.attention_pattern
    for changed, message in [
        ({"features": -1}, "features=-1"),
        ({"tau": "1"}, "tau="),
        ({"floor": float("nan")}, "floor="),
        ({"gate": None}, "gate="),
        ({"more": 1}, "does not know"),
    ]:
        model.config.attention_pattern = {**good, **changed}
        with pytest.raises(ValueError, match=message):
            type(model)(model.config)
