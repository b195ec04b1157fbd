"""Inputs of every kind in ``hf_optim.generate``: the results of transformers, or an error that says what is wrong."""

from __future__ import annotations

import threading
import warnings
from functools import partial

import pytest
import torch
from generating import both, make, prompt
from simulated_graphs import simulated_graphs
from transformers import DynamicCache, GPTNeoConfig, GPTNeoForCausalLM, StaticCache, TextStreamer

import hf_optim
from hf_optim.generation import sessions
from hf_optim.generation.session import DecodeSession
from hf_optim.toolkit.compat import CACHE


@pytest.fixture
def llama():
    return make("llama")


def right_padded(model):
    inputs = prompt(model)
    return {name: value.flip(1) for name, value in inputs.items()}


CASES = {
    "right-padded": lambda model: (right_padded(model), {}),
    "without a mask": lambda model: ({"input_ids": prompt(model)["input_ids"]}, {}),
    "one token": lambda model: (prompt(model, 1, 1), {}),
    "batch 64": lambda model: (prompt(model, 64, 5, 2), {}),
    "batch 65": lambda model: (prompt(model, 65, 5, 2), {}),
    "several ends": lambda model: (prompt(model), {"eos_token_id": [3, 5, 7, 11, 13]}),
    "least new": lambda model: (prompt(model), {"eos_token_id": list(range(1, 40)), "min_new_tokens": 6}),
    "several sequences": lambda model: (prompt(model), {"num_return_sequences": 2, "do_sample": True}),
    "a chunked prefill": lambda model: (prompt(model), {"prefill_chunk_size": 4}),
    "positions": lambda model: (
        {**prompt(model, 1), "position_ids": torch.arange(9)[None] + 3},
        {},
    ),
    "renormalized": lambda model: (prompt(model), {"do_sample": True, "renormalize_logits": True, "typical_p": 0.9}),
    "suppressed": lambda model: (prompt(model), {"suppress_tokens": list(range(0, 60, 2))}),
    "one new token": lambda model: (prompt(model), {"max_new_tokens": 1}),
    "a maximum": lambda model: (prompt(model), {"max_new_tokens": None, "max_length": 17}),
}


@pytest.mark.parametrize("case", CASES)
def test_results_are_those_of_transformers(llama, case):
    inputs, settings = CASES[case](llama)
    settings = {"max_new_tokens": 20, **settings}
    torch.manual_seed(5)
    expected = llama.generate(**inputs, **settings)
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", hf_optim.GenerationWarning)
        found = hf_optim.generate(llama, **inputs, **settings, mode="eager")
    assert torch.equal(found, expected)


@pytest.mark.parametrize("with_ids", [False, True])
def test_embeddings_in_place_of_tokens(llama, with_ids):
    inputs = prompt(llama)
    with torch.no_grad():
        inputs["inputs_embeds"] = llama.model.embed_tokens(inputs["input_ids"])
    if not with_ids:
        del inputs["input_ids"]
    expected, found = both(llama, inputs, eos_token_id=[3, 5], min_new_tokens=6)
    assert torch.equal(expected, found)


def test_no_new_tokens_are_the_error_of_transformers(llama):
    for generate in (llama.generate, lambda **given: hf_optim.generate(llama, **given, mode="eager")):
        with pytest.raises(ValueError, match=r"max_(length|new_tokens)"):
            generate(**prompt(llama), max_new_tokens=0)


@pytest.mark.parametrize("settings", [{}, {"output_scores": True}, {"output_logits": True, "do_sample": True}], ids=str)
def test_the_output_is_that_of_transformers(llama, settings):
    inputs = prompt(llama)
    expected, found = both(llama, inputs, return_dict_in_generate=True, eos_token_id=[3, 5, 7], **settings)
    assert type(found) is type(expected)
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert type(found[name]) is type(value), name
        if isinstance(value, tuple):
            assert [(t.shape, t.dtype, t.device) for t in found[name]] == [(t.shape, t.dtype, t.device) for t in value]
    assert torch.equal(found.sequences, expected.sequences)
    assert found[CACHE].get_seq_length() == expected[CACHE].get_seq_length()


