"""Models with routing attention: against a dense model whose attention is computed by the formula, and as users do."""

from __future__ import annotations

import ast
import copy
import json
import textwrap
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_bert, tiny_gpt2, tiny_llama, tiny_opt, tiny_t5
from torch.nn import functional
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache, Trainer, TrainingArguments
from transformers.masking_utils import AttentionMaskInterface

import hf_optim
from hf_optim import CheckpointError, DataError, ModelError, RecipeError
from hf_optim.toolkit import compat
from hf_optim.toolkit.attention import attentions
from hf_optim_plugins.attention._centroids import fitted
from hf_optim_plugins.attention.routing_transformer import RoutingTransformer

IDS = torch.randint(3, 60, (2, 23), generator=torch.Generator().manual_seed(0))
BATCHES = [{"input_ids": row} for row in IDS.split(1)] * 4
DECODERS = [tiny_llama, tiny_gpt2, tiny_opt]


def routed(model, *more, calibration=None, **fields):
    """Return the model with routing attention around random centroids, unless there is calibration data."""
    init = "first_batch" if calibration is None else "data"
    step = {"technique": "routing_transformer", "clusters": 3, "window": 5, "init": init, **fields}
    return hf_optim.optimize(model, [step, *more], calibration=calibration)


def parts(model):
    return [module.learned for module in attentions(model)]


def unit(part, normalize):
    if normalize == "layer_norm":
        part = part - part.mean(-1, keepdim=True)
    return part / part.norm(dim=-1, keepdim=True)


def oracle_attention(settings, centroids):
    """Return an attention function that computes each query by itself; rows have no padding."""
    local = settings["local_heads"]

    def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        shared, length = query.shape[1] // key.shape[1], query.shape[2]
        if settings["keys"] == "queries":
            key = torch.cat([key[:, :local], query[:, local:]], 1)
        out = torch.zeros_like(query)
        for r in range(len(query)):
            for h in range(query.shape[1]):
                g = h // shared
                q, k, v = query[r, h], key[r, g], value[r, g]
                causal = module.is_causal

                def of(i, seen, q, k, v):
                    return (k[seen] @ q[i] * scale).softmax(0) @ v[seen]

                if g < local:
                    for i in range(length):
                        near = [j for j in range(length) if abs(i - j) < settings["local_window"]]
                        out[r, h, i] = of(i, [j for j in near if j <= i or not causal], q, k, v)
                    continue
                weight = centroids[module.layer_idx][g - local]
                near = [unit(part, settings["normalize"]) @ weight.T for part in (q, k)]
                if settings["scores"] == "normalized":
                    q, k = (unit(part, settings["normalize"]) * part.shape[-1] ** 0.5 for part in (q, k))
                if settings["form"] == "last":
                    asked, held = (part.argmax(-1) for part in near)
                    for i in range(length):
                        same = [j for j in range(i) if held[j] == asked[i]]
                        seen = [*same[max(0, len(same) - settings["window"] + 1) :], i]
                        out[r, h, i] = of(i, seen, q, k, v)
                    continue
                found = [[] for _ in range(length)]
                members = []
                for c in range(settings["clusters"]):
                    asked = near[0][:, c].argsort(descending=True)[: settings["window"]].tolist()
                    held = asked if causal else near[1][:, c].argsort(descending=True)[: settings["window"]].tolist()
                    members.append(held)
                    for i in asked:
                        found[i].append(of(i, [j for j in held if j <= i or not causal], q, k, v))
                for i in range(length):
                    if found[i]:
                        out[r, h, i] = sum(found[i]) / len(found[i])
                    elif settings["unrouted"] == "nearest":
                        out[r, h, i] = of(i, members[int(near[0][i].argmax())], q, k, v)
        return out.transpose(1, 2), None

    return attention


@pytest.fixture
def dense_oracle():
    """Run a dense model with the attention of the oracle."""
    name = "tests_routing_oracle"

    def run(model, ids, converted):
        settings = converted.config.attention_pattern
        centroids = [part.centroids.weight if part.heads else None for part in parts(converted)]
        AttentionInterface.register(name, oracle_attention(settings, centroids))
        AttentionMaskInterface.register(name, lambda **kwargs: None)
        model.set_attn_implementation(name)
        return model(ids).logits

    yield run
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop(name, None)


CASES = [
    (tiny_llama, {}),
    (tiny_llama, {"local_heads": 0, "normalize": "l2", "fit": "keys"}),
    (tiny_gpt2, {"local_heads": 1, "local_window": 3}),
    (tiny_gpt2, {"keys": "queries", "scores": "normalized"}),
    (tiny_gpt2, {"form": "top", "leaks": True, "keys": "queries"}),
    (tiny_opt, {"local_heads": 4}),
    (tiny_bert, {}),
    (tiny_bert, {"unrouted": "nearest", "local_heads": 0, "window": 2}),
]


