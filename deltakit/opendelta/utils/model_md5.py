"""A hash of a model's structure."""

import hashlib
import json

from torch import nn

from deltakit.files import backbone_identity


def gen_model_hash(model: nn.Module, with_parameters: bool = True) -> str:
    """Returns a hash of what deltakit's files say of a backbone: its structure, and samples of its values.

    It is not OpenDelta's hash.

    Args:
        with_parameters: whether the samples count.
    """
    found = dict(backbone_identity(model)["fingerprint"])
    if not with_parameters:
        found = {name: value for name, value in found.items() if "value" not in name and "sample" not in name}
    return hashlib.md5(json.dumps(found, sort_keys=True, default=str).encode(), usedforsecurity=False).hexdigest()
