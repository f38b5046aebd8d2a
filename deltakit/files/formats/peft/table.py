"""PEFT's methods whose files need no code of their own: one row for each. Their files are read and written by it.

To add a method of deltakit, add a `Row` (its fields are explained in `row`) with:

1. `peft_type` and `method`: PEFT's and deltakit's name of it.
2. `tensors`: for each tensor what stands behind the path of the module in PEFT's file, and a `Stored` with its name in
   deltakit; if the shapes differ, with a function for each direction. Shared tensors have names such as "shared.A".
3. `fields`: for each field of PEFT's config that is an option of ours, a `Field` with our name, its type and PEFT's default.
   What PEFT's tensors or several fields say together is `computed` for each target, and `written` for the config.
4. `layers`: the types of modules that PEFT has it for. `differs` says at which of them PEFT computes something else.
5. `refuses`: why deltakit does not have what a config says. A field that is in no list is warned of, so name those that change
   nothing in `known`, and those that change the training alone in `training_only`.

Then add it to the tests of reading and writing (`tests/files/test_peft_table.py`), where PEFT's outputs are the oracle.
"""

from collections.abc import Mapping, Sequence
from typing import TypedDict

from torch import Tensor, nn

from deltakit.core import Site
from deltakit.files.formats.layers import Layers, pattern_of
from deltakit.files.formats.patterns import Pattern
from deltakit.files.formats.peft import bias_rows, map_rows, shared_rows, sparse_rows, weight_rows
from deltakit.files.formats.peft.row import Options, OptionsAt, Row, Stored
from deltakit.files.formats.source import Source
from deltakit.files.formats.writing import Writing


class _FeedForward(TypedDict):
    feedforward_modules: str | list[str] | None


def _sides(source: Source) -> OptionsAt:
    """IA3 scales the inputs of feed-forward modules, and the outputs of all others."""
    inputs = source.options(_FeedForward, {"feedforward_modules": None})["feedforward_modules"] or []
    where = source.config_file / "feedforward_modules"
    pattern = Pattern(f"({inputs})$", inputs, where) if isinstance(inputs, str) else None

    def side(path: str, tensors: Mapping[str, Tensor]) -> Options:
        scale = tensors["scale"]
        # Scales of a linear layer's input are a row, and those of its output a column; a convolution's shape does not tell.
        before = scale.shape[0] == 1 if scale.ndim == 2 and 1 in scale.shape and scale.numel() > 1 else None
        if before is None:
            # A list has ends of paths. Without a dot in between, unlike in `target_modules`.
            before = pattern.matches(path) if pattern is not None else any(map(path.endswith, inputs))
        return {"side": "input" if before else "output"}

    return side


def _scale(scale: Tensor, site: Site) -> Tensor:
    if isinstance(site.target, nn.modules.conv._ConvNd):
        return scale.reshape(1, -1, *[1] * len(site.target.kernel_size))
    return scale.reshape((1, -1) if type(site.module).acts_before() else (-1, 1))


def _inputs(_writing: Writing, sites: Sequence[Site]) -> Options:
    inputs = [site.path for site in sites if type(site.module).acts_before()]
    # PEFT takes these names for the ends of paths also within a word.
    return {"feedforward_modules": pattern_of(inputs, (site.path for site in sites if site.path not in inputs), "")}


TABLE = (
    Row(
        peft_type="IA3",
        method="ia3",
        tensors={".ia3_l": Stored("scale", Tensor.flatten, _scale)},
        fields={},
        layers=Layers((nn.Conv2d, nn.Conv3d)),
        computed=_sides,
        written=_inputs,
        known=("feedforward_modules", "init_ia3_weights"),
    ),
    *weight_rows.ROWS,
    *shared_rows.ROWS,
    *map_rows.ROWS,
    *sparse_rows.ROWS,
    *bias_rows.ROWS,
)
