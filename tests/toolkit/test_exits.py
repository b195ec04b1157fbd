"""Exits of models: heads and partial runs against the model itself, files, and what is refused."""

from __future__ import annotations

import copy
import functools
import json
import pickle
import threading
from types import MethodType

import pytest
import torch
from accelerate.utils.operations import convert_outputs_to_fp32
from safetensors.torch import load_file, save_file
from tiny_models import tiny_bert, tiny_gpt2, tiny_llama, tiny_mixtral, tiny_opt, tiny_t5, tiny_vit
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import hf_optim
from hf_optim import CheckpointError, ModelError, RecipeError
from hf_optim.toolkit.compat import CACHE
from hf_optim.toolkit.exits import (
    FILE,
    ExitSettings,
    attach_exits,
    detach_exits,
    exits_of,
    forward_with_exits,
    load_exits,
    record_states,
    require_exits,
    run_blocks,
    run_held,
    run_to_exit,
    save_exits,
    stored_settings,
    view,
)
from hf_optim.toolkit.exits.structure import find_structure

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
IDS = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(0))
PADDED = {"left": torch.ones(3, 9, dtype=torch.int64), "right": torch.ones(3, 9, dtype=torch.int64)}
PADDED["left"][0, :3] = PADDED["right"][0, -3:] = 0


def made(cls, config):
    torch.manual_seed(0)
    model = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


MODELS = {
    "llama": lambda: tiny_llama(num_hidden_layers=3),
    "qwen3": lambda: made(Qwen3ForCausalLM, Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8)),
    "gemma2": lambda: made(  # caps its logits, and its layers have windows in turn
        Gemma2ForCausalLM, Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8, sliding_window=4)
    ),
    "gpt2": lambda: tiny_gpt2(n_layer=3),
    "opt": lambda: tiny_opt(num_hidden_layers=3),
    "mixtral": lambda: tiny_mixtral(num_hidden_layers=3),
    "bert": lambda: tiny_bert(num_hidden_layers=3),
    "roberta": lambda: made(RobertaForSequenceClassification, RobertaConfig(**SMALL, max_position_embeddings=32)),
    "vectors": lambda: made(BertModel, BertConfig(**SMALL)),
    "vit": lambda: tiny_vit(num_hidden_layers=3),
}
DECODERS = ["llama", "qwen3", "gemma2", "gpt2", "opt", "mixtral"]


def inputs_of(name, side="left"):
    if name == "vit":
        return {"pixel_values": torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))}
    return {"input_ids": IDS, "attention_mask": PADDED[side]}


def main(output):
    return output.logits if "logits" in output else output.last_hidden_state


