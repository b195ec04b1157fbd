"""Halting of tokens against a loop over single tokens, and against itself: whole passes, decoding, other batches."""

from __future__ import annotations

import copy
import json
import math
import pickle

import pytest
import torch
from tiny_models import tiny_bert, tiny_gpt2, tiny_llama, tiny_mixtral, tiny_opt, tiny_vit
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import hf_optim
from hf_optim import ModelError, RecipeError
from hf_optim.toolkit.compat import CACHE

STEPS = 5
IDS = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(0))
DECODERS = [tiny_llama, tiny_gpt2, tiny_opt]
NONE = {"position_signal": "none", "step_signal": "none"}


def universal(model, **fields):
    return hf_optim.optimize(model, [{"technique": "universal_transformer", "steps": STEPS, "scale": 0.5, **fields}])


def act(model, *more, tied=(), spread=1.5, bias=-0.9, **fields):
    """Return the model with tokens that halt after different numbers of steps: logits vary by ``spread``."""
    tied = {"technique": "universal_transformer", "steps": STEPS, "scale": 0.5, **dict(tied)}
    model = hf_optim.optimize(model, [tied, {"technique": "act", **fields}, *more])
    unit, states = unit_of(model), []
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        unit.bias.fill_(bias)
        if spread:
            direction = torch.randn(unit.weight.shape, generator=generator, dtype=torch.float64)
            handle = unit.register_forward_pre_hook(lambda _, args: states.append(args[0]))
            model.base_model(**({"pixel_values": torch.ones(1, 3, 16, 16)} if is_vit(model) else {"input_ids": IDS}))
            handle.remove()
            found = torch.stack(states).double()  # of steps, rows, tokens
            means = found.mean((1, 2))
            direction = direction - torch.linalg.pinv(means) @ (means @ direction)  # so that tokens differ, not steps
            unit.weight.copy_(direction * spread / (found @ direction).std())
    return model


def is_vit(model):
    return model.config.model_type.endswith("vit")


def unit_of(model):
    return next(module.halting_unit for module in model.modules() if "halting_unit" in module._modules)


def passage_of(model):
    return next(vars(module)["passage"] for module in model.modules() if "halting_unit" in module._modules)


def block_of(model):
    return next(module.own_block for module in model.modules() if "own_block" in module._modules)


