"""The demo's encoder as a masked-language model: a LoRA delta and a new head learn to fill gaps in unlabelled requests."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers as tf
from intent_tasks import TASKS
from torch import Tensor, nn

import deltakit as dk
from deltakit.demo.data import Example, batches
from deltakit.demo.run import bundled_model

BATCH = 32
RATE = 3e-3
MASKED = 0.2
"""The share of tokens that is predicted."""
HEAD = "cls.predictions.transform"
"""What the head has of its own. Its rows for words are the input embedding, which stays frozen."""
METHOD = dk.LoRA(r=16, at=["@attn.{q,k,v,o}", "@ff.{up,down}"])

MaskedBatch = tuple[Tensor, Tensor, Tensor, Tensor]
"""Ids [batch, length] with gaps, the attention mask, where the gaps are, and the ids that belong there [gaps]."""


def quiet() -> None:
    """Keeps transformers' bars and notes out of the output."""
    tf.logging.set_verbosity_error()
    tf.logging.disable_progress_bar()


@cache
def tokenizer() -> Any:
    """Returns the encoder's tokenizer."""
    return tf.AutoTokenizer.from_pretrained(bundled_model())


def fit(
    groups: Sequence[dict[str, Any]],
    found: Iterable[Any],
    loss_of: Callable[[Any], Tensor],
    steps: int,
    **common: float,
) -> None:
    """Trains groups of parameters with AdamW on `steps` batches: a warm-up over a tenth of them, then a linear decay.

    Args:
        common: options of the optimizer that all groups share, such as `lr`.
    """
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01, **common)
    warm = max(1, steps // 10)
    decay = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min((n + 1) / warm, max(0.0, (steps - n) / max(1, steps - warm)))
    )
    parameters = [parameter for group in groups for parameter in group["params"]]
    for _, batch in zip(range(steps), found, strict=False):
        loss_of(batch).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay.step()
        optimizer.zero_grad()


def unlabelled(split: str) -> list[Example]:
    """Returns the requests of a split of all tasks, "pool" or "valid", as token ids; their labels are left out."""
    texts = [request for task in TASKS.values() for request, _ in getattr(task(), split)]
    return [Example(ids, 0) for ids in tokenizer()(texts, truncation=True, max_length=64)["input_ids"]]


def masked(requests: Sequence[Example], seed: int) -> Iterator[MaskedBatch]:
    """Yields batches with gaps. Of the chosen tokens, four in five become the mask token and the others stay."""
    own = tokenizer()
    chance = torch.Generator().manual_seed(seed)
    for batch in batches(requests, BATCH, own.pad_token_id, seed=seed):
        ids, attention = batch["input_ids"], batch["attention_mask"]
        words = ~torch.isin(ids, torch.tensor(own.all_special_ids))
        chosen = (torch.rand(ids.shape, generator=chance) < MASKED) & words
        hidden = chosen & (torch.rand(ids.shape, generator=chance) < 0.8)
        if chosen.any():
            yield ids.masked_fill(hidden, own.mask_token_id), attention, chosen, ids[chosen]


def masked_loss(model: Any, batch: MaskedBatch) -> Tensor:
    """Returns the cross-entropy of the words in the gaps. Only there the head is computed."""
    ids, attention, chosen, words = batch
    hidden = model.base_model(input_ids=ids, attention_mask=attention).last_hidden_state[chosen]
    return F.cross_entropy(model.cls(hidden), words)


@torch.no_grad()
def held_out(model: nn.Module) -> float:
    """Returns the mean loss on the gaps of requests that adaptation has not seen."""
    model.eval()
    found = [(masked_loss(model, batch).item(), len(batch[3])) for batch in masked(unlabelled("valid"), 0)]
    return sum(loss * count for loss, count in found) / sum(count for _, count in found)


def adapt(place: Path, epochs: int) -> dict[str, Any]:
    """Trains the delta and the head, saves them, and returns what was measured."""
    quiet()
    torch.manual_seed(0)
    model: Any = tf.AutoModelForMaskedLM.from_pretrained(bundled_model())
    delta = dk.attach(model, METHOD, train=HEAD)
    requests = unlabelled("pool")
    steps = epochs * -(-len(requests) // BATCH)
    start, before = time.perf_counter(), held_out(model)
    model.train()
    endless = (batch for epoch in range(epochs + 1) for batch in masked(requests, epoch + 1))
    fit([{"params": list(delta.parameters())}], endless, lambda batch: masked_loss(model, batch), steps, lr=RATE)
    seconds, after = time.perf_counter() - start, held_out(model)
    delta.save(place)
    return {"epochs": epochs, "requests": len(requests), "before": before, "after": after, "seconds": seconds}


@cache
def adapted(place: Path) -> Any:
    """Returns the adapted masked-language model, with the delta in its weights."""
    quiet()
    model = tf.AutoModelForMaskedLM.from_pretrained(bundled_model())
    return dk.load(place, model).merge_and_unload().eval()
