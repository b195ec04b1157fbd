"""What the techniques share whose attention learns the outputs of the dense one."""

from __future__ import annotations

import pytest

from hf_optim_plugins.attention._distilling import DistilledTechnique, FeatureTechnique
from hf_optim_plugins.attention.linformer import Linformer
from hf_optim_plugins.attention.performer import Performer
from hf_optim_plugins.attention.rfa import Rfa
from hf_optim_plugins.attention.set_transformer import SetTransformer
from hf_optim_plugins.attention.sinkhorn import Sinkhorn


@pytest.mark.parametrize("technique", [Linformer, Performer, Rfa, SetTransformer, Sinkhorn])
def test_data_and_the_whole_model_are_needed_for_steps_alone(technique):
    assert issubclass(technique, DistilledTechnique)
    plain, distilled = technique.for_testing(), technique.from_dict({"distill_steps": 3})
    assert (plain.needs_data(), plain.needs_whole_model()) == (False, False)
    assert (distilled.needs_data(), distilled.needs_whole_model()) == (True, True)


@pytest.mark.parametrize("technique", [Performer, Rfa])
def test_features_warn_of_dropout_that_is_not_applied(technique):
    assert technique.initialize is FeatureTechnique.initialize
