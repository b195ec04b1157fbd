"""The tiny models of the conformance suite, under a short name for the tests."""

from hf_optim.testing.models import *  # noqa: F403
