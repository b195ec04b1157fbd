"""Memory-compressed attention against one softmax over keys that are convolved query by query."""

from __future__ import annotations

import json
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import DECODER, tiny_bert, tiny_gpt2, tiny_llama, tiny_opt, tiny_t5
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    DynamicCache,
    MistralConfig,
    MistralForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.masking_utils import AttentionMaskInterface

import hf_optim
from hf_optim import CheckpointError, ModelError, RecipeError
from hf_optim.toolkit import compat
from hf_optim.toolkit.attention import HeadPatterns, Pattern
from hf_optim.toolkit.attention.blocked import blocked_attention
from hf_optim.toolkit.attention.layout import layouts
from hf_optim_kernels.sparse_attention.op import sparse_attention
from hf_optim_plugins.attention import _compressed_attention
from hf_optim_plugins.attention._compressed_attention import compressed_attention
from hf_optim_plugins.attention._compressed_terms import RawTokens, SeenWindows
from hf_optim_plugins.attention._key_compression import Compression, Held

IDS = torch.randint(3, 60, (2, 23), generator=torch.Generator().manual_seed(0))
DECODERS = [tiny_llama, tiny_gpt2, tiny_opt]


def compressed(model, *more, trained=True, **fields):
    """Return the model with compressed attention, and convolutions that are no longer means."""
    model = hf_optim.optimize(model, [{"technique": "compressed", "local": 0, **fields}, *more])
    if trained:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if ".compression." in name:
                    noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
                    weight += 0.2 * noise.to(weight)
    return model


def convolutions(model):
    modules = [module for module in model.modules() if hasattr(module, "compression")]
    return [(module.compression.key.weight, module.compression.value.weight) for module in modules]


def convolved(weight, part, places):
    """Return ``sum over t of W_g[:, :, t] x_t`` of the tokens of ``[B, G, n, D]`` at ``places``: ``[B, G, D]``."""
    split = weight.unflatten(0, (part.shape[1], -1))
    return sum(torch.einsum("goi,bgi->bgo", split[..., t], part[:, :, j]) for t, j in enumerate(places))


def oracle_attention(stride, local, weights):
    def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
        layer = module.layer_idx
        group, length = query.shape[1] // key.shape[1], query.shape[2]
        found = []
        for i in range(length):
            tokens = list(range(i + 1 if module.is_causal else length))
            keys, values = [], []
            for begin in range(0, len(tokens), stride):
                window = tokens[begin : begin + stride]
                if len(window) == stride and (not local or all(abs(i - j) >= local for j in window)):
                    keys.append(convolved(weights[layer][0], key, window))
                    values.append(convolved(weights[layer][1], value, window))
                else:
                    keys += [key[:, :, j] for j in window]
                    values += [value[:, :, j] for j in window]
            k, v = (torch.stack(part, 2).repeat_interleave(group, 1) for part in (keys, values))
            scores = torch.einsum("bhd,bhkd->bhk", query[:, :, i], k)
            scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
            found.append(torch.einsum("bhk,bhkd->bhd", scores.softmax(-1), v))
        return torch.stack(found, 1), None

    return attention


@pytest.fixture
def dense_oracle():
    """Run a dense model with the attention of the oracle; the mask says all."""
    name = "tests_compressed_oracle"

    def run(model, ids, stride, local, weights):
        AttentionInterface.register(name, oracle_attention(stride, local, weights))
        AttentionMaskInterface.register(name, lambda **kwargs: None)
        model.set_attn_implementation(name)
        return model(ids).logits

    yield run
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop(name, None)


@pytest.mark.many
@pytest.mark.parametrize(("stride", "local"), [(3, 0), (3, 4), (4, 1), (2, 7)])
@pytest.mark.parametrize("build", [*DECODERS, tiny_bert])
def test_outputs_and_gradients_are_those_of_the_oracle(build, stride, local, dense_oracle):
    model = compressed(build().double(), stride=stride, local=local)
    found = model(IDS).logits
    found.square().sum().backward()
    weights = [tuple(w.detach().clone().requires_grad_() for w in pair) for pair in convolutions(model)]
    dense = build().double()
    expected = dense_oracle(dense, IDS, stride, local, weights)
    expected.square().sum().backward()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    own = [w.grad for pair in convolutions(model) for w in pair]
    others = [w.grad for pair in weights for w in pair]
    named = dict(model.named_parameters())
    own += [named[name].grad for name, p in dense.named_parameters() if p.grad is not None]
    others += [p.grad for p in dense.parameters() if p.grad is not None]
    for one, other in zip(own, others, strict=True):
        scale = other.abs().max().clamp_min(1.0)
        torch.testing.assert_close(one / scale, other / scale, rtol=0, atol=1e-10)