@pytest.mark.many
@pytest.mark.parametrize(("build", "fields"), CASES)
def test_outputs_and_gradients_are_those_of_the_oracle(build, fields, dense_oracle):
    model, dense, ids = routed(build().double(), **fields), build().double(), IDS[:, :17]
    found, expected = model(ids).logits, dense_oracle(dense, ids, model)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    named = dict(model.named_parameters())
    for name, parameter in dense.named_parameters():
        if parameter.grad is not None:
            scale = parameter.grad.abs().max().clamp_min(1.0)
            torch.testing.assert_close(named[name].grad / scale, parameter.grad / scale, rtol=0, atol=1e-10)


@pytest.mark.many
@pytest.mark.parametrize(
    ("build", "fields"),
    [(tiny_llama, {}), (tiny_opt, {"local_heads": 0}), (tiny_bert, {}), (tiny_gpt2, {"form": "top", "leaks": True})],
)
def test_one_cluster_with_all_tokens_is_full_attention(build, fields):
    model = routed(build().double(), clusters=1, window=23, **fields)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, build().double()(IDS).logits, rtol=0, atol=1e-12)
        assert not torch.allclose(routed(build().double(), **fields)(IDS).logits, model(IDS).logits, atol=1e-3)


@pytest.mark.many
@pytest.mark.parametrize("build", DECODERS)
def test_nothing_comes_from_the_future(build):
    model = routed(build().double(), local_heads=0, clusters=2)
    with torch.no_grad():
        before = model(IDS[:1]).logits
        for place in range(1, 23, 3):
            other = IDS[:1].clone()
            other[:, place] = (other[:, place] + 1) % 60
            moved = (model(other).logits - before).abs().amax(-1)[0]
            assert moved[:place].max() < 1e-13  # blocks of queries are others, and round otherwise
            assert moved[place] > 1e-6


def test_the_top_tokens_of_a_causal_model_leak_and_are_refused():
    with pytest.raises(ModelError, match=r"step 1 \(routing_transformer\): LlamaForCausalLM is causal: the top tokens"):
        routed(tiny_llama(), form="top")
    leaking = routed(tiny_llama().double(), form="top", leaks=True, local_heads=0)
    other = IDS[:1].clone()
    other[:, -6:] = (other[:, -6:] + 7) % 60
    with torch.no_grad():
        moved = (leaking(other).logits - leaking(IDS[:1]).logits).abs().amax(-1)[0]
        assert moved[:-6].max() > 1e-6
        with pytest.raises(ValueError, match="later tokens change the clusters of earlier ones"):
            leaking.generate(IDS, max_new_tokens=2)
    with pytest.raises(ModelError, match="leaks is for causal models"):
        routed(tiny_bert(), form="top", leaks=True)
    with pytest.raises(ModelError, match=r"form=\"last\" is for causal models"):
        routed(tiny_bert(), form="last")


@pytest.mark.many
@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("build", [tiny_llama, tiny_bert])
def test_a_padded_row_is_that_row_alone(build, side):
    more = {"unrouted": "nearest"} if build is tiny_bert else {}
    model = routed(build().double(), **more)
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
    model = routed(tiny_llama().double())
    places = torch.cat([torch.arange(11), torch.arange(12)])[None]
    with torch.no_grad():
        found = model(IDS[:1], position_ids=places, use_cache=False).logits[0]
        alone = torch.cat([model(IDS[:1, :11]).logits[0], model(IDS[:1, 11:]).logits[0]])
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-11)


# -- generation -------------------------------------------------------------------------------------------------------
@pytest.mark.many
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("build", DECODERS)
def test_generation_with_a_cache_is_generation_without(build, beams):
    model = routed(build())
    mask = torch.ones_like(IDS)
    mask[1, :9] = 0
    fields = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "num_beams": beams}
    without = model.generate(IDS, use_cache=False, attention_mask=mask, **fields)
    assert torch.equal(model.generate(IDS, attention_mask=mask, **fields), without)


@pytest.mark.many
@pytest.mark.parametrize("counts", [(23,), (7, 16), (1, 1, 3, 18), (22, 1)])
def test_parts_of_a_row_from_a_cache_are_the_row_in_one(counts):
    model = routed(tiny_llama().double())
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


def test_a_cache_stays_as_large_as_the_record_says():
    model = routed(tiny_llama(max_position_embeddings=128), clusters=2, window=4)
    keys = hf_optim.run_of(model).record.steps["0"]["cached_keys"]
    assert keys == 3 + 2 * 3  # the local head, and the routed one
    with torch.no_grad():
        for length in (40, 120):
            ids = torch.randint(3, 60, (2, length), generator=torch.Generator().manual_seed(1))
            layer = model(ids, use_cache=True)[compat.CACHE].layers[0]
            counts = 2 * (1 + 2) * 8  # int64: rows, clusters
            assert layer.nbytes() == 2 * 2 * keys * 8 * 4 + counts  # keys and values, rows, width, bytes


