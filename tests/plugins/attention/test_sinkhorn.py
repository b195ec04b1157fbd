"""Models with sparse Sinkhorn attention: against a dense model whose attention is the formula, and as users do."""

from __future__ import annotations

import ast
import json
import textwrap
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_bert, tiny_gpt2, tiny_llama, tiny_opt, tiny_t5
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache, Trainer, TrainingArguments
from transformers.masking_utils import AttentionMaskInterface

import hf_optim
from hf_optim import CheckpointError, ModelError, RecipeError
from hf_optim.toolkit import compat
from hf_optim.toolkit.attention import attentions
from hf_optim_plugins.attention._sinkhorn_attention import sorted_with_padding
from hf_optim_plugins.attention.sinkhorn import Sinkhorn

IDS = torch.randint(3, 60, (2, 23), generator=torch.Generator().manual_seed(0))
BATCHES = [{"input_ids": row} for row in IDS.split(1)] * 4
DECODERS = [tiny_llama, tiny_gpt2, tiny_opt]


def converted(model, *more, trained=True, **fields):
    """Return the model with attention to sorted blocks, whose networks are no longer those of the beginning."""
    model = hf_optim.optimize(model, [{"technique": "sinkhorn", "block": 4, **fields}, *more])
    if trained:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if ".learned." in name:
                    weight += 0.5 * torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight)
    return model


def networks(model):
    return [module.learned.sorter.network for module in attentions(model)]


def prefix_of(part, i, size, settings):
    """Return what causal block i asks by, of ``[n, D]``."""
    if settings["prefix"] == "first":
        return part[i * size]
    total = part[: i * size + 1].sum(0)
    return total / (i * size + 1) if settings["summary"] == "mean" else total


def summary_of(part, i, size, settings):
    block = part[i * size : (i + 1) * size]
    return block.mean(0) if settings["summary"] == "mean" else block.sum(0)


def scores_of(network, asked, own, held, g):
    """Return R ``[N, N]`` of summaries, lists of ``[D]``, by the weights of head g."""
    asked, own, held = (torch.stack(part) for part in (asked, own, held))
    if hasattr(network, "inner"):
        inner = (torch.cat([asked, own], -1) @ network.inner[g] + network.inner_bias[g]).clamp_min(0)
        return (inner @ network.outer[g] + network.outer_bias[g])[:, : len(held)]
    return (asked @ network.query[g]) @ (held @ network.key[g]).T / asked.shape[-1] ** 0.5


