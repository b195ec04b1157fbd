"""linformer in encoders: its formula, its limits, checkpoints. The attention alone is tested apart."""

from __future__ import annotations

import copy
import json
import textwrap

import pytest
import torch
from tiny_models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5, tiny_vit
from transformers import (
    AttentionInterface,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
)
from transformers.masking_utils import AttentionMaskInterface

import hf_optim
from hf_optim import ModelError, RecipeError

IDS = torch.randint(3, 60, (2, 23), generator=torch.Generator().manual_seed(0))
SHARING = ("none", "headwise", "key_value", "layerwise")


def linformer(model, *more, **fields):
    return hf_optim.optimize(model, [{"technique": "linformer", "k": 6, **fields}, *more])


def parts(model):
    return [module.learned for module in model.modules() if hasattr(module, "is_causal")]


@pytest.fixture
def dense_oracle():
    """Run a dense model with projected attention, written out; weights are (E, F) of each layer, ``[1 or H, k, n]``."""
    name = "tests_linformer_oracle"

    def run(model, ids, weights):
        def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
            e, f = (weight[:, :, : key.shape[2]].expand(4, -1, -1) for weight in weights[module.layer_idx])
            keys, values = torch.einsum("hkn,bhnd->bhkd", e, key), torch.einsum("hkn,bhnd->bhkd", f, value)
            scores = torch.einsum("bhqd,bhkd->bhqk", query, keys) / query.shape[-1] ** 0.5
            return torch.einsum("bhqk,bhkd->bqhd", scores.softmax(-1), values), None

        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, lambda **kwargs: None)
        model.set_attn_implementation(name)
        return model(ids).logits

    yield run
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop(name, None)


