"""Transformer-XL against the paper's recurrence, segment by segment, and against dense models and windows."""

from __future__ import annotations

import copy
import json
import pickle
import textwrap

import pytest
import torch
from pattern_oracle import assert_follows
from recurrent_oracle import logits_of
from safetensors.torch import load_file, save_file
from tiny_models import DECODER, tiny_bert, tiny_gpt2, tiny_llama, tiny_opt, tiny_t5
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Trainer,
    TrainingArguments,
)

import hf_optim
from hf_optim import CheckpointError, ModelError, RecipeError, SegmentStreams
from hf_optim.toolkit import compat

IDS = torch.randint(3, 60, (2, 23), generator=torch.Generator().manual_seed(0))
DECODERS = [tiny_llama, tiny_gpt2, tiny_opt]
BOTH = ["carried", "relative"]


def recurrent(model, *more, **fields):
    return hf_optim.optimize(model, [{"technique": "transformer_xl", "segment": 5, "memory": 7, **fields}, *more])


def relative_weights(model):
    """Return for each layer ``W_r``, u and v, u and v no longer small."""
    layers = [module.relative for module in model.modules() if hasattr(module, "relative")]
    first = layers[0].biases
    found = []
    for layer in layers:
        own = layer.biases or first
        found.append((layer.projection.weight, own.content, own.position))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in {id(w): w for each in found for w in each}.values():
            weight.copy_(0.4 * torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    return found


def logits(model, ids=IDS, **given):
    with torch.no_grad():
        return model(ids, **given).logits


def stream_of(documents, places):
    return torch.tensor(list(zip(documents, places, strict=True)))


# -- against the paper ------------------------------------------------------------------------------------------------
@pytest.mark.many
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_outputs_and_gradients_follow_the_formula(family, monkeypatch):
    step = {"technique": "transformer_xl", "segment": 48, "memory": 31, "stop_gradient": False}
    assert_follows(step, lambda i, j, layer, head, count: j >= i // 48 * 48 - 31, family, monkeypatch)


@pytest.mark.many
@pytest.mark.parametrize("sizes", [(5, 7), (4, 4), (8, 3), (1, 6), (30, 2)])
@pytest.mark.parametrize(
    "fields", [{}, {"positions": "relative"}, {"positions": "relative", "untie": True, "clamp": 4}]
)
def test_outputs_and_gradients_are_those_of_the_recurrence(fields, sizes):
    size, memory = sizes
    model = recurrent(tiny_llama().double(), segment=size, memory=memory, **fields).train()
    own, weights = [], None
    if fields:
        own = relative_weights(model)
        weights = [tuple(w.detach().clone().requires_grad_() for w in each) for each in own]
        if not fields.get("untie"):
            weights = [(each[0], *weights[0][1:]) for each in weights]
    plain = tiny_llama().double()
    found, expected = model(IDS).logits, logits_of(plain, IDS, size, memory, weights, fields.get("clamp"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    for each in (found, expected):
        each.square().sum().backward()
    named = dict(model.named_parameters())
    pairs = [(named[name].grad, p.grad) for name, p in plain.named_parameters()]
    pairs += [
        (a.grad, b.grad) for one, two in zip(own, weights or [], strict=True) for a, b in zip(one, two, strict=True)
    ]
    for one, other in pairs:
        scale = other.abs().max().clamp_min(1.0)
        torch.testing.assert_close(one / scale, other / scale, rtol=0, atol=1e-10)


def test_no_gradient_flows_through_the_memory_unless_it_may():
    for stops in (True, False):
        model = recurrent(tiny_llama(), stop_gradient=stops).train()
        states = model.get_input_embeddings()(IDS[:1]).detach().requires_grad_()
        model(inputs_embeds=states).logits[0, 12].sum().backward()
        reached = (states.grad[0].abs().sum(-1) > 0).nonzero().flatten().tolist()
        assert reached == (list(range(10, 13)) if stops else list(range(13)))


@pytest.mark.parametrize("positions", BOTH)
def test_layers_reach_back_one_memory_each(positions):
    model = recurrent(tiny_llama(num_hidden_layers=2).double(), positions=positions, segment=2, memory=3)
    before, reached = logits(model, IDS[:1]), []
    for place in range(20):
        other = IDS[:1].clone()
        other[:, place] = (other[:, place] + 1) % 60
        if not torch.equal(logits(model, other)[0, 20], before[0, 20]):
            reached.append(place)
    # The segment of 20 begins there; 17 begins its memory, and the segment of 17, at 16, has one from 13 on.
    assert reached == list(range(13, 20))


# -- limits -----------------------------------------------------------------------------------------------------------
@pytest.mark.many
@pytest.mark.parametrize("sizes", [(5, 23), (23, 1), (30, 30)])
@pytest.mark.parametrize("build", DECODERS)
def test_a_memory_or_a_segment_that_covers_the_text_is_full_attention_to_the_bit(build, sizes):
    model = recurrent(build(), segment=sizes[0], memory=sizes[1])
    assert torch.equal(logits(model), logits(build()))
    cache, parts = DynamicCache(), []
    for begin in range(0, 23, 5):
        given = {"attention_mask": torch.ones(2, min(begin + 5, 23), dtype=torch.int64), compat.CACHE: cache}
        parts.append(logits(model, IDS[:, begin : begin + 5], use_cache=True, **given))
    torch.testing.assert_close(torch.cat(parts, 1), logits(build()), rtol=0, atol=2e-5)


def test_segments_of_one_token_are_the_window_of_mistral():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        window = MistralForCausalLM(MistralConfig(**DECODER, sliding_window=7)).eval()
    model = LlamaForCausalLM(LlamaConfig(**DECODER)).eval()
    model.load_state_dict(window.state_dict())
    model = recurrent(model, segment=1, memory=6)
    torch.testing.assert_close(logits(model), logits(window), rtol=0, atol=1e-5)


@pytest.mark.many
@pytest.mark.parametrize("positions", BOTH)
@pytest.mark.parametrize("build", DECODERS)
def test_nothing_comes_from_the_future(build, positions):
    model = recurrent(build().double(), positions=positions)
    before = logits(model, IDS[:1])
    for place in (0, 4, 5, 11, 22):
        other = IDS[:1].clone()
        other[:, place] = (other[:, place] + 1) % 60
        moved = (logits(model, other) - before).abs().amax(-1)[0] > 0
        assert not moved[:place].any()
        assert moved[place]


@pytest.mark.many
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("positions", BOTH)
def test_a_padded_row_is_that_row_alone(positions, side, mode):
    model = getattr(recurrent(tiny_llama().double(), positions=positions), mode)()
    part = {"left": slice(8, 23), "right": slice(0, 13), "both": slice(4, 18)}[side]
    mask = torch.zeros_like(IDS)
    mask[0], mask[1, part] = 1, 1
    found = model(IDS, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits
    torch.testing.assert_close(found[1, part], model(IDS[1:, part]).logits[0], rtol=0, atol=1e-11)
    torch.testing.assert_close(found[0], model(IDS[:1]).logits[0], rtol=0, atol=1e-11)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_packed_documents_are_rows_alone(mode):
    model = getattr(recurrent(tiny_llama().double()), mode)()
    places = torch.cat([torch.arange(11), torch.arange(12)])[None]
    found = model(IDS[:1], position_ids=places, use_cache=False).logits[0]
    alone = torch.cat([model(IDS[:1, :11]).logits[0], model(IDS[:1, 11:]).logits[0]])
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-11)


# -- generation -------------------------------------------------------------------------------------------------------
@pytest.mark.many
@pytest.mark.parametrize("more", [{}, {"num_beams": 3}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("positions", BOTH)
@pytest.mark.parametrize("build", [tiny_llama, tiny_opt])
def test_generation_with_a_cache_is_generation_without(build, positions, more):
    model = recurrent(build(), positions=positions)
    mask = torch.ones_like(IDS)
    mask[1, :9] = 0
    fields = {"max_new_tokens": 14, "min_new_tokens": 14, "do_sample": False, "attention_mask": mask}
    without = model.generate(IDS, use_cache=False, **fields, **{k: v for k, v in more.items() if k == "num_beams"})
    assert torch.equal(model.generate(IDS, **fields, **more), without)
    if not more:
        alone = model.generate(IDS[1:, 9:], **{**fields, "attention_mask": mask[1:, 9:]})
        assert torch.equal(without[1:, 9:], alone)


@pytest.mark.many
@pytest.mark.parametrize("positions", BOTH)
@pytest.mark.parametrize("parts", [(23,), (7, 16), (1, 1, 3, 18), (22, 1)])
def test_parts_of_a_row_from_a_cache_are_the_row_in_one(parts, positions):
    model = recurrent(tiny_llama().double(), positions=positions)
    mask = torch.ones_like(IDS)
    mask[1, :6] = 0
    places = (mask.cumsum(1) - 1).clamp_min(0)
    whole = logits(model, attention_mask=mask, position_ids=places)
    cache, found, begin = DynamicCache(), [], 0
    for count in parts:
        given = {"attention_mask": mask[:, : begin + count], compat.CACHE: cache}
        given["position_ids"] = places[:, begin : begin + count]
        found.append(logits(model, IDS[:, begin : begin + count], use_cache=True, **given))
        begin += count
    torch.testing.assert_close(torch.cat(found, 1) * mask[..., None], whole * mask[..., None], rtol=0, atol=1e-11)


@pytest.mark.parametrize("positions", BOTH)
def test_the_cache_does_not_grow_with_the_text(positions):
    model = recurrent(tiny_llama(), positions=positions)
    cache, held = DynamicCache(), []
    for begin in range(0, 200, 20):  # beyond the 64 positions of the configuration
        ids = IDS.repeat(1, 9)[:, begin : begin + 20]
        out = logits(model, ids, use_cache=True, **{compat.CACHE: cache})
        held.append(cache.layers[0].keys.shape[2])
        assert out.isfinite().all()
    assert set(held) == {7}
    assert hf_optim.cache_size(model.config, 1, 200).total == hf_optim.cache_size(model.config, 1, 100).total


def test_a_cache_can_be_cropped_before_keys_are_dropped():
    model = recurrent(tiny_llama(), segment=5, memory=30)
    cache = DynamicCache()
    before = logits(model, IDS, use_cache=True, **{compat.CACHE: cache})
    cache.crop(-3)
    again = logits(model, IDS[:, 20:], use_cache=True, **{compat.CACHE: cache})
    torch.testing.assert_close(again, before[:, 20:], rtol=0, atol=1e-5)


# -- streams ----------------------------------------------------------------------------------------------------------
@pytest.mark.many
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("positions", BOTH)
@pytest.mark.parametrize("build", [tiny_llama, tiny_opt])
@pytest.mark.parametrize("step", [5, 10])
def test_a_stream_is_the_text_in_one(build, positions, mode, step):
    model = getattr(
        recurrent(build(dropout=0.0) if build is tiny_opt else build(), positions=positions).double(), mode
    )()
    whole = model(IDS).logits
    parts = [
        model(IDS[:, begin : begin + step], stream=stream_of([4, 9], [begin] * 2)).logits
        for begin in range(0, 23, step)
    ]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-11)
    again = model(IDS[:, :5], stream=stream_of([4, 9], [0, 0])).logits  # the documents begin again
    torch.testing.assert_close(again, whole[:, :5], rtol=0, atol=1e-11)


@pytest.mark.parametrize("positions", BOTH)
def test_the_gradients_of_a_stream_are_those_of_the_recurrence(positions):
    models = [recurrent(tiny_llama().double(), positions=positions).train() for _ in range(3)]
    enable = "activation_checkpointing_enable"  # the name in transformers 5.24
    getattr(models[1], enable if hasattr(models[1], enable) else "gradient_checkpointing_enable")()
    for model in models:
        if positions == "relative":
            relative_weights(model)
    models[2](IDS).logits.square().sum().backward()
    for model in models[:2]:
        for begin in range(0, 23, 5):
            stream = stream_of([0, 1], [begin] * 2)
            model(IDS[:, begin : begin + 5], stream=stream).logits.square().sum().backward()
        for (name, one), other in zip(model.named_parameters(), models[2].parameters(), strict=True):
            scale = other.grad.abs().max().clamp_min(1.0)
            torch.testing.assert_close(one.grad / scale, other.grad / scale, rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize("positions", BOTH)
def test_each_row_has_the_memory_of_its_own_document(positions):
    model = recurrent(tiny_llama().double(), positions=positions).train()
    texts = [IDS[0], IDS[1, :8], IDS[1, 3:20]]
    alone = [model(text[None]).logits[0] for text in texts]
    model(IDS[:, :5], stream=stream_of([0, 1], [0, 0]))
    rows = torch.stack([IDS[0, 5:10], torch.cat([texts[1][5:8], IDS[1, :2]])])
    mask = torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
    second = model(rows, attention_mask=mask, stream=stream_of([0, 1], [5, 5])).logits
    third = model(torch.stack([IDS[0, 10:15], texts[2][:5]]), stream=stream_of([0, 2], [10, 0])).logits
    fourth = model(torch.stack([IDS[0, 15:20], texts[2][5:10]]), stream=stream_of([0, 2], [15, 5])).logits
    for found, expected in (
        (second[0], alone[0][5:10]),
        (second[1, :3], alone[1][5:8]),
        (third[0], alone[0][10:15]),
        (third[1], alone[2][:5]),
        (fourth[0], alone[0][15:20]),
        (fourth[1], alone[2][5:10]),
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


def test_a_stream_is_seen_by_nothing_else():
    model = recurrent(tiny_llama())
    before, tokens = logits(model), model.generate(IDS, max_new_tokens=4, do_sample=False)
    logits(model, stream=stream_of([0, 1], [0, 0]))
    assert torch.equal(logits(model), before)
    assert torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=False), tokens)
    model.train()
    model(IDS[:, :5], stream=stream_of([0, 1], [0, 0]))
    model.eval()
    with pytest.raises(ValueError, match="ends at token 23"):  # evaluation has its own
        logits(model, IDS[:, 5:10], stream=stream_of([0, 1], [5, 5]))
    model.train()
    model(IDS[:, 5:10], stream=stream_of([0, 1], [5, 5]))
    model.forget_streams()
    assert not any("_streams" in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    ("stream", "given", "message"),
    [
        (stream_of([0, 1], [5, 10]), {}, "row 1 continues document 1 at token 10, and the memory .* ends at token 5"),
        (stream_of([1, 0], [5, 5]), {}, "row 0 continues document 1 at token 5, .* of document 0: batches must come"),
        (stream_of([0, 1], [0, 3]), {}, "begin at multiples of the segment, 5|row 1 continues"),
        (torch.zeros(2, 2), {}, r"int64 \[2, 2\], not torch.float32 \[2, 2\]"),
        (torch.zeros(3, 2, dtype=torch.int64), {}, r"int64 \[2, 2\], not torch.int64 \[3, 2\]"),
        (stream_of([0, 1], [0, 0]), {"use_cache": True}, "does not go with (a cache|use_cache=True)"),
        (stream_of([0, 1], [0, 0]), {"position_ids": torch.arange(5)[None]}, "does not go with position_ids"),
        (stream_of([0, 1], [0, 0]), {"attention_mask": torch.tensor([[0, 1, 1, 1, 1]] * 2)}, "padded at the end"),
    ],
)
def test_what_a_stream_is_not(stream, given, message):
    model = recurrent(tiny_llama())
    logits(model, IDS[:, :5], stream=stream_of([0, 1], [0, 0]))
    with pytest.raises(ValueError, match=message):
        logits(model, IDS[:, 5:10], stream=stream, **given)


def trainer_of(model, folder, data, **more):
    args = TrainingArguments(
        str(folder), max_steps=4, learning_rate=1e-2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        save_strategy="no", logging_strategy="no", disable_tqdm=True, **more,
    )  # fmt: skip
    return Trainer(model=model, args=args, train_dataset=data)


@pytest.mark.parametrize("positions", BOTH)
def test_the_stock_trainer_trains_on_streams(positions, tmp_path):
    model = recurrent(tiny_llama(), positions=positions)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    data = SegmentStreams([row.tolist() for row in IDS], streams=2, segment=5)
    trainer_of(model, tmp_path, data).train()
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters())
    assert model.model.__dict__["_streams"][True].ends == [20, 20]
    with pytest.raises(ValueError, match="batches must come in the order of their streams"):
        trainer_of(model, tmp_path, list(data)[2:], seed=1).train()


def test_a_copy_and_a_pickle_are_the_model():
    model = recurrent(tiny_llama(), positions="relative")
    expected = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), expected)
        own = [module.relative for module in other.modules() if hasattr(module, "relative")]
        assert own[0].biases is own[1].held[0]
        assert own[0].biases is not model.model.layers[0].self_attn.relative.biases


# -- checkpoints ------------------------------------------------------------------------------------------------------
RELOAD = """
    import torch
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained({folder!r}, trust_remote_code=True).eval()
    ids = torch.tensor({ids})
    with torch.no_grad():
        torch.save(model(ids).logits, {folder!r} + "/logits.pt")
    torch.save(model.generate(ids, max_new_tokens=9, min_new_tokens=9, do_sample=False), {folder!r} + "/tokens.pt")
"""


@pytest.mark.many
@pytest.mark.parametrize(
    ("build", "positions", "more"),
    [
        (tiny_opt, "carried", ()),
        (tiny_llama, "relative", ()),
        (tiny_llama, "carried", ({"technique": "rtn", "bits": 8},)),
        (tiny_llama, "relative", ({"technique": "rtn", "bits": 8},)),
    ],
)
def test_a_checkpoint_needs_no_hf_optim(build, positions, more, tmp_path, stock_python):
    model = recurrent(build(), *more, positions=positions)
    model.save_pretrained(tmp_path)
    done = stock_python.copy(textwrap.dedent(RELOAD.format(folder=str(tmp_path), ids=IDS.tolist())))
    assert done.status == 0, done.err
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(model))
    tokens = model.generate(IDS, max_new_tokens=9, min_new_tokens=9, do_sample=False)
    assert torch.equal(torch.load(tmp_path / "tokens.pt"), tokens)


def test_a_checkpoint_without_a_projection_is_refused(tmp_path):
    recurrent(tiny_llama(), positions="relative").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert sum(".relative.biases." in name for name in tensors) == 2
    del tensors["model.layers.1.self_attn.relative.projection.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"has no weights for 1 tensors of .*relative\.projection\.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path, optim_config="auto", trust_remote_code=True)


def test_new_weights_follow_the_seed_and_the_dtype():
    one, two, other = (recurrent(tiny_llama().half(), positions="relative", seed=seed) for seed in (1, 1, 2))
    name = "model.layers.1.self_attn.relative.projection.weight"
    assert torch.equal(one.get_parameter(name), two.get_parameter(name))
    assert not torch.equal(one.get_parameter(name), other.get_parameter(name))
    assert one.get_parameter(name).dtype == torch.float16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"segment": 0}, "segment=0, not a whole number from 1"),
        ({"memory": 0}, "memory=0, not a whole number from 1"),
        ({"positions": "absolute"}, "positions='absolute', not one of carried, relative"),
        ({"stop_gradient": 1}, "stop_gradient=1, not true or false"),
        ({"clamp": -1}, "clamp=-1"),
        ({"window": 3}, "settings that it does not know"),
    ],
)
def test_a_damaged_configuration_is_an_error(settings, message, tmp_path):
    recurrent(tiny_llama()).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["attention_pattern"] |= settings
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)


