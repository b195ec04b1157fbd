"""Replace and transplant the modules of a model, and compare the outputs of two models."""

from . import (
    coded_experts,
    feed_forward_inlets,
    grouped_experts,
    mixed_classes,
    mixtures_in_dense,
    own_loss,
    remote_code_guard,
    replace,
    reversible,
    thread_values,
    tied_blocks,
    transplant,
)
from .captured_forward import CapturedForward, captured
from .coded_experts import CodedExperts
from .compare import main_output, output_difference, relative_difference, rounding_tolerance
from .feed_forward_inlets import Inlet, connect
from .grouped_experts import grouped_where_it_fits
from .mixed_classes import mixed
from .mixtures_in_dense import MixturesInDense
from .modes import eval_mode
from .own_loss import read_own_loss, watch_own_loss
from .remote_code_guard import RefusedByStock
from .replace import ByEitherName, ReplacedModules
from .reversible import Branch, Streams, recall, reversible_step
from .thread_values import ThreadValue
from .tied_blocks import Passage, Step, TiedModel, block_of_step, hidden_and_rest, read_tied_blocks, tie_blocks

__all__ = [
    "Branch",
    "ByEitherName",
    "CapturedForward",
    "CodedExperts",
    "Inlet",
    "MixturesInDense",
    "Passage",
    "RefusedByStock",
    "ReplacedModules",
    "Step",
    "Streams",
    "ThreadValue",
    "TiedModel",
    "block_of_step",
    "captured",
    "coded_experts",
    "connect",
    "eval_mode",
    "feed_forward_inlets",
    "grouped_experts",
    "grouped_where_it_fits",
    "hidden_and_rest",
    "main_output",
    "mixed",
    "mixed_classes",
    "mixtures_in_dense",
    "output_difference",
    "own_loss",
    "read_own_loss",
    "read_tied_blocks",
    "recall",
    "relative_difference",
    "remote_code_guard",
    "replace",
    "reversible",
    "reversible_step",
    "rounding_tolerance",
    "thread_values",
    "tie_blocks",
    "tied_blocks",
    "transplant",
    "watch_own_loss",
]
