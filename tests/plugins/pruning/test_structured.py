"""Structured pruning: zero units are removed without effect, scores by their formulas, one stage with a teacher."""

from __future__ import annotations

import copy
import math
import time

import pytest
import torch
from exported import exported
from real_stories import mean_loss, windows
from tiny_models import TINY, tiny_bert, tiny_gpt2, tiny_llama, tiny_mixtral, tiny_t5
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TrainingArguments

import hf_optim
from hf_optim import ModelError, OptimConfig, RecipeError, run_of
from hf_optim.recipes.traits import SPARSE
from hf_optim.testing.tiny_runs import inputs_for, training_examples
from hf_optim.testing.trait_checks import holds
from hf_optim.toolkit import topology
from hf_optim.toolkit.topology.prunable_groups import HEADS, coupled_layers, find_prunable_groups

PRE_NORM = ("llama", "qwen2", "gpt2", "opt", "vit", "t5", "mixtral")
WITH_HEADS = ("llama", "qwen2", "mixtral", "t5", "vit")


def prune(model, calibration=None, **fields):
    return hf_optim.optimize(model, {"technique": "structured", **fields}, calibration=calibration)


def exact(family):
    model = TINY[family]().double()
    model.config._experts_implementation = "eager"  # the fused kernels know no float64
    return model


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def batches(model, count=2):
    return [inputs_for(model, seed=seed) for seed in range(count)]


def figures(model):
    return run_of(model).record.steps["0"]


@torch.no_grad()
def silence(model, units, count):
    """Zero all weights of the last ``count`` units of each layer, which then have the smallest value of any score."""
    for one in units:
        for name, (dim, entries) in one.entries.items():
            model.get_parameter(name).index_fill_(dim, entries[len(one) - count :].flatten(), 0.0)


@pytest.mark.many
@pytest.mark.parametrize("score", ["magnitude", "activation"])
@pytest.mark.parametrize("family", TINY)
def test_removing_units_that_are_zero_changes_nothing(family, score):
    model = exact(family)
    units = find_prunable_groups(topology.trace(model))
    wanted = {"heads": 1} if family in WITH_HEADS else {}
    wanted["neurons"] = 0 if family == "mixtral" else 16
    silence(model, [one for one in units if one.kind == HEADS and wanted.get("heads")], 1)
    silence(model, [one for one in units if one.kind != HEADS], 16)
    inputs, data, size = inputs_for(model, seed=9), batches(model), model.num_parameters()
    expected = logits(model, inputs)
    model = prune(model, None if score == "magnitude" else data, score=score, **wanted)
    assert torch.allclose(logits(model, inputs), expected, rtol=0, atol=1e-13 * float(expected.abs().max()))
    assert figures(model)["parameters_before"] == size
    assert figures(model)["parameters_after"] == model.num_parameters() < size


@pytest.mark.parametrize("family", PRE_NORM)
def test_removing_a_layer_that_adds_nothing_changes_nothing(family):
    model = exact(family)
    idle = topology.blocks(model)[1]
    with torch.no_grad():
        for name, parameter in idle.module.named_parameters():
            if not name.endswith("norm.weight"):
                parameter.zero_()
    inputs = inputs_for(model, seed=9)
    expected = logits(model, inputs)
    stay = {"skip": ("decoder.*",)} if family == "t5" else {}  # of the encoder alone
    model = prune(model, batches(model), layers=1, neurons=0, **stay)
    assert torch.allclose(logits(model, inputs), expected, rtol=0, atol=1e-13 * float(expected.abs().max()))
    assert figures(model)["removed_layers"] == [idle.name]
    assert figures(model)["layers"] == {idle.list_name: [2, 1]}