def moved(exits, seed=2):
    """Give own heads and classifiers random values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in exits.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return exits


# -- runs and heads ---------------------------------------------------------------------------------------------------
@pytest.mark.many
@pytest.mark.parametrize("side", PADDED)
@pytest.mark.parametrize("heads", ["shared", "own"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_partial_runs_are_the_model_to_the_bit(name, heads, side):
    model, inputs = MODELS[name](), inputs_of(name, side)
    keys = set(model.state_dict())
    exits = attach_exits(model, ExitSettings((0, 1), heads))
    assert set(model.state_dict()) == keys
    assert len(list(model.parameters())) == len(
        {id(p) for p in model.parameters()} - {id(p) for p in exits.parameters()}
    )
    with record_states(model) as states:
        full = main(model(**inputs))
    runs = [run_to_exit(model, index, **inputs) for index in range(3)]
    assert torch.equal(main(runs[2].output), full)
    for index in range(3):
        assert torch.equal(runs[index].hidden, states[index])
        assert torch.equal(main(runs[index].output), main(exits.output(index, states[index], **inputs)))
    assert torch.equal(run_blocks(model, 1, 1, states[0], 1, **inputs).hidden, states[1])
    assert not torch.equal(main(runs[0].output), full)
    if name in DECODERS:
        for index in range(3):
            assert torch.equal(exits.logits(index, states[index]), main(runs[index].output))
            one = exits.logits(index, states[index][1, -1])
            torch.testing.assert_close(one, main(runs[index].output)[1, -1], atol=1e-5, rtol=1e-5)


@pytest.mark.many
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_blocks_after_an_exit_are_not_computed(name):
    model = MODELS[name]()
    attach_exits(model, ExitSettings((0, 1)))
    structure = exits_of(model).structure
    called = []
    for index, block in enumerate(model.get_submodule(structure.list_name)):
        block.register_forward_hook(lambda *_, index=index: called.append(index))
    run_to_exit(model, 1, **inputs_of(name))
    assert called == [0, 1]
    called.clear()
    run_blocks(model, 1, 2, torch.zeros(3, 5 if name == "vit" else 9, 32), None, **inputs_of(name))
    assert called == [1, 2]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_the_first_layers_alone_give_what_a_model_with_so_many_blocks_gives(name):
    model = MODELS[name]()
    attach_exits(model, ExitSettings((0, 1)))
    short = copy.deepcopy(model)
    body = short.model if name == "llama" else short.transformer
    if name == "llama":
        body.layers = body.layers[:2]
    else:
        body.h = body.h[:2]
    assert torch.equal(run_to_exit(model, 1, **inputs_of(name)).output.logits, short(**inputs_of(name)).logits)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "opt"])
@torch.no_grad()
def test_a_run_to_an_exit_fills_the_cache_of_its_blocks(name):
    model = MODELS[name]()
    attach_exits(model, ExitSettings((0, 1)))
    out = run_to_exit(model, 1, input_ids=IDS[:, :6], use_cache=True)
    cache = out.output[CACHE]
    assert [layer.get_seq_length() for layer in cache.layers[:2]] == [6, 6]
    step = run_to_exit(model, 1, input_ids=IDS[:, 6:7], use_cache=True, **{CACHE: cache})
    whole = run_to_exit(model, 1, input_ids=IDS[:, :7]).output.logits[:, -1]
    torch.testing.assert_close(step.output.logits[:, -1], whole, atol=1e-5, rtol=1e-5)


def test_a_loss_is_that_of_the_head_at_the_exit():
    model = MODELS["llama"]()
    exits = moved(attach_exits(model, ExitSettings((0,), "own")))
    found = run_to_exit(model, 0, input_ids=IDS, labels=IDS).output
    logits = found.logits[:, :-1].flatten(0, 1)
    torch.testing.assert_close(found.loss, torch.nn.functional.cross_entropy(logits, IDS[:, 1:].flatten()))
    found.loss.backward()
    assert all(p.grad is not None for p in exits.parameters())
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None
    assert model.model.layers[1].self_attn.q_proj.weight.grad is None
    assert model.lm_head.weight.grad is None


def test_threads_run_one_model_to_different_exits_at_once():
    model = MODELS["llama"]()
    attach_exits(model, ExitSettings((0, 1)))
    with torch.no_grad():
        expected = [run_to_exit(model, index, input_ids=IDS).output.logits for index in range(3)]
    wrong = []

    def work(index):
        with torch.no_grad():
            for _ in range(30):
                if not torch.equal(run_to_exit(model, index, input_ids=IDS).output.logits, expected[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_recorded_states_are_those_of_the_own_thread():
    model = MODELS["llama"]()
    attach_exits(model, ExitSettings((0,)))
    with torch.no_grad(), record_states(model) as states:
        model(input_ids=IDS)
        first = [state.clone() for state in states]
        other = threading.Thread(target=lambda: model(input_ids=IDS.flip(0)))
        other.start()
        other.join()
        assert all(torch.equal(a, b) for a, b in zip(first, states, strict=True))
    assert not any(module._forward_hooks for module in model.modules())


def test_copies_and_pickles_have_exits_of_their_own():
    model = MODELS["llama"]()
    exits = moved(attach_exits(model, ExitSettings((1,), "own", "token")))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        theirs = require_exits(other)
        assert theirs is not exits
        assert theirs.model is other
        assert require_exits(model).model is model
        with torch.no_grad():
            found, expected = (run_to_exit(each, 0, input_ids=IDS).output.logits for each in (other, model))
        assert torch.equal(found, expected)


@torch.no_grad()
def test_exits_follow_the_dtype_of_the_model():
    model = MODELS["llama"]()
    moved(attach_exits(model, ExitSettings((0,), "own", "token", "geometric")))
    model.to(torch.bfloat16)
    run = run_to_exit(model, 0, input_ids=IDS)
    assert run.output.logits.dtype == torch.bfloat16
    assert exits_of(model).stop_logits(0, run.hidden).dtype == torch.float32


# -- tokens that keep their states ------------------------------------------------------------------------------------
@pytest.mark.many
@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_a_token_that_stops_keeps_its_state_against_a_loop_over_blocks(name):
    model = MODELS[name]()
    exits = attach_exits(model, ExitSettings((0, 1)))
    inputs = {"input_ids": IDS, "attention_mask": PADDED["left"]}
    drawn = torch.randint(3, IDS.shape, generator=torch.Generator().manual_seed(5))
    run = run_held(model, lambda index, hidden: drawn == index, **inputs)
    hidden = run_blocks(model, 0, 0, None, None, **inputs).hidden
    for block in (1, 2):
        after = run_blocks(model, block, block, hidden, None, **inputs).hidden
        hidden = torch.where((drawn < block)[..., None], hidden, after)
    assert torch.equal(run.exits, drawn)
    torch.testing.assert_close(run.hidden, hidden, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(run.output.logits, exits.logits(2, hidden), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cached", [False, True])
@torch.no_grad()
def test_no_block_runs_after_all_tokens_have_stopped_unless_a_cache_needs_its_keys(cached):
    model = MODELS["llama"]()
    attach_exits(model, ExitSettings((0, 1)))
    run = run_held(model, lambda index, hidden: torch.ones(3, 9, dtype=torch.bool), input_ids=IDS, use_cache=cached)
    assert run.computed == (3 if cached else 1)
    assert int(run.exits.max()) == 0


@torch.no_grad()
def test_decoding_with_held_tokens_is_the_whole_pass():
    model = MODELS["llama"]()
    attach_exits(model, ExitSettings((0, 1)))
    drawn = torch.randint(3, IDS.shape, generator=torch.Generator().manual_seed(7))
    whole = run_held(model, lambda index, hidden: drawn == index, input_ids=IDS).output.logits
    cache, found = None, []
    for place in range(IDS.shape[1]):
        now = drawn[:, place : place + 1]
        given = {} if cache is None else {CACHE: cache}
        out = run_held(
            model, lambda i, h, now=now: now == i, input_ids=IDS[:, place : place + 1], use_cache=True, **given
        )
        cache = out.output[CACHE]
        found.append(out.output.logits)
    torch.testing.assert_close(torch.cat(found, 1), whole, atol=1e-5, rtol=1e-5)


# -- rules ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("heads", ["shared", "own"])
@pytest.mark.parametrize("name", ["bert", "roberta", "vit"])
@torch.no_grad()
def test_rows_leave_the_batch_and_give_what_each_gives_alone(name, heads):
    model = MODELS[name]()
    exits = moved(attach_exits(model, ExitSettings((0, 1), heads)))
    inputs = inputs_of(name, "right")
    tables = torch.stack([run_to_exit(model, i, **inputs).output.logits.softmax(-1).amax(-1) for i in range(2)])
    threshold = float(tables.flatten().sort().values[3:5].mean())  # some stop at each exit
    rows = []
    block = model.get_submodule(exits.structure.list_name)[2]
    handle = block.register_forward_hook(lambda _, args, out: rows.append(args[0].shape[0]))
    out = forward_with_exits(model, threshold=threshold, **inputs)
    handle.remove()
    last = int((out.exits == 2).sum())
    assert rows == ([last] if last else [])
    assert len(set(out.exits.tolist())) > 1
    assert out.layers.tolist() == [exits.layers[e] + 1 for e in out.exits.tolist()]
    for row in range(3):
        length = int(inputs["attention_mask"][row].sum()) if "attention_mask" in inputs else None
        alone = {
            key: value[row : row + 1, :length] if length else value[row : row + 1] for key, value in inputs.items()
        }
        single = forward_with_exits(model, threshold=threshold, **alone)
        assert int(single.exits) == int(out.exits[row])
        torch.testing.assert_close(single.logits[0], out.logits[row], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma2", "bert", "vit"])
@torch.no_grad()
def test_thresholds_have_the_first_exit_and_the_full_model_as_limits(name):
    model, inputs = MODELS[name](), inputs_of(name)
    attach_exits(model, ExitSettings((0, 1)))
    full = forward_with_exits(model, threshold=1.01, **inputs)
    assert torch.equal(full.logits, model(**inputs).logits)
    assert full.mean_layers() == 3
    first = forward_with_exits(model, threshold=0.0, **inputs)
    assert torch.equal(first.logits, run_to_exit(model, 0, **inputs).output.logits)
    assert first.mean_layers() == 1
    fixed = forward_with_exits(model, rule="fixed", exit_index=1, **inputs)
    assert torch.equal(fixed.logits, run_to_exit(model, 1, **inputs).output.logits)


@pytest.mark.parametrize("law", ["multinomial", "geometric"])
@pytest.mark.parametrize("heads", ["shared", "own"])
@torch.no_grad()
def test_classifiers_decide_for_tokens_and_for_rows_as_their_equations_say(law, heads):
    for name, kind in (("llama", "token"), ("bert", "sequence")):
        model, inputs = MODELS[name](), inputs_of(name)
        exits = moved(attach_exits(model, ExitSettings((0, 1), heads, kind, law)))
        out = forward_with_exits(model, rule="classifier", **inputs)
        hidden = run_to_exit(model, 0, **inputs).hidden
        mask = inputs["attention_mask"][..., None]
        state = hidden if kind == "token" else (hidden * mask).sum(1) / mask.sum(1)
        if law == "multinomial":
            weight, bias = exits.classifier.weight, exits.classifier.bias
            expected = (state @ weight.T + bias).softmax(-1).argmax(-1)
            assert torch.equal(out.exits, expected)
        else:
            unit = exits.classifier[0]
            stops = torch.sigmoid(state @ unit.weight[0] + unit.bias) >= 0.5
            assert torch.equal(out.exits == 0, stops)
        assert len(set(out.exits.flatten().tolist())) > 1 or name == "bert"
        for index in range(3):
            chosen = out.exits == index
            if kind == "sequence" and chosen.any():
                expected = run_to_exit(model, index, **inputs).output.logits[chosen]
                torch.testing.assert_close(out.logits[chosen], expected, atol=1e-5, rtol=1e-4)
            if kind == "token" and chosen.any():
                expected = exits.logits(index, out.last_hidden_state[chosen])
                torch.testing.assert_close(out.logits[chosen], expected, atol=1e-5, rtol=1e-4)


def test_the_mean_of_layers_leaves_padding_out():
    model = MODELS["llama"]()
    attach_exits(model, ExitSettings((0, 1)))
    with torch.no_grad():
        out = forward_with_exits(model, threshold=0.2, input_ids=IDS, attention_mask=PADDED["left"])
    kept = PADDED["left"].bool()
    assert out.mean_layers(PADDED["left"]) == pytest.approx(float(out.layers[kept].double().mean()))


# -- files ------------------------------------------------------------------------------------------------------------
def saved(folder, heads="own", name="llama"):
    model = MODELS[name]()
    moved(attach_exits(model, ExitSettings((0, 1), heads, "token" if name == "llama" else "sequence")))
    folder.mkdir(parents=True)
    save_exits(model, folder)
    model.save_pretrained(folder)
    return model


def other(model):
    """Return the model without its exits, with the configuration that describes them."""
    bare = copy.deepcopy(model)
    entry = bare.config.hf_optim_exits
    detach_exits(bare)
    assert exits_of(bare) is None
    bare.config.hf_optim_exits = entry
    return bare


def test_files_bring_exits_back(tmp_path):
    model = saved(tmp_path / "m")
    bare = other(model)
    exits = load_exits(bare, tmp_path / "m")
    assert exits_of(bare) is exits
    for name, value in exits_of(model).state_dict().items():
        assert torch.equal(value, exits.state_dict()[name])
    entry = json.loads((tmp_path / "m" / "config.json").read_text())["hf_optim_exits"]
    assert sorted(entry) == ["blocks", "checksum", "classifiers", "heads", "law", "layers", "width"]


def test_missing_damaged_and_foreign_files_are_refused(tmp_path):
    model = saved(tmp_path / "m")
    path = tmp_path / "m" / FILE
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(CheckpointError, match=f"has no {FILE}"):
        load_exits(other(model), tmp_path / "m")
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="checksum"):
        load_exits(other(model), tmp_path / "m")
    path.write_bytes(content[:40])
    with pytest.raises(CheckpointError):
        load_exits(other(model), tmp_path / "m")
    path.write_bytes(content)
    deeper = tiny_llama(num_hidden_layers=4)
    deeper.config.hf_optim_exits = model.config.hf_optim_exits
    with pytest.raises(CheckpointError, match="another model"):
        load_exits(deeper, tmp_path / "m")
    shallow = tiny_llama(num_hidden_layers=2)
    shallow.config.hf_optim_exits = model.config.hf_optim_exits
    with pytest.raises(CheckpointError, match="do not fit"):
        load_exits(shallow, tmp_path / "m")
    words = tiny_llama(num_hidden_layers=3, vocab_size=80)
    words.config.hf_optim_exits = model.config.hf_optim_exits
    with pytest.raises(CheckpointError, match="another model"):
        load_exits(words, tmp_path / "m")


def test_a_file_with_other_tensors_is_refused(tmp_path):
    model = saved(tmp_path / "m")
    tensors = load_file(tmp_path / "m" / FILE)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, tmp_path / "m" / FILE)
    import hashlib

    bare = other(model)
    digest = hashlib.sha256((tmp_path / "m" / FILE).read_bytes()).hexdigest()
    bare.config.hf_optim_exits = {**bare.config.hf_optim_exits, "checksum": digest}
    with pytest.raises(CheckpointError, match="only one of them"):
        load_exits(bare, tmp_path / "m")


@pytest.mark.parametrize("key", ["blocks", "checksum", "classifiers", "heads", "law", "layers", "width"])
def test_every_field_of_the_entry_is_required_and_checked(tmp_path, key):
    model = saved(tmp_path / "m", heads="shared")
    whole = model.config.hf_optim_exits
    model.config.hf_optim_exits = {name: value for name, value in whole.items() if name != key}
    with pytest.raises(CheckpointError, match=f"has no {key}"):
        stored_settings(model.config)
    for odd in (None, [], -1, 1.5, "x", {}, True, [True], [3, 1], "z" * 64):
        model.config.hf_optim_exits = {**whole, key: odd}
        with pytest.raises(CheckpointError, match="hf_optim_exits"):
            stored_settings(model.config)
    model.config.hf_optim_exits = {**whole, "more": 1}
    with pytest.raises(CheckpointError, match="unknown field"):
        stored_settings(model.config)


# -- what is refused --------------------------------------------------------------------------------------------------
def test_models_that_exits_do_not_fit_are_refused_with_the_reason():
    with pytest.raises(ModelError, match="encoder-decoder"):
        attach_exits(tiny_t5(), ExitSettings((0,)))
    with pytest.raises(ModelError, match="one block"):
        attach_exits(tiny_llama(num_hidden_layers=1), ExitSettings((0,)))
    with pytest.raises(ModelError, match="not a model of transformers"):
        attach_exits(torch.nn.Linear(3, 3), ExitSettings((0,)))
    with pytest.raises(ModelError, match="there is no block 7"):
        attach_exits(tiny_llama(), ExitSettings((0, 7)))
    with pytest.raises(ModelError, match="is the last of"):
        attach_exits(tiny_llama(), ExitSettings((1,)))
    with pytest.raises(ModelError, match="has no exits"):
        forward_with_exits(tiny_llama(), threshold=0.5, input_ids=IDS)


def test_a_model_without_blocks_is_refused():
    from transformers import PretrainedConfig, PreTrainedModel

    class Flat(PreTrainedModel):
        config_class = PretrainedConfig

        def __init__(self, config):
            super().__init__(config)
            self.embed, self.head = torch.nn.Embedding(10, 8), torch.nn.Linear(8, 10)
            self.post_init()

        def forward(self, input_ids, **kwargs):
            return {"logits": self.head(self.embed(input_ids))}

    with pytest.raises(ModelError, match="no blocks"):
        attach_exits(Flat(PretrainedConfig()), ExitSettings((0,)))


@pytest.mark.parametrize("layers", [(), (1, 0), (0, 0), (-1,), (True,), ("0",), 3, (0.0,), (5000,)])
def test_odd_layers_are_refused(layers):
    with pytest.raises(RecipeError, match="layers must"):
        ExitSettings(layers)


@pytest.mark.parametrize("index", [-1, 3, True, 0.0, "0", None])
def test_an_exit_that_does_not_exist_is_refused(index):
    model = MODELS["llama"]()
    attach_exits(model, ExitSettings((0, 1)))
    with pytest.raises(ModelError, match="does not exist"):
        run_to_exit(model, index, input_ids=IDS)


def test_rules_that_do_not_fit_are_refused():
    model, base = MODELS["llama"](), MODELS["vectors"]()
    attach_exits(model, ExitSettings((0, 1)))
    attach_exits(base, ExitSettings((0, 1)))
    for given, match in (
        ({"rule": "hope"}, "rule must be one of"),
        ({"rule": "confidence"}, "needs a threshold"),
        ({"rule": "classifier"}, "no classifier"),
        ({"rule": "fixed"}, "needs exit_index"),
        ({"threshold": 0.5, "exit_index": 1}, "needs exit_index"),
        ({"threshold": float("nan")}, "threshold must be"),
        ({"threshold": -1.0}, "threshold must be"),
        ({"threshold": 0.5, "per_token": False}, "no probabilities of classes"),
    ):
        with pytest.raises(ModelError, match=match):
            forward_with_exits(model, **given, input_ids=IDS)
    with pytest.raises(ModelError, match="no head"):
        forward_with_exits(base, threshold=0.5, input_ids=IDS)
    with pytest.raises(ModelError, match=r"model\.eval"):
        forward_with_exits(model.train(), threshold=0.5, input_ids=IDS)
    with pytest.raises(ModelError, match="pass it as hidden"):
        run_blocks(model, 1, 2, input_ids=IDS)
    with pytest.raises(ModelError, match="cannot be run"):
        run_blocks(model, 0, 5, input_ids=IDS)


def test_a_forward_that_was_replaced_on_the_object_is_refused():
    model = MODELS["llama"]()
    attach_exits(model, ExitSettings((0,)))
    model.model.forward = functools.partial(model.model.forward)  # as accelerate's hooks do
    with pytest.raises(ModelError, match="load the model on one device"):
        run_to_exit(model, 0, input_ids=IDS)


@torch.no_grad()
def test_a_model_prepared_for_mixed_precision_runs_its_blocks_in_parts():
    model = MODELS["llama"]()
    attach_exits(model, ExitSettings((0,)))
    with torch.autocast("cpu", torch.bfloat16):
        expected = run_to_exit(model, 0, input_ids=IDS).output.logits
    cast = torch.autocast("cpu", torch.bfloat16)(model.forward.__func__)  # as accelerate prepares a model
    model.forward = MethodType(convert_outputs_to_fp32(cast), model)
    found = run_to_exit(model, 0, input_ids=IDS).output.logits
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected.float())
    whole = run_to_exit(model, 1, input_ids=IDS).output.logits
    assert torch.equal(whole, model(input_ids=IDS).logits)


def test_a_model_that_has_lost_a_block_is_refused(tmp_path):
    model = MODELS["llama"]()
    attach_exits(model, ExitSettings((0,)))
    model.model.layers = model.model.layers[:2]
    for act in (lambda: run_to_exit(model, 0, input_ids=IDS), lambda: save_exits(model, tmp_path)):
        with pytest.raises(ModelError, match="made for 3 blocks"):
            act()


def test_a_view_leaves_the_model_as_it_is():
    model = MODELS["llama"]()
    before = dict(model.named_modules())
    changed = view(model, {"model.norm": torch.nn.Identity(), "lm_head": torch.nn.Identity()})
    with torch.no_grad():
        assert changed(input_ids=IDS).logits.shape[-1] == 32
        assert model(input_ids=IDS).logits.shape[-1] == 64
    assert dict(model.named_modules()) == before
    assert changed.model.layers is model.model.layers


def test_places_of_exits_are_found_in_a_model_without_weights():
    whole = tiny_llama()
    with torch.device("meta"):
        empty = type(whole)(whole.config)
    assert find_structure(empty) == find_structure(whole)


@pytest.mark.parametrize("heads", ["shared", "own"])
def test_exits_of_the_public_function_are_saved_with_the_model(heads, tmp_path):
    model = made(LlamaForCausalLM, LlamaConfig(**SMALL))
    exits = hf_optim.attach_exits(model, ExitSettings(layers=(0,), heads=heads))
    for parameter in exits.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape))
    expected = run_to_exit(model, 0, input_ids=IDS).output.logits
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, optim_config="auto")
    assert torch.equal(run_to_exit(again, 0, input_ids=IDS).output.logits, expected)
    detach_exits(model)
    model.save_pretrained(tmp_path)
    assert exits_of(AutoModelForCausalLM.from_pretrained(tmp_path, optim_config="auto")) is None
