"""A plain training loop, and the accuracy it reaches."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from deltakit.demo.data import Example, batches

BATCH = 32


def train(
    model: nn.Module,
    parameters: Iterable[nn.Parameter],
    examples: Sequence[Example],
    pad: int,
    *,
    lr: float,
    epochs: int,
    step: Callable[[], None] = lambda: None,
) -> None:
    """Trains the parameters with AdamW, a short warm-up and a linear decay; calls `step` after each batch."""
    steps = epochs * -(-len(examples) // BATCH)
    optimizer = torch.optim.AdamW(list(parameters), lr=lr, weight_decay=0.01)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min((n + 1) / warm, max(0.0, (steps - n) / max(1, steps - warm)))
    )
    model.train()
    for epoch in range(epochs):
        for batch in batches(examples, BATCH, pad, seed=epoch):
            model(**batch).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step()


@torch.no_grad()
def predict(model: nn.Module, examples: Sequence[Example], pad: int) -> torch.Tensor:
    """The predicted intents, one a row, in the order in which `batches` gives the examples."""
    model.eval()
    return torch.cat([model(**batch).logits.argmax(-1) for batch in batches(examples, 100, pad)])


def accuracy(model: nn.Module, examples: Sequence[Example], pad: int) -> float:
    """The share of examples whose intent is predicted, in [0, 1]."""
    wanted = torch.cat([batch["labels"] for batch in batches(examples, 100, pad)])
    return float((predict(model, examples, pad) == wanted).float().mean())
