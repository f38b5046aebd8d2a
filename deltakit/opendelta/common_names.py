"""OpenDelta's common names (`attn@.q@`): one set of names for the parts of eight families of transformers' models.

Only what lies below one of the known classes has common names. Parts without one keep their own. Other architectures have
deltakit's roles instead.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from deltakit.core import above, join, own_modules

Names = Mapping[str, tuple[str, ...]]
"""Paths, each with its common names. A path may have two, one in the other: OPT has no module for its feed-forward part."""


@dataclass(frozen=True)
class Structure:
    """The common names below the root of a class.

    Args:
        outside: those outside of the blocks.
        blocks: for each list of blocks those inside one block.
    """

    blocks: Mapping[str, Names]
    outside: Names = field(default_factory=dict)


def _attention(path: str, *letters: str, common: str = "attn@") -> dict[str, tuple[str, ...]]:
    """The names of the queries, keys, values and outputs, which are at these ends of a path."""
    return {
        f"{path}.{own}": (f"{common}.{ours}",) for own, ours in zip(letters, ("q@", "k@", "v@", "proj@"), strict=True)
    }


def _bert(query: str, *, both: bool) -> Structure:
    """BERT's structure. `both`: the feed-forward part is both `intermediate` and `output`, and not only the second."""
    block = {
        "attention": ("attn@",),
        **_attention("attention", *(f"self.{name}{query}" for name in ("query", "key", "value")), "output.dense"),
        "attention.output.LayerNorm": ("attn@.layer_norm@",),
        **({"intermediate": ("ff@",)} if both else {}),
        "intermediate.dense": ("ff@.w1@",),
        "output": ("ff@",),
        "output.dense": ("ff@.w2@",),
        "output.LayerNorm": ("ff@.layer_norm@",),
    }
    return Structure({"encoder.layer": block}, {"encoder": ("encoder@",), "embeddings": ("embeddings@",)})


def _t5(*stacks: str) -> Structure:
    def part(number: int, common: str, inside: Names) -> dict[str, tuple[str, ...]]:
        return {f"layer.{number}": (common,), **inside, f"layer.{number}.layer_norm": (f"{common}.layer_norm@",)}

    def feed_forward(number: int) -> dict[str, tuple[str, ...]]:
        dense = f"layer.{number}.DenseReluDense"
        return part(number, "ff@", {f"{dense}.wi": ("ff@.w1@",), f"{dense}.wo": ("ff@.w2@",)})

    own = part(0, "attn@", _attention("layer.0.SelfAttention", "q", "k", "v", "o"))
    cross = _attention("layer.1.EncDecAttention", "q", "k", "v", "o", common="crossattn@")
    blocks = {"encoder": own | feed_forward(1), "decoder": own | part(1, "crossattn@", cross) | feed_forward(2)}
    return Structure(
        {f"{stack}.block": blocks[stack] for stack in stacks},
        {stack: (f"{stack}@",) for stack in stacks}
        | {f"{stack}.final_layer_norm": (f"{stack}@.layer_norm@",) for stack in stacks},
    )


_BERT = _bert("", both=True)
_T5 = _t5("encoder", "decoder")
_GPT2 = {
    "attn": ("attn@",),
    "attn.c_attn": ("attn@.q,k,v@",),
    "attn.c_proj": ("attn@.proj@",),
    "ln_1": ("attn@.layer_norm@",),
    "mlp": ("ff@",),
    "mlp.c_fc": ("ff@.w1@",),
    "mlp.c_proj": ("ff@.w2@",),
    "ln_2": ("ff@.layer_norm@",),
}
_OPT = {
    "self_attn": ("attn@",),
    **_attention("self_attn", "q_proj", "k_proj", "v_proj", "out_proj"),
    "fc1": ("ff@", "ff@.w1@"),
    "fc2": ("ff@", "ff@.w2@"),
    "self_attn_layer_norm": ("layer_norm@",),
    "final_layer_norm": ("layer_norm@",),
}
STRUCTURES: Mapping[str, Structure] = {
    "BertModel": _BERT,
    "RobertaModel": _BERT,
    "DebertaV2Model": _bert("_proj", both=False),
    "GPT2Model": Structure({"h": _GPT2}, {"ln_f": ("decoder@.layer_norm@",)}),
    "OPTModel": Structure({"decoder.layers": _OPT}, {"decoder": ("decoder@",)}),
    "T5Model": _T5,
    "T5ForConditionalGeneration": _T5,
    "T5EncoderModel": _t5("encoder"),
}
"""The structures of the classes that have common names, by the name of the class."""


def common_names(backbone: nn.Module) -> Names:
    """Returns the common names of all paths in a backbone that are below a known class; empty if none of it is known."""
    paths = {path: type(module).__name__ for path, module in own_modules(backbone, every_name=True)}
    found: dict[str, tuple[str, ...]] = {}
    for path in paths:
        # The outermost known class counts: a T5ForConditionalGeneration is one itself.
        root = next((root for root in reversed(list(above(path))) if paths.get(root) in STRUCTURES), None)
        if root is not None and path != root:
            relative = path[len(root) + 1 :] if root else path
            found[path] = tuple(join(root, name) for name in _translated(relative, STRUCTURES[paths[root]]))
    return found


def _translated(path: str, structure: Structure) -> Iterator[str]:
    """Yields the names of a path relative to the root of its structure."""
    for blocks, inside in structure.blocks.items():
        if path == blocks or path.startswith(f"{blocks}."):
            stack = "encoder@" if blocks.startswith("encoder") else "decoder@"
            number, _, rest = path[len(blocks) + 1 :].partition(".")
            start = ".".join(part for part in (stack, "block@", number) if part)
            yield from (join(start, name) if name else start for name in _inside(rest, inside))
            return
    yield from _inside(path, structure.outside)


def _inside(path: str, names: Names) -> Iterator[str]:
    """Yields a path with its longest known start translated."""
    start = next((start for start in above(path) if start in names), "")
    rest = path[len(start) :]
    yield from (name + rest for name in names.get(start, (start,)))
