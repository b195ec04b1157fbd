"""Terraformer: its recurrence, its reversible layers, decoding, padding, memory by depth, and checkpoints."""

from __future__ import annotations

import json
import textwrap

import pytest
import torch
from tiny_models import DECODER, tiny_bert, tiny_gpt2, tiny_llama, tiny_opt
from transformers import AutoModelForCausalLM, MistralConfig, Trainer, TrainingArguments

import hf_optim
from hf_optim import ModelError, RecipeError
from hf_optim.toolkit import compat
from hf_optim.toolkit.attention import reversible_layers
from hf_optim_plugins.sparsity._held_parts import TokenRows
from hf_optim_plugins.sparsity._sparse_ffn_modules import SparseFFN
from hf_optim_plugins.sparsity._terraformer_model import TERRAFORMER_SETTINGS, TerraformerLayer
from hf_optim_plugins.sparsity._terraformer_modules import SRU, RecalledSparseFFN, linear_recurrence

IDS = torch.randint(3, 60, (2, 19), generator=torch.Generator().manual_seed(0))
PARTS = {
    "all": {},
    "softmax": {"lsh": False},
    "dense projections": {"sparse_qkv": False},
    "dense FFN": {"sparse_ffn": False},
    "one stream": {"reversible": False},
    "no recurrence": {"recurrence": 0},
    "two recurrences": {"recurrent_layers": 2, "concat": "fixed", "gated": True},
}


def terraformer(model, **fields):
    """Return a Terraformer whose logits are far from uniform."""
    fields = {"block": 4, "chunk": 4, "rounds": 2, "buckets": [4], "recurrence": 6, **fields}
    made = hf_optim.optimize(model, [{"technique": "terraformer", **fields}])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.dim() > 1 and "shared" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return made


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, TerraformerLayer)]


# -- the recurrence ---------------------------------------------------------------------------------------------------
def test_the_recurrence_is_the_loop_over_tokens():
    torch.manual_seed(0)
    for count in (1, 2, 3, 8, 13):
        factor, added, first = torch.rand(2, count, 3).double(), torch.randn(2, count, 3).double(), torch.randn(2, 3)
        state, states = first.double(), []
        for t in range(count):
            state = factor[:, t] * state + added[:, t]
            states.append(state)
        found = linear_recurrence(factor, added, first.double())
        torch.testing.assert_close(found, torch.stack(states, 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rows", ["plain", "padded", "packed"])
def test_a_simple_recurrent_unit_is_that_of_the_equations(rows):
    torch.manual_seed(0)
    unit, hidden = SRU(5).double(), torch.randn(2, 9, 5, dtype=torch.float64)
    valid, documents = torch.ones(2, 9, dtype=torch.bool), torch.zeros(2, 9, dtype=torch.long)
    if rows == "padded":
        valid[0, :3], valid[1, 6:] = False, False
    elif rows == "packed":
        documents[0, 4:], documents[1, 2:] = 1, 1
    given = TokenRows(0, valid if rows == "padded" else None, documents if rows == "packed" else None)
    found, last = unit(hidden, given, None)
    weight, bias = unit.gates.weight.chunk(3), unit.gates.bias.chunk(3)
    for row in range(2):
        state = torch.zeros(5, dtype=torch.float64)
        for t in range(9):
            if not valid[row, t]:
                continue
            if t and documents[row, t] != documents[row, t - 1]:
                state = torch.zeros(5, dtype=torch.float64)
            x = hidden[row, t]
            read, forget = torch.sigmoid(weight[0] @ x + bias[0]), torch.sigmoid(weight[1] @ x + bias[1])
            state = forget * state + (1 - forget) * (weight[2] @ x + bias[2])
            torch.testing.assert_close(found[row, t], read * state + (1 - read) * x * 3**0.5, rtol=0, atol=1e-12)
        torch.testing.assert_close(last[row], state, rtol=0, atol=1e-12)


def test_choices_that_are_recalled_are_those_of_the_sparse_layer():
    entry = {
        "width": 8, "neurons": 24, "out": 8, "block": 4, "rank": 4, "act": "relu", "gated": True, "bias": False,
        "out_bias": True, "controller_bias": True, "temperature": 0.5, "hard_share": 0.5, "controller_output": True,
        "gather_rows": 2, "bits": 16, "group": None,
    }  # fmt: skip
    torch.manual_seed(0)
    one = SparseFFN(entry).double()
    other = RecalledSparseFFN(entry).double()
    other.load_state_dict(one.state_dict())
    hidden = torch.randn(3, 5, 8, dtype=torch.float64)
    for training in (True, False):
        for seed in range(4):  # calls with one unit of a block, and calls with all
            found = []
            for layer in (one, other):
                torch.manual_seed(seed)
                layer.train(training).zero_grad()
                out = layer(hidden)
                out.square().sum().backward()
                found.append([out, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)])
            assert len(found[0]) == len(found[1])
            for a, b in zip(*found, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


# -- reversible layers ------------------------------------------------------------------------------------------------
def stored(streams, f, g, *parameters, random):
    """The step of reversible layers with stored activations."""
    first = streams.first + f(streams.second)
    return type(streams)(first, streams.second + g(first), streams.chain)


def loss_and_gradients(model, **given):
    torch.manual_seed(6)
    loss = model(IDS, labels=IDS, **given).loss
    model.zero_grad()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.many(every=4)
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("parts", ["all", "softmax", "two recurrences"])
def test_gradients_are_those_of_stored_activations(build, parts, monkeypatch):
    dropped = {"attn_pdrop": 0.2, "resid_pdrop": 0.2, "embd_pdrop": 0.0} if build is tiny_gpt2 else {}
    if build is tiny_llama and parts == "softmax":
        dropped = {"attention_dropout": 0.3}
    model = terraformer(build(num_hidden_layers=3, **dropped).double(), **PARTS[parts]).train()
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    loss, found = loss_and_gradients(model, attention_mask=mask, use_cache=False)
    monkeypatch.setattr(reversible_layers, "reversible_step", stored)
    wanted, expected = loss_and_gradients(model, attention_mask=mask, use_cache=False)
    assert loss == pytest.approx(wanted, abs=1e-11)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-3)])
