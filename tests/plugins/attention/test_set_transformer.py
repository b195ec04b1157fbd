"""set_transformer in encoders: inducing points in the attention, seeds behind it. Both formulas are tested apart."""

from __future__ import annotations

import copy
import inspect
import json
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5, tiny_vit
from transformers import (
    AttentionInterface,
    AutoModel,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
)
from transformers.masking_utils import AttentionMaskInterface

import hf_optim
from hf_optim import CheckpointError, ModelError, RecipeError
from hf_optim.evaluation.evaluate import mean_pool, sentence_vectors

IDS = torch.randint(3, 60, (2, 23), generator=torch.Generator().manual_seed(0))
POOL = {"points": None, "seeds": 1}


def converted(model, *more, **fields):
    return hf_optim.optimize(model, [{"technique": "set_transformer", "points": 5, **fields}, *more])


def encoder():
    """Return a BERT without a head of its own, and without its pooler."""
    bert = tiny_bert().bert
    bert.pooler = None
    return bert


def redrawn(model):
    """Return the model with all learned parts drawn, in place."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".learned." in name or name.startswith("set_pooling."):
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    return model


def padded():
    mask = torch.ones_like(IDS)
    mask[0, 15:], mask[1, :6] = 0, 0
    return mask


@pytest.fixture
def dense_oracle():
    """Run a dense model with attention over points, written out; weights by name of each layer."""
    name = "tests_set_transformer_oracle"

    def run(model, ids, weights, scale):
        def attention(module, query, key, value, attention_mask, **kwargs):
            w = weights[module.layer_idx]

            def split(part):
                return part.reshape(-1, 4, 8).transpose(0, 1)

            points = split(w["points"])
            seen = torch.einsum("hmd,bhnd->bhmn", points, key).mul(scale).softmax(-1)
            out = (points + torch.einsum("bhmn,bhnd->bhmd", seen, value)).transpose(1, 2).flatten(2)
            out = out + (out @ w["feed_forward.weight"].T + w["feed_forward.bias"]).relu()
            keys, values = (
                torch.stack([split(row) for row in out @ w[f"{part}.weight"].T + w[f"{part}.bias"]])
                for part in ("key", "value")
            )
            read = torch.einsum("bhnd,bhmd->bhnm", query, keys).mul(scale).softmax(-1)
            return torch.einsum("bhnm,bhmd->bnhd", read, values), None

        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, lambda **kwargs: None)
        model.set_attn_implementation(name)
        return model(ids).logits

    yield run
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop(name, None)


# -- inducing points --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("scale", "value"), [("model", 8**-0.5), ("width", 32**-0.5)])
def test_outputs_and_gradients_are_those_of_the_formula(scale, value, dense_oracle):
    model = redrawn(converted(tiny_bert().double(), scale=scale))
    parts = [module.learned for module in model.modules() if hasattr(module, "is_causal")]
    weights = [{name: w.detach().clone().requires_grad_() for name, w in part.named_parameters()} for part in parts]
    expected, found = dense_oracle(tiny_bert().double(), IDS, weights, value), model(IDS).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    others = torch.autograd.grad(expected.square().sum(), [w for each in weights for w in each.values()])
    own = torch.autograd.grad(found.square().sum(), [w for part in parts for w in part.parameters()])
    for one, other in zip(own, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padded_rows_are_rows_alone(side):
    model = redrawn(converted(tiny_bert().double()))
    part = {"left": slice(8, 23), "right": slice(0, 13), "both": slice(4, 18)}[side]
    mask = torch.ones_like(IDS)
    mask[1] = 0
    mask[1, part] = 1
    body, places = model.base_model, (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        found = body(IDS, attention_mask=mask, position_ids=places)[0]
        torch.testing.assert_close(found[1, part], body(IDS[1:, part])[0][0], rtol=0, atol=1e-11)
        torch.testing.assert_close(found[0], body(IDS[:1])[0][0], rtol=0, atol=1e-11)
        mask[1] = 0
        assert torch.isfinite(body(IDS, attention_mask=mask)[0]).all()


def test_without_positions_order_means_nothing():
    """Tokens move with their outputs, and the vector of the text stays."""
    model = redrawn(converted(encoder().double(), seeds=2))
    order = torch.randperm(23, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.embeddings.position_embeddings.weight.zero_()
        before, after = model(IDS), model(IDS[:, order])
        torch.testing.assert_close(after.last_hidden_state, before.last_hidden_state[:, order], rtol=0, atol=1e-11)
        torch.testing.assert_close(after.pooler_output, before.pooler_output, rtol=0, atol=1e-11)
        assert (before.last_hidden_state[:, order] - before.last_hidden_state).abs().max() > 1e-3


def test_pictures_have_points_too():
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.isfinite(converted(tiny_vit())(pixels).logits).all()


@pytest.mark.parametrize("start", ["identity", "xavier"])
def test_one_seed_makes_one_model(start):
    made = [converted(tiny_bert(), start=start, seed=seed).state_dict() for seed in (0, 0, 1)]
    names = [name for name in made[0] if name.endswith(("learned.points", "learned.value.weight"))]
    assert len(names) == 4
    for name in names:
        assert torch.equal(made[0][name], made[1][name])
        fixed = start == "identity" and name.endswith("value.weight")
        assert torch.equal(made[0][name], made[2][name]) == fixed


def test_distillation_brings_attention_near_the_dense_one():
    batches = [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}]
    step = {"technique": "set_transformer", "points": 5, "distill_steps": 30, "distill_rate": 3e-3}
    model = hf_optim.optimize(tiny_bert(), step, batches)
    found = hf_optim.run_of(model).record.steps["0"]["distillation"]
    assert found["after"] < 0.7 * found["before"]


# -- the pooling head -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mask", [None, padded()], ids=["whole", "padded"])
def test_vectors_are_those_of_the_formula(mask):
    model = redrawn(converted(encoder().double(), **{**POOL, "seeds": 2}))
    head, given = model.set_pooling.block, {} if mask is None else {"attention_mask": mask}
    found = model(IDS, **given)
    states, seen = found.last_hidden_state, torch.ones_like(IDS) if mask is None else mask
    expected = []
    for row in range(2):
        tokens = states[row, seen[row].bool()]
        q, k, v = head.query(model.set_pooling.seeds), head.key(tokens), head.value(tokens)
        heads = [
            (q[:, p] @ k[:, p].T / 32**0.5).softmax(-1) @ v[:, p] for p in (slice(h, h + 8) for h in range(0, 32, 8))
        ]
        out = q + torch.cat(heads, 1)
        expected.append((out + head.feed_forward(out).relu()).flatten())
    torch.testing.assert_close(found.pooler_output, torch.stack(expected), rtol=0, atol=1e-12)
    as_tuple = model(IDS, **given, return_dict=False)
    assert torch.equal(as_tuple[0], states)
    assert torch.equal(as_tuple[1], found.pooler_output)
    with torch.no_grad():
        dense = encoder().double()(IDS, **given).last_hidden_state
    torch.testing.assert_close(states * seen[..., None], dense * seen[..., None], rtol=0, atol=0)


def test_a_head_begins_as_the_mean_and_evaluation_reads_it():
    batch = {"input_ids": IDS, "attention_mask": padded()}
    model = converted(encoder(), **POOL)
    with torch.no_grad():
        mean = mean_pool(model, batch)
        torch.testing.assert_close(sentence_vectors(model, batch), mean, rtol=0, atol=1e-3)
        redrawn(model)
        assert torch.equal(sentence_vectors(model, batch), model(**batch).pooler_output)
        assert torch.equal(sentence_vectors(encoder(), batch), mean_pool(encoder(), batch))
        assert (sentence_vectors(model, batch) - mean_pool(model, batch)).abs().max() > 1e-2


def test_a_text_of_padding_alone_and_other_masks_have_no_vector():
    model, mask = converted(encoder(), **POOL), torch.ones_like(IDS)
    mask[1] = 0
    with pytest.raises(ValueError, match="row 1 of the batch is padding alone"):
        model(IDS, attention_mask=mask)
    with pytest.raises(ValueError, match=r"an attention_mask of the shape \(2, 23\)"):
        model(IDS, attention_mask=torch.ones(2, 1, 23, 23, dtype=torch.bool))


def test_trainers_read_the_columns_of_the_model():
    stock, own = (inspect.signature(model.forward).parameters for model in (encoder(), converted(encoder(), **POOL)))
    assert list(own) == list(stock)


@pytest.mark.parametrize("fields", [{"seeds": 1}, {"points": None, "seeds": 1}])
def test_a_head_is_copied_with_its_model(fields):
    model = converted(encoder(), **fields)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.set_pooling.seeds.zero_()
        assert model.set_pooling.seeds.abs().max() > 0
        assert torch.equal(copied(IDS).last_hidden_state, model(IDS).last_hidden_state)


def test_the_model_of_a_causal_model_may_pool():
    model = converted(tiny_llama().model, **POOL)
    with torch.no_grad():
        out = model(IDS)
        torch.testing.assert_close(out.pooler_output, out.last_hidden_state.mean(1), rtol=0, atol=1e-3)


# -- training and checkpoints -----------------------------------------------------------------------------------------
def test_the_stock_trainer_trains_points_and_seeds(tmp_path):
    class Similarity(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            return model(**inputs).pooler_output.square().mean()

    model = converted(encoder(), seeds=2)
    before = {name: w.detach().clone() for name, w in model.named_parameters()}
    args = TrainingArguments(
        str(tmp_path), max_steps=2, learning_rate=1e-2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    Similarity(model=model, args=args, train_dataset=[{"input_ids": row} for row in IDS]).train()
    moved = [name for name, old in before.items() if not torch.equal(model.get_parameter(name), old)]
    assert {"set_pooling.seeds", "set_pooling.block.query.weight"} <= set(moved)
    assert {f"encoder.layer.{n}.attention.self.learned.points" for n in (0, 1)} <= set(moved)


RELOAD = """
    import torch
    from transformers import AutoModel
    model = AutoModel.from_pretrained({folder!r}, trust_remote_code=True).eval()
    with torch.no_grad():
        out = model(torch.tensor({ids}), attention_mask=torch.tensor({mask}))
    torch.save([out.last_hidden_state, out.pooler_output], {folder!r} + "/out.pt")
