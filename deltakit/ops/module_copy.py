"""Formulas of a delta module that can be computed with other tensors in the place of its parameters.

A backward pass that computes a matrix again must use the tensors of its forward. The modules' own parameters may be others by
then: `torch.func.functional_call` puts its tensors into the modules during the forward alone.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deltakit.core import COMPUTED, DeltaModule, shallow_copy
from deltakit.errors import StateError

OTHERS = (
    "the parameters of this forward are not those that its delta module has in the backward pass, so gradients would be lost "
    "or wrong: call backward inside torch.func.functional_call, or remove the hooks of the delta module; a formula of your "
    "own must read parameters as attributes of the module that it gets"
)


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
        self.buffers: dict[int, dict[str, Any]] = {}
        self.places: list[tuple[nn.Module, str]] = []

    def tensors(self) -> tuple[Tensor, ...]:
        """Returns what it is computed from: the module's `parameters_read()`, and the target's parameters.

        The modules' buffers of now are kept, too, for when it is computed from other tensors.

        Raises:
            StateError: in a replica of `nn.DataParallel` of which only a part is called.
        """
        read = self.module.parameters_read()
        if not read and "_is_replica" in self.module.__dict__:
            raise StateError(
                f"{self.module.word()}: in a replica of nn.DataParallel it finds no parameters, because only a part of the "
                "backbone is called; call the model that the delta is attached to, or use DistributedDataParallel"
            )
        self.buffers, self.places = self._buffers(), self._places_of(read)
        return self._read(read)

    def __call__(self, *tensors: Tensor) -> Tensor:
        """Returns what copies of the modules compute from other tensors, in the order of `tensors()`."""
        own = [*self._parameters_now(), *self._of_target()]
        new = _Other({id(old): other for old, other in zip(own, tensors, strict=True)}, self.buffers, self._places())
        target = self.target
        if target is not None:
            children = target._modules
            target = new.in_place_of(target)
            if COMPUTED in children:
                target._modules = {**children, COMPUTED: new.copy(children[COMPUTED])}
        return self._formula_of(new.copy(self.module), target)

    def _places_of(self, read: Sequence[Tensor]) -> list[tuple[nn.Module, str]]:
        """Returns the modules that hold these tensors, with their names there; none if these are usual parameters.

        torch's first FSDP puts views of its flat parameter into the modules. In the backward pass, these are plain attributes.
        """
        if all(type(one) is nn.Parameter for one in read):
            return []
        places = {
            id(own): (module, name) for module in _modules(self.module) for name, own in module._parameters.items()
        }
        return [places[id(one)] for one in read] if all(id(one) in places for one in read) else []

    def _places(self) -> list[tuple[nn.Module, str]]:
        """Returns the places of the tensors of the forward, those of the target's parameters included."""
        held = self.target
        return self.places + [(held, name) for name in self.names] if self.places and held is not None else self.places

    def _parameters_now(self) -> Sequence[Tensor]:
        """Returns what the module has now in the places of the tensors of the forward."""
        now = [module._parameters.get(name, module.__dict__.get(name)) for module, name in self.places]
        return [one for one in now if one is not None] if now else self.module.parameters_read()

    def refuse_others(self, tensors: Sequence[Tensor]) -> None:
        """Checks that the modules still have the tensors of a forward, where they cannot be given any.

        Raises:
            StateError: if they have others.
        """
        now = self._read(self.module.parameters_read())
        if not all(map(_is_same, now, tensors)):
            raise StateError(OTHERS)

    def by_the_module(self) -> Tensor:
        """Returns what the modules themselves compute, from the parameters that they have now."""
        return self._formula_of(self.module, self.target)

    def _formula_of(self, module: DeltaModule, target: nn.Module | None) -> Tensor:
        return self.formula(module) if target is None else self.formula(module, target)

    def _of_target(self) -> list[Tensor]:
        """The target's parameters that the formula reads; none where an engine or a quantizer manages one of them."""
        if self.target is None or not self.names or "_hf_hook" in self.target.__dict__:
            return []
        # Hooks of `prune` and the old `weight_norm` compute a weight in each forward, and keep it as a plain attribute.
        places = self.target._parameters, self.target.__dict__
        held = [next((place[name] for place in places if place.get(name) is not None), None) for name in self.names]
        found: list[Tensor] = [value for value in held if value is not None]
        computed = self.target._modules.get(COMPUTED)
        found += computed.parameters() if computed is not None else ()
        return found if all(type(value) in (Tensor, nn.Parameter) for value in found) else []

    def _read(self, parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
        # The gradient of a trained weight does not flow through its delta.
        return (*parameters, *(value.detach() if value.requires_grad else value for value in self._of_target()))

    def _buffers(self) -> dict[int, dict[str, Any]]:
        modules = [*_modules(self.module), *([] if self.target is None else [self.target])]
        found = {id(module): module._buffers.copy() for module in modules if module._buffers}
        computed = self.target._modules.get(COMPUTED) if self.target is not None else None
        if computed is not None:
            # The vectors of `spectral_norm` change in each forward. The matrices of `orthogonal` do not, and are not copied.
            for module in computed.modules():
                own = module._buffers.items()
                found[id(module)] = {name: b if b is None or b.ndim > 1 else b.clone() for name, b in own}
        return found

    @property
    def takes_others(self) -> bool:
        """Whether the delta module can be copied.

        Hooks and replaced forwards are the way in which engines (FSDP2, DeepSpeed, accelerate) put parameters into the module
        that they know.
        """
        return not any(map(is_hooked, _modules(self.module)))


def _modules(module: DeltaModule) -> Iterator[nn.Module]:
    yield from module.modules() if module._modules else (module,)
    for shared in module.__dict__.get("_shared", ()):
        yield from shared.modules()


def is_hooked(module: nn.Module) -> bool:
    """Returns whether a call of the module does more than its class says."""
    hooks = module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks
    return "forward" in module.__dict__ or any(hooks)


def _is_same(now: Tensor, then: Tensor) -> bool:
    """Whether a module's tensor is the one of a forward, or a copy of it. Saved tensors may be copies (`save_on_cpu`)."""
    plain = all(type(one) in (Tensor, nn.Parameter) and not one.is_meta for one in (now, then))
    if now is then or not plain or now.requires_grad is not then.requires_grad:
        return True
    if now.requires_grad:
        return torch.autograd.graph.get_gradient_edge(now) == torch.autograd.graph.get_gradient_edge(then)
    return now.data_ptr() == then.data_ptr() or torch.equal(now, then.to(now.device))


class _Other(NamedTuple):
    """Tensors in the place of a module's parameters, by the ids of these, and buffers by the id of the module.

    `places` are those of parameters that may be plain attributes now (see `ComputedBy`).
    """

    tensors: Mapping[int, Tensor]
    buffers: Mapping[int, dict[str, Any]]
    places: Sequence[tuple[nn.Module, str]] = ()

    def copy(self, module: nn.Module | None) -> Any:
        """Returns a module that has these tensors and buffers, and shares everything else."""
        if module is None:
            return None
        copy = self.in_place_of(module)
        copy._modules = {name: self.copy(child) for name, child in module._modules.items()}
        if "_shared" in module.__dict__:
            copy.__dict__["_shared"] = tuple(map(self.copy, module.__dict__["_shared"]))
        return copy

    def in_place_of(self, module: nn.Module) -> Any:
        """Returns a module that has these tensors and buffers, and the children of the other."""
        copy = shallow_copy(module)
        copy._parameters = {name: self._other(own) for name, own in module._parameters.items()}
        copy._buffers = self.buffers.get(id(module), module._buffers)
        for name, own in module.__dict__.items():
            if id(own) in self.tensors:
                copy.__dict__[name] = self.tensors[id(own)]
        for name in [name for holder, name in self.places if holder is module and name in copy.__dict__]:
            copy._parameters[name] = copy.__dict__.pop(name)
        return copy

    def _other(self, own: Tensor | None) -> Tensor | None:
        other = self.tensors.get(id(own))
        if own is None or other is None or other is own:
            return own
        # `get_parameter` returns nothing else.
        other._is_param = True
        return other
