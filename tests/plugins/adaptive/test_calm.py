"""The technique: calibrated thresholds with their certificate, the trained classifier, checkpoints, and refusals."""

from __future__ import annotations

import pytest
import torch
from exit_models import blocks_of, decoder
from tiny_models import tiny_bert, tiny_t5
from transformers import AutoModelForCausalLM

import hf_optim
from hf_optim import DataError, ModelError, RecipeError, early_exit
from hf_optim_plugins.adaptive.calm import CALM as Step

ROWS = torch.randint(3, 60, (60, 24), generator=torch.Generator().manual_seed(4))
CALM = {"technique": "calm", "length": 6, "prompt": 8, "delta": 0.4, "epsilon": 0.2}


def exits_that_agree():
    """Return a model whose later blocks add little, so that early exits are often right."""
    model = decoder("llama", double=False)
    with torch.no_grad():
        for block in blocks_of(model)[1:]:
            block.self_attn.o_proj.weight.mul_(0.05)
            block.mlp.down_proj.weight.mul_(0.05)
    return model


def given(rows=3):
    ids = ROWS[:rows, :8]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}


@pytest.mark.many
@pytest.mark.parametrize("guarantee", ["consistency", "risk"])
@pytest.mark.parametrize("distance", ["rouge_l", "edit_distance"])
def test_the_certificate_is_what_the_calibration_set_gives(guarantee, distance, tmp_path):
    model = hf_optim.optimize(
        exits_that_agree(),
        [{**CALM, "guarantee": guarantee, "distance": distance, "candidates": [0.9, 0.5, 0.1]}],
        calibration=ROWS,
    )
    settings = early_exit.settings_of(model.config)
    proven = settings.certificate
    measure = early_exit.DISTANCES[distance]
    prompts = [row[:8] for row in ROWS]
    full = early_exit.outputs(model, prompts, None, 6)
    chosen = None
    for threshold, mean, p_value in proven.tested:
        early = early_exit.outputs(model, prompts, early_exit.EarlyExit(threshold=threshold, length=6), 6)
        losses = [measure(a, b) for a, b in zip(early, full, strict=True)]
        if guarantee == "risk":
            references = [row[8:14].tolist() for row in ROWS]
            losses = [max(0.0, measure(a, c) - measure(b, c)) for a, b, c in zip(early, full, references, strict=True)]
        assert mean == pytest.approx(sum(losses) / 60)
        assert p_value == pytest.approx(early_exit.p_value(sum(losses) / 60, 60, 0.4))
        chosen = threshold if p_value <= 0.2 else chosen
    assert settings.threshold == chosen
    assert (proven.examples, proven.prompt, proven.guarantee, proven.distance) == (60, 8, guarantee, distance)
    assert settings.layers == (0, 1, 2)
    expected = hf_optim.generate(model, **given())
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert early_exit.settings_of(again.config) == settings
    assert torch.equal(hf_optim.generate(again, **given()), expected)
    card = (tmp_path / "README.md").read_text()
    assert "Calibrated on 60 prompts of 8 tokens" in card
    assert "Quality, memory and times in the results, where there are any, are those of all blocks." in card
    assert "at most 0.4, at level 0.2" in card
    assert any(proven.model in path.read_text() for path in tmp_path.glob("*.json") if path.name != "config.json")


def test_early_outputs_are_in_fact_early():
    model = hf_optim.optimize(exits_that_agree(), [{**CALM, "candidates": [0.5, 0.1]}], calibration=ROWS)
    found = hf_optim.generate(model, **given(8), return_dict_in_generate=True)
    assert (found.layers[:, 1:] < 4).any()


@pytest.mark.parametrize("confidence", ["softmax_max", "state"])
def test_other_confidences_are_calibrated(confidence):
    model = hf_optim.optimize(exits_that_agree(), [{**CALM, "confidence": confidence}], calibration=ROWS)
    settings = early_exit.settings_of(model.config)
    assert settings.confidence == confidence
    assert settings.certificate.p_value <= 0.2
    assert settings.layers == ((1, 2) if confidence == "state" else (0, 1, 2))


@pytest.mark.slow
def test_a_classifier_is_fitted_on_rows_of_its_own(tmp_path):
    fields = {**CALM, "confidence": "classifier", "delta": 0.6, "layers": [0, 2]}
    model = hf_optim.optimize(exits_that_agree(), [fields], calibration=ROWS)
    settings = early_exit.settings_of(model.config)
    assert settings.certificate.examples == 30
    stack = early_exit.Stack(model, settings)
    states, labels = early_exit.states_and_labels(stack, ROWS[:30], None)
    weight, bias = early_exit.classifier_of(model)
    logits = torch.einsum("end,ed->en", states, weight) + bias[:, None]
    for place in range(2):  # balanced: both kinds of positions are told apart better than by chance
        right = (logits[place] > 0) == labels[place]
        shares = [right[labels[place] == kind].float().mean() for kind in (True, False)]
        assert sum(shares) / 2 > 0.6
    expected = hf_optim.generate(model, **given())
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(hf_optim.generate(again, **given()), expected)
    path = tmp_path / early_exit.FILE
    path.write_bytes(path.read_bytes()[:-4] + b"abcd")
    with pytest.raises(hf_optim.CheckpointError, match=r"not the file that config\.json describes"):
        hf_optim.generate(AutoModelForCausalLM.from_pretrained(tmp_path), **given())
    path.unlink()
    with pytest.raises(ModelError, match="no trained classifier"):
        hf_optim.generate(AutoModelForCausalLM.from_pretrained(tmp_path), **given())


