"""Kernels that register themselves (entry points), and what broken third-party packages may not break."""

from __future__ import annotations

import importlib.metadata
import sys
import types
import warnings
from collections import Counter

import pytest
import torch
from naive_kernel import NAIVE, PackedWeight, supports_all
from test_accelerate import UP, quantize
from test_fused_projections import JOINING
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM

import hf_optim
from hf_optim import Kernel
from hf_optim.compressed.packed import accelerate, fused_projections, installed
from hf_optim.compressed.packed.packed_linear import KernelWarning, PackedLinear
from hf_optim.recipes import catalogue

BUNDLED = ("codebook", "llm_int8", "sparse24", "w8a8", "wna16")
FLAGS = {"codebook": {"codebook"}, "llm_int8": {"outliers"}, "sparse24": {"sparse24"}}


@pytest.fixture
def install(monkeypatch):
    """Install entry points: ``install(name, **attributes of the module)``; without attributes, a missing module."""
    real, added = importlib.metadata.entry_points, []

    def entry_points(**query):
        found = real(**query)
        return [*found, *(entry for entry in added if entry.group == query["group"])] if "group" in query else found

    def add(name, group=installed.GROUP, **attributes):
        if attributes:
            module = types.ModuleType(f"package_of_{name}")
            module.__dict__.update(attributes)
            monkeypatch.setitem(sys.modules, module.__name__, module)
        added.append(importlib.metadata.EntryPoint(name, f"package_of_{name}", group))

    monkeypatch.setattr(installed, "entry_points", entry_points)
    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    installed.installed_kernels.cache_clear()
    yield add
    installed.installed_kernels.cache_clear()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("int4")
    quantize(tiny_llama().requires_grad_(False)).save_pretrained(folder)
    return folder


def test_the_bundled_kernels():
    found = {kernel.name: kernel for kernel in installed.installed_kernels()}
    assert found.keys() >= set(BUNDLED)
    for name in BUNDLED:
        flags = {flag for flag in ("sparse24", "outliers", "codebook") if getattr(found[name], flag)}
        assert flags == FLAGS.get(name, set())
        assert (found[name].join is None) == (name == "codebook")
        assert found[name].supports.__module__ == f"hf_optim_kernels.{name}.layer"


def test_kernels_of_other_packages_come_before_the_bundled_ones(install):
    install("zzz", NAME="theirs", supports=supports_all, prepack=PackedWeight, SPARSE24=True)
    names = [kernel.name for kernel in installed.installed_kernels()]
    assert names == ["theirs", *BUNDLED]
    assert installed.installed_kernels()[0] == Kernel("theirs", supports_all, PackedWeight, sparse24=True)


@pytest.mark.parametrize(
    ("attributes", "error"),
    [
        ({}, "ModuleNotFoundError: No module named 'package_of_broken'"),
        ({"NAME": "broken", "supports": supports_all}, "AttributeError: .* has no attribute 'prepack'"),
        ({"supports": supports_all, "prepack": PackedWeight}, "AttributeError: .* has no attribute 'NAME'"),
        ({"NAME": 4, "supports": supports_all, "prepack": PackedWeight}, "TypeError: NAME is a int, not a str"),
        ({"NAME": "broken", "supports": supports_all, "prepack": "no"}, "TypeError: prepack is a str, not a function"),
    ],
)
def test_a_broken_kernel_breaks_nothing_but_itself(attributes, error, install, checkpoint):
    install("broken", **attributes)
    install("sound", NAME="sound", supports=supports_all, prepack=PackedWeight)
    with pytest.warns(KernelWarning, match=rf"the kernel broken \(package_of_broken\) is skipped: {error}") as told:
        AutoModelForCausalLM.from_pretrained(checkpoint, optim_config="auto")
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", KernelWarning)
        model = AutoModelForCausalLM.from_pretrained(checkpoint, optim_config="auto")
    assert [kernel.name for kernel in installed.installed_kernels()] == ["sound", *BUNDLED]
    assert model.get_submodule(UP).packing.kernel.name == "sound"


def test_a_broken_technique_does_not_break_loading(install, checkpoint, monkeypatch, caplog):
    install("broken", group=catalogue.GROUP)
    install("sound", NAME="sound", supports=supports_all, prepack=PackedWeight)
    fresh = catalogue.Catalogue()
    monkeypatch.setattr(catalogue, "catalogue", lambda: fresh)
    assert {each.spec.name for each in fresh.all()} == {*fresh.names()} - {"broken"}
    told = [each.getMessage() for each in caplog.records if "cannot be imported" in each.getMessage()]
    assert len(told) == 1
    assert told[0].startswith("the technique 'broken' cannot be imported from package_of_broken: ModuleNotFoundError")
    with warnings.catch_warnings():
        warnings.simplefilter("error", KernelWarning)
        model = AutoModelForCausalLM.from_pretrained(checkpoint, optim_config="auto")
        stock = hf_optim.accelerate(AutoModelForCausalLM.from_pretrained(checkpoint))
    for each in (model, stock):
        assert each.get_submodule(UP).packing.kernel.name == "sound"


def test_auto_packs_and_fuses_a_model_once(checkpoint, monkeypatch):
    tried, traced = Counter(), []

    def supports(weight):
        tried[weight.name] += 1
        return "not this one" if "down_proj" in weight.name else None

    kernel = Kernel("counting", supports, PackedWeight, join=JOINING.join)
    trace = fused_projections.trace
    monkeypatch.setattr(accelerate, "installed_kernels", lambda: (kernel,))
    monkeypatch.setattr(fused_projections, "trace", lambda model: traced.append(model) or trace(model))
    with pytest.warns(KernelWarning, match=r"down_proj.*\(counting: not this one\)") as told:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, optim_config="auto")
    assert len(told) == 1
    assert set(tried.values()) == {1}
    assert len(tried) == 6
    assert len(traced) == 1
    gates = [m for name, m in model.named_modules() if name.endswith(("gate_proj", "up_proj"))]
    assert len(gates) == 4
    assert all(isinstance(m, PackedLinear) and m.packing.group.fused is not None for m in gates)
    reasons = {row.name: row.reason for row in hf_optim.report(model) if row.kernel is None}
    assert reasons["model.layers.0.mlp.down_proj"] == "counting: not this one"
    with torch.no_grad():
        stock = AutoModelForCausalLM.from_pretrained(checkpoint)
        x = torch.arange(5, 15)[None]
        assert torch.allclose(model(x).logits, stock(x).logits, rtol=1e-4, atol=1e-5)


def test_auto_runs_the_dense_2_to_4_layers_of_a_compressed_checkpoint(tmp_path, monkeypatch):
    model = quantize(tiny_llama().requires_grad_(False))
    query = model.model.layers[0].self_attn.q_proj.weight
    query.view(-1, 4)[:, :2] = 0
    model.save_pretrained(tmp_path)
    sparse = Kernel("sparse", lambda w: None if w.kind == "dense" else "", PackedWeight, sparse24=True)
    monkeypatch.setattr(accelerate, "installed_kernels", lambda: (sparse, NAIVE))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, optim_config="auto")
    rows = {row.name: row.kernel for row in hf_optim.report(loaded) if row.kernel}
    assert rows.pop("model.layers.0.self_attn.q_proj") == "naive dense32"
    assert set(rows.values()) == {"naive int4"}
    assert len(rows) == 6