def oracle_attention(settings, weights):
    size = settings["block"]

    def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        shared, length = query.shape[1] // key.shape[1], query.shape[2]
        blocks = -(-length // size)
        out = torch.zeros_like(query)
        for r in range(len(query)):
            for g in range(key.shape[1]):
                heads = range(g * shared, (g + 1) * shared)
                q = query[r, list(heads)].mean(0)
                k, v = key[r, g], value[r, g]
                summary = [[summary_of(part, i, size, settings) for i in range(blocks)] for part in (q, k)]
                asked, own, held = summary[0], summary[1], summary[1]
                if module.is_causal:
                    asked, own = ([prefix_of(part, i, size, settings) for i in range(blocks)] for part in (q, k))
                table = scores_of(weights[module.layer_idx], asked, own, held, g)
                if settings["positive"] == "relu":
                    table = (table.clamp_min(0) + 1e-6).log()
                table = (table / settings["temperature"]).exp()
                if module.is_causal:
                    table = table.tril(-1)
                    table = table / table.sum(1, keepdim=True).clamp_min(1e-300)
                else:
                    for _ in range(settings["iterations"]):
                        table = table / table.sum(1, keepdim=True)
                        table = table / table.sum(0, keepdim=True)
                brought = []  # of each block: keys, values, and the share of tokens in each place
                for i in range(blocks):
                    rows = []
                    for place in range(size):
                        js = [j for j in range(blocks) if j * size + place < length]
                        if float(table[i, js].detach().sum()) > 0:
                            share = table[i, js].sum() / table[i].sum()
                            each = table[i, js] / share
                            at = [j * size + place for j in js]
                            rows.append(((each[:, None] * k[at]).sum(0), (each[:, None] * v[at]).sum(0), share))
                    brought.append(rows)
                for i in range(length):
                    b = i // size
                    last = i + 1 if module.is_causal else length
                    near = [] if settings["cut"] else list(range(b * size, min((b + 1) * size, last)))
                    rows = [(k[j], v[j], torch.ones((), dtype=k.dtype)) for j in near]
                    which = range(min(settings["cut"], blocks)) if settings["cut"] else [b]
                    if blocks > 1 or settings["cut"]:
                        rows += [row for n in which for row in brought[n]]
                    keys, values, shares = (torch.stack([row[n] for row in rows]) for n in range(3))
                    for h in heads:
                        each = ((keys @ query[r, h, i]) * scale).exp() * shares
                        out[r, h, i] = (each[:, None] * values).sum(0) / each.sum()
        return out.transpose(1, 2), None

    return attention


@pytest.fixture
def dense_oracle():
    """Run a dense model with the attention of the oracle."""
    name = "tests_sinkhorn_oracle"

    def run(model, ids, settings, weights):
        AttentionInterface.register(name, oracle_attention(settings, weights))
        AttentionMaskInterface.register(name, lambda **kwargs: None)
        model.set_attn_implementation(name)
        return model(ids).logits

    yield run
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop(name, None)


CASES = [
    (tiny_llama, {}),
    (tiny_gpt2, {"sorter": "linear", "prefix": "cumulative", "summary": "sum"}),
    (tiny_opt, {"prefix": "cumulative", "positive": "relu"}),
    (tiny_bert, {}),
    (tiny_bert, {"sorter": "linear", "summary": "sum", "block": 5}),
    (tiny_bert, {"cut": 2, "iterations": 3}),
]


@pytest.mark.many
@pytest.mark.parametrize(("build", "fields"), CASES)
def test_outputs_and_gradients_are_those_of_the_oracle(build, fields, dense_oracle):
    model, dense, ids = converted(build().double(), **fields), build().double(), IDS[:, :14]
    found = model(ids).logits
    weights = [{n: p.detach().clone().requires_grad_() for n, p in each.named_parameters()} for each in networks(model)]
    apart = [type("Weights", (), each) for each in weights]
    expected = dense_oracle(dense, ids, model.config.attention_pattern, apart)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    factor = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (found * factor).sum().backward()
    (expected * factor).sum().backward()
    pairs = [
        (p.grad, own[n].grad)
        for each, own in zip(networks(model), weights, strict=True)
        for n, p in each.named_parameters()
    ]
    named = dict(model.named_parameters())
    pairs += [(named[name].grad, p.grad) for name, p in dense.named_parameters() if p.grad is not None]
    assert any(bool(own.abs().max() > 1e-6) for own, _ in pairs[:2])  # the sorting learns
    for own, other in pairs:
        scale = other.abs().max().clamp_min(1.0)
        torch.testing.assert_close(own / scale, other / scale, rtol=0, atol=1e-10)


@pytest.mark.many
@pytest.mark.parametrize(
    ("build", "fields"), [(tiny_llama, {}), (tiny_opt, {"sorter": "linear"}), (tiny_bert, {}), (tiny_bert, {"cut": 1})]
)
def test_a_block_with_all_tokens_is_full_attention(build, fields):
    model = converted(build().double(), **{**fields, "block": 23})
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, build().double()(IDS).logits, rtol=0, atol=1e-12)
        assert not torch.allclose(converted(build().double(), **fields)(IDS).logits, model(IDS).logits, atol=1e-3)


@pytest.mark.many
@pytest.mark.parametrize("fields", [{}, {"sorter": "linear", "prefix": "cumulative"}])
@pytest.mark.parametrize("build", DECODERS)
def test_nothing_comes_from_the_future(build, fields):
    model = converted(build().double(), **fields)
    with torch.no_grad():
        before = model(IDS[:1]).logits
        for place in range(23):
            other = IDS[:1].clone()
            other[:, place] = (other[:, place] + 1) % 60
            moved = (model(other).logits - before).abs().amax(-1)[0]
            assert torch.equal(moved[:place], torch.zeros(place, dtype=torch.float64))
            assert moved[place] > 1e-6