def test_text_streams_as_from_transformers(llama, capsys):
    from tiny_tokenizer import tiny_tokenizer

    inputs, tokenizer = prompt(llama, rows=1), tiny_tokenizer()
    texts = []
    for generate in (llama.generate, lambda **given: hf_optim.generate(llama, **given, mode="eager")):
        generate(**inputs, max_new_tokens=20, streamer=TextStreamer(tokenizer))
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != ""


# -- what cannot work -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "custom_generate"])
def test_a_cache_that_is_too_small(llama, direct):
    inputs = prompt(llama, rows=1)
    settings = {"max_new_tokens": 20, CACHE: StaticCache(config=llama.config, max_cache_len=24)}
    call = partial(hf_optim.generate, llama) if direct else partial(llama.generate, custom_generate=hf_optim.generate)
    with pytest.raises(hf_optim.ModelError, match="the cache holds 24 tokens, prompt and new tokens need 28"):
        call(**inputs, **settings)
    assert torch.equal(*both(llama, inputs))


def test_a_cache_that_is_just_large_enough(llama):
    inputs = prompt(llama, rows=1)
    found = hf_optim.generate(
        llama, **inputs, max_new_tokens=20, **{CACHE: StaticCache(config=llama.config, max_cache_len=28)}
    )
    assert torch.equal(found, llama.generate(**inputs, max_new_tokens=20))


def test_a_cache_of_other_rows(llama):
    inputs, cache = prompt(llama, rows=2), DynamicCache(config=llama.config)
    with torch.no_grad():
        llama(inputs["input_ids"][:, :4], **{CACHE: cache})
    with pytest.raises(hf_optim.ModelError, match="the cache holds 2 sequences, the prompt 3"):
        hf_optim.generate(llama, **prompt(llama, rows=3), max_new_tokens=5, **{CACHE: cache})


def test_a_batch_larger_than_the_buffers(llama):
    hf_optim.generate(llama, **prompt(llama, rows=3), max_new_tokens=4, mode="eager")
    session = next(iter(sessions._MODELS[llama].values()))[1]
    batch = decoded(llama, prompt(llama, rows=4))
    with pytest.raises(hf_optim.ModelError, match="4 x 9 tokens does not fit in buffers for 3 x 256"):
        session.load(batch)
    with pytest.raises(hf_optim.ModelError, match="1 x 300 tokens does not fit in buffers for 3 x 256"):
        session.load(decoded(llama, prompt(llama, rows=1, length=300)))
    assert torch.equal(*both(llama, prompt(llama)))


def decoded(model, inputs):
    """The prefilled batch of a call."""
    from hf_optim.generation.loop import Decoding

    seen = []
    with pytest.MonkeyPatch.context() as patch:
        right = Decoding.prefill
        patch.setattr(Decoding, "prefill", lambda self: (seen.append(right(self)), seen[-1])[1])
        hf_optim.generate(model, **inputs, max_new_tokens=2, mode="eager")
    return seen[0]


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "custom_generate"])
@pytest.mark.parametrize("name", ["input_ids", "attention_mask"])
def test_tensors_on_another_device(llama, name, direct):
    inputs = prompt(llama)
    inputs[name] = inputs[name].to("meta")
    call = partial(hf_optim.generate, llama, max_new_tokens=4)
    if not direct:  # as transformers calls it
        call = partial(hf_optim.generate, llama, generation_config=prepared(llama))
    with pytest.raises(hf_optim.ModelError, match=f"{name} is on meta, the model on cpu: move one of them"):
        call(**inputs)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ([[1, 2]], "are a tensor, not a list"),
        (torch.tensor([1, 2, 3]), r"\[rows, tokens\], not torch.int64 \[3\]"),
        (torch.tensor([[1.5, 2.0]]), "whole numbers"),
        (torch.zeros((1, 0), dtype=torch.long), "no tokens"),
    ],
    ids=["list", "one-dimension", "floats", "empty"],
)
@pytest.mark.parametrize("mode", ["auto", "eager"])
def test_tokens_that_are_none(llama, given, why, mode):
    with pytest.raises(hf_optim.ModelError, match=why):
        hf_optim.generate(llama, given, max_new_tokens=4, mode=mode)
    assert torch.equal(*both(llama, prompt(llama)))


