"""Methods that change a weight: what each of them refuses, and the sums of those that are low-rank."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from deltakit.core import METHODS, DeltaModule, Method, Target
from deltakit.errors import OptionError, TargetError
from deltakit.ops.forwards import refuse_max_norm
from deltakit.ops.kinds.low_rank import LowRank
from deltakit.ops.option_checks import check_dropout
from deltakit.ops.sizes import sizes, stack_of
from deltakit.ops.usual_positions import QUERIES_AND_VALUES


@dataclass(frozen=True, kw_only=True)
class WeightMethod(Method):
    """A method whose delta modules change a weight, and are built from a target and the method itself.

    Its default positions are the query and value projections.

    Args:
        untie: whether to adapt a module alone although other modules share its weight.
    """

    on_stacks: ClassVar[bool] = False
    """Whether it can be on a stack of matrices, such as the experts of a mixture."""

    untie: bool = False

    def positions(self) -> tuple[tuple[str, ...], ...]:
        return QUERIES_AND_VALUES

    def build_at(self, target: Target) -> DeltaModule:
        name = type(self).__name__
        check_weight(target, name, untie=self.untie)
        if stack_of(target) and not self.on_stacks:
            raise TargetError(
                f"{target.named}: {name} changes one matrix, and this is a stack of them; use LoRA, or leave it out with "
                "exclude="
            )
        build: Any = self.kind_at(target) or self.kind
        module: DeltaModule = build(target, self)
        return module


@dataclass(frozen=True, kw_only=True)
class LowRankMethod(WeightMethod):
    """A method whose delta modules are `LowRank`: products of factors that they compute. A weighted sum of them is a LoRA.

    Args:
        dropout: the probability in [0, 1) with which inputs of the update are dropped in training.
    """

    dropout: float = 0.0

    def validate(self) -> None:
        check_dropout(type(self).__name__, self.dropout)

    def build_at(self, target: Target) -> DeltaModule:
        check_patch_dropout(target, type(self).__name__, self.kind, self.dropout)
        return super().build_at(target)

    @classmethod
    def combination(cls, parts: Sequence[DeltaModule], rank: int | None) -> Method:
        own = [part for part in parts if isinstance(part, LowRank)]
        # No sum has a higher rank than the smaller side of the weight, where the factors of these methods may have more.
        full = min(min(part.d_in, part.d_out) for part in own)
        r = rank if rank is not None else min(full, sum(part.factors()[0].shape[-2] for part in own))
        lora: Any = METHODS["lora"]
        method: Method = lora(r=r, alpha=r)
        return method


def check_weight(target: Target, method: str, *, untie: bool) -> None:
    """Refuses to change the weight of a target where the change would be wrong.

    Args:
        method: the name of the method, for the error message.
        untie: whether to change the weight of a module alone although other modules share it.

    Raises:
        TargetError: if an embedding rewrites its weight, or other modules share the weight.
    """
    refuse_max_norm(target, method)
    if target.tied and not target.parameter and not untie:
        raise TargetError(
            f"{target.named}: its weight is tied to {target.tied[0]}, and an update of this module alone would make the "
            f"two differ; write at='{target.path}.weight' to update both, pass untie=True to update this module alone, or "
            f"leave it out with exclude={target.path!r}"
        )


def check_patch_dropout(target: Target, method: str, kind: type[DeltaModule], dropout: float) -> None:
    """Refuses a dropout where a weight is patched.

    Args:
        method: the name of the method, for the error message.

    Raises:
        OptionError: if there is a dropout, and this kind of delta module patches the target's weight.
    """
    if dropout and kind.patches_weight(target):
        raise OptionError(
            f"{target.named}: {method}(dropout={dropout:g}) drops inputs, but here {method} patches a weight whose input no "
            "hook sees; use dropout=0, or leave it out with exclude="
        )


def check_rank(target: Target, method: str, r: int, *, option: str = "r") -> None:
    """Refuses a rank that no matrix of the target's size has.

    Args:
        method: the name of the method, for the error message.
        option: the name of the rank among the method's options.

    Raises:
        OptionError: if the rank is above the smaller side of the weight.
        TargetError: if the target is no linear map.
    """
    d_in, d_out = sizes(target, method)
    largest = min(d_in, d_out)
    if r > largest:
        raise OptionError(
            f"{target.named}: rank {r} is above the layer's size {d_in} to {d_out}; use {method}({option}={largest}) or "
            "less, or leave it out with exclude="
        )


def check_seed(method: str, seed: int, sizes: tuple[int, int] | None) -> None:
    """Refuses a seed, or sizes of frozen factors, that are out of their range.

    Args:
        method: the name of the method, for the error message.

    Raises:
        OptionError: if they are.
    """
    if not 0 <= seed < 2**63:
        raise OptionError(f"{method}(seed={seed}): expected a seed of at least 0 that 63 bits hold")
    if sizes is not None and min(sizes) < 1:
        raise OptionError(f"{method}(sizes={sizes}): expected an input and an output size of at least 1")


def drawn_sizes(method: str, needed: tuple[int, int], sizes: tuple[int, int] | None) -> tuple[int, int]:
    """Returns the sizes that frozen factors are drawn for.

    Args:
        method: the name of the method, for the error message.
        needed: the largest sizes of the targets.
        sizes: those that its options ask for; None for those that are needed.

    Raises:
        OptionError: if the options ask for less than is needed.
    """
    if sizes is None:
        return needed
    if needed[0] > sizes[0] or needed[1] > sizes[1]:
        raise OptionError(
            f"{method}(sizes={sizes}): the largest target has {needed[0]} to {needed[1]} features; use at least these sizes, "
            "or omit sizes="
        )
    return sizes