@pytest.mark.many
@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize(
    ("build", "fields"), [(tiny_llama, {"prefix": "cumulative"}), (tiny_bert, {}), (tiny_bert, {"cut": 3})]
)
def test_a_padded_row_is_that_row_alone(build, fields, side):
    model = converted(build().double(), **fields)
    part = {"left": slice(8, 23), "right": slice(0, 13), "both": slice(4, 18)}[side]
    mask = torch.ones_like(IDS)
    mask[1] = 0
    mask[1, part] = 1
    extra = {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    body = model.base_model
    with torch.no_grad():
        found, alone = body(IDS, attention_mask=mask, **extra)[0], body(IDS[1:, part])[0][0]
        torch.testing.assert_close(found[1, part], alone, rtol=0, atol=1e-11)
        torch.testing.assert_close(found[0], body(IDS[:1])[0][0], rtol=0, atol=1e-11)


def test_packed_documents_are_rows_alone():
    model = converted(tiny_llama().double())
    places = torch.cat([torch.arange(11), torch.arange(12)])[None]
    with torch.no_grad():
        found = model(IDS[:1], position_ids=places, use_cache=False).logits[0]
        alone = torch.cat([model(IDS[:1, :11]).logits[0], model(IDS[:1, 11:]).logits[0]])
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-11)


# -- generation -------------------------------------------------------------------------------------------------------
@pytest.mark.many
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(
    ("build", "fields"), [(tiny_llama, {}), (tiny_opt, {"sorter": "linear", "prefix": "cumulative"})]
)
def test_generation_with_a_cache_is_generation_without(build, fields, beams):
    model = converted(build(), **fields)
    mask = torch.ones_like(IDS)
    mask[1, :9] = 0
    more = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "num_beams": beams}
    without = model.generate(IDS, use_cache=False, attention_mask=mask, **more)
    assert torch.equal(model.generate(IDS, attention_mask=mask, **more), without)


@pytest.mark.many
@pytest.mark.parametrize("counts", [(7, 16), (1, 1, 3, 18), (6, 1, 1, 1, 1, 1, 1, 5, 6)])
@pytest.mark.parametrize("fields", [{}, {"sorter": "linear", "prefix": "cumulative", "summary": "sum"}])
def test_parts_of_a_row_from_a_cache_are_the_row_in_one(counts, fields):
    model = converted(tiny_llama().double(), **fields)
    mask = torch.ones_like(IDS)
    mask[1, :5] = 0
    places = (mask.cumsum(1) - 1).clamp_min(0)
    cache, found, begin = DynamicCache(), [], 0
    with torch.no_grad():
        whole = model(IDS, attention_mask=mask, position_ids=places).logits
        for count in counts:
            end = begin + count
            given = {"attention_mask": mask[:, :end], "position_ids": places[:, begin:end], compat.CACHE: cache}
            found.append(model(IDS[:, begin:end], use_cache=True, **given).logits)
            begin = end
    torch.testing.assert_close(torch.cat(found, 1) * mask[..., None], whole * mask[..., None], rtol=0, atol=1e-11)