def test_the_inverse_restores_the_inputs(dtype, bound):
    model = terraformer(tiny_llama(num_hidden_layers=6).to(dtype))
    given, layers = {}, layers_of(model)
    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(
            lambda m, args, kwargs, number=number: given.__setitem__(number, kwargs), with_kwargs=True
        )
    with torch.no_grad():
        model(IDS, use_cache=False)
        branches = [layer.branches(given[number])[:2] for number, layer in enumerate(layers)]
        first = second = model.model.embed_tokens(IDS)
        inputs = []
        for f, g in branches:
            inputs.append((first, second))
            first = first + f(second)
            second = second + g(first)
        logits = model.lm_head(model.model.norm((first + second) / 2))
        torch.testing.assert_close(model(IDS, use_cache=False).logits, logits, rtol=1e-4, atol=bound)
        for (f, g), (one, other) in zip(reversed(branches), reversed(inputs), strict=True):
            second = second - g(first)
            first = first - f(second)
            torch.testing.assert_close(first, one, rtol=0, atol=bound)
            torch.testing.assert_close(second, other, rtol=0, atol=bound)


@pytest.mark.parametrize("reversible", [True, False])
def test_memory_of_activations_does_not_grow_with_depth(reversible):
    sizes = []
    for layers in (4, 32):
        model = terraformer(tiny_llama(), layers=layers, reversible=reversible).train()
        weights, saved = {p.data_ptr() for p in model.parameters()}, {}

        def pack(tensor, saved=saved, weights=weights):
            if tensor.data_ptr() not in weights:
                saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(IDS, labels=IDS, use_cache=False).loss
        sizes.append(sum(saved.values()))
        loss.backward()
    assert (sizes[1] == sizes[0]) if reversible else (sizes[1] > 6 * sizes[0])


def test_what_reversible_layers_cannot_do_is_refused():
    model = terraformer(tiny_llama()).train()
    name = "activation_checkpointing_enable"  # its name since 5.24
    enable = getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")
    with pytest.raises(ValueError, match=r"does not support (gradient|activation) checkpointing"):
        enable()
    cache = model(IDS)[compat.CACHE]
    with pytest.raises(ValueError, match="no gradient for tokens behind a cache"):
        model(IDS[:, :1], **{compat.CACHE: cache})
    plain = terraformer(tiny_llama(), reversible=False).train()
    getattr(plain, name if hasattr(plain, name) else "gradient_checkpointing_enable")()


# -- decoding and padding ---------------------------------------------------------------------------------------------
@pytest.mark.many(every=4)
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("parts", list(PARTS))
def test_decoding_is_the_full_forward(build, parts):
    model = terraformer(build().double(), **PARTS[parts])
    with torch.no_grad():
        full, made, cache = model(IDS).logits, [], None
        for begin, end in ((0, 6), (6, 7), (7, 8), (8, 12), (12, 13), (13, 19)):
            out = model(IDS[:, begin:end], use_cache=True, **{compat.CACHE: cache})
            cache = out[compat.CACHE]
            made.append(out.logits)
    assert full.std() > 0.1
    torch.testing.assert_close(torch.cat(made, 1), full, rtol=0, atol=1e-10)


def test_generate_with_beams_chooses_the_tokens_of_a_model_without_cache():
    model = terraformer(tiny_llama().double())
    given = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "num_beams": 3}
    assert torch.equal(model.generate(IDS, **given), model.generate(IDS, use_cache=False, **given))
    with torch.no_grad():
        cache = model(IDS, use_cache=True)[compat.CACHE]
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(-1)


