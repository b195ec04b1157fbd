"""Padding does not count: statistics of padded rows with a mask equal those of the rows alone, under every driver."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from streamed_and_blockwise import streamed, tensors_of
from tiny_models import tiny_bert, tiny_llama, tiny_mixtral, tiny_opt, tiny_t5

import hf_optim
from hf_optim.toolkit.statistics import BatchRows, HessianDiagonal

STEPS = {
    "gptq": {"technique": "gptq", "bits": 3, "group_size": 16},
    "obq": {"technique": "obq", "bits": 3, "group_size": 16},
    "nm activation": {"technique": "nm", "score": "activation"},
    "nm compensate": {"technique": "nm", "compensate": True},
    "nm budget": {"technique": "nm", "budget": 0.5},
    "structured": {"technique": "structured", "neurons": 0.25, "score": "activation"},
    "structured taylor": {"technique": "structured", "neurons": 0.25, "score": "taylor"},
    "structured layers": {"technique": "structured", "layers": 1, "score": "activation"},
    "smoothquant": [{"technique": "smoothquant"}, {"technique": "rtn", "bits": 8}],
    "rtn static": {"technique": "rtn", "bits": 8, "activations": "int8", "dynamic": False},
    "peg": {"technique": "peg"},
    "mixed_precision": {"technique": "mixed_precision"},
    "llm_int8": {"technique": "llm_int8"},
    "qbert": {"technique": "qbert", "budget": 3.0},
}
MODELS = {"llama": tiny_llama, "bert": tiny_bert, "t5": tiny_t5, "mixtral": tiny_mixtral, "opt": tiny_opt}
# What cannot store the experts of Mixtral, or remove neurons from them, is refused.
REFUSED = {("mixtral", s) for s in ("obq", "structured", "structured taylor", "mixed_precision", "llm_int8", "qbert")}
# Blockwise, the rows of every model are counted in the same place: one model with one list of blocks, and one with two.
# qbert, which differentiates twice, is slow.
CASES = [
    (name, step, driver)
    for driver, names in (("whole_model", MODELS), ("blockwise", ("llama", "t5")))
    for name in names
    for step in STEPS
    if (name, step) not in REFUSED and (step != "qbert" or (name, driver) == ("llama", "whole_model"))
]
BERT_DENSE = "bert.encoder.layer.1.output.dense"
LOUD = 63  # a token id that only padding has, with a large embedding


def make(name):
    model = MODELS[name]()
    # In float64 rounding does not decide ties; the products of experts have no float64.
    model = model if name == "mixtral" else model.double()
    with torch.no_grad():
        model.get_input_embeddings().weight[LOUD] *= 30.0
    return model


def rows(name):
    """Pairs of batches, without and with padding: rows of three lengths, and for T5 decoder inputs of equal length."""
    generator = torch.Generator().manual_seed(1)
    plain, padded = [], []
    for length in (12, 9, 12, 6):
        ids = torch.randint(3, 60, (1, length), generator=generator)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if name == "t5":
            target = torch.randint(3, 60, (1, length - 2), generator=generator)
            batch |= {"decoder_input_ids": target, "decoder_attention_mask": torch.ones_like(target)}
        plain.append(batch)
        filler = {"input_ids": LOUD, "decoder_input_ids": LOUD}
        padded.append({key: F.pad(v, (0, 20 - v.shape[1]), value=filler.get(key, 0)) for key, v in batch.items()})
    return plain, padded


def outputs(name, steps, data, driver):
    steps = [dict(step) for step in (steps if isinstance(steps, list) else [steps])]
    model = hf_optim.optimize(make(name), {"steps": steps, "driver": driver}, calibration=data)
    probe = rows(name)[0][0]
    with torch.no_grad():
        return model(**probe).logits


@pytest.mark.many
@pytest.mark.parametrize(("name", "step", "driver"), CASES)
def test_padding_does_not_count(name, step, driver):
    plain, padded = rows(name)
    expected = outputs(name, STEPS[step], plain, driver)
    found = outputs(name, STEPS[step], padded, driver)
    assert float((found - expected).norm() / expected.norm()) < 1e-3


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "opt"])
def test_the_loss_of_a_block_leaves_out_padding(name):
    found = []
    for data in rows(name):
        recipe = {"steps": [{"technique": "lkd", "steps": 0, "group_size": 16}], "driver": "blockwise"}
        run = hf_optim.run_of(hf_optim.optimize(make(name), recipe, calibration=data))
        found.append({key: losses[0] for key, losses in run.reported(run.recipe.steps[0])["losses"].items()})
    assert found[1] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.many(every=4)
@pytest.mark.parametrize("spilled", [False, True])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_the_streamed_driver_leaves_out_padding(tmp_path, name, spilled):
    model = make(name).float()
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "spill").mkdir()
    steps = [{"technique": "nm", "compensate": True}]
    for number, data in enumerate(rows(name)):
        spill = str(tmp_path / "spill") if spilled else None
        streamed(tmp_path / "model", steps, data, tmp_path / str(number), spill=spill)
    ours, theirs = tensors_of(tmp_path / "0"), tensors_of(tmp_path / "1")
    for key, value in ours.items():
        assert torch.allclose(value, theirs[key], rtol=1e-3, atol=1e-4), key


def squares(model, names, batch):
    """Return the sum of squares that each module's input has on one batch, in one call."""
    with (
        torch.no_grad(),
        HessianDiagonal({n: model.get_submodule(n) for n in names}) as found,
        BatchRows(model).of(batch),
    ):
        model(**batch)
    return found