# -- training and checkpoints -----------------------------------------------------------------------------------------
def trained(model, folder, steps=2, **more):
    args = TrainingArguments(
        str(folder), max_steps=steps, learning_rate=1e-2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        save_strategy="no", logging_strategy="no", disable_tqdm=True, **more,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in torch.cat([IDS, IDS + 1])]
    Trainer(model=model, args=args, train_dataset=data).train()
    return model


@pytest.mark.parametrize("build", [tiny_llama])
def test_the_stock_trainer_moves_the_centroids(build, tmp_path):
    model = routed(build(), decay=0.5)
    before = [part.centroids.weight.clone() for part in parts(model)]
    trained(model, tmp_path).eval()
    after = [part.centroids for part in parts(model)]
    assert all(int(part.fits) == 3 for part in after)  # fitted to the first batch, and moved by two
    assert not any(torch.equal(one, two.weight) for one, two in zip(before, after, strict=True))
    still = [part.weight.clone() for part in after]
    with torch.no_grad():
        model(IDS)
    assert all(torch.equal(one, two.weight) for one, two in zip(still, after, strict=True))


def checkpointed(model, reentrant):
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    return model


def test_gradient_checkpointing_changes_neither_gradients_nor_centroids():
    found = []
    for change in (lambda model: model, lambda model: checkpointed(model, False)):
        model = change(routed(tiny_llama().double(), decay=0.5, commitment=1.0, calibration=IDS).train())
        for shift in (0, 1):
            model(IDS + shift, labels=IDS, use_cache=False).loss.backward()
        named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append(named | {name: p.float() for name, p in model.state_dict().items() if "centroids" in name})
    for name, part in found[0].items():
        torch.testing.assert_close(found[1][name], part, rtol=0, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
    model = checkpointed(routed(tiny_llama(), commitment=1.0).train(), True)
    with pytest.raises(ValueError, match="no gradient under reentrant gradient checkpointing"):
        model(IDS, labels=IDS, use_cache=False)


def test_the_commitment_loss_is_part_of_a_loss_in_a_tuple():
    losses = []
    for as_dict in (True, False):
        model = routed(tiny_llama().double(), commitment=10.0, calibration=IDS).train()
        losses.append(model(IDS, labels=IDS, use_cache=False, return_dict=as_dict)[0])
    assert losses[0] == losses[1]


def test_the_commitment_loss_is_part_of_the_loss_in_training():
    with_loss, without = (routed(tiny_llama().double(), commitment=c, calibration=IDS) for c in (10.0, 0.0))
    plain = without.train()(IDS, labels=IDS).loss
    points = []
    observe = type(parts(with_loss)[0].centroids).observe

    def seen(self, given, valid, loss):
        nearest = (given @ self.weight.to(given).transpose(1, 2)).argmax(-1)
        own = torch.stack([self.weight[g].to(given)[nearest[g]] for g in range(len(given))])
        points.append((given - own).square().mean())
        return observe(self, given, valid, loss)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(parts(with_loss)[0].centroids), "observe", seen)
        loss = with_loss.train()(IDS, labels=IDS).loss
    torch.testing.assert_close(loss, plain + 10.0 * torch.stack(points).mean().float())
    half = with_loss(IDS, labels=IDS, num_items_in_batch=4 * IDS[:, 1:].numel()).loss
    assert half < loss / 3
    with torch.no_grad():
        torch.testing.assert_close(with_loss.eval()(IDS, labels=IDS).loss, without.eval()(IDS, labels=IDS).loss)


def test_centroids_are_fitted_to_the_data_and_the_same_for_a_seed():
    runs = [routed(tiny_llama(), calibration=IDS[:1], seed=seed, local_heads=0) for seed in (4, 4, 5)]
    weights = [[part.centroids.weight for part in parts(model)] for model in runs]
    assert all(torch.equal(one, two) for one, two in zip(weights[0], weights[1], strict=True))
    assert not any(torch.equal(one, two) for one, two in zip(weights[0], weights[2], strict=True))
    seen = {}

    def recording(module, query, key, value, *args, **kwargs):
        seen[module.layer_idx] = (query, key)
        out = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2), None

    AttentionInterface.register("tests_recording", recording)
    try:
        dense = tiny_llama()
        dense.set_attn_implementation("tests_recording")
        with torch.no_grad():
            dense(IDS[:1])
    finally:
        AttentionInterface._global_mapping.pop("tests_recording")
    # Later blocks are fitted to what the routed ones before them make.
    points = [unit(part.unflatten(1, (2, -1)), "layer_norm").transpose(0, 1).flatten(1, 3) for part in seen[0]]
    torch.testing.assert_close(weights[0][0], fitted(torch.cat(points, 1), 3, 4 * 4096), rtol=0, atol=1e-4)