"""


@pytest.mark.parametrize("fields", [{"seeds": 2, "layer_norm": True}, POOL])
def test_a_checkpoint_needs_no_hf_optim(fields, tmp_path, stock_python):
    model = redrawn(converted(tiny_bert().bert, **fields))
    model.save_pretrained(tmp_path)
    code = RELOAD.format(folder=str(tmp_path), ids=IDS.tolist(), mask=padded().tolist())
    done = stock_python.copy(textwrap.dedent(code))
    assert done.status == 0, done.err
    with torch.no_grad():
        out = model(IDS, attention_mask=padded())
    states, vectors = torch.load(tmp_path / "out.pt")
    assert torch.equal(states, out.last_hidden_state)
    assert torch.equal(vectors, out.pooler_output)


@pytest.mark.many
@pytest.mark.parametrize("gone", ["learned.points", "learned.value.weight", "set_pooling.block.query.bias"])
def test_what_a_checkpoint_has_stays_where_it_lacks_a_tensor(gone, tmp_path):
    model = redrawn(converted(encoder(), seeds=1))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    gone = next(name for name in tensors if name.endswith(gone))
    drawn = tensors.pop(gone)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    found = AutoModel.from_pretrained(tmp_path, trust_remote_code=True).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert not torch.equal(found[gone], drawn)
    with pytest.raises(CheckpointError, match="has no weights for 1 tensors"):
        AutoModel.from_pretrained(tmp_path, optim_config="auto", trust_remote_code=True)


def test_learned_layers_are_quantized_and_packed(tmp_path):
    model = converted(tiny_bert(), {"technique": "rtn", "bits": 4, "group_size": 16})
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    assert any(name.endswith("learned.key.weight_packed") for name in names)
    stored = AutoModelForSequenceClassification.from_pretrained(tmp_path, trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(stored(IDS).logits, model(IDS).logits)


def test_what_a_checkpoint_lacks_is_drawn_and_a_pooling_head_is_not_dropped(tmp_path):
    converted(encoder(), **POOL).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"BertForSequenceClassification has one of its own: load the .* AutoModel"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, trust_remote_code=True)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["attention_pattern"] |= {"points": 3, "heads": 4, "head_width": 8, "scale": "model", "start": "identity"}
    path.write_text(json.dumps(config))
    model = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    part = model.encoder.layer[0].attention.self.learned
    assert torch.equal(part.value.weight, torch.eye(32))
    assert 0 < part.points.abs().max() <= (6 / (3 + 32)) ** 0.5
    assert not part.key.bias.any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"points": 0}, "points=0, not a whole number from 1"),
        ({"layer_norm": "no"}, "layer_norm='no', not true or false"),
        ({"seeds": 3}, "lacks pooling_heads"),
        ({"scale": "head"}, "scale='head', not one of model, width"),
        ({"m": 4}, r"settings that it does not know: \['m'\]"),
    ],
)
def test_a_damaged_configuration_is_an_error(settings, message, tmp_path):
    converted(tiny_bert()).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["attention_pattern"] |= settings
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, trust_remote_code=True)


# -- refusals ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_points_in_causal_models_are_refused_with_the_reason(build):
    model = build()
    with pytest.raises(ModelError, match="is causal: an inducing point reads all tokens of a row"):
        converted(model)
    assert not any(hasattr(module, "learned") for module in model.modules())


def test_what_does_not_fit_is_refused():
    with pytest.raises(ModelError, match="65 points are more than the 64 tokens that the model reads"):
        converted(tiny_bert(), points=65)
    with pytest.raises(ModelError, match=r"BertForSequenceClassification has a head of its own"):
        converted(tiny_bert(), seeds=1)
    with pytest.raises(ModelError, match="t5 has cross-attention"):
        converted(tiny_t5())
    with pytest.raises(RecipeError, match="set points, seeds or both"):
        converted(tiny_bert(), points=None)
    with pytest.raises(RecipeError, match="of which there are none"):
        converted(encoder(), **POOL, distill_steps=5)
    with pytest.raises(RecipeError, match="set_transformer"):
        converted(tiny_bert(), {"technique": "blockwise", "block": 4})


@pytest.mark.parametrize("fields", [{"points": 0}, {"seeds": 0}, {"scale": "head"}, {"start": "ones"}])
def test_fields_are_checked(fields):
    with pytest.raises(RecipeError, match=next(iter(fields))):
        converted(tiny_bert(), **fields)
