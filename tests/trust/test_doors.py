"""Every place where a checkpoint is opened, with every checkpoint of a stranger: no code runs, no wrong file is read.

A new door is one row of ``DOORS``, a new kind of checkpoint one row of ``hostile_checkpoints``.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import signal

import hostile_checkpoints as hostile
import pytest
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hf_optim import OptimError
from hf_optim.checkpoints import meta_model
from hf_optim.checkpoints.source import ModelSource, find_multimodal_processor, load_model, load_processor
from hf_optim.cli import main
from hf_optim.cli.jobs import comparing, timed_models
from hf_optim.evaluation.bench.models import build as build_for_bench
from hf_optim.recipes.config import DataConfig
from hf_optim.toolkit.distillation import teachers

RTN = {"steps": [{"technique": "rtn", "bits": 4, "group_size": 16}]}
SECONDS = 20


class CommandRefused(OptimError):
    pass


def command(*argv):
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        status = main([str(word) for word in argv])
    if status:
        raise CommandRefused(err.getvalue())


def recipe_file(home):
    path = home.parent / "recipe.json"
    path.write_text(json.dumps(RTN))
    return path


def data_file(home):
    path = home.parent / "eval.jsonl"
    path.write_text('{"text": "the cat sat on the mat, and the dog saw it all the time"}\n' * 8)
    return path


def compress(home, *options):
    command("compress", home, "--recipe", recipe_file(home), "--output", home.parent / "out", *options)


def load_all(home):
    source = ModelSource(str(home))
    load_processor(source, type(load_model(source)))
    find_multimodal_processor(str(home), **source.load_kwargs)


def quantizer(home):
    optimum = pytest.importorskip("hf_optim.lifecycle.optimum")
    return optimum.OptimQuantizer.from_pretrained(home)


def teacher(home):
    teachers.hash_files(str(home))
    teachers.load(str(home), "kd")
    teachers.load_tokenizer(str(home))


def evaluated(home):
    command("eval", home, "--data", data_file(home), "--seq-len", 16, "--device", "cpu")


def compared(home):
    """What ``hf-optim compare`` opens itself; it measures by ``hf-optim eval``."""
    job = comparing.Comparison((str(home), str(home)), ModelSource(""), DataConfig())
    comparing._require_comparable(job)


def bench(home):
    import torch

    build_for_bench(str(home), "dense", torch.float32, torch.device("cpu"))


# name -> (opens the checkpoint in a folder, reads its weights)
DOORS = {
    "auto": (lambda home: LlamaForCausalLM.from_pretrained(home, optim_config="auto"), True),
    "AutoModel, auto": (lambda home: AutoModelForCausalLM.from_pretrained(home, optim_config="auto"), True),
    "recipe": (lambda home: LlamaForCausalLM.from_pretrained(home, optim_config=RTN), True),
    "load_model": (load_all, True),
    "meta model": (lambda home: meta_model.build(ModelSource(str(home))), True),
    "teacher": (teacher, True),
    "optimum": (quantizer, True),
    "compress": (compress, True),
    "compress --driver streamed": (lambda home: compress(home, "--driver", "streamed"), True),
    "eval": (evaluated, True),
    "check": (lambda home: command("check", recipe_file(home), "--model", home), True),
    "serving": (lambda home: command("serving", home), True),
    "compare": (compared, False),
    "bench": (bench, False),
}
READ_WEIGHTS = [name for name, (_, reads) in DOORS.items() if reads]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return hostile.build(tmp_path_factory.mktemp("good") / "model")


@pytest.fixture
def home(good, tmp_path):
    return shutil.copytree(good, tmp_path / "model")


@pytest.fixture
def canary(tmp_path):
    return hostile.Canary(tmp_path)


@pytest.fixture(autouse=True)
def isolated(monkeypatch, tmp_path):
    """No answer to a question on the terminal, no cache of modules shared between tests, and no waiting for ever."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))

    def late(*_):
        raise TimeoutError("opening the checkpoint takes too long")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.many
@pytest.mark.parametrize("door", READ_WEIGHTS)
def test_files_of_a_stranger_are_refused_by_name(door, good, tmp_path_factory):
    failures = []
    for what, spoil in hostile.WEIGHTS.items():
        root = tmp_path_factory.mktemp("case")
        home, canary = shutil.copytree(good, root / "model"), hostile.Canary(root)
        named = spoil(home, canary)
        if door.startswith("AutoModel") and "adapter that" in what:
            continue  # transformers itself opens it before hf_optim is called
        try:
            DOORS[door][0](home)
            failures.append(f"{what}: opened")
        except OptimError as error:
            if named not in str(error):
                failures.append(f"{what}: {error}")
        if canary.ran:
            failures.append(f"{what}: code ran")
    assert not failures, "\n".join(failures)


