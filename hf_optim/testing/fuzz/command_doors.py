"""Doors for the command line: every command with hostile values of its arguments."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random

from ...cli import COMMANDS, build_parser
from ...errors import OptimError
from ...evaluation.bench.results import FILE
from ...runs.record import FILE_NAME
from .data_doors import mutated_data
from .door import Door, Enter, WrongResult
from .examples import Examples
from .mutations import mutate_json
from .recipe_doors import mutated_recipe
from .work_doors import damage

WORDS = ("", " ", "x", "-1", "0", "1", "2", "1e9", "9" * 30, "nan", "cpu", "cuda:99", "meta", "float32", "org/name")
TEXTS = (
    "a\nb",
    "\x1b[31m",
    "\u202e",
    "é" * 300,
    "x" * 5000,
    "~",
    "~nobody/x",
    "$HOME",
    "*",
    "a:b:c",
    "http://localhost:1/x",
)
PATHS = (
    ".",
    "..",
    "file.txt",
    "file.txt/x",
    "folder",
    "link",
    "loop",
    "dangling",
    "pipe",
    "a/b/c",
    "/",
    "/proc/x",
    "a\0b",
)
# Measuring a result takes child processes, and a benchmark takes its time: these are only given what is refused.
SLOW = {"demo": (".", "file.txt", "file.txt/x", "pipe", "loop", "/", "/proc/x", "a\0b"), "eval": TEXTS + PATHS}


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """Make a folder with files of every kind the current directory in the body, which must leave them as they were."""
    folder.mkdir(parents=True)
    (folder / "file.txt").write_text("kept")
    (folder / "folder").mkdir()
    (folder / "folder" / "kept.txt").write_text("kept")
    (folder / "target").mkdir()
    for name, target in (("link", "target"), ("loop", "loop"), ("dangling", "nowhere")):
        (folder / name).symlink_to(target)
    os.mkfifo(folder / "pipe")
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
        if (folder / "file.txt").read_text() != "kept" or (folder / "folder" / "kept.txt").read_text() != "kept":
            raise WrongResult("a file of the caller was changed")
        if (
            not all((folder / name).is_symlink() for name in ("link", "loop", "dangling"))
            or not (folder / "pipe").is_fifo()
        ):
            raise WrongResult("a link or a pipe of the caller was replaced")
        if not os.path.samestat(os.stat("."), os.stat(folder)):
            raise WrongResult("the current directory was replaced")
    finally:
        os.chdir(before)


def run(arguments: list[str]) -> None:
    """Run a command in this process, without its handler of unexpected errors. Raises what it raises."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            parsed = build_parser().parse_args(arguments)
        except SystemExit as error:
            if error.code:
                raise OptimError(output.getvalue().strip().splitlines()[-1]) from error
            return
        if importlib.import_module(f"hf_optim.cli.{parsed.command}").run(parsed) not in (0, 1):
            raise WrongResult("a command returned an unknown status")


def _command(name: str) -> Enter:
    def enter(examples: Examples, home: Path, random: Random) -> None:
        with _inside(home / "a" / "b"):
            arguments = _arguments(name, examples, home, random)
            if random.random() < 0.1:
                arguments.insert(random.randrange(len(arguments) + 1), random.choice((*WORDS, *TEXTS)))
            run([name, *arguments])

    return enter


def _arguments(name: str, examples: Examples, home: Path, random: Random) -> list[str]:
    """Return arguments that a user could give, with one to three hostile values."""
    given = _valid(name, examples, home, random)
    extra = [option for option in OPTIONS.get(name, ()) if random.random() < 0.05]
    parts = [[value] for value in given[0]] + [[option, value] for option, value in given[1].items()]
    parts += [[option, _hostile(name, option, examples, home, random)] for option in extra]
    for part in random.sample(parts, min(len(parts), random.choice((0, 0, 1, 1, 2)))):
        part[-1] = _hostile(name, part[0], examples, home, random)
    return [word for part in parts for word in part]


def _hostile(name: str, what: str, examples: Examples, home: Path, random: Random) -> str:
    if name in SLOW and (name == "demo" or what == "--data"):
        return random.choice(SLOW[name])
    if what == "--eval":
        return random.choice(PATHS)
    if random.random() < 0.2:
        return str(_hostile_file(examples, home, random))
    return random.choice(random.choice((WORDS, TEXTS, PATHS, PATHS, ("/dev/null", "/dev/zero"))))


def _hostile_file(examples: Examples, home: Path, random: Random) -> Path:
    kind = random.randrange(3)
    if kind == 0:
        return mutated_recipe(examples, home, random)
    if kind == 1:
        return mutated_data(examples, home, random)
    target = home / "model"
    if not target.exists():
        shutil.copytree(examples.dense, target)
        damage(target, random)
    return target


def _valid(name: str, examples: Examples, home: Path, random: Random) -> tuple[list[str], dict[str, str]]:
    model, texts = str(examples.with_tokenizer), str(examples.texts)
    if name == "list":
        return [random.choice(("rtn", "w4a16", "gmp"))], {}
    if name == "check":
        return [str(mutated_recipe(examples, home, random, few=True))], {"--model": model}
    if name == "compress":
        recipe = random.choice(("rtn", "nm", "magnitude50", str(mutated_recipe(examples, home, random, few=True))))
        sizes = {"--samples": "2", "--seq-len": "8", "--device": "cpu"}
        output = random.choice(("out", "link", "folder", "target", "a/b"))
        return [model], {"--recipe": recipe, "--output": output, "--calibration": texts, **sizes}
    if name == "eval":
        return [model], {"--data": texts, "--samples": "1", "--seq-len": "8", "--device": "cpu"}
    if name in ("card", "push"):
        folder = home / "card"
        folder.mkdir()
        (folder / FILE_NAME).write_bytes(mutate_json(examples.record, random))
        return ([str(folder)] if name == "card" else [str(folder), "me/x"]), {}
    if name == "bench":
        (home / "bench").mkdir()
        (home / "bench" / FILE).write_bytes(mutate_json(examples.bench_results, random))
        return [], random.choice(({"--render": str(home / "bench")}, {"--op": "nothing"}, {"--end-to-end": "nothing"}))
    return [], {"--output": "file.txt"}


OPTIONS = {
    "check": ("--model",),
    "compress": ("--calibration", "--train", "--eval", "--driver", "--spill", "--text-column", "--split", "--samples",
                 "--seq-len", "--seed", "--revision", "--dtype", "--device"),
    "eval": ("--tokenizer", "--text-column", "--split", "--samples", "--seq-len", "--seed", "--revision", "--dtype",
             "--device"),
    "push": ("--revision", "--message"),
    "bench": ("--shape", "--rows", "--dtype", "--scheme", "--cache", "--batch", "--new-tokens", "--prefill",
              "--time-limit", "--output"),
}  # fmt: skip

DOORS = tuple(Door("command", name, _command(name)) for name in COMMANDS)
