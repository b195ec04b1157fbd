"""All doors of the fuzzer."""

from __future__ import annotations

from . import checkpoint_doors, command_doors, data_doors, recipe_doors, record_doors, work_doors
from .door import Door

DOORS: tuple[Door, ...] = (
    *recipe_doors.DOORS,
    *checkpoint_doors.DOORS,
    *record_doors.DOORS,
    *work_doors.DOORS,
    *data_doors.DOORS,
    *command_doors.DOORS,
)
