"""A plain training loop, predictions and accuracy."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from deltakit.delta import deltas
from deltakit.demo.data import Example, batches

BATCH = 32


def train(
    model: nn.Module,
    parameters: Iterable[nn.Parameter] | Iterable[Mapping[str, Any]],
    examples: Sequence[Example],
    pad: int,
    *,
    lr: float,
    epochs: int,
    seed: int = 0,
    step: Callable[[float, float], None] | None = None,
) -> None:
    """Trains the parameters with AdamW, a warm-up over the first tenth of the steps and a linear decay.

    Args:
        parameters: the parameters, or groups of them for the optimizer.
        seed: the seed of the order of the examples.
        step: what to call with the loss of each batch, and the share of its examples that are predicted correctly, in [0, 1].
    """
    steps = epochs * -(-len(examples) // BATCH)
    optimizer = torch.optim.AdamW([*parameters], lr=lr, weight_decay=0.01)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min((n + 1) / warm, max(0.0, (steps - n) / max(1, steps - warm)))
    )
    attached = deltas(model)
    model.train()
    for epoch in range(epochs):
        for batch in batches(examples, BATCH, pad, seed=1000 * seed + epoch):
            output = model(**batch)
            loss = output.loss
            for delta in attached:
                loss = loss + delta.penalty()
            loss.backward()
            optimizer.step()
            schedule.step()
            for delta in attached:
                delta.step()
            optimizer.zero_grad()
            if step is not None:
                right = output.logits.detach().argmax(-1) == batch["labels"]
                step(float(loss), float(right.float().mean()))


@torch.no_grad()
def predict(model: nn.Module, examples: Sequence[Example], pad: int) -> Int64[Tensor, " examples"]:
    """Returns the index of the predicted intent of each example, in the order in which `batches` yields them."""
    model.eval()
    return torch.cat([model(**batch).logits.argmax(-1) for batch in batches(examples, 100, pad)])


def accuracy(model: nn.Module, examples: Sequence[Example], pad: int) -> float:
    """Returns the share of examples whose intent is predicted correctly, in [0, 1]."""
    return accuracy_of(predict(model, examples, pad), examples, pad)


def accuracy_of(predictions: Int64[Tensor, " examples"], examples: Sequence[Example], pad: int) -> float:
    """Returns the share of predictions, in the order of `predict`, that are correct, in [0, 1]."""
    return float((predictions == labels(examples, pad)).float().mean())


def labels(examples: Sequence[Example], pad: int) -> Int64[Tensor, " examples"]:
    """Returns the index of the intent of each example, in the order of `predict`."""
    return torch.cat([batch["labels"] for batch in batches(examples, 100, pad)])
