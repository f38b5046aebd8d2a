"""InvertibleAdapter: an invertible map of the input embeddings, and its inverse before the output embedding (MAD-X).

Pfeiffer et al. 2020, https://arxiv.org/abs/2005.00052, section 3.1, with the couplings of NICE (Dinh et al. 2015,
https://arxiv.org/abs/1410.8516): y_1 = x_1 + F(x_2), y_2 = x_2 + G(y_1) for the halves of the features. F and G are
bottlenecks. The authors start all their weights randomly; here the second layers start at zero, so that an untrained map is
the identity.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeGuard

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from deltakit.core import (
    BackboneView,
    DeltaModule,
    Design,
    Method,
    Target,
    gathered_in_training,
    linear_sizes,
    wants_start_values,
)
from deltakit.errors import OptionError
from deltakit.ops import ACTIVATIONS, InputMap, OutputMap, input_size, like


class Coupling(nn.Module):
    """The two bottlenecks F and G: each has a factor `down`, `up` and their biases."""

    def __init__(self, size: int, options: "InvertibleAdapter", **new: Any) -> None:
        super().__init__()
        self.first, self.activation = size // 2, options.activation
        for name, (d_in, d_out) in {"F": (size - self.first, self.first), "G": (self.first, size - self.first)}.items():
            hidden = max(1, d_in // options.reduction)
            shapes = {"down": (hidden, d_in), "down_bias": (hidden,), "up": (d_out, hidden), "up_bias": (d_out,)}
            for part, shape in shapes.items():
                self.register_parameter(f"{name}_{part}", nn.Parameter(torch.zeros(shape, **new)))
            if wants_start_values(self.get_parameter(f"{name}_down")):
                nn.init.normal_(self.get_parameter(f"{name}_down"), std=0.02)

    def forward(self, x: Float[Tensor, "*batch d"], *, inverse: bool) -> Float[Tensor, "*batch d"]:
        """Returns the map of x, or its inverse."""
        one, two = x[..., : self.first], x[..., self.first :]
        if inverse:
            two = two - self._shift("G", one)
            return torch.cat((one - self._shift("F", two), two), -1)
        one = one + self._shift("F", two)
        return torch.cat((one, two + self._shift("G", one)), -1)

    def _shift(self, name: str, x: Tensor) -> Tensor:
        # The targets of a model on several devices share the parameters of one of them.
        down, down_bias, up, up_bias = (
            gathered_in_training(getattr(self, f"{name}_{part}")).to(x)
            for part in ("down", "down_bias", "up", "up_bias")
        )
        return F.linear(ACTIVATIONS[self.activation](F.linear(x, down, down_bias)), up, up_bias)


class InvertibleAdapterDelta(OutputMap):
    """Maps what an embedding returns."""

    tags: ClassVar[Mapping[str, str]] = {"shared": "coupling"}

    def forward(self, x: Shaped[Tensor, "*input"], y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        mapped: Tensor = self.shared(y, inverse=False)
        return mapped


class InvertibleAdapterInputDelta(InputMap):
    """Maps the input of an output embedding by the inverse."""

    tags: ClassVar[Mapping[str, str]] = {"shared": "coupling"}

    def into(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        mapped: Tensor = self.shared(x, inverse=True)
        return mapped


@dataclass(frozen=True, kw_only=True)
class InvertibleAdapter(Method, name="invertible_adapter"):
    """An invertible map behind the input embedding, and its inverse before the output embedding, with the same parameters.

    By default the targets are the input embeddings, with all that share their weight, and the heads that have one output for
    each of their tokens. A classifier is none of them. Of selected targets, linear layers get the inverse, and the input
    embedding comes with all that share its weight.

    Args:
        reduction: the features of a half are divided by it in the bottlenecks, at least 1.
        activation: the activation in the bottlenecks, such as "relu" or "gelu".

    Raises:
        OptionError: if an option is out of its range, or the targets have different numbers of features.
    """

    design: ClassVar[Design] = Design(form="x_1 + F(x_2), x_2 + G(x_1)", changes="embeddings", composition="addition")

    reduction: int = 2
    activation: str = "relu"

    def validate(self) -> None:
        if self.reduction < 1:
            raise OptionError(f"InvertibleAdapter(reduction={self.reduction}): expected at least 1; 2 is usual")
        if self.activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise OptionError(f"InvertibleAdapter(activation={self.activation!r}): expected one of {known}")

    def positions(self) -> tuple[tuple[str, ...], ...]:
        return (("embed",), ("head",))

    def targets(self, index: BackboneView, selected: Sequence[Target] | None) -> Sequence[Target]:
        chosen = list(selected or ())
        if self.at is None:
            tokens = {len(target.module.weight) for target in chosen if _is_embedding(target.module)}
            chosen = [
                target
                for target in chosen
                if _is_embedding(target.module) or (linear_sizes(target.module) or (0, 0))[1] in tokens
            ]
        # T5 calls the embeddings of its encoder and its decoder, which have the weight of the one that is found. Selected by
        # its own path, each of the two is meant alone.
        found = [target for target in chosen if _is_embedding(target.module) and target.path in index.role("embed")]
        tied = [name.rpartition(".")[0] for target in found for name in target.tied]
        chosen += [index.target(path) for path in tied if _is_embedding(index.by_path.get(path))]
        return list({target.path: target for target in chosen}.values())

    def kind_at(self, target: Target) -> type[InvertibleAdapterDelta] | type[InvertibleAdapterInputDelta] | None:
        if target.never_called:
            return None
        return InvertibleAdapterDelta if linear_sizes(target.module) is None else InvertibleAdapterInputDelta

    def build(self, index: BackboneView, targets: Sequence[Target]) -> dict[str, DeltaModule]:
        built = super().build(index, targets)
        uses = Counter(id(target.module.weight) for target in targets if _is_embedding(target.module))
        for target in targets:
            if _is_embedding(target.module):
                # A forward need not call all embeddings of one weight.
                built[target.path].must_be_called = uses[id(target.module.weight)] == 1
        return built

    def build_shared(self, index: BackboneView, targets: Sequence[Target]) -> nn.Module:
        sizes = {target.path: _size(target) for target in targets}
        size = next(iter(sizes.values()))
        other = next((path for path, found in sizes.items() if found != size), None)
        if other is not None:
            raise OptionError(
                f"InvertibleAdapter: {targets[0].named} has {size} features and {other} has {sizes[other]}, and one map is "
                "for all; leave one of them out with exclude=, and attach another delta there"
            )
        if size < 2:
            raise OptionError(
                f"{targets[0].named}: InvertibleAdapter needs two features or more; leave it out with exclude="
            )
        return Coupling(size, self, **like(targets[0]))


def _is_embedding(module: nn.Module | None) -> TypeGuard[nn.Embedding]:
    return isinstance(module, nn.Embedding)


def _size(target: Target) -> int:
    if linear_sizes(target.module) is not None:
        return input_size(target, "InvertibleAdapter")
    return OutputMap(target).size
