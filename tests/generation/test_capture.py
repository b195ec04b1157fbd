"""Captured steps: what is captured, how often, and what is left after a capture that does not succeed."""

from __future__ import annotations

import gc
import warnings
import weakref

import pytest
import torch
from generating import SETTINGS, both, make, prompt
from simulated_graphs import simulated_graphs

import hf_optim
from hf_optim.generation import capture, door, sessions
from hf_optim.toolkit.modules import graph_capture


@pytest.fixture
def llama():
    return make("llama")


@pytest.fixture
def graphs():
    with simulated_graphs() as graphs:
        yield graphs


def run(model, inputs, mode="captured", new=20, **settings):
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", hf_optim.GenerationWarning)
        return hf_optim.generate(model, **inputs, max_new_tokens=new, mode=mode, **settings)


@pytest.mark.parametrize("settings", SETTINGS)
def test_model_and_processors_are_one_graph(llama, graphs, settings):
    inputs = prompt(llama)
    expected = both(llama, inputs, **SETTINGS[settings])[0]
    assert torch.equal(run(llama, inputs, **SETTINGS[settings]), expected)
    assert len(graphs.captured) == 1
    assert graphs.replays >= expected.shape[1] - 9 - 1  # the first token comes from the prefill


def test_a_second_call_with_other_lengths_and_rows_captures_nothing(llama, graphs):
    for rows, length, new in ((3, 9, 20), (3, 30, 40), (3, 5, 3)):
        inputs = prompt(llama, rows, length)
        assert torch.equal(run(llama, inputs, new=new), llama.generate(**inputs, max_new_tokens=new))
    inputs = prompt(llama, 5), prompt(llama, 6)
    run(llama, inputs[0])
    captured = len(graphs.captured)
    run(llama, inputs[1])
    assert captured == len(graphs.captured) == 2


def test_each_setting_of_the_processors_is_captured_once(llama, graphs):
    inputs = prompt(llama)
    for _ in range(2):
        for settings in SETTINGS.values():
            run(llama, inputs, **settings)
        run(llama, inputs, repetition_penalty=1.4, min_new_tokens=5, eos_token_id=[3, 4])
        run(llama, inputs, repetition_penalty=1.4, min_new_tokens=7, eos_token_id=[3, 4])  # a number on the device
    assert len(graphs.captured) == len(SETTINGS) + 1
    assert len(sessions._MODELS[llama]) == 1


def test_a_second_call_compiles_nothing(llama, graphs):
    counter = graphs.compiled
    inputs = prompt(llama)
    assert torch.equal(run(llama, inputs, mode="auto"), llama.generate(**inputs, max_new_tokens=20))
    assert counter.frame_count == 1
    longer = prompt(llama, length=40)
    assert torch.equal(run(llama, longer, mode="auto", new=30), llama.generate(**longer, max_new_tokens=30))
    run(llama, inputs, mode="auto", do_sample=True, temperature=0.7)
    assert counter.frame_count == 1
    other = make("llama")  # another model has its own
    run(other, inputs, mode="auto")
    assert counter.frame_count == 2


def test_a_deleted_model_is_freed_with_what_was_compiled_for_it(graphs):
    model = make("llama")
    run(model, prompt(model), mode="auto")
    session = next(iter(sessions._MODELS[model].values()))[1]
    alive = [weakref.ref(each) for each in (model, session, capture.compiled_call(model))]
    graphs.forget()  # a simulated graph is the function itself, with the model; a real one has addresses
    del model, session
    gc.collect()
    assert [each() for each in alive] == [None, None, None]


def test_samples_advance_between_calls_and_repeat_for_a_seed(llama, graphs):
    inputs = prompt(llama)
    sampled = {"do_sample": True, "top_k": 0, "temperature": 2.0, "max_new_tokens": 20, "mode": "captured"}
    first = run(llama, inputs, do_sample=True, top_k=0, temperature=2.0)
    second = hf_optim.generate(llama, **inputs, **sampled)
    assert not torch.equal(first, second)
    assert torch.equal(run(llama, inputs, do_sample=True, top_k=0, temperature=2.0), first)
    assert torch.equal(hf_optim.generate(llama, **inputs, **sampled), second)


def test_a_batch_is_loaded_once(llama, graphs, monkeypatch):
    from hf_optim.generation.session import DecodeSession

    right, loaded = DecodeSession.load, []
    monkeypatch.setattr(DecodeSession, "load", lambda self, batch: (loaded.append(1), right(self, batch))[1])
    run(llama, prompt(llama))
    assert len(loaded) == 1


def test_one_token_captures_nothing_and_a_full_bucket_is_not_overrun(llama, graphs):
    inputs = prompt(llama, rows=1, length=200)
    assert torch.equal(run(llama, inputs, new=1), llama.generate(**inputs, max_new_tokens=1))
    assert not graphs.captured
    assert torch.equal(run(llama, inputs, new=56), llama.generate(**inputs, max_new_tokens=56))
    ((key, _),) = sessions._MODELS[llama].items()
    assert key[1] == 256
    inputs = prompt(llama, rows=1, length=254)
    assert torch.equal(run(llama, inputs, new=2), llama.generate(**inputs, max_new_tokens=2))


