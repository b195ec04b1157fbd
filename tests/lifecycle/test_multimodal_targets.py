"""Towers, projectors, poolers and embeddings as targets: stored, reloaded by stock transformers, calibrated right."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from renamed_families import IDS, IMAGES, PAIRS, SHOWN, TEXTS, build_family
from tiny_models import tiny_bert, tiny_llama
from transformers import AutoModelForCausalLM, BertModel

import hf_optim
from hf_optim import DataError, ModelError
from hf_optim.cli.jobs import preflight
from hf_optim.compressed import quantized_modules
from hf_optim.lifecycle.step_checks import require_supported_steps
from hf_optim.toolkit.quantization import GridSpec, make_grid

W4 = {"technique": "rtn", "bits": 4, "group_size": 16}
SMALL = {"input_ids": IDS[:, :8] % 60}


def outputs(model, inputs):
    with torch.no_grad():
        out = model.eval()(**inputs)
    found = [out.get(key) for key in ("logits", "logits_per_image", "last_hidden_state", "pooler_output")]
    return [value for value in found if value is not None]


CASES = {
    "tower and projector": ("llava", SHOWN, ["Linear", "*vision_tower*", "re:.*multi_modal_projector.*"], 28),
    "the tower alone": ("llava", SHOWN, ["re:.*vision_tower.*"], 12),
    "both encoders and the projections": ("clip", PAIRS, ["Linear", "*projection*"], 26),
    "the classifier of an image model": ("vit", IMAGES, ["Linear", "classifier"], 13),
    "a pooler and tables": ("bert", SMALL, ["Linear", "*pooler*", "*embeddings*"], 16),
    "a table of tokens": ("llama", SMALL, ["Linear", "*embed_tokens*"], 15),
    "a tower and tables of positions": ("llava", SHOWN, ["*vision_tower*", "*position_embedding*"], 13),
}
BUILD = {
    "bert": lambda: BertModel(tiny_bert().config).eval(),
    "llama": tiny_llama,
}


def built(name):
    return BUILD[name]() if name in BUILD else build_family(name)[0]


@pytest.mark.many
@pytest.mark.filterwarnings("ignore::hf_optim.KernelWarning")  # tables are read row by row, on no kernel
@pytest.mark.parametrize("case", CASES)
def test_it_reloads_with_the_same_bits(case, tmp_path):
    name, inputs, targets, count = CASES[case]
    dense = built(name)
    model = hf_optim.optimize(copy.deepcopy(dense), {**W4, "targets": targets})
    assert len(quantized_modules(model)) == count
    model.save_pretrained(tmp_path)
    expected = outputs(model, inputs)
    for got in (
        outputs(type(model).from_pretrained(tmp_path), inputs),
        outputs(type(model).from_pretrained(tmp_path, optim_config="auto"), inputs),
    ):
        assert len(got) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(outputs(dense, inputs), expected, strict=True))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_table_holds_the_codes_of_the_grid(tmp_path, bits):
    from safetensors.torch import load_file

    dense = tiny_llama()
    table = dense.model.embed_tokens.weight.detach().clone()
    model = hf_optim.optimize(dense, {"technique": "rtn", "bits": bits, "targets": ["Linear", "*embed_tokens*"]})
    grid = make_grid(table, GridSpec(bits, "int", "channel", None, True), "minmax")
    assert torch.equal(model.model.embed_tokens.weight, grid.quantize(table).float() * grid.scale)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    assert stored.dtype == torch.int8
    assert torch.equal(stored, grid.quantize(table).to(torch.int8))
    groups = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["config_groups"].values()
    assert {group["format"] for group in groups} == {"pack-quantized", "naive-quantized"}


def test_the_table_of_w8a8_has_no_input_scales(tmp_path):
    fields = {"technique": "rtn", "bits": 8, "activations": "int8", "targets": ["Linear", "*embed_tokens*"]}
    model = hf_optim.optimize(tiny_llama(), fields)
    assert model.model.embed_tokens.quantization_scheme.input_activations is None
    model.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(outputs(stock, SMALL)[0], outputs(model, SMALL)[0])


def test_pruning_takes_tables_and_keeps_them_in_training(tmp_path):
    model = hf_optim.optimize(tiny_llama(), {"technique": "magnitude", "targets": ["Linear", "*embed_tokens*"]})
    run = hf_optim.run_of(model)
    table = model.model.embed_tokens.weight
    assert int((table == 0).sum()) == table.numel() // 2
    assert "model.embed_tokens.weight" in run.masks
    assert run.reported(run.recipe.steps[0])["layers"]["model.embed_tokens"] == 0.5
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).model.embed_tokens.weight, table)


REFUSED = {
    "a tied table": ("rtn", {"tie_word_embeddings": True}, "*embed_tokens*", "tied to lm_head.weight"),
    "a tied table, pruned": ("magnitude", {"tie_word_embeddings": True}, "*embed_tokens*", "tied to lm_head.weight"),
    "a table, calibrated": ("gptq", {}, "*embed_tokens*", "1 Embedding module .* does not work on"),
    "a table in N:M": ("nm", {}, "*embed_tokens*", "1 Embedding module .* does not work on"),
    "norms": ("rtn", {}, "*norm*", "5 LlamaRMSNorm modules"),
    "a pattern of the head": ("rtn", {}, "*lm_hea*", "role output head .*write lm_head to include it"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_pattern_without_effect_is_refused_before_the_work_and_by_check(case):
    technique, changes, pattern, message = REFUSED[case]
    step = {"technique": technique, "targets": ["Linear", pattern]}
    model = tiny_llama(**changes)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ModelError, match=rf"step 1 \({technique}\): in LlamaForCausalLM, .*{message}"):
        hf_optim.optimize(model, step, calibration=TEXTS["input_ids"] % 60)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    recipe = hf_optim.OptimConfig.parse(step)

    def check():
        preflight.check_steps(recipe, model)
        require_supported_steps(recipe, model)

    with pytest.raises(ModelError, match=message):
        check()


def test_the_exact_name_of_a_tied_head_is_skipped_with_a_warning(caplog):
    step = {"technique": "rtn", "bits": 8, "targets": ["Linear", "lm_head"]}
    model = hf_optim.optimize(tiny_llama(tie_word_embeddings=True), step)
    (entry,) = hf_optim.run_of(model).record.coverage.values()
    reason = "its weight is tied to model.embed_tokens.weight"
    assert entry["skipped"] == {reason: ["lm_head"]}
    assert f"step 1 (rtn) skipped 1 module ({reason}): lm_head" in caplog.text


def test_layers_that_nobody_calls_are_refused_by_a_pattern():
    step = {**W4, "targets": ["Linear", "*.attention.out_proj"]}
    with pytest.raises(ModelError, match=r"has no effect: model.vision_tower.head.attention.out_proj cannot be stored"):
        hf_optim.optimize(build_family("gemma3")[0], step)


def test_fp8_leaves_tables_in_full():
    with pytest.raises(ModelError, match="an embedding is stored as integer codes only"):
        hf_optim.optimize(tiny_llama(), {"technique": "rtn", "format": "fp8", "targets": ["Linear", "Embedding"]})


# -- calibrated --------------------------------------------------------------------------------------------------------
FIELDS = {"technique": "gptq", "bits": 4, "group_size": 16, "act_order": False, "precision": "float64", "refine": 0}
ALL = ["Linear", "*vision_tower*", "*multi_modal_projector*"]


def padded():
    mask = torch.ones_like(SHOWN["input_ids"])
    mask[1, 8:] = 0
    return {**SHOWN, "attention_mask": mask}


def moments(model, names, batch):
    layers = {name: model.get_submodule(name) for name in names}
    sums = dict.fromkeys(names, 0.0)

    def keep(name):
        def hook(module, args):
            rows = args[0].detach().reshape(-1, args[0].shape[-1]).double()
            sums[name] = sums[name] + rows.T @ rows

        return hook

    handles = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return sums


def solve(weight, moment, grid, damp=0.01):
    """Return GPTQ's weights by the textbook recursion: round a column, spread its error by the inverse Hessian."""
    hessian = moment.clone()
    hessian.diagonal().add_(damp * hessian.diagonal().mean())
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    left = weight.double().clone()
    out = torch.empty_like(left)
    scale = grid.scale.double().repeat_interleave(16, dim=1)
    for column in range(left.shape[1]):
        code = (left[:, column] / scale[:, column]).round().clamp(-8, 7)
        out[:, column] = code * scale[:, column]
        error = (left[:, column] - out[:, column]) / upper[column, column]
        left[:, column:] -= error[:, None] * upper[column, column:][None]
    return out


