"""Adaptive spans against the formula of the paper, pair by pair, and what they save."""

from __future__ import annotations

import copy
import json
import math
import textwrap

import pytest
import torch
from pattern_oracle import hidden_and_gradients, inputs_of, model_of, use_blocks
from tiny_models import tiny_bert, tiny_gpt2, tiny_llama, tiny_opt, tiny_t5
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedModel,
    TrainingArguments,
)
from transformers.masking_utils import AttentionMaskInterface

import hf_optim
from hf_optim import ModelError, OptimConfig, RecipeError, remote_code, run_of
from hf_optim.toolkit.compat import CACHE

IDS = torch.randint(3, 60, (2, 40), generator=torch.Generator().manual_seed(0))
DECODERS = [tiny_llama, tiny_gpt2, tiny_opt]
SHARES = [[0.001, 1.0, 0.31, 0.07], [0.51, 0.02, 0.11, 0.113]]


def spans_of(model):
    return [module.span for module in model.modules() if hasattr(module, "span")]


def spanned(model, *more, shares=SHARES, **fields):
    """Return the model with spans of these shares of the longest, without training."""
    model = hf_optim.optimize(model, [{"technique": "adaptive_span", "ramp": 4, **fields}, *more]).eval()
    if shares is not None:
        with torch.no_grad():
            for span, own in zip(spans_of(model), shares, strict=True):
                span.z.copy_(torch.tensor(own))
    return model


def logits(model, ids=IDS, **inputs):
    with torch.no_grad():
        return model(ids, **inputs).logits


def mask_of(z, distance, size, ramp):
    """Return ``m`` of the paper, ``[H, N, M]``, with the authors' ``clamp``."""
    m = ((z[:, None, None] * size - distance) / ramp + 1).clamp(0, 1)
    return m * (distance < size)


def under_formula(model, inputs, z, size, ramp):
    """Return hidden states and gradients of a stock model whose weights are ``m * softmax``, made to sum to 1."""
    own = [module for module in model.modules() if hasattr(module, "is_causal")]
    layer_of = {id(module): index for index, module in enumerate(own)}

    def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
        group, n = query.shape[1] // key.shape[1], query.shape[2]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        place = torch.arange(n)
        distance = (place[:, None] - place).abs()
        seen = torch.ones(n, n, dtype=torch.bool).tril() if module.is_causal else torch.ones(n, n, dtype=torch.bool)
        seen = seen[None, None]
        if attention_mask is not None:
            seen = seen & attention_mask
        scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        weights = scores.masked_fill(~seen, -1e300).softmax(-1) * seen
        weights = weights * mask_of(z[layer_of[id(module)]], distance, size, ramp)
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-300)
        return (weights @ value).transpose(1, 2).contiguous(), None

    AttentionInterface.register("span_oracle", attention)
    AttentionMaskInterface.register("span_oracle", AttentionMaskInterface._global_mapping["sdpa"])
    try:
        model.set_attn_implementation("span_oracle")
        return hidden_and_gradients(model, inputs)
    finally:
        for interface in (AttentionInterface, AttentionMaskInterface):
            interface._global_mapping.pop("span_oracle")


def close(found, expected, z):
    (hidden, grads), (wanted, others) = found, expected
    grads = dict(grads)
    own = [grads.pop(name) for name in list(grads) if name.endswith("span.z")]
    assert grads.keys() == others.keys()
    torch.testing.assert_close(hidden, wanted, rtol=0, atol=1e-10)
    for name, grad in grads.items():
        scale = others[name].abs().max().clamp_min(1e-3)
        torch.testing.assert_close(grad / scale, others[name] / scale, rtol=0, atol=1e-9)
    for grad, other in zip(own, z, strict=True):
        torch.testing.assert_close(grad.double(), other.grad, rtol=1e-6, atol=1e-9)
        assert float(other.grad.abs().sum()) > 0