class Broken(Exception):
    pass


def failing(error, times=99):
    """Return a capture that fails in the middle of a step ``times`` times, and then works."""
    left = [times]
    works = graph_capture._record

    def record(run, restore, device, pool):
        if left[0] == 0:
            return works(run, restore, device, pool)
        left[0] -= 1
        run()  # buffers and generator are those of a step that has run
        raise type(error)(*error.args)  # a new one: an exception keeps the frames that it came through

    return record


def test_the_generator_of_a_failed_capture_is_mended_before_it_is_read(llama, graphs, monkeypatch):
    """torch refuses to read or to set the generator of a device as a failed capture leaves it."""
    capturing = [False]

    def record(run, restore, device, pool):
        capturing[0] = True
        raise Broken("a synchronization")

    def state(device):
        assert not capturing[0]
        return torch.get_rng_state()

    monkeypatch.setattr(graph_capture, "_record", record)
    monkeypatch.setattr(graph_capture, "random_state", state)
    monkeypatch.setattr(graph_capture, "_end_capture", lambda *_: capturing.clear() or capturing.append(False))
    with pytest.warns(hf_optim.GenerationWarning, match="a synchronization"):
        hf_optim.generate(llama, **prompt(llama), max_new_tokens=6, mode="captured", do_sample=True)
    assert not capturing[0]


def test_a_pool_in_which_a_capture_failed_is_not_used_again(llama, graphs, monkeypatch):
    pools, works = [], graph_capture._record

    def record(run, restore, device, pool):
        pools.append(pool)
        if len(pools) == 3:
            raise Broken("a synchronization")
        return works(run, restore, device, pool)[0], f"pool {len(pools)}"

    monkeypatch.setattr(graph_capture, "_record", record)
    for settings in ({}, {"do_sample": True}, {"do_sample": True, "top_k": 3}):
        hf_optim.generate(llama, **prompt(llama), max_new_tokens=4, mode="captured", **settings)
    assert pools == [None, "pool 1", "pool 2", None]  # the third is tried again with its processors outside


@pytest.mark.parametrize("settings", ["greedy", "sampled"])
def test_a_step_that_cannot_be_captured_runs_in_transformers_loop(llama, graphs, monkeypatch, settings):
    inputs = prompt(llama)
    expected = both(llama, inputs, **SETTINGS[settings])[0]
    monkeypatch.setattr(graph_capture, "_record", failing(Broken("no graph of this")))
    for _ in range(2):
        torch.manual_seed(5)
        with pytest.warns(hf_optim.GenerationWarning, match=r"cannot be captured \(Broken: no graph of this\)") as seen:
            found = hf_optim.generate(llama, **inputs, max_new_tokens=20, mode="captured", **SETTINGS[settings])
        assert torch.equal(found, expected)  # with the random numbers that it would have had
        assert len([each for each in seen if each.category is hf_optim.GenerationWarning]) == 1


def test_a_step_that_cannot_be_compiled_is_captured_as_it_is(llama, graphs, monkeypatch):
    def breaks(model, inputs):
        raise Broken("Data-dependent branching")

    monkeypatch.setattr(capture, "compiled_call", lambda model: breaks)
    inputs = prompt(llama)
    expected = llama.generate(**inputs, max_new_tokens=20)
    with pytest.warns(hf_optim.GenerationWarning, match=r"without torch.compile \(Broken: Data-dependent"):
        found = hf_optim.generate(llama, **inputs, max_new_tokens=20, mode="auto")
    assert torch.equal(found, expected)
    assert len(graphs.captured) == 1
    assert torch.equal(run(llama, inputs, mode="auto"), expected)  # said once
    assert graphs.replays == 2 * 19


def test_a_reason_does_not_take_the_place_of_a_session(llama, graphs):
    for index in range(sessions.KEPT + 2):
        sessions.keep(llama, (f"mode {index}",), "a reason")
    for rows in range(1, sessions.KEPT + 2):
        run(llama, prompt(llama, rows), new=3)
    kept = sessions._MODELS[llama]
    assert [key[0] for key in kept if len(key) > 1] == [2, 3, 4, 6]
    assert len([key for key in kept if len(key) == 1]) == sessions.KEPT + 2


def test_processors_that_cannot_be_captured_run_eagerly(llama, graphs, monkeypatch):
    """The step without them is captured then: the failure of both together is followed by one of the forward alone."""
    monkeypatch.setattr(graph_capture, "_record", failing(Broken("a synchronization"), times=1))
    inputs = prompt(llama)
    assert torch.equal(*(both(llama, inputs, **SETTINGS["sampled"])[0], run(llama, inputs, **SETTINGS["sampled"])))
    assert len(graphs.captured) == 1
    assert graphs.replays == 19


