"""The names of AdapterHub's files, and of the tensors in them."""

import re
from collections.abc import Mapping

from torch import Tensor

from deltakit.files.formats.adapter_config import CONFIG

TENSORS, PICKLE = "adapter.safetensors", "pytorch_adapter.bin"
HEAD, FUSION = "head_config.json", "adapter_fusion_config.json"
IN_ADAPTERHUB = "; use it with AdapterHub's library"
"""What to do with an adapter that deltakit does not have."""
FILES = (CONFIG, TENSORS, PICKLE, HEAD, FUSION)

_OLD = re.compile(r"\.(attention|layer)_text_(task|lang)_adapters\.")
_PLACES = re.compile(
    r"(?:(?P<owner>.+)\.)?"
    r"(?P<kind>adapters|invertible_adapters|loras|shared_parameters|prefix_tunings|prefix_gates|refts)"
    r"\.(?P<name>[^.]+)\.(?P<rest>.+)"
)


class Key:
    """What the key of a tensor says.

    Attributes:
        owner: the path of the module that holds the adapter.
        kind: what AdapterHub calls the dictionary of adapters there.
        name: the adapter's name.
        rest: the tensor's name in the adapter.
    """

    def __init__(self, key: str) -> None:
        # The names of the first releases.
        found = _PLACES.fullmatch(_OLD.sub(".adapters.", key))
        self.owner, self.kind, self.name, self.rest = (
            (found["owner"] or "", found["kind"], found["name"], found["rest"])
            if found is not None
            else ("", "", "", "")
        )


def by_place(tensors: Mapping[str, Tensor], kind: str, name: object) -> dict[str, dict[str, Tensor]]:
    """Returns the tensors of an adapter by the path of their owner and their name, those of one kind alone.

    The owners are in the order of the model's layers; safetensors sorts them as text.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for full, tensor in tensors.items():
        key = Key(full)
        if (key.kind, key.name) == (kind, name):
            found.setdefault(key.owner, {})[key.rest] = tensor
    return dict(sorted(found.items(), key=lambda item: [int(number) for number in re.findall(r"\d+", item[0])]))
