"""Where soft prompts enter: the embeddings of token ids, and the modules that take ids and turn them into hidden states."""

import inspect
from typing import Literal

from torch import nn

from deltakit.attention.sites import attends
from deltakit.errors import TargetError
from deltakit.modules import Modules

Positions = Literal["given", "padding", "relative", "unknown"]
"""How a text stack knows positions: it takes them as an argument, counts the ids that are not padding, has relative ones in
its blocks alone; or its structure does not tell."""


def input_embeddings(backbone: nn.Module) -> list[str]:
    """The paths of all embeddings that share the input embedding's weight (T5 has three).

    Raises:
        TargetError: if the backbone has no embedding of token ids.
    """
    modules = Modules(backbone)
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
    modules = Modules(backbone)
    embeddings = input_embeddings(backbone)
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


def positions_of(backbone: nn.Module, stack: str, at: int) -> Positions:
    """How the text stack at a path knows the positions of its tokens, read from its structure.

    `at`: the place where a prompt enters. Within the text, whatever blocks count by place (windows, chunks, relative biases)
    depends on padding there, and no position tells them.
    """
    if at:
        return "unknown"
    modules = Modules(backbone)
    inside = {path: module for path, module in modules.by_path.items() if _holds(stack, path)}
    blocks, embeddings = modules.roles.blocks, input_embeddings(backbone)
    outside = [
        module for path, module in inside.items() if path not in embeddings and not any(_holds(b, path) for b in blocks)
    ]
    tables = [module for module in outside if isinstance(module, nn.Embedding)]
    if any(table.padding_idx is not None for table in tables):
        return "padding"
    if "position_ids" in names_of_arguments(modules.by_path[stack]):
        return "given"
    plain = all(parameter.ndim < 2 for module in outside for parameter in module.parameters(recurse=False))
    buffers = any(True for module in outside for _ in module.buffers(recurse=False))
    return "relative" if plain and not buffers else "unknown"


def may_cache(backbone: nn.Module, stack: str) -> bool:
    """Whether the text stack at a path may fill a cache: unless all its attention says that it is not causal."""
    said = [m.is_causal for m in backbone.get_submodule(stack).modules() if hasattr(m, "is_causal")]
    return not said or any(said)


def hides(backbone: nn.Module, stack: str) -> bool:
    """Whether the text stack at a path surely changes nothing by what its mask hides: if its blocks mix tokens by attention
    alone, each by one that is known (measured otherwise: convolutions, Fourier transforms, recurrences)."""
    modules = Modules(backbone)
    blocks = [path for path in modules.roles.blocks if _holds(stack, path)]
    mixing = [
        path
        for path, m in modules.by_path.items()
        if isinstance(m, nn.modules.conv._ConvNd)
        and any(_holds(block, path) for block in blocks)
        and set(m.kernel_size) != {1}
    ]
    attention = [path for path, module in modules.by_path.items() if attends(module)]
    return bool(blocks) and not mixing and all(any(_holds(block, path) for path in attention) for block in blocks)


def _holds(path: str, other: str) -> bool:
    return other == path or not path or other.startswith(f"{path}.")


def names_of_arguments(module: nn.Module) -> list[str]:
    """What the forward of a module takes, by name, in its order."""
    return list(inspect.signature(type(module).forward).parameters)[1:]
