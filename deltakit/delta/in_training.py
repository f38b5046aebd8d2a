"""DeltaInTraining: the part of a delta's handle that a training loop uses beside the forward and the backward pass."""

from collections.abc import Iterator

import torch
from torch import Tensor

from deltakit.core import Attachment, DeltaModule, Method, checked, normal_tensors
from deltakit.delta.contents import DeltaContents
from deltakit.delta.full_training import refresh_gradients
from deltakit.delta.running_statistics import held_of


@checked
class DeltaInTraining(DeltaContents):
    """Whether the delta is trained, and what its methods do once a step."""

    @property
    def trainable(self) -> bool:
        """Whether the delta's parameters require gradients. Can be set."""
        return self._record.trainable

    @trainable.setter
    def trainable(self, trainable: bool) -> None:
        held_of(self._attachment)  # statistics that moved so far belong to the deltas that were trainable then
        self._record.trainable, self._record.only_full = trainable, False
        for site in self._attachment.sites:
            for _, parameter, _ in site.module.trained_parameters():
                parameter.requires_grad_(trainable)
        if self.attached:
            refresh_gradients(self.backbone, self._record.grad_ledger)

    def penalty(self) -> Tensor:
        """Returns what the delta's methods add to the loss, a scalar: `(loss + delta.penalty()).backward()`.

        AdaLoRA has one. It is 0 for most methods, and while the delta is not trained: detached, not active, merged or not
        trainable.
        """
        first = next(self.parameters(), None)
        total = torch.zeros((), device=None if first is None else first.device)
        for method, modules in self._in_training():
            total = total + torch.as_tensor(method.penalty(modules)).to(total.device)
        return total

    def step(self) -> None:
        """Lets the delta's methods change themselves once a step, such as AdaLoRA its ranks.

        Call it between `optimizer.step()` and `optimizer.zero_grad()`: methods read the gradients. For most methods it does
        nothing, and for none while the delta is not trained: detached, not active, merged or not trainable.

        Raises:
            StateError: if a method needs gradients and there are none.
        """
        with normal_tensors(), torch.no_grad():
            for method, modules in self._in_training():
                method.step(modules)

    def _in_training(self) -> Iterator[tuple[Method, list[DeltaModule]]]:
        if self.attached and self._record.live and self.trainable:
            yield from by_method(self._attachment)


def by_method(attachment: Attachment) -> Iterator[tuple[Method, list[DeltaModule]]]:
    """Yields each method of a delta with its delta modules."""
    for number, method in enumerate(attachment.record.methods):
        yield method, [site.module for site in attachment.sites if site.method == number]
