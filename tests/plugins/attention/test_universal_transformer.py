"""Tied blocks in steps against stock models that have the block in each layer, with signals computed from the paper."""

from __future__ import annotations

import copy
import json
import math
import pickle

import pytest
import torch
from tiny_models import DECODER, tiny_bert, tiny_gpt2, tiny_llama, tiny_mixtral, tiny_opt, tiny_t5, tiny_vit
from transformers import (
    AlbertForSequenceClassification,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForTokenClassification,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    Trainer,
    TrainingArguments,
)

import hf_optim
from hf_optim import ModelError, RecipeError

IDS = torch.randint(3, 60, (2, 11), generator=torch.Generator().manual_seed(0))
DECODERS = [tiny_llama, tiny_gpt2, tiny_opt]
NONE = {"position_signal": "none", "step_signal": "none"}
LISTS = {
    "llama": "layers",
    "gpt2": "h",
    "opt": "decoder.layers",
    "bert": "encoder.layer",
    "vit": "layers",
    "mixtral": "layers",
}


def universal(model, *more, **fields):
    return hf_optim.optimize(model, [{"technique": "universal_transformer", **fields}, *more])


def layers_of(model):
    return model.base_model.get_submodule(LISTS[getattr(model.config, "model_type", "").split("_")[-1]])


def paper_signal(length, width, step, first=1):
    """Return the sum of both signals of the paper for one step, float64 ``[length, width]``, number by number."""
    rows = []
    for i in range(first, first + length):
        row = []
        for component in range(width):
            j = component // 2
            rate = 10000 ** (2 * j / width)
            wave = math.sin if component % 2 == 0 else math.cos
            row.append(wave(i / rate) + wave(step / rate))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def stack_with(build, dense, blocks, signal, **changes):
    """Return a stock model with given state dicts as its layers, a signal before each, and the rest of ``dense``."""
    model = build(**changes, **{"n_layer" if build is tiny_gpt2 else "num_hidden_layers": len(blocks)}).double()
    inside = tuple(f"{model.base_model_prefix}.{LISTS[model.config.model_type]}.{n}." for n in range(64))
    rest = {name: value for name, value in dense.state_dict().items() if not name.startswith(inside)}
    model.load_state_dict(rest, strict=False)
    for number, (layer, state) in enumerate(zip(layers_of(model), blocks, strict=True)):
        layer.load_state_dict(state)

        def add(module, args, number=number):
            return (args[0] + signal(number, args[0]), *args[1:])

        layer.register_forward_pre_hook(add)
    return model


def mean_of(states):
    return {name: sum(state[name] for state in states) / len(states) for name in states[0]}


@pytest.mark.many
@pytest.mark.parametrize("build", [*DECODERS, tiny_bert])
def test_outputs_and_gradients_are_those_of_a_stack_of_the_mean_with_the_signals_of_the_paper(build):
    dense = build().double()
    mean = mean_of([layer.state_dict() for layer in layers_of(dense)])
    model = universal(build().double(), steps=3, scale=0.5)
    stock = stack_with(
        build, dense, [mean] * 3, lambda number, x: 0.5 * paper_signal(x.shape[1], x.shape[2], number + 1)
    )
    found, expected = model(IDS).logits, stock(IDS).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    found.square().sum().backward()
    expected.square().sum().backward()
    block = layers_of(model)[0].block
    others = [dict(layer.named_parameters()) for layer in layers_of(stock)]
    for name, parameter in block.named_parameters():
        total = sum(each[name].grad for each in others)
        torch.testing.assert_close(parameter.grad, total, rtol=1e-9, atol=1e-9)
    outer = model.get_input_embeddings().weight.grad, stock.get_input_embeddings().weight.grad
    torch.testing.assert_close(*outer, rtol=1e-9, atol=1e-9)


@pytest.mark.many
@pytest.mark.parametrize("build", [*DECODERS, tiny_bert, tiny_vit])
def test_equal_blocks_and_as_many_steps_are_the_model_to_the_bit_and_one_step_is_one_block(build):
    model = build()
    for layer in layers_of(model)[1:]:
        layer.load_state_dict(layers_of(model)[0].state_dict())
    inputs = {"pixel_values": torch.randn(2, 3, 16, 16)} if build is tiny_vit else {"input_ids": IDS}
    with torch.no_grad():
        expected = model(**inputs).logits
        tied = universal(copy.deepcopy(model), **NONE)
        assert torch.equal(tied(**inputs).logits, expected)
        assert tied.num_parameters() < model.num_parameters()
        one = universal(build(), steps=1, initial=1, **NONE)
        shallow = build(**{"n_layer" if build is tiny_gpt2 else "num_hidden_layers": 1})
        for name, parameter in shallow.named_parameters():
            full = dict(build().named_parameters())
            parts = name.split(".0.") if ".0." in name else [name]
            parameter.copy_(full[".1.".join(parts)])
        assert torch.equal(one(**inputs).logits, shallow(**inputs).logits)


