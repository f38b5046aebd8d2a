"""Bytes in and out: a delta's folder, its config and model card, the fingerprint of its backbone, the formats of others, and
the Hub."""

from deltakit.files.config import backbone_identity, delta_config, expanded, methods_of, room_for
from deltakit.files.fingerprint import differences
from deltakit.files.formats import WRITERS, Written, format_of, read_saved, refuse_others
from deltakit.files.hub import Access, find_folder, upload
from deltakit.files.saved import Saved
from deltakit.files.schema import from_file
from deltakit.files.values import check_tensors, is_finite

__all__ = [
    "WRITERS",
    "Access",
    "Saved",
    "Written",
    "backbone_identity",
    "check_tensors",
    "delta_config",
    "differences",
    "expanded",
    "find_folder",
    "format_of",
    "from_file",
    "is_finite",
    "methods_of",
    "read_saved",
    "refuse_others",
    "room_for",
    "upload",
]
