"""Run ``hf-optim`` and print, as the last line, its exit status, its peak resident bytes and its seconds as JSON."""

from __future__ import annotations

import json
import sys
import time

started = time.perf_counter()

from hf_optim.cli import main  # noqa: E402
from hf_optim.runs.memory import high_water  # noqa: E402

status = main(sys.argv[1:])
print("\n" + json.dumps({"status": status, "peak": high_water(), "seconds": time.perf_counter() - started}))
