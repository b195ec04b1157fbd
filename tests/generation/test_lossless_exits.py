"""Drafts of an exit, verified by the full model: its own tokens, for any batch."""

from __future__ import annotations

import pytest
import torch
from exit_models import MODELS, decoder
from generating import SETTINGS
from test_early_exits import prompts
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

import hf_optim
from hf_optim import ModelError, RecipeError, early_exit
from hf_optim.generation.early_exit import rows

Exit = early_exit.EarlyExit


def lossless(layer=1, **changes):
    return Exit(lossless=True, layers=(layer,), **changes)


@pytest.mark.many
@pytest.mark.parametrize("name", MODELS)
def test_the_tokens_are_those_of_stock(name):
    model, given = decoder(name, double=False), prompts(pad=0 if name == "gemma2" else 3)
    for setting in ("greedy", "penalty", "ends", "min-length"):
        wanted = {**given, "max_new_tokens": 20, **SETTINGS[setting]}
        expected = model.generate(**wanted)
        for settings in (lossless(0, drafts=1), lossless(1, drafts=4), lossless(2, drafts=7)):
            found = hf_optim.generate(model, **wanted, return_dict_in_generate=True, early_exit=settings)
            assert torch.equal(found.sequences, expected), (setting, settings)
    assert found.rounds > 0
    assert found.drafted >= found.accepted >= 0


def test_drafts_that_are_right_save_passes():
    model, given = decoder("llama", double=False), prompts(1, pad=0)
    with torch.no_grad():  # the last two blocks add nothing, so the exit after block 1 is the model
        for block in model.model.layers[2:]:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    found = hf_optim.generate(model, **given, return_dict_in_generate=True, early_exit=lossless(drafts=4))
    assert torch.equal(found.sequences, model.generate(**given))
    # The first token is the prefill's; 13 more, of which a pass verifies five at most.
    assert (found.rounds, found.drafted, found.accepted) == (3, 10, 10)


def test_only_the_blocks_that_are_left_run_in_a_pass():
    model, given = decoder("llama", double=False), prompts(1, pad=0)
    seen = {0: [], 3: []}

    def note(index):
        return lambda module, args, output: seen[index].append(args[0].shape[1])

    handles = [model.model.layers[index].mlp.register_forward_hook(note(index)) for index in seen]
    early = hf_optim.generate(model, **given, early_exit=lossless(drafts=3))
    seen[0].clear(), seen[3].clear()  # the first call also proves the blocks
    found = hf_optim.generate(model, **given, return_dict_in_generate=True, early_exit=lossless(drafts=3))
    for handle in handles:
        handle.remove()
    assert torch.equal(found.sequences, early)
    assert set(seen[0][1:]) == {1}  # drafts run one token at a time, and the pass that verifies does not repeat them
    assert len(seen[3]) == 1 + found.rounds
    assert sum(seen[3][1:]) == len(seen[0]) - 1 == found.drafted + found.rounds


def test_holes_of_the_cache_are_closed(monkeypatch):
    monkeypatch.setattr(rows, "FEW_HOLES", 1)
    closed = []
    close = rows.Rows._close_holes
    monkeypatch.setattr(rows.Rows, "_close_holes", lambda self, *args: (closed.append(1), close(self, *args)))
    for name in ("llama", "gpt2", "opt"):
        model, given = decoder(name, double=False), {**prompts(5), "max_new_tokens": 40}
        with torch.no_grad():  # so that rows accept different numbers
            model.get_output_embeddings().weight.mul_(0.5)
        found = hf_optim.generate(model, **given, early_exit=lossless(2, drafts=5))
        assert torch.equal(found, model.generate(**given))
    assert closed


def test_rows_of_one_pace_where_holes_are_not_taken(monkeypatch):
    monkeypatch.setattr(early_exit.drafting, "TAKES_HOLES", ())
    model, given = decoder("llama", double=False), prompts()
    assert torch.equal(hf_optim.generate(model, **given, early_exit=lossless()), model.generate(**given))


def test_drafting_ends_where_the_exit_is_not_confident():
    model, given = decoder("llama", double=False), prompts(1, pad=0)
    expected = model.generate(**given)
    drafted = []
    for bar in (0.0, 0.5, 1.0):
        settings = lossless(drafts=6, draft_threshold=bar)
        found = hf_optim.generate(model, **given, return_dict_in_generate=True, early_exit=settings)
        assert torch.equal(found.sequences, expected)
        drafted.append(found.drafted)
    assert drafted[0] > drafted[1] > drafted[2] == 0


@pytest.mark.slow
def test_samples_have_the_distribution_of_the_full_model():
    model = decoder("llama")
    rows, ids = 4000, torch.tensor([[5, 9, 23, 7]])
    torch.manual_seed(0)
    given = {
        "attention_mask": torch.ones(rows, 4, dtype=torch.int64),
        "do_sample": True,
        "top_k": 0,
        "temperature": 3.0,
    }
    found = hf_optim.generate(
        model, input_ids=ids.expand(rows, 4), **given, max_new_tokens=2, early_exit=lossless(0, drafts=2)
    )
    with torch.no_grad():
        for place in (4, 5):
            exact = (model(input_ids=found[:, :place]).logits[:, -1].float() / 3.0).softmax(-1).double()
            counts = torch.bincount(found[:, place], minlength=64).double()
            expected, spread = exact.sum(0), (exact * (1 - exact)).sum(0).sqrt().clamp_min(1.0)
            assert ((counts - expected) / spread).abs().max() < 5.0


class AtNine(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= 9)


def test_streamed_tokens_and_what_cannot_be_taken_back():
    model, given = decoder("llama", double=False), prompts(1, pad=0)

    class Words(TextStreamer):
        def __init__(self):
            self.seen = []

        def put(self, value):
            self.seen.append(value.reshape(-1))

        def end(self):
            self.seen.append(torch.tensor([-1]))

    words = Words()
    found = hf_optim.generate(model, **given, early_exit=lossless(), streamer=words)
    assert torch.cat(words.seen).tolist() == [*found[0].tolist(), -1]
    cases = [
        ({"stopping_criteria": StoppingCriteriaList([AtNine()])}, "AtNine"),
        ({"output_scores": True, "return_dict_in_generate": True}, "scores"),
        ({"num_beams": 3}, "beams"),
    ]
    for more, words in cases:
        with pytest.raises(ModelError, match=words):
            hf_optim.generate(model, **given, **more, early_exit=lossless())
    with pytest.raises(RecipeError, match="drafts after one block"):
        Exit(lossless=True, layers=(0, 1))
    assert torch.equal(
        hf_optim.generate(model, **{**given, "max_new_tokens": 1}, early_exit=lossless()),
        model.generate(**{**given, "max_new_tokens": 1}),
    )
