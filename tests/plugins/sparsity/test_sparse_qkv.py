"""Sparse projections against loops, the paper's theorem and counts, in decoding, under padding, and in checkpoints."""

from __future__ import annotations

import json
import textwrap
import warnings
from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny_bert, tiny_gpt2, tiny_llama, tiny_mixtral, tiny_opt, tiny_qwen2, tiny_t5
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaModel, StaticCache

import hf_optim
from hf_optim import ModelError
from hf_optim.toolkit import compat
from hf_optim.toolkit.attention import attentions
from hf_optim_plugins.sparsity._held_parts import TokenRows, rows_of
from hf_optim_plugins.sparsity._sparse_qkv_modules import ConvolvedOutput, Multiplicative, QkvSettings, SparseQKV

IDS = torch.randint(3, 60, (2, 14), generator=torch.Generator().manual_seed(0))
DECODERS = [tiny_llama, tiny_gpt2, tiny_opt, tiny_qwen2]


def sparse(model, *more, **fields):
    return hf_optim.optimize(model, [{"technique": "sparse_qkv", "modules": 4, **fields}, *more])


def settings(**fields):
    given = {"modules": 4, "kernel": 3, "concat": "none", "output": "none", "share_qk": False, "width": 24}
    return QkvSettings.read({**given, "query": 24, "key": 24, **fields})


def projections(seed=0, **fields):
    torch.manual_seed(seed)
    part = SparseQKV(settings(**fields)).double()
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.normal_()
    return part


def looped(part, hidden, valid, document):
    """Compute one row ``[N, d]`` by the equations, place by place."""
    own = part.settings
    count, modules = len(hidden), own.modules
    gating, projection = part.shared.gating, part.shared.projection
    made = torch.zeros(count, modules, own.width // modules, dtype=hidden.dtype)
    for t in range(count):
        if valid[t]:
            for s in range(modules):
                made[t, s] = (hidden[t] * gating[s]) @ projection + part.shared.bias.view(modules, -1)[s]
    shown = torch.where(valid[:, None], hidden, 0)
    if own.concat == "fixed":
        wider = torch.stack(
            [torch.cat([made[:, s], shown.view(count, modules, -1)[:, s]], -1) for s in range(modules)], 1
        )
    elif own.concat == "original":
        wider = torch.cat([made.flatten(1), shown], 1).view(count, modules, -1)
    else:
        wider = made

    def convolved(conv, read):
        tokens, sides = conv.weight.shape[2:]
        out = conv.bias.expand(count, modules, -1).clone()
        for t in range(count):
            for s in range(modules):
                for back in range(tokens):
                    for side in range(sides):
                        at, beside = t - back, s + side - sides // 2
                        if at >= 0 and document[at] == document[t] and 0 <= beside < modules:
                            out[t, s] += conv.weight[:, :, tokens - 1 - back, side] @ read[at, beside]
        return out.flatten(1)

    key = None if part.key is None else convolved(part.key, made)
    return convolved(part.query, made), key, convolved(part.value, wider)


@pytest.mark.parametrize(
    "fields",
    [{}, {"concat": "fixed"}, {"concat": "original"}, {"share_qk": True}, {"kernel": 1}, {"kernel": 4, "key": 8},
     {"modules": 1}],
)  # fmt: skip
@pytest.mark.parametrize("rows", ["plain", "padded", "packed"])
def test_projections_are_those_of_the_equations(fields, rows):
    part = projections(**fields)
    hidden = torch.randn(2, 7, 24, dtype=torch.float64)
    valid, documents = torch.ones(2, 7, dtype=torch.bool), torch.zeros(2, 7, dtype=torch.long)
    if rows == "padded":
        valid[0, :2], valid[1, 4:] = False, False
    elif rows == "packed":
        documents[0, 3:], documents[1, 1:], documents[1, 3:] = 1, 1, 2
    given = TokenRows(0, valid if rows == "padded" else None, documents if rows == "packed" else None)
    found = part(hidden, given)[:3]
    for number in range(2):
        expected = looped(part, hidden[number], valid[number], documents[number])
        for one, other in zip(found, expected, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one[number], other, rtol=0, atol=1e-11)


@pytest.mark.parametrize("rows", ["plain", "padded", "packed"])
def test_an_output_by_a_convolution_is_that_of_the_equations(rows):
    torch.manual_seed(0)
    part, hidden = ConvolvedOutput(settings(output="multconv")).double(), torch.randn(2, 7, 24, dtype=torch.float64)
    valid, documents = torch.ones(2, 7, dtype=torch.bool), torch.zeros(2, 7, dtype=torch.long)
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.normal_()
    if rows == "padded":
        valid[0, :2], valid[1, 4:] = False, False
    elif rows == "packed":
        documents[0, 3:], documents[1, 1:], documents[1, 3:] = 1, 1, 2
    part.before.leave(
        (TokenRows(0, valid if rows == "padded" else None, documents if rows == "packed" else None), None)
    )
    found = part(hidden)
    like = SimpleNamespace(settings=settings(), shared=part.product, query=part.mix, key=None, value=part.mix)
    for number in range(2):
        expected = looped(like, hidden[number], valid[number], documents[number])[0]
        torch.testing.assert_close(found[number], expected, rtol=0, atol=1e-11)
    assert part.after.take().shape == (2, 2, 4, 6)
    with pytest.raises(ValueError, match="is read twice, or by another module"):
        part(hidden)


def test_many_tokens_at_once_are_few_tokens_one_by_one():
    part = projections(concat="fixed")
    hidden = torch.randn(3, 9, 24, dtype=torch.float64)
    whole, held, parts = part(hidden, TokenRows()), None, []
    for begin, end in ((0, 1), (1, 2), (2, 6), (6, 7), (7, 9)):
        *made, held = part(hidden[:, begin:end], TokenRows(begin), held)
        parts.append(made)
    for number in range(3):
        found = torch.cat([each[number] for each in parts], 1)
        torch.testing.assert_close(found, whole[number], rtol=0, atol=1e-12)


def test_gradients_are_those_of_finite_differences():
    part = projections(modules=2, width=4, query=4, key=4, concat="fixed")
    hidden = torch.randn(1, 10, 4, dtype=torch.float64, requires_grad=True)  # more tokens than the factors are kept for
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2, 2]])
    for rows in (TokenRows(), TokenRows(0, None, documents)):
        torch.autograd.gradcheck(lambda h, *_, rows=rows: part(h, rows)[:3], (hidden, *part.parameters()))


