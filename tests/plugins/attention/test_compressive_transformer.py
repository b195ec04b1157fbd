"""The Compressive Transformer against the paper's algorithm, segment by segment, and against the dense model."""

from __future__ import annotations

import copy
import json
import pickle
import textwrap

import pytest
import torch
from recurrent_oracle import compressive_logits_of
from safetensors.torch import load_file, save_file
from tiny_models import tiny_bert, tiny_gpt2, tiny_llama, tiny_opt, tiny_t5
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    GPT2ForSequenceClassification,
    Trainer,
    TrainingArguments,
)

import hf_optim
from hf_optim import CheckpointError, ModelError, RecipeError
from hf_optim.toolkit import compat

IDS = torch.randint(3, 60, (2, 23), generator=torch.Generator().manual_seed(0))
DECODERS = [tiny_llama, tiny_gpt2, tiny_opt]
SMALL = {"segment": 4, "memory": 2, "compressed": 3, "ratio": 2}


def compressive(model, *more, moved=True, **fields):
    """Return the model with a compressed memory, and convolutions that are no longer means."""
    step = {"technique": "compressive_transformer", **SMALL, **fields}
    model = hf_optim.optimize(model, [step, *more])
    if moved:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if ".compression." in name:
                    noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
                    weight += 0.2 * noise.to(weight)
    return model


def compressions(model):
    return [module.compression for module in model.modules() if hasattr(module, "compression")]


def logits(model, ids=IDS, **given):
    with torch.no_grad():
        return model(ids, **given).logits


# -- against the paper ------------------------------------------------------------------------------------------------
SIZES = [
    {},
    {"segment": 6, "memory": 3, "compressed": 2, "ratio": 3},
    {"segment": 4, "memory": 8, "compressed": 1, "ratio": 4},
    {"segment": 3, "memory": 2, "compressed": 9, "ratio": 1},
]