def signal(length, width, step):
    """Return both signals of the paper for one step, number by number."""
    rows = []
    for i in range(1, length + 1):
        waves = [math.sin if c % 2 == 0 else math.cos for c in range(width)]
        rates = [10000 ** (2 * (c // 2) / width) for c in range(width)]
        rows.append([wave(i / rate) + wave(step / rate) for wave, rate in zip(waves, rates, strict=True)])
    return torch.tensor(rows, dtype=torch.float64)


def oracle(forward, weight, bias, rule, seen):
    """Return what takes the place of one block: all steps with halting, a token at a time."""

    def run(hidden, *args, **kwargs):
        batch, length, width = hidden.shape
        state = [[hidden[b, i] for i in range(length)] for b in range(batch)]
        outputs = [[torch.zeros(width, dtype=torch.float64) for _ in range(length)] for _ in range(batch)]
        sums = [[0.0] * length for _ in range(batch)]
        steps = [[0] * length for _ in range(batch)]
        left = {}
        for n in range(1, STEPS + 1):
            inputs = torch.stack([torch.stack(row) for row in state]) + 0.5 * signal(length, width, n)
            new = forward(inputs, *args, **kwargs)
            new = new[0] if isinstance(new, tuple) else new
            for b in range(batch):
                for i in range(length):
                    runs = (b, i) not in left
                    if runs or rule["halted"] == "recomputed":
                        state[b][i] = new[b, i]
                    if not runs:
                        continue
                    read = new[b, i] if rule["reads"] == "after" else inputs[b, i]
                    p = torch.sigmoid((read * weight).sum() + bias)
                    steps[b][i] += 1
                    if n == STEPS or float(torch.as_tensor(sums[b][i] + p).detach()) >= 1 - 0.01:
                        left[b, i] = p = 1 - sums[b][i]
                    else:
                        sums[b][i] = sums[b][i] + p
                    if rule["mix"] == "graves":
                        outputs[b][i] = outputs[b][i] + p * new[b, i]
                    else:
                        outputs[b][i] = p * new[b, i] + (1 - p) * outputs[b][i]
        seen["steps"] = torch.tensor(steps)
        costs = [steps[b][i] + left[b, i] for b in range(batch) for i in range(length)]
        seen["cost"] = sum(costs) / len(costs)
        return torch.stack([torch.stack(row) for row in outputs])

    return run


@pytest.mark.parametrize(
    "fields",
    [
        {"mix": "graves", "halted": "copied", "reads": "after"},
        {"mix": "t2t", "halted": "recomputed", "reads": "before"},
        {"mix": "t2t", "halted": "copied", "reads": "after"},
    ],
)
@pytest.mark.many
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_bert])
def test_outputs_cost_and_gradients_are_those_of_a_loop_over_tokens(build, whole, fields, monkeypatch):
    model = act(build().double(), **fields)
    passage_of(model).whole = whole
    cached = {} if build is tiny_bert else {"use_cache": False}
    found = model.base_model(IDS, **cached)[0]
    pondered = passage_of(model).pondered

    one = universal(build().double(), steps=1, **NONE)
    unit, block, seen = unit_of(model), block_of(one), {}
    weight, bias = (p.detach().clone().requires_grad_() for p in (unit.weight, unit.bias))
    monkeypatch.setattr(block, "forward", oracle(block.forward, weight, bias, fields, seen))
    expected = one.base_model(IDS, **cached)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    assert torch.equal(pondered.steps, seen["steps"])
    assert len(pondered.steps.unique()) >= 3
    torch.testing.assert_close(pondered.cost, seen["cost"], rtol=0, atol=1e-12)

    (found.square().sum() + pondered.cost).backward()
    (expected.square().sum() + seen["cost"]).backward()
    own = dict(block_of(model).named_parameters())
    pairs = [(own[name].grad, p.grad) for name, p in block.named_parameters()]
    pairs += [(unit.weight.grad, weight.grad), (unit.bias.grad, bias.grad)]
    pairs += [(each.get_input_embeddings().weight.grad for each in (model, one))]
    for mine, other in pairs:
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-9)


@pytest.mark.many
@pytest.mark.parametrize("build", [*DECODERS, tiny_bert, tiny_vit, tiny_mixtral])
def test_a_bias_of_plus_infinity_is_one_step_and_of_minus_infinity_all_of_them(build):
    inputs = {"pixel_values": torch.randn(3, 3, 16, 16)} if build is tiny_vit else {"input_ids": IDS}
    with torch.no_grad():
        for bias, steps in ((math.inf, 1), (-math.inf, STEPS)):
            initial = {"initial": 0} if build is tiny_mixtral else {}
            model = act(build(), tied=initial, spread=0.0, bias=bias)
            fixed = universal(build(), steps=steps, **initial)
            assert torch.equal(model(**inputs).logits, fixed(**inputs).logits)
            pondered = passage_of(model).pondered
            assert (pondered.steps == steps).all()
            assert (pondered.remainder == 1).all()
            assert float(pondered.cost) == steps + 1


def test_the_weights_of_a_token_sum_to_one_also_at_the_last_step_and_the_authors_mixture_does_not():
    model = act(tiny_llama().double())
    code = __import__("sys").modules[type(model).__module__]

    def mixture(probabilities, states, mix, epsilon=0.01):
        rule = code.Rule(len(states), epsilon, mix, "copied", "after", 0.0)
        progress = code.Progress(torch.zeros(1, 1, 1, dtype=torch.float64), None, rule)
        for number, (p, state) in enumerate(zip(probabilities, states, strict=True), 1):
            value = torch.full((1, 1, 1), float(state), dtype=torch.float64)
            progress.advance(torch.full((1, 1), p, dtype=torch.float64), value, number == len(states))
        return float(progress.finish()[0]), progress

    assert mixture([0.3, 0.4, 0.3], [1, 2, 3], "graves")[0] == pytest.approx(2.0)
    assert mixture([0.3, 0.4, 0.3], [1, 2, 3], "t2t")[0] == pytest.approx(1.586)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        p = torch.rand(6, generator=generator).pow(3).tolist()
        assert mixture(p, [1] * 6, "graves")[0] == pytest.approx(1.0, abs=1e-12)
    value, progress = mixture([0.1] * 3, [1] * 3, "graves")
    assert value == pytest.approx(1.0)
    assert float(progress.remainder) == pytest.approx(0.8)
    # A probability that ends exactly at 1 - epsilon is enough.
    assert int(mixture([0.99, 0.5], [1, 1], "graves")[1].steps) == 1


