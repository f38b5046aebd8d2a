"""Formulas of a delta module that can be computed with other tensors in the place of its parameters.

A backward pass that computes a matrix again must use the tensors of its forward. The modules' own parameters may be others by
then: `torch.func.functional_call` puts its tensors into the modules during the forward alone.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from deltakit.core import DeltaModule


class ComputedBy:
    """A function of the tensors that a delta module reads, and of the parameters of its target.

    Args:
        formula: gets the delta module, or a copy of it that has other tensors in the place of its parameters, and then the
            target or a copy of it, if there is one.
        target: the module whose weight or bias the formula reads, if it does.
    """

    def __init__(self, module: DeltaModule, formula: Callable[..., Tensor], target: nn.Module | None = None) -> None:
        self.module, self.formula, self.target = module, formula, target
        self._names = _plain_names(target) if target is not None else []

    def tensors(self) -> tuple[Tensor, ...]:
        """Returns what it is computed from: the module's `parameters_read()`, and the target's parameters."""
        own: Any = self.target._parameters if self.target is not None else {}
        values = [own[name] for name in self._names]
        # The gradient of a trained weight does not flow through its delta.
        return (*self.module.parameters_read(), *(v.detach() if v.requires_grad else v for v in values))

    def __call__(self, *tensors: Tensor) -> Tensor:
        own = self.module.parameters_read()
        if not own or tensors[0] is own[0]:
            return self.by_the_module()
        target = self.target
        if target is not None and self._names:
            target = _shallow(target)
            target._parameters = {**target._parameters, **dict(zip(self._names, tensors[len(own) :], strict=True))}
        new = {id(old): alias for old, alias in zip(own, tensors, strict=False)}
        return self._formula_of(_copy(self.module, new), target)

    def by_the_module(self) -> Tensor:
        """Returns what the modules themselves compute, from the parameters that they have now."""
        return self._formula_of(self.module, self.target)

    def _formula_of(self, module: DeltaModule, target: nn.Module | None) -> Tensor:
        return self.formula(module) if target is None else self.formula(module, target)

    @property
    def takes_others(self) -> bool:
        """Whether the delta module can be copied.

        Hooks and replaced forwards are the way in which engines (FSDP2, DeepSpeed, accelerate) put parameters into the module
        that they know.
        """
        return not any(map(_is_hooked, _modules(self.module)))


def _plain_names(target: nn.Module) -> list[str]:
    """Returns the names of a target's parameters; none where an engine or a quantizer manages them."""
    own = {name: value for name, value in target._parameters.items() if value is not None}
    plain = not hasattr(target, "_hf_hook") and all(type(value) in (Tensor, nn.Parameter) for value in own.values())
    return list(own) if plain else []


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
    copy._parameters = {name: _parameter(value, tensors) for name, value in module._parameters.items()}
    copy._modules = {name: None if child is None else _copy(child, tensors) for name, child in module._modules.items()}
    if "_shared" in module.__dict__:
        copy.__dict__["_shared"] = tuple(_copy(shared, tensors) for shared in module.__dict__["_shared"])
    return copy


def _parameter(own: Tensor | None, tensors: Mapping[int, Tensor]) -> Any:
    found = None if own is None else tensors.get(id(own), own)
    if found is not None and found is not own:
        # `get_parameter` returns nothing else.
        found._is_param = True
    return found
