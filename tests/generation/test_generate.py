"""``hf_optim.generate``: the tokens of transformers, and its loop where a step cannot be captured."""

from __future__ import annotations

import threading
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
from generating import FAMILIES, SETTINGS, both, make, prompt
from tiny_models import tiny_llama
from tiny_tokenizer import tiny_tokenizer
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import hf_optim
from hf_optim.generation import sessions
from hf_optim.toolkit.compat import CACHE
from hf_optim.toolkit.modules.graph_capture import CaptureError


@pytest.fixture
def llama():
    return make("llama")


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral-window-6", "gemma3-window-6"])
def test_left_padded_batches_get_the_tokens_of_transformers(name, settings):
    model = make(name)
    expected, found = both(model, prompt(model), **SETTINGS[settings])
    assert torch.equal(expected, found)


@pytest.mark.many(every=4)
@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"llama", "gpt2", "mistral-window-6", "gemma3-window-6"}))
def test_other_families_get_the_tokens_of_transformers(name):
    model = make(name)
    inputs = prompt(model)
    assert torch.equal(*both(model, inputs))
    assert torch.equal(*both(model, inputs, **SETTINGS["penalty"], **SETTINGS["sampled"]))


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_rows_that_fill_a_bucket_change_nothing(llama, rows):
    inputs = prompt(llama, rows, length=11)
    assert torch.equal(*both(llama, inputs, **SETTINGS["ends"]))
    assert [key[0] for key in sessions._MODELS[llama]] == [sessions.rows_bucket(rows)]


def test_the_other_door_is_the_same(llama):
    inputs = prompt(llama)
    expected = llama.generate(**inputs, max_new_tokens=6)
    assert torch.equal(llama.generate(**inputs, max_new_tokens=6, custom_generate=hf_optim.generate), expected)
    found = llama.generate(**inputs, max_new_tokens=6, custom_generate=hf_optim.generate, mode="eager")
    assert torch.equal(found, expected)
    assert sessions._MODELS[llama]


def test_scores_logits_and_cache_are_returned(llama):
    inputs = prompt(llama)
    asked = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "temperature": 0.5}
    expected, found = both(llama, inputs, do_sample=True, **asked)
    assert torch.equal(expected.sequences, found.sequences)
    for name in ("scores", "logits"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert len(ours) == len(theirs) == 20
        torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(found[CACHE].layers, expected[CACHE].layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.values, theirs.values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma3-window-6"])
def test_a_conversation_continues_from_the_cache_returned(name):
    model = make(name)
    inputs = prompt(model, rows=1)
    first = hf_optim.generate(model, **inputs, max_new_tokens=5, return_dict_in_generate=True, mode="eager")
    longer = torch.cat([first.sequences, torch.tensor([[4, 9, 6]])], dim=1)
    expected = model.generate(longer, attention_mask=torch.ones_like(longer), max_new_tokens=12)
    found = hf_optim.generate(
        model, longer, attention_mask=torch.ones_like(longer), max_new_tokens=12, mode="eager", **{CACHE: first[CACHE]}
    )
    assert torch.equal(found, expected)


def test_a_second_call_makes_no_second_session(llama):
    for length, new in ((9, 20), (30, 40), (5, 3)):
        hf_optim.generate(llama, **prompt(llama, length=length), max_new_tokens=new, mode="eager")
    assert len(sessions._MODELS[llama]) == 1
    hf_optim.generate(llama, **prompt(llama, length=200), max_new_tokens=60, mode="eager")
    assert len(sessions._MODELS[llama]) == 2


class Collected(BaseStreamer):
    def __init__(self):
        self.parts, self.ended = [], False

    def put(self, value):
        self.parts.append(value.reshape(-1))

    def end(self):
        self.ended = True


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "custom_generate"])
def test_streamers_get_each_token_once(llama, direct):
    inputs, streamer = prompt(llama, rows=1), Collected()
    settings = {"max_new_tokens": 11, "eos_token_id": [3, 5, 7, 11, 13, 17, 19, 23], "streamer": streamer}
    if direct:
        found = hf_optim.generate(llama, **inputs, **settings, mode="eager")
    else:
        found = llama.generate(**inputs, **settings, custom_generate=hf_optim.generate, mode="eager")
    assert torch.cat(streamer.parts).tolist() == found[0].tolist()
    assert streamer.ended