@pytest.mark.many
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("loss", ["attention", "autoencoding", "task"])
def test_outputs_losses_and_gradients_are_those_of_the_algorithm(loss, sizes):
    model = compressive(tiny_llama().double(), loss=loss, loss_weight=0.7, **sizes).train()
    size = {**SMALL, **sizes}
    weights = [
        {name: w.detach().clone().requires_grad_() for name, w in each.named_parameters()}
        for each in compressions(model)
    ]

    def compress(layer, window):
        own = weights[layer]
        return torch.einsum("oit,bti->bo", own["conv.weight"], window) + own["conv.bias"]

    def decode(layer, slot):
        own = weights[layer]
        return torch.einsum("iot,bi->bto", own["decoder.weight"], slot) + own["decoder.bias"]

    plain = tiny_llama().double()
    expected, losses = compressive_logits_of(
        plain, IDS, size["segment"], size["memory"], size["compressed"], size["ratio"], compress,
        decode if loss == "autoencoding" else None, loss == "task",
    )  # fmt: skip
    out = model(IDS, labels=IDS)
    torch.testing.assert_close(out.logits, expected, rtol=0, atol=1e-11)
    total = functional.cross_entropy(expected[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    if loss != "task":
        assert losses[loss] > 1e-4
        total = total + 0.7 * losses[loss]
    torch.testing.assert_close(out.loss.double(), total, rtol=0, atol=1e-6)  # transformers' loss is of float32
    out.loss.backward()
    total.backward()
    named = dict(model.named_parameters())
    pairs = [(name, named[name].grad, p.grad) for name, p in plain.named_parameters()]
    for own, other in zip(compressions(model), weights, strict=True):
        pairs += [(name, w.grad, other[name].grad) for name, w in own.named_parameters()]
    for name, one, other in pairs:
        scale = other.abs().max().clamp_min(1e-3)
        torch.testing.assert_close(one / scale, other / scale, rtol=0, atol=1e-5, msg=name)


def test_losses_reach_the_convolution_alone_and_the_task_reaches_it_only_if_it_may():
    for loss in ("attention", "autoencoding", "task"):
        model = compressive(tiny_llama().double(), loss=loss).train()
        model(IDS).logits.square().sum().backward()  # no labels: the task alone
        reached = [w.grad is not None and bool(w.grad.any()) for each in compressions(model) for w in each.parameters()]
        assert all(reached) if loss == "task" else not any(reached)
        if loss == "task":
            assert model.compression_loss() is None
            continue
        model.zero_grad()
        with pytest.warns(UserWarning, match="trained without the loss of the compression"):
            model(IDS)
        model.compression_loss().backward()
        others = [n for n, w in model.named_parameters() if ".compression." not in n and w.grad is not None]
        assert others == []
        assert all(w.grad.any() for each in compressions(model) for w in each.parameters())
        assert all(w.requires_grad for w in model.parameters())


@pytest.mark.parametrize("function", ["mean", "max"])
def test_functions_without_weights(function):
    model = compressive(tiny_llama().double(), function=function)
    assert not any(".compression." in name for name, _ in model.named_parameters())

    def compress(layer, window):
        return window.mean(1) if function == "mean" else window.amax(1)

    expected, _ = compressive_logits_of(tiny_llama().double(), IDS, 4, 2, 3, 2, compress)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-11)
    model.train()
    assert model(IDS, labels=IDS).loss.isfinite()


# -- limits -----------------------------------------------------------------------------------------------------------
@pytest.mark.many
@pytest.mark.parametrize("build", DECODERS)
def test_a_ratio_of_one_with_the_identity_is_full_attention(build):
    model = compressive(build().double(), moved=False, segment=5, memory=3, ratio=1, compressed=30)
    torch.testing.assert_close(logits(model), logits(build().double()), rtol=0, atol=1e-11)


@pytest.mark.many
@pytest.mark.parametrize("sizes", [{"segment": 4, "memory": 20}, {"segment": 24, "memory": 2}])
@pytest.mark.parametrize("build", DECODERS)
def test_a_memory_or_a_segment_that_covers_the_text_is_full_attention_to_the_bit(build, sizes):
    model = compressive(build(), **sizes)
    assert torch.equal(logits(model, use_cache=False), logits(build()))
    torch.testing.assert_close(logits(model), logits(build()), rtol=0, atol=2e-5)


@pytest.mark.many
@pytest.mark.parametrize("build", DECODERS)
def test_nothing_comes_from_the_future(build):
    model = compressive(build().double())
    before = logits(model, IDS[:1])
    for place in (0, 4, 5, 11, 22):
        other = IDS[:1].clone()
        other[:, place] = (other[:, place] + 1) % 60
        moved = (logits(model, other) - before).abs().amax(-1)[0] > 0
        assert not moved[:place].any()
        assert moved[place]


def test_a_query_sees_through_slots_as_far_as_they_reach():
    model = compressive(tiny_llama(num_hidden_layers=1).double())
    before, reached = logits(model, IDS[:1]), []
    for place in range(21):
        other = IDS[:1].clone()
        other[:, place] = (other[:, place] + 1) % 60
        if not torch.equal(logits(model, other)[0, 20], before[0, 20]):
            reached.append(place)
    assert reached == list(range(12, 21))  # 3 slots of 2 before a memory of 2 before the segment at 20


@pytest.mark.many
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_a_padded_row_is_that_row_alone(side, mode):
    model = getattr(compressive(tiny_llama().double()), mode)()
    part = {"left": slice(7, 23), "right": slice(0, 13), "both": slice(3, 18)}[side]
    mask = torch.zeros_like(IDS)
    mask[0], mask[1, part] = 1, 1
    found = model(IDS, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits
    for row, own in ((1, part), (0, slice(None))):
        model.compression_loss()  # read, as training without labels has to
        torch.testing.assert_close(found[row, own], model(IDS[row : row + 1, own]).logits[0], rtol=0, atol=1e-11)


@pytest.mark.parametrize("loss", ["attention", "autoencoding"])
def test_the_losses_of_padded_rows_are_those_of_the_rows(loss):
    model = compressive(tiny_llama().double(), loss=loss).train()
    model(IDS[:1])
    one = model.compression_loss()
    model(IDS[1:, 7:])
    two = model.compression_loss()
    mask = torch.ones_like(IDS)
    mask[1, :7] = 0
    model(IDS, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0))
    counts = (5, 4) if loss == "attention" else (11, 8)  # segments behind which tokens leave; windows
    expected = (counts[0] * one + counts[1] * two) / sum(counts)
    torch.testing.assert_close(model.compression_loss(), expected, rtol=0, atol=1e-11)


# -- generation -------------------------------------------------------------------------------------------------------
@pytest.mark.many
@pytest.mark.parametrize("more", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}])
@pytest.mark.parametrize("build", DECODERS)
def test_generation_with_a_cache_is_generation_without(build, more):
    model = compressive(build())
    mask = torch.ones_like(IDS)
    mask[1, :9] = 0
    fields = {"max_new_tokens": 14, "min_new_tokens": 14, "do_sample": False, "attention_mask": mask}
    without = model.generate(IDS, use_cache=False, **fields, **more)
    assert torch.equal(model.generate(IDS, **fields, **more), without)
    if not more:
        alone = model.generate(IDS[1:, 9:], **{**fields, "attention_mask": mask[1:, 9:]})
        assert torch.equal(without[1:, 9:], alone)


