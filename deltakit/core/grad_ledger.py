"""Which parameters of a backbone ask for gradients while deltas are attached, and how it was before."""

from collections.abc import Collection
from dataclasses import dataclass, field

from torch import nn

from deltakit.core.paths import own_parameters


@dataclass
class GradLedger:
    """What was changed in `requires_grad`: for each parameter's name, how the user had it and how we set it.

    All deltas attached to one backbone share one grad_ledger, so that the last one to leave restores everything.
    """

    original: dict[str, bool] = field(default_factory=dict)
    ours: dict[str, bool] = field(default_factory=dict)

    def apply(self, backbone: nn.Module, *, train: Collection[str], hold: Collection[str], freeze: bool) -> None:
        """Parameters named in `train` ask for gradients, those in `hold` and, with `freeze`, all others do not.

        What none of these names goes back to how the user had it. A flag that the user changed since we set it is
        the user's: it is remembered as such.
        """
        for name, parameter in own_parameters(backbone):
            if parameter.requires_grad != self.ours.get(name, parameter.requires_grad):
                self.original[name] = parameter.requires_grad
            if name in train:
                wanted = True
            elif freeze or name in hold:
                wanted = False
            else:
                wanted = self.original.get(name, parameter.requires_grad)
            if wanted != parameter.requires_grad:
                self.original.setdefault(name, parameter.requires_grad)
                parameter.requires_grad_(wanted)
            self.ours[name] = wanted