def test_stop_strings_stop_where_transformers_does():
    tokenizer = tiny_tokenizer()
    torch.manual_seed(3)
    model = tiny_llama(vocab_size=len(tokenizer)).eval()
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, 2
    inputs = tokenizer(["the quick brown", "fox"], return_tensors="pt", padding=True, padding_side="left")
    inputs.pop("token_type_ids", None)
    text = tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0][inputs["input_ids"].shape[1] + 4])
    asked = {"max_new_tokens": 20, "stop_strings": [text.strip()], "tokenizer": tokenizer}
    expected = model.generate(**inputs, **asked)
    assert expected.shape[1] < inputs["input_ids"].shape[1] + 20 or bool((expected == 0).any())
    assert torch.equal(hf_optim.generate(model, **inputs, **asked, mode="eager"), expected)
    with pytest.raises(hf_optim.ModelError, match="tokenizer="):
        hf_optim.generate(model, **inputs, stop_strings=["x"])


def test_max_time_ends_soon(llama):
    found = hf_optim.generate(llama, **prompt(llama), max_new_tokens=400, max_time=1e-4, mode="eager")
    assert 9 < found.shape[1] < 9 + 40


class Odd(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


class Never(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"num_beams": 2}, "2 beams"),
        ({"logits_processor": [Odd()]}, "Odd may look at Python state"),
        ({"stopping_criteria": [Never()]}, "Never may look at Python state"),
        ({"bad_words_ids": [[3, 4]]}, "NoBadWords"),
        ({"use_cache": False}, "use_cache"),
        ({"cache_implementation": "static"}, "cache_implementation='static'"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "hidden states"),
        ({"prompt_lookup_num_tokens": 2}, "assistant"),
    ],
)  # fmt: skip
def test_what_cannot_be_captured_runs_in_transformers_loop_and_says_why(llama, settings, reason):
    inputs = prompt(llama, rows=1)
    expected = llama.generate(**inputs, max_new_tokens=6, **settings)
    with pytest.warns(hf_optim.GenerationWarning, match=reason):
        found = hf_optim.generate(llama, **inputs, max_new_tokens=6, mode="eager", **settings)
    expected, found = (each if torch.is_tensor(each) else each.sequences for each in (expected, found))
    assert torch.equal(expected, found)


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "custom_generate"])
def test_a_warning_names_the_line_of_the_caller(llama, direct):
    ours = partial(hf_optim.generate, mode="eager")
    call = partial(ours, llama) if direct else partial(llama.generate, custom_generate=ours)
    with pytest.warns(hf_optim.GenerationWarning) as seen:
        call(**prompt(llama, rows=1), max_new_tokens=3, num_beams=2)
    assert [each.filename for each in seen if each.category is hf_optim.GenerationWarning] == [__file__]


def test_a_cpu_runs_transformers_loop_without_a_warning(llama):
    inputs = prompt(llama)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = hf_optim.generate(llama, **inputs, max_new_tokens=5)
    assert torch.equal(found, llama.generate(**inputs, max_new_tokens=5))
    assert llama not in sessions._MODELS


def test_a_session_that_differs_from_transformers_is_not_used(llama, monkeypatch):
    from hf_optim.generation.session import DecodeSession

    right = DecodeSession.load

    def wrong(self, batch):
        right(self, replace(batch, mask=None))  # padding is forgotten

    monkeypatch.setattr(DecodeSession, "load", wrong)
    inputs = prompt(llama)
    with pytest.warns(hf_optim.GenerationWarning, match="differs from transformers"):
        found = hf_optim.generate(llama, **inputs, max_new_tokens=8, mode="eager")
    assert torch.equal(found, llama.generate(**inputs, max_new_tokens=8))