@pytest.mark.parametrize("parts", ["all", "softmax"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_is_the_row_alone_whatever_the_padding_is(parts, side):
    model = terraformer(tiny_llama().double(), **PARTS[parts])
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    mask = mask if side == "left" else mask.flip(1)
    own, places = mask[0].bool(), (mask.cumsum(1) - 1).clamp_min(0)
    other = IDS.clone()
    other[0, ~own] = 7
    with torch.no_grad():
        found = model(IDS, attention_mask=mask, position_ids=places).logits[0, own]
        assert torch.equal(found, model(other, attention_mask=mask, position_ids=places).logits[0, own])
        torch.testing.assert_close(found, model(IDS[:1, own]).logits[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("parts", ["all", "softmax"])
def test_documents_of_packed_rows_do_not_read_each_other(parts):
    model = terraformer(tiny_llama().double(), **PARTS[parts])
    places = torch.tensor([[*range(7), *range(8), *range(4)]])
    with torch.no_grad():
        packed = model(IDS[:1], position_ids=places, use_cache=False).logits[0]
        alone = [model(IDS[:1, a:b], use_cache=False).logits[0] for a, b in ((0, 7), (7, 15), (15, 19))]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=0, atol=1e-10)


# -- building ---------------------------------------------------------------------------------------------------------
def test_the_model_is_built_from_scratch_of_the_decoders_sizes():
    step = {"technique": "terraformer", "block": 4, "chunk": 4, "buckets": [4], "layers": 5}
    one, other = (hf_optim.optimize(tiny_llama(seed=seed), [step]) for seed in (0, 1))
    again = hf_optim.optimize(tiny_llama(), [{**step, "seed": 1}])
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert not torch.equal(next(one.parameters()), next(again.parameters()))
    assert len(layers_of(one)) == one.config.num_hidden_layers == 5
    assert one.get_input_embeddings().weight.shape == tiny_llama().get_input_embeddings().weight.shape
    parts = {module for layer in layers_of(one) for module in (type(layer.mlp.layer).__name__,)}
    assert parts == {"RecalledSparseFFN"}
    assert not any(isinstance(module, SparseFFN) for module in terraformer(tiny_llama(), sparse_ffn=False).modules())


def test_models_and_settings_that_do_not_fit_are_refused():
    with pytest.raises(ModelError, match=r"blocks of 5 units do not divide the 48 units .* one of \[1, 2, 3, 4"):
        terraformer(tiny_llama(), block=5)
    with pytest.raises(ModelError, match="3 modules do not divide the 32 features"):
        terraformer(tiny_llama(), modules=3)
    with pytest.raises(ModelError, match="is not a decoder"):
        terraformer(tiny_bert())
    with pytest.raises(ModelError, match="a norm, attention, a norm and a feed-forward layer"):
        terraformer(tiny_opt())
    with pytest.raises(ModelError, match="rank of the controller"):
        terraformer(tiny_llama(), rank=64)
    with pytest.raises(ModelError, match="factors of the number of buckets"):
        terraformer(tiny_llama(), buckets=[3])
    windowed = AutoModelForCausalLM.from_config(MistralConfig(**DECODER, sliding_window=6))
    with pytest.raises(ModelError, match=r"sees a sliding window in some layers, .* set lsh: false"):
        terraformer(windowed)
    with pytest.raises(RecipeError):
        terraformer(tiny_llama(), recurrence=-1)


def test_the_stock_trainer_trains_it(tmp_path):
    model = terraformer(tiny_llama())
    args = TrainingArguments(
        str(tmp_path), max_steps=12, learning_rate=1e-2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        save_strategy="no", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=args, train_dataset=[{"input_ids": row, "labels": row} for row in IDS])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]


RELOAD = """
    import torch
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained({folder!r}, trust_remote_code=True).eval()
    ids = torch.tensor({ids})
    with torch.no_grad():
        torch.save(model(ids).logits, {folder!r} + "/logits.pt")
    torch.save(model.generate(ids, max_new_tokens=7, do_sample=False, num_beams=2), {folder!r} + "/tokens.pt")
    torch.manual_seed(6)
    model.train()
    model(ids, labels=ids, use_cache=False).loss.backward()
    torch.save([p.grad for p in model.parameters()], {folder!r} + "/gradients.pt")
"""


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_a_checkpoint_needs_no_hf_optim(build, tmp_path, stock_python):
    model = terraformer(build())
    model.save_pretrained(tmp_path)
    done = stock_python.copy(textwrap.dedent(RELOAD.format(folder=str(tmp_path), ids=IDS.tolist())))
    assert done.status == 0, done.err
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), model(IDS).logits)
    tokens = model.generate(IDS, max_new_tokens=7, do_sample=False, num_beams=2)
    assert torch.equal(torch.load(tmp_path / "tokens.pt"), tokens)
    loss_and_gradients(model.train(), use_cache=False)
    for found, parameter in zip(torch.load(tmp_path / "gradients.pt"), model.parameters(), strict=True):
        torch.testing.assert_close(found, parameter.grad, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", TERRAFORMER_SETTINGS)
def test_settings_are_all_stored_and_all_required(name, tmp_path):
    terraformer(tiny_llama()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert set(config["attention_pattern"]) == set(TERRAFORMER_SETTINGS)
    del config["attention_pattern"][name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="terraformer needs the settings"):
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