@pytest.mark.parametrize("local", [0, 6])
@pytest.mark.parametrize("build", [tiny_llama, tiny_bert])
def test_queries_are_computed_in_groups(build, local, dense_oracle, monkeypatch):
    model = compressed(build().double(), stride=3, local=local)
    monkeypatch.setattr(sys.modules[type(model).__module__], "QUERIES", 5)
    with torch.no_grad():
        expected = dense_oracle(build().double(), IDS, 3, local, convolutions(model))
        torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=1e-11)
        mask = torch.ones_like(IDS)
        mask[1, :6] = 0
        body, places = model.base_model, (mask.cumsum(1) - 1).clamp_min(0)
        found = body(IDS, attention_mask=mask, position_ids=places)[0]
        torch.testing.assert_close(found[1, 6:], body(IDS[1:, 6:])[0][0], rtol=0, atol=1e-11)


@pytest.mark.many(every=4)
@pytest.mark.parametrize("build", [*DECODERS, tiny_bert])
@pytest.mark.parametrize("fields", [{"stride": 1}, {"stride": 5, "local": 23}])
def test_windows_of_one_token_and_an_all_local_part_are_full_attention_to_the_bit(build, fields):
    model = compressed(build(), trained=False, **fields)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, build()(IDS).logits)


@pytest.mark.many(every=4)
@pytest.mark.parametrize("local", [0, 2])
@pytest.mark.parametrize("build", DECODERS)
def test_nothing_comes_from_the_future(build, local):
    model = compressed(build().double(), stride=4, local=local)
    with torch.no_grad():
        before = model(IDS[:1]).logits
        for place in range(23):
            other = IDS[:1].clone()
            other[:, place] = (other[:, place] + 1) % 60
            moved = (model(other).logits - before).abs().amax(-1)[0] > 0
            assert moved.nonzero().flatten().tolist() == list(range(place, 23))


@pytest.mark.many
@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("build", [*DECODERS, tiny_bert])
def test_a_padded_row_is_that_row_alone(build, side):
    model = compressed(build().double(), stride=3, local=2)
    part = {"left": slice(8, 23), "right": slice(0, 13), "both": slice(4, 18)}[side]
    mask = torch.ones_like(IDS)
    mask[1] = 0
    mask[1, part] = 1
    extra = {} if build is tiny_opt else {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    body = model.base_model
    with torch.no_grad():
        found, alone = body(IDS, attention_mask=mask, **extra)[0], body(IDS[1:, part])[0][0]
        torch.testing.assert_close(found[1, part], alone, rtol=0, atol=1e-11)
        torch.testing.assert_close(found[0], body(IDS[:1])[0][0], rtol=0, atol=1e-11)


def test_packed_documents_are_rows_alone():
    model = compressed(tiny_llama().double(), stride=3)
    places = torch.cat([torch.arange(11), torch.arange(12)])[None]
    with torch.no_grad():
        found = model(IDS[:1], position_ids=places, use_cache=False).logits[0]
        alone = torch.cat([model(IDS[:1, :11]).logits[0], model(IDS[:1, 11:]).logits[0]])
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-11)


# -- generation -------------------------------------------------------------------------------------------------------
@pytest.mark.many(every=4)
@pytest.mark.parametrize("more", [{}, {"num_beams": 3}, {"cache_implementation": "static"}])
@pytest.mark.parametrize(("build", "local"), [(tiny_llama, 0), (tiny_gpt2, 2), (tiny_opt, 5)])
def test_generation_with_a_cache_is_generation_without(build, local, more):
    model = compressed(build(), stride=3, local=local)
    mask = torch.ones_like(IDS)
    mask[1, :9] = 0
    fields = {"max_new_tokens": 14, "min_new_tokens": 14, "do_sample": False, "attention_mask": mask}
    without = model.generate(IDS, use_cache=False, **fields, **{k: v for k, v in more.items() if k == "num_beams"})
    assert torch.equal(model.generate(IDS, **fields, **more), without)
    if not more:
        alone = model.generate(IDS[1:, 9:], **{**fields, "attention_mask": mask[1:, 9:]})
        assert torch.equal(without[1:, 9:], alone)


