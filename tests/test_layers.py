"""Who may import whom (docs: CONTRIBUTING.md). Walks the import statements, without importing anything."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
from conftest import ROOT


def imports(path: Path) -> list[tuple[str, bool]]:
    """(absolute module name, whether it stands at the top of the file) of every import."""
    package = list(path.relative_to(ROOT).with_suffix("").parts)
    package = package[1:] if package[0] in ("plugins", "kernels") else package
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guarded = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for child in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in guarded:
            continue
        top = node in tree.body
        if isinstance(node, ast.Import):
            found += [(alias.name, top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level] if node.level else []
            if path.name == "__init__.py" and node.level:
                base = package[: len(package) - node.level]
            stem = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            found += [(f"{stem}.{alias.name}" if not node.module else stem, top) for alias in node.names]
    return found


def files(*parts: str) -> list[Path]:
    return sorted(ROOT.joinpath(*parts).rglob("*.py"))


def root(name: str) -> str:
    return name.split(".")[0]


def outside(path: Path) -> set[str]:
    return {root(name) for name, _ in imports(path)} - set(sys.stdlib_module_names) - {"__future__"}


TECHNIQUES = {
    p.stem for p in files("plugins", "hf_optim_plugins") if "def register_techniques" in p.read_text(encoding="utf-8")
}


@pytest.mark.parametrize("path", files("kernels"), ids=lambda p: p.stem)
def test_kernels_import_torch_and_triton_only(path):
    assert outside(path) <= {"torch", "triton", "hf_optim_kernels"}


@pytest.mark.parametrize("path", files("hf_optim", "toolkit"), ids=lambda p: p.stem)
def test_the_toolkit_imports_torch_and_transformers_only(path):
    assert outside(path) <= {"torch", "transformers", "hf_optim", "safetensors"}
    for name, _ in imports(path):
        if root(name) == "hf_optim":
            assert name.startswith(("hf_optim.toolkit", "hf_optim.errors")), name


@pytest.mark.parametrize("path", files("hf_optim"), ids=lambda p: p.stem)
def test_the_host_imports_no_plugin_no_kernel_and_no_triton(path):
    assert not outside(path) & {"hf_optim_plugins", "hf_optim_kernels", "triton"}


@pytest.mark.parametrize("path", files("plugins", "hf_optim_plugins"), ids=lambda p: p.stem)
def test_plugins_import_no_other_technique_and_kernels_lazily(path):
    for name, top in imports(path):
        # A kernel may have the name of the technique that it was written for.
        if root(name) != "hf_optim_kernels":
            assert name.split(".")[-1] not in TECHNIQUES, f"{path.name} imports {name}"
        if root(name) in ("hf_optim_kernels", "triton"):
            assert not top, f"{path.name} imports {name} at the top"


def test_the_host_names_no_technique():
    names = TECHNIQUES - {"local"}  # which is a word for files, too
    for path in files("hf_optim"):
        if path.parts[-2] == "testing":
            continue
        # The benchmarks name kernels.
        kernels = {p.parent.name for p in files("kernels")} if path.parts[-2] == "bench" else set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert node.value not in names - kernels, f"{path.relative_to(ROOT)} names the technique {node.value!r}"


def test_no_package_of_ours_shadows_another():
    assert not (ROOT / "plugins" / "__init__.py").exists()
    assert not (ROOT / "kernels" / "__init__.py").exists()