@pytest.mark.many
@pytest.mark.parametrize("family", TINY)
def test_the_configuration_agrees_and_a_stock_reload_is_equal(family, tmp_path):
    model = TINY[family]()
    fields = {"layers": 1, "neurons": 0 if family == "mixtral" else 0.5, "heads": 0.5 if family in WITH_HEADS else 0}
    model = prune(model, batches(model), **fields)
    inputs = inputs_for(model, seed=9)
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert type(again).__module__.startswith("transformers.models")
    assert torch.equal(logits(again, inputs), expected)
    fresh = type(model)(model.config)
    assert {n: p.shape for n, p in fresh.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    for name, layer in topology.linears(model).items():
        assert topology.features(layer) == topology.features(fresh.get_submodule(name))
    card = (tmp_path / "README.md").read_text()
    assert f"| parameters | {figures(model)['parameters_before']:,} | {model.num_parameters():,} |" in card


def test_the_card_has_what_was_removed_kind_by_kind():
    source = tiny_llama(num_hidden_layers=3)
    size = source.num_parameters()
    model = prune(source, batches(source), heads=1, neurons=0.5, layers=1)
    sections = exported(model)
    (text,) = sections.paragraphs.values()
    now = model.num_parameters()
    assert f"{size:,} parameters became {now:,} ({100 * (size - now) / size:.1f} % fewer)" in text
    (removed,) = figures(model)["removed_layers"]
    assert text.endswith(f" Removed layers: {removed}.")
    config = model.config
    ((header, *rows),) = sections.tables.values()
    assert header == ["", "before", "after"]
    assert rows == [
        ["parameters", f"{size:,}", f"{now:,}"],
        ["heads in a layer", "2", str(config.num_key_value_heads)],
        ["neurons in a layer", "48", str(config.intermediate_size)],
        ["layers of `model.layers`", "3", str(config.num_hidden_layers)],
    ]
    assert (config.num_key_value_heads, config.intermediate_size, config.num_hidden_layers) == (1, 24, 2)


def test_widths_follow_the_fields():
    config = prune(tiny_llama(), heads=0.5, neurons=16, score="magnitude").config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 1, 8)
    assert config.intermediate_size == 32
    assert prune(tiny_llama(), neurons=0.25, score="magnitude").config.intermediate_size == 40  # 36, in steps of 8
    assert prune(tiny_llama(), neurons=0.25, round_to=1, score="magnitude").config.intermediate_size == 36
    config = prune(tiny_t5(num_layers=4, num_decoder_layers=3), layers=0.5, neurons=0, score="magnitude").config
    assert (config.num_layers, config.num_decoder_layers) == (2, 1)
    assert prune(tiny_t5(), heads=1, neurons=0, score="magnitude").config.num_heads == 3


# -- scores -------------------------------------------------------------------------------------------------------
def observed(model, data, names):
    """Name -> inputs of linears [batch, token, in] in float64, batch by batch."""
    found = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda m, args, name=name: found[name].append(args[0].double())
        )
        for name in names
    ]
    with torch.no_grad():
        for batch in data:
            model(**batch)
    for handle in handles:
        handle.remove()
    return found


def kept_of(model, dense, reader):
    """Return the kept units, by comparing columns of a consumer with those of the dense model."""
    now, before = model.get_submodule(reader).weight, dense.get_submodule(reader).weight
    return [index for index, column in enumerate(before.T) if any(torch.equal(column, other) for other in now.T)]


