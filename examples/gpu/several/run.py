"""Run all measurements on several GPUs, in order of importance, each with a time limit; go on after failures.

    OUT=DIR HF_OPTIM_TEST_DATA=DATA PYTHONPATH=.:plugins:kernels python examples/gpu/several/run.py --limit 360
    python examples/gpu/several/page.py DIR

Scripts are started by torchrun with all GPUs, or by themselves on one; what needs one GPU each runs side by side.
``NEWER_TRANSFORMERS``: a wheel of transformers that is unpacked and used by ``mixture.py`` alone, where the installed
one has no all-to-all between experts (before 5.23). ``--only`` names jobs. Checkpoints, about 30 GB, are written to
memory (/dev/shm) if it has room, else to the folder of temporary files, and removed. Output of each job: ``$OUT/JOB.log``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
TINY = bool(os.environ.get("TINY"))
OUT = Path(os.environ.get("OUT", ".")).resolve()
ROOM = 48 << 30


class Job(NamedTuple):
    """A script to run.

    Attributes:
        name: of its log.
        command: the script and its arguments; ``HOME`` stands for the folder of checkpoints.
        gpu: the only GPU that it gets; None for all, one rank on each.
        seconds: its limit.
    """

    name: str
    command: tuple[str, ...]
    gpu: int | None
    seconds: float


def stages() -> list[list[Job]]:
    """Return jobs that run side by side, in order: what several ranks are compared with comes before."""
    llama8, llama70 = ("8b-w4a16", "8b-w8a8", "8b-dense"), ("70b-w4a16", "70b-w8a8", "70b-dense")
    tensor = ("tensor_parallel.py", "--home", "HOME")
    calibration, training = ("calibration.py", "--home", "HOME"), ("training.py", "--home", "HOME")
    return [
        [Job("exchange", ("exchange.py",), None, 90)],
        [Job("reductions", ("reductions.py",), None, 40)],
        [
            Job("tensor-8b-one", (*tensor, "--make", *llama8), 0, 100),
            Job("tensor-70b-one", (*tensor, "--make", *llama70), 1, 100),
        ],
        [Job("tensor-several", (*tensor, *llama8[:2], *llama70[:2], llama8[2], llama70[2]), None, 110)],
        [
            Job("dead-rank", ("dead_rank.py",), None, 100),
            Job("calibration-one", calibration, 0, 90),
            Job("experts-one", (*tensor, "--make", "qwen3moe-w4a16"), 1, 90),
        ],
        [Job("calibration-several", calibration, None, 60)],
        [Job("mixture", ("mixture.py", "--home", "HOME"), None, 80)],
        [Job("experts-several", (*tensor, "qwen3moe-w4a16"), None, 60)],
        [Job("training-one", training, 0, 60)],
        [Job("training-ddp", (*training, "--how", "ddp"), None, 60)],
        [Job("training-fsdp2", (*training, "--how", "fsdp2"), None, 60)],
    ]


def start(job: Job, ranks: int, home: Path, newer: Path | None) -> subprocess.Popen[bytes]:
    """Start a job in a process group of its own."""
    words = [str(home) if word == "HOME" else word for word in job.command]
    environment = {
        **os.environ,
        "NCCL_NVLS_ENABLE": "0",
        "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
        "HF_HUB_OFFLINE": "1",
    }
    environment |= {"OUT": str(OUT), "OMP_NUM_THREADS": "1" if TINY else "8", "TOKENIZERS_PARALLELISM": "false"}
    environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one host, whose name need not be known to any resolver
    if job.gpu is not None and not TINY:
        held = [each for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each]
        environment["CUDA_VISIBLE_DEVICES"] = held[job.gpu % len(held)] if held else str(job.gpu % ranks)
    if job.name == "mixture" and newer is not None:
        environment["PYTHONPATH"] = f"{newer}{os.pathsep}{environment.get('PYTHONPATH', '')}"
    script = str(HERE / words[0])
    if job.name == "dead-rank":
        command = [sys.executable, script, "--ranks", str(ranks)]
    else:
        count = "1" if job.gpu is not None else str(ranks)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        command += ["--nproc-per-node", count, script]
        command += words[1:]
    with (OUT / f"{job.name}.log").open("w") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def end(child: subprocess.Popen[bytes]) -> None:
    """End a job and the ranks that it started."""
    for how in (signal.SIGTERM, signal.SIGKILL):  # torchrun ends its ranks before it ends
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(child.pid, how)
            child.wait(timeout=5.0)


def run(stage: list[Job], ranks: int, home: Path, newer: Path | None, left: float) -> list[dict[str, Any]]:
    """Run the jobs of a stage side by side; return how each ended."""
    began = time.monotonic()
    running = {job: start(job, ranks, home, newer) for job in stage}
    ended: list[dict[str, Any]] = []
    while running:
        time.sleep(0.1)
        for job, child in list(running.items()):
            spent = time.monotonic() - began
            status: int | str | None = child.poll()
            if status is None and spent > min(job.seconds, left):
                end(child)
                child.wait()
                status = "out of time"
            if status is None:
                continue
            del running[job]
            ended.append({"job": job.name, "status": status, "seconds": round(spent, 1)})
            print(f"--- {job.name}: {'done' if status == 0 else f'FAILED ({status})'} after {spent:.0f} s", flush=True)
            lines = (OUT / f"{job.name}.log").read_text(errors="replace").splitlines()
            for line in lines[-3:] if status == 0 else lines[-12:]:
                print(f"    {line[:240]}", flush=True)
    return ended


def require_packages() -> None:
    """Exit at once if a package, or the entry points of the techniques, are not there."""
    names = ("torch", "transformers", "accelerate", "compressed_tensors", "pluggy", "hf_optim", "hf_optim_plugins")
    absent = [name for name in (*names, "hf_optim_kernels") if importlib.util.find_spec(name) is None]
    if not importlib.metadata.entry_points(group="hf_optim"):
        absent.append("the entry points of hf_optim (pip install --no-deps -e .)")
    if absent:
        raise SystemExit(f"not found: {', '.join(absent)}")
    data = Path(os.environ.get("HF_OPTIM_TEST_DATA", "shared"))
    if not any((folder / "babyllama-1m").is_dir() for folder in (data, data / "models")):
        print(f"{data} (HF_OPTIM_TEST_DATA) has no babyllama-1m: the training jobs will fail", flush=True)


def unpacked(home: Path) -> Path | None:
    """Unpack the wheel of a newer transformers, if one was given."""
    wheel = os.environ.get("NEWER_TRANSFORMERS")
    if not wheel:
        return None
    with zipfile.ZipFile(wheel) as file:
        file.extractall(home / "newer")
    return home / "newer"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, help="GPUs to use; all by default, 2 processes with TINY=1")
    parser.add_argument("--limit", type=float, default=360.0, help="seconds for everything")
    parser.add_argument("--only", nargs="*", help="names of jobs")
    parser.add_argument("--home", type=Path, help="where checkpoints are kept; then they stay")
    args = parser.parse_args()
    began = time.monotonic()
    require_packages()
    ranks = args.ranks
    if ranks is None:
        if TINY:
            ranks = 2
        else:
            listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
            ranks = listed.count("GPU ")
    OUT.mkdir(parents=True, exist_ok=True)
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and not TINY and shutil.disk_usage(memory).free > ROOM
    home = args.home or Path(tempfile.mkdtemp(dir=memory if roomy else None))
    home.mkdir(parents=True, exist_ok=True)
    print(f"{ranks} ranks; checkpoints in {home}", flush=True)
    done: list[dict[str, Any]] = []
    try:
        newer = unpacked(home)
        for stage in stages():
            chosen = [job for job in stage if not args.only or job.name in args.only]
            left = args.limit - (time.monotonic() - began)
            if not chosen:
                continue
            if left < 10:
                print(f"no time left for {', '.join(job.name for job in chosen)}", flush=True)
                done += [{"job": job.name, "status": "no time left", "seconds": 0.0} for job in chosen]
                continue
            done += run(chosen, ranks, home, newer, left)
            (OUT / "jobs.json").write_text(json.dumps(done, indent=1) + "\n")
    finally:
        if args.home is None:
            shutil.rmtree(home, ignore_errors=True)
    (OUT / "jobs.json").write_text(json.dumps(done, indent=1) + "\n")
    print(f"everything took {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
