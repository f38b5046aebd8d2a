"""Queries, keys and values as rows of the projections that fuse them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from deltakit.core import FeatureSlice, above, held_at, join
from deltakit.selection.qkv_layout import measure
from deltakit.selection.role_inference.names import says_attention
from deltakit.selection.role_inference.role_map import Unit


@dataclass
class Fused:
    """The fused projections of one backbone: its modules by path, and its attention and feed-forward units."""

    modules: Mapping[str, nn.Module]
    units: Sequence[Unit]
    _known: dict[object, dict[str, FeatureSlice] | None] = field(default_factory=dict)

    def slices_of(self, unit: Unit) -> dict[str, str]:
        """The paths of queries, keys and values in the fused projection of a unit; empty where it cannot be told."""
        fused = unit.parts.get("qkv") or unit.parts.get("kv")
        if fused is None or fused not in self.modules:
            return {}
        missing = [letter for letter in "qkv" if letter not in unit.parts]
        return {letter: f"{fused}[{letter}]" for letter in missing if self.slice_at(fused, letter) is not None}

    def slice_at(self, base: str, letter: str) -> FeatureSlice | None:
        module, parameter = held_at(self.modules, base)
        if isinstance(module, nn.MultiheadAttention) and parameter == "in_proj_weight":
            # torch.nn.functional.multi_head_attention_forward: queries, keys and values one after the other.
            size, place = module.embed_dim, "qkv".find(letter)
            return FeatureSlice(letter, 1, 3 * size, place * size, (place + 1) * size) if place >= 0 else None
        unit = next((u for u in self.units if base in (u.parts.get("qkv"), u.parts.get("kv"))), None)
        if unit is None or parameter:
            return None
        attention = next((path for path in above(base) if says_attention(type(self.modules[path]).__name__)), None)
        return (self._measured(attention or unit.path, base, unit) or {}).get(letter)

    def _measured(self, path: str, fused: str, unit: Unit) -> dict[str, FeatureSlice] | None:
        attention = self.modules[path]
        inside = join(path, "") if path else ""
        output = unit.parts.get("o", "")
        key = (_attributes(attention), self.modules[fused].__class__, fused[len(inside) :], *self._shape(fused))
        if key not in self._known:
            below = output[len(inside) :] if output.startswith(inside) and output in self.modules else None
            self._known[key] = measure(attention, fused[len(inside) :], below)
        return self._known[key]

    def _shape(self, path: str) -> tuple[int, ...]:
        weight = self.modules[path]._parameters.get("weight")
        return tuple(weight.shape) if weight is not None else ()


def _attributes(module: nn.Module) -> tuple[object, ...]:
    """What tells a module's forward from those of others of its class; one measurement serves all that agree.

    Layers commonly differ in their number only, which is left out. What is no plain value counts by its identity.
    """
    own = tuple(
        (name, repr(value) if isinstance(value, bool | int | float | str | tuple | None) else id(value))
        for name, value in vars(module).items()
        if not name.startswith("_") and not ("layer" in name and isinstance(value, int))
    )
    return (type(module), own, tuple((name, type(child)) for name, child in module._modules.items()))
