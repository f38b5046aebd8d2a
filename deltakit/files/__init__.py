"""Bytes in and out: a delta's folder, its config and model card, the fingerprint of its backbone, the formats of others, and
the Hub."""

from deltakit.files.card import CardDetails, model_card
from deltakit.files.checkpoint import DELTA_FILES, WEIGHTS_FILE, plain_tensors, write_weights
from deltakit.files.config import backbone_identity, delta_config, expanded, expanded_each, methods_of, room_for
from deltakit.files.fingerprint import differences
from deltakit.files.formats import WRITERS, Written, deltas_below, format_of, formats_in, read_saved, refuse_others
from deltakit.files.hub import Access, called, fetch_config, find_folder, upload
from deltakit.files.repository import is_repository, loaded_from
from deltakit.files.saved import Saved
from deltakit.files.schema import checked as checked_data
from deltakit.files.schema import from_file, read_method
from deltakit.files.tensor_file import read_tensors
from deltakit.files.training_marks import TRAINED_DELTA, deltas_by_prefix, deltas_in
from deltakit.files.values import check_tensors, is_finite

__all__ = [
    "DELTA_FILES",
    "TRAINED_DELTA",
    "WEIGHTS_FILE",
    "WRITERS",
    "Access",
    "CardDetails",
    "Saved",
    "Written",
    "backbone_identity",
    "called",
    "check_tensors",
    "checked_data",
    "delta_config",
    "deltas_below",
    "deltas_by_prefix",
    "deltas_in",
    "differences",
    "expanded",
    "expanded_each",
    "fetch_config",
    "find_folder",
    "format_of",
    "formats_in",
    "from_file",
    "is_finite",
    "is_repository",
    "loaded_from",
    "methods_of",
    "model_card",
    "plain_tensors",
    "read_method",
    "read_saved",
    "read_tensors",
    "refuse_others",
    "room_for",
    "upload",
    "write_weights",
]