@pytest.mark.parametrize("parts", [(23,), (7, 16), (1, 1, 3, 18), (22, 1)])
def test_parts_of_a_row_from_a_cache_are_the_row_in_one(parts):
    model = compressed(tiny_llama().double(), stride=4, local=3)
    mask = torch.ones_like(IDS)
    mask[1, :5] = 0
    places = (mask.cumsum(1) - 1).clamp_min(0)
    cache, found, begin = DynamicCache(), [], 0
    with torch.no_grad():
        whole = model(IDS, attention_mask=mask, position_ids=places).logits
        for count in parts:
            end = begin + count
            given = {"attention_mask": mask[:, :end], "position_ids": places[:, begin:end], compat.CACHE: cache}
            found.append(model(IDS[:, begin:end], use_cache=True, **given).logits)
            begin = end
    torch.testing.assert_close(torch.cat(found, 1) * mask[..., None], whole * mask[..., None], rtol=0, atol=1e-11)


@pytest.mark.parametrize(("stride", "local"), [(1, 0), (3, 0), (4, 6)])
def test_a_cache_holds_windows_and_what_is_left(stride, local):
    model = compressed(tiny_llama(max_position_embeddings=128), stride=stride, local=local)
    ids = torch.randint(3, 60, (2, 101), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        layer = model(ids, use_cache=True)[compat.CACHE].layers[0]
    windows = (101 - local) // stride
    kept = windows + 101 - windows * stride
    assert layer.nbytes() == 2 * kept * 2 * 2 * 8 * 4  # keys and values, rows, heads, width, bytes
    assert layer.get_seq_length() == 101
    assert kept <= 101 / stride + local + stride


def test_a_cache_does_not_go_back():
    model = compressed(tiny_llama())
    cache = model(IDS, use_cache=True)[compat.CACHE]
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="mask of all tokens"):
        model(IDS[:, :1], attention_mask=torch.tensor([[0] * 5 + [1] * 19] * 2), **{compat.CACHE: cache})
    with pytest.raises(ValueError, match="did not reach compressed attention"):
        tiny_llama()(IDS[:, :1], **{compat.CACHE: cache})
    cache.reset()
    assert cache.get_seq_length() == 0
    with torch.no_grad():
        assert torch.equal(model(IDS, **{compat.CACHE: cache}).logits, model(IDS).logits)


# -- training and checkpoints -----------------------------------------------------------------------------------------
def test_the_stock_trainer_trains_the_convolutions(tmp_path):
    model = compressed(tiny_llama(), trained=False)
    before = [w.detach().clone() for pair in convolutions(model) for w in pair]
    args = TrainingArguments(
        str(tmp_path), max_steps=3, learning_rate=1e-2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in IDS]
    Trainer(model=model, args=args, train_dataset=data).train()
    for old, new in zip(before, [w for pair in convolutions(model) for w in pair], strict=True):
        assert not torch.equal(old, new)


RELOAD = """
    import torch
    from transformers import {auto}
    model = {auto}.from_pretrained({folder!r}, trust_remote_code=True).eval()
    ids = torch.tensor({ids})
    with torch.no_grad():
        torch.save(model(ids).logits, {folder!r} + "/logits.pt")
    if {auto!r} == "AutoModelForCausalLM":
        tokens = model.generate(ids, max_new_tokens=9, min_new_tokens=9, do_sample=False)
        torch.save(tokens, {folder!r} + "/tokens.pt")
"""


@pytest.mark.many
@pytest.mark.parametrize("more", [(), ({"technique": "rtn", "bits": 8},)])
@pytest.mark.parametrize("build", [tiny_llama, tiny_bert])
def test_a_checkpoint_needs_no_hf_optim(build, more, tmp_path, stock_python):
    model = compressed(build(), *more, stride=3, local=1)
    model.save_pretrained(tmp_path)
    causal = build is tiny_llama
    auto = "AutoModelForCausalLM" if causal else "AutoModelForSequenceClassification"
    done = stock_python.copy(textwrap.dedent(RELOAD.format(auto=auto, folder=str(tmp_path), ids=IDS.tolist())))
    assert done.status == 0, done.err
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), model(IDS).logits)
    if causal:
        tokens = model.generate(IDS, max_new_tokens=9, min_new_tokens=9, do_sample=False)
        assert torch.equal(torch.load(tmp_path / "tokens.pt"), tokens)