@pytest.mark.parametrize("kind", ["neurons", "heads"])
def test_activation_is_the_squared_norm_of_a_units_contribution(kind):
    dense, data = tiny_llama(), batches(tiny_llama(), 3)
    units = [one for one in find_prunable_groups(topology.trace(dense)) if one.kind == kind]
    inputs = observed(dense, data, [one.consumer for one in units])
    model = prune(tiny_llama(), data, **{"neurons": 0, kind: 0.5}, round_to=1)
    for one in units:
        weight = dense.get_submodule(one.consumer).weight.double()
        score = torch.stack(
            [
                sum((x[..., part] @ weight[:, part].T).square().sum() for x in inputs[one.consumer])
                for part in one.columns
            ]
        )
        best = score.topk(len(one) // 2).indices.sort().values
        assert kept_of(model, dense, one.consumer) == one.columns[best].flatten().sort().values.tolist()


@pytest.mark.parametrize(("family", "kind"), [("llama", "neurons"), ("llama", "heads"), ("bert", "neurons")])
def test_taylor_is_the_gradient_of_a_gate_sample_by_sample(family, kind):
    dense, data = exact(family), batches(TINY[family](), 3)
    units = [one for one in find_prunable_groups(topology.trace(dense)) if one.kind == kind]
    scores = {one.consumer: torch.zeros(len(one), dtype=torch.float64) for one in units}
    for row in (row for batch in data for row in batch["input_ids"].split(1)):
        labels = row if family == "llama" else logits(dense, {"input_ids": row}).argmax(-1)
        held = {}

        def hold(module, args, held=held):
            args[0].retain_grad()
            held[module] = args[0]

        readers = {one.consumer: dense.get_submodule(one.consumer) for one in units}
        handles = [reader.register_forward_pre_hook(hold) for reader in readers.values()]
        dense(input_ids=row, labels=labels).loss.backward()
        for handle in handles:
            handle.remove()
        for one in units:
            product = (held[readers[one.consumer]] * held[readers[one.consumer]].grad).sum((0, 1))
            scores[one.consumer] += product[one.columns].sum(1).abs()
    model = prune(exact(family), data, **{"neurons": 0, kind: 0.5}, score="taylor", round_to=1)
    for one in units:
        best = scores[one.consumer].topk(len(one) // 2).indices.sort().values
        assert kept_of(model, dense, one.consumer) == one.columns[best].flatten().sort().values.tolist()


def test_layers_are_ranked_by_block_influence_or_the_gradient_of_their_gates():
    dense, data = tiny_llama(num_hidden_layers=4), batches(tiny_llama(), 3)
    influence, gates = torch.zeros(4), torch.zeros(4, dtype=torch.float64)
    for batch in data:
        with torch.no_grad():
            hidden = []
            for layer in dense.model.layers:
                layer.register_forward_hook(lambda m, args, out, h=hidden: h.append((args[0], out)))
            dense(**batch)
        influence += torch.stack([1 - torch.cosine_similarity(a, b, dim=-1).mean() for a, b in hidden[:4]])
        for layer in dense.model.layers:
            layer._forward_hooks.clear()
    step = 1e-4
    exact = tiny_llama(num_hidden_layers=4).double()
    for row in (row for batch in data for row in batch["input_ids"].split(1)):
        for index, layer in enumerate(exact.model.layers):
            losses = []
            for gate in (1 + step, 1 - step):
                hook = layer.register_forward_hook(lambda m, args, out, g=gate: args[0] + g * (out - args[0]))
                with torch.no_grad():
                    losses.append(float(exact(input_ids=row, labels=row).loss))
                hook.remove()
            gates[index] += abs(losses[0] - losses[1]) / (2 * step)
    for score, expected in (("activation", influence), ("taylor", gates)):
        model = prune(tiny_llama(num_hidden_layers=4), data, layers=1, neurons=0, score=score)
        assert figures(model)["removed_layers"] == [f"model.layers.{int(expected.argmin())}"]


def test_only_the_requested_kinds_are_removed():
    model = prune(tiny_llama(num_hidden_layers=3), layers=1, score="magnitude")
    assert (model.config.num_hidden_layers, model.config.intermediate_size) == (2, 48)
    assert figures(model)["ranked_by"] == {"layers": "magnitude"}
    assert figures(model)["widths"] == {}


def test_by_default_layers_are_ranked_by_taylor_and_units_by_activation(tmp_path):
    """On a model where the two disagree about layers."""
    data = batches(tiny_llama(), 3)

    def pruned(**fields):
        return prune(tiny_llama(num_hidden_layers=4), data, round_to=1, **fields)

    def gone(model):
        return figures(model)["removed_layers"]

    first, by_taylor = pruned(layers=1, score="activation"), pruned(layers=1, score="taylor")
    assert gone(first) != gone(by_taylor)
    both = pruned(layers=1, neurons=0.5)
    assert gone(both) == gone(by_taylor)
    assert figures(both)["ranked_by"] == {"neurons": "activation", "layers": "taylor"}
    narrow = pruned(neurons=0.5)
    left = [index for index in range(4) if f"model.layers.{index}" not in gone(both)]
    for now, index in enumerate(left):
        weight = narrow.model.layers[index].mlp.down_proj.weight
        assert torch.equal(both.model.layers[now].mlp.down_proj.weight, weight)
    both.save_pretrained(tmp_path)
    assert "(neurons by activation, layers by taylor)" in (tmp_path / "README.md").read_text()


def test_layers_of_a_model_without_a_loss_are_ranked_by_activation(caplog):
    model = prune(tiny_bert(num_labels=1), batches(tiny_bert()), layers=1)
    assert figures(model)["ranked_by"] == {"layers": "activation"}
    assert "step 1 (structured): layers are ranked by activation" in caplog.text


@pytest.mark.parametrize("family", ["bert", "vit", "t5"])
def test_without_labels_a_model_is_ranked_by_its_own_predictions(family):
    model = TINY[family]()
    model = prune(model, batches(model), score="taylor", layers=1, neurons=0.5)
    assert len(figures(model)["removed_layers"]) == len(figures(model)["layers"])
    with pytest.raises(ModelError, match="predicts no classes"):
        prune(tiny_bert(num_labels=1), batches(tiny_bert()), score="taylor", neurons=0.25)


# -- with others --------------------------------------------------------------------------------------------------
def test_masks_of_an_earlier_step_are_sliced():
    steps = [{"technique": "magnitude", "sparsity": 0.5}, {"technique": "structured", "layers": 1, "heads": 1}]
    model = hf_optim.optimize(tiny_llama(num_hidden_layers=3), steps, calibration=batches(tiny_llama()))
    run = run_of(model)
    weights = {f"{name}.weight" for name in topology.linears(model) if "lm_head" not in name}
    assert run.masks.keys() == weights
    for name, mask in run.masks.items():
        weight = model.get_parameter(name)
        assert mask.shape == weight.shape
        assert torch.equal(weight != 0, mask)
    assert holds(SPARSE, run)


def test_a_pattern_along_the_inputs_survives_only_where_columns_stay():
    nm = {"technique": "nm"}
    with pytest.raises(RecipeError, match="would destroy sparse-nm"):
        OptimConfig.parse([nm, {"technique": "structured", "neurons": 0.25}]).check()
    model = hf_optim.optimize(
        tiny_llama(), [nm, {"technique": "structured", "neurons": 0, "layers": 1, "score": "magnitude"}]
    )
    assert all(name.startswith("model.layers.0.") for name in run_of(model).nm_patterns)
    assert all(holds(trait, run_of(model)) for trait in run_of(model).traits)


def test_a_later_blockwise_step_sees_the_remaining_layers():
    steps = [{"technique": "structured", "layers": 1}, {"technique": "nm", "score": "activation"}]
    model = tiny_llama(num_hidden_layers=3)
    model = hf_optim.optimize(model, {"steps": steps, "driver": "blockwise"}, calibration=batches(model))
    run = run_of(model)
    assert len(run.nm_patterns) == 2 * 7
    assert all(holds(trait, run) for trait in run.traits)


def test_it_recovers_in_one_stage_with_the_original_model_as_teacher(tmp_path):
    steps = [{"technique": "structured", "layers": 1, "heads": 1}, {"technique": "logit_kd"}]
    model = hf_optim.optimize(tiny_llama(), steps, calibration=batches(tiny_llama()))
    run = run_of(model)
    assert len(run.stages) == 1
    assert run.stage is not None
    teacher = run.state(run.recipe.steps[1]).teacher
    inputs = inputs_for(model, seed=9)
    assert torch.equal(logits(teacher, inputs), logits(tiny_llama(), inputs))
    assert (len(teacher.model.layers), len(model.model.layers)) == (2, 1)
    before = model.lm_head.weight.detach().clone()
    args = TrainingArguments(
        str(tmp_path),
        max_steps=3,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        learning_rate=1e-3,
    )
    trainer = hf_optim.OptimTrainer(model=model, args=args, train_dataset=training_examples(model))
    trainer.train()
    assert run.finished
    assert not torch.equal(model.lm_head.weight, before)
    model.eval().save_pretrained(tmp_path / "out")
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "out"), inputs), logits(model, inputs))