TIED = [{}, {"step_signal": "none"}, {**NONE, "groups": 2}, {**NONE, "groups": 2, "order": "cycle"}]


@pytest.mark.many
@pytest.mark.parametrize("tied", TIED)
@pytest.mark.parametrize("build", DECODERS)
def test_decoding_token_by_token_gives_what_one_pass_gives(build, tied):
    model = act(build().double(), tied=tied)
    with torch.no_grad():
        whole = model(IDS, use_cache=False)
        steps = passage_of(model).pondered.steps
        assert len(steps.unique()) >= 3
        passage_of(model).whole = True
        torch.testing.assert_close(model(IDS).logits, whole.logits, rtol=0, atol=1e-11)
        passage_of(model).whole = False
        for parts in ([1] * 9, [4, 3, 2], [8, 1]):
            cache, logits, taken = None, [], []
            for ids in IDS.split(parts, dim=1):
                output = model(ids, use_cache=True, **{CACHE: cache})
                cache = output[CACHE]
                logits.append(output.logits)
                taken.append(passage_of(model).pondered.steps)
            torch.testing.assert_close(torch.cat(logits, 1), whole.logits, rtol=0, atol=1e-11)
            assert torch.equal(torch.cat(taken, 1), steps)
            assert {layer.get_seq_length() for layer in cache.layers} == {9}
            assert len(cache.layers) == STEPS


@pytest.mark.many
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("build", [tiny_llama, tiny_opt, tiny_bert])
def test_rows_do_not_depend_on_each_other_and_padding_never_ponders(build, side):
    model = act(build().double())
    mask = torch.ones_like(IDS)
    lengths = [9, 6, 2]
    spans = [slice(9 - n, None) if side == "left" else slice(None, n) for n in lengths]
    for row, span in enumerate(spans):
        mask[row] = 0
        mask[row, span] = 1
    more = {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    with torch.no_grad():
        found = model.base_model(IDS, attention_mask=mask, **more)[0]
        pondered = passage_of(model).pondered
        assert (pondered.steps[mask == 0] == 0).all()
        costs = []
        for row, span in enumerate(spans):
            alone = model.base_model(IDS[row : row + 1, span])[0]
            torch.testing.assert_close(found[row : row + 1, span], alone, rtol=0, atol=1e-11)
            own = passage_of(model).pondered
            assert torch.equal(pondered.steps[row : row + 1, span], own.steps)
            costs.append(float(own.cost) * lengths[row])
        assert float(pondered.cost) == pytest.approx(sum(costs) / sum(lengths))
        passage_of(model).whole = True
        whole = model.base_model(IDS, attention_mask=mask, **more)[0]
        torch.testing.assert_close(whole[mask == 1], found[mask == 1], rtol=0, atol=1e-11)


def test_a_batch_of_padding_alone_costs_nothing():
    model = act(tiny_llama())
    with torch.no_grad():
        model(IDS, attention_mask=torch.zeros_like(IDS))
    assert float(passage_of(model).pondered.cost) == 0


@pytest.mark.many
@pytest.mark.parametrize("build", DECODERS)
@pytest.mark.parametrize("fields", [{}, {"halted": "recomputed"}])
def test_stock_generate_takes_its_cache(build, fields):
    model = act(build().double(), **fields)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0
    about = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        whole = model.generate(IDS, attention_mask=mask, use_cache=False, **about)
        for more in ({}, {"cache_implementation": "static"}):
            cached = model.generate(IDS, attention_mask=mask, **about, **more)
            torch.testing.assert_close(torch.stack(cached.logits), torch.stack(whole.logits), rtol=0, atol=1e-10)
        beams = [model.generate(IDS, num_beams=3, use_cache=use, max_new_tokens=4) for use in (True, False)]
        assert torch.equal(*beams)
        if not fields:
            alone = model.generate(IDS[1:2, 4:], **about)
            torch.testing.assert_close(torch.stack(whole.logits)[:, 1:2], torch.stack(alone.logits), rtol=0, atol=1e-10)


def test_no_token_sees_a_later_one():
    model = act(tiny_llama().double())
    other = IDS.clone()
    other[:, 5:] = (other[:, 5:] + 1) % 60
    with torch.no_grad():
        before, after = model(IDS).logits, model(other).logits
    torch.testing.assert_close(before[:, :5], after[:, :5], rtol=0, atol=1e-12)
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_a_mask_of_pairs_is_gathered_with_its_queries():
    model = act(tiny_llama().double())
    pairs = torch.ones(3, 1, 9, 9, dtype=torch.bool).tril()
    pairs[1, :, :, 2] = False
    pairs[1, :, 2, 2] = True
    with torch.no_grad():
        found = model(IDS, attention_mask=pairs).logits
        passage_of(model).whole = True
        torch.testing.assert_close(model(IDS, attention_mask=pairs).logits, found, rtol=0, atol=1e-11)


@pytest.mark.parametrize("tied", [{}, {"step_signal": "none"}])
def test_halted_tokens_are_in_no_feed_forward_layer_and_the_steps_end_with_the_last_of_them(tied):
    model = act(tiny_llama(), tied=tied)
    rows, keys = [], []
    block = block_of(model)
    handles = [
        block.mlp.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[:2])),
        block.self_attn.k_proj.register_forward_pre_hook(lambda _, args: keys.append(args[0].shape[:2].numel())),
    ]
    with torch.no_grad():
        model(IDS, use_cache=False)
        steps = passage_of(model).pondered.steps
        assert len(rows) == steps.max() < STEPS + 1
        for number, (batch, width) in enumerate(rows):
            runs = steps > number
            assert batch == runs.any(1).sum()
            assert width == runs.sum(1).max()
        rows.clear(), keys.clear()
        model(IDS[:1], use_cache=False)
        steps = passage_of(model).pondered.steps
        assert sum(batch * width for batch, width in rows) == steps.sum()
        running = [int((steps > number).sum()) for number in range(int(steps.max()))]
        halted = [steps.numel() - count for count in running]
        if tied:  # the keys of a halted token are computed once
            halted = [b - a for a, b in zip([0, *halted], halted, strict=False)]
        assert sum(keys) == sum(running) + sum(halted)
    for handle in handles:
        handle.remove()