@pytest.mark.parametrize("order", ["consecutive", "cycle"])
def test_groups_of_blocks_are_applied_in_their_order(order):
    changes = {"num_hidden_layers": 4}
    dense = tiny_llama(**changes).double()
    states = [layer.state_dict() for layer in layers_of(dense)]
    pairs = [(0, 1), (2, 3)] if order == "consecutive" else [(0, 2), (1, 3)]
    blocks = [mean_of([states[a], states[b]]) for a, b in pairs]
    model = universal(tiny_llama(**changes).double(), groups=2, steps=6, order=order, **NONE)
    turns = [0, 0, 0, 1, 1, 1] if order == "consecutive" else [0, 1] * 3
    stock = stack_with(tiny_llama, dense, [blocks[turn] for turn in turns], lambda number, x: 0 * x)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, stock(IDS).logits, rtol=0, atol=1e-12)
    chosen = universal(tiny_llama(**changes).double(), groups=2, initial=1, steps=2, order=order, **NONE)
    for step, (_, source) in zip(layers_of(chosen), pairs, strict=True):
        for name, value in step.block.state_dict().items():
            assert torch.equal(value, states[source][name])


@pytest.mark.many
@pytest.mark.parametrize("build", DECODERS)
@pytest.mark.parametrize("fields", [{}, {"position_signal": "learned", "step_signal": "learned"}])
def test_stock_generate_decodes_with_a_cache_slot_for_each_step(build, fields):
    model = universal(build().double(), steps=5, scale=0.3, **fields)
    randomize_signals(model)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0
    about = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        cached = model.generate(IDS, attention_mask=mask, **about)
        whole = model.generate(IDS, attention_mask=mask, use_cache=False, **about)
        torch.testing.assert_close(torch.stack(cached.logits), torch.stack(whole.logits), rtol=0, atol=1e-10)
        static = model.generate(IDS, attention_mask=mask, cache_implementation="static", **about)
        torch.testing.assert_close(torch.stack(static.logits), torch.stack(whole.logits), rtol=0, atol=1e-10)
        beams = [model.generate(IDS, num_beams=3, use_cache=use, max_new_tokens=4) for use in (True, False)]
        assert torch.equal(*beams)
        alone = model.generate(IDS[1:, 4:], **about)
    torch.testing.assert_close(torch.stack(cached.logits)[:, 1:], torch.stack(alone.logits), rtol=0, atol=1e-10)
    cache = next(value for value in cached.values() if hasattr(value, "layers"))
    assert len(cache.layers) == 5
    assert len({layer.keys.sum().item() for layer in cache.layers}) == 5


def randomize_signals(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".own_signals." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


@pytest.mark.many
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("build", [tiny_llama, tiny_opt, tiny_bert])
def test_signals_count_from_the_first_token_of_a_row_so_that_padding_changes_nothing(build, side):
    model = universal(build().double(), steps=3)
    mask = torch.ones_like(IDS)
    real = slice(4, None) if side == "left" else slice(None, 7)
    mask[1] = 0
    mask[1, real] = 1
    more = {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)} if build is tiny_bert else {}
    with torch.no_grad():
        found = model.base_model(IDS, attention_mask=mask, **more)[0]
        alone = model.base_model(IDS[1:, real])[0]
        first = model.base_model(IDS[:1])[0]
    torch.testing.assert_close(found[1:, real], alone, rtol=0, atol=1e-11)
    torch.testing.assert_close(found[:1], first, rtol=0, atol=1e-11)


def test_positions_given_by_the_caller_are_those_of_the_signals():
    model = universal(tiny_llama().double(), steps=2)
    places = torch.arange(5, 16)[None]
    with torch.no_grad():
        shifted = model(IDS, position_ids=places).logits
        dense = tiny_llama().double()
        states = [layer.state_dict() for layer in layers_of(dense)]
        stock = stack_with(
            tiny_llama, dense, [mean_of(states)] * 2, lambda n, x: paper_signal(x.shape[1], x.shape[2], n + 1, first=6)
        )
        torch.testing.assert_close(shifted, stock(IDS, position_ids=places).logits, rtol=0, atol=1e-11)


