"""The seam to transformers: what importing hf_optim changes, and what it must not."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import torch
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from hf_optim.lifecycle import from_pretrained


def _python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _imported() -> tuple[set[str], float]:
    """Import hf_optim after transformers in a new process: the packages that this loads, and the seconds."""
    code = """
import sys, time, transformers
before, start = set(sys.modules), time.perf_counter()
import hf_optim
print(time.perf_counter() - start, *{name.split(".")[0] for name in set(sys.modules) - before})
"""
    seconds, *loaded = _python(code).split()
    return set(loaded), float(seconds)


def test_import_loads_nothing_heavy_in_less_than_a_third_of_a_second():
    loaded, seconds = _imported()
    heavy = {"torch", "triton", "peft", "datasets", "hf_optim_plugins", "hf_optim_kernels", "pluggy", "matplotlib"}
    assert "hf_optim" in loaded
    assert not loaded & heavy
    assert seconds < 0.3 or any(_imported()[1] < 0.3 for _ in range(2))


IS_WRAPPED = "hasattr(transformers.PreTrainedModel.from_pretrained.__func__, '_hf_optim_original')"


def test_transformers_imported_before_or_after():
    """Imported in either order, before transformers loads its models; the finder of that import is removed by it."""
    code = f"""
import os, sys, torch  # torch for both orders, so that it is imported once
for first in ("transformers", "hf_optim"):
    if os.fork() == 0:
        __import__(first)
        import hf_optim, transformers
        from hf_optim.lifecycle.from_pretrained import _Waiter
        assert "transformers.modeling_utils" not in sys.modules
        print(first, {IS_WRAPPED}, any(isinstance(finder, _Waiter) for finder in sys.meta_path), flush=True)
        os._exit(0)
    os.wait()
"""
    assert _python(code).splitlines() == ["transformers True False", "hf_optim True False"]


def test_transformers_loaded_before(stock_python):
    done = stock_python.copy(f"""
import sys, transformers
for name in ("hf_optim", "hf_optim_plugins", "hf_optim_kernels"):
    del sys.modules[name]  # which could not be imported until here
assert "transformers.modeling_utils" in sys.modules
import hf_optim
result = {IS_WRAPPED}
""")
    assert done.result is True, done.err


def test_a_call_without_optim_config_is_the_stock_call(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    ours, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    from_pretrained.uninstall()
    try:
        stock = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert not hasattr(PreTrainedModel.from_pretrained.__func__, "_hf_optim_original")
    finally:
        from_pretrained.install()
    assert not loading["missing_keys"]
    assert set(vars(ours)) == set(vars(stock))
    for (name, a), (other, b) in zip(ours.state_dict().items(), stock.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b)


def test_the_wrapper_keeps_the_signature_and_is_installed_once():
    before = PreTrainedModel.__dict__["from_pretrained"]
    from_pretrained.install()
    assert PreTrainedModel.__dict__["from_pretrained"] is before
    assert "pretrained_model_name_or_path" in inspect.signature(LlamaForCausalLM.from_pretrained).parameters


@pytest.mark.parametrize("name", ["optimize", "callbacks", "OptimTrainer", "OptimConfig", "Technique", "technique"])
def test_public_names_resolve(name):
    import hf_optim

    assert name in dir(hf_optim)
    assert callable(getattr(hf_optim, name))


def test_an_unknown_name_is_an_attribute_error():
    import hf_optim

    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        hf_optim.quantise  # noqa: B018