def test_a_changed_model_gets_a_new_session(llama):
    inputs = prompt(llama)
    hf_optim.generate(llama, **inputs, max_new_tokens=4, mode="eager")
    key, (_, session) = next(iter(sessions._MODELS[llama].items()))
    assert sessions.find(llama, key) is session
    with torch.no_grad():
        llama.lm_head.weight.add_(1.0)  # read from its address
    assert sessions.find(llama, key) is session
    llama.lm_head.weight = torch.nn.Parameter(torch.randn_like(llama.lm_head.weight))
    assert sessions.find(llama, key) is None
    assert torch.equal(*both(llama, inputs))


@pytest.mark.parametrize("change", ["hook", "class", "setting"])
def test_hooks_classes_and_settings_count_as_changes(llama, change):
    before = sessions.fingerprint(llama)
    layer = llama.model.layers[0].self_attn
    if change == "hook":
        layer.register_forward_hook(lambda *_: None)
    elif change == "class":
        layer.q_proj.__class__ = type("Other", (torch.nn.Linear,), {})
    else:
        layer.scaling = 2.0
    assert sessions.fingerprint(llama) != before


def test_a_deleted_model_is_freed_with_its_sessions(llama):
    import gc
    import weakref

    hf_optim.generate(llama, **prompt(llama), max_new_tokens=4, mode="eager")
    session = weakref.ref(next(iter(sessions._MODELS[llama].values()))[1])
    model = weakref.ref(llama)
    gc.collect()
    gc.disable()
    try:
        local = make("llama")
        hf_optim.generate(local, **prompt(local), max_new_tokens=4, mode="eager")
        alive = weakref.ref(local), weakref.ref(next(iter(sessions._MODELS[local].values()))[1])
        del local
        assert [each() for each in alive] == [None, None]
    finally:
        gc.enable()
    assert model() is not None
    assert session() is not None


def test_not_a_number_is_reported_once_with_its_step(llama):
    inputs = prompt(llama)
    hf_optim.generate(llama, **inputs, max_new_tokens=4, mode="eager")
    with torch.no_grad():
        llama.lm_head.weight[3] = float("nan")
    with pytest.warns(hf_optim.GenerationWarning, match="NaN from token 9 ") as seen:
        hf_optim.generate(llama, **inputs, max_new_tokens=4, mode="eager")
    assert len([each for each in seen if each.category is hf_optim.GenerationWarning]) == 1
    with torch.no_grad():
        llama.lm_head.weight[3] = 0.0
    assert torch.equal(*both(llama, inputs))


def test_not_a_number_in_transformers_loop_is_reported_too(llama):
    inputs = prompt(llama)
    expected = hf_optim.generate(llama, **inputs, max_new_tokens=4)
    row = llama.lm_head.weight[3].detach().clone()
    with torch.no_grad():
        llama.lm_head.weight[3] = float("nan")
    for call in ({}, {"num_beams": 2}, {"mode": "stock"}):
        with pytest.warns(hf_optim.GenerationWarning, match="NaN from token 9 ") as seen:
            hf_optim.generate(llama, **inputs, max_new_tokens=4, **call)
        assert len([each for each in seen if each.category is hf_optim.GenerationWarning]) == 1
    with pytest.raises(hf_optim.ModelError, match=r"NaN from token 9 .* no token can be drawn"):
        hf_optim.generate(llama, **inputs, max_new_tokens=4, do_sample=True)
    with torch.no_grad():
        llama.lm_head.weight[3] = row
    assert torch.equal(hf_optim.generate(llama, **inputs, max_new_tokens=4), expected)


def test_a_second_thread_runs_in_transformers_loop(llama):
    inputs = prompt(llama)
    expected = hf_optim.generate(llama, **inputs, max_new_tokens=6, mode="eager")
    results = []

    def other():
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            results.append((hf_optim.generate(llama, **inputs, max_new_tokens=6, mode="eager"), seen))

    with sessions.lock(llama):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    found, seen = results[0]
    assert torch.equal(found, expected)
    assert any("another call" in str(each.message) for each in seen)