def test_the_multiplicative_layer_represents_every_permutation():
    width, modules = 24, 4
    layer = Multiplicative(modules, width, width).double()
    for seed in range(5):
        order = torch.randperm(width, generator=torch.Generator().manual_seed(seed))
        place = order.argsort()  # where the input i lands
        with torch.no_grad():
            layer.bias.zero_()
            layer.gating.copy_(place // (width // modules) == torch.arange(modules)[:, None])
            layer.projection.copy_(place[:, None] % (width // modules) == torch.arange(width // modules))
            for rows in (1, 50):  # both ways to compute it
                hidden = torch.randn(rows, width, dtype=torch.float64)
                assert torch.equal(layer(hidden).flatten(1), hidden[:, order])


@pytest.mark.parametrize(("modules", "width"), [(4, 32), (8, 32), (16, 256)])
def test_weights_are_as_many_as_the_paper_says(modules, width):
    part = SparseQKV(settings(modules=modules, width=width, query=width, key=width))
    size = width // modules
    weights = sum(p.numel() for name, p in part.named_parameters() if not name.endswith("bias"))
    assert weights == modules * width + width * size + (9 + 9 + 3) * size * size
    assert sum(p.numel() for p in part.parameters()) - weights == width + 3 * size
    layer = Multiplicative(16, 512, 512)
    assert layer.gating.std().item() == pytest.approx(0.5, rel=0.05)
    bound = (6 / (512 + 32)) ** 0.5
    assert 0.95 * bound < layer.projection.abs().max().item() <= bound
    assert 0 < layer.bias.abs().max().item() < 1e-5


def hooked(model, part_of):
    """Let the stock projections of a model return what loops compute."""
    for number, module in enumerate(attentions(model)):
        held = {}

        def compute(projection, args, output, which, part=part_of[number], held=held):
            if which == 0:
                every = [
                    looped(part, row, torch.ones(len(row), dtype=torch.bool), torch.zeros(len(row))) for row in args[0]
                ]
                held["made"] = [torch.stack(each) for each in zip(*every, strict=True)]
            return held["made"][which]

        for which, name in enumerate(("q_proj", "k_proj", "v_proj")):
            module.get_submodule(name).register_forward_hook(
                lambda m, args, out, which=which, compute=compute: compute(m, args, out, which)
            )
        module.o_proj.register_forward_hook(lambda m, args, out: args[0])


def test_a_model_computes_stock_attention_of_these_projections():
    model, dense = sparse(tiny_llama().double()), tiny_llama().double()
    with torch.no_grad():
        hooked(dense, [module.sparse_qkv for module in attentions(model)])
        torch.testing.assert_close(model(IDS).logits, dense(IDS).logits, rtol=0, atol=1e-11)


# -- decoding ---------------------------------------------------------------------------------------------------------
@pytest.mark.many
@pytest.mark.parametrize("build", DECODERS)
@pytest.mark.parametrize(
    "fields", [{}, {"concat": "fixed", "output": "mult"}, {"output": "multconv"}, {"kernel": 1, "output": "dense"}]
)
def test_decoding_is_the_full_forward(build, fields):
    model = sparse(build().double(), **fields)
    with torch.no_grad():
        full, parts, cache = model(IDS).logits, [], None
        for begin, end in ((0, 5), (5, 6), (6, 7), (7, 11), (11, 14)):
            out = model(IDS[:, begin:end], use_cache=True, **{compat.CACHE: cache})
            cache = out[compat.CACHE]
            parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=0, atol=1e-11)


def test_generate_with_beams_chooses_the_tokens_of_a_model_without_cache():
    model = sparse(tiny_llama().double())
    given = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "num_beams": 3, "num_return_sequences": 2}
    found = model.generate(IDS[:, :6], **given)
    assert torch.equal(found, model.generate(IDS[:, :6], use_cache=False, **given))


def test_it_compiles_without_a_warning_of_cached_functions():
    model = sparse(tiny_llama(num_hidden_layers=1))
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        found = torch.compile(model, backend="eager")(IDS, use_cache=False).logits
    assert not [str(each.message) for each in caught if "lru_cache" in str(each.message)]
    torch.testing.assert_close(found, model(IDS, use_cache=False).logits)


def test_the_state_follows_the_rows_of_a_cache():
    model = sparse(tiny_llama().double())
    with torch.no_grad():
        cache = model(IDS[:, :9], use_cache=True)[compat.CACHE]
        cache.reorder_cache(torch.tensor([1, 0]))
        swapped = model(IDS[[1, 0], 9:10], **{compat.CACHE: cache}).logits
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0]))
        chosen = model(IDS[[0, 1], 10:11], **{compat.CACHE: cache}).logits
        full = model(IDS).logits
    torch.testing.assert_close(swapped[:, 0], full[[1, 0], 9], rtol=0, atol=1e-11)
    torch.testing.assert_close(chosen[:, 0], full[:, 10], rtol=0, atol=1e-11)
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(-1)


