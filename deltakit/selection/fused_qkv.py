"""The queries, keys and values of fused projections, as feature slices."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import nn

from deltakit.core import FeatureSlice, above, held_at, join, linear_sizes, own_children, unwrapped
from deltakit.selection.dry_run import forward_of
from deltakit.selection.qkv_layout import measure
from deltakit.selection.role_inference.names import says_attention
from deltakit.selection.role_inference.role_map import Unit


@dataclass
class FusedProjections:
    """The fused projections of one backbone.

    `modules` are the backbone's modules by path, `units` its attention and feed-forward units.
    """

    modules: Mapping[str, nn.Module]
    units: Sequence[Unit]
    _measured: dict[object, dict[str, FeatureSlice] | None] = field(default_factory=dict)

    @cached_property
    def _units(self) -> dict[str, Unit]:
        """The first unit of each fused projection, by the projection's path."""
        found = [(unit.parts.get(part), unit) for unit in reversed(self.units) for part in ("kv", "qkv")]
        return {path: unit for path, unit in found if path is not None}

    def slices_of(self, unit: Unit) -> dict[str, str]:
        """Returns the paths of the slices in a unit's fused projection by letter, such as `{"q": "c_attn[q]"}`.

        Letters with a projection of their own are omitted. The result is empty if the layout cannot be determined.
        """
        fused = unit.parts.get("qkv") or unit.parts.get("kv")
        if fused is None or fused not in self.modules:
            return {}
        missing = [letter for letter in "qkv" if letter not in unit.parts]
        return {letter: f"{fused}[{letter}]" for letter in missing if self.slice_at(fused, letter) is not None}

    def slice_at(self, base: str, letter: str) -> FeatureSlice | None:
        """Returns the slice of the fused projection at `base` that is `q`, `k` or `v`; None if it has none."""
        module, parameter = held_at(self.modules, base)
        if isinstance(module, nn.MultiheadAttention) and parameter == "in_proj_weight":
            # Torch documents this layout (F.multi_head_attention_forward): queries, then keys, then values.
            size, place = module.embed_dim, "qkv".find(letter)
            return FeatureSlice(letter, 1, 3 * size, place * size, (place + 1) * size) if place >= 0 else None
        unit = self._units.get(base)
        if unit is None or parameter:
            return None
        # The unit's path may be a wrapper around attention or the whole block, whose forwards have other signatures. The
        # measurement knows how to call a class that is named attention.
        attention = next((path for path in above(base) if says_attention(type(self.modules[path]).__name__)), None)
        return (self._slices(attention or unit.path, base, unit) or {}).get(letter)

    def _slices(self, path: str, fused: str, unit: Unit) -> dict[str, FeatureSlice] | None:
        attention = self.modules[path]
        inside = join(path, "") if path else ""
        output = unit.parts.get("o", "")
        # A measurement runs the forward several times. Equal layers share one, so a deep model costs no more than one layer.
        key = (_forward_key(attention), self.modules[fused].__class__, fused[len(inside) :], *self._shape(fused))
        if key not in self._measured:
            # BERT-like models keep the output projection in a sibling; then the attention's own result is measured.
            below = output[len(inside) :] if output.startswith(inside) and output in self.modules else None
            fused = unwrapped(fused[len(inside) :])
            self._measured[key] = measure(attention, fused, unwrapped(below) if below else None)
        return self._measured[key]

    def _shape(self, path: str) -> tuple[int, ...]:
        # The sizes and not the shape of the weight: packed weights of different sizes may have one shape.
        return linear_sizes(self.modules[path]) or ()


def _forward_key(module: nn.Module) -> tuple[object, ...]:
    """A key that is equal for modules whose forwards treat features alike: the class, plain attributes and child types.

    Integers named like `layer_idx` are omitted, because they usually are all that differs between the layers of a model.
    Attributes that are not plain values count by identity: their equality is unknown, and a wrong match would give wrong
    slices without an error.
    """
    own = tuple(
        (name, repr(value) if isinstance(value, bool | int | float | str | tuple | None) else id(value))
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "forward" and not ("layer" in name and isinstance(value, int))
    )
    return (type(module), forward_of(module), own, tuple((name, type(child)) for name, child in own_children(module)))
