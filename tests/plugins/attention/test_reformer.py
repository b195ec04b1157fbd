"""Reformer models against loops over pairs, in decoding, in checkpoints, and with reversible layers."""

from __future__ import annotations

import ast
import json
import sys
import textwrap
from collections import Counter

import pytest
import torch
from test_lsh_attention import oracle
from tiny_models import DECODER, tiny_bert, tiny_gpt2, tiny_llama, tiny_opt, tiny_t5
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.masking_utils import AttentionMaskInterface

import hf_optim
from hf_optim import ModelError, RecipeError
from hf_optim.toolkit import compat
from hf_optim.toolkit.attention import attentions
from hf_optim.toolkit.attention.lsh_hashing import draw_rotations, hash_vectors
from hf_optim_plugins.attention._lsh_model import scheme_of
from hf_optim_plugins.attention.reformer import Reformer

IDS = torch.randint(3, 60, (2, 23), generator=torch.Generator().manual_seed(0))
DECODERS = [tiny_llama, tiny_gpt2, tiny_opt]
REVERSIBLE = [tiny_llama, tiny_gpt2]


def reformer(model, *more, **fields):
    fields = {"chunk": 4, "rounds": 2, "buckets": [4], **fields}
    return hf_optim.optimize(model, [{"technique": "reformer", **fields}, *more])


@pytest.fixture
def pairwise():
    """Run a dense model with the attention of the oracle; the mask says all."""
    name = "tests_reformer_oracle"

    def run(model, ids, settings):
        scheme = scheme_of(settings)

        def attention(module, query, key, value, attention_mask, **kwargs):
            seed = scheme.seed * 1_000_003 + module.layer_idx
            rotations = draw_rotations(scheme.heads, scheme.width, scheme.rounds, scheme.factors, seed)
            buckets = hash_vectors(query, rotations, scheme.factors)
            rows = [oracle(q, v, b, scheme, module.is_causal) for q, v, b in zip(query, value, buckets, strict=True)]
            return torch.stack(rows).transpose(1, 2), None

        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, lambda **kwargs: None)
        model.set_attn_implementation(name)
        return model(ids).logits

    yield run
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop(name, None)


@pytest.mark.many
@pytest.mark.parametrize("scheme", ["bucket", "paper", "trax"])
@pytest.mark.parametrize("build", [*DECODERS, tiny_bert])
def test_outputs_and_gradients_are_those_of_the_oracle(build, scheme, pairwise):
    model = reformer(build().double(), scheme=scheme, seed=3)
    dense, ids = build().double(), IDS[:, :14]
    found, expected = model(ids).logits, pairwise(dense, ids, model.config.attention_pattern)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    found.square().sum().backward()
    expected.square().sum().backward()
    named = dict(dense.named_parameters())
    for name, parameter in model.named_parameters():
        other = named[name].grad
        if parameter.grad is not None:
            scale = other.abs().max().clamp_min(1.0)
            torch.testing.assert_close(parameter.grad / scale, other / scale, rtol=0, atol=1e-9)
    gone = set(named) - set(dict(model.named_parameters()))
    assert bool(gone) == (build is not tiny_gpt2)
    assert all("k_proj" in name or ".key." in name for name in gone)


@pytest.mark.many
@pytest.mark.parametrize("build", DECODERS)
def test_nothing_comes_from_the_future(build):
    model = reformer(build().double())
    with torch.no_grad():
        before = model(IDS[:1]).logits
        for place in range(1, 23):
            other = IDS[:1].clone()
            other[:, place] = (other[:, place] + 1) % 60
            assert torch.allclose(model(other).logits[:, :place], before[:, :place], rtol=0, atol=1e-12)


@pytest.mark.many
@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("build", [*DECODERS, tiny_bert])
def test_a_padded_row_is_that_row_alone(build, side):
    model = reformer(build().double())
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


