"""Who may import whom (docs/design.md). Walks the import statements, lazy and type-only ones included."""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path

from conftest import ROOT

import hf_optim
from hf_optim.toolkit.experts import ROUNDINGS

# A package imports from those before it. `__init__` is the public face, hf_optim/__init__.py.
ORDER = (
    "errors",
    "trust",
    "toolkit",
    "recipes",
    "runs",
    "data",
    "compressed",
    "generation",
    "evaluation",
    "checkpoints",
    "hookspecs",
    "calibration",
    "lifecycle",
    "training",
    "__init__",
    "cli",
    "testing",
)
# The families of the toolkit: one imports from families of the rows before its own.
FAMILIES = (
    ("distributed", "checkpoint", "modules"),
    ("topology",),
    ("statistics", "attention", "packing"),
    ("quantization", "pruning", "permutation", "experts", "offloading"),
    ("distillation",),
    ("exits",),
)
# What a technique may import of hf_optim (docs/writing-a-technique.md lists them).
PLUGIN_API = {
    "hf_optim",
    "hf_optim.checkpoints.remote_code",
    "hf_optim.training",
    *(f"hf_optim.toolkit.{family}" for row in FAMILIES for family in row),
}


def files(*parts: str) -> list[Path]:
    return sorted(ROOT.joinpath(*parts).rglob("*.py"))


def name_of(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    parts = parts[1:] if parts[0] in ("plugins", "kernels") else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in files("hf_optim") + files("plugins") + files("kernels")}


@cache
def statements(path: Path) -> list[tuple[str, str, bool]]:
    """(module as written but absolute, name taken from it or "", whether it stands at the top) of every import."""
    package = name_of(path).split(".")[: None if path.name == "__init__.py" else -1]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    at_the_top = set(map(id, tree.body))
    found = []
    for node in ast.walk(tree):
        top = id(node) in at_the_top
        if isinstance(node, ast.Import):
            found += [(alias.name, "", top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            found += [(stem, alias.name, top) for alias in node.names]
    return found


def imports(path: Path) -> list[tuple[str, bool]]:
    """(absolute name of a module, whether it is imported at the top) of every import."""
    found = ((stem, f"{stem}.{name}", top) for stem, name, top in statements(path))
    return [(full if full in MODULES else stem, top) for stem, full, top in found]


def root(name: str) -> str:
    return name.split(".")[0]


def outside(path: Path) -> set[str]:
    return {root(name) for name, _ in imports(path)} - set(sys.stdlib_module_names) - {"__future__"}


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else "__init__"


def public(module: str) -> set[str]:
    """What a plugin may take from this module."""
    if module not in PLUGIN_API:
        return set()
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            break
    else:
        return {getattr(node, "name", "") for node in tree.body}
    return set(hf_optim.__all__) if module == "hf_optim" else set(ast.literal_eval(node.value))


TECHNIQUES = {
    p.stem for p in files("plugins", "hf_optim_plugins") if "def register_techniques" in p.read_text(encoding="utf-8")
}


def test_kernels_import_torch_and_triton_only():
    allowed = {"torch", "triton", "hf_optim_kernels"}
    assert {p.name: outside(p) - allowed for p in files("kernels") if outside(p) - allowed} == {}


def test_the_toolkit_imports_torch_and_transformers_only():
    allowed = {"torch", "transformers", "hf_optim", "safetensors"}
    toolkit = files("hf_optim", "toolkit")
    assert {p.name: outside(p) - allowed for p in toolkit if outside(p) - allowed} == {}


def test_the_host_imports_no_plugin_no_kernel_and_no_triton():
    banned = {"hf_optim_plugins", "hf_optim_kernels", "triton"}
    assert {p.name: outside(p) & banned for p in files("hf_optim") if outside(p) & banned} == {}


def test_no_package_imports_from_one_above_it():
    upward = []
    for path in files("hf_optim"):
        name = name_of(path)
        for other, _ in imports(path):
            if other not in MODULES or root(other) != "hf_optim" or other == name:
                continue
            here, there = room(name), room(other)
            if ORDER.index(there) > ORDER.index(here):
                upward.append(f"{name} -> {other}")
            if here == there == "toolkit" and name.count(".") > 1 and other.count(".") > 1:
                mine, its = name.split(".")[2], other.split(".")[2]
                if its == "compat":
                    continue  # it imports nothing
                level = {family: i for i, row in enumerate(FAMILIES) for family in row}
                if mine != its and level[its] >= level[mine]:
                    upward.append(f"{name} -> {other}")
    assert upward == []


def test_no_files_import_each_other_in_a_circle():
    graph = {name: {other for other, _ in imports(path) if other in MODULES} - {name} for name, path in MODULES.items()}
    # Remove what imports nothing that is left, until nothing changes: what stays lies on circles, or above them.
    while leaves := {name for name, others in graph.items() if not others}:
        graph = {name: others - leaves for name, others in graph.items() if name not in leaves}
    readers = defaultdict(set)
    for name, others in graph.items():
        for other in others:
            readers[other].add(name)
    while tops := {name for name in graph if not readers[name]}:
        for name in tops:
            for other in graph.pop(name):
                readers[other].discard(name)
    assert graph == {}


def test_plugins_import_the_public_paths_alone():
    """Besides, helpers of its own family (a leading underscore), and kernels where they are needed."""
    wrong = []
    for path in files("plugins", "hf_optim_plugins"):
        for stem, taken, top in statements(path):
            name = f"{stem}.{taken}" if f"{stem}.{taken}" in MODULES else stem
            if root(name) in ("hf_optim_kernels", "triton"):
                wrong += [f"{path.name} imports {name} at the top"] if top else []
            elif root(name) == "hf_optim_plugins":
                own = name.startswith(name_of(path).rpartition(".")[0] + ".")
                wrong += [] if own and name.split(".")[-1].startswith("_") else [f"{path.name} imports {name}"]
            elif root(name) == "hf_optim" and name not in PLUGIN_API and taken not in public(stem):
                wrong.append(f"{path.name} takes {taken} from {stem}")
    assert wrong == []


def test_every_technique_is_one_file_without_underscore():
    shown = {p.stem for p in files("plugins", "hf_optim_plugins") if not p.stem.startswith("_")}
    assert shown == TECHNIQUES


def test_the_host_names_no_technique():
    # These are words for activations, drivers, weights, architectures, files, places, exchanges, capacities, and for
    # settings of other tools, too.
    words = {"act", "blockwise", "compressed", "distilbert", "local", "offload", "parallelism", "rotation", *ROUNDINGS}
    names = TECHNIQUES - words
    for path in files("hf_optim"):
        if "testing" in path.relative_to(ROOT).parts:
            continue
        # The benchmarks name kernels.
        kernels = {p.parent.name for p in files("kernels")} if path.parts[-2] == "bench" else set()
        # Roundings of a capacity have the names of the systems that round so.
        roundings = set(ROUNDINGS) if path.parent.name == "experts" else set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert node.value not in names - kernels - roundings, (
                    f"{path.relative_to(ROOT)} names the technique {node.value!r}"
                )


def test_no_package_of_ours_shadows_another():
    assert not (ROOT / "plugins" / "__init__.py").exists()
    assert not (ROOT / "kernels" / "__init__.py").exists()
