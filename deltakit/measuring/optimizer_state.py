"""The bytes that an optimiser keeps: those that it has, or those that one step on copies without values gives it."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from deltakit.core import global_bytes, is_sharded, local_bytes
from deltakit.errors import OptionError
from deltakit.measuring.part import Part

Optimizers = type[Optimizer] | Optimizer | Callable[[Iterable[nn.Parameter]], Optimizer]
"""A class, an optimiser, or a function such as `functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)`."""


Make = Callable[[Callable[[nn.Parameter], nn.Parameter]], tuple[Optimizer, list[nn.Parameter]]]
"""Makes an optimiser and the parameters that it is for, given the function that copies a parameter."""


def optimizer_state(optimizer: Optimizers, trainable: Sequence[nn.Parameter]) -> Part:
    """Returns the size of an optimiser's state; None for its numbers if they are not known.

    That of an optimiser which has made a step is its own. Otherwise a new one makes one step on copies of the parameters on
    the meta device, which takes no memory. Optimisers that need values for a step (Adafactor, fused ones) have no known size
    before their first.

    Raises:
        OptionError: if a class or function needs other arguments than parameters, or does not return an optimiser.
    """
    if not isinstance(optimizer, Optimizer):
        # A `functools.partial` has no name, and its function has one.
        name = str(getattr(getattr(optimizer, "func", optimizer), "__name__", "optimizer"))
        return _tried(lambda copied: _made(optimizer, [copied(p) for p in trainable]), trainable, name)
    name = type(optimizer).__name__
    if not optimizer.state:
        own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        return _tried(lambda copied: _renewed(optimizer, copied), own, name)
    tensors = _tensors_of(optimizer)
    count, whole, local = (sum(map(size, tensors)) for size in (torch.numel, global_bytes, local_bytes))
    return Part(count, whole, local, f"{name}, as it is now")


def _tried(make: Make, parameters: Iterable[nn.Parameter], name: str) -> Part:
    sharded = any(is_sharded(parameter) or hasattr(parameter, "ds_tensor") for parameter in parameters)
    try:
        tensors = _after_a_step(*make(_copy))
        local = _after_a_step(*make(_local_copy)) if sharded else tensors
    except OptionError:
        raise
    except Exception as error:
        # Optimisers of other libraries raise whatever they like.
        why = next(iter(str(error).splitlines()), "")
        return Part(None, None, None, f"{name}: unknown before its first step ({type(error).__name__}: {why:.80})")
    note = f"{name}, after its first step"
    return Part(sum(map(torch.numel, tensors)), sum(map(local_bytes, tensors)), sum(map(local_bytes, local)), note)


def _after_a_step(optimizer: Optimizer, copies: Iterable[nn.Parameter]) -> list[Tensor]:
    for copy in copies:
        copy.grad = torch.empty_like(copy)
    optimizer.step()
    return _tensors_of(optimizer)


def _made(make: Any, copies: list[nn.Parameter]) -> tuple[Optimizer, list[nn.Parameter]]:
    try:
        made = make(copies)
    except TypeError as error:
        raise OptionError(
            f"account(optimizer=...): it cannot be called with a list of parameters alone: {error}; pass a class such as "
            "torch.optim.AdamW, or functools.partial with the other arguments"
        ) from error
    if not isinstance(made, Optimizer):
        raise OptionError(
            f"account(optimizer=...): expected a function that returns an optimizer, and it returned a {type(made).__name__}; "
            "pass a class such as torch.optim.AdamW"
        )
    return made, copies


def _renewed(
    optimizer: Optimizer, copied: Callable[[nn.Parameter], nn.Parameter]
) -> tuple[Optimizer, list[nn.Parameter]]:
    """A new optimiser of the same class with the same options, for copies of the same parameters."""
    kind: Any = type(optimizer)
    options = inspect.signature(kind).parameters
    groups: list[dict[str, Any]] = []
    copies: list[nn.Parameter] = []
    for group in optimizer.param_groups:
        # A parameter that does not require gradients never gets a state.
        own = [copied(parameter) for parameter in group["params"] if parameter.requires_grad]
        copies += own
        kept = {name: value for name, value in group.items() if name != "param_names"}
        groups += [{**kept, "params": own}] if own else []
    # AdamW sets options of Adam, whose subclass it is, that its own constructor does not take.
    return kind(groups, **{name: value for name, value in optimizer.defaults.items() if name in options}), copies


def _copy(parameter: nn.Parameter) -> nn.Parameter:
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return nn.Parameter(torch.empty(shape, dtype=parameter.dtype, device="meta"))


def _local_copy(parameter: nn.Parameter) -> nn.Parameter:
    held: Any = parameter
    local: Tensor = held.to_local() if is_sharded(parameter) else getattr(held, "ds_tensor", held)
    return nn.Parameter(torch.empty(local.shape, dtype=local.dtype, device="meta"))


def _tensors_of(optimizer: Optimizer) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in _tensors(list(optimizer.state.values()))}.values())


def _tensors(held: Any) -> Iterator[Tensor]:
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, dict):
        yield from _tensors(list(held.values()))
    elif isinstance(held, list | tuple):
        for entry in held:
            yield from _tensors(entry)