@pytest.mark.many
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_outputs_and_gradients_are_those_of_the_formula(family, monkeypatch):
    dense = model_of(family)
    inputs, _ = inputs_of(family)
    z = [torch.tensor(own, dtype=torch.float64, requires_grad=True) for own in SHARES]
    stock = model_of(family)
    stock.load_state_dict(dense.state_dict())
    stock = stock.double()
    # Gradients of the oracle's z: through the loss that ``hidden_and_gradients`` makes.
    grads = torch.autograd.grad

    def both(loss, tensors, **kwargs):
        found = grads(loss, [*tensors, *z], **kwargs)
        for own, grad in zip(z, found[len(tensors) :], strict=True):
            own.grad = grad
        return found[: len(tensors)]

    with monkeypatch.context() as patch:
        patch.setattr(torch.autograd, "grad", both)
        expected = under_formula(stock, inputs, z, 256, 4)
    model = spanned(dense).double()
    with torch.no_grad():
        for span, own in zip(spans_of(model), SHARES, strict=True):
            span.z.copy_(torch.tensor(own, dtype=torch.float64))
    close(hidden_and_gradients(model, inputs), expected, z)
    use_blocks(monkeypatch, model)
    close(hidden_and_gradients(model, inputs), expected, z)


def test_the_mask_has_the_gradient_of_clamp():
    code = spans_module()
    distance = torch.arange(-5, 30).reshape(5, 7)
    for values in ([0.0, 1.0, 0.3], [0.25, 0.125, 0.5]):  # of the latter, z S and the ramp end on whole distances
        z = torch.tensor(values, dtype=torch.float64, requires_grad=True)
        found = code.LogMask.apply(z, distance, 16, 4)
        mask = ((z[:, None, None] * 16 - distance.abs()) / 4 + 1).clamp(0, 1) * (distance.abs() < 16)
        assert torch.equal(torch.isneginf(found), mask == 0)
        seen = mask > 0
        torch.testing.assert_close(found[seen], mask[seen].log(), rtol=0, atol=1e-14)
        weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        (own,) = torch.autograd.grad((found.exp() * weights)[seen].sum(), z, retain_graph=True)
        (other,) = torch.autograd.grad((mask * weights)[seen].sum(), z)
        torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-12)
    # A key just at the end of the ramp has no weight; clamp would pass it a gradient.
    z = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    code.LogMask.apply(z, torch.tensor([12]), 16, 4).exp().sum().backward()
    assert z.grad.item() == 0


def spans_module():
    from hf_optim_plugins.adaptive import _span_mask

    return _span_mask


@pytest.mark.many
@pytest.mark.parametrize("build", [*DECODERS, tiny_bert])
def test_the_longest_spans_are_the_dense_model_to_the_bit(build):
    expected = logits(build())
    assert torch.equal(logits(spanned(build(), shares=None)), expected)
    # z S = 51 covers the 40 tokens
    assert torch.equal(logits(spanned(build(), shares=None, init=0.8)), expected)
    assert not torch.equal(logits(spanned(build(), shares=None, init=0.5)), expected)
    assert not torch.equal(logits(spanned(build(), shares=None, max_span=16)), expected)


def test_the_longest_span_is_a_limit():
    """With z at 1 and S = 16 a token sees 16 keys: as a window of the same size."""
    model = spanned(tiny_llama().double(), shares=None, max_span=16)
    windowed = hf_optim.optimize(tiny_llama().double(), [{"technique": "local", "window": 16}])
    torch.testing.assert_close(logits(model), logits(windowed), rtol=0, atol=1e-12)


