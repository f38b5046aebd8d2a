"""Where soft prompts enter: the embeddings of token ids, and the modules that take ids and turn them into hidden states."""

import inspect
from typing import Literal, NamedTuple

from torch import nn

from deltakit.errors import TargetError
from deltakit.ops.attention.sites import attends
from deltakit.selection import BackboneIndex

Positions = Literal["given", "padding", "relative", "unknown"]
"""How a text stack knows positions: it takes them as an argument, counts the ids that are not padding, has relative ones in
its blocks alone; or its structure does not tell."""


def input_embeddings(backbone: nn.Module) -> list[str]:
    """The paths of all embeddings that share the input embedding's weight (T5 has three).

    Raises:
        TargetError: if the backbone has no embedding of token ids.
    """
    return _embeddings(BackboneIndex(backbone))


def _embeddings(modules: BackboneIndex) -> list[str]:
    found = [path for path in modules.roles.embed if isinstance(modules.by_path[path], nn.Embedding)]
    if not found:
        raise TargetError(
            f"{modules.owner} has no embedding of token ids, which a soft prompt writes into; use Prefix, which needs none"
        )
    weight = modules.by_path[found[0]].weight
    return [path for path, m in modules.by_path.items() if isinstance(m, nn.Embedding) and m.weight is weight]


def text_stack(backbone: nn.Module) -> tuple[str, str | None]:
    """The path of the module that turns ids into hidden states, and of the decoder that attends to it, if there is one.

    It is the innermost module around blocks that holds the input embedding and takes ids with their mask; of an encoder
    and a decoder the encoder, which `generate` calls by itself.

    Raises:
        TargetError: if no such module takes `input_ids`.
    """
    modules = BackboneIndex(backbone)
    embeddings = _embeddings(modules)
    holders = [path for path in modules.by_path if any(_holds(path, embedding) for embedding in embeddings)]
    if modules.roles.blocks:
        # A module of embeddings alone may take ids and their mask too (ESM).
        holders = [path for path in holders if any(_holds(path, block) for block in modules.roles.blocks)]
    masked = [
        path for path in holders if {"input_ids", "attention_mask"} <= {*names_of_arguments(modules.by_path[path])}
    ]
    if not masked:
        plain = [path for path in holders if "input_ids" in names_of_arguments(modules.by_path[path])]
        if not plain:
            raise TargetError(
                f"{modules.owner}: no forward around {embeddings[0]} takes input_ids, into which a soft prompt puts its own; "
                "put the ids in yourself with SoftPrompt(prepend=False), or use Prefix"
            )
        return plain[0], None
    innermost = [path for path in masked if not any(_holds(path, other) and other != path for other in masked)]
    config = getattr(backbone, "config", None)
    if len(innermost) > 1 and getattr(config, "is_encoder_decoder", False):
        decoder = next(
            p for p in reversed(innermost) if "encoder_hidden_states" in names_of_arguments(modules.by_path[p])
        )
        return innermost[0], decoder
    return innermost[0], None


class Stack(NamedTuple):
    """What the structure of a text stack tells: how it knows positions, whether it may fill a cache, and whether what its mask
    hides surely changes nothing."""

    positions: Positions
    caches: bool
    hides: bool


def stack_at(backbone: nn.Module, path: str, at: int) -> Stack:
    """What is known of the text stack at a path, for prompts that enter at the place `at` of the text."""
    modules = BackboneIndex(backbone)
    # Within the text, whatever blocks count by place (windows, chunks, relative biases) depends on padding there, and no
    # position tells them.
    positions = "unknown" if at else _positions(modules, path)
    # All attention may say that it is not causal.
    said = [m.is_causal for m in modules.by_path[path].modules() if hasattr(m, "is_causal")]
    return Stack(positions, not said or any(said), _hides(modules, path))


def _positions(modules: BackboneIndex, stack: str) -> Positions:
    blocks, embeddings = modules.roles.blocks, _embeddings(modules)
    outside = [
        module
        for path, module in modules.by_path.items()
        if _holds(stack, path) and path not in embeddings and not any(_holds(block, path) for block in blocks)
    ]
    if any(isinstance(module, nn.Embedding) and module.padding_idx is not None for module in outside):
        return "padding"
    if "position_ids" in names_of_arguments(modules.by_path[stack]):
        return "given"
    plain = all(parameter.ndim < 2 for module in outside for parameter in module.parameters(recurse=False))
    buffers = any(True for module in outside for _ in module.buffers(recurse=False))
    return "relative" if plain and not buffers else "unknown"


def _hides(modules: BackboneIndex, stack: str) -> bool:
    """If it takes a mask, and its blocks mix tokens by attention alone, each by one that is known (measured otherwise:
    convolutions, Fourier transforms, recurrences)."""
    blocks = [path for path in modules.roles.blocks if _holds(stack, path)]
    inside = [(path, m) for path, m in modules.by_path.items() if any(_holds(block, path) for block in blocks)]
    mixing = any(isinstance(m, nn.modules.conv._ConvNd) and set(m.kernel_size) != {1} for _, m in inside)
    attention = [path for path, module in inside if attends(module)]
    takes_mask = "attention_mask" in names_of_arguments(modules.by_path[stack])
    known = all(any(_holds(block, path) for path in attention) for block in blocks)
    return takes_mask and bool(blocks) and not mixing and known


def _holds(path: str, other: str) -> bool:
    return other == path or not path or other.startswith(f"{path}.")


def names_of_arguments(module: nn.Module) -> list[str]:
    """What the forward of a module takes, by name, in its order."""
    return list(inspect.signature(type(module).forward).parameters)[1:]
