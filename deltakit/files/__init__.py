"""Bytes in and out: a delta's folder, its config and model card, the fingerprint of its backbone, the formats of others, and
the Hub."""

from deltakit.files.card import model_card
from deltakit.files.checkpoint import (
    DELTA_FILES,
    WEIGHTS_FILE,
    keys_of_weights,
    plain_tensors,
    read_tensors,
    write_folder,
    write_weights,
)
from deltakit.files.config import backbone_identity, delta_config, expanded, methods_of, room_for
from deltakit.files.fingerprint import differences
from deltakit.files.formats import WRITERS, holds_delta, read_saved, refuse_others
from deltakit.files.hub import find_folder, upload
from deltakit.files.schema import from_file
from deltakit.files.values import check_tensors, is_finite

__all__ = [
    "DELTA_FILES",
    "WEIGHTS_FILE",
    "WRITERS",
    "backbone_identity",
    "check_tensors",
    "delta_config",
    "differences",
    "expanded",
    "find_folder",
    "from_file",
    "holds_delta",
    "is_finite",
    "keys_of_weights",
    "methods_of",
    "model_card",
    "plain_tensors",
    "read_saved",
    "read_tensors",
    "refuse_others",
    "room_for",
    "upload",
    "write_folder",
    "write_weights",
]