@pytest.mark.many
@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("build", DECODERS)
def test_nothing_comes_from_the_future_or_from_beyond_the_span(build, blocks, monkeypatch):
    model = spanned(build().double(), shares=[[0.05, 0.1, 0.0, 0.02]] * 2)
    if blocks:
        use_blocks(monkeypatch, model)
    before, reach = logits(model, IDS[:1]), 2 * (math.ceil(0.1 * 64 + 4) - 1)
    for place in (0, 11, 39):
        other = IDS[:1].clone()
        other[:, place] = (other[:, place] + 1) % 60
        after = logits(model, other)
        assert torch.equal(after[:, :place], before[:, :place])
        assert not torch.equal(after[:, place], before[:, place])
        torch.testing.assert_close(after[:, place + reach + 1 :], before[:, place + reach + 1 :], rtol=0, atol=1e-12)


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_rows_are_independent_and_documents_apart(build, blocks, monkeypatch):
    model = spanned(build().double())
    if blocks:
        use_blocks(monkeypatch, model)
    mask = torch.ones_like(IDS)
    mask[0, :7] = 0
    mask[1, 30:] = 0
    places = (mask.cumsum(1) - 1).clamp_min(0)
    found = logits(model, attention_mask=mask, position_ids=places)
    torch.testing.assert_close(found[:1, 7:], logits(model, IDS[:1, 7:]), rtol=0, atol=1e-11)
    torch.testing.assert_close(found[1:, :30], logits(model, IDS[1:, :30]), rtol=0, atol=1e-11)
    holes = torch.ones_like(IDS)
    holes[1, 10:16] = 0
    places = (holes.cumsum(1) - 1).clamp_min(0)
    found = logits(model, attention_mask=holes, position_ids=places, use_cache=False)
    alone = logits(model, torch.cat([IDS[1:, :10], IDS[1:, 16:]], 1))
    torch.testing.assert_close(found[1:][holes[1:].bool()], alone[0], rtol=0, atol=1e-11)
    packed = IDS.reshape(1, -1)
    places = torch.cat([torch.arange(25), torch.arange(55)])[None]
    found = logits(model, packed, position_ids=places, use_cache=False)
    torch.testing.assert_close(found[:, :25], logits(model, packed[:, :25]), rtol=0, atol=1e-11)
    torch.testing.assert_close(found[:, 25:], logits(model, packed[:, 25:]), rtol=0, atol=1e-11)


# -- generation -------------------------------------------------------------------------------------------------------
def ready(model):
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@pytest.mark.many
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("build", DECODERS)
def test_generation_with_a_cache_equals_generation_without(build, fixed):
    model = ready(spanned(build(), shares=[[0.0, 0.9, 0.1, 0.3], [0.1, 0.0, 0.2, 0.01]]))
    if fixed:
        model.fix_spans()
    prompt, mask = IDS[:, :21].clone(), torch.ones_like(IDS[:, :21])
    mask[0, :5] = 0
    fields = {"max_new_tokens": 12, "do_sample": False, "attention_mask": mask}
    cached = model.generate(prompt, **fields)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **fields))
    alone = model.generate(prompt[:1, 5:], **{**fields, "attention_mask": mask[:1, 5:]})
    assert torch.equal(cached[:1, 5:], alone)
    beams = model.generate(prompt, num_beams=3, num_return_sequences=2, **fields)
    assert torch.equal(beams, model.generate(prompt, num_beams=3, num_return_sequences=2, use_cache=False, **fields))
    assisted = model.generate(prompt[:1, 5:], assistant_model=ready(build()), max_new_tokens=12, do_sample=False)
    assert torch.equal(assisted, alone)


def long_llama(**fields):
    return tiny_llama(max_position_embeddings=512, **fields)


