"""Formulas of a delta module that can be computed with other tensors in the place of its parameters.

A backward pass that computes a matrix again must use the tensors of its forward. The modules' own parameters may be others by
then: `torch.func.functional_call` puts its tensors into the modules during the forward alone.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from deltakit.core import DeltaModule


class ComputedBy:
    """A function of the tensors that a delta module reads, and of parameters of its target.

    What a formula reads as attributes of the modules that it gets is exact in every way to compute gradients. What it reads by
    a closure, a bound method or a list that `__init__` has made gets its gradient, too, but hooks of that parameter run twice.

    Args:
        formula: gets the delta module, or a copy of it that has other tensors in the place of its parameters, and then the
            target or a copy of it, if there is one.
        target: the module whose parameters the formula reads, if it does.
        names: the names of these parameters, such as "weight".
    """

    def __init__(
        self,
        module: DeltaModule,
        formula: Callable[..., Tensor],
        target: nn.Module | None = None,
        names: Sequence[str] = (),
    ) -> None:
        self.module, self.formula, self.target, self.names = module, formula, target, names

    def tensors(self) -> tuple[Tensor, ...]:
        """Returns what it is computed from: the module's `parameters_read()`, and the target's parameters."""
        # The gradient of a trained weight does not flow through its delta.
        read = (value.detach() if value.requires_grad else value for value in self._of_target())
        return (*self.module.parameters_read(), *read)

    def __call__(self, *tensors: Tensor) -> Tensor:
        """Returns what copies of the modules compute from other tensors, in the order of `tensors()`."""
        own = [*self.module.parameters_read(), *self._of_target()]
        new = {id(old): other for old, other in zip(own, tensors, strict=True)}
        target = self.target
        if target is not None:
            target = _shallow(target)
            target._parameters = _exchanged(target, new)
            computed = target._modules.get(_COMPUTED)
            if computed is not None:
                target._modules = {**target._modules, _COMPUTED: _copy(computed, new)}
        return self._formula_of(_copy(self.module, new), target)

    def by_the_module(self) -> Tensor:
        """Returns what the modules themselves compute, from the parameters that they have now."""
        return self._formula_of(self.module, self.target)

    def _formula_of(self, module: DeltaModule, target: nn.Module | None) -> Tensor:
        return self.formula(module) if target is None else self.formula(module, target)

    def _of_target(self) -> list[Tensor]:
        """The target's parameters that the formula reads; none where an engine or a quantizer manages one of them."""
        if self.target is None or not self.names or "_hf_hook" in self.target.__dict__:
            return []
        held = [self.target._parameters.get(name) for name in self.names]
        found: list[Tensor] = [value for value in held if value is not None]
        computed = self.target._modules.get(_COMPUTED)
        found += computed.parameters() if computed is not None else ()
        return found if all(type(value) in (Tensor, nn.Parameter) for value in found) else []

    @property
    def takes_others(self) -> bool:
        """Whether the delta module can be copied.

        Hooks and replaced forwards are the way in which engines (FSDP2, DeepSpeed, accelerate) put parameters into the module
        that they know.
        """
        return not any(map(_is_hooked, _modules(self.module)))


_COMPUTED = "parametrizations"
"""The child in which torch's parametrizations keep what a weight or bias is computed from."""


def _modules(module: DeltaModule) -> Iterator[nn.Module]:
    yield from module.modules() if module._modules else (module,)
    for shared in module.__dict__.get("_shared", ()):
        yield from shared.modules()


def _is_hooked(module: nn.Module) -> bool:
    hooks = module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks
    return "forward" in module.__dict__ or any(hooks)


def _shallow(module: nn.Module) -> Any:
    copy = object.__new__(type(module))
    copy.__dict__ = dict(module.__dict__)
    return copy


def _copy(module: nn.Module, tensors: Mapping[int, Tensor]) -> Any:
    """Returns a module that has other tensors in the place of its parameters, and shares everything else."""
    copy = _shallow(module)
    copy._parameters = _exchanged(module, tensors)
    children = module._modules.items()
    copy._modules = {name: None if child is None else _copy(child, tensors) for name, child in children}
    if "_shared" in module.__dict__:
        copy.__dict__["_shared"] = tuple(_copy(shared, tensors) for shared in module.__dict__["_shared"])
    return copy


def _exchanged(module: nn.Module, tensors: Mapping[int, Tensor]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, own in module._parameters.items():
        found[name] = other = own if own is None else tensors.get(id(own), own)
        if other is not None and other is not own:
            # `get_parameter` returns nothing else.
            other._is_param = True
    return found