# -- refusals ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "fields", [{"segment": 0}, {"memory": 0}, {"memory": -3}, {"clamp": -1}, {"positions": "none"}]
)
def test_fields_are_checked(fields):
    with pytest.raises(RecipeError, match=next(iter(fields))):
        recurrent(tiny_llama(), **fields)


@pytest.mark.parametrize(
    ("build", "fields", "message"),
    [
        (
            tiny_bert,
            {},
            "BertForSequenceClassification is not causal, and a memory of earlier segments is for decoders",
        ),
        (tiny_t5, {}, "t5 has cross-attention"),
        (tiny_gpt2, {"memory": 60}, "distances up to 64, and the model has 64 positions: choose a smaller memory"),
        (
            lambda: tiny_llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
            {},
            "rotary positions of type dynamic change with the length of the text",
        ),
    ],
)
def test_models_that_cannot_are_refused_and_unchanged(build, fields, message):
    model = build()
    before = type(model)
    with pytest.raises(ModelError, match=message):
        recurrent(model, **fields)
    assert type(model) is before


def test_a_table_of_positions_ends_the_text():
    model = recurrent(tiny_gpt2())
    ids = IDS.repeat(1, 3)
    assert logits(model, ids[:, :64]).isfinite().all()
    with pytest.raises(ValueError, match="has a table of 64 positions, and the text 69 tokens"):
        logits(model, ids)
    with pytest.raises(ValueError, match="a table of 64 positions"):
        model.generate(ids[:, :62], max_new_tokens=5, do_sample=False)
    for begin in range(0, 60, 5):
        logits(model, ids[:, begin : begin + 5], stream=stream_of([0, 1], [begin] * 2))
    logits(recurrent(tiny_gpt2(), positions="relative"), ids)  # relative ones do not end


def test_what_relative_positions_do_not_take():
    model = recurrent(tiny_llama(), positions="relative")
    with pytest.raises(ValueError, match="give each a row of its own"):
        model(IDS[:1], position_ids=torch.cat([torch.arange(11), torch.arange(12)])[None], use_cache=False)
    with pytest.raises(ValueError, match="no masks of pairs"):
        model(IDS[:, :4], attention_mask=torch.ones(2, 1, 4, 4, dtype=torch.bool).tril())
    model.train()
    with pytest.raises(ValueError, match="use_cache=False"):
        model(IDS, use_cache=True)


def test_two_owners_of_attention_are_refused():
    with pytest.raises(RecipeError, match="transformer_xl"):
        recurrent(tiny_llama(), {"technique": "blockwise", "block": 4})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # of the compiler
def test_compiled_training_is_training():
    model = recurrent(tiny_llama(num_hidden_layers=1)).train()
    losses = [each(IDS, labels=IDS).loss for each in (model, torch.compile(model, backend="eager"))]
    torch._dynamo.reset()
    torch.testing.assert_close(*losses)
