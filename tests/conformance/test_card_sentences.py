"""Each number in the sentences of a card is the one that its words say, not another number of the record."""

from __future__ import annotations

import pytest

from hf_optim import Card, OptimConfig
from hf_optim.lifecycle.stages import start_run

ERRORS = {"relative_error": {"a": 0.01, "b": 0.03, "c": 0.05}, "mean_relative_error": 0.03}
TABLE = {
    "a": {"mean": 1.5, "std": 0.25, "omega": 1.75, "bits": 2},
    "b": {"mean": -3.0, "std": 0.5, "omega": 3.5, "bits": 8},
}
CASES = {
    "gptq": (
        {"bits": 4},
        {**ERRORS, "layers_by_bits": {"3": 1, "8": 2}},
        "3 linear layers were quantized to 3 bits (1 layer), 8 bits (2 layers). The relative squared error of their "
        "outputs on the calibration data was 3.00e-02 on average.",
    ),
    "obq": (
        {},
        ERRORS,
        "3 linear layers were quantized, every row in its own order. The relative squared error of their outputs on "
        "the calibration data was 3.00e-02 on average.",
    ),
    "gmp": (
        {"sparsity": 0.5, "initial": 0.1},
        {"sparsity": 0.4321, "layers": {"a": 0.3}, "counted": {"a": [10, 3]}},
        "from 10 % towards 50 % along a cubic ramp; 43.2 % of the targeted weights are zero.",
    ),
    "lkd": (
        {"steps": 7},
        {"losses": {"model.layers.0": [0.5, 0.125]}},
        "Each of 1 quantized blocks was trained for 7 steps",
    ),
    "signround": (
        {"steps": 7, "inputs": "dense"},
        {"losses": {"model.layers.0": [0.5, 0.125]}},
        "1 block was learned in 7 steps",
    ),
    "rotation": (
        {"method": "learned", "online": True},
        {
            "streams": 1, "attentions": 5, "head_untied": True, "rotated_inputs": 7, "loss_before": 0.25,
            "loss_after": 0.125,
        },
        "the residual stream and the values of 5 attention layers were rotated by learned orthogonal matrices, which "
        "lowered the divergence of the quantized model's outputs on the calibration data from 0.25 to 0.125; the "
        "rotations are folded into the weights. The output head has its own weight now. The inputs of 7 linear layers "
        "behind activation functions are rotated at run time",
    ),
    "qat": (
        {"bits": 4},
        {"layers": 5, "layers_by_bits": {"2": 1, "6": 4}},
        "5 linear layers were trained with weights of 2 bits (1 layer), 6 bits (4 layers) in the forward pass",
    ),
    "structured": (
        {"layers": 1, "neurons": 2},
        {
            "parameters_before": 2000,
            "parameters_after": 1500,
            "widths": {"neurons": [[16, 14]]},
            "layers": {"model.layers": [5, 4]},
            "removed_layers": ["model.layers.3"],
            "ranked_by": {"neurons": "activation", "layers": "taylor"},
        },
        "(neurons by activation, layers by taylor), equally many in every layer: 2,000 parameters became 1,500 (25.0 % "
        "fewer).",
    ),
    "qbert": (
        {"budget": 5.0},
        {"layers": TABLE, "bytes": 1234, "bytes_allowed": 5678, "mean_bits": 4.25},
        "2 linear layers have 4.25 bits per weight on average (1,234 bytes of codes and scales, 5,678 allowed)",
    ),
}  # fmt: skip
ROWS = {
    "lkd": [["`model.layers.0`", "5.000e-01", "1.250e-01"]],
    "signround": [["`model.layers.0`", "5.000e-01", "1.250e-01"]],
    "structured": [
        ["parameters", "2,000", "1,500"],
        ["neurons in a layer", "16", "14"],
        ["layers of `model.layers`", "5", "4"],
    ],
    "qbert": [["`a`", "1.5", "0.25", "1.75", "2"], ["`b`", "-3", "0.5", "3.5", "8"]],
}


def sections(technique, fields, reported, folder):
    """What a step of these fields puts on the card of a run in which it has reported this."""
    run = start_run(OptimConfig.parse([{"technique": technique, **fields}]), config=None)
    run.record.steps["0"] = {"technique": technique, **reported}
    (step,) = run.recipe.steps
    step.export(run=run, directory=folder, card=Card(run.record, folder))
    return run.record.sections


@pytest.mark.parametrize("technique", CASES)
def test_a_sentence_has_the_numbers_that_its_words_name(technique, tmp_path):
    fields, reported, sentence = CASES[technique]
    shown = sections(technique, fields, reported, tmp_path)
    assert sentence in " ".join(s["markdown"] for s in shown if s["kind"] == "paragraph")
    if technique in ROWS:
        (table,) = (s for s in shown if s["kind"] == "table")
        assert table["rows"] == ROWS[technique]