@pytest.mark.parametrize("mode", ["auto", "eager", "stock"])
def test_beams_are_not_streamed(llama, mode):
    class Silent:
        def put(self, value):
            pass

    for direct in (True, False):
        call = partial(hf_optim.generate, llama, mode=mode)
        if not direct:
            call = partial(llama.generate, custom_generate=partial(hf_optim.generate, mode=mode))
        with pytest.raises(hf_optim.ModelError, match="num_beams=1, or no streamer"):
            call(**prompt(llama), max_new_tokens=4, num_beams=2, streamer=Silent())


def prepared(model):
    """A configuration as transformers passes it to a custom loop."""
    seen = []

    def kept(model, input_ids, generation_config, **kwargs):
        seen.append(generation_config)
        return input_ids

    model.generate(**prompt(model), max_new_tokens=4, custom_generate=kept)
    return seen[0]


def test_a_model_on_two_devices(llama):
    with simulated_graphs():
        layer = llama.model.layers[0].mlp.to("meta")
        layer.register_forward_hook(lambda module, args, output: torch.zeros_like(args[0]))  # it has no values
        inputs = prompt(llama)
        with pytest.warns(hf_optim.GenerationWarning, match="spread over several devices"):
            hf_optim.generate(llama, **inputs, max_new_tokens=4)


class Nested:
    """A streamer that generates with the model that it streams from."""

    def __init__(self, call):
        self.call, self.seen, self.found = call, 0, None

    def put(self, value):
        self.seen += 1
        if self.seen == 3:  # not the prompt, which is put before the loop
            self.found = self.call()

    def end(self):
        pass


def test_a_call_inside_a_call_runs_in_transformers_loop(llama):
    inputs = prompt(llama, rows=1)
    expected = llama.generate(**inputs, max_new_tokens=12)
    streamer = Nested(lambda: hf_optim.generate(llama, **inputs, max_new_tokens=5, mode="eager"))
    with pytest.warns(hf_optim.GenerationWarning, match="another call"):
        found = hf_optim.generate(llama, **inputs, max_new_tokens=12, mode="eager", streamer=streamer)
    assert torch.equal(found, expected)
    assert torch.equal(streamer.found, expected[:, : 9 + 5])


def test_two_threads_each_get_their_tokens(llama):
    inputs = [prompt(llama) for _ in range(4)]
    expected = [llama.generate(**each, max_new_tokens=20) for each in inputs]
    found: list = [None] * 4

    def work(index):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found[index] = hf_optim.generate(llama, **inputs[index], max_new_tokens=20, mode="eager")

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_an_adapter_that_is_attached_or_switched_off_is_noticed(llama):
    peft = pytest.importorskip("peft")
    inputs = prompt(llama)
    with simulated_graphs() as graphs:

        def run(model):
            with warnings.catch_warnings():
                warnings.simplefilter("error", hf_optim.GenerationWarning)
                found = hf_optim.generate(model, **inputs, max_new_tokens=20, mode="captured")
            assert torch.equal(found, model.generate(**inputs, max_new_tokens=20))
            return found

        plain = run(llama)
        adapted = peft.get_peft_model(
            llama, peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        )
        adapted.eval()
        changed = run(llama)
        assert not torch.equal(changed, plain)
        with adapted.disable_adapter():
            assert torch.equal(run(llama), plain)
        assert torch.equal(run(llama), changed)
        assert len(graphs.captured) == 4


def test_a_restored_model_is_noticed():
    from tiny_models import tiny_llama

    torch.manual_seed(0)
    model = tiny_llama(hidden_size=64, intermediate_size=64).to(torch.bfloat16).eval()
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    hf_optim.optimize(model, [{"technique": "rtn", "bits": 8}])
    inputs = prompt(model)
    with simulated_graphs() as graphs:
        for change in (lambda model: None, hf_optim.accelerate, hf_optim.restore):
            change(model)
            found = hf_optim.generate(model, **inputs, max_new_tokens=6, mode="captured")
            assert torch.equal(found, model.generate(**inputs, max_new_tokens=6))
        assert len(graphs.captured) == 3


# -- models that a step over fixed buffers does not suit ------------------------------------------------------------