def test_no_token_sees_a_later_one():
    model = universal(tiny_llama().double(), steps=4)
    other = IDS.clone()
    other[:, 6:] = (other[:, 6:] + 1) % 60
    with torch.no_grad():
        before, after = model(IDS).logits, model(other).logits
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.equal(before[:, 6:], after[:, 6:])


def enable_checkpointing(model):
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_stock_trainer_trains_the_block_and_the_signals(checkpointing, tmp_path):
    fields = {"steps": 3, "position_signal": "learned", "step_signal": "learned"}
    model = universal(tiny_llama(), **fields)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]
    args = TrainingArguments(
        str(tmp_path), max_steps=12, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[], use_cpu=True,
        save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    if checkpointing:
        enable_checkpointing(model)
    model.eval()
    with torch.no_grad():
        first = float(model(IDS, labels=IDS).loss)
    Trainer(model=model, args=args, train_dataset=rows).train()
    model.eval()
    with torch.no_grad():
        assert float(model(IDS, labels=IDS).loss) < first - 0.3
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert not still
    model.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_checkpointed_gradients_are_those_without():
    gradients = []
    for checkpointing in (False, True):
        model = universal(tiny_llama().double(), steps=3).train()
        if checkpointing:
            enable_checkpointing(model)
        model(IDS, labels=IDS).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_a_checkpoint_holds_the_block_once_and_a_copy_is_independent(tmp_path):
    model = universal(tiny_llama(num_hidden_layers=6), steps=8)
    model.save_pretrained(tmp_path)
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = list(file.keys())
        stored = sum(math.prod(file.get_slice(name).get_shape()) for name in names)
    assert stored == model.num_parameters()
    assert {name.split(".own_block.")[0] for name in names if ".layers." in name} == {"model.layers.0"}
    assert json.loads((tmp_path / "config.json").read_text())["tied_blocks"]["steps"] == 8
    figures = hf_optim.run_of(model).reported(hf_optim.run_of(model).recipe.steps[0])
    dense = tiny_llama(num_hidden_layers=6)
    layer = sum(p.numel() for p in dense.model.layers[0].parameters())
    assert figures["parameters_after"] == dense.num_parameters() - 5 * layer
    other = copy.deepcopy(model)
    with torch.no_grad():
        before = model(IDS).logits
        for parameter in layers_of(other)[0].block.parameters():
            parameter.zero_()
        assert torch.equal(model(IDS).logits, before)
        assert not torch.equal(other(IDS).logits, before)


def test_a_configuration_without_the_settings_does_not_load(tmp_path):
    universal(tiny_llama()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["tied_blocks"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.tied_blocks is missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)


def test_a_pickle_is_the_model():
    model = universal(tiny_llama())
    with torch.no_grad():
        assert torch.equal(pickle.loads(pickle.dumps(model))(IDS).logits, model(IDS).logits)


PLAIN = """
import torch
from transformers import AutoModelForCausalLM

loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
ids, mask = torch.tensor(ids), torch.tensor(mask)
result = loaded.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False).tolist()
"""


@pytest.mark.many
@pytest.mark.parametrize("more", [(), ({"technique": "rtn", "bits": 8},)])
def test_plain_transformers_generates_the_same(more, tmp_path, stock_python):
    model = universal(tiny_llama(), *more, steps=3, position_signal="learned", step_signal="learned")
    randomize_signals(model)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0
    expected = model.generate(IDS, attention_mask=mask, max_new_tokens=6, do_sample=False)
    model.save_pretrained(tmp_path)
    given = {"folder": str(tmp_path), "ids": IDS.tolist(), "mask": mask.tolist()}
    done = stock_python.copy("".join(f"{key} = {value!r}\n" for key, value in given.items()) + PLAIN)
    assert done.status == 0, done.err
    assert done.result == expected.tolist()


def tiny_encoder(kind, **changes):
    config = BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=32, classifier_dropout=0.3, **changes,
    )  # fmt: skip
    torch.manual_seed(0)
    return kind(config).double().eval()


@pytest.mark.many
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", [BertModel, BertForMaskedLM, BertForTokenClassification, BertForQuestionAnswering])
def test_a_bert_becomes_the_stock_albert_of_the_same_values(kind, groups):
    mask = torch.ones_like(IDS)
    mask[1, 8:] = 0
    inputs = {"input_ids": IDS, "attention_mask": mask, "token_type_ids": (IDS > 30).long()}
    own = universal(tiny_encoder(kind), groups=groups, **NONE)
    albert = universal(tiny_encoder(kind), groups=groups, convert_to="albert", **NONE)
    assert type(albert).__name__ == kind.__name__.replace("Bert", "Albert")
    with torch.no_grad():
        for one, other in zip(own(**inputs).values(), albert(**inputs).values(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


def test_an_albert_is_loaded_by_its_stock_class(tmp_path):
    model = universal(tiny_bert(), steps=5, convert_to="albert", **NONE)
    own = universal(tiny_bert(), steps=5, **NONE)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(loaded) is AlbertForSequenceClassification
    assert loaded.config.num_hidden_layers == 5
    assert json.loads((tmp_path / "hf_optim.json").read_text())["reload"] == "STOCK_ARCH"
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
        torch.testing.assert_close(loaded(IDS).logits, own(IDS).logits)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"groups": 3, "steps": 2}, "cannot all be applied"),
        ({"initial": -1}, "initial is mean"),
        ({"initial": "median"}, "initial"),
        ({"convert_to": "albert"}, "adds no signals"),
        ({"convert_to": "albert", "order": "cycle", **NONE}, "consecutive"),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(RecipeError, match=message):
        universal(tiny_llama(), **fields)


@pytest.mark.parametrize(
    ("build", "fields", "message"),
    [
        (tiny_t5, {}, "an encoder and a decoder"),
        (tiny_llama, {"groups": 3, "steps": 4}, "3 groups of 2 layers"),
        (tiny_llama, {"initial": 2}, "a group has 2 layers"),
        (tiny_llama, {"convert_to": "albert", **NONE}, "does not express LlamaForCausalLM"),
    ],
)
def test_models_that_do_not_fit_are_refused(build, fields, message):
    model = build()
    with pytest.raises(ModelError, match=message):
        universal(model, **fields)


def test_steps_that_albert_divides_in_another_way_are_refused():
    with pytest.raises(ModelError, match="take a divisor"):
        universal(tiny_bert(num_hidden_layers=14), convert_to="albert", groups=14, steps=18, **NONE)


def test_layers_of_several_kinds_and_blocks_that_are_tied_already_are_refused():
    torch.manual_seed(0)
    several = Gemma2ForCausalLM(Gemma2Config(**DECODER, head_dim=8, sliding_window=4))
    with pytest.raises(ModelError, match="of several kinds"):
        universal(several)
    twice = {"technique": "universal_transformer"}
    with pytest.raises(RecipeError):
        universal(tiny_llama(), twice)
    with pytest.raises(RecipeError, match="applies shared blocks in steps, as the loaded one does"):
        universal(universal(tiny_llama()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 10**9}, "steps"),
        ({"groups": 7}, "cannot all be applied"),
        ({"order": "back"}, "order"),
        ({"blocks": "model.norm"}, "'model.norm' is not a list of"),
        ({"stages": 3}, "settings that they do not know"),
        ({"scale": "much"}, "scale"),
    ],
)
def test_a_configuration_with_other_settings_does_not_load(change, message, tmp_path):
    universal(tiny_llama()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["tied_blocks"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)


def test_a_mixture_of_experts_has_no_mean_of_its_layers():
    with pytest.raises(RecipeError, match="routes tokens to experts"):
        universal(tiny_mixtral())
    model = universal(tiny_mixtral(), initial=1, steps=1, **NONE)
    experts = layers_of(model)[0].block.mlp.experts
    assert torch.equal(experts.down_proj, tiny_mixtral().model.layers[1].mlp.experts.down_proj)


def test_more_tokens_than_learned_positions_are_refused():
    model = universal(tiny_llama(max_position_embeddings=8), position_signal="learned")
    with pytest.raises(ValueError, match="signals for 8 positions"):
        model(IDS)


def test_a_mask_that_leaves_out_the_cache_is_refused():
    model = universal(tiny_llama())
    with torch.no_grad():
        output = model(IDS, use_cache=True)
        cache = next(value for value in output.values() if hasattr(value, "layers"))
        name = next(key for key, value in output.items() if value is cache)
        with pytest.raises(ValueError, match="attention_mask has 1 columns for 12 tokens"):
            model.base_model(IDS[:, :1], attention_mask=torch.ones(2, 1).long(), **{name: cache})