@pytest.mark.many
@pytest.mark.parametrize("parts", [(23,), (7, 16), (1, 1, 3, 18), (22, 1), (12, 11)])
@pytest.mark.parametrize("hidden", [0, 6])
def test_parts_of_a_row_from_a_cache_are_the_row_in_one(parts, hidden):
    model = compressive(tiny_llama().double())
    mask = torch.ones_like(IDS)
    mask[1, :hidden] = 0
    places = (mask.cumsum(1) - 1).clamp_min(0)
    whole = logits(model, attention_mask=mask, position_ids=places)
    cache, found, begin = DynamicCache(), [], 0
    for count in parts:
        end = begin + count
        given = {"attention_mask": mask[:, :end], "position_ids": places[:, begin:end], compat.CACHE: cache}
        found.append(logits(model, IDS[:, begin:end], use_cache=True, **given))
        begin = end
    torch.testing.assert_close(torch.cat(found, 1) * mask[..., None], whole * mask[..., None], rtol=0, atol=1e-11)


def test_the_cache_does_not_grow_with_the_text():
    model = compressive(tiny_llama())
    cache, held = DynamicCache(), set()
    for begin in range(0, 200, 20):  # beyond the 64 positions of the configuration
        ids = IDS.repeat(1, 9)[:, begin : begin + 20]
        assert logits(model, ids, use_cache=True, **{compat.CACHE: cache}).isfinite().all()
        layer = cache.layers[0]
        held.add((layer.keys.shape[2], layer.slots[0].shape[2], layer.inputs.shape[1], layer.nbytes()))
    assert len(held) == 1
    assert next(iter(held))[:3] == (2, 3 + 6 // 2, 1)
    with pytest.raises(hf_optim.ModelError, match="holds more than keys of tokens"):
        hf_optim.cache_size(model.config, 1, 200)


def test_what_a_cache_refuses():
    model = compressive(tiny_llama())
    cache = DynamicCache()
    logits(model, use_cache=True, **{compat.CACHE: cache})
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="of a model with a compressed memory"):
        logits(tiny_llama(), IDS[:, :1], **{compat.CACHE: cache})
    with pytest.raises(ValueError, match="has a cache of its own"):
        model.generate(IDS, max_new_tokens=2, do_sample=False, cache_implementation="static")
    filled = DynamicCache()
    logits(tiny_llama(), IDS, use_cache=True, **{compat.CACHE: filled})
    with pytest.raises(ValueError, match="has a cache of its own"):
        logits(model, IDS[:, :1], **{compat.CACHE: filled})
    mask = torch.ones(2, 24, dtype=torch.int64)
    mask[1, 20:23] = 0
    given = {"attention_mask": mask[:, :23], compat.CACHE: (again := DynamicCache())}
    logits(model, use_cache=True, **given)
    with pytest.raises(ValueError, match="no padding between tokens, as in a row that was padded at the end"):
        logits(model, IDS[:, :1], attention_mask=mask, **{compat.CACHE: again})
    model.train()
    with pytest.raises(ValueError, match="in training set use_cache=False"):
        model(IDS, use_cache=True)


def test_a_cache_is_of_one_batch_one_model_and_one_mask():
    model = compressive(tiny_llama(), memory=16)
    more = torch.ones(2, 12, dtype=torch.int64)
    more[0, :3] = 0  # nothing was dropped yet, and windows were counted from the first token
    for ids, other, mask, message in (
        (IDS[:1, 11:12], model, None, "the cache holds 2 rows, and got tokens of 1"),
        (IDS[:, 11:12], compressive(tiny_llama(), memory=16, ratio=4), None, "with another compressed memory"),
        (IDS[:, 11:12], compressive(tiny_llama(), memory=16, compressed=1), None, "with another compressed memory"),
        (IDS[:, 11:12], model, more, "hides other earlier tokens than before, and windows were counted"),
    ):
        cache = DynamicCache()
        logits(model, IDS[:, :11], use_cache=True, **{compat.CACHE: cache})
        with pytest.raises(ValueError, match=message):
            logits(other, ids, attention_mask=mask, **{compat.CACHE: cache})