def test_an_interrupted_call_leaves_the_model_usable(llama, monkeypatch):
    from hf_optim.generation.session import DecodeSession

    inputs = prompt(llama)
    hf_optim.generate(llama, **inputs, max_new_tokens=6, mode="eager")
    right, calls = DecodeSession.forward, []

    def interrupted(self, *args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return right(self, *args)

    monkeypatch.setattr(DecodeSession, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hf_optim.generate(llama, **inputs, max_new_tokens=6, mode="eager")
    monkeypatch.undo()
    assert not sessions._MODELS[llama]
    assert torch.equal(*both(llama, inputs))


def test_no_memory_for_the_cache_is_said(llama, monkeypatch):
    from hf_optim.generation import door

    def full(*args):
        raise torch.OutOfMemoryError("full")

    inputs = prompt(llama)
    monkeypatch.setattr(door, "DecodeSession", full)
    with pytest.warns(hf_optim.GenerationWarning, match="does not fit"):
        found = hf_optim.generate(llama, **inputs, max_new_tokens=6, mode="eager")
    monkeypatch.undo()
    assert torch.equal(found, both(llama, inputs)[1][:, : found.shape[1]])


def test_wrong_arguments_are_refused(llama):
    with pytest.raises(hf_optim.ModelError, match="mode 'fast' is not one of"):
        hf_optim.generate(llama, **prompt(llama), mode="fast")
    with pytest.raises(hf_optim.ModelError, match="str has no generate"):
        hf_optim.generate("org/model", **prompt(llama))
    with pytest.raises(hf_optim.ModelError, match="input_ids is on meta, the model on cpu"):
        hf_optim.generate(llama, torch.zeros(1, 3, dtype=torch.long, device="meta"))


@pytest.mark.parametrize(
    ("tokens", "length"), [(1, 256), (256, 256), (257, 384), (385, 512), (3000, 3072), (4097, 6144)]
)
def test_lengths_are_bucketed(tokens, length):
    assert sessions.length_bucket(tokens) == length


@pytest.mark.parametrize(("rows", "bucket"), [(1, 1), (5, 6), (64, 64), (65, 128)])
def test_rows_are_bucketed(rows, bucket):
    assert sessions.rows_bucket(rows) == bucket


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["captured", "auto"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "mixtral", "mistral-window-6", "gemma3-window-6"])
def test_captured_steps_give_the_tokens_of_transformers(name, mode):
    model = make(name).cuda()
    inputs = {key: value.cuda() for key, value in prompt(model).items()}
    for settings in ("greedy", "sampled", "penalty", "ends"):
        for _ in range(2):
            torch.manual_seed(5)
            expected = model.generate(**inputs, max_new_tokens=20, **SETTINGS[settings])
            torch.manual_seed(5)
            with warnings.catch_warnings():
                warnings.simplefilter("error", hf_optim.GenerationWarning)
                found = hf_optim.generate(model, **inputs, max_new_tokens=20, mode=mode, **SETTINGS[settings])
            assert torch.equal(expected, found)


@pytest.mark.gpu
def test_a_capture_that_fails_leaves_the_random_generator_usable():
    model = make("llama").cuda()
    inputs = {key: value.cuda() for key, value in prompt(model).items()}
    hf_optim.generate(model, **inputs, max_new_tokens=5, mode="captured")
    session = next(iter(sessions._MODELS[model].values()))[1]

    def run():
        torch.rand(3, device="cuda")
        torch.zeros(1, device="cuda").item()

    with pytest.raises(CaptureError):
        session._capture(run)
    assert torch.rand(3, device="cuda").shape == (3,)
    torch.manual_seed(5)
    expected = model.generate(**inputs, max_new_tokens=20, **SETTINGS["sampled"])
    torch.manual_seed(5)
    assert torch.equal(
        hf_optim.generate(model, **inputs, max_new_tokens=20, mode="captured", **SETTINGS["sampled"]), expected
    )


@pytest.mark.gpu
def test_a_deleted_model_leaves_no_memory_on_the_device():
    import gc

    def left() -> tuple[int, int]:
        """Return the bytes on the device after a model has generated and is deleted, and its own."""
        model = make("llama").cuda()
        inputs = {key: value.cuda() for key, value in prompt(model).items()}
        hf_optim.generate(model, **inputs, max_new_tokens=5, mode="captured")
        assert sessions._MODELS[model]
        size = sum(each.numel() * each.element_size() for each in model.parameters())
        del model, inputs
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), size

    first, _ = left()  # with it, libraries have allocated their workspaces
    second, size = left()
    assert second - first < size / 2