def test_a_model_whose_step_fails_runs_in_transformers_loop(llama, monkeypatch):
    """CPM-Ant, for one, adds a prompt of its own to what the cache holds, whose lengths then do not agree."""
    from hf_optim.generation.session import DecodeSession

    def fails(self, *args):
        raise RuntimeError("The size of tensor a (25) must match the size of tensor b (17)")

    inputs = prompt(llama)
    expected = llama.generate(**inputs, max_new_tokens=20)
    with monkeypatch.context() as patch:
        patch.setattr(DecodeSession, "forward", fails)
        with pytest.warns(hf_optim.GenerationWarning, match=r"fixed buffers fails \(RuntimeError: The size"):
            found = hf_optim.generate(llama, **inputs, max_new_tokens=20, mode="eager")
    assert torch.equal(found, expected)


def test_a_model_without_a_cache_runs_one_prefill_too_many_only_once(llama, monkeypatch):
    inputs, calls = prompt(llama), []
    right = type(llama)._prefill

    def counted(self, *args, **kwargs):
        calls.append(1)
        outputs = right(self, *args, **kwargs)
        outputs[CACHE] = None
        return outputs

    monkeypatch.setattr(type(llama), "_prefill", counted)
    llama.config.use_cache = llama.generation_config.use_cache = True
    for count in (2, 3):
        with pytest.warns(hf_optim.GenerationWarning, match="returns no cache"):
            hf_optim.generate(llama, **inputs, max_new_tokens=1, mode="eager")
        assert len(calls) == count


def test_buffers_are_not_longer_than_the_positions_of_a_model(llama):
    """Some models look up a position for each token of the mask: on a GPU, one that does not exist ends the process."""
    llama.config.max_position_embeddings = 64
    inputs = prompt(llama)
    assert torch.equal(*both(llama, inputs))
    assert [key[1] for key in sessions._MODELS[llama]] == [64]
    assert sessions.length_bucket(65, most=64) == 256  # transformers' loop says what is wrong with that
    assert sessions.length_bucket(300, most=448) == 384
    assert sessions.length_bucket(400, most=448) == 448


def test_a_model_with_a_mask_of_its_own_runs_in_transformers_loop():
    """GPT-Neo cuts its mask by the length of the cache, which fixed buffers fill from the start."""
    torch.manual_seed(0)
    config = GPTNeoConfig(
        hidden_size=32, num_layers=2, attention_types=[[["global", "local"], 1]], num_heads=4, vocab_size=99,
        max_position_embeddings=64, window_size=8, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = GPTNeoForCausalLM(config).eval()
    inputs = prompt(model)
    with pytest.warns(hf_optim.GenerationWarning, match="differs from transformers"):
        found = hf_optim.generate(model, **inputs, max_new_tokens=20, mode="eager")
    assert torch.equal(found, model.generate(**inputs, max_new_tokens=20))


def on_a_grid(module, args, output):
    """As inputs in a few bits: a last bit becomes a step of the grid where a value is between two points."""
    return torch.round(output * 1e6) % 7 - 3


@pytest.mark.parametrize("amplifies", [False, True])
def test_a_step_may_differ_as_much_as_a_last_bit_of_the_embeddings_makes(monkeypatch, amplifies):
    """Weights without structure under 8-bit inputs turn roundings into tenths: no step could pass a fixed bound."""
    model = make("llama")
    if amplifies:
        model.model.layers[0].register_forward_hook(on_a_grid)
    right = DecodeSession.forward

    def rounded(self, model, call):
        nudge = lambda module, args, output: output * (1 + 2e-7)  # noqa: E731
        hook = model.get_input_embeddings().register_forward_hook(nudge)
        right(self, model, call)
        hook.remove()
        if not amplifies:
            self.logits.add_(torch.randn_like(self.logits) * 0.3 * self.logits.std())

    monkeypatch.setattr(DecodeSession, "forward", rounded)
    inputs = prompt(model)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        hf_optim.generate(model, **inputs, max_new_tokens=6, mode="eager")
    differs = any("differs from transformers" in str(each.message) for each in seen)
    assert differs is not amplifies
    assert len(model.get_input_embeddings()._forward_hooks) == 0


def test_images_belong_to_the_prefill():
    from hf_optim.generation.reasons import STEP_INPUTS

    assert {"pixel_values", "pixel_attention_mask", "image_sizes"} <= STEP_INPUTS
    assert "token_type_ids" not in STEP_INPUTS
