"""Run ``hf-optim`` and print, as the last line, its exit status, its peak resident bytes and its seconds as JSON."""

from __future__ import annotations

import json
import resource
import sys
import time

started = time.perf_counter()

from hf_optim.cli import main  # noqa: E402

status = main(sys.argv[1:])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print("\n" + json.dumps({"status": status, "peak": peak, "seconds": time.perf_counter() - started}))