def test_an_output_by_a_convolution_trains_and_comes_back(tmp_path):
    step = {"technique": "sparse_qkv", "modules": 4, "output": "multconv", "distill_steps": 2}
    model = hf_optim.optimize(tiny_llama(), [step], calibration=IDS)
    model.train()(IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.eval().save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_caches_that_cannot_hold_the_state_are_refused():
    model = sparse(tiny_llama())
    with pytest.raises(ValueError, match="leave cache_implementation out"):
        model.generate(IDS, max_new_tokens=2, do_sample=False, cache_implementation="static")
    with pytest.raises(ValueError, match="StaticLayer cannot hold"):
        model(IDS, **{compat.CACHE: StaticCache(config=model.config, max_cache_len=20)})
    foreign = tiny_llama()(IDS[:, :4], use_cache=True)[compat.CACHE]
    with pytest.raises(ValueError, match="the cache is of another model"):
        model(IDS[:, 4:5], **{compat.CACHE: foreign})


# -- padding and documents --------------------------------------------------------------------------------------------
def positions(mask):
    return (mask.cumsum(1) - 1).clamp_min(0)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_is_the_row_alone_whatever_the_padding_is(build, side):
    model = sparse(build().double(), concat="fixed")
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    if side == "right":
        mask = mask.flip(1)
    own = mask[0].bool()
    with torch.no_grad():
        found = model(IDS, attention_mask=mask, position_ids=positions(mask)).logits[0, own]
        other = IDS.clone()
        other[0, ~own] = 7
        same = model(other, attention_mask=mask, position_ids=positions(mask)).logits[0, own]
        alone = model(IDS[:1, own]).logits[0]
    assert torch.equal(found, same)
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-11)


