"""What ``check`` says of the weights that pruning steps choose from."""

from __future__ import annotations

from tiny_models import tiny_llama, tiny_mixtral

from hf_optim import OptimConfig
from hf_optim.cli.jobs.pruned_weights import pruned_weights


def found(steps, model):
    return pruned_weights(OptimConfig.parse(steps), model.to("meta"))


def test_layers_and_experts_are_counted_by_step():
    steps = [{"technique": "nm"}, {"technique": "magnitude", "skip": ["*.experts.*"]}, {"technique": "gptq"}]
    entries = found(steps, tiny_mixtral())
    assert entries.keys() == {"step 1 (nm)", "step 2 (magnitude)"}
    assert entries["step 1 (nm)"] == {
        "layers": 8,
        "expert_matrices": 16,
        "weights": 43008,
        "share": 0.905051,
        "text": "weights of 8 linear layers and 16 matrices of experts, which are 90.5 % of all",
    }
    rest = entries["step 2 (magnitude)"]
    assert (rest["layers"], rest["expert_matrices"], rest["weights"]) == (8, 0, 6144)
    assert rest["text"] == "weights of 8 linear layers, which are 12.9 % of all; experts stay as they are"


def test_what_a_step_cannot_prune_is_not_counted():
    assert found([{"technique": "l0"}], tiny_mixtral())["step 1 (l0)"]["expert_matrices"] == 0
    assert found([{"technique": "l0", "on": "neurons"}], tiny_llama()) == {}
    assert found([{"technique": "nm", "group": 5, "keep": 2}], tiny_mixtral())["step 1 (nm)"]["weights"] == 0
    assert "experts" not in found([{"technique": "nm"}], tiny_llama())["step 1 (nm)"]["text"]
    upcycled = [{"technique": "upcycle"}, {"technique": "nm"}]
    assert found(upcycled, tiny_llama()) == {}