def test_a_cache_holds_for_each_head_what_it_can_see():
    model = spanned(long_llama(num_key_value_heads=4), shares=[[0.0, 1.0, 0.3, 0.26], [0.05, 0.1, 0.0, 0.02]])
    ids = torch.randint(3, 60, (1, 300), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        layers = model(ids, use_cache=True)[CACHE].layers
        held = [[part.keys.shape[1:3] for part in layer.parts] for layer in layers]
        whole = DynamicCache()
        long_llama(num_key_value_heads=4)(ids, **{CACHE: whole})
    # 4 keys; 158 and 138; 516: each group holds the keys of its longest span but the query
    assert held == [[(1, 3), (2, 157), (1, 300)], [(4, 55)]]
    dense = sum(part.numel() * 4 for layer in whole.layers for part in (layer.keys, layer.values))
    figures = hf_optim_figures(model, 300)
    assert sum(layer.held_bytes() for layer in layers) == figures["cache_bytes"]
    assert figures["full_cache_bytes"] == dense
    assert figures["cache_bytes"] < 0.45 * dense
    assert all(layer.nbytes() > layer.held_bytes() for layer in layers)
    # a step reads what is held, and continues it
    token = torch.tensor([[7]])
    with torch.no_grad():
        cache = model(ids, use_cache=True)[CACHE]
        step = model(token, **{CACHE: cache}).logits
    torch.testing.assert_close(step[:, -1], logits(model, torch.cat([ids, token], 1))[:, -1], rtol=0, atol=1e-4)


def hf_optim_figures(model, context):
    from hf_optim_plugins.adaptive._span_figures import Keys, figures_of
    from hf_optim_plugins.adaptive._span_mask import support

    size, ramp = model.config.attention_pattern["max_span"], model.config.attention_pattern["ramp"]
    counts = [[support(z, size, ramp) for z in span.z.tolist()] for span in spans_of(model)]
    return figures_of(counts, [Keys(4, 2 * 8 * 4)] * 2, context, True)


def test_spans_that_change_are_read_again_by_a_step_of_one_token():
    model = spanned(tiny_llama(), shares=[[1.0] * 4] * 2)
    token = IDS[:1, :1]
    first = [span.shares(False) for span in spans_of(model)]
    logits(model, token)
    with torch.no_grad():
        spans_of(model)[0].z.fill_(0.25)
    assert first[0] == (1.0,) * 4
    assert spans_of(model)[0].shares(False) == (0.25,) * 4
    spans_of(model)[1].z.data.fill_(0.5)  # which no version counts
    logits(model)
    assert spans_of(model)[1].shares(False) == (0.5,) * 4


def test_a_forward_reads_the_spans_of_all_layers_at_once(monkeypatch):
    model = spanned(tiny_llama(), shares=[[1.0] * 4] * 2)
    kind, read = type(spans_of(model)[0]), []
    inner = kind._read_all
    monkeypatch.setattr(kind, "_read_all", lambda span: (read.append(span), inner(span))[1])
    logits(model)
    assert read == spans_of(model)[:1]
    spans_of(model)[1].z.data.fill_(0.5)
    logits(model)
    assert spans_of(model)[1].shares(False) == (0.5,) * 4  # the first layer of each forward reads them again
    assert read == spans_of(model)[:1] * 2
    with torch.no_grad():
        spans_of(model)[1].z.fill_(0.25)
    assert spans_of(model)[1].shares(True) == (0.25,) * 4
    twin = copy.deepcopy(model)
    spans_of(twin)[1].z.data.fill_(0.75)
    logits(twin)
    assert spans_of(twin)[1].shares(False) == (0.75,) * 4
    assert spans_of(model)[1].shares(False) == (0.25,) * 4


def test_caches_of_others_are_refused():
    model = spanned(tiny_llama())
    blockwise = hf_optim.optimize(tiny_llama(), [{"technique": "blockwise", "block": 8}])
    with torch.no_grad():
        own = model(IDS, use_cache=True)[CACHE]
        other = blockwise(IDS, use_cache=True)[CACHE]
        with pytest.raises(ValueError, match="made for another attention pattern"):
            model(IDS[:, :1], **{CACHE: other})
        with pytest.raises(ValueError, match="for another attention"):
            blockwise(IDS[:, :1], **{CACHE: own})
        with pytest.raises(ValueError, match="no other attention can compute with them"):
            tiny_llama()(IDS[:, :1], **{CACHE: model(IDS, use_cache=True)[CACHE]})
        changed = model(IDS, use_cache=True)[CACHE]
        spans_of(model)[0].z.fill_(0.0)
        with pytest.raises(ValueError, match=r"(start|make) a new one"):
            model(IDS[:, :1], **{CACHE: changed})


# -- training ---------------------------------------------------------------------------------------------------------
def train(model, folder, steps=12, **fields):
    rows = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]
    settings = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=4, report_to=[], use_cpu=True, save_strategy="no",
        disable_tqdm=True, logging_steps=1, **{"learning_rate": 1e-3, "lr_scheduler_type": "constant", **fields},
    )  # fmt: skip
    trainer = hf_optim.OptimTrainer(model=model, args=settings, train_dataset=rows)
    trainer.train()
    return trainer


