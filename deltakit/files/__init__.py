"""Reads and writes deltas: the folder, its config and model card, the fingerprint of the backbone, and the Hub."""

from deltakit.files.card import model_card
from deltakit.files.checkpoint import check_tensors, read_folder, write_folder
from deltakit.files.config import backbone_identity, delta_config, expanded, methods_of
from deltakit.files.fingerprint import differences
from deltakit.files.hub import find_folder, upload

__all__ = [
    "backbone_identity",
    "check_tensors",
    "delta_config",
    "differences",
    "expanded",
    "find_folder",
    "methods_of",
    "model_card",
    "read_folder",
    "upload",
    "write_folder",
]
