"""Offloaded models compute to the bit what they computed before, and refuse what they cannot do."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from late_link import LateLink
from tiny_models import TINY, tiny_llama
from transformers import AutoModelForCausalLM

import hf_optim
from hf_optim import ModelError
from hf_optim.generation.door import GenerationWarning
from hf_optim.generation.early_exit.door import weights_of
from hf_optim.testing.tiny_runs import inputs_for
from hf_optim.toolkit.exits import detach_exits
from hf_optim.toolkit.offloading import find_state, place, restore_weights
from hf_optim.toolkit.offloading.classes import Absent

GREEDY = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def logits(model, inputs):
    return model(**inputs).logits


@pytest.mark.many(every=4)
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit", "t5", "mixtral"])
@pytest.mark.parametrize("to", ["cpu", "disk"])
def test_outputs_and_weights_are_equal_and_come_back(name, to, tmp_path):
    model = TINY[name]()
    inputs, before = inputs_for(model), {k: v.clone() for k, v in model.state_dict().items()}
    expected = logits(model, inputs)
    place(model, to, link=LateLink(), folder=tmp_path if to == "disk" else None)
    for _ in range(2):
        assert torch.equal(logits(model, inputs), expected)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(logits(model, inputs), expected)
    assert restore_weights(model)
    assert type(model) is type(TINY[name]())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(logits(model, inputs), expected)


@pytest.mark.many(every=4)
@pytest.mark.parametrize(("layers", "ahead"), [(2, 1), (5, 1), (4, 2), (7, 3), (6, 2), (3, 8)])
def test_every_ring_is_right_at_its_end(layers, ahead):
    model = tiny_llama(num_hidden_layers=layers)
    inputs = inputs_for(model)
    tokens = model.generate(**inputs, **GREEDY)
    link = LateLink()
    place(model, "cpu", link=link, ahead=ahead)
    assert torch.equal(model.generate(**inputs, **GREEDY), tokens)
    # A pass moves no block twice, whatever the number of slots.
    copied, plan = link.copied, hf_optim.offload_plan(model)
    logits(model, inputs)
    assert link.copied - copied <= plan.streamed_bytes + max(plan.sizes) * plan.ahead


def test_a_pass_after_another_order_of_blocks_is_right():
    model = tiny_llama(num_hidden_layers=6)
    inputs = inputs_for(model)
    short = copy.deepcopy(model)
    short.model.layers = short.model.layers[:3]
    expected = logits(model, inputs), logits(short, inputs)
    place(model, "cpu", link=LateLink())
    layers = model.model.layers
    for _ in range(3):
        model.config.num_hidden_layers = 3  # as an early exit does
        assert torch.equal(logits(model, inputs), expected[1])
        model.config.num_hidden_layers = 6
        assert torch.equal(logits(model, inputs), expected[0])
    assert len(layers) == 6


def test_early_exits_and_reports_of_an_offloaded_model():
    model = tiny_llama(num_hidden_layers=5, max_position_embeddings=128)
    ids = torch.randint(1, 60, (3, 9))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **GREEDY, "max_new_tokens": 12}
    settings = [
        hf_optim.early_exit.EarlyExit(threshold=0.02, layers=(0, 2)),
        hf_optim.early_exit.EarlyExit(lossless=True, layers=(2,), drafts=2),
    ]
    calls = [
        *(lambda own=own: hf_optim.generate(model, **given, early_exit=own) for own in settings),
        lambda: hf_optim.run_to_exit(model, 0, input_ids=ids).output.logits,
        lambda: hf_optim.forward_with_exits(model, threshold=0.02, input_ids=ids).logits,
    ]
    hf_optim.attach_exits(model, hf_optim.ExitSettings(layers=(0, 2)))
    expected, text, mark = [call() for call in calls], str(hf_optim.report(model)), weights_of(model)
    place(model, "cpu", link=LateLink())
    for _ in range(2):
        assert all(torch.equal(call(), found) for call, found in zip(calls, expected, strict=True))
    assert str(hf_optim.report(model)) == text
    assert weights_of(model) == mark
    detach_exits(model)


def test_memory_is_that_of_the_plan():
    model = tiny_llama(num_hidden_layers=8)
    place(model, "cpu", link=LateLink(), device_memory="220KB")
    plan = hf_optim.offload_plan(model)
    assert 0 < plan.places.count("device") < 8
    held = {slot.data_ptr(): len(slot) for slot in find_state(model).streamer.slots}
    for tensor in (*model.parameters(), *model.buffers()):
        if type(tensor) is not Absent:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    buffers = sum(t.numel() * t.element_size() for n, t in model.named_buffers())
    assert sum(held.values()) <= plan.device_bytes + buffers + 16
    assert plan.device_bytes <= 220_000


def packed_model(tmp_path):
    model = tiny_llama(num_hidden_layers=4, hidden_size=64, intermediate_size=128).to(torch.bfloat16)
    step = {"technique": "rtn", "bits": 4, "group_size": 32}
    hf_optim.optimize(model, step).save_pretrained(tmp_path / "packed")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "packed", optim_config="auto")


def test_packed_weights_move_packed(tmp_path):
    dense = tiny_llama(num_hidden_layers=4, hidden_size=64, intermediate_size=128).to(torch.bfloat16)
    place(dense, "cpu", link=LateLink())
    model = packed_model(tmp_path)
    inputs = inputs_for(model)
    expected = logits(model, inputs)
    place(model, "cpu", link=LateLink())
    assert torch.equal(logits(model, inputs), expected)
    sizes = [hf_optim.offload_plan(each).streamed_bytes for each in (model, dense)]
    assert sizes[0] < 0.5 * sizes[1]  # scales of groups of 32, and units of 512 bytes, beside the quarter
    with pytest.raises(ModelError, match="is offloaded, and its layers cannot be packed"):
        hf_optim.accelerate(model)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", optim_config="auto")
    assert torch.equal(logits(again, inputs), expected)
    assert torch.equal(logits(model, inputs), expected)
    hf_optim.restore(model)  # off the kernels, too
    assert find_state(model) is None
    assert not any("Packed" in type(module).__name__ for module in model.modules())


def test_a_saved_model_is_whole(tmp_path):
    model = tiny_llama()
    inputs, expected = inputs_for(model), logits(model, inputs_for(model))
    place(model, "disk", link=LateLink(), folder=tmp_path)
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), inputs), expected)
    assert torch.equal(logits(model, inputs), expected)


def test_adapters_stay_on_the_device():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_llama(), config).eval()
    inputs = inputs_for(tiny_llama())
    expected = logits(model, inputs)
    place(model, "cpu", link=LateLink())
    assert torch.equal(logits(model, inputs), expected)
    slots = {t.untyped_storage().data_ptr() for t in find_state(model).streamer.slots}
    adapters = {n: p.untyped_storage().data_ptr() in slots for n, p in model.named_parameters() if "lora_" in n}
    assert len(adapters) == 8
    assert not any(adapters.values())
    with (
        torch.enable_grad(),
        pytest.raises(ModelError, match=r"layers.0 is offloaded, and its weights"),
    ):
        model(**inputs)
    with pytest.raises(ModelError, match="cannot be trained"):
        model.train()
    before = tiny_llama().state_dict()
    assert restore_weights(model)
    assert all(torch.equal(v, before[k]) for k, v in model.unload().state_dict().items())


READS_AND_WRITES = {
    "read": lambda layer: layer.weight.norm(),
    "compare": lambda layer: torch.equal(layer.weight, layer.weight),
    "print": lambda layer: float(layer.weight[0, 0]),
    "data": lambda layer: layer.weight.data.mul_(2),
    "write": lambda layer: layer.weight.mul_(2),
    "copy": copy.deepcopy,
    "cast": lambda layer: layer.half(),
    "call": lambda layer: layer(torch.ones(1, layer.in_features)),
    "hold": lambda layer: torch.nn.Parameter(layer.weight) + 1,
}


@pytest.mark.parametrize("what", READS_AND_WRITES)
def test_weights_have_no_values_while_their_block_does_not_compute(what):
    model = tiny_llama(num_hidden_layers=4)
    inputs = inputs_for(model)
    expected, shapes = logits(model, inputs), {n: (p.shape, p.dtype, p.device) for n, p in model.named_parameters()}
    place(model, "cpu", link=LateLink())
    logits(model, inputs)
    assert {n: (p.shape, p.dtype, p.device) for n, p in model.named_parameters()} == shapes
    layer = model.model.layers[2].mlp.up_proj
    assert "up_proj.weight: [" in repr(layer.weight)
    with pytest.raises(ModelError, match=r"layers\.2\.mlp\.up_proj\.weight is offloaded, and has values only while"):
        READS_AND_WRITES[what](layer)
    assert torch.equal(logits(model, inputs), expected)
    assert restore_weights(model)
    assert torch.equal(logits(model, inputs), expected)


def test_hooks_of_parts_see_weights():
    model = tiny_llama(num_hidden_layers=4)
    inputs, expected = inputs_for(model), [block.mlp.up_proj.weight.clone() for block in model.model.layers]
    place(model, "cpu", link=LateLink())
    found = []
    for block in model.model.layers:
        block.mlp.up_proj.register_forward_hook(lambda layer, *_: found.append(layer.weight.clone()))
    logits(model, inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def replaced(model):
    layer = model.model.layers[2].mlp.up_proj
    layer.weight = torch.nn.Parameter(torch.ones(layer.weight.shape))


def written_by_a_hook(model):
    layer = model.model.layers[2].mlp.up_proj
    handle = layer.register_forward_hook(lambda *_: (layer.weight.mul_(2), None)[1])
    logits(model, inputs_for(model))
    handle.remove()


@pytest.mark.parametrize("change", [replaced, written_by_a_hook])
@pytest.mark.parametrize("reads", ["forward", "state_dict", "save_pretrained"])
def test_weights_that_are_written_to_are_noticed(change, reads, tmp_path):
    model = tiny_llama(num_hidden_layers=4)
    inputs = inputs_for(model)
    expected = logits(model, inputs)
    place(model, "cpu", link=LateLink())
    logits(model, inputs)
    change(model)
    calls = {
        "forward": lambda: logits(model, inputs),
        "state_dict": model.state_dict,
        "save_pretrained": lambda: model.save_pretrained(tmp_path),
    }
    for _ in range(2):
        with pytest.raises(ModelError, match=r"layers\.2\.mlp\.up_proj\.weight is offloaded and was written to"):
            calls[reads]()
    with pytest.warns(UserWarning, match="has its former values again"):
        restore_weights(model)
    if change is not replaced:
        assert torch.equal(logits(model, inputs), expected)


def test_adapters_cannot_be_merged_while_weights_are_offloaded():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_llama(), config).eval()
    inputs = inputs_for(tiny_llama())
    expected = logits(model, inputs)
    place(model, "cpu", link=LateLink())
    with pytest.raises(ModelError, match=r"q_proj.*is offloaded, and has values only while"):
        model.merge_adapter()
    assert torch.equal(logits(model, inputs), expected)
    assert restore_weights(model)
    model.merge_adapter()
    merged = logits(model, inputs)
    place(model, "cpu", link=LateLink())
    assert torch.equal(logits(model, inputs), merged)


def test_offloaded_in_inference_mode_and_run_outside_of_it():
    model = tiny_llama(num_hidden_layers=4)
    inputs = inputs_for(model)
    with torch.inference_mode():
        expected = logits(model, inputs)
        place(model, "cpu", link=LateLink())
        assert torch.equal(logits(model, inputs), expected)
    assert torch.equal(logits(model, inputs), expected)
    assert restore_weights(model)
    assert torch.equal(logits(model, inputs), expected)


def test_a_forward_that_a_hook_ended_leaves_the_ring_as_it_is():
    model = tiny_llama(num_hidden_layers=5)
    inputs = inputs_for(model)
    expected = logits(model, inputs)
    place(model, "cpu", link=LateLink())
    for error in (ValueError, KeyboardInterrupt):

        def end(*_, error=error):
            raise error

        handle = model.model.layers[2].mlp.register_forward_pre_hook(end)
        with pytest.raises(error):
            logits(model, inputs)
        handle.remove()
        assert torch.equal(logits(model, inputs), expected)


def test_what_an_offloaded_model_refuses():
    model = place(tiny_llama(), "cpu", link=LateLink())
    for call, reason in (
        (lambda: copy.deepcopy(model), "cannot be copied"),
        (lambda: pickle.dumps(model), "cannot be pickled"),
        (lambda: model.half(), "cannot be moved or cast"),
        (lambda: model.load_state_dict(tiny_llama().state_dict()), "cannot be given other weights"),
        (lambda: model.train(), "cannot be trained"),
        (lambda: hf_optim.offload(model), "offloaded already"),
        (lambda: model.model.layers[0].double(), "cannot be moved or cast"),
    ):
        with pytest.raises(ModelError, match=reason):
            call()
    assert model.eval() is model
    assert model.to("cpu") is model


def test_what_cannot_be_offloaded():
    from accelerate import cpu_offload
    from torch import nn

    hooked = tiny_llama()
    cpu_offload(hooked, torch.device("cpu"))
    meta = tiny_llama().to("meta")
    compiled = tiny_llama()
    compiled.model.layers[0] = torch.compile(compiled.model.layers[0], backend="eager")
    for model, to, reason in (
        (tiny_llama(), "cpu", "computes on the CPU, so its weights are in host memory already"),
        (tiny_llama(), "tape", "to='tape': weights are offloaded to one of cpu, disk"),
        (hooked, "disk", "hooks of accelerate move the weights"),
        (meta, "disk", "on the meta device and has no values"),
        (compiled, "disk", "is compiled: offload it first"),
        (tiny_llama().train(), "disk", "in training mode"),
        (nn.Linear(2, 2), "disk", "is not a transformers model"),
        (tiny_llama(num_hidden_layers=1), "disk", "no list of blocks to stream"),
    ):
        with pytest.raises(ModelError, match=reason):
            hf_optim.offload(model, to)
    with pytest.raises(ModelError, match="ahead=0"):
        hf_optim.offload(tiny_llama(), "disk", ahead=0)
    with pytest.raises(ModelError, match="is not offloaded"):
        hf_optim.offload_plan(tiny_llama())


def test_generate_runs_in_transformers_loop():
    model = tiny_llama()
    inputs = inputs_for(model)
    expected = model.generate(**inputs, **GREEDY)
    place(model, "cpu", link=LateLink())
    with pytest.warns(GenerationWarning, match="weights are offloaded, so that a step waits for the link"):
        tokens = hf_optim.generate(model, mode="eager", **inputs, **GREEDY)
    assert torch.equal(tokens, expected)
    assert torch.equal(hf_optim.generate(model, **inputs, **GREEDY), expected)


@pytest.mark.slow
def test_compiled_after_it_was_offloaded():
    model = tiny_llama()
    inputs = inputs_for(model)
    expected = logits(model, inputs)
    place(model, "cpu", link=LateLink())
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        assert torch.equal(logits(compiled, inputs), expected)
    torch.compiler.reset()


def test_two_threads_take_turns():
    from concurrent.futures import ThreadPoolExecutor

    model = tiny_llama(num_hidden_layers=5)
    batches = [inputs_for(model, seed=seed) for seed in range(6)]
    expected = [logits(model, batch) for batch in batches]
    place(model, "cpu", link=LateLink())

    def run(batch):
        with torch.no_grad():
            return logits(model, batch)

    with ThreadPoolExecutor(3) as pool:
        assert all(torch.equal(a, b) for a, b in zip(pool.map(run, batches), expected, strict=True))


def test_a_deleted_model_is_freed_at_once(tmp_path):
    model = tiny_llama()
    hf_optim.offload(model, "disk", folder=tmp_path)
    logits(model, inputs_for(model))
    found = [weakref.ref(model), weakref.ref(find_state(model).streamer)]
    gc.disable()
    try:
        del model
        assert [each() for each in found] == [None, None]
    finally:
        gc.enable()