@pytest.mark.parametrize("tokens", [0, 1])
def test_much_padding_and_no_window(tokens):
    model = compressive(tiny_llama())
    mask = torch.zeros(2, 23, dtype=torch.int64)
    mask[:, 23 - tokens :] = 1
    for given in ({"use_cache": True}, {"use_cache": False}):
        found = logits(model, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0), **given)
        assert bool(found.isfinite().all())
        if tokens:
            torch.testing.assert_close(found[:, -tokens:], logits(model, IDS[:, -tokens:]))


# -- training and checkpoints -----------------------------------------------------------------------------------------
@pytest.mark.many
@pytest.mark.parametrize("loss", ["attention", "autoencoding", "task"])
def test_the_stock_trainer_trains_the_compression(loss, tmp_path):
    model = compressive(tiny_llama(), moved=False, loss=loss)
    before = {name: w.detach().clone() for name, w in model.named_parameters()}
    args = TrainingArguments(
        str(tmp_path), max_steps=3, learning_rate=1e-2, per_device_train_batch_size=1, gradient_accumulation_steps=2,
        report_to=[], use_cpu=True, save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    Trainer(model=model, args=args, train_dataset=[{"input_ids": row, "labels": row} for row in IDS]).train()
    assert all(not torch.equal(before[name], w) for name, w in model.named_parameters())


def test_the_loss_of_a_step_is_the_mean_over_its_micro_batches():
    model = compressive(tiny_llama(), loss_weight=3.0).train()
    both = model(IDS, labels=IDS).loss
    parts = [model(row[None], labels=row[None], num_items_in_batch=torch.tensor(44)).loss for row in IDS]
    torch.testing.assert_close(sum(parts), both, rtol=0, atol=1e-5)


def enable_checkpointing(model, **fields):
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)(fields)


@pytest.mark.parametrize("loss", ["attention", "autoencoding"])
def test_activations_that_are_computed_again_leave_the_losses_as_they_are(loss):
    grads = []
    for kept in (True, False):
        model = compressive(tiny_llama(), loss=loss).train()
        if not kept:
            enable_checkpointing(model, use_reentrant=False)
        for ids in (IDS, IDS[:, :5]):  # the second batch has no segment that leaves the memory
            model.zero_grad()
            model(ids, labels=ids).loss.backward()
            grads.append({name: w.grad for name, w in model.named_parameters()})
    for one, other in zip(grads[:2], grads[2:], strict=True):
        assert all((one[name] is None) == (other[name] is None) for name in one)
        torch.testing.assert_close(
            {n: g for n, g in one.items() if g is not None}, {n: g for n, g in other.items() if g is not None}
        )
    enable_checkpointing(model, use_reentrant=True)
    with pytest.raises(ValueError, match="no gradient under reentrant checkpoints of activations"):
        model(IDS, labels=IDS)


def test_heads_with_a_loss_of_their_own_train_the_compression():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        off = {"pad_token_id": 0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        model = GPT2ForSequenceClassification(GPT2Config(**{**tiny_gpt2().config.to_dict(), **off}))
    model = compressive(model.eval(), loss_weight=3.0).train()
    labels = torch.tensor([0, 1])
    out = model(IDS, labels=labels)
    task = functional.cross_entropy(out.logits, labels)
    assert out.loss > task + 1e-4
    torch.testing.assert_close(model(IDS, labels=labels, return_dict=False)[0], out.loss)
    (out.loss - task).backward()
    named = model.named_parameters()
    trained = {name.split(".compression.")[-1] for name, w in named if w.grad is not None and bool(w.grad.any())}
    assert trained == {"conv.weight", "conv.bias"}
    model(IDS)
    lost = model.compression_loss()
    torch.testing.assert_close(out.loss - task, 3 * lost)


def test_a_loss_that_nobody_read_is_not_added_to_that_of_another_batch():
    model = compressive(tiny_llama()).train()
    model(IDS)
    copy.deepcopy(model)
    with pytest.warns(UserWarning, match="trained without the loss of the compression"):
        assert model(IDS[:, :1]).logits.shape[1] == 1
    assert model.compression_loss() is None


def test_a_copy_and_a_pickle_are_the_model():
    model = compressive(tiny_llama())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), logits(model))


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
    ("build", "loss", "more"),
    [(tiny_opt, "attention", ()), (tiny_llama, "autoencoding", ({"technique": "rtn", "bits": 8},))],
)
def test_a_checkpoint_needs_no_hf_optim(build, loss, more, tmp_path, stock_python):
    model = compressive(build(), *more, loss=loss)
    model.save_pretrained(tmp_path)
    done = stock_python.copy(textwrap.dedent(RELOAD.format(folder=str(tmp_path), ids=IDS.tolist())))
    assert done.status == 0, done.err
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(model))
    tokens = model.generate(IDS, max_new_tokens=9, min_new_tokens=9, do_sample=False)
    assert torch.equal(torch.load(tmp_path / "tokens.pt"), tokens)