def test_the_penalty_is_its_formula_and_shortens_spans(tmp_path):
    step = {"technique": "adaptive_span", "ramp": 4, "coefficient": 1e-3, "span_lr": 0.1}
    model = hf_optim.optimize(tiny_llama(), [step])
    trainer = train(model, tmp_path, weight_decay=0.5)
    log = trainer.state.log_history[0]
    assert log["span"] == pytest.approx(1e-3 * 64 * 2, rel=1e-4)  # S, twice the mean of 1
    values = torch.cat([span.z.detach() for span in spans_of(model)])
    assert float(values.max()) < 1
    assert float(values.min()) >= 0
    own = [group for group in trainer.optimizer.param_groups if group["lr"] == 0.1]
    assert [len(group["params"]) for group in own] == [2]
    assert own[0]["weight_decay"] == 0
    figures = run_of(model).record.steps["0"]
    assert figures["mean_span"] < 64
    assert figures["fixed"] is False
    free = hf_optim.optimize(tiny_llama(), [{**step, "coefficient": 0.0}])
    assert "span" not in train(free, tmp_path, steps=2).state.log_history[0]


def test_spans_stay_between_0_and_1(tmp_path):
    model = hf_optim.optimize(
        tiny_llama(), [{"technique": "adaptive_span", "ramp": 4, "coefficient": 1.0, "span_lr": 0.7, "init": 0.3}]
    )
    train(model, tmp_path, steps=2)
    assert torch.equal(torch.cat([span.z.detach() for span in spans_of(model)]), torch.zeros(8))


def test_fixed_windows_hold_all_that_the_ramp_leaves_on(tmp_path):
    step = {"technique": "adaptive_span", "ramp": 4, "coefficient": 1e-3, "span_lr": 0.1, "fix": True}
    model = hf_optim.optimize(tiny_llama(), [step])
    train(model, tmp_path / "run", steps=6)
    figures = run_of(model).record.steps["0"]
    windows = model.config.attention_pattern["windows"]
    assert spans_of(model) == []
    assert figures["fixed"] is True
    assert figures["longest_spans"] == [max(layer) for layer in windows]
    assert figures["perplexity_fixed"] > 1
    assert figures["perplexity_fixed"] != figures["perplexity_as_trained"]
    assert figures["perplexity_on"] == "2 batches of the training data"
    model.save_pretrained(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Fixing the windows changed the perplexity on 2 batches of the training data from" in card
    assert f"{figures['cache_bytes']:,} bytes" in card
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    assert torch.equal(logits(again), logits(model.eval()))
    assert not any("span" in name for name in again.state_dict())
    with pytest.raises(ValueError, match="fixed already"):
        again.fix_spans()


def test_fixed_windows_are_windows(monkeypatch):
    model = spanned(tiny_llama().double())
    windows = model.fix_spans()
    assert windows == [[min(64, math.ceil(torch.tensor(z).item() * 64 + 4)) for z in layer] for layer in SHARES]
    seen = torch.arange(40)[:, None] - torch.arange(40)
    own = [torch.tensor(layer)[:, None, None] > seen for layer in windows]

    def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        scores = (query @ key.transpose(-1, -2) * scaling).masked_fill(~(own[module.layer_idx] & (seen >= 0)), -1e300)
        return (scores.softmax(-1) @ value).transpose(1, 2), None

    stock = tiny_llama().double()
    AttentionInterface.register("windows_oracle", attention)
    AttentionMaskInterface.register("windows_oracle", lambda **kwargs: None)
    try:
        stock.set_attn_implementation("windows_oracle")
        expected = logits(stock)
    finally:
        for interface in (AttentionInterface, AttentionMaskInterface):
            interface._global_mapping.pop("windows_oracle")
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-12)
    use_blocks(monkeypatch, model)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-12)


