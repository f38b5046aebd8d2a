"""Intrinsic prompt tuning: a soft prompt that a frozen decoder computes from a few trained numbers.

Qin et al. 2021, https://arxiv.org/abs/2110.07867. The decoder is learnt from the prompts of several tasks (multi-task subspace
finding); for a new task only its input z [size] is trained (intrinsic subspace tuning), which starts as the authors' does.
Their decoder is learnt with the tasks' losses, too; `PromptDecoder.fit` takes prompts that are trained already, and learns to
reproduce them. A file has the vectors, and neither z nor the decoder. An untrained prompt is not the identity.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltakit.core import Design, Target, checked, same_random_numbers
from deltakit.errors import OptionError
from deltakit.ops import PromptMethod, Seeded, like, normal, start_vectors


class PromptDecoder(nn.Module):
    """Computes prompts [tokens, d] from z [size]: W_2 tanh(W_1 z + b_1) + b_2, with `hidden` units (the authors' first type).

    It is a module like any other: `state_dict` and `load_state_dict` keep it in a file.
    """

    @checked
    def __init__(self, tokens: int, width: int, size: int = 10, hidden: int = 768) -> None:
        super().__init__()
        for name, value in (("tokens", tokens), ("width", width), ("size", size), ("hidden", hidden)):
            if value < 1:
                raise OptionError(f"PromptDecoder({name}={value}): expected at least 1")
        self.tokens, self.width, self.size = tokens, width, size
        self.layers = nn.Sequential(nn.Linear(size, hidden), nn.Tanh(), nn.Linear(hidden, tokens * width))
        self.error = 1.0
        """The part of the prompts' variance that it does not reproduce."""

    def forward(self, z: Float[Tensor, "*prompts size"]) -> Float[Tensor, "*prompts tokens d"]:
        found: Tensor = self.layers(z)
        return found.unflatten(-1, (self.tokens, self.width))

    @classmethod
    @checked
    def fit(
        cls,
        prompts: Sequence[Tensor],
        size: int = 10,
        *,
        hidden: int = 768,
        steps: int = 1_000,
        lr: float = 1e-3,
        seed: int = 0,
    ) -> "PromptDecoder":
        """Returns a decoder that reproduces trained prompts: that of an autoencoder with a linear encoder, trained by Adam.

        The random numbers of the caller's program stay as they are.

        Args:
            prompts: the prompts [tokens, d] of several tasks, at least 2, all of one shape.
            size: the number of values that stand for a prompt.
            hidden: the number of the decoder's hidden units.
            steps: the number of steps, each with all prompts.
            lr: the learning rate.
            seed: the seed of its start values.

        Raises:
            OptionError: if there are fewer than 2 prompts, they differ in shape, or an option is out of its range.
        """
        shapes = {tuple(prompt.shape) for prompt in prompts}
        if len(prompts) < 2 or len(shapes) > 1 or prompts[0].ndim != 2:
            found = f"{len(prompts)} of shape {' and '.join(map(str, sorted(shapes)))}"
            raise OptionError(f"PromptDecoder.fit: expected at least 2 prompts [tokens, d] of one shape, found {found}")
        if steps < 1 or not lr > 0:
            raise OptionError(f"PromptDecoder.fit(steps={steps}, lr={lr}): expected at least 1 step and a rate above 0")
        given = torch.stack([prompt.detach().float() for prompt in prompts])
        with same_random_numbers(), torch.enable_grad():
            torch.manual_seed(seed)
            decoder = cls(given.shape[1], given.shape[2], size, hidden).to(given.device)
            encoder = nn.Linear(given[0].numel(), size).to(given.device)
            with torch.no_grad():
                # The mean of all prompts, so that the layers learn only how they differ from it.
                decoder.layers[-1].bias.copy_(given.mean(0).flatten())  # type: ignore[operator]
            optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=lr)
            spread = (given - given.mean(0)).square().mean().clamp_min(torch.finfo(given.dtype).tiny)
            for _ in range(steps):
                error = (decoder(encoder(given.flatten(1))) - given).square().mean() / spread
                optimizer.zero_grad()
                error.backward()
                optimizer.step()
            decoder.error = float(error.detach())
        return decoder.requires_grad_(False)


