"""Weights of 4-bit floats by rounding, GPTQ and SignRound: their errors keep their order, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_llama, tiny_mixtral

from hf_optim import compressed, optimize
from hf_optim.errors import RecipeError
from hf_optim.runs.run import run_of
from hf_optim.toolkit.quantization import GridSpec, make_grid
from hf_optim_plugins.quantization.gptq import quantize_columns

IDS = torch.randint(0, 64, (16, 16), generator=torch.Generator().manual_seed(0))
SCHEMES = pytest.mark.parametrize("scheme", ["NVFP4A16", "MXFP4A16"])
SPECS = {"NVFP4A16": GridSpec(4, "nvfp4", "group", 16), "MXFP4A16": GridSpec(4, "mxfp4", "group", 32)}


def llama(**changes):
    return tiny_llama(**{"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 1, **changes}).to(
        torch.bfloat16
    )


@SCHEMES
def test_gptq_loses_less_of_the_output_than_rounding(scheme):
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(96, 96, generator=g, dtype=torch.float64)
    x = torch.randn(400, 96, generator=g, dtype=torch.float64) @ mix
    weight = torch.randn(24, 96, generator=g, dtype=torch.float64)
    weight[:, 3] = 0
    grid = make_grid(weight, SPECS[scheme])
    codes = quantize_columns(weight, x.T @ x / len(x), grid, damp=1e-3)
    assert not codes[:, 3].any()
    assert set(codes.unique().tolist()) <= {0, 1, 2, 3, 4, 6, 8, 12, -1, -2, -3, -4, -6, -8, -12}
    error = lambda found: float((x @ (found - weight).T).square().sum())  # noqa: E731
    assert error(grid.dequantize(codes)) < 0.7 * error(grid.nearest(weight))


@SCHEMES
def test_signround_lowers_the_loss_of_a_block(scheme):
    model = optimize(llama(), [{"technique": "signround", "scheme": scheme, "steps": 60}], IDS)
    entry = next(entry for entry in run_of(model).record.steps.values() if "losses" in entry)
    ((before, after),) = entry["losses"].values()
    assert after < before
    layer = model.model.layers[0].mlp.down_proj
    assert compressed.scheme_on(layer).format == f"{scheme[:5].lower()}-pack-quantized"


def test_layers_that_read_one_input_share_the_global_scale_of_gptq():
    model = optimize(llama(), [{"technique": "gptq", "scheme": "NVFP4A16"}], IDS)
    block = model.model.layers[0]
    shared = [getattr(block.self_attn, f"{name}_proj").weight_global_scale for name in "qkv"]
    assert torch.equal(shared[0], shared[1])
    assert torch.equal(shared[0], shared[2])
    assert not torch.equal(shared[0], block.mlp.down_proj.weight_global_scale)


def test_layers_of_other_widths_are_left_as_they_are(caplog):
    model = optimize(llama(intermediate_size=80), [{"technique": "rtn", "scheme": "MXFP4A16"}])
    assert compressed.scheme_on(model.model.layers[0].mlp.up_proj) is not None
    assert compressed.scheme_on(model.model.layers[0].mlp.down_proj) is None
    assert "its 80 inputs are not a multiple of the 32 that share a scale" in caplog.text


def test_experts_are_left_unquantized():
    model = optimize(tiny_mixtral().to(torch.bfloat16), [{"technique": "rtn", "scheme": "NVFP4A16"}])
    layers = {type(module).__name__ for module in model.modules() if hasattr(module, "quantization_scheme")}
    assert layers == {"Linear"}


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"technique": "rtn", "format": "nvfp4"}, "bits: 4"),
        ({"technique": "rtn", "format": "nvfp4", "bits": 4, "symmetric": False}, "no zero points"),
        ({"technique": "rtn", "format": "mxfp4", "bits": 4, "activations": "int8"}, "inputs as they are"),
        ({"technique": "rtn", "format": "mxfp4", "bits": 4, "strategy": "channel"}, "leave strategy out"),
        ({"technique": "rtn", "format": "mxfp4", "bits": 4, "group_size": 16}, "groups of 32"),
        ({"technique": "gptq", "format": "nvfp4", "bits": 3}, "bits: 4"),
        ({"technique": "gptq", "format": "nvfp4", "group_size": 32}, "groups of 16"),
        ({"technique": "signround", "format": "mxfp4", "group_size": 64}, "groups of 32"),
        ({"technique": "gptq", "scheme": "NVFP4A16", "group_size": 64}, "group_size: 16"),
    ],
)
def test_fields_that_contradict_the_format_are_refused(fields, word):
    with pytest.raises(RecipeError, match=word):
        optimize(llama(), [fields], IDS)