def operations(model):
    """How many operations on tensors a forward has, without those that only view them: what a GPU would launch."""
    counted = Counted()
    with torch.no_grad():
        model(IDS, use_cache=False)
        with counted:
            model(IDS, use_cache=False)
    return counted.count


class Counted(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view and func is not torch.ops.aten._unsafe_view.default
        return func(*args, **kwargs or {})


def test_halting_adds_fewer_operations_to_a_step_than_its_block_has():
    own = {steps: operations(universal(tiny_llama(), steps=steps)) for steps in (STEPS - 1, STEPS)}
    block = own[STEPS] - own[STEPS - 1]
    running = act(tiny_llama(), spread=0, bias=-20.0)  # no token halts before the last step
    added = (operations(running) - own[STEPS]) / STEPS
    assert 0 < added <= 30 < block
    halted = act(tiny_llama())  # in all steps but the first some have
    more = (operations(halted) - operations(running)) / (STEPS - 1)
    assert passage_of(halted).pondered.steps.unique().numel() > 2
    assert added < more <= 90


def test_with_a_cache_later_steps_get_the_keys_of_halted_tokens():
    model = act(tiny_llama().double(), bias=60.0, spread=0.0)
    with torch.no_grad():
        cache = model(IDS, use_cache=True)[CACHE]
        assert (passage_of(model).pondered.steps == 1).all()
        unit_of(model).bias.fill_(-60.0)
        late = model(IDS[:, :1], use_cache=True, **{CACHE: cache}).logits
        # The same by one pass in which the first nine tokens halt at once, and the last one never does.
        unit_of(model).bias.fill_(0.0)
        code = __import__("sys").modules[type(model).__module__]
        chosen = torch.tensor([1.0] * 9 + [0.0], dtype=torch.float64)
        original = code.HaltingUnit.probability
        code.HaltingUnit.probability = lambda self, state: chosen.expand(3, 10)
        try:
            expected = model(torch.cat([IDS, IDS[:, :1]], 1), use_cache=False).logits[:, -1:]
        finally:
            code.HaltingUnit.probability = original
    torch.testing.assert_close(late, expected, rtol=0, atol=1e-11)


# -- training ---------------------------------------------------------------------------------------------------------
def test_the_cost_of_pondering_is_a_part_of_the_loss_in_training_alone():
    plain, costly = (act(tiny_llama().double(), ponder_cost=cost) for cost in (0.0, 0.5))
    for each in (plain, costly):
        each.train()
    losses = [each(IDS, labels=IDS).loss for each in (plain, costly)]
    cost = passage_of(costly).pondered.cost
    cost = cost.to(losses[0])  # the loss of the stock classes is float32
    torch.testing.assert_close(losses[1], losses[0] + 0.5 * cost)
    losses[1].backward()
    assert unit_of(costly).bias.grad.abs() > 0
    pair = costly(IDS, labels=IDS, return_dict=False)
    torch.testing.assert_close(pair[0], losses[1])
    items = 4 * IDS[:, 1:].numel()  # of an optimizer step of four such batches
    part = [each(IDS, labels=IDS, num_items_in_batch=torch.tensor(items)).loss for each in (plain, costly)]
    torch.testing.assert_close(part[1] - part[0], 0.5 * cost / 4)
    costly.eval()
    plain.eval()
    with torch.no_grad():
        assert torch.equal(costly(IDS, labels=IDS).loss, plain(IDS, labels=IDS).loss)


def train(model, folder, steps=20, **arguments):
    rows = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]
    args = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=2e-2, report_to=[], use_cpu=True,
        save_strategy="no", logging_strategy="no", disable_tqdm=True, **arguments,
    )  # fmt: skip
    Trainer(model=model, args=args, train_dataset=rows, callbacks=hf_optim.callbacks(model)).train()
    return hf_optim.run_of(model).model.eval()