def test_the_classifier_is_the_minimum_of_the_balanced_loss():
    generator = torch.Generator().manual_seed(2)
    states = torch.randn(2, 400, 5, generator=generator)
    labels = torch.rand(2, 400, generator=generator) < torch.sigmoid(2 * states[..., 0] - 1.5)
    weight, bias = (each.double() for each in early_exit.fit(states, labels))
    for place in range(2):
        x, y = states[place].double(), labels[place].double()
        mean, spread = x.mean(0), x.std(0)
        share = y.mean()
        own = torch.where(y > 0, 0.5 / share, 0.5 / (1 - share))
        slack = own * (torch.sigmoid(x @ weight[place] + bias[place]) - y)
        normalized = (x - mean) / spread
        gradient = (slack[:, None] * normalized).mean(0) + 2e-3 * weight[place] * spread
        assert gradient.abs().max() < 1e-3
        assert abs(float(slack.mean())) < 1e-3


def test_bounds_that_cannot_be_proven_name_the_nearest():
    model = decoder("llama", double=False)  # its exits disagree with it
    with pytest.raises(
        ModelError, match=r"bound of 0\.06 .* cannot be proven .* nearest bound that can be proven is 0\.\d"
    ):
        hf_optim.optimize(model, [{**CALM, "delta": 0.06, "candidates": [0.3]}], calibration=ROWS)
    with pytest.raises(
        ModelError, match=r"60 different prompts prove no bound of 0\.001 .* that takes 1609; the lowest bound"
    ):
        hf_optim.optimize(decoder("llama", double=False), [{**CALM, "delta": 0.001}], calibration=ROWS)
    assert early_exit.settings_of(model.config) is None


@pytest.mark.slow
def test_prompts_that_occur_again_prove_nothing():
    bound = early_exit.Bound(0.4, 0.2, "consistency", "rouge_l", (0.9,))
    settings = early_exit.EarlyExit(length=6)
    with pytest.raises(ModelError, match=r"^1 different prompts prove no bound of 0\.4"):
        early_exit.calibrate(exits_that_agree(), [ROWS[0, :8]] * 500, bound, settings)
    again = early_exit.calibrate(exits_that_agree(), [row[:8] for row in (*ROWS, *ROWS[:20])], bound, settings)
    once = early_exit.calibrate(exits_that_agree(), [row[:8] for row in ROWS], bound, settings)
    assert again.certificate == once.certificate
    model = hf_optim.optimize(exits_that_agree(), [CALM], calibration=torch.cat([ROWS, ROWS[:20]]))
    assert early_exit.settings_of(model.config).certificate.examples == 60
    assert any("20 prompts occurred before and prove nothing" in each for each in hf_optim.run_of(model).record.notes)


def test_wrong_fields_and_models_are_refused():
    cases = [
        ({"threshold": 0.8}, "that no calibration has proven guarantees no consistency"),
        ({"guarantee": "none"}, "name the threshold"),
        ({"candidates": [0.5, 0.7]}, "falling"),
        ({"lossless": True}, "drafts after one block"),
        ({"lossless": True, "layers": [1], "threshold": 0.5}, "draft_threshold"),
        ({"layers": [2, 1]}, "ascend"),
        ({"candidates": [1.5, 0.5]}, "calm: each of candidates must be a number from -1 to 1"),
    ]
    for fields, words in cases:
        with pytest.raises(RecipeError, match=words):
            Step.from_dict(fields)
    free = {"technique": "calm", "guarantee": "none", "threshold": 0.5}
    with pytest.raises(ModelError, match=r"calm.*BertForSequenceClassification"):
        hf_optim.optimize(tiny_bert(), [free])
    with pytest.raises(ModelError, match="encoder-decoder"):
        hf_optim.optimize(tiny_t5(), [free])
    with pytest.raises(ModelError, match="after block 3"):
        hf_optim.optimize(decoder("llama", double=False), [{**free, "layers": [3]}])
    with pytest.raises(DataError, match=r"a prompt takes 40 tokens, and the longest row .* has 24"):
        hf_optim.optimize(decoder("llama", double=False), [{**CALM, "prompt": 40}], calibration=ROWS)
    one = {**CALM, "confidence": "classifier", "delta": 0.95}
    with pytest.raises(DataError, match="one row of the calibration data"):
        hf_optim.optimize(decoder("llama", double=False), [one], calibration=ROWS[:1])


