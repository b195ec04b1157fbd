"""Tokens that leave early, against whole sequences without a cache, against each row alone, and against stock."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from dataclasses import replace

import pytest
import torch
from exit_models import MODELS, blocks_of, decode_slowly, decoder
from tiny_models import tiny_bert, tiny_t5
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

import hf_optim
from hf_optim import ModelError, RecipeError, early_exit
from hf_optim.generation import sessions

Exit = early_exit.EarlyExit
KINDS = ("softmax_gap", "softmax_max", "state")


def prompts(rows=3, length=8, pad=3):
    ids = torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[0, :pad] = 0
    ids[0, :pad] = 0
    return {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 14, "do_sample": False}


def alone(given, row):
    first = int((given["attention_mask"][row] == 0).sum())
    cut = {name: given[name][row : row + 1, first:] for name in ("input_ids", "attention_mask")}
    return {**given, **cut}


def spread(settings, model, given):
    """Return settings with a threshold between the confidences of these prompts, far from each of them."""
    seen = []
    of = early_exit.confidence.Confidence.of

    def note(self, *args):
        found = of(self, *args)
        seen.append(found[0])
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(early_exit.confidence.Confidence, "of", note)
        hf_optim.generate(model, **given, early_exit=replace(settings, threshold=1.0))
    found = torch.cat(seen).sort().values
    first, last = len(found) * 11 // 20, len(found) * 13 // 20
    place = first + int(found[first : last + 1].diff().argmax())
    return replace(settings, threshold=float(found[place : place + 2].mean()))


@pytest.mark.many
@pytest.mark.parametrize("name", MODELS)
def test_a_threshold_above_one_is_stock_to_the_bit(name):
    model, given = decoder(name, double=False), prompts()
    for more in ({}, {"repetition_penalty": 1.3}, {"do_sample": True, "top_k": 20, "temperature": 0.8}):
        wanted = {**given, **more, "return_dict_in_generate": True, "output_logits": True, "output_scores": True}
        torch.manual_seed(1)
        expected = model.generate(**wanted)
        torch.manual_seed(1)
        found = hf_optim.generate(model, **wanted, early_exit=Exit(threshold=1.5))
        assert torch.equal(found.sequences, expected.sequences)
        for one, other in zip((*found.logits, *found.scores), (*expected.logits, *expected.scores), strict=True):
            assert torch.equal(one, other)
        assert (found.layers == 4).all()
        assert found.layers.shape == (3, 14)


@pytest.mark.many
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_mixed_exits_are_each_row_alone_and_the_slow_way(name, kind):
    # In float64, Gemma 2's masked attention is NaN at padding, in transformers' loop as well.
    model, given = decoder(name), prompts(pad=0 if name == "gemma2" else 3)
    settings = spread(Exit(confidence=kind, length=14), model, given)
    found = hf_optim.generate(model, **given, return_dict_in_generate=True, early_exit=settings)
    depths = found.layers[:, 1:]
    assert (depths < 4).any()
    assert (depths == 4).any()
    assert any(len(column.unique()) > 1 for column in depths.T)  # rows leave at different blocks
    for row in range(3):
        mine = alone(given, row)
        single = hf_optim.generate(model, **mine, return_dict_in_generate=True, early_exit=settings)
        tokens, taken = decode_slowly(model, mine["input_ids"], settings, 14)
        assert torch.equal(single.sequences, tokens)
        assert single.layers[0].tolist() == taken
        assert torch.equal(found.sequences[row, 8:], tokens[0, -14:])
        assert found.layers[row].tolist() == taken


@pytest.mark.parametrize("decay", ["code", "paper"])
def test_a_threshold_that_falls(decay):
    model, given = decoder("llama"), prompts(1, pad=0)
    settings = spread(Exit(decay=decay, length=14, temperature=3.0), model, given)
    found = hf_optim.generate(model, **given, return_dict_in_generate=True, early_exit=settings)
    tokens, taken = decode_slowly(model, given["input_ids"], settings, 14)
    assert torch.equal(found.sequences, tokens)
    assert found.layers[0].tolist() == taken
    assert settings.limit(0) == pytest.approx(
        settings.threshold if decay == "code" else min(1, 0.9 * settings.threshold + 0.1)
    )


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_all_tokens_at_one_exit_are_the_shorter_model_with_filled_keys(name):
    model, given = decoder(name), prompts(1, pad=0)
    settings = Exit(threshold=0.0, layers=(1,))
    found = hf_optim.generate(model, **given, return_dict_in_generate=True, early_exit=settings)
    assert found.layers[0].tolist() == [4, *[2] * 13]
    assert torch.equal(found.sequences, decode_slowly(model, given["input_ids"], settings, 14)[0])


def test_blocks_that_are_left_out_compute_keys_and_values_alone():
    model, given = decoder("llama"), prompts(2, pad=0)
    ran = []
    handles = [
        block.mlp.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, block in enumerate(blocks_of(model))
    ]
    queries = []
    handles.append(blocks_of(model)[3].self_attn.q_proj.register_forward_hook(lambda *_: queries.append(1)))
    hf_optim.generate(model, **given, early_exit=Exit(threshold=0.0, layers=(1,)))
    ran.clear(), queries.clear()
    hf_optim.generate(model, **given, early_exit=Exit(threshold=0.0, layers=(1,)))
    for handle in handles:
        handle.remove()
    assert [ran.count(i) for i in range(4)] == [14, 14, 1, 1]
    assert len(queries) == 1


def test_rows_that_ended_leave_and_are_padded_as_in_stock():
    model, given = decoder("llama"), prompts()
    plain = hf_optim.generate(model, **given, early_exit=Exit(threshold=1.5))
    given |= {"eos_token_id": [int(plain[0, 10]), int(plain[1, 14])]}
    for settings in (Exit(threshold=1.5), spread(Exit(), model, given)):
        found = hf_optim.generate(model, **given, return_dict_in_generate=True, early_exit=settings)
        for row in range(3):
            single = hf_optim.generate(model, **alone(given, row), early_exit=settings)
            own = single[0, -(single.shape[1] - alone(given, row)["input_ids"].shape[1]) :]
            assert torch.equal(found.sequences[row, 8 : 8 + len(own)], own)
            assert (found.sequences[row, 8 + len(own) :] == 0).all()
            assert (found.layers[row, len(own) :] == 0).all()
    assert torch.equal(hf_optim.generate(model, **given, early_exit=Exit(threshold=1.5)), model.generate(**given))


class AtSeven(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= 15)


def test_criteria_streamers_and_custom_generate():
    model, given = decoder("llama"), prompts(1, pad=0)
    settings = spread(Exit(), model, given)
    whole = hf_optim.generate(model, **given, early_exit=settings)
    stopped = hf_optim.generate(
        model, **given, early_exit=settings, stopping_criteria=StoppingCriteriaList([AtSeven()])
    )
    assert torch.equal(stopped, whole[:, :15])

    class Words(TextStreamer):
        def __init__(self):
            self.seen, self.ended = [], False

        def put(self, value):
            self.seen.append(value.reshape(-1))

        def end(self):
            self.ended = True

    words = Words()
    hf_optim.generate(model, **given, early_exit=settings, streamer=words)
    assert torch.equal(torch.cat(words.seen), whole[0])
    assert words.ended
    words = Words()
    by_custom = model.generate(**given, custom_generate=early_exit.custom(settings), streamer=words)
    assert torch.equal(by_custom, whole)
    assert torch.equal(torch.cat(words.seen), whole[0])
    assert words.ended
    with pytest.raises(ModelError, match="an assistant drafts"):
        model.generate(**given, custom_generate=early_exit.custom(settings), assistant_model=copy.deepcopy(model))


def test_the_entry_of_a_configuration_is_read(tmp_path):
    model, given = decoder("llama", double=False), prompts()
    settings = spread(Exit(), model, given)
    stock = model.generate(**given)
    early_exit.set_settings(model.config, settings)
    expected = hf_optim.generate(model, **given)
    assert not torch.equal(expected, stock)
    assert torch.equal(hf_optim.generate(model, **given, mode="stock"), stock)
    assert torch.equal(hf_optim.generate(model, **given, early_exit=False), stock)
    assert torch.equal(model.generate(**given), stock)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert early_exit.settings_of(again.config) == settings
    assert torch.equal(hf_optim.generate(again, **given), expected)
    early_exit.set_settings(again.config, None)
    assert early_exit.settings_of(again.config) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda entry: entry.pop("decay"), "has no decay"),
        (lambda entry: entry.update(speed=2), "has 'speed'"),
        (lambda entry: entry.update(threshold="high"), "threshold must be a number"),
        (lambda entry: entry.update(threshold=float("nan")), "threshold must be a number"),
        (lambda entry: entry.update(layers=[2, 1]), "layers must ascend"),
        (lambda entry: entry.update(confidence="vote"), "confidence must be one of"),
        (lambda entry: entry.update(certificate=3), "certificate must be a mapping"),
        (lambda entry: entry.update(certificate={"delta": 0.1}), "certificate has no"),
        (lambda entry: entry.update(lossless=True), "drafts after one block"),
        (lambda entry: entry.update(drafts=0), "drafts must be a whole number"),
    ],
)
def test_a_damaged_entry_is_refused(change, words):
    model = decoder("llama")
    early_exit.set_settings(model.config, Exit())
    change(getattr(model.config, early_exit.SETTING))
    with pytest.raises(ModelError, match=words):
        hf_optim.generate(model, **prompts())


def test_what_exits_do_not_serve_is_refused_with_the_reason():
    model, given = decoder("llama"), prompts()
    cases = [
        ({"num_beams": 2}, "beams"),
        ({"cache_implementation": "static"}, "cache_implementation='static'"),
        ({"use_cache": False}, "use_cache=False"),
        ({"prompt_lookup_num_tokens": 2}, "assistant"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "hidden states"),
    ]
    for more, words in cases:
        with pytest.raises(ModelError, match=f"(?s){words}.*stock"):
            hf_optim.generate(model, **given, **more, early_exit=Exit())
    with pytest.raises(ModelError, match=r"cannot leave .* after block 3: its exits sit after blocks 0, 1, 2"):
        hf_optim.generate(model, **given, early_exit=Exit(layers=(3,)))
    with pytest.raises(ModelError, match="must be an EarlyExit, False or None"):
        hf_optim.generate(model, **given, early_exit=0.5)
    with pytest.raises(ModelError, match="no trained classifier"):
        hf_optim.generate(model, **given, early_exit=Exit(confidence="classifier"))
    with pytest.raises(RecipeError, match="no token can leave after block 0"):
        Exit(confidence="state", layers=(0, 1))
    with pytest.raises(ModelError, match="training mode"):
        hf_optim.generate(model.train(), **given, early_exit=Exit())
    with pytest.raises(ModelError, match="encoder-decoder"):
        hf_optim.generate(tiny_t5(), input_ids=given["input_ids"], max_new_tokens=3, early_exit=Exit())
    with pytest.raises(ModelError):
        early_exit.Stack(tiny_bert(), Exit()).prove()


def test_nothing_is_left_on_the_model_which_is_freed_when_deleted():
    model, given = decoder("llama"), prompts()
    before = sessions.fingerprint(model)
    hf_optim.generate(model, **given, early_exit=Exit(threshold=0.3))
    hf_optim.generate(model, **given, early_exit=Exit(lossless=True, layers=(1,)))
    with pytest.raises(ModelError):
        hf_optim.generate(model, **given, num_beams=2, early_exit=Exit())
    assert sessions.fingerprint(model) == before
    watched = [weakref.ref(model), weakref.ref(blocks_of(model)[1])]
    gc.collect()
    gc.disable()
    try:
        del model
        assert [each() for each in watched] == [None, None]
    finally:
        gc.enable()


def certified(model, **changes):
    settings = Exit(threshold=0.5, layers=(0, 1), length=14)
    proven = early_exit.Certificate(
        "consistency", "rouge_l", 0.2, 0.05, 100, 0.01, 1e-4, ((0.5, 0.01, 1e-4),),
        {name: value for name, value in settings.to_dict().items() if name in early_exit.settings.CERTIFIED},
        early_exit.door.weights_of(model), 8,
    )  # fmt: skip
    return replace(settings, certificate=proven, **changes)


def test_a_certificate_is_for_its_weights_and_settings():
    model, given = decoder("llama"), prompts()
    settings = certified(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hf_optim.generate(model, **given, early_exit=settings)
    for name, value in (("threshold", 0.4), ("layers", (0,)), ("confidence", "softmax_max"), ("length", 20)):
        with pytest.raises(ModelError, match=f"certificate of the early exits is for {name}"):
            hf_optim.generate(model, **given, early_exit=replace(settings, **{name: value}))
    for limit in (20, 6):
        with pytest.warns(early_exit.GuaranteeWarning, match=f"{limit} new tokens, calibrated for 14"):
            hf_optim.generate(model, **{**given, "max_new_tokens": limit}, early_exit=settings)
    with pytest.warns(early_exit.GuaranteeWarning, match=r"RepetitionPenalty.*\(penalty=1.5\).*calibrated with none"):
        hf_optim.generate(model, **given, repetition_penalty=1.5, early_exit=settings)
    with pytest.warns(early_exit.GuaranteeWarning, match="sampling"):
        hf_optim.generate(model, **{**given, "do_sample": True}, early_exit=settings)
    trained = copy.deepcopy(model)
    with torch.no_grad():
        blocks_of(trained)[2].mlp.up_proj.weight.mul_(1.01)
    for other in (trained, copy.deepcopy(model).float()):
        with pytest.raises(ModelError, match="other weights"):
            hf_optim.generate(other, **given, early_exit=settings)
    hf_optim.generate(trained, **given, early_exit=replace(settings, certificate=None))
    with torch.no_grad():  # after its fingerprint was taken
        blocks_of(model)[2].mlp.up_proj.weight.mul_(1.01)
    with pytest.raises(ModelError, match="other weights"):
        hf_optim.generate(model, **given, early_exit=settings)


def test_a_write_that_leaves_no_trace_on_the_tensor_ends_the_guarantee():
    model, given = decoder("llama"), prompts()
    settings = certified(model)
    hf_optim.generate(model, **given, early_exit=settings)
    blocks_of(model)[2].mlp.up_proj.weight.data.mul_(1.01)  # as adapters are merged
    with pytest.raises(ModelError, match="other weights"):
        hf_optim.generate(model, **given, early_exit=settings)


@pytest.mark.parametrize(("rows", "columns"), [(120, 64), (8192, 256), (4096, 64), (17, 1000)])
def test_a_fingerprint_reads_all_parts_of_a_weight(rows, columns):
    model = torch.nn.Linear(columns, rows, bias=False)
    seen = {early_exit.fingerprint.fingerprint(model)}
    with torch.no_grad():
        for part in (slice(None, columns // 4), slice(columns // 2, None)):
            model.weight[:, part] *= 2
            seen.add(early_exit.fingerprint.fingerprint(model))
        for part in (slice(None, rows // 4), slice(rows - rows // 4, None)):
            model.weight[part] *= 2
            seen.add(early_exit.fingerprint.fingerprint(model))
    assert len(seen) == 5


def test_exits_with_heads_of_their_own_are_read_by_them():
    model, given = decoder("llama", double=False), prompts(1, pad=0)
    exits = hf_optim.attach_exits(model, hf_optim.ExitSettings(layers=(0, 2), heads="own"))
    with torch.no_grad():
        for parameter in exits.parameters():
            parameter.mul_(1 + torch.rand(parameter.shape, generator=torch.Generator().manual_seed(0)))
    settings = Exit(threshold=0.0, layers=(2,))
    found = hf_optim.generate(model, **given, early_exit=settings)
    ids = found[:, :9]  # the first new token is the prefill's, the second that of the exit
    states = model(input_ids=ids, output_hidden_states=True).hidden_states
    assert int(found[0, 9]) == int(exits.logits(1, states[3][:, -1]).argmax())
    assert early_exit.default_layers(model, "softmax_gap") == (0, 2)
    with pytest.raises(ModelError, match="its exits sit after blocks 0, 2"):
        hf_optim.generate(model, **given, early_exit=Exit(layers=(1,)))
    before = early_exit.door.weights_of(model)
    with torch.no_grad():
        next(exits.parameters()).mul_(1.5)
    assert early_exit.door.weights_of(model) != before
