"""Coverage counts weights: every one once, and nothing that a step put beside them."""

from __future__ import annotations

import pytest
from tiny_models import tiny_llama

import hf_optim


@pytest.mark.parametrize("step", [{"technique": "rtn", "group_size": 8}, {"technique": "magnitude"}])
def test_the_total_is_the_model_as_it_came(step):
    model = tiny_llama()
    total = sum(p.numel() for p in model.parameters())
    linears = sum(p.numel() for name, p in model.named_parameters() if "proj" in name)
    record = hf_optim.run_of(hf_optim.optimize(model, step)).record
    (coverage,) = record.coverage.values()
    assert (coverage["weights_touched"], coverage["weights_total"]) == (linears, total)
    assert coverage["share"] == pytest.approx(linears / total, abs=1e-6)
