"""``python -m hf_optim.testing.fuzz``: fuzz everything that hf_optim reads."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys

MEMORY = 24 * 2**30


def main() -> int:
    """Run the fuzzer. Returns 1 if there are findings."""
    parser = argparse.ArgumentParser(prog="python -m hf_optim.testing.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=3000, metavar="N", help="how many inputs (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the mutations (default: 0)")
    parser.add_argument("--kind", metavar="NAME", help="only inputs of this kind: recipe, config, record ...")
    parser.add_argument("--door", metavar="NAME", help="only doors of this name: check, auto, card ...")
    parser.add_argument(
        "--seconds", type=float, default=20.0, metavar="S", help="processor time of one input (default: 20)"
    )
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"  # before the libraries are imported: a name in an input is not looked up
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    import torch

    from .doors import DOORS
    from .runner import run

    torch.set_num_threads(1)
    doors = [door for door in DOORS if args.kind in (None, door.kind) and args.door in (None, door.name)]
    if not doors:
        parser.error("no such kind or door")
    report = run(args.inputs, args.seed, doors, args.seconds, verbose=True)
    print(report.table())
    return 1 if report.findings else 0


if __name__ == "__main__":
    sys.exit(main())