@pytest.mark.slow
def test_a_stock_trainer_learns_to_halt_earlier_where_pondering_costs_more(tmp_path):
    taken = []
    for cost in (0.0, 3.0):
        model = act(tiny_llama(), spread=0.0, bias=-1.0, ponder_cost=cost)
        train(model, tmp_path)
        with torch.no_grad():
            model(IDS)
        taken.append(float(passage_of(model).pondered.steps.double().mean()))
    assert taken[1] < taken[0] - 0.3


def test_the_record_and_the_card_have_the_steps_of_the_last_epoch(tmp_path):
    stage = [{"technique": "universal_transformer", "steps": STEPS}, {"technique": "act"}, {"technique": "logit_kd"}]
    model = hf_optim.optimize(tiny_llama(), stage)
    counted = []

    def count(module, args, output):
        counted.append(passage_of(module).pondered.steps.flatten())

    handle = model.register_forward_hook(count)
    rows = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]
    args = TrainingArguments(
        str(tmp_path / "training"), num_train_epochs=2, per_device_train_batch_size=4, report_to=[], use_cpu=True,
        save_strategy="no", logging_strategy="no", disable_tqdm=True, learning_rate=1e-2, eval_strategy="epoch",
        per_device_eval_batch_size=4,
    )  # fmt: skip
    hf_optim.OptimTrainer(model=model, args=args, train_dataset=rows, eval_dataset=rows[:4]).train()
    handle.remove()
    assert len(counted) == 8  # in each epoch, three batches of training and one of evaluation
    last = torch.cat(counted[4:7])
    run = hf_optim.run_of(model)
    figures = run.reported(run.recipe.steps[1])
    assert figures["tokens_by_steps"] == [int((last == n).sum()) for n in range(1, STEPS + 1)]
    assert figures["tokens"] == len(last) == 12 * 9
    assert figures["mean_steps"] == pytest.approx(float(last.double().mean()), abs=1e-5)
    assert passage_of(model).tally is None
    model.eval().save_pretrained(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"a token took {figures['mean_steps']:.2f} steps on average, over 108 tokens" in card
    assert "Tokens by steps" in card


# -- checkpoints ------------------------------------------------------------------------------------------------------
PLAIN = """
import torch
from transformers import AutoModelForCausalLM

loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, attn_implementation="eager")
ids, mask = torch.tensor(ids), torch.tensor(mask)
for tensor in (*loaded.parameters(), *loaded.buffers()):
    tensor.data = tensor.data.clone()  # those of a mapped file may be unaligned, and sums round differently
with torch.no_grad():
    torch.save(loaded(ids, attention_mask=mask).logits, folder + "/logits.pt")
steps = loaded.pondered.steps.tolist()
result = [steps, loaded.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False).tolist()]
"""


@pytest.mark.many
@pytest.mark.parametrize("more", [(), ({"technique": "rtn", "bits": 8},)])
def test_plain_transformers_halts_the_same(more, tmp_path, stock_python):
    model = act(tiny_llama(), *more, tied={"step_signal": "learned"})
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0
    with torch.no_grad():
        logits = model(IDS, attention_mask=mask).logits
    steps = passage_of(model).pondered.steps.tolist()
    expected = model.generate(IDS, attention_mask=mask, max_new_tokens=6, do_sample=False)
    model.save_pretrained(tmp_path)
    given = {"folder": str(tmp_path), "ids": IDS.tolist(), "mask": mask.tolist()}
    done = stock_python.copy("".join(f"{key} = {value!r}\n" for key, value in given.items()) + PLAIN)
    assert done.status == 0, done.err
    assert done.result == [steps, expected.tolist()]
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits)