def test_encoder_and_decoder_of_equal_length_follow_their_own_masks():
    model = make("t5")
    batch = {"input_ids": torch.full((2, 8), 7), "decoder_input_ids": torch.full((2, 8), 9)}
    batch |= {"attention_mask": torch.ones(2, 8), "decoder_attention_mask": torch.ones(2, 8)}
    batch["attention_mask"][:, 3:] = 0
    batch["decoder_attention_mask"][:, 6:] = 0
    short = {key: value[:, : 6 if "decoder" in key else 3] for key, value in batch.items()}
    names = [
        f"decoder.block.1.layer.{place}"
        for place in ("0.SelfAttention.k", "1.EncDecAttention.k", "1.EncDecAttention.q")
    ]
    names.append("encoder.block.1.layer.0.SelfAttention.k")
    ours, theirs = squares(model, names, batch), squares(model, names, short)
    for name in names:
        assert torch.allclose(ours[name], theirs[name], rtol=1e-4), name


@pytest.mark.parametrize("name", ["llama", "opt", "bert"])
def test_left_padding_does_not_count(name):
    model = make(name)
    ids = torch.randint(3, 60, (1, 6), generator=torch.Generator().manual_seed(0))
    left = {"input_ids": F.pad(ids, (4, 0), value=LOUD), "attention_mask": F.pad(torch.ones_like(ids), (4, 0))}
    left["position_ids"] = torch.arange(10).sub(4).clamp_min(0)[None]
    plain = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    target = {
        "llama": "model.layers.1.mlp.down_proj",
        "opt": "model.decoder.layers.1.fc2",
        "bert": "bert.encoder.layer.1.output.dense",
    }
    names = [target[name]]
    assert torch.allclose(squares(model, names, left)[names[0]], squares(model, names, plain)[names[0]], rtol=1e-3)


def test_experts_in_a_module_list_get_only_real_tokens():
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    torch.manual_seed(0)
    config = SwitchTransformersConfig(
        vocab_size=64, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_decoder_layers=2, num_heads=4, num_experts=3,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, expert_capacity=64, decoder_start_token_id=0,
    )  # fmt: skip
    model = SwitchTransformersForConditionalGeneration(config).eval()
    ids = torch.randint(3, 60, (1, 12))
    plain = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids[:, :5]}
    padded = {
        **plain,
        "input_ids": F.pad(ids, (0, 9), value=63),
        "attention_mask": F.pad(plain["attention_mask"], (0, 9)),
    }
    names = [name for name, module in model.named_modules() if "expert" in name and name.endswith((".wi", ".wo"))]
    ours, theirs = squares(model, names, padded), squares(model, names, plain)
    assert ours.keys() == theirs.keys()
    assert len(ours) > 1
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], rtol=1e-3), name


def test_data_that_is_all_padding_is_refused_before_work():
    ids = torch.randint(3, 60, (2, 8))
    with pytest.raises(hf_optim.DataError, match="attention_mask is 0 everywhere"):
        hf_optim.optimize(
            make("llama"), [{"technique": "gptq"}], calibration=[{"input_ids": ids, "attention_mask": ids * 0}]
        )


def test_what_cannot_be_matched_counts():
    model = make("bert")
    ids = torch.randint(3, 60, (2, 8))
    batch = {"input_ids": ids, "attention_mask": (torch.arange(8) < 5).long().expand(2, 8)}
    found = squares(model, ["classifier", "bert.pooler.dense"], batch)
    with torch.no_grad():
        pooled = model.bert(**batch).pooler_output
    assert torch.allclose(found["classifier"].double(), pooled.square().sum(0), rtol=1e-4)
