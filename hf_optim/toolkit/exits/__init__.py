"""Early exits of a model: heads after some of its blocks, what decides where to stop, their files, and runs that stop.

The exits are not part of the model's state dict: stock transformers loads the checkpoint and computes all blocks.
"""

from .adaptive import (
    RULES,
    ExitOutput,
    chosen_exit,
    forward_with_exits,
    is_language_model,
    pooled,
    read_by_head,
    select_rows,
)
from .attachment import attach_exits, detach_exits, exits_of, find_blocks, require_exits
from .files import FILE, attach_stored_exits, copy_exits, load_exits, save_exits, store_entry
from .heads import ExitHeads
from .held import HeldRun, run_held
from .runs import ExitRun, record_states, run_blocks, run_to_exit
from .settings import CLASSIFIERS, EARLY_EXIT, ENTRY, HEADS, LAWS, ExitSettings, store_settings, stored_settings
from .structure import no_cache
from .views import view

__all__ = [
    "CLASSIFIERS",
    "EARLY_EXIT",
    "ENTRY",
    "FILE",
    "HEADS",
    "LAWS",
    "RULES",
    "ExitHeads",
    "ExitOutput",
    "ExitRun",
    "ExitSettings",
    "HeldRun",
    "attach_exits",
    "attach_stored_exits",
    "chosen_exit",
    "copy_exits",
    "detach_exits",
    "exits_of",
    "find_blocks",
    "forward_with_exits",
    "is_language_model",
    "load_exits",
    "no_cache",
    "pooled",
    "read_by_head",
    "record_states",
    "require_exits",
    "run_blocks",
    "run_held",
    "run_to_exit",
    "save_exits",
    "select_rows",
    "store_entry",
    "store_settings",
    "stored_settings",
    "view",
]