def test_a_checkpoint_without_a_convolution_is_refused(tmp_path):
    compressed(tiny_llama()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    gone = next(name for name in tensors if name.endswith("compression.value.weight"))
    del tensors[gone]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"has no weights for 1 tensors of .*compression\.value\.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path, optim_config="auto", trust_remote_code=True)
    # transformers alone reports it, and starts from the mean.
    model = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    weight = model.get_parameter(gone)
    assert torch.equal(weight.unflatten(0, (2, 8))[1], (torch.eye(8) / 3)[:, :, None].expand(8, 8, 3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stride": 0}, "stride=0, not a whole number from 1"),
        ({"stride": 10**9}, "stride=1000000000"),
        ({"local": -1}, "local=-1"),
        ({"key_heads": 2.0}, r"key_heads=2\.0"),
        ({"head_width": None}, "head_width=None"),
    ],
)
def test_a_damaged_configuration_is_an_error(settings, message, tmp_path):
    compressed(tiny_llama()).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["attention_pattern"] |= settings
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)


# -- refusals ---------------------------------------------------------------------------------------------------------
def test_masks_of_pairs_are_refused():
    model = compressed(tiny_llama())
    with pytest.raises(ValueError, match="takes padding and packed documents, and no other masks"):
        model(IDS, attention_mask=torch.ones(2, 1, 23, 23, dtype=torch.bool).tril())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        windowed = MistralForCausalLM(MistralConfig(**DECODER, sliding_window=4)).eval()
    with pytest.raises(ModelError, match="by a sliding window"):
        compressed(windowed)


def test_what_cannot_be_compressed_is_refused_and_unchanged():
    model = tiny_t5()
    with pytest.raises(ModelError, match=r"step 1 \(compressed\): t5 has cross-attention"):
        compressed(model)
    assert not any(hasattr(module, "compression") for module in model.modules())
    with pytest.raises(RecipeError, match="compressed"):
        compressed(tiny_llama(), {"technique": "blockwise", "block": 4})
    with pytest.raises(ModelError, match="stride is 65, and the model reads at most 64 tokens"):
        compressed(tiny_llama(), stride=65)


@pytest.mark.parametrize("fields", [{"stride": 0}, {"local": -1}, {"stride": 2.5}])
def test_fields_are_checked(fields):
    with pytest.raises(RecipeError, match=next(iter(fields))):
        compressed(tiny_llama(), **fields)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("stride", "local"), [(4, 16), (7, 0), (5, 33), (3, 1)])
def test_lists_of_blocks_are_what_groups_of_queries_are(causal, stride, local, monkeypatch):
    length = 1100
    torch.manual_seed(0)
    weights = Compression(2, 8, stride).double()
    query, key, value = (torch.randn(2, heads, length, 8).double().requires_grad_() for heads in (4, 2, 2))
    held = Held.nothing(stride, local, key).added(key, value, None, [length] * 2).compressed(weights, causal)
    assert _compressed_attention._sources(query, held, causal)
    slope, found = torch.randn(length, 1).double(), []
    for start in (0, None):  # None: positions are read, so that queries are computed in groups
        out = compressed_attention(query, held, torch.arange(length)[None], causal, 8**-0.5, 0.0, start)
        inputs = (query, key, value, *weights.parameters())
        found.append([out, *torch.autograd.grad((out * slope).sum(), inputs, retain_graph=True)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("local", [0, 16, 33])
def test_what_queries_may_see_is_known_without_reading_positions(causal, local):
    key = torch.randn(1, 2, 700, 8)
    held = Held.nothing(5, local, key).added(key, key, None, [700]).compressed(Compression(2, 8, 5), causal)
    for start in (0, 300):
        at = torch.arange(start, 700)[None]
        groups = at.split(_compressed_attention.QUERIES, dim=1)
        plain = _compressed_attention._plain_bounds(held, start, 700 - start, causal)
        assert plain == [tuple(each) for each in _compressed_attention._bounds(held, groups, causal)]


@pytest.mark.interpreted
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", [SeenWindows, RawTokens])
def test_kernels_compute_the_lists_of_windows_and_of_tokens(kind, causal):
    length, term = 150, kind(4, 16, causal)
    heads = HeadPatterns.of([Pattern((term,))], 2)
    (lists,) = layouts(heads.patterns, heads.heads, length, 32, torch.device("cpu"))
    count = term.count(length) if kind is SeenWindows else length
    torch.manual_seed(0)
    inputs = [torch.randn(1, *size, 16).requires_grad_() for size in ((2, length), (1, count), (1, count))]
    found = []
    for product in (sparse_attention, blocked_attention):
        out, sums = product(*inputs, lists, 0.25, None, None)
        found.append([out, *torch.autograd.grad(out.square().sum() + sums[sums.isfinite()].sum(), inputs)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
