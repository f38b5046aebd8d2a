"""ParallelAdapter: y = y + s (f(x W_d + b_d) W_u + b_u) for the input x and output y of a part, by default the feed-forward.

He et al. 2022, https://arxiv.org/abs/2110.04366, section 4: the scaled parallel adapter, and with prefixes the MAM adapter.
Size 512, ReLU and s = 4 are those of the authors' script for summarisation; for GLUE they use 16 and s = 2. W_d starts as
nn.Linear does and W_u is zero (the authors' "lora" start), so that an untrained adapter is the identity.

Where the feed-forward part is no module of its own (BERT, OPT), the adapter is on its last layer and reads the input of its
first one. The result is added before the residual and the norm, as in the authors' code.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltakit.core import BackboneView, DeltaModule, Design, MixedBatch, Selector, Target, wants_start_values
from deltakit.errors import OptionError, TargetError
from deltakit.ops import (
    Bottleneck,
    BottleneckMethod,
    Handover,
    InputTap,
    input_size,
    kaiming_uniform,
    like,
    on_own_examples,
    unfilled_linear,
)

_UPS = ("ff.up", "ff.gate", "ff.gate_up")


class ParallelAdapterDelta(Bottleneck):
    """A bottleneck of the linear layers `down` [size, d_in] and `up` [d_out, size], and the factor on it.

    The factor is a number, or a parameter `gain` [1] or [d_out] that starts at one.
    """

    down: nn.Linear
    up: nn.Linear

    def __init__(self, target: Target, options: "ParallelAdapter", source: Target | None = None) -> None:
        super().__init__(target, options)
        if self.axis != -1:
            raise TargetError(
                f"{target.named}: ParallelAdapter works on modules whose features are the last dimension, found a "
                f"{type(target.module).__name__} with channels first; leave it out with exclude="
            )
        d_in = input_size(source or target, self.word())
        size = options.bottleneck(d_in)
        self.down = unfilled_linear(d_in, size, **like(target))
        self.up = unfilled_linear(size, self.size, **like(target))
        self.factor = 1.0
        self.gain: nn.Parameter | None = None
        if isinstance(options.scaling, str):
            gains = 1 if options.scaling == "learned" else self.size
            self.gain = nn.Parameter(torch.ones(gains, **like(target)))
        else:
            self.factor = float(options.scaling)
        if options.gate:
            self.add_gate(self.down.in_features, target)
        if wants_start_values(self.down.weight):
            self.reset_parameters()

    def reset_parameters(self) -> None:
        kaiming_uniform(self.down.weight)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Float[Tensor, "*input d_in"], y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        if x.shape[:-1] != y.shape[:-1] or x.shape[-1] != self.down.in_features:
            raise TargetError(
                f"ParallelAdapter adds to an output of shape {tuple(y.shape)} what it computes from an input with "
                f"{self.down.in_features} features, and found an input of shape {tuple(x.shape)}; choose other modules with "
                "at= or source="
            )
        change = self.change(x)
        return y + (change * self.factor if self.gain is None else change * self.gain)

    def summary(self) -> str:
        factor = {None: f"scaling={self.factor:g}", 1: "scaling=learned"}
        words = factor.get(None if self.gain is None else len(self.gain), "scaling=channel")
        return f"size={self.down.out_features} {words} {self.words}"


class PairedAdapterDelta(ParallelAdapterDelta):
    """A parallel adapter that reads the input of another module, its source, which is called before its target."""

    weighable: ClassVar[bool] = False

    def __init__(self, target: Target, options: "ParallelAdapter", source: Target) -> None:
        super().__init__(target, options, source)
        self.handover = Handover(source.named, target.named)

    @classmethod
    def word(cls) -> str:
        return "ParallelAdapter"

    def after_call(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return super().after_call(target, (self.handover.take(),), {}, output)

    def after_call_mixed(
        self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, batch: MixedBatch
    ) -> Any:
        if not self.takes_part:
            return None
        return on_own_examples(self, target, (self.handover.take(),), {}, output, batch, super().after_call)


@dataclass(frozen=True, kw_only=True)
class ParallelAdapter(BottleneckMethod, name="parallel_adapter"):
    """Bottleneck adapters beside their targets: they read the input, and their result is added to the output.

    Args:
        size: the size of the bottleneck in elements, at least 1; 512 by default.
        reduction: instead of `size`: the number of input features is divided by it, at least 1.
        scaling: the factor on the result, a finite number; "learned" for a trained factor that starts at one, or "channel" for
            one per output feature.
        source: selectors of other modules whose inputs are read. Each target reads that of the nearest match. By default a
            target reads its own input, and the last layer of a feed-forward part (@ff.down) reads that of the part.
        activation: gelu, gelu_tanh, relu, leaky_relu, silu or tanh.
        gate: whether a trained gate multiplies the result: a number in (0, 1) for each example, the mean of those of all
            positions (Mao et al. 2022, https://arxiv.org/abs/2110.07577). In decoders it sees later tokens.

    Raises:
        OptionError: if an option is out of its range, or both `size` and `reduction` are given.
    """

    kind: ClassVar[type[DeltaModule]] = ParallelAdapterDelta
    design: ClassVar[Design] = Design(
        form="f(x W_d + b_d) W_u + b_u", insertion="parallel", composition="scaled addition"
    )
    usual_size: ClassVar[int] = 512

    activation: str = "relu"
    scaling: float | Literal["learned", "channel"] = 4.0
    source: Selector | None = None

    def validate(self) -> None:
        super().validate()
        if not isinstance(self.scaling, str) and not abs(self.scaling) <= torch.finfo(torch.float32).max:
            raise OptionError(
                f"ParallelAdapter(scaling={self.scaling}): expected a finite number that float32 holds, 'learned' or "
                "'channel'"
            )
        if self.source is not None and not isinstance(self.source, str):
            object.__setattr__(self, "source", tuple(self.source))

    def positions(self) -> tuple[tuple[str, ...], ...]:
        return (("ff", "ff.down"),)

    def targets(self, index: BackboneView, selected: Sequence[Target] | None) -> Sequence[Target]:
        chosen = list(selected or ())
        if self.at is None:
            chosen = [_last_layer(index, target) for target in chosen]
        sources = self._sources(index, chosen)
        for target in chosen:
            if target.path in sources.values():
                raise OptionError(
                    f"{target.named}: it is a target of this ParallelAdapter and the source of another target; attach the two "
                    "as deltas of their own, or choose other modules with source="
                )
        return chosen

    def build_at(self, target: Target) -> DeltaModule:
        return ParallelAdapterDelta(target, self)

    def build(self, index: BackboneView, targets: Sequence[Target]) -> dict[str, DeltaModule]:
        sources = self._sources(index, targets)
        built: dict[str, DeltaModule] = {}
        taps: dict[str, list[Handover]] = {}
        for target in targets:
            if target.path in sources:
                paired = PairedAdapterDelta(target, self, _called(index.target(sources[target.path])))
                taps.setdefault(sources[target.path], []).append(paired.handover)
                built[target.path] = paired
            elif target.path not in sources.values():
                built[target.path] = self.build_at(target)
        # Behind the adapters, whose options stand in reports.
        return {**built, **{path: InputTap(tuple(handovers)) for path, handovers in taps.items()}}

    def _sources(self, index: BackboneView, targets: Sequence[Target]) -> Mapping[str, str]:
        """Returns the path of the source of each target that has one."""
        if self.source is not None:
            named = index.select(self.source)
            found = {target.path: _nearest(target, named) for target in targets}
        else:
            found = {target.path: _first_layer(index, target) for target in targets if "ff.down" in target.roles}
        return {path: source for path, source in found.items() if source != path}


def _nearest(target: Target, paths: Sequence[str]) -> str:
    """Returns the path that has the longest beginning in common with a target's path.

    Raises:
        OptionError: if there are several.
    """
    ranks = {path: _in_common(target.path, path) for path in paths}
    best = [path for path in paths if ranks[path] == max(ranks.values())]
    if len(best) > 1:
        raise OptionError(
            f"{target.named}: source= matches {len(best)} modules that are equally near to it, such as {best[0]} and "
            f"{best[1]}; name one of them"
        )
    return best[0]


def _called(source: Target) -> Target:
    """Returns a source if it is a module that is called.

    Raises:
        TargetError: if it is not.
    """
    if source.part or source.never_called:
        what = (
            "only a part of a module" if source.part else "never called: the module around it reads its weight directly"
        )
        raise TargetError(
            f"{source.named}: ParallelAdapter reads its input, but it is {what}; name another one with source="
        )
    return source


def _first_layer(index: BackboneView, down: Target) -> str:
    """Returns the first layer of the feed-forward part that a last layer belongs to.

    Raises:
        OptionError: if its roles do not show it.
    """
    downs = index.role("ff.down")
    for role in _UPS:
        near = sorted(index.role(role), key=lambda path: -_in_common(down.path, path))[:1]
        if near and max(downs, key=lambda path: _in_common(near[0], path)) == down.path:
            return near[0]
    raise OptionError(
        f"{down.named}: no layer has the role @ff.up beside it, so ParallelAdapter does not know whose input to read; name it "
        f"with source=, or write source={down.path!r} for its own"
    )


def _last_layer(index: BackboneView, target: Target) -> Target:
    """Returns the last layer of a feed-forward module that an adapter cannot be on, and any other target itself.

    XLNet's has the residual and the norm inside, ahead of which the paper adds. CTRL's is an nn.Sequential.
    """
    below = f"{target.path}."
    if isinstance(target.module, nn.Sequential) or any(path.startswith(below) for path in index.role("norm")):
        downs = [path for path in index.role("ff.down") if path.startswith(below)]
        if len(downs) == 1:
            return index.target(downs[0])
    return target


def _in_common(one: str, other: str) -> int:
    """Returns how many names two paths have in common at their beginning."""
    pairs = list(zip(one.split("."), other.split("."), strict=False))
    return next((number for number, (a, b) in enumerate(pairs) if a != b), len(pairs))