@pytest.mark.many
@pytest.mark.parametrize("build", [*DECODERS, tiny_bert])
def test_a_chunk_of_the_whole_text_is_full_attention_with_shared_keys(build):
    full = reformer(build(), chunk=32)
    others = [reformer(build(), chunk=32, buckets=[8], rounds=1, seed=5), reformer(build(), chunk=64, scheme="trax")]
    with torch.no_grad():
        for other in others:
            assert torch.equal(full(IDS)[0], other(IDS)[0])
        assert not torch.equal(full(IDS)[0], build()(IDS)[0])


# -- generation -------------------------------------------------------------------------------------------------------
@pytest.mark.many
@pytest.mark.parametrize("more", [{}, {"num_beams": 3}])
@pytest.mark.parametrize("build", DECODERS)
def test_generation_with_a_cache_is_generation_without(build, more):
    model = reformer(build())
    mask = torch.ones_like(IDS)
    mask[1, :9] = 0
    fields = {"max_new_tokens": 14, "min_new_tokens": 14, "do_sample": False, "attention_mask": mask, **more}
    without = model.generate(IDS, use_cache=False, **fields)
    assert torch.equal(model.generate(IDS, **fields), without)
    alone = model.generate(IDS[1:, 9:], **{**fields, "attention_mask": mask[1:, 9:]})
    assert torch.equal(without[1:, 9:], alone)


@pytest.mark.many
@pytest.mark.parametrize("reversible", [False, True])
@pytest.mark.parametrize("parts", [(7, 16), (1, 1, 3, 18), (22, 1)])
def test_parts_of_a_row_from_a_cache_are_the_row_in_one(parts, reversible):
    model = reformer(tiny_llama().double(), reversible=reversible)
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


@pytest.mark.parametrize("scheme", ["paper", "trax"])
def test_the_last_token_of_other_schemes_sees_in_decoding_what_it_sees_in_one_forward(scheme):
    model = reformer(tiny_llama(num_hidden_layers=1).double(), scheme=scheme)
    cache = DynamicCache()
    with torch.no_grad():
        model(IDS[:, :15], **{compat.CACHE: cache})
        for end in range(16, 24):
            step = model(IDS[:, end - 1 : end], **{compat.CACHE: cache}).logits
            torch.testing.assert_close(step[:, 0], model(IDS[:, :end]).logits[:, -1], rtol=0, atol=1e-11)


@pytest.mark.parametrize("scheme", ["bucket", "paper"])
def test_a_cache_holds_a_key_a_value_and_a_bucket_of_each_token(scheme):
    model = reformer(tiny_llama(max_position_embeddings=128), scheme=scheme)
    ids = torch.randint(3, 60, (2, 101), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        layer = model(ids, use_cache=True)[compat.CACHE].layers[0]
    heads, key_heads, width, rounds = 4, 2, 8, 2
    numbers = 101 * (heads + key_heads) * width * 4  # keys of all heads, values of those that are shared
    codes = 101 * heads * rounds * (4 if scheme == "bucket" else 2)
    counts = heads * rounds * 4 * 4 if scheme == "bucket" else 0
    assert layer.nbytes() == 2 * (numbers + codes + counts + 101 * 4 + 8)


# -- what becomes of a model ------------------------------------------------------------------------------------------
def test_projections_are_shared_as_asked():
    dense = tiny_llama().model.layers[0].self_attn
    query, key = dense.q_proj.weight, dense.k_proj.weight.unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1)
    for shared, expected in (("query", query), ("key", key), ("mean", (query + key) / 2)):
        layer = reformer(tiny_llama(), shared=shared).model.layers[0].self_attn
        assert torch.equal(layer.q_proj.weight, expected)
        assert not list(layer.k_proj.parameters())
    fused = tiny_gpt2().transformer.h[0].attn.c_attn
    made = reformer(tiny_gpt2(), shared="mean").transformer.h[0].attn.c_attn
    for one, other in ((fused.weight.T, made.weight.T), (fused.bias, made.bias)):
        assert torch.equal(other[:32], (one[:32] + one[32:64]) / 2)
        assert torch.equal(other[32:], one[32:])