def test_out_of_memory_in_a_capture_is_said_and_frees_what_was_made(llama, graphs, monkeypatch):
    inputs, made = prompt(llama), []
    right = door.DecodeSession

    def remembered(*args):
        session = right(*args)
        made.append(weakref.ref(session))
        return session

    monkeypatch.setattr(door, "DecodeSession", remembered)
    with monkeypatch.context() as patch:
        patch.setattr(graph_capture, "_record", failing(torch.OutOfMemoryError("full")))
        gc.disable()  # freed at once: the loop of transformers needs the memory now
        try:
            with pytest.warns(hf_optim.GenerationWarning, match="out of memory while the step was captured"):
                found = hf_optim.generate(llama, **inputs, max_new_tokens=20, mode="captured")
            assert [each() for each in made] == [None]
        finally:
            gc.enable()
    assert torch.equal(found, llama.generate(**inputs, max_new_tokens=20))
    assert not sessions._MODELS.get(llama)
    assert torch.equal(run(llama, inputs), found)  # tried again: memory may be free now


def test_out_of_memory_in_the_check_falls_back_too(llama, graphs, monkeypatch):
    from hf_optim.generation.loop import Decoding

    def full(self, tokens):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(Decoding, "_expected", full)
    inputs = prompt(llama)
    with pytest.warns(hf_optim.GenerationWarning, match="out of memory while the first step was checked"):
        found = hf_optim.generate(llama, **inputs, max_new_tokens=20, mode="captured")
    assert torch.equal(found, llama.generate(**inputs, max_new_tokens=20))


def test_out_of_memory_in_a_step_that_is_checked_is_not_taken_for_a_right_step(llama, monkeypatch):
    from hf_optim.generation.session import DecodeSession

    def full(self, model, call):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(DecodeSession, "forward", full)
    inputs = prompt(llama)
    with pytest.warns(hf_optim.GenerationWarning, match="out of memory while the first step was checked"):
        found = hf_optim.generate(llama, **inputs, max_new_tokens=20, mode="eager")
    assert torch.equal(found, llama.generate(**inputs, max_new_tokens=20))


def test_an_interrupted_capture_leaves_the_model_usable(llama, graphs, monkeypatch):
    inputs, ended = prompt(llama), []
    with monkeypatch.context() as patch:
        patch.setattr(graph_capture, "_record", failing(KeyboardInterrupt()))
        patch.setattr(graph_capture, "_end_capture", lambda device, *_: ended.append(device))
        with pytest.raises(KeyboardInterrupt):
            hf_optim.generate(llama, **inputs, max_new_tokens=20, mode="captured")
    assert ended == [torch.device("cpu")]
    assert not sessions._MODELS.get(llama)
    assert not sessions.lock(llama).locked()
    assert llama.config._attn_implementation == "sdpa"
    assert torch.equal(run(llama, inputs), llama.generate(**inputs, max_new_tokens=20))


def test_a_model_in_inference_mode_and_out_of_it(llama, graphs):
    inputs = prompt(llama)
    expected = llama.generate(**inputs, max_new_tokens=20)
    with torch.inference_mode():
        assert torch.equal(run(llama, inputs), expected)
    assert torch.equal(run(llama, inputs), expected)
    with torch.inference_mode():
        assert torch.equal(run(llama, inputs), expected)
    assert len(graphs.captured) == 1


@pytest.mark.gpu
def test_interruptions_of_a_real_capture(monkeypatch):
    from hf_optim.generation.session import DecodeSession

    model = make("llama").cuda()
    inputs = {key: value.cuda() for key, value in prompt(model).items()}
    expected = model.generate(**inputs, max_new_tokens=20)
    right, calls = DecodeSession.sample, []
    for error in (KeyboardInterrupt(), torch.OutOfMemoryError("full")):

        def interrupted(self, setting, error=error):
            calls.append(1)
            if torch.cuda.is_current_stream_capturing():
                raise error
            right(self, setting)

        with monkeypatch.context() as patch:
            patch.setattr(DecodeSession, "sample", interrupted)
            if isinstance(error, KeyboardInterrupt):
                with pytest.raises(KeyboardInterrupt):
                    hf_optim.generate(model, **inputs, max_new_tokens=20, mode="captured")
            else:
                with pytest.warns(hf_optim.GenerationWarning, match="out of memory"):
                    hf_optim.generate(model, **inputs, max_new_tokens=20, mode="captured")
        assert torch.equal(run(model, inputs), expected)
        sessions.drop(model)


@pytest.mark.gpu
def test_entropies_are_checked_on_the_host(llama):
    """``eta_cutoff`` checks its distribution on the host: the model is captured without the processors."""
    model = llama.cuda()
    inputs = {key: value.cuda() for key, value in prompt(model).items()}
    settings = {"do_sample": True, "eta_cutoff": 0.1}
    torch.manual_seed(5)
    expected = model.generate(**inputs, max_new_tokens=20, **settings)
    assert torch.equal(run(model, inputs, **settings), expected)
