"""LLaMA-Adapter: in the upper layers each attention also attends to a trained prompt, o + g softmax(q K^T / √d) V.

Zhang et al. 2023, https://arxiv.org/abs/2303.16199, sections 3.1 and 3.2. The keys K and values V are the layer's own frozen
projections of the prompt, without positions, and their softmax is apart from that of the text. The gate g starts at zero, so
an untrained delta is the identity. The prompt starts with numbers of size one, as the authors' embedding does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltakit.core import (
    BackboneView,
    BareLayer,
    DeltaModule,
    Design,
    Method,
    Target,
    WeightView,
    projection_sizes,
    wants_start_values,
    weight_view,
)
from deltakit.errors import DeltaError, OptionError, RoleError, TargetError
from deltakit.ops import (
    AttentionBeside,
    BesideMode,
    EntersMode,
    attention_targets,
    calls_fused_attention,
    enter_prefix_mode,
    enters_by_interface,
    heads_of,
    install_prefixes,
    like,
)


class Projection(NamedTuple):
    """A frozen projection of an attention module: its path below that module, and how its weight is read."""

    path: str
    view: WeightView

    def of(self, attention: nn.Module, x: Float[Tensor, "tokens d"]) -> Float[Tensor, "tokens d_out"]:
        """Returns the projection of x."""
        layer = BareLayer(attention.get_submodule(self.path), self.view)
        bias = layer.bias
        return torch.nn.functional.linear(x, layer.weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


class LlamaAdapterDelta(AttentionBeside):
    """The `prompt` [tokens, d] and the `gate` [1] of one attention module."""

    def __init__(self, target: Target, tokens: int, key: Target, value: Target) -> None:
        super().__init__()
        self.heads, new = heads_of(target), like(target)
        self.projections = tuple(
            Projection(one.owner[len(target.path) :].removeprefix("."), weight_view(one)) for one in (key, value)
        )
        d = _sizes(key)[0]
        self.prompt = nn.Parameter(torch.empty(tokens, d, **new))
        self.gate = nn.Parameter(torch.zeros(1, **new))
        if wants_start_values(self.prompt):
            nn.init.normal_(self.prompt)
        install_prefixes()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # After unpickling in another process, transformers' attention interface does not know prompts yet.
        install_prefixes()

    def attended(
        self, module: nn.Module
    ) -> tuple[Float[Tensor, "heads own d_k"], Float[Tensor, "heads own d_v"], Float[Tensor, "1"]]:
        key, value = (
            projection.of(module, self.prompt).unflatten(-1, (self.heads.count, -1)).transpose(0, 1)
            for projection in self.projections
        )
        return key, value, self.gate

    def summary(self) -> str:
        return f"tokens={len(self.prompt)}"


class LlamaAdapterModeDelta(EntersMode, LlamaAdapterDelta):
    """The same for attention outside transformers' attention interface: it overrides torch's function in the forward."""

    def enter(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        enter_prefix_mode(BesideMode(target, self.peers(target)))


@dataclass(frozen=True, kw_only=True)
class LlamaAdapter(Method, name="llama_adapter"):
    """A trained prompt in the attention of the upper layers, behind a gate that starts at zero.

    A target is any module with attention at or below it. It must have projections of keys and values that deltakit can tell
    apart, and attend through transformers' interface or torch's `scaled_dot_product_attention`.

    Args:
        tokens: the length of the prompt in each layer, at least 1; 10 in the paper.
        layers: the number of attention modules, counted from the last one, of those that are selected; at least 1. The paper
            takes 30 of LLaMA's 32.

    Raises:
        OptionError: if an option is out of its range.
    """

    design: ClassVar[Design] = Design(form="g softmax(q K^T) V, K and V of a prompt")

    tokens: int = 10
    layers: int = 30

    def validate(self) -> None:
        for option in ("tokens", "layers"):
            value = getattr(self, option)
            if value < 1:
                raise OptionError(f"LlamaAdapter({option}={value}): expected at least 1")

    def targets(self, index: BackboneView, selected: Sequence[Target] | None) -> Sequence[Target]:
        found = attention_targets(index, selected, self.name)
        if selected is None:
            found = [target for target in found if self.kind_at(target) is not None and _can_project(index, target)]
            if not found:
                raise RoleError(
                    f"llama_adapter: {index.owner} has no attention that it can serve, so there is no default position; use "
                    "Prefix, or another method"
                )
        return found[-self.layers :]

    def kind_at(self, target: Target) -> type[DeltaModule] | None:
        if enters_by_interface(target.module):
            return LlamaAdapterDelta
        return LlamaAdapterModeDelta if calls_fused_attention(target.module) else None

    def build(self, index: BackboneView, targets: Sequence[Target]) -> dict[str, DeltaModule]:
        built: dict[str, DeltaModule] = {}
        for target in targets:
            kind: Any = self.kind_at(target)
            built[target.path] = kind(target, self.tokens, *_projections(index, target))
        return built


def _can_project(index: BackboneView, attention: Target) -> bool:
    try:
        _projections(index, attention)
    except DeltaError:
        return False
    return True


def _projections(index: BackboneView, attention: Target) -> tuple[Target, Target]:
    """Returns the projections of an attention module's keys and values: layers, or features of a fused layer.

    Raises:
        TargetError: if its roles do not show them, or they have other sizes than its heads.
    """
    found = []
    for letter in "kv":
        inside = [path for path in index.role(f"attn.{letter}") if path.startswith(f"{attention.path}.")]
        if len(inside) != 1:
            raise TargetError(
                f"{attention.named}: its roles show no single layer for its {'keys' if letter == 'k' else 'values'}, by "
                "which LlamaAdapter projects the prompt; omit it with exclude=, or use Prefix"
            )
        found.append(index.target(inside[0]))
    key, value = found
    heads = heads_of(attention)
    sizes = [_sizes(one) for one in found]
    wanted = [(sizes[0][0], heads.count * d) for d in (heads.d_key, heads.d_value)]
    if sizes != wanted:
        raise TargetError(
            f"{attention.named}: LlamaAdapter needs linear layers from one input to the {heads.count} heads of keys and "
            "values; omit it with exclude=, or use Prefix"
        )
    return key, value


def _sizes(projection: Target) -> tuple[int, int]:
    """Returns the input and output size of a projection; zeros if it is no layer."""
    found = (None if projection.parameter else projection_sizes(projection.module)) or (0, 0)
    return found if projection.feature_slice is None else (found[0], projection.feature_slice.size)
