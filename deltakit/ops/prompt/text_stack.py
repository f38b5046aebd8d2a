"""Finds where soft prompts enter: the embeddings of token ids, and the module that turns ids into hidden states."""

import inspect
from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import nn

from deltakit.core import BackboneView, own_modules, parent_of, wrapped_layer
from deltakit.errors import TargetError
from deltakit.ops.attention.sites import attends
from deltakit.selection import outermost_models

Positions = Literal["given", "padding", "relative", "unknown"]
"""How a text stack gets the positions of tokens.

- "given": it accepts `position_ids`.
- "padding": it counts the ids that are not padding (RoBERTa).
- "relative": only its blocks use positions, as distances (T5).
- "unknown": its structure does not show it.
"""


def input_embeddings(index: BackboneView) -> list[list[str]]:
    """Returns the paths of the embeddings of token ids: for each model all that share the weight (T5 has three).

    Nearly always the backbone is one model. A module that holds two encoders holds two.

    Raises:
        TargetError: if the backbone has no embedding of token ids, or PEFT wraps it.
    """
    found = [path for path in index.role("embed") if isinstance(index.by_path[path], nn.Embedding)]
    if not found:
        raise TargetError(
            f"{index.owner}: it has no embedding of token ids, and a soft prompt is inserted there; use another method: "
            "LoRA, or Prefix where there is attention"
        )
    models = outermost_models(index.by_path)
    groups: list[list[str]] = []
    for first in found:
        if any(first in group for group in groups):
            continue
        _refuse_wrapped(index, first)
        model = next((path for path in models if _holds(path, first)), "")
        weight = index.by_path[first].weight
        modules = index.by_path.items()
        groups.append(
            [path for path, m in modules if isinstance(m, nn.Embedding) and m.weight is weight and _holds(model, path)]
        )
    return groups


def _refuse_wrapped(index: BackboneView, embedding: str) -> None:
    around = index.by_path[parent_of(embedding)]
    if wrapped_layer(around) is index.by_path[embedding]:
        raise TargetError(
            f"{embedding}: PEFT's {type(around).__name__} around this embedding would look up the prompt's ids in its own "
            "weights; call PEFT's merge_and_unload() first, or use Prefix instead"
        )


def text_stack(index: BackboneView, embeddings: Sequence[str]) -> tuple[str, str | None]:
    """Returns the path of the module that turns ids into hidden states, and the path of the decoder that attends to it.

    The second path is None unless the model is an encoder and a decoder.

    Args:
        embeddings: the embeddings of one model, as `input_embeddings` returns them.

    Raises:
        TargetError: if no module around these embeddings accepts `input_ids`.
    """
    # Ids must be inserted where masks and positions are still derived from them. An embedding hook alone is too late: by
    # then their shapes are fixed. The innermost module that accepts ids and mask is early enough, and heads around it
    # never see the prompt.
    holders = [path for path in index.by_path if any(_holds(path, embedding) for embedding in embeddings)]
    blocks = index.role("block")
    if blocks:
        # ESM's module of embeddings also accepts ids and mask, but it has no blocks.
        holders = [path for path in holders if any(_holds(path, block) for block in blocks)]
    masked = [path for path in holders if {"input_ids", "attention_mask"} <= {*names_of_arguments(index.by_path[path])}]
    if not masked:
        plain = [path for path in holders if "input_ids" in names_of_arguments(index.by_path[path])]
        if not plain:
            raise TargetError(
                f"{index.owner}: no module around {embeddings[0]} accepts input_ids, and a soft prompt is inserted there; "
                "insert the ids yourself with SoftPrompt(prepend=False), or use Prefix"
            )
        return plain[0], None
    innermost = [path for path in masked if not any(_holds(path, other) and other != path for other in masked)]
    # The config of the model may be inside a wrapper, and those of its stacks do not speak of the other stack.
    configs = [getattr(index.by_path[path], "config", None) for path in holders]
    # `generate` calls the encoder on its own, without the model around it, so the prompt must enter at the encoder.
    if len(innermost) > 1 and any(getattr(config, "is_encoder_decoder", False) for config in configs):
        decoder = next(
            p for p in reversed(innermost) if "encoder_hidden_states" in names_of_arguments(index.by_path[p])
        )
        return innermost[0], decoder
    return innermost[0], None


class Stack(NamedTuple):
    """What the structure of a text stack shows.

    `positions` is how it gets positions, `caches` whether it may fill a cache, and `hides` whether tokens that its mask
    hides are certain to have no effect on the others.
    """

    positions: Positions
    caches: bool
    hides: bool


def stack_at(index: BackboneView, path: str, at: int) -> Stack:
    """Returns what the structure of the text stack at a path shows.

    Args:
        at: the number of text tokens before the prompt.
    """
    # With padding inside the text, windows, chunks and relative biases count the padding as tokens, and no argument of
    # the call can correct them. Padding before the text leaves the distances between all other tokens as they are.
    positions = "unknown" if at else _positions(index, path)
    # A cache is useless without causal attention. If every attention module says `is_causal = False`, there is none.
    said = [m.is_causal for _, m in own_modules(index.by_path[path]) if hasattr(m, "is_causal")]
    return Stack(positions, not said or any(said), _hides(index, path))


def _positions(index: BackboneView, stack: str) -> Positions:
    blocks = index.role("block")
    embeddings = {path for group in input_embeddings(index) for path in group}
    outside = [
        module
        for path, module in index.by_path.items()
        if _holds(stack, path) and path not in embeddings and not any(_holds(block, path) for block in blocks)
    ]
    # RoBERTa gives its table of positions a padding_idx, and computes positions from the ids that are not padding.
    if any(isinstance(module, nn.Embedding) and module.padding_idx is not None for module in outside):
        return "padding"
    if "position_ids" in names_of_arguments(index.by_path[stack]):
        return "given"
    # A matrix or a buffer outside the blocks may be a table of absolute positions. Without any, blocks use distances.
    plain = all(parameter.ndim < 2 for module in outside for parameter in module.parameters(recurse=False))
    buffers = any(True for module in outside for _ in module.buffers(recurse=False))
    return "relative" if plain and not buffers else "unknown"


def _hides(index: BackboneView, stack: str) -> bool:
    """Whether it accepts a mask, and each of its blocks mixes tokens by attention of a known form only.

    Convolutions, Fourier transforms and recurrences were measured to let masked tokens change the others.
    """
    blocks = [path for path in index.role("block") if _holds(stack, path)]
    inside = [(path, m) for path, m in index.by_path.items() if any(_holds(block, path) for block in blocks)]
    mixing = any(isinstance(m, nn.modules.conv._ConvNd) and set(m.kernel_size) != {1} for _, m in inside)
    attention = [path for path, module in inside if attends(module)]
    takes_mask = "attention_mask" in names_of_arguments(index.by_path[stack])
    known = all(any(_holds(block, path) for path in attention) for block in blocks)
    return takes_mask and bool(blocks) and not mixing and known


def _holds(path: str, other: str) -> bool:
    return other == path or not path or other.startswith(f"{path}.")


def names_of_arguments(module: nn.Module) -> list[str]:
    """Returns the names of the arguments of a module's forward, in order."""
    return list(inspect.signature(type(module).forward).parameters)[1:]