def test_zeros_of_pruned_queries_stay_unless_keys_join_them():
    assert Reformer().contract().keeps == {hf_optim.traits.SPARSE, hf_optim.traits.SPARSE_NM}
    assert not Reformer(shared="mean").contract().keeps


def test_buckets_follow_from_the_context():
    def factors(context, **fields):
        return Reformer(**{"chunk": 4, **fields})._factors(LlamaConfig(max_position_embeddings=context), "reformer")

    assert factors(64) == [32]
    assert factors(100) == [32]
    assert factors(256) == [128]
    assert factors(512) == [16, 16]
    assert factors(1024) == [16, 32]
    assert factors(64, chunk=64) == [2]
    assert factors(2**20) == [128, 128]
    model = reformer(tiny_llama(), buckets=[])
    assert model.config.attention_pattern["factors"] == factors(model.config.max_position_embeddings)


def test_a_seed_decides_and_nothing_else():
    torch.manual_seed(1)
    one = reformer(tiny_llama(), rounds=1)
    torch.manual_seed(2)
    two, other = reformer(tiny_llama(), rounds=1), reformer(tiny_llama(), rounds=1, seed=1)
    assert torch.equal(one(IDS).logits, two(IDS).logits)
    assert not torch.equal(one(IDS).logits, other(IDS).logits)
    drawn = [module.learned.rotations for module in attentions(one)]
    assert not torch.equal(drawn[0], drawn[1])


def test_rotations_are_redrawn_in_training_if_asked_of_the_seed_of_the_step():
    model, fixed = reformer(tiny_llama(), redraw=True, rounds=1).train(), reformer(tiny_llama(), rounds=1).train()

    def run(model, seed):
        torch.manual_seed(seed)
        return model(IDS, use_cache=False).logits

    assert torch.equal(run(model, 1), run(model, 1))
    assert not torch.equal(run(model, 1), run(model, 2))
    assert torch.equal(run(fixed, 1), run(fixed, 2))
    assert torch.equal(run(model.eval(), 1), run(fixed, 2))


def test_dropout_of_attention_is_that_of_training():
    model = reformer(tiny_llama(attention_dropout=0.5))
    torch.manual_seed(0)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, model(IDS).logits)
        model.train()
        assert not torch.equal(model(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits)


# -- reversible layers ------------------------------------------------------------------------------------------------
def as_stored(model, monkeypatch):
    """Let a model with reversible layers store its activations."""

    def plain(streams, f, g, *parameters, random):
        first = streams.first + f(streams.second)
        return type(streams)(first, streams.second + g(first), streams.chain)

    monkeypatch.setattr(sys.modules[type(model).__module__], "reversible_step", plain)


def loss_and_gradients(model, **given):
    torch.manual_seed(6)
    loss = model(IDS, labels=IDS, **given).loss
    model.zero_grad()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("build", REVERSIBLE)
def test_gradients_of_reversible_layers_are_those_of_stored_activations(build, monkeypatch):
    dropped = {"attn_pdrop": 0.2, "resid_pdrop": 0.2, "embd_pdrop": 0.0} if build is tiny_gpt2 else {}
    model = reformer(build(num_hidden_layers=3, **dropped).double(), reversible=True, redraw=True).train()
    loss, found = loss_and_gradients(model)
    as_stored(model, monkeypatch)
    wanted, expected = loss_and_gradients(model)
    assert loss == pytest.approx(wanted, abs=1e-12)
    assert found.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-11)


