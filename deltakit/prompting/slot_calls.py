"""Calls a backbone so that its language-model head computes the slots of a prompt, and no other position."""

import inspect
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from deltakit.core import wide
from deltakit.errors import StateError, TargetError
from deltakit.injection import narrowed_input
from deltakit.prompting.backbone_facts import head_of
from deltakit.prompting.verbalizers.verbalizer import SlotOutput, Verbalizer

_TEXTS = ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds")
"""The arguments of which the first one there has as many positions as the logits."""


def call_at(backbone: nn.Module, call: Mapping[str, Any], slots: Int[Tensor, "batch slots"]) -> SlotOutput:
    """Returns what a backbone computes at some positions of its logits.

    Args:
        call: its keyword arguments; None is left out.

    Raises:
        TargetError: if its head is not called with the hidden states [batch, length, d], so that it cannot be narrowed.
        StateError: if the head gets other positions than the ids of the call have.
    """
    given = {name: value for name, value in call.items() if value is not None}
    if "use_cache" in inspect.signature(backbone.forward).parameters:
        # The prompt is read once. A cache would only take memory.
        given["use_cache"] = False
    with narrowed_input(head_of(backbone), slots) as seen:
        output = backbone(**given)
    logits = output.logits if hasattr(output, "logits") else output[0]
    if seen.inputs is None or logits.shape[:2] != slots.shape:
        raise TargetError(
            f"{type(backbone).__name__}: its language-model head was not called with hidden states [batch, length, d], so the "
            "slots cannot be read; use a language model whose get_output_embeddings() is called in its forward"
        )
    length = next(given[name] for name in _TEXTS if name in given).shape[1]
    if seen.length != length:
        raise StateError(
            f"{type(backbone).__name__}: its head got {seen.length} positions for {length} ids, so slots are elsewhere; "
            "attach soft prompts with trim=True, or write soft tokens in the template"
        )
    return SlotOutput(logits, seen.inputs)


def output_of(
    backbone: nn.Module,
    verbalizer: Verbalizer,
    call: Mapping[str, Any],
    slots: Int[Tensor, "batch slots"],
    *,
    mask: int | None,
) -> SlotOutput:
    """Returns what a verbalizer reads of a backbone's call, on the verbalizer's device.

    Args:
        mask: as of `word_scores`.

    Raises:
        TargetError, StateError: as `call_at` does.
    """
    output = call_at(backbone, call, slots)
    if words := verbalizer.scored_words:
        output = output._replace(word_scores=word_scores(backbone, call, slots, output, words, mask=mask))
    # The layers of a backbone may be on several devices.
    own = next(chain(verbalizer.parameters(), verbalizer.buffers()), None)
    return output if own is None else output.to(own.device)


def word_scores(
    backbone: nn.Module,
    call: Mapping[str, Any],
    slots: Int[Tensor, "batch 1"],
    output: SlotOutput,
    words: Sequence[tuple[int, ...]],
    *,
    mask: int | None,
) -> Float[Tensor, "batch words"]:
    """Returns log-probabilities of words of several tokens: the sum over their tokens.

    With a mask token, all tokens of a word are predicted at once from as many masks. Without, each token is predicted from
    those ahead of it (teacher forcing).

    Args:
        output: what `call_at` has returned for this call.
        words: the ids of each word.
        mask: the id of the mask token in the slot; None for causal models and sentinels.
    """
    rows = {word[:-1] if mask is None else (mask,) * (len(word) - 1) for word in words}
    given: dict[tuple[int, ...], Tensor] = {}
    for inserted in sorted(rows, key=lambda ids: (len(ids), ids)):
        longer = _with_inserted(call, slots, inserted)
        places = slots + torch.arange(len(inserted) + 1, device=slots.device)
        found = output if not inserted else call_at(backbone, longer, places)
        given[inserted] = wide(found.logits).log_softmax(-1)
    scores = []
    for word in words:
        log_probs = given[word[:-1] if mask is None else (mask,) * (len(word) - 1)]
        index = torch.tensor(word, device=log_probs.device).expand(len(log_probs), -1)
        scores.append(log_probs[:, : len(word)].gather(2, index[:, :, None])[..., 0].sum(1))
    return torch.stack(scores, 1)


def _with_inserted(call: Mapping[str, Any], slots: Int[Tensor, "batch 1"], ids: Sequence[int]) -> dict[str, Any]:
    """Returns the arguments of a call with ids inserted behind the slot, into the text that has it."""
    decoder = call.get("decoder_input_ids")
    if decoder is not None:
        return {**call, "decoder_input_ids": _inserted(decoder, slots, ids)}
    found = {**call, "input_ids": _inserted(call["input_ids"], slots, ids)}
    for name in ("attention_mask", "token_type_ids"):
        rows = call.get(name)
        if rows is not None:
            # As at the slot itself.
            longer = _inserted(rows, slots, [0] * len(ids))
            behind = torch.arange(longer.shape[1], device=rows.device) - slots
            found[name] = torch.where((behind > 0) & (behind <= len(ids)), rows.gather(1, slots), longer)
    return found


def _inserted(
    rows: Int[Tensor, "batch length"], slots: Int[Tensor, "batch 1"], ids: Sequence[int]
) -> Int[Tensor, "batch longer"]:
    length, count = rows.shape[1], len(ids)
    place = torch.arange(length + count, device=rows.device).expand(len(rows), -1)
    new = length + place - slots - 1
    take = torch.where(place <= slots, place, torch.where(place <= slots + count, new, place - count))
    more = torch.tensor(list(ids), dtype=rows.dtype, device=rows.device).expand(len(rows), -1)
    return torch.cat([rows, more], 1).gather(1, take)