def test_the_layers_of_a_tower_have_the_codes_of_a_direct_computation():
    """Each part on the outputs of the quantized parts before it, on all patches, although the text is padded."""
    dense, batch = build_family("llava")[0], padded()
    model = hf_optim.optimize(copy.deepcopy(dense), {**FIELDS, "targets": ALL}, calibration=[batch])
    tower = "model.vision_tower.encoder.layers"
    for names, before in (
        ([f"{tower}.0.self_attn.q_proj", f"{tower}.0.mlp.fc1"], ()),
        ([f"{tower}.1.self_attn.q_proj", f"{tower}.1.mlp.fc2"], (f"{tower}.0.",)),
        (["model.multi_modal_projector.linear_1"], ("model.vision_tower.",)),
    ):
        mixed = copy.deepcopy(dense).eval()
        with torch.no_grad():
            for name, parameter in mixed.named_parameters():
                if name.startswith(before) and before:
                    parameter.copy_(model.get_parameter(name))
        sums = moments(mixed, names, batch)
        for name in names:
            weight = dense.get_submodule(name).weight.detach()
            expected = solve(weight, sums[name], make_grid(weight, GridSpec(4, "int", "group", 16, True), "minmax"))
            got = model.get_submodule(name).weight.double()
            same = ((got - expected).abs() < 1e-6).double().mean()
            assert same > 0.99, (name, float(same))
            assert not torch.allclose(got, weight.double())