def test_a_checkpoint_without_a_convolution_is_refused(tmp_path):
    compressive(tiny_llama()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    gone = "model.layers.1.self_attn.compression.conv.weight"
    del tensors[gone]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"has no weights for 1 tensors of .*compression\.conv\.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path, optim_config="auto", trust_remote_code=True)
    # transformers alone reports it, and starts from the mean.
    weight = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True).get_parameter(gone)
    assert torch.equal(weight, (torch.eye(len(weight)) / 2)[:, :, None].expand_as(weight))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"segment": 5}, "segments of 5 tokens and a memory of 2: windows of 2 must divide both"),
        ({"memory": 0}, "memory=0, not a whole number from 1"),
        ({"compressed": 0}, "compressed=0"),
        ({"ratio": 10**9}, "ratio=1000000000"),
        ({"function": "sum"}, "function='sum', not one of conv, mean, max"),
        ({"loss": None}, "loss=None, not one of"),
        ({"loss_weight": "1"}, "loss_weight='1', not a number from 0"),
        ({"window": 3}, "settings that it does not know"),
    ],
)
def test_a_damaged_configuration_is_an_error(settings, message, tmp_path):
    compressive(tiny_llama()).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["attention_pattern"] |= settings
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)


# -- refusals ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"segment": 0}, "segment"),
        ({"memory": 0}, "memory"),
        ({"compressed": 0}, "compressed"),
        ({"ratio": 3}, "ratio=3 does not divide segment=4"),
        ({"memory": 3}, "ratio=2 does not divide memory=3"),
        ({"function": "sum"}, "function"),
        ({"loss_weight": -1.0}, "loss_weight"),
    ],
)
def test_fields_are_checked(fields, message):
    with pytest.raises(RecipeError, match=message):
        compressive(tiny_llama(), **fields)


@pytest.mark.parametrize(
    ("build", "fields", "message"),
    [
        (
            tiny_bert,
            {},
            "BertForSequenceClassification is not causal, and a memory of earlier segments is for decoders",
        ),
        (tiny_t5, {}, "t5 has cross-attention"),
        (tiny_gpt2, {"compressed": 40}, "distances up to 85, and the model has 64 positions: choose smaller ones"),
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
        compressive(model, **fields)
    assert type(model) is before


def test_what_else_is_refused():
    model = compressive(tiny_llama())
    with pytest.raises(ValueError, match="give each document a row of its own"):
        model(IDS[:1], position_ids=torch.cat([torch.arange(11), torch.arange(12)])[None], use_cache=False)
    with pytest.raises(ValueError, match="no masks of pairs"):
        model(IDS[:, :4], attention_mask=torch.ones(2, 1, 4, 4, dtype=torch.bool).tril())
    with pytest.raises(ValueError, match="has a table of 64 positions, and the text 69 tokens"):
        compressive(tiny_gpt2())(IDS.repeat(1, 3))
    with pytest.raises(RecipeError, match="compressive_transformer"):
        compressive(tiny_llama(), {"technique": "transformer_xl", "segment": 4, "memory": 4})


def test_channels_that_a_convolution_reads_keep_their_order():
    model = compressive(tiny_llama(), {"technique": "channel_permutation"})
    found, plain = model.state_dict(), tiny_llama().state_dict()
    assert all(torch.equal(found[name], plain[name]) for name in ("model.embed_tokens.weight", "model.norm.weight"))
    assert not torch.equal(found["model.layers.0.mlp.down_proj.weight"], plain["model.layers.0.mlp.down_proj.weight"])
    torch.testing.assert_close(logits(model), logits(compressive(tiny_llama())))