# -- refusals -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["gpt2", "opt", "bert"])
def test_heads_whose_width_is_derived_are_refused(family):
    model = TINY[family]()
    expected = logits(model, inputs_for(model))
    with pytest.raises(ModelError, match=r"step 1 \(structured\).*no configuration.*leave heads at 0"):
        prune(model, heads=1, score="magnitude")
    assert torch.equal(logits(model, inputs_for(model)), expected)


@pytest.mark.parametrize(
    ("build", "fields", "message"),
    [
        (tiny_mixtral, {"neurons": 0.25}, "its feed-forward layers are experts"),
        (tiny_llama, {"neurons": 48}, r"48 of 48 neurons \(a multiple of 8 stays\)"),
        (tiny_llama, {"neurons": 0.01}, "at least one must go"),
        (tiny_llama, {"heads": 2}, "2 of 2 heads"),
        (tiny_llama, {"layers": 2}, "2 of 2 layers of model.layers cannot be removed"),
        (lambda: tiny_gpt2(scale_attn_by_inverse_layer_idx=True), {"layers": 1, "neurons": 0}, "would change at index"),
    ],
)
def test_impossible_removals_are_refused(build, fields, message):
    with pytest.raises(ModelError, match=message):
        prune(build(), score="magnitude", **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"neurons": 1.0}, r"neurons is a share in \[0, 1\) or a whole number"),
        ({}, "set what to remove: heads, neurons or layers"),
        ({"neurons": 0, "score": "magnitude"}, "set what to remove"),
        ({"neurons": 0.25, "skip": ["x"]}, "no layers are removed"),
        ({"layers": -1}, "layers must be >= 0"),
    ],
)
def test_contradictory_fields_are_refused(fields, message):
    with pytest.raises(RecipeError, match=message):
        OptimConfig.parse([{"technique": "structured", **fields}])


