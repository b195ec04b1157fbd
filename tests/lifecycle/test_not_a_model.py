"""The functions of hf_optim that take a model refuse what is none in a sentence."""

from __future__ import annotations

import pytest

import hf_optim

TAKE_A_MODEL = {
    name: getattr(hf_optim, name)
    for name in ("report", "accelerate", "restore", "release", "key_value_cache", "callbacks", "advance", "generate",
                 "merge_adapters", "exits_of", "offload", "run_of", "captured")
}  # fmt: skip


@pytest.mark.parametrize("given", ["org/model", None, 3], ids=repr)
@pytest.mark.parametrize("name", TAKE_A_MODEL)
def test_what_is_no_model_is_an_error_of_hf_optim(name, given):
    with pytest.raises(hf_optim.OptimError) as caught:
        TAKE_A_MODEL[name](given)
    assert type(given).__name__ in str(caught.value)


def test_the_size_of_a_cache_needs_a_configuration():
    with pytest.raises(hf_optim.ModelError, match="pass the configuration of a model"):
        hf_optim.cache_size("org/model", 1, 2)