def test_generate_from_padded_rows_is_generate_from_each_alone():
    model = sparse(tiny_llama().double())
    mask = torch.ones_like(IDS)
    mask[0, :6] = 0
    given = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    found = model.generate(IDS, attention_mask=mask, **given)[:, 14:]
    assert torch.equal(found[0], model.generate(IDS[:1, 6:], **given)[0, 8:])
    assert torch.equal(found[1], model.generate(IDS[1:], **given)[0, 14:])


def test_padding_between_tokens_is_zero_for_its_neighbours():
    model = sparse(tiny_llama().double())
    mask = torch.ones_like(IDS)
    mask[0, 6] = 0
    with torch.no_grad():
        found = model(IDS, attention_mask=mask).logits[0]
        other = IDS.clone()
        other[0, 6] = 7
        assert torch.equal(found[mask[0].bool()], model(other, attention_mask=mask).logits[0, mask[0].bool()])


def test_documents_of_packed_rows_do_not_read_each_other():
    model = sparse(tiny_llama().double())
    places = torch.tensor([[*range(5), *range(6), *range(3)]])
    with torch.no_grad():
        packed = model(IDS[:1], position_ids=places, use_cache=False).logits[0]
        alone = [model(IDS[:1, a:b], use_cache=False).logits[0] for a, b in ((0, 5), (5, 11), (11, 14))]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=0, atol=1e-11)


def test_masks_that_do_not_tell_padding_are_refused():
    model = sparse(tiny_llama())
    with pytest.raises(ValueError, match="a mask of pairs does not say"):
        model(IDS, attention_mask=torch.ones(2, 1, 14, 14, dtype=torch.bool))
    cache = model(IDS[:, :6], use_cache=True)[compat.CACHE]
    with pytest.raises(ValueError, match="has 1 columns for 7 tokens"):
        model(IDS[:, 6:7], attention_mask=torch.ones(2, 1, dtype=torch.long), **{compat.CACHE: cache})
    with pytest.raises(ValueError, match="packed rows need position_ids"):
        rows_of({"input_ids": IDS, "cu_seq_lens_q": torch.tensor([0, 14])})
    with pytest.raises(ValueError, match="called without its model"):
        model.model.layers[0].self_attn(torch.zeros(1, 2, 32), None, None)


# -- models -----------------------------------------------------------------------------------------------------------
def test_models_that_do_not_fit_are_refused():
    with pytest.raises(ModelError, match=r"3 modules do not divide the 32 features .* one of \[1, 2, 4, 8, 16\]"):
        sparse(tiny_llama(), modules=3)
    with pytest.raises(ModelError, match="32 modules do not divide the 16 features of all keys"):
        sparse(tiny_llama(), modules=32)
    with pytest.raises(ModelError, match="fewer key heads"):
        sparse(tiny_llama(), share_qk=True)
    with pytest.raises(ModelError, match="Set output to dense"):
        sparse(tiny_llama(head_dim=16))
    with pytest.raises(ModelError, match="is not a decoder"):
        sparse(tiny_bert())
    with pytest.raises(ModelError, match="cross-attention"):
        sparse(tiny_t5())


