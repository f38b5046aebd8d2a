"""Reads PEFT's IA3."""

from typing import TypedDict

from deltakit.files.formats.format import Parts
from deltakit.files.formats.patterns import Pattern
from deltakit.files.formats.peft.adapter import Adapter
from deltakit.files.formats.peft.keys import IA3
from deltakit.files.schema import checked


class _Config(TypedDict, total=False):
    feedforward_modules: str | list[str] | None


def read_ia3(adapter: Adapter, parts: Parts) -> None:
    """Adds the scales of an adapter to the parts.

    Raises:
        CheckpointError: if the config is damaged.
    """
    field = "feedforward_modules"
    found = {key: value for key, value in adapter.config.items() if key == field}
    inputs = checked(found, _Config, adapter.config_file).get(field) or []
    pattern = Pattern(f"({inputs})$", inputs, adapter.config_file / field) if isinstance(inputs, str) else None
    for path, part in adapter.parts(IA3).items():
        scale = part["scale"]
        # Scales of a linear layer's input are a row, and those of its output a column; a convolution's shape does not tell.
        before = scale.shape[0] == 1 if scale.ndim == 2 and 1 in scale.shape and scale.numel() > 1 else None
        if before is None:
            # A list has ends of paths. Without a dot in between, unlike in `target_modules`.
            before = pattern.matches(path) if pattern is not None else any(map(path.endswith, inputs))
        parts.add("ia3", {"side": "input" if before else "output"}, path, {"scale": scale.flatten()})
