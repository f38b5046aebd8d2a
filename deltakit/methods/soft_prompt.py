"""Soft prompt: trained vectors P among the input embeddings.  Lester et al. 2021, https://arxiv.org/abs/2104.08691, section 2.

The vectors have token ids of their own, which follow the vocabulary's, so they can be anywhere in a text. By default the delta
inserts them in front of every text. They start as embeddings of the 5,000 first and most frequent tokens (section 3.2). The
default is 20 tokens: the paper sees little gain with more (figure 3a). An untrained prompt is not the identity.

With `SoftPrompt.from_delta` it starts as a trained prompt, as in PPT (Gu et al. 2022, https://arxiv.org/abs/2109.04332).
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from deltakit.core import Target
from deltakit.ops import StartedPrompt


@dataclass(frozen=True, kw_only=True)
class SoftPrompt(StartedPrompt, name="soft_prompt"):
    """A trained prompt among the input embeddings.

    Args:
        tokens: the length of the prompt, at least 1.
        init: "vocab" (embeddings of frequent tokens), "random", or a delta whose soft prompt it starts as, repeated or cut to
            the length of the prompt.
        init_range: random vectors are uniform within this distance of 0; above 0.
        init_ids: the token ids of a text to start from, repeated or cut to the length of the prompt.
        init_vectors: vectors [n, d] to start from, repeated or cut to the length of the prompt. Not in files.
        prepend: whether the delta inserts the prompt into every text. If not, write its ids (vocabulary size, vocabulary
            size + 1, and so on) where you want them.
        where: "start", or "after_first" for after the first token. By default after the first token if a pooler reads that
            token (BERT), else at the start.
        trim: whether the prompt's hidden states are removed, so that outputs are as long as the text. Those of an encoder
            always stay, for its decoder.

    Raises:
        OptionError: if an option is out of its range.
    """

    def start(self, target: Target) -> Float[Tensor, "tokens d"]:
        return self.start_at(target)