@pytest.mark.many
@pytest.mark.parametrize("sharing", SHARING)
def test_outputs_and_gradients_are_those_of_the_formula(sharing, dense_oracle):
    model = linformer(tiny_bert().double(), start="random", short="zero", sharing=sharing)
    own = [part for part in parts(model) if hasattr(part, "key")]
    assert len(own) == (1 if sharing == "layerwise" else 2)
    weights = [
        tuple(w.detach().clone().requires_grad_() for w in (part.key, part.value) if w is not None) for part in own
    ]
    assert {len(each) for each in weights} == {2 if sharing in ("none", "headwise") else 1}
    assert weights[0][0].shape == (4 if sharing == "none" else 1, 6, 64)
    of_layers = [(pair[0], pair[-1]) for pair in weights] * (2 // len(own))
    expected, found = dense_oracle(tiny_bert().double(), IDS, of_layers), model(IDS).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    others = torch.autograd.grad(expected.square().sum(), [w for pair in weights for w in pair])
    found.square().sum().backward()
    gradients = [w.grad for part in own for w in (part.key, part.value) if w is not None]
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.many
@pytest.mark.parametrize("fields", [{"k": 64}, {"k": 23, "length": 23}, {"k": 32, "start": "interleaved"}], ids=str)
def test_as_many_keys_as_tokens_are_full_attention(fields):
    model, dense = linformer(tiny_bert().double(), **fields), tiny_bert().double()
    mask = torch.ones_like(IDS)
    mask[0, 15:] = 0
    with torch.no_grad():
        for given in ({}, {"attention_mask": mask}):
            found, expected = model(IDS, **given).logits, dense(IDS, **given).logits
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


def test_pictures_as_many_keys_as_patches():
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model, dense = linformer(tiny_vit().double(), k=5), tiny_vit().double()
    with torch.no_grad():
        torch.testing.assert_close(model(pixels).logits, dense(pixels).logits, rtol=0, atol=1e-11)
    assert hf_optim.run_of(model).record.steps["0"]["length"] == 5


@pytest.mark.many
@pytest.mark.parametrize("short", ["weighted", "zero"])
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padded_rows_are_rows_alone(side, short):
    model = linformer(tiny_bert().double(), start="random", short=short)
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


def test_a_longer_text_is_refused_and_not_cut():
    model = linformer(tiny_bert(), length=16)
    mask = torch.ones_like(IDS)
    mask[:, 16:] = 0
    with torch.no_grad():
        assert torch.isfinite(model(IDS, attention_mask=mask).logits).all()  # 16 tokens and padding
        mask[1, 16] = 1
        for given in ({}, {"attention_mask": mask}):
            with pytest.raises(ValueError, match="rows of at most 16 tokens, and got one of"):
                model(IDS, **given)


def test_one_seed_makes_one_model():
    made = [linformer(tiny_bert(), start="random", seed=seed) for seed in (0, 0, 1)]
    one, same, other = (parts(model)[0].key for model in made)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert not torch.equal(one, parts(made[0])[1].key)


# -- training ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("sharing", ["headwise", "layerwise"])
def test_the_stock_trainer_trains_the_projections(sharing, tmp_path):
    model = linformer(tiny_bert(), sharing=sharing)
    before = {name: w.detach().clone() for name, w in model.named_parameters() if ".learned." in name}
    assert len(before) == {"headwise": 4, "layerwise": 1}[sharing]
    args = TrainingArguments(
        str(tmp_path), max_steps=2, learning_rate=1e-2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": label} for label, row in enumerate(IDS)]
    Trainer(model=model, args=args, train_dataset=data).train()
    for name, old in before.items():
        assert not torch.equal(model.get_parameter(name), old)


def test_a_copy_shares_with_itself_alone():
    model = linformer(tiny_bert(), sharing="layerwise")
    copied = copy.deepcopy(model)
    with torch.no_grad():
        before = model(IDS).logits
        assert torch.equal(copied(IDS).logits, before)
        parts(copied)[0].key.zero_()
        assert torch.equal(model(IDS).logits, before)
        assert vars(parts(copied)[1])["shared_projection"] is parts(copied)[0]


def test_distillation_brings_attention_near_the_dense_one():
    batches = [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}]
    step = {"technique": "linformer", "k": 6, "distill_steps": 30, "distill_rate": 3e-3}
    model = hf_optim.optimize(tiny_bert(), step, batches)
    found = hf_optim.run_of(model).record.steps["0"]["distillation"]
    assert found["after"] < 0.7 * found["before"]
    with pytest.raises(RecipeError, match="sharing='layerwise' gives them one projection"):
        hf_optim.optimize(tiny_bert(), {**step, "sharing": "layerwise"}, batches)


# -- checkpoints ------------------------------------------------------------------------------------------------------
RELOAD = """
    import torch
    from transformers import AutoModelForSequenceClassification
    model = AutoModelForSequenceClassification.from_pretrained({folder!r}, trust_remote_code=True).eval()
    with torch.no_grad():
        torch.save(model(torch.tensor({ids}), attention_mask=torch.tensor({mask})).logits, {folder!r} + "/logits.pt")
"""


@pytest.mark.parametrize("sharing", ["none", "layerwise"])
def test_a_checkpoint_needs_no_hf_optim(sharing, tmp_path, stock_python):
    model = linformer(tiny_bert(), sharing=sharing, start="random")
    mask = torch.ones_like(IDS)
    mask[1, 15:] = 0
    model.save_pretrained(tmp_path)
    code = RELOAD.format(folder=str(tmp_path), ids=IDS.tolist(), mask=mask.tolist())
    done = stock_python.copy(textwrap.dedent(code))
    assert done.status == 0, done.err
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), model(IDS, attention_mask=mask).logits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "k=0, not a whole number from 1 to 64"),
        ({"k": 65}, "k=65, not a whole number from 1 to 64"),
        ({"length": 2**40}, "length=1099511627776"),
        ({"sharing": "all"}, "sharing='all', not one of none, headwise"),
        ({"short": None}, "short=None"),
        ({"rank": 4}, r"settings that it does not know: \['rank'\]"),
    ],
)
def test_a_damaged_configuration_is_an_error(settings, message, tmp_path):
    linformer(tiny_bert()).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["attention_pattern"] |= settings
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, trust_remote_code=True)


# -- refusals ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_causal_models_are_refused_with_the_reason(build):
    model = build()
    with pytest.raises(ModelError, match="is causal: each projected key is made of all tokens of a row"):
        linformer(model)
    assert not any(hasattr(module, "learned") for module in model.modules())


def test_what_does_not_fit_is_refused():
    with pytest.raises(ModelError, match="k is 128, more than the 64 tokens that the model reads"):
        linformer(tiny_bert(), k=128)
    with pytest.raises(ModelError, match="length is 65, but the model reads at most 64 tokens"):
        linformer(tiny_bert(), length=65)
    with pytest.raises(ModelError, match="t5 has cross-attention"):
        linformer(tiny_t5())
    with pytest.raises(RecipeError, match=r"k is 6, more than the length of 5 tokens"):
        linformer(tiny_bert(), length=5)
    with pytest.raises(RecipeError, match="linformer"):
        linformer(tiny_bert(), {"technique": "blockwise", "block": 4})


@pytest.mark.parametrize("fields", [{"k": 0}, {"length": 0}, {"sharing": "heads"}, {"start": "ones"}])
def test_fields_are_checked(fields):
    with pytest.raises(RecipeError, match=next(iter(fields))):
        linformer(tiny_bert(), **fields)


def test_weights_and_masks_of_pairs_are_refused():
    model = linformer(tiny_bert())
    with pytest.raises(ValueError, match="linformer takes padding and packed documents, and no other masks"):
        model(IDS, attention_mask=torch.ones(2, 1, 23, 23, dtype=torch.bool).tril())
    with pytest.raises(ValueError, match="output_attentions"):
        model(IDS, output_attentions=True)
