"""Kill hf_optim at random moments, and check that nothing is lost: ``make kills``.

Commands run in forks of one process that has imported everything. After each SIGKILL the output must be the complete
old or the complete new checkpoint; the resumed run must end with the bytes of an undisturbed one, and leave nothing
beside it. Of two processes that write to one output, each either succeeds or is refused, and the output is, byte for
byte, that of the last one that succeeded.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

from forks import fork

LAYERS = 6
DATA = '{"text": "the cat sat on a mat and saw what the dog had done to it"}\n' * 24
CALIBRATION = {"samples": 8, "seq_len": 32}
GPTQ = {"technique": "gptq", "bits": 4, "group_size": 16}
TRAINING = {"max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "disable_tqdm": True}
RECIPES = {
    "blockwise": {"steps": [{"technique": "nm", "score": "activation"}, GPTQ], "calibration": CALIBRATION},
    "streamed": {"steps": [GPTQ], "calibration": CALIBRATION, "driver": "streamed"},
    "training": {"steps": [{"technique": "gmp", "sparsity": 0.5}, {"technique": "rtn"}], "training": TRAINING},
    "other": {"steps": [{**GPTQ, "bits": 8}], "calibration": CALIBRATION, "driver": "streamed"},
}
KINDS = ("blockwise", "streamed", "training", "saving", "two at once")
Content = dict[str, bytes]


def content(folder: Path) -> Content:
    """Return what must be the same in every run: weights and configuration. The record and the card have timings."""
    files = sorted(folder.glob("*")) if folder.is_dir() else []
    return {p.name: p.read_bytes() for p in files if p.suffix == ".safetensors" or p.name == "config.json"}


class Kills:
    """A folder with a model, data and recipes; ``one(kind)`` kills once and raises ``AssertionError`` on a loss."""

    def __init__(self, home: Path, seed: int) -> None:
        from tiny_tokenizer import tiny_tokenizer

        from hf_optim.evaluation.cards.card import Card
        from hf_optim.testing.models import tiny_llama

        Card._draw_plots = lambda self, directory: []  # type: ignore[method-assign]
        self.home, self.random, self.number = home, random.Random(seed), 0
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)
        tiny_llama(vocab_size=259, num_hidden_layers=LAYERS).save_pretrained(home / "model", max_shard_size="60KB")
        tiny_tokenizer().save_pretrained(home / "model")
        (home / "data.jsonl").write_text(DATA)
        self.expected: dict[str, Content] = {}
        self.seconds: dict[str, float] = {}
        for name, recipe in RECIPES.items():
            if name == "training":
                recipe = {**recipe, "calibration": {**CALIBRATION, "dataset": str(home / "data.jsonl")}}
            (home / f"{name}.json").write_text(json.dumps(recipe))
        for name in RECIPES:
            started = time.monotonic()
            assert self.finish(self.command(name, home / f"whole-{name}")) == 0, self.log()
            self.seconds[name] = time.monotonic() - started
            self.expected[name] = content(home / f"whole-{name}")

    def log(self) -> str:
        return (self.home / "log").read_text()[-3000:]

    def start(self, call: Callable[[], int]) -> int:
        child = fork()
        if child == 0:
            status = 70
            try:
                log = os.open(self.home / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(log, 1)
                os.dup2(log, 2)
                status = call()
            finally:
                os._exit(status)
        return child

    def command(self, recipe: str, output: Path | str, *options: str) -> int:
        from hf_optim.cli import main

        words = ["compress", self.home / "model", "--recipe", self.home / f"{recipe}.json", "--output", output]
        words += ["--device", "cpu", *options]
        words += ["--calibration", self.home / "data.jsonl"] if recipe != "training" else []
        return self.start(lambda: main([str(word) for word in words]))

    def saving(self, output: Path) -> int:
        """Save two results in turn, many times."""

        def save() -> int:
            import hf_optim
            from hf_optim.checkpoints.source import ModelSource, load_model

            models = [
                hf_optim.optimize(
                    load_model(ModelSource(str(self.home / "model"))), [{"technique": "rtn", "bits": bits}]
                )
                for bits in (8, 4)
            ]
            for round in range(12):
                models[round % 2].save_pretrained(output)
            return 0

        return self.start(save)

    @staticmethod
    def finish(child: int) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def kill(self, child: int, within: float) -> int:
        time.sleep(self.random.uniform(0, within))
        os.kill(child, signal.SIGKILL)
        return self.finish(child)

    def one(self, kind: str) -> None:
        self.number += 1
        home = self.home / f"kill-{self.number}"
        home.mkdir()
        if self.random.random() < 0.5 or kind == "saving":
            shutil.copytree(self.home / "whole-other", home / "out")
        {"saving": self._saving, "two at once": self._pair}.get(kind, self._resumed)(home, kind)
        left = sorted(path.name for path in home.iterdir() if path.name not in ("out", "link"))
        assert not left, f"{kind}: left over: {left}"
        shutil.rmtree(home)

    def _resumed(self, home: Path, kind: str) -> None:
        output = home / "out"
        before, options = content(output), ()
        while True:
            ended = self.kill(self.command(kind, output, *options), 1.1 * self.seconds[kind])
            now = content(output)
            assert now in (before, self.expected[kind]), f"{kind}: neither the old checkpoint nor the new one"
            self.counts[kind]["killed" if ended == -signal.SIGKILL else "ended before the kill"] += 1
            options = ("--resume",)
            if self.random.random() < 0.6:
                break
        assert self.finish(self.command(kind, output, "--resume")) == 0, self.log()
        assert content(output) == self.expected[kind], f"{kind}: the resumed run has other bytes"
        self.counts[kind]["resumed bit-equal"] += 1

    def _saving(self, home: Path, kind: str) -> None:
        output = home / "out"
        if "saving" not in self.seconds:
            started = time.monotonic()
            assert self.finish(self.saving(home / "probe")) == 0, self.log()
            self.seconds["saving"] = time.monotonic() - started
            self.expected["saving 4"] = content(home / "probe")
            shutil.rmtree(home / "probe")
        ended = self.kill(self.saving(output), self.seconds["saving"])
        now = content(output)
        self.counts[kind]["killed" if ended == -signal.SIGKILL else "ended before the kill"] += 1
        old = now == self.expected["other"]
        assert old or self._is_whole(output), f"{kind}: the checkpoint is not whole"
        assert self.finish(self.saving(output)) == 0, self.log()
        assert content(output) == self.expected["saving 4"], f"{kind}: the next save has other bytes"
        self.counts[kind]["whole, saved again"] += 1

    def _is_whole(self, output: Path) -> bool:
        """Return True if the weights are those that ``config.json`` describes: of one save, not of two."""
        now = content(output)
        config = json.loads(now["config.json"])
        bits = config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"]
        if bits == 4:
            return now == self.expected["saving 4"]
        first = self.expected.setdefault("saving 8", now)
        return now == first

    def _pair(self, home: Path, kind: str) -> None:
        output = home / "out"
        (home / "link").symlink_to(home, target_is_directory=True)
        before = content(output)
        first = self.command("streamed", output)
        time.sleep(self.random.uniform(0, 0.3 * self.seconds["streamed"]))
        second = self.command("other", f"{home}/link/./out/")
        dies = self.random.random() < 0.5
        if dies:
            ended = self.kill(first, self.seconds["streamed"])
            self.counts[kind]["killed" if ended == -signal.SIGKILL else "ended before the kill"] += 1
        else:
            ended = self.finish(first)
        other = self.finish(second)
        now = content(output)
        results = [name for name, status in (("streamed", ended), ("other", other)) if status == 0]
        assert {ended, other} <= {0, 2, -signal.SIGKILL}, self.log()
        if ended == -signal.SIGKILL and other != 0:
            assert now in (before, self.expected["streamed"]), f"{kind}: neither old nor new"
        else:
            assert results, self.log()
            assert now in [self.expected[name] for name in results], (
                f"{kind}: {results} succeeded, and neither is there"
            )
        self.counts[kind]["refused" if 2 in (ended, other) else "one after the other"] += 1
        # Resumes what was killed; what the second one began is another recipe's and would be refused.
        options = ("--resume",) if ended == -signal.SIGKILL and other == 2 else ()
        assert self.finish(self.command("streamed", output, *options)) == 0, self.log()
        assert content(output) == self.expected["streamed"], f"{kind}: the next run has other bytes"
        (home / "link").unlink()


def run(kills: int, seed: int, kinds: tuple[str, ...] = KINDS) -> dict[str, Counter[str]]:
    """Kill this many times, one kind after another, and return what happened by kind."""
    with tempfile.TemporaryDirectory() as folder:
        shop = Kills(Path(folder), seed)
        number = 0
        while sum(count["killed"] for count in shop.counts.values()) < kills:
            shop.one(kinds[number % len(kinds)])
            number += 1
        return dict(shop.counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    import hf_optim.cli.jobs.compress
    import hf_optim.training.fit  # noqa: F401

    started = time.monotonic()
    for kind, count in run(args.kills, args.seed).items():
        print(f"{kind}: " + ", ".join(f"{number} {what}" for what, number in sorted(count.items())))
    print(f"nothing lost in {time.monotonic() - started:.0f} s, seed {args.seed}")


if __name__ == "__main__":
    for name, value in {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}.items():
        os.environ.setdefault(name, value)
    sys.path.insert(0, str(Path(__file__).parent))
    main()