def test_both_streams_begin_with_the_embedding_and_their_mean_is_the_output():
    model, dense = reformer(tiny_llama().double(), chunk=64, reversible=True), reformer(tiny_llama().double(), chunk=64)
    with torch.no_grad():
        states = model(IDS, output_hidden_states=True).hidden_states
        first = second = dense.model.embed_tokens(IDS)
        places = dense.model.rotary_emb(first, torch.arange(23)[None])
        for number, layer in enumerate(dense.model.layers):
            torch.testing.assert_close(states[number], (first + second) / 2, rtol=0, atol=1e-12)
            first = first + layer.self_attn(layer.input_layernorm(second), places, None)[0]
            second = second + layer.mlp(layer.post_attention_layernorm(first))
        logits = dense.lm_head(dense.model.norm((first + second) / 2))
        torch.testing.assert_close(model(IDS).logits, logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("reversible", [True, False])
def test_memory_of_activations_does_not_grow_with_the_layers(reversible):
    sizes, weights = [], set()
    for layers in (2, 8):
        model = reformer(tiny_llama(num_hidden_layers=layers), reversible=reversible).train()
        weights, saved = {p.data_ptr() for p in model.parameters()}, {}

        def pack(tensor, saved=saved, weights=weights):
            if tensor.data_ptr() not in weights:
                saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(IDS, labels=IDS, use_cache=False).loss
        sizes.append(sum(saved.values()))
        del loss
    assert (sizes[1] == sizes[0]) if reversible else (sizes[1] > 2 * sizes[0])


def test_buckets_of_the_forward_are_those_of_the_backward(monkeypatch):
    model = reformer(tiny_llama(), reversible=True).train()
    module, calls = sys.modules["hf_optim.toolkit.attention.lsh_layer"], []
    monkeypatch.setattr(module, "hash_vectors", lambda *given: calls.append(1) or hash_vectors(*given))
    loss = model(IDS, labels=IDS, use_cache=False).loss
    assert len(calls) == 2
    loss.backward()
    assert len(calls) == 2


def checkpointing(model):
    name = "activation_checkpointing_enable"  # its name since 5.24
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")()


def test_reversible_layers_say_what_they_cannot_do():
    model = reformer(tiny_llama(), reversible=True).train()
    with pytest.raises(ValueError, match=r"does not support (gradient|activation) checkpointing"):
        checkpointing(model)
    cache = model(IDS)[compat.CACHE]
    with pytest.raises(ValueError, match="no gradient for tokens behind a cache"):
        model(IDS[:, :1], **{compat.CACHE: cache})
    model.model.layers[0].register_forward_hook(lambda module, args, out: out.clone())
    with pytest.raises(ValueError, match="two streams of reversible layers were lost"):
        model(IDS, use_cache=False)
    checkpointing(reformer(tiny_llama()))
    with pytest.raises(ModelError, match="reversible layers need a norm"):
        reformer(tiny_bert(), reversible=True)


# -- training and checkpoints -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("reversible", [False, True])
def test_the_stock_trainer_trains_it(reversible, tmp_path):
    model = reformer(tiny_llama(), reversible=reversible)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    args = TrainingArguments(
        str(tmp_path), max_steps=3, learning_rate=1e-2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    Trainer(model=model, args=args, train_dataset=[{"input_ids": row, "labels": row} for row in IDS]).train()
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())


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
        model.train()
        model(ids, labels=ids, use_cache=False).loss.backward()
        torch.save([p.grad for p in model.parameters()], {folder!r} + "/gradients.pt")
"""


@pytest.mark.many
@pytest.mark.parametrize(
    ("build", "fields"), [(tiny_llama, {"reversible": True}), (tiny_gpt2, {}), (tiny_bert, {}), (tiny_llama, {})]
)
def test_a_checkpoint_needs_no_hf_optim(build, fields, tmp_path, stock_python):
    model = reformer(build(), **fields)
    model.save_pretrained(tmp_path)
    causal = build is not tiny_bert
    auto = "AutoModelForCausalLM" if causal else "AutoModelForSequenceClassification"
    done = stock_python.copy(textwrap.dedent(RELOAD.format(auto=auto, folder=str(tmp_path), ids=IDS.tolist())))
    assert done.status == 0, done.err
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), model(IDS).logits)
    if causal:
        tokens = model.generate(IDS, max_new_tokens=9, min_new_tokens=9, do_sample=False)
        assert torch.equal(torch.load(tmp_path / "tokens.pt"), tokens)
        model.train()
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        found = torch.load(tmp_path / "gradients.pt")
        assert len(found) == len(list(model.parameters()))


def test_rotations_stay_whole_in_every_dtype_and_are_drawn_again_where_they_lack(tmp_path):
    from safetensors.torch import load_file, save_file

    model = reformer(tiny_llama())
    drawn = model.model.layers[1].self_attn.learned.rotations.clone()
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True, dtype=torch.bfloat16)
    assert torch.equal(half.model.layers[1].self_attn.learned.rotations, drawn)
    assert torch.equal(half.float().model.layers[1].self_attn.learned.rotations, drawn)
    tensors = load_file(tmp_path / "model.safetensors")
    left = {name: part for name, part in tensors.items() if "rotations" not in name}
    assert len(tensors) - len(left) == 2
    save_file(left, tmp_path / "model.safetensors", {"format": "pt"})
    made, info = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True, output_loading_info=True)
    assert "model.layers.1.self_attn.learned.rotations" in info["missing_keys"]
    assert torch.equal(made.model.layers[1].self_attn.learned.rotations, drawn)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunk": 0}, "chunk=0, not a whole number from 2"),
        ({"rounds": 10**9}, "rounds=1000000000"),
        ({"factors": []}, "even numbers, or"),
        ({"factors": [3]}, "even numbers, or"),
        ({"factors": [256, 256]}, "65536 buckets: at most 16384"),
        ({"scheme": "other"}, "scheme='other', not one of bucket, paper, trax"),
        ({"redraw": 1}, "redraw='1', not true or false"),
        ({"key_projection": "__class__.x y"}, "not the name of a module"),
        ({"key_projection": "o_proj.other"}, "has no linear layer 'o_proj.other'"),
        ({"reversible": ["a"]}, "not the names of four modules"),
        ({"reversible": ["a", "self_attn", "b", "c"]}, "which are to be reversible"),
        ({"window": 3}, r"does not know: \['window'\]"),
    ],
)
def test_a_damaged_configuration_is_an_error(settings, message, tmp_path):
    reformer(tiny_llama(num_hidden_layers=1)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["attention_pattern"] |= settings
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)


def test_names_in_the_code_of_a_checkpoint_are_defined_once():
    names = Counter()
    for node in ast.parse(Reformer.remote_code.source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names[node.name] += 1
        elif isinstance(node, ast.Assign):
            names.update(target.id for target in node.targets if isinstance(target, ast.Name))
    assert [name for name, count in names.items() if count > 1] == []


# -- refusals ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chunk": 0}, "chunk"),
        ({"rounds": 0}, "rounds"),
        ({"buckets": [0]}, "even, or 1 alone"),
        ({"buckets": [4, 3]}, "even, or 1 alone"),
        ({"buckets": [1, 2]}, "even, or 1 alone"),
        ({"buckets": [256, 256]}, "at most 16,384 buckets, not 65,536"),
        ({"scheme": "sorted"}, "scheme"),
        ({"seed": -1}, "seed"),
    ],
)
def test_fields_are_checked(fields, message):
    with pytest.raises(RecipeError, match=message):
        reformer(tiny_llama(), **fields)


def test_what_does_not_fit_is_refused_and_unchanged():
    with pytest.raises(ModelError, match=r"step 1 \(reformer\): t5 has cross-attention"):
        reformer(tiny_t5())
    model = tiny_llama()
    with pytest.raises(ModelError, match="is causal: it sees no chunk behind a token"):
        reformer(model, after=1)
    assert not any(hasattr(module, "learned") for module in model.modules())
    assert torch.equal(model(IDS).logits, tiny_llama()(IDS).logits)
    with pytest.raises(RecipeError, match="reformer"):
        reformer(tiny_llama(), {"technique": "blockwise", "block": 4})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dropped = LlamaForCausalLM(LlamaConfig(**DECODER)).eval()
    dropped.model.layers[1].resid_dropout = torch.nn.Dropout(0.1)
    with pytest.raises(ModelError, match="has dropout \\(resid_dropout\\) outside"):
        reformer(dropped, reversible=True)


def test_an_encoder_may_look_at_chunks_behind():
    model = reformer(tiny_bert().double(), after=1, before=2)
    assert model.config.attention_pattern["scheme"] == "paper"
    assert model(IDS).logits.isfinite().all()
