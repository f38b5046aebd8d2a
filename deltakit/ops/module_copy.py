"""Formulas of a module that can be computed with other tensors in the place of its parameters.

A backward pass that computes a matrix again must use the tensors of its forward. The module's own parameters may be others by
then: `torch.func.functional_call` puts its tensors into the module during the forward alone.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from deltakit.core import DeltaModule


@dataclass(frozen=True, slots=True)
class ComputedBy:
    """A function of the tensors that a module reads, in the order of `parameters_read()`.

    `formula` gets the module, or a copy of it that has other tensors in their place.
    """

    module: DeltaModule
    formula: Callable[[Any], Tensor]

    def __call__(self, *tensors: Tensor) -> Tensor:
        own = self.module.parameters_read()
        if not own or tensors[0] is own[0]:
            return self.formula(self.module)
        return self.formula(_copy(self.module, {id(old): new for old, new in zip(own, tensors, strict=True)}))

    def reads(self, tensors: Sequence[Tensor]) -> bool:
        """Returns whether it can be computed with other tensors, of which these are the originals."""
        own = self.module.parameters_read()
        return len(own) == len(tensors) and not any(map(_is_managed, _modules(self.module)))


def _modules(module: DeltaModule) -> Iterator[nn.Module]:
    yield from module.modules() if module._modules else (module,)
    for shared in module.__dict__.get("_shared", ()):
        yield from shared.modules()


def _is_managed(module: nn.Module) -> bool:
    """Whether an engine puts parameters into a module when it is called: such hooks know the module itself, and no copy."""
    return bool("forward" in module.__dict__ or module._forward_pre_hooks or module._forward_hooks)


def _copy(module: nn.Module, tensors: Mapping[int, Tensor]) -> Any:
    """Returns a module that has other tensors in the place of its parameters, and shares everything else."""
    copy = object.__new__(type(module))
    copy.__dict__ = dict(module.__dict__)
    copy._parameters = {name: _parameter(value, tensors) for name, value in module._parameters.items()}
    copy._modules = {name: child and _copy(child, tensors) for name, child in module._modules.items()}
    if "_shared" in module.__dict__:
        copy.__dict__["_shared"] = tuple(_copy(shared, tensors) for shared in module.__dict__["_shared"])
    return copy


def _parameter(own: Tensor | None, tensors: Mapping[int, Tensor]) -> Any:
    found = own if own is None else tensors.get(id(own), own)
    if found is not own:
        # `get_parameter` returns nothing else.
        found._is_param = True  # type: ignore[union-attr]
    return found
