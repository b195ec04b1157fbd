"""``python -m hf_optim.cli``."""

from . import main

raise SystemExit(main())