@pytest.mark.parametrize("attention", [{"technique": "axial", "columns": 2}, {"technique": "compressed", "local": 2}])
def test_caches_that_do_not_keep_the_latest_key_are_refused(attention):
    step = {"technique": "calm", "guarantee": "none", "threshold": 0.5, "length": 16}
    with pytest.raises(ModelError, match=r"step 2 \(calm\): block 0 of .* does not keep the key of its latest token"):
        hf_optim.optimize(decoder("llama", double=False), [attention, step])


def test_one_prompt_proves_a_bound_that_is_weak_enough():
    model = hf_optim.optimize(decoder("llama", double=False), [{**CALM, "delta": 0.9}], calibration=ROWS[:1])
    certificate = early_exit.settings_of(model.config).certificate
    assert certificate.examples == 1
    assert certificate.p_value <= 0.2


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"delta": 0.0}, "delta must be above 0"),
        ({"delta": 1}, "delta must be above 0 and below 1"),
        ({"delta": float("nan")}, "delta must be a number"),
        ({"epsilon": 1.0}, "epsilon must be above 0 and below 1"),
        ({"candidates": ()}, "at least one"),
        ({"candidates": (0.5, 0.9)}, "falling"),
        ({"candidates": (0.9, 0.9)}, "falling"),
        ({"candidates": (float("nan"),)}, "each of candidates"),
        ({"guarantee": "none"}, "guarantee must be one of consistency, risk"),
        ({"distance": "bleu"}, "distance must be one of rouge_l"),
    ],
)
def test_bounds_that_mean_nothing_are_refused(fields, words):
    with pytest.raises(RecipeError, match=words):
        early_exit.Bound(**{"delta": 0.4, "epsilon": 0.2, "candidates": (0.9, 0.5), **fields})


def test_the_models_own_settings_of_generation_do_not_disturb_the_calibration():
    bound = early_exit.Bound(0.9, 0.2, candidates=(0.9,))
    given, settings = [row[:8] for row in ROWS[:4]], early_exit.EarlyExit(length=6)
    plain = early_exit.calibrate(decoder("llama", double=False), given, bound, settings)
    model = decoder("llama", double=False)
    model.generation_config.update(return_dict_in_generate=True, output_scores=True, do_sample=True)
    assert early_exit.calibrate(model, given, bound, settings) == plain
    assert plain.certificate.settings["processors"] == []
    model.generation_config.repetition_penalty = 1.2
    penalized = early_exit.calibrate(model, given, bound, settings)
    assert penalized.certificate.settings["processors"] == ["RepetitionPenaltyLogitsProcessor(penalty=1.2)"]


@pytest.mark.many
@pytest.mark.parametrize("mode", ["stock", "auto"])
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_quantized_models_leave_early_under_their_certificate(name, mode, tmp_path):
    source = exits_that_agree() if name == "llama" else decoder(name, double=False)
    if name == "opt":
        with torch.no_grad():
            for block in blocks_of(source)[1:]:
                block.self_attn.out_proj.weight.mul_(0.05), block.fc2.weight.mul_(0.05)
    rtn = {"technique": "rtn", "bits": 8}
    model = hf_optim.optimize(source, [rtn, {**CALM, "delta": 0.6}], calibration=ROWS)
    expected = hf_optim.generate(model, **given(), return_dict_in_generate=True)
    model.save_pretrained(tmp_path)
    more = {"optim_config": "auto"} if mode == "auto" else {}
    again = AutoModelForCausalLM.from_pretrained(tmp_path, **more)
    assert early_exit.settings_of(again.config).certificate is not None
    found = hf_optim.generate(again, **given(), return_dict_in_generate=True)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.layers, expected.layers)


def test_a_later_change_of_the_weights_ends_the_guarantee():
    model = hf_optim.optimize(exits_that_agree(), [CALM], calibration=ROWS)
    hf_optim.generate(model, **given())
    changed = hf_optim.optimize(model, [{"technique": "rtn", "bits": 4}])
    with pytest.raises(ModelError, match="other weights"):
        hf_optim.generate(changed, **given())


def test_lossless_is_a_setting_without_data(tmp_path):
    step = {"technique": "calm", "lossless": True, "layers": [1], "drafts": 3}
    model = hf_optim.optimize(decoder("llama", double=False), [step])
    stock = model.generate(**given())
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    found = hf_optim.generate(again, **given(), return_dict_in_generate=True)
    assert torch.equal(found.sequences, stock)
    assert found.rounds > 0
    assert "verifies" in (tmp_path / "README.md").read_text()
