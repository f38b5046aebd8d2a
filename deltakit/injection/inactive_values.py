"""The hook that warns when a state dict lacks what deltas have trained, because they are not active.

A fully trained tensor has one name in a state dict. While its delta is not active, that name has the backbone's own value.
"""

from torch import nn

from deltakit.core import deltas_left_out, records_of
from deltakit.errors import warn
from deltakit.injection.narrowed_state_dict import is_whole_state_dict
from deltakit.injection.saving_call import saving_call


class WarnOfInactive:
    """Stands on a backbone with deltas. It is asked before the backbone's state dict is made."""

    def __call__(self, backbone: nn.Module, prefix: str, keep_vars: bool) -> None:
        # The state dicts that deltakit itself makes say whose values they have, or are written beside the deltas' files.
        if deltas_left_out() or is_whole_state_dict():
            return
        for record in records_of(backbone):
            names = sorted(name for name in record.fully_trained if name in record.trained_values)
            if names and not record.active and not record.leaving and not _written_beside(backbone):
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                warn(
                    f"state_dict() has the backbone's own values of {prefix}{names[0]}{more}, and not those of delta "
                    f"{record.name!r}, which is not active; set its active = True first, call its save(folder), or take "
                    "base_state_dict(model) if you mean the backbone's own"
                )


def _written_beside(backbone: nn.Module) -> bool:
    call = saving_call(backbone)
    return call is not None and call.leaves_deltas_out