def test_other_forms_of_decoders_are_converted():
    shared = sparse(tiny_llama(num_key_value_heads=4), share_qk=True)
    assert attentions(shared)[0].sparse_qkv.key is None
    assert sparse(tiny_mixtral())(IDS).logits.isfinite().all()
    assert sparse(tiny_llama(head_dim=16), output="dense")(IDS).logits.isfinite().all()
    headless = sparse(LlamaModel(tiny_llama().config).double().eval())
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    with torch.no_grad():
        found = headless(IDS, attention_mask=mask).last_hidden_state[0, 4:]
        torch.testing.assert_close(found, headless(IDS[:1, 4:]).last_hidden_state[0], rtol=0, atol=1e-6)


def test_projections_learn_those_of_the_dense_model():
    batches = [{"input_ids": IDS[:, shift : shift + 10], "attention_mask": torch.ones(2, 10)} for shift in range(4)]
    step = {"technique": "sparse_qkv", "modules": 4, "distill_steps": 60, "distill_rate": 0.02}
    model = hf_optim.optimize(tiny_llama(), [step], batches)
    figures = hf_optim.run_of(model).record.steps["0"]["distillation"]
    assert figures["steps"] == 60
    assert figures["after"] < 0.6 * figures["before"]
    assert not any(module.sparse_qkv._forward_hooks for module in attentions(model))
    assert type(model.model.layers[0].self_attn.o_proj).__name__ == "Unchanged"


def test_gradients_under_checkpointing_are_the_same():
    model, found = sparse(tiny_llama().double()).train(), []
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    for checkpointing in (False, True):
        if checkpointing:
            name = "activation_checkpointing_enable"  # its name since 5.24
            getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")()
        model.zero_grad()
        model(IDS, attention_mask=mask, labels=IDS, use_cache=False).loss.backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


RELOAD = """
    import torch
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained({folder!r}, trust_remote_code=True).eval()
    ids = torch.tensor({ids})
    with torch.no_grad():
        torch.save(model(ids).logits, {folder!r} + "/logits.pt")
    torch.save(model.generate(ids, max_new_tokens=7, do_sample=False, num_beams=2), {folder!r} + "/tokens.pt")
"""


@pytest.mark.many
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_a_checkpoint_needs_no_hf_optim(build, tmp_path, stock_python):
    model = sparse(build(), concat="fixed")
    model.save_pretrained(tmp_path)
    done = stock_python.copy(textwrap.dedent(RELOAD.format(folder=str(tmp_path), ids=IDS.tolist())))
    assert done.status == 0, done.err
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), model(IDS).logits)
    assert torch.equal(
        torch.load(tmp_path / "tokens.pt"), model.generate(IDS, max_new_tokens=7, do_sample=False, num_beams=2)
    )


@pytest.mark.parametrize("change", [{"modules": 3}, {"kernel": None}, {"concat": "both"}, {"other": 1}])
def test_damaged_settings_are_refused(change, tmp_path):
    sparse(tiny_llama()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert set(config["sparse_qkv"]) == set(QkvSettings.__dataclass_fields__)
    config["sparse_qkv"] = {k: v for k, v in {**config["sparse_qkv"], **change}.items() if v is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"sparse projections|modules do not divide"):
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)


def test_one_token_and_many_tokens_use_the_same_kernel():
    part = projections()
    hidden = torch.randn(1, 3, 24, dtype=torch.float64)
    made = functional.pad(part.shared(hidden), (0, 0, 0, 0, 2, 0))
    whole = part.query(made, TokenRows())
    last = part.query(made[:, 2:], TokenRows())
    torch.testing.assert_close(last[:, 0], whole[:, 2], rtol=0, atol=1e-12)


@pytest.mark.parametrize("small", [True, False])
def test_values_begin_small_beside_the_embeddings_of_the_model(small):
    part = attentions(sparse(tiny_llama(hidden_size=128, num_key_value_heads=4), small_start=small))[0].sparse_qkv
    torch.manual_seed(0)
    with torch.no_grad():
        value = part(torch.randn(4, 64, 128), TokenRows())[2]
    assert value.std().item() == pytest.approx(128 * 0.02**2 if small else (0.5 * 128 / 160) ** 0.5, rel=0.25)
