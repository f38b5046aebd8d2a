"""Multitask prompts: P* and for each task k a low-rank matrix by which it is multiplied, P_k = P* ∘ (u_k v_k).

Wang et al. 2023, https://arxiv.org/abs/2303.02861, section 3.2. The prompt P* is trained on several tasks first, and the
prompts of new tasks start from it. Here all products u_k v_k start as ones, so each task starts from P* itself. In PEFT they
start as products of two numbers of size 0.02, so P_k starts near 0, whatever P* is. An untrained prompt is not the identity.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltakit.core import Design, Target, wants_start_values
from deltakit.errors import OptionError
from deltakit.ops import StartedPrompt


class TaskPrompts(nn.Module):
    """The prompts of all tasks, one after the other: `prompt` [tokens, d] times `columns` [tasks, tokens, rank] `rows`."""

    def __init__(self, start: Float[Tensor, "tokens d"], tasks: int, rank: int) -> None:
        super().__init__()
        tokens, d = start.shape
        self.prompt = nn.Parameter(start)
        self.columns = nn.Parameter(start.new_empty(tasks, tokens, rank))
        self.rows = nn.Parameter(start.new_empty(tasks, rank, d))
        if wants_start_values(self.columns):
            nn.init.normal_(self.columns, std=0.02)
            nn.init.zeros_(self.rows)
            with torch.no_grad():
                self.columns[:, :, 0] = 1
                self.rows[:, 0] = 1

    def forward(self) -> Float[Tensor, "all d"]:
        return (self.prompt * (self.columns @ self.rows)).flatten(0, 1)


@dataclass(frozen=True, kw_only=True)
class MultitaskPrompt(StartedPrompt, name="multitask_prompt"):
    """Prompts of several tasks that share one prompt, or with `tasks=1` the prompt of a new task.

    With several tasks the ids in a text say which task it has: token i of task k has the id vocabulary size + k · tokens + i.
    `MultitaskPrompt.from_delta(delta)` starts a new task from the shared prompt of a delta.

    Args:
        tokens: the length of each prompt, at least 1.
        tasks: the number of tasks, at least 1; above 1 only with `prepend=False`.
        rank: the rank of the matrix that multiplies the shared prompt, at least 1.
        init: "vocab" (embeddings of frequent tokens) or "random".
        init_range: random vectors are uniform within this distance of 0; above 0.
        init_ids: the token ids of a text from which the shared prompt starts, repeated or cut to the length of the prompt.
        init_vectors: vectors [n, d] to start from, repeated or cut to the length of the prompt. Not in files.
        prepend: whether the delta inserts the prompt into every text.
        where: "start", or "after_first" for after the first token. By default after the first token if a pooler reads that
            token (BERT), else at the start.
        trim: whether the prompt's hidden states are removed, so that outputs are as long as the text. Those of an encoder
            always stay, for its decoder.

    Raises:
        OptionError: if an option is out of its range.
    """

    design: ClassVar[Design] = Design(form="P * (u v^T)")

    tasks: int = 1
    rank: int = 1

    computed_in_files: ClassVar[bool] = True

    @property
    def length(self) -> int:
        return self.tokens * self.tasks

    def validate(self) -> None:
        super().validate()
        for option in ("tasks", "rank"):
            value = getattr(self, option)
            if value < 1:
                raise OptionError(f"MultitaskPrompt({option}={value}): expected at least 1")
        if self.tasks > 1 and self.prepend:
            raise OptionError(
                f"MultitaskPrompt(tasks={self.tasks}): the ids in a text say which task it has, so the delta cannot insert "
                "them; pass prepend=False, and write vocabulary size + task * tokens + place into the texts"
            )

    def start(self, target: Target) -> nn.Module:
        return TaskPrompts(self.start_at(target), self.tasks, self.rank)
