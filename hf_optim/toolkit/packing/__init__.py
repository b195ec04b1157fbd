"""Batches without padding: the valid tokens of all rows as one, with attention within each document."""

from .attach import (
    SETTING,
    attach_packing,
    attach_stored_packing,
    detach_packing,
    packing_of,
    store_setting,
    stored_setting,
)
from .documents import Documents, read_rows
from .encoders import KINDS, find_encoder
from .per_document import attend_documents, attend_groups, attend_padded

__all__ = [
    "KINDS",
    "SETTING",
    "Documents",
    "attach_packing",
    "attach_stored_packing",
    "attend_documents",
    "attend_groups",
    "attend_padded",
    "detach_packing",
    "find_encoder",
    "packing_of",
    "read_rows",
    "store_setting",
    "stored_setting",
]
