"""Part: one line of an account."""

from dataclasses import dataclass

from torch import Tensor

from deltakit.core import global_bytes, local_bytes


@dataclass
class Part:
    """One line of an account.

    `count`: the number of values as the architecture has them, however a quantizer packs them; None if it is not known.
    `bytes` are those of all processes together, and `local` those of this process; None if they are not known. `note` says
    what a reader must know besides.
    """

    count: int | None = 0
    bytes: int | None = 0
    local: int | None = 0
    note: str = ""

    def add(self, tensor: Tensor, count: int) -> None:
        """Adds a tensor."""
        self.count = (self.count or 0) + count
        self.bytes = (self.bytes or 0) + global_bytes(tensor)
        self.local = (self.local or 0) + local_bytes(tensor)