class DecodedVectors(nn.Module):
    """The vectors that a frozen decoder computes from the parameter `z` [size]."""

    def __init__(self, decoder: PromptDecoder, **like: Any) -> None:
        super().__init__()
        self.shape = decoder.tokens, decoder.width
        self.z = nn.Parameter(torch.empty(decoder.size, **like))
        nn.init.normal_(self.z, std=0.02)
        # Buffers, because nobody trains them.
        for name, value in zip(("w_1", "b_1", "w_2", "b_2"), decoder.parameters(), strict=True):
            self.register_buffer(name, value.detach().to(**like, copy=True))

    def forward(self) -> Float[Tensor, "tokens d"]:
        b: dict[str, Any] = self._buffers
        return torch.addmv(b["b_2"], b["w_2"], torch.tanh(torch.addmv(b["b_1"], b["w_1"], self.z))).view(self.shape)


class ProjectedVectors(nn.Module):
    """Start vectors plus a random projection, drawn from a seed, of the parameter `z` [size], which starts at zero."""

    def __init__(self, start: Float[Tensor, "tokens d"], size: int, seed: int) -> None:
        super().__init__()
        self.z = nn.Parameter(start.new_zeros(size))
        self.register_buffer("start", start)
        # Of this size the projection nearly keeps the norm of z.
        recipe = ((start.numel(), size), normal(start.numel() ** -0.5))
        self.projection = Seeded(seed, {"matrix": recipe}, dtype=start.dtype, device=start.device)

    def forward(self) -> Float[Tensor, "tokens d"]:
        start: Any = self.start
        return start + (self.projection.matrix @ self.z).view(start.shape)  # type: ignore[operator]


@dataclass(frozen=True, kw_only=True)
class IntrinsicPrompt(PromptMethod, name="intrinsic_prompt"):
    """A prompt that a frozen decoder computes from a few trained numbers.

    Args:
        tokens: the length of the prompt, at least 1. With a decoder it must be the length of the decoder's prompts.
        size: the number of trained values, at least 1. With a decoder it must be the decoder's. None, as in files: the vectors
            themselves are trained.
        decoder: what `PromptDecoder.fit` returned. Without one, the prompt is a random projection of the trained values, added
            to embeddings of frequent tokens: what the decoder is compared with.
        seed: the seed of the random projection, at least 0.
        prepend: whether the delta inserts the prompt into every text. If not, write its ids (vocabulary size, vocabulary
            size + 1, and so on) where you want them.
        where: "start", or "after_first" for after the first token. By default after the first token if a pooler reads that
            token (BERT), else at the start.
        trim: whether the prompt's hidden states are removed, so that outputs are as long as the text. Those of an encoder
            always stay, for its decoder.

    Raises:
        OptionError: if an option is out of its range, or does not fit the decoder.
    """

    design: ClassVar[Design] = Design(form="D(z), D fixed")

    size: int | None = 10
    decoder: PromptDecoder | None = field(default=None, compare=False, repr=False)
    seed: int = 0

    def validate(self) -> None:
        super().validate()
        if self.size is not None and self.size < 1:
            raise OptionError(f"IntrinsicPrompt(size={self.size}): expected at least 1, or None")
        if self.seed < 0:
            raise OptionError(f"IntrinsicPrompt(seed={self.seed}): expected at least 0")
        if self.decoder is not None and (self.decoder.tokens, self.decoder.size) != (self.tokens, self.size):
            raise OptionError(
                f"IntrinsicPrompt(tokens={self.tokens}, size={self.size}): this decoder needs tokens={self.decoder.tokens} "
                f"and size={self.decoder.size}"
            )

    def start(self, target: Target) -> Float[Tensor, "tokens d"] | nn.Module:
        width = target.module.embedding_dim
        if self.decoder is not None:
            if self.decoder.width != width:
                raise OptionError(
                    f"{target.named}: the decoder has prompts of {self.decoder.width} features, and this embedding has "
                    f"{width}; fit it on prompts of this backbone"
                )
            return DecodedVectors(self.decoder, **like(target))
        start = start_vectors(target, self.tokens, within=None, init_ids=None, option="")
        return start if self.size is None else ProjectedVectors(start, self.size, self.seed)

    def to_dict(self) -> dict[str, Any]:
        # Only the vectors are saved.
        data = super(IntrinsicPrompt, replace(self, size=None, decoder=None)).to_dict()
        del data["decoder"]
        return data