def test_a_loaded_universal_transformer_can_be_given_halting(tmp_path):
    tied = universal(tiny_llama(), step_signal="learned")
    with torch.no_grad():
        tied.model.layers[0].own_signals.step.normal_()
        expected = tied(IDS).logits
    tied.save_pretrained(tmp_path)
    hf_optim.remote_code.register("universal_transformer_llama")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, optim_config=[{"technique": "act"}])
    with torch.no_grad():
        unit_of(model).bias.fill_(-math.inf)
        assert torch.equal(model(IDS).logits, expected)
    assert type(model).__name__ == "ActLlamaForCausalLM"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epsilon": 0.9}, "epsilon is a number from 0 to 0.5"),
        ({"mix": "mean"}, "mix is graves or t2t"),
        ({"bias": "high"}, "bias is a number"),
        ({"ponder_cost": -1}, "ponder_cost"),
        ({"tied": None}, "no settings of tied blocks"),
        ({"ponder": 1}, "settings that are not known: ['ponder']".replace("[", r"\[").replace("]", r"\]")),
    ],
)
def test_a_damaged_configuration_does_not_load(change, message, tmp_path):
    act(tiny_llama()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["act"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)


def test_a_configuration_without_the_settings_does_not_load(tmp_path):
    act(tiny_llama()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["act"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.act is missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)


def test_a_copy_and_a_pickle_are_the_model_also_in_training():
    model = act(tiny_llama()).train()
    with torch.no_grad():
        expected = model(IDS).logits
    assert model(IDS, labels=IDS).loss.requires_grad
    assert model.pondered.cost.requires_grad
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            assert torch.equal(other(IDS).logits, expected)
        assert passage_of(other) is not passage_of(model)
        assert all(step.passage is passage_of(other) for step in other.model.layers)


# -- refusals ---------------------------------------------------------------------------------------------------------
def test_a_stack_of_different_blocks_is_refused():
    with pytest.raises(RecipeError, match="needs a model that applies shared blocks in steps: add universal_trans"):
        hf_optim.optimize(tiny_llama(), [{"technique": "act"}])
    with pytest.raises(ModelError, match="without convert_to"):
        act(tiny_bert(), tied={**NONE, "convert_to": "albert"})


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_states_and_weights_of_single_steps_are_refused(name):
    model = act(tiny_llama())
    for call in (model, model.base_model):
        with pytest.raises(ValueError, match=f"leave {name} out"):
            call(IDS, **{name: True})


@pytest.mark.parametrize("fields", [{"epsilon": 0.6}, {"mix": "sum"}, {"halted": "dropped"}, {"ponder_cost": -0.1}])
def test_fields_that_do_not_fit_are_refused(fields):
    with pytest.raises(RecipeError):
        act(tiny_llama(), **fields)
