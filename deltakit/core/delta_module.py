"""DeltaModule: the base class of the small modules that methods attach to their targets.

A method author does not derive from this class, but from one of the kinds in `deltakit.ops` (OutputMap, InputMap, LowRank,
WeightMap, CallContext). The kinds implement what hooks call, and add the function that the author writes.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from deltakit.core.attached_module import TRAINING, AttachedModule
from deltakit.core.design import Design
from deltakit.core.target import Target
from deltakit.errors import TargetError


class DeltaModule(AttachedModule):
    """A small module at one target. This half of it is for method authors; hooks use the other, `AttachedModule`."""

    tags: ClassVar[Mapping[str, str]] = {}
    """A tag for each parameter, by its name or by the name of the child module that holds it. `Delta.parameter_groups` groups
    by tags, and parameters tagged "frozen" are never trained. Buffers tagged "training" are in the checkpoints of training
    frameworks, and in no file of a delta."""

    design: ClassVar[Design] = Design()
    """The design of methods with this kind, where they say nothing else."""

    reads_call: ClassVar[bool] = False
    """Whether it reads `current_call()`: the ids, mask and position of the backbone's call."""

    @property
    def shared(self) -> Any:
        """The module that all delta modules of the method share (`Method.build_shared`); None if there is none."""
        return self.__dict__.get("_shared", (None,))[0]

    def take_sum(self, parts: Sequence[tuple[float, "DeltaModule"]]) -> tuple[float, float]:
        """Sets its parameters to a weighted sum of delta modules at one target.

        Args:
            parts: pairs of a weight (any finite number) and a delta module.

        Returns:
            The squared truncation error, and the squared norm of the sum.

        Raises:
            TargetError: if the method is not linear in its parameters, so that no such sum exists.
        """
        raise TargetError(
            f"{self.word()} is not linear in its parameters, so it has no weighted sums; run the deltas one by one"
        )

    def set_start_values(self, target: Target) -> None:
        """Sets all its parameters to their start values, if they are wanted (`wants_start_values`), as building it does.

        Only classes that a method lists in `Method.copied` need it.
        """
        raise NotImplementedError(f"{type(self).__name__} does not override set_start_values()")

    def start_at(self, directions: Tensor) -> None:
        """Sets its start values to those that read these directions of the input, and change nothing (`attach_from_data`).

        Args:
            directions: orthonormal rows [r, d_in], where r is the rank of its method (`Method.with_rank`).

        Raises:
            TargetError: if the method does not start from data.
        """
        raise TargetError(f"{type(self).__name__} does not start from data")

    def saved_state(self) -> dict[str, Tensor]:
        """Returns the tensors that a file holds for this target, by the method's own names."""
        if self._is_flat():
            return {name: parameter.detach() for name, parameter in self._parameters.items() if parameter is not None}
        return {name: value for name, value in self.state_dict().items() if self.tag_of(name) != TRAINING}

    @classmethod
    def computes_saved_state(cls) -> bool:
        """Returns whether a file holds something else than its state dict."""
        return cls.saved_state is not DeltaModule.saved_state

    def holds_saved_state(self) -> bool:
        """Returns whether the tensors of `saved_state` are its own parameters, so that writing into them loads it."""
        return type(self).load_saved is DeltaModule.load_saved and not self.computes_saved_state() and self._is_flat()

    def load_saved(self, state: Mapping[str, Tensor]) -> None:
        """Loads tensors that `saved_state` returned. Names and shapes must match exactly."""
        own = self.saved_state() if self._is_flat() else {}
        if own.keys() == state.keys() and all(own[name].shape == value.shape for name, value in state.items()):
            for name, value in state.items():
                own[name].copy_(value)
        else:
            training = {name: value for name, value in self.state_dict().items() if self.tag_of(name) == TRAINING}
            self.load_state_dict({**training, **state})

    def _is_flat(self) -> bool:
        # Most delta modules are. nn.Module's own functions take ten times as long, and a load calls them for each target.
        return not self._modules and not self._buffers

    def summary(self) -> str:
        """Returns the configuration in a few words for trees and reports, such as `r=8 alpha=16`."""
        return ""