def test_skipped_layers_are_kept():
    model = prune(tiny_llama(num_hidden_layers=3), layers=2, neurons=0, score="magnitude", skip=("model.layers.1",))
    assert figures(model)["removed_layers"] == ["model.layers.0", "model.layers.2"]


def test_shared_position_biases_lose_the_same_heads_in_every_layer():
    dense = tiny_t5()
    model = prune(tiny_t5(), batches(dense), heads=2, neurons=0)
    for together in coupled_layers([one for one in find_prunable_groups(topology.trace(dense)) if one.kind == HEADS]):
        assert len({tuple(kept_of(model, dense, one.consumer)) for one in together}) == 1


# -- effect --------------------------------------------------------------------------------------------------------
def fastest(models, inputs, rounds=9):
    """Return the CPU seconds of one forward of each model: the minimum of several, interleaved against load."""
    best = [math.inf] * len(models)
    with torch.no_grad():
        for _ in range(rounds):
            for place, model in enumerate(models):
                started = time.process_time()
                model(**inputs)
                best[place] = min(best[place], time.process_time() - started)
    return best


@pytest.mark.slow
def test_the_gain_in_time_is_the_ratio_of_the_operations():
    """512 tokens through four layers of width 512: half of 4096 neurons, half of the heads, half of the layers."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=512, intermediate_size=4096, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4,
    )  # fmt: skip
    inputs = {"input_ids": torch.randint(3, 60, (1, 512), generator=torch.Generator().manual_seed(0))}

    def operations(model):
        c = model.config
        heads = c.num_attention_heads * c.head_dim
        attention = 2 * heads * c.hidden_size + 2 * c.num_key_value_heads * c.head_dim * c.hidden_size + 2 * 512 * heads
        return c.num_hidden_layers * (attention + 3 * c.hidden_size * c.intermediate_size) + 64 * c.hidden_size

    for fields in ({"neurons": 0.5}, {"neurons": 0.5, "heads": 0.5}, {"neurons": 0, "layers": 0.5}):
        dense = LlamaForCausalLM(copy.deepcopy(config)).eval()
        small = prune(copy.deepcopy(dense), score="magnitude", **fields)
        before, after = fastest([dense, small], inputs)
        ratio = (before / after) / (operations(dense) / operations(small))
        assert 0.8 < ratio < 1.2, (fields, ratio)


@pytest.mark.real_model
def test_scores_from_data_beat_magnitude_on_a_real_model(shared_models, shared_data, monkeypatch):
    """babyllama-1m. With more data, a quarter of the neurons: activation 3.05, magnitude 4.01, random 4.10 to 4.68;
    one of five layers: taylor 5.28, magnitude 32.2 (dense: 2.26)."""
    home = shared_models / "babyllama-1m"
    calibration = windows(home, shared_data, "calibration", 16, 128)
    held_out = windows(home, shared_data, "eval", 24, 128)

    def perplexity(**fields):
        model = prune(AutoModelForCausalLM.from_pretrained(home), calibration, **fields)
        return model.num_parameters(), math.exp(mean_loss(model, held_out))

    size, activation = perplexity(neurons=0.25)
    other, magnitude = perplexity(neurons=0.25, score="magnitude")
    assert size == other
    assert magnitude > 1.2 * activation
    size, taylor = perplexity(neurons=0, layers=1, score="taylor")
    other, magnitude = perplexity(neurons=0, layers=1, score="magnitude")
    assert size == other
    assert magnitude > 2 * taylor
    from hf_optim.toolkit.statistics import importance

    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        monkeypatch.setattr(
            importance, "group_magnitude", lambda model, groups, g=generator: torch.rand(len(groups), generator=g)
        )
        assert perplexity(neurons=0.25, score="magnitude")[1] > 1.2 * activation