def test_the_language_model_is_calibrated_on_the_quantized_tower():
    dense, batch = build_family("llava")[0], dict(SHOWN)
    name = "model.language_model.layers.0.mlp.down_proj"
    text = hf_optim.optimize(copy.deepcopy(dense), FIELDS, calibration=[batch])
    both = hf_optim.optimize(copy.deepcopy(dense), {**FIELDS, "bits": 2, "targets": ALL}, calibration=[batch])
    again = hf_optim.optimize(copy.deepcopy(dense), {**FIELDS, "bits": 2}, calibration=[batch])
    assert not torch.equal(both.get_submodule(name).weight, again.get_submodule(name).weight)
    assert not torch.equal(text.get_submodule(name).weight, again.get_submodule(name).weight)


@pytest.mark.parametrize("driver", ["blockwise", "whole_model"])
def test_a_calibrated_tower_reloads(driver, tmp_path):
    model = build_family("llava")[0]
    recipe = {"steps": [{**FIELDS, "targets": ALL}], "driver": driver}
    model = hf_optim.optimize(model, recipe, calibration=[dict(SHOWN)])
    assert len(quantized_modules(model)) == 28
    model.save_pretrained(tmp_path)
    stock = type(model).from_pretrained(tmp_path)
    assert torch.equal(outputs(stock, SHOWN)[0], outputs(model, SHOWN)[0])


def test_static_inputs_of_a_tower():
    fields = {"technique": "rtn", "bits": 8, "activations": "int8", "dynamic": False, "targets": ALL}
    model = hf_optim.optimize(build_family("llava")[0], fields, calibration=[padded()])
    layer = model.model.vision_tower.encoder.layers[0].mlp.fc1
    assert layer.input_scale.shape == (1,)


def test_a_tower_without_images_is_refused_before_the_work():
    model = build_family("llava")[0]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(DataError, match=r"step 1 \(gptq\) calibrates 14 layers that read images or sound"):
        hf_optim.optimize(model, {**FIELDS, "targets": ALL}, calibration=[TEXTS])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    hf_optim.optimize(model, FIELDS, calibration=[TEXTS])  # the language model needs none
