"""The lines under a tree: what its glyphs and columns mean, and the totals."""

from collections.abc import Collection, Sequence

from deltakit.view.node import Node, walk
from deltakit.view.report import share
from deltakit.view.tree_rows import GLYPHS, Row
from deltakit.view.units import memory

_STATES = {
    GLYPHS["trainable"]: "trainable",
    GLYPHS["frozen"]: "frozen",
    GLYPHS["mixed"]: "partly trainable",
    GLYPHS["delta"]: "delta",
    GLYPHS["delta"] + GLYPHS["frozen"]: "frozen delta",
    "off": "inactive delta",
    "merged": "delta in the weights",
}


def legend(node: Node, rows: Sequence[Row], columns: Collection[str]) -> list[str]:
    """Returns what explains the rows, in parts: only what they have."""
    parts = []
    if "members" in columns and any(row.cells.get("members") for row in rows):
        counted = ", counted together" if "count" in columns else ""
        parts.append(f"×N: N modules{counted}")
    if "state" in columns:
        there = {row.cells.get("state") for row in rows}
        parts += [f"{glyph} {word}" for glyph, word in _STATES.items() if glyph in there]
    if "each" in columns:
        parts.append("each: in one module")
    if "calls" in columns:
        parts.append("calls: of each module, FLOP: of all of a row; [shape] +N: N more outputs")
    if any(part.omitted for part in walk(node)):
        parts.append("missing numbers have no parameters (all_modules=True)")
    return parts


def totals(node: Node) -> list[str]:
    """Returns the totals, in parts. Each parameter is counted once, and shares are those of the backbone's own parameters."""
    sizes = node.sizes
    trained = sizes.total_trained
    parts = [f"{sizes.parameters:,} parameters"]
    if sizes.delta:
        idle = ((sizes.off, "inactive"), (sizes.merged, "merged"), (sizes.delta - sizes.delta_trained, "frozen"))
        words = ", ".join(f"{number:,} {word}" for number, word in idle if number)
        parts.append(f"+{sizes.delta:,} in deltas" + (f" ({words})" if words else ""))
    of = f" of {sizes.parameters:,}" if sizes.delta else ""
    parts.append(f"trainable {trained:,} ({share(trained, sizes.parameters)}{of})")
    parts.append(f"frozen {sizes.parameters - sizes.trained:,}")
    parts += [memory(sizes.bytes)] if sizes.bytes else []
    if node.left_out:
        modules = f"{node.left_out:,} module{'' if node.left_out == 1 else 's'}"
        parts.append(f"left out by the filter: {modules}, which the counts include")
    return parts