# -- training and checkpoints -----------------------------------------------------------------------------------------
def test_the_stock_trainer_trains_the_networks(tmp_path):
    model = converted(tiny_llama(), trained=False)
    before = [p.detach().clone() for each in networks(model) for p in each.parameters()]
    args = TrainingArguments(
        str(tmp_path), max_steps=2, learning_rate=1e-2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    Trainer(model=model, args=args, train_dataset=[{"input_ids": row, "labels": row} for row in IDS]).train()
    for old, new in zip(before, [p for each in networks(model) for p in each.parameters()], strict=True):
        assert not torch.equal(old, new)
    assert all(int(p) == 2 for name, p in model.state_dict().items() if name.endswith(".draws"))


@pytest.mark.parametrize("trains", ["all", "learned"])
def test_attention_learns_the_outputs_of_the_dense_one(trains):
    step = {"technique": "sinkhorn", "block": 4, "distill_steps": 16, "distill_rate": 3e-3, "distill_trains": trains}
    model = hf_optim.optimize(tiny_llama(), step, calibration=BATCHES)
    found = hf_optim.run_of(model).record.steps["0"]["distillation"]
    assert found["after"] < found["before"]
    kept = torch.equal(
        model.model.layers[0].self_attn.q_proj.weight, tiny_llama().model.layers[0].self_attn.q_proj.weight
    )
    assert kept == (trains == "learned")
    assert not torch.equal(networks(model)[0].query, torch.eye(8).expand(2, 8, 8))


def test_noise_moves_encoders_in_training_and_is_the_same_for_a_seed():
    losses = {}
    for seed, noise in ((0, 1.0), (0, 1.0), (1, 1.0), (0, 0.0)):
        model = converted(tiny_bert(), seed=seed, noise=noise).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        losses.setdefault((seed, noise), []).append(model(IDS).logits)
        quiet = model.eval()(IDS).logits
        assert torch.equal(quiet, model(IDS).logits)
        assert torch.allclose(quiet, losses[seed, noise][-1]) == (noise == 0.0)
    assert torch.equal(*losses[0, 1.0])
    assert not torch.allclose(losses[0, 1.0][0], losses[1, 1.0][0])


def test_small_shares_of_padded_places_are_finite_in_half_precision():
    weights = torch.tensor([[1e-9, 1 - 1e-9], [1 - 1e-9, 1e-9]]).expand(1, 1, 2, 2).clone().requires_grad_()
    part = torch.ones(1, 1, 2, 3, 4, dtype=torch.float16, requires_grad=True)
    valid = torch.tensor([[[True] * 3, [True, True, False]]])
    key, value, share = sorted_with_padding(weights, (part, part), valid)
    assert torch.equal(key, torch.ones_like(key))  # also where a token has a share of 1e-9
    (key.float().sum() + value.float().sum() + share.sum()).backward()
    assert part.grad.isfinite().all()
    assert weights.grad.isfinite().all()


def test_gradient_checkpointing_draws_the_same_noise():
    found = []
    for change in (False, True):
        model = converted(tiny_llama().double()).train()
        if change:
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        for shift in (0, 1):
            model(IDS + shift, labels=IDS, use_cache=False).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, part in found[0].items():
        torch.testing.assert_close(found[1][name], part, rtol=0, atol=1e-7)


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


@pytest.mark.parametrize(("build", "fields"), [(tiny_llama, {"sorter": "linear"}), (tiny_bert, {})])
def test_a_checkpoint_needs_no_hf_optim(build, fields, tmp_path, stock_python):
    model = converted(build(), **fields)
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


def test_a_checkpoint_without_a_network_is_refused(tmp_path):
    converted(tiny_llama()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[next(name for name in tensors if name.endswith("network.query"))]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"has no weights for 1 tensors of .*network\.query"):
        AutoModelForCausalLM.from_pretrained(tmp_path, optim_config="auto", trust_remote_code=True)


@pytest.mark.many
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block": 0}, "block=0, not a whole number from 1"),
        ({"iterations": 10**9}, "iterations=1000000000"),
        ({"temperature": 0}, "temperature='0', not a number from"),
        ({"sorter": "any"}, "sorter='any'"),
        ({"sorter": "linear"}, "blocks=0"),
        ({"cut": 1}, "shows all tokens the same blocks, later ones too"),
        ({"other": 1}, r"settings that it does not know: \['other'\]"),
    ],
)
def test_a_damaged_configuration_is_an_error(settings, message, tmp_path):
    converted(tiny_llama()).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["attention_pattern"] |= settings
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)(IDS)


# -- refusals ---------------------------------------------------------------------------------------------------------
def test_what_cannot_be_sorted_is_refused_and_unchanged():
    model = tiny_t5()
    with pytest.raises(ModelError, match=r"step 1 \(sinkhorn\): t5 has cross-attention"):
        converted(model)
    assert not any(hasattr(module, "learned") for module in model.modules())
    with pytest.raises(ModelError, match="is causal: a cut shows every token the same blocks"):
        converted(tiny_llama(), cut=2)
    with pytest.raises(RecipeError, match="sinkhorn"):
        converted(tiny_llama(), {"technique": "blockwise", "block": 4})
    linear = converted(tiny_llama(max_position_embeddings=16), sorter="linear")
    with pytest.raises(ValueError, match="for 4 blocks, and got a row of 6"):
        linear(IDS)


@pytest.mark.parametrize(
    "fields", [{"block": 0}, {"temperature": 0.0}, {"iterations": 0}, {"cut": -1}, {"sorter": "x"}]
)
def test_fields_are_checked(fields):
    with pytest.raises(RecipeError, match=next(iter(fields))):
        converted(tiny_llama(), **fields)


def test_no_name_of_the_stored_code_is_defined_twice():
    kinds = ast.FunctionDef, ast.ClassDef
    names = Counter(node.name for node in ast.parse(Sinkhorn.remote_code.source).body if isinstance(node, kinds))
    assert [name for name, count in names.items() if count > 1] == []