# -- checkpoints ------------------------------------------------------------------------------------------------------
def test_a_checkpoint_runs_in_a_process_without_hf_optim(tmp_path, stock_python):
    model = ready(hf_optim.release(spanned(tiny_gpt2())))
    model.save_pretrained(tmp_path)
    code = textwrap.dedent(f"""
        import torch
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, trust_remote_code=True).eval()
        half = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, trust_remote_code=True, dtype=torch.bfloat16)
        ids = torch.tensor({IDS.tolist()})
        with torch.no_grad():
            torch.save(model(ids).logits, {str(tmp_path / "logits.pt")!r})
        new = model.generate(ids, max_new_tokens=5, do_sample=False)
        dtypes = sorted({{str(p.dtype) for n, p in half.named_parameters() if n.endswith("span.z")}})
        model.fix_spans()
        result = [type(model).__name__, new.tolist(), dtypes, half.dtype == torch.bfloat16]
    """)
    done = stock_python.copy(code)
    assert done.status == 0, done.err
    kept = model.generate(IDS, max_new_tokens=5, do_sample=False).tolist()
    assert done.result == ["AdaptiveSpanGPT2LMHeadModel", kept, ["torch.float32"], True]
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), logits(model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("ramp"), "need config.attention_pattern with max_span, ramp, windows"),
        (lambda s: s.pop("windows"), "need config.attention_pattern with max_span, ramp, windows"),
        (lambda s: s.update(max_span=0), "max_span"),
        (lambda s: s.update(ramp="4"), "ramp"),
        (lambda s: s.update(windows=[[4, 4, 4, 4]]), "windows"),
        (lambda s: s.update(windows=[[4, 4, 4, 4]] * 3), "windows of 3 layers"),
        (lambda s: s.update(windows=[[4, 4]] * 2), "not those of 4 heads"),
        (lambda s: s.update(windows=[[4, 4, 4, 65]] * 2), "windows"),
        (lambda s: s.update(window=3), "does not know"),
    ],
)
def test_a_changed_configuration_is_refused(change, message, tmp_path):
    PreTrainedModel.save_pretrained(hf_optim.release(spanned(tiny_gpt2())), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    change(config["attention_pattern"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    remote_code.register("adaptive_span_gpt2")
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


# -- bad input --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "fields", [{"ramp": 0}, {"max_span": 0}, {"init": 1.5}, {"coefficient": -1.0}, {"span_lr": 0.0}]
)
def test_fields_outside_of_their_range_are_refused(fields):
    with pytest.raises(RecipeError, match=next(iter(fields))):
        OptimConfig.parse([{"technique": "adaptive_span", **fields}])


def test_models_that_do_not_fit_are_refused_unchanged():
    with pytest.raises(ModelError, match="cross-attention"):
        hf_optim.optimize(tiny_t5(), [{"technique": "adaptive_span"}])
    model = tiny_llama()
    with pytest.raises(ModelError, match="max_span is 65, and the model reads at most 64 tokens"):
        hf_optim.optimize(model, [{"technique": "adaptive_span", "max_span": 65}])
    assert not hasattr(model.config, "attention_pattern")
    with pytest.raises(RecipeError):
        hf_optim.optimize(model, [{"technique": "adaptive_span"}, {"technique": "strided", "stride": 4}])


def test_what_cannot_be_computed_is_refused():
    model = spanned(tiny_llama())
    with pytest.raises(ValueError, match="does not form weights"):
        logits(model, output_attentions=True)
    with torch.no_grad():
        spans_of(model)[1].z[2] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        logits(model)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # of the compiler
def test_compiled_training_is_training():
    model = hf_optim.optimize(tiny_llama(num_hidden_layers=1), [{"technique": "adaptive_span", "ramp": 4, "init": 0.1}])
    ids = torch.arange(3, 23)[None]
    losses = [each(ids, labels=ids).loss for each in (model.train(), torch.compile(model, backend="eager"))]
    torch._dynamo.reset()
    torch.testing.assert_close(*losses)
