"""Soft prompts as token ids: which modules take ids, and how the ids of a prompt are put into a call.

A prompt enters as ids and not as `inputs_embeds`: with ids, classification heads that look for the last token, positions
that are derived from padding, and `generate` stay right (measured on GPT-2, Llama, BART and RoBERTa).
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deltakit.errors import StateError, TargetError
from deltakit.modules import Modules


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
    masked = [path for path in holders if {"input_ids", "attention_mask"} <= _parameters(modules.by_path[path])]
    if not masked:
        plain = [path for path in holders if "input_ids" in _parameters(modules.by_path[path])]
        if not plain:
            raise TargetError(
                f"{modules.owner}: no forward around {embeddings[0]} takes input_ids, into which a soft prompt puts its own; "
                "put the ids in yourself with SoftPrompt(prepend=False), or use Prefix"
            )
        return plain[0], None
    innermost = [path for path in masked if not any(_holds(path, other) and other != path for other in masked)]
    config = getattr(backbone, "config", None)
    if len(innermost) > 1 and getattr(config, "is_encoder_decoder", False):
        decoder = next(p for p in reversed(innermost) if "encoder_hidden_states" in _parameters(modules.by_path[p]))
        return innermost[0], decoder
    return innermost[0], None


def _holds(path: str, other: str) -> bool:
    return other == path or not path or other.startswith(f"{path}.")


def _parameters(module: nn.Module) -> set[str]:
    return set(inspect.signature(type(module).forward).parameters)


def insert(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], first: int, count: int, at: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with `count` ids from `first` on put in at the place `at`, and all that goes by length.

    With a filled cache, which holds the prompt already, only the mask grows and positions move on.

    Raises:
        StateError: if the call has no ids, or a mask that cannot grow.
    """
    call = _named(module, args, kwargs)
    ids = call.get("input_ids")
    if not isinstance(ids, Tensor):
        raise StateError(
            f"{type(module).__name__}: a soft prompt is inserted as token ids, and this call has none (inputs_embeds?); "
            "call the model with input_ids, or attach SoftPrompt(prepend=False)"
        )
    cached = _cached(call)
    mask = call.get("attention_mask")
    if isinstance(mask, Tensor):
        call["attention_mask"] = grown_mask(module, mask, count, at)
    for name in ("position_ids", "cache_position"):
        if isinstance(call.get(name), Tensor):
            call[name] = _positions(call[name], count, at, cached)
    if cached:
        return (), call
    prompt = torch.arange(first, first + count, device=ids.device, dtype=ids.dtype).expand(ids.shape[0], count)
    call["input_ids"] = torch.cat([ids[:, :at], prompt, ids[:, at:]], dim=1)
    call["input_ids"].with_prompt = True
    if isinstance(call.get("token_type_ids"), Tensor):
        types = call["token_type_ids"]
        call["token_type_ids"] = torch.cat([types[:, :at], torch.zeros_like(prompt), types[:, at:]], dim=1)
    return (), call


def grown_mask(module: nn.Module, mask: Tensor, count: int, at: int) -> Tensor:
    """A mask [batch, length] that lets `count` more tokens be seen at the place `at`."""
    if mask.ndim != 2:
        raise StateError(
            f"{type(module).__name__}: a soft prompt cannot be inserted under a mask of shape {tuple(mask.shape)}; expected "
            "[batch, length]; a static cache makes such masks: use a dynamic one"
        )
    return torch.cat([mask[:, :at], mask.new_ones(mask.shape[0], count), mask[:, at:]], dim=1)


def trimmed(output: Any, length: int, count: int, at: int) -> Any:
    """A model's result without the rows of the prompt: hidden states and attentions as long as the caller's input."""
    if isinstance(output, Tensor):
        return _without(output, length, count, at)
    if isinstance(output, tuple) and not hasattr(output, "_fields"):
        return tuple(trimmed(value, length, count, at) for value in output)
    if isinstance(output, Mapping):
        rows = {
            key: value for key, value in output.items() if key in ("last_hidden_state", "hidden_states", "attentions")
        }
        new = {key: trimmed(value, length, count, at) for key, value in rows.items()}
        return type(output)(**{**output, **new})
    return output


def _without(x: Tensor, length: int, count: int, at: int) -> Tensor:
    # [batch, length, d] or, for attentions, [batch, heads, length, length].
    for dim in {3: (1,), 4: (2, 3)}.get(x.ndim, ()):
        if x.shape[dim] == length:
            x = torch.cat([x.narrow(dim, 0, at), x.narrow(dim, at + count, length - at - count)], dim=dim)
    return x


def _named(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _cached(call: Mapping[str, Any]) -> bool:
    """Whether a call goes on from a cache that is filled: of keys and values, or the state of a recurrence."""
    caches = [call[name] for name in ("past_key_values", "cache_params", "state") if call.get(name) is not None]
    return any(_filled(cache) for cache in caches)


def _filled(cache: Any) -> bool:
    if isinstance(cache, list | tuple):
        return bool(cache)
    for asks in ("get_seq_length", "has_previous_state"):
        try:
            return bool(getattr(cache, asks)())
        except (AttributeError, ValueError):
            # transformers' caches raise where they have no layer of the kind that is asked about.
            continue
    return False


def _positions(positions: Tensor, count: int, at: int, cached: bool) -> Tensor:
    if cached:
        return positions + count
    moved = torch.cat([positions[..., :at], positions[..., at:] + count], dim=-1)
    start = positions[..., at - 1 : at] + 1 if at else torch.zeros_like(positions[..., :1])
    inserted = start + torch.arange(count, device=positions.device)
    return torch.cat([moved[..., :at], inserted, moved[..., at:]], dim=-1)