@pytest.mark.many
@pytest.mark.parametrize("what", hostile.CODE)
@pytest.mark.parametrize("door", [name for name in DOORS if not name.startswith("AutoModel")])
def test_code_of_a_stranger_does_not_run(door, what, home, canary):
    hostile.CODE[what](home, canary)
    with contextlib.suppress(OptimError):
        DOORS[door][0](home)
    assert not canary.ran


@pytest.mark.many
@pytest.mark.parametrize("door", DOORS)
def test_a_sound_checkpoint_is_opened(door, home):
    DOORS[door][0](home)


def test_the_canary_runs_if_it_is_trusted(home, canary):
    hostile.own_module(home, canary)
    with contextlib.suppress(Exception):
        load_model(ModelSource(str(home), trust_remote_code=True))
    assert canary.ran


@pytest.mark.parametrize("word", ["false", "no", 1, None])
def test_only_true_is_the_word_of_the_caller(word, home, canary):
    hostile.own_module(home, canary)
    load_model(ModelSource(str(home), trust_remote_code=word))
    LlamaForCausalLM.from_pretrained(home, optim_config="auto", trust_remote_code=word)
    assert not canary.ran


@pytest.fixture
def measured_here(monkeypatch):
    """Let the measuring of ``compress --eval`` run in this process; returns the command lines."""
    commands = []

    def run(argv, **_):
        commands.append(argv)
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            if argv[2] == timed_models.__name__:
                monkeypatch.setattr("sys.argv", argv[2:])
                status = timed_models.main()
            else:
                status = main(argv[3:])
        return type("Done", (), {"returncode": status, "stdout": out.getvalue(), "stderr": err.getvalue()})

    monkeypatch.setattr("subprocess.run", run)
    return commands


@pytest.mark.many
@pytest.mark.parametrize("driver", ["auto", "streamed"])
@pytest.mark.parametrize("what", ["a module of another repository", "a tokenizer's module in another repository"])
def test_a_result_is_measured_without_the_code_that_its_source_names(driver, what, home, canary, measured_here):
    hostile.CODE[what](home, canary)
    compress(home, "--driver", driver, "--eval", data_file(home), "--seq-len", 16, "--device", "cpu")
    evaluated, timed = (
        [argv for argv in measured_here if (argv[2] == timed_models.__name__) is timing] for timing in (False, True)
    )
    assert len(evaluated) >= 2
    assert not any("--trust-remote-code" in argv for argv in evaluated)
    (candidates,) = [json.loads(argv[3])["candidates"] for argv in timed]
    assert len(candidates) >= 2
    assert not any(candidate["trust_remote_code"] for candidate in candidates)
    assert not canary.ran
    for path in (home.parent / "out").glob("*.json"):
        assert "auto_map" not in path.read_text(), path.name
    json.loads((home.parent / "out" / "config.json").read_text())


def test_a_question_on_the_terminal_is_never_asked(home, canary, monkeypatch):
    asked = []
    monkeypatch.setattr("builtins.input", lambda *text: asked.append(text) or "y")
    hostile.unknown_model(home, canary)
    for name in ("compress", "check", "eval", "teacher", "bench", "load_model"):
        with pytest.raises(OptimError, match=r"trust_remote_code|code of its own"):
            DOORS[name][0](home)
    assert asked == []
    assert not canary.ran


def test_a_kernel_in_the_configuration_needs_the_word_of_the_caller(home):
    for key in ("attn_implementation", "_attn_implementation"):
        hostile.edit_json(home / "config.json", **{key: "org/kernel"})
        for name in ("load_model", "auto", "recipe", "check", "teacher"):
            with pytest.raises(OptimError, match="names the kernel 'org/kernel'"):
                DOORS[name][0](home)


def test_other_weights_than_safetensors_are_refused_at_the_python_doors(home):
    for config in ("auto", RTN):
        for option in ({"use_safetensors": False}, {"gguf_file": "model.gguf"}):
            with pytest.raises(OptimError, match="safetensors only"):
                LlamaForCausalLM.from_pretrained(home, optim_config=config, **option)


def test_an_upload_does_not_follow_links(home):
    from hf_optim.checkpoints.hub import push

    (home / "notes").symlink_to("/etc/hostname")
    with pytest.raises(OptimError, match=r"'notes' of .* is a link to /etc/hostname"):
        push(home, "me/model")
