"""The layout of a batch of texts with inserted prompts: inserts values for each token, and removes them again."""

from typing import NamedTuple

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from deltakit.core import INSERTED, CurrentCall
from deltakit.errors import StateError


class Layout(NamedTuple):
    """The positions of the inserted ids: `width` of them in each example, after the first `at` tokens of the text.

    `lengths` has the length of each example's own prompt, or is None if all are `width` long. The other inserted ids are
    padding, ahead of the prompt or, if `behind` is set, after the text.
    """

    width: int
    at: int
    lengths: tuple[int, ...] | None = None
    behind: bool = False

    def own(self, device: torch.device) -> Int64[Tensor, "examples 1"]:
        """Returns the length of each example's prompt; a single row if all are equally long."""
        return torch.tensor(self.lengths or (self.width,), device=device)[:, None]

    def spread(
        self, text: Shaped[Tensor, "some length"], prompt: Shaped[Tensor, "..."], padding: int
    ) -> Shaped[Tensor, "examples total"]:
        """Returns the text's values with the prompt's values and the padding inserted at their positions.

        It serves ids, masks, token types and positions. Dimensions of `text` and `prompt` of size 1 broadcast.
        """
        # `take` holds, for each position of the result, the column to copy: below `length` one of the text, then `width`
        # of the prompt, and the last one is padding. A gather keeps this one kernel for any mixture of lengths.
        length, own = text.shape[1], self.own(text.device)
        place = torch.arange(-self.at, length + self.width - self.at, device=text.device)
        lead, step = (torch.zeros_like(own), own) if self.behind else (self.width - own, self.width)
        of_text = torch.where(place < 0, place, place - step) + self.at
        padded = of_text >= length if self.behind else (place >= 0) & (place < lead)
        take = torch.where((place >= lead) & (place < lead + own), length + place - lead, of_text)
        take = torch.where(padded, length + self.width, take)
        rows = max(text.shape[0], take.shape[0])
        columns = [text.expand(rows, -1), prompt.to(text.dtype).expand(rows, -1), text.new_full((rows, 1), padding)]
        return torch.cat(columns, 1).gather(1, take.expand(rows, -1))

    def places(self, length: int, device: torch.device) -> Int64[Tensor, "examples length"]:
        """Returns where each of the `length` tokens of the text is among those with the prompt."""
        rows = 1 if self.lengths is None else len(self.lengths)
        every = torch.arange(length + self.width, device=device).expand(rows, -1)
        return self.without(every[..., None], length).squeeze(-1)

    def without(self, x: Shaped[Tensor, "..."], length: int) -> Shaped[Tensor, "..."]:
        """Returns hidden states or attention weights of the text's tokens only.

        Args:
            x: hidden states [examples, tokens, d] or attention weights [examples, heads, tokens, tokens]; other tensors and
                dimensions of another size are returned unchanged.
            length: the number of the text's tokens.
        """
        for dim in {3: (1,), 4: (2, 3)}.get(x.ndim, ()):
            if x.shape[dim] != length + self.width:
                continue
            if self.behind:
                text = torch.arange(length, device=x.device)
                index = torch.where(text < self.at, text, text + self.own(x.device))
                shape = [x.shape[0], *(length if d == dim else 1 for d in range(1, x.ndim))]
                sizes = [length if d == dim else size for d, size in enumerate(x.shape)]
                x = x.gather(dim, index.view(shape).expand(sizes))
            else:
                parts = x.narrow(dim, 0, self.at), x.narrow(dim, self.at + self.width, length - self.at)
                x = torch.cat(parts, dim)
        return x


def inserted_layout(call: CurrentCall, length: int) -> Layout | None:
    """Returns the layout of a call's hidden states of `length` tokens, or None if they have no soft prompt among them.

    Raises:
        StateError: if there are more than the text has, and nobody knows why.
    """
    layout: Layout | None = call.kept.get(INSERTED)
    if call.ids is None or call.ids.ndim != 2 or length <= call.ids.shape[1]:
        return None
    if layout is None or length != call.ids.shape[1] + layout.width:
        raise StateError(
            f"a delta here counts the tokens of the text: expected hidden states of {call.ids.shape[1]} tokens as in "
            f"input_ids, found {length}; do not compile a model with a soft prompt beside it, and leave layers that get other "
            "tokens out with exclude="
        )
    return layout
