"""P-tuning: a soft prompt whose vectors an encoder computes while they are trained.

Liu et al. 2021, https://arxiv.org/abs/2103.10385, section 2.2. The encoder over the trained embeddings e of the prompt is
MLP(BiLSTM(e)), or the MLP that PEFT uses. Its last vectors are all that is used later: a file has them and no encoder, and a
loaded delta is a plain soft prompt. An untrained prompt is not the identity.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltakit.core import Design, Target
from deltakit.errors import OptionError
from deltakit.ops import PromptMethod, check_dropout, like, start_vectors


class PromptEncoder(nn.Module):
    """Computes the vectors of a prompt [tokens, d] from trained embeddings `embedding` [trained, d].

    Args:
        width: the number of features d.
    """

    order: Tensor
    anchors: Tensor | None

    def __init__(self, options: "PTuning", width: int, **like: Any) -> None:
        super().__init__()
        hidden = options.hidden_for(width)
        self.embedding = nn.Parameter(torch.empty(options.tokens, width, **like))
        # As all embeddings of torch start, and as the authors' code and PEFT do.
        nn.init.normal_(self.embedding)
        self.lstm: nn.LSTM | None = None
        sizes: tuple[int, ...] = (width, hidden, hidden, width)
        if options.encoder == "lstm":
            more: dict[str, Any] = {"dropout": options.dropout, "bidirectional": True, "batch_first": True}
            self.lstm = nn.LSTM(width, hidden, options.layers, **more, **like)
            sizes = (2 * hidden, 2 * hidden, width)
        layers = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair, **like), nn.ReLU())]
        self.mlp = nn.Sequential(*layers[:-1])
        self.register_buffer("anchors", None)

    def insert(self, anchors: Float[Tensor, "k d"], places: list[int]) -> None:
        """Inserts vectors that are not trained, so that they have these places in the prompt."""
        length = len(self.embedding) + len(places)
        held = [place for place in range(length) if place not in places] + places
        self.register_buffer("order", torch.tensor(held, device=anchors.device).argsort())
        self.register_buffer("anchors", anchors)

    def forward(self) -> Float[Tensor, "tokens d"]:
        x: Tensor = self.embedding if self.lstm is None else self.lstm(self.embedding[None])[0][0]
        found: Tensor = self.mlp(x)
        return found if self.anchors is None else torch.cat([found, self.anchors.to(found)])[self.order]


@dataclass(frozen=True, kw_only=True)
class PTuning(PromptMethod, name="p_tuning"):
    """P-tuning: a trained prompt that an encoder computes, anywhere in the text, with anchor tokens.

    >>> PTuning(tokens=3, anchors={1: 2764}).length
    4

    Args:
        tokens: the number of trained vectors, at least 1.
        encoder: "mlp" (three layers, as PEFT's default), "lstm" (a two-way LSTM and two layers, as the authors'), or None for
            none, as in files: then the vectors are trained directly.
        hidden: the number of hidden units, at least 1; of an LSTM in each direction. By default the width d of the embedding
            for an MLP, and d / 2 for an LSTM.
        layers: the number of layers of the LSTM, at least 1.
        dropout: the probability in [0, 1) with which the LSTM drops values between its layers.
        anchors: ordinary tokens in the prompt: their token ids by their places in it. They are not trained. In a file they
            are vectors of the prompt like all others.
        prepend: whether the delta inserts the prompt into every text. If not, write its ids (vocabulary size, vocabulary
            size + 1, and so on) where you want them, with ordinary tokens between them.
        where: "start", or "after_first" for after the first token. By default after the first token if a pooler reads that
            token (BERT), else at the start.
        trim: whether the prompt's hidden states are removed, so that outputs are as long as the text. Those of an encoder
            always stay, for its decoder.

    Raises:
        OptionError: if an option is out of its range.
    """

    design: ClassVar[Design] = Design(form="MLP(e) or MLP(LSTM(e))")

    encoder: str | None = "mlp"
    hidden: int | None = None
    layers: int = 2
    dropout: float = 0.0
    anchors: Mapping[int, int] | None = None

    @property
    def length(self) -> int:
        return self.tokens + len(self.anchors or {})

    def validate(self) -> None:
        super().validate()
        if self.encoder not in ("mlp", "lstm", None):
            raise OptionError(f"PTuning(encoder={self.encoder!r}): expected 'mlp', 'lstm' or None")
        for option in ("hidden", "layers"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise OptionError(f"PTuning({option}={value}): expected at least 1")
        check_dropout("PTuning", self.dropout)
        if self.anchors:
            if self.encoder is None:
                raise OptionError("PTuning(encoder=None, anchors=...): anchors need an encoder; omit one of the two")
            if min(self.anchors) < 0 or max(self.anchors) >= self.length or min(self.anchors.values()) < 0:
                raise OptionError(
                    f"PTuning(anchors={dict(self.anchors)}): expected token ids by places from 0 to {self.length - 1} in a "
                    f"prompt of {self.tokens} trained tokens and {len(self.anchors)} anchors"
                )

    def hidden_for(self, width: int) -> int:
        """Returns the number of hidden units for an embedding of this width."""
        return self.hidden or (max(1, width // 2) if self.encoder == "lstm" else width)

    def start(self, target: Target) -> Float[Tensor, "tokens d"] | nn.Module:
        if self.encoder is None:
            return start_vectors(target, self.tokens, within=None, init_ids=None, option="")
        encoder = PromptEncoder(self, int(target.module.embedding_dim), **like(target))  # type: ignore[arg-type]
        if self.anchors:
            ids = list(self.anchors.values())
            option = "PTuning(anchors=...)"
            encoder.insert(
                start_vectors(target, len(ids), within=None, init_ids=ids, option=option), list(self.anchors)
            )
        return encoder

    def to_dict(self) -> dict[str, Any]:
        # The encoder is not saved, only the prompt that it computes.
        plain = replace(self, tokens=self.length, encoder=None, anchors=None)
        return super(PTuning, plain).to_dict()
