"""Where soft prompts enter: the embeddings of token ids, and the modules that take ids and turn them into hidden states."""

import inspect
from typing import Literal, NamedTuple

from torch import nn

from deltakit.core import BackboneView
from deltakit.errors import TargetError
from deltakit.ops.attention.sites import attends

Positions = Literal["given", "padding", "relative", "unknown"]
"""How a text stack knows positions: it takes them as an argument, counts the ids that are not padding, has relative ones in
its blocks alone; or its structure does not tell."""


def input_embeddings(index: BackboneView) -> list[str]:
    """The paths of all embeddings that share the input embedding's weight (T5 has three).

    Raises:
        TargetError: if the backbone has no embedding of token ids.
    """
    found = [path for path in index.role("embed") if isinstance(index.by_path[path], nn.Embedding)]
    if not found:
        raise TargetError(
            f"{index.owner} has no embedding of token ids, which a soft prompt writes into; use Prefix, which needs none"
        )
    weight = index.by_path[found[0]].weight
    return [path for path, m in index.by_path.items() if isinstance(m, nn.Embedding) and m.weight is weight]


def text_stack(index: BackboneView) -> tuple[str, str | None]:
    """The path of the module that turns ids into hidden states, and of the decoder that attends to it, if there is one.

    It is the innermost module around blocks that holds the input embedding and takes ids with their mask; of an encoder
    and a decoder the encoder, which `generate` calls by itself.

    Raises:
        TargetError: if no such module takes `input_ids`.
    """
    embeddings = input_embeddings(index)
    holders = [path for path in index.by_path if any(_holds(path, embedding) for embedding in embeddings)]
    blocks = index.role("block")
    if blocks:
        # A module of embeddings alone may take ids and their mask too (ESM).
        holders = [path for path in holders if any(_holds(path, block) for block in blocks)]
    masked = [path for path in holders if {"input_ids", "attention_mask"} <= {*names_of_arguments(index.by_path[path])}]
    if not masked:
        plain = [path for path in holders if "input_ids" in names_of_arguments(index.by_path[path])]
        if not plain:
            raise TargetError(
                f"{index.owner}: no forward around {embeddings[0]} takes input_ids, into which a soft prompt puts its own; "
                "put the ids in yourself with SoftPrompt(prepend=False), or use Prefix"
            )
        return plain[0], None
    innermost = [path for path in masked if not any(_holds(path, other) and other != path for other in masked)]
    config = getattr(index.backbone, "config", None)
    if len(innermost) > 1 and getattr(config, "is_encoder_decoder", False):
        decoder = next(
            p for p in reversed(innermost) if "encoder_hidden_states" in names_of_arguments(index.by_path[p])
        )
        return innermost[0], decoder
    return innermost[0], None


class Stack(NamedTuple):
    """What the structure of a text stack tells: how it knows positions, whether it may fill a cache, and whether what its mask
    hides surely changes nothing."""

    positions: Positions
    caches: bool
    hides: bool


def stack_at(index: BackboneView, path: str, at: int) -> Stack:
    """What is known of the text stack at a path, for prompts that enter at the place `at` of the text."""
    # Within the text, whatever blocks count by place (windows, chunks, relative biases) depends on padding there, and no
    # position tells them.
    positions = "unknown" if at else _positions(index, path)
    # All attention may say that it is not causal.
    said = [m.is_causal for m in index.by_path[path].modules() if hasattr(m, "is_causal")]
    return Stack(positions, not said or any(said), _hides(index, path))


def _positions(index: BackboneView, stack: str) -> Positions:
    blocks, embeddings = index.role("block"), input_embeddings(index)
    outside = [
        module
        for path, module in index.by_path.items()
        if _holds(stack, path) and path not in embeddings and not any(_holds(block, path) for block in blocks)
    ]
    if any(isinstance(module, nn.Embedding) and module.padding_idx is not None for module in outside):
        return "padding"
    if "position_ids" in names_of_arguments(index.by_path[stack]):
        return "given"
    plain = all(parameter.ndim < 2 for module in outside for parameter in module.parameters(recurse=False))
    buffers = any(True for module in outside for _ in module.buffers(recurse=False))
    return "relative" if plain and not buffers else "unknown"


def _hides(index: BackboneView, stack: str) -> bool:
    """If it takes a mask, and its blocks mix tokens by attention alone, each by one that is known (measured otherwise:
    convolutions, Fourier transforms, recurrences)."""
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
    """What the forward of a module takes, by name, in its order."""
    return list(inspect.signature(type(module).forward).parameters)[1:]