def test_attention_learns_the_outputs_of_the_dense_one():
    model = routed(tiny_llama(), calibration=BATCHES, distill_steps=16, distill_rate=3e-3)
    found = hf_optim.run_of(model).record.steps["0"]["distillation"]
    assert found["after"] < 0.9 * found["before"]
    weights = [part.centroids.weight for part in parts(routed(tiny_llama(), calibration=BATCHES))]
    assert torch.equal(parts(model)[0].centroids.weight, weights[0])  # the centroids stay
    with pytest.raises(RecipeError, match="distill_steps needs centroids that are fitted before"):
        routed(tiny_llama(), distill_steps=2)


def test_data_is_asked_for():
    with pytest.raises(DataError, match="routing_transformer"):
        hf_optim.optimize(tiny_llama(), {"technique": "routing_transformer"})


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
        model.train()(ids, labels=ids).loss.backward()
        torch.save(model.state_dict(), {folder!r} + "/trained.pt")
"""


@pytest.mark.parametrize("build", [tiny_llama, tiny_bert])
def test_a_checkpoint_needs_no_hf_optim(build, tmp_path, stock_python):
    model = routed(build(), calibration=IDS)
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
        state, learned = torch.load(tmp_path / "trained.pt"), copy.deepcopy(model).train()
        learned(IDS, labels=IDS)
        for name, part in learned.state_dict().items():
            assert torch.equal(state[name], part), name
            assert name.endswith((".centroids.weight", ".fits")) != torch.equal(part, model.state_dict()[name])


def test_a_checkpoint_without_centroids_is_refused(tmp_path):
    routed(tiny_llama()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    gone = next(name for name in tensors if name.endswith("centroids.weight"))
    del tensors[gone]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"has no weights for 1 tensors of .*centroids\.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path, optim_config="auto", trust_remote_code=True)


@pytest.mark.many
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clusters": 0}, "clusters=0, not a whole number from 1"),
        ({"window": None}, "window=None"),
        ({"local_heads": 3}, "local_heads=3"),
        ({"form": "first"}, "form='first'"),
        ({"form": "top"}, "depend on later ones, and this attention is causal"),
        ({"decay": 2}, "decay='2', not a number from 0 to 1"),
        ({"head_width": 7}, "of width 7|size mismatch|ignore_mismatched_sizes"),
        ({"other": 1}, r"settings that it does not know: \['other'\]"),
    ],
)
def test_a_damaged_configuration_is_an_error(settings, message, tmp_path):
    routed(tiny_llama()).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["attention_pattern"] |= settings
    path.write_text(json.dumps(config))
    with pytest.raises((ValueError, RuntimeError), match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)(IDS)


# -- refusals ---------------------------------------------------------------------------------------------------------
def test_what_cannot_be_routed_is_refused_and_unchanged():
    model = tiny_t5()
    with pytest.raises(ModelError, match=r"step 1 \(routing_transformer\): t5 has cross-attention"):
        routed(model)
    assert not any(hasattr(module, "learned") for module in model.modules())
    with pytest.raises(ModelError, match="keys can be the queries where each query head has a key head of its own"):
        routed(tiny_llama(), keys="queries")
    with pytest.raises(ModelError, match="local_heads=3, and the model has 2 key heads"):
        routed(tiny_llama(), local_heads=3)
    with pytest.raises(RecipeError, match="routing_transformer"):
        routed(tiny_llama(), {"technique": "blockwise", "block": 4})


@pytest.mark.parametrize(
    "fields", [{"clusters": 0}, {"window": -1}, {"local_heads": -1}, {"decay": 1.5}, {"leaks": True}, {"form": "any"}]
)
def test_fields_are_checked(fields):
    with pytest.raises(RecipeError, match=next(iter(fields))):
        routed(tiny_llama(), **fields)


def test_a_window_that_is_not_given_is_the_context_by_clusters():
    model = routed(tiny_llama(max_position_embeddings=50), clusters=4, window=0)
    settings = model.config.attention_pattern
    assert (settings["window"], settings["local_window"], settings["local_heads"]) == (13, 13, 1)


def test_no_name_of_the_stored_code_is_defined_twice():
    kinds = ast.FunctionDef, ast.ClassDef
    names = Counter(
        node.name for node in ast.parse(RoutingTransformer.remote_code.source).body if isinstance(node, kinds)
    )
    assert [name for name, count in names.items() if count > 1] == []
