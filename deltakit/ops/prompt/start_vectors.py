"""The start values of a soft prompt: embeddings of tokens, or random numbers."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltakit.core import Target, embedding_rows, wants_start_values
from deltakit.errors import OptionError
from deltakit.ops.sizes import like

_FREQUENT = 5_000


def start_vectors(
    target: Target, tokens: int, *, within: float | None, init_ids: Sequence[int] | None, option: str
) -> Float[Tensor, "tokens d"]:
    """Returns the vectors with which the prompt at an embedding starts, in the dtype that the embedding computes in.

    Args:
        within: the vectors are random, within this distance of 0; None for embeddings of the first and most frequent tokens.
        init_ids: the ids whose embeddings they are in any case, repeated or cut; None for none.
        option: how errors name the option that has these ids.

    Raises:
        OptionError: if an id is beyond the vocabulary.
    """
    embedding = target.module
    assert isinstance(embedding, nn.Embedding)
    # The sizes are not those of the weight, which may be quantized and packed.
    vocabulary, new = embedding.num_embeddings, like(target)
    start = torch.empty(tokens, embedding.embedding_dim, **new)
    if init_ids is None and (within is not None or not wants_start_values(start)):
        return start.uniform_(-within, within) if within is not None and wants_start_values(start) else start
    if init_ids is not None:
        outside = [i for i in init_ids if i >= vocabulary]
        if outside:
            what = f"beyond the vocabulary of {vocabulary} tokens; use this backbone's own tokenizer"
            raise OptionError(f"{target.named}: {option} has the id {outside[0]}, {what}")
        ids = torch.tensor([init_ids[i % len(init_ids)] for i in range(tokens)])
    else:
        ids = torch.randint(min(_FREQUENT, vocabulary), (tokens,))
    return embedding_rows(embedding, ids).to(**new).clone()


def repeated(target: Target, vectors: Float[Tensor, "n d"], tokens: int, option: str) -> Float[Tensor, "tokens d"]:
    """Returns a copy of given vectors for the prompt at an embedding, repeated or cut.

    Args:
        option: how errors name the option that has them.

    Raises:
        OptionError: if they have another width than the embedding.
    """
    d = target.module.embedding_dim
    if vectors.shape[1] != d:
        raise OptionError(
            f"{target.named}: {option} has vectors of {vectors.shape[1]} features, and this embedding has {d}; use those of a "
            "prompt for this backbone"
        )
    rows = torch.arange(tokens, device=vectors.device) % len(vectors)
    return vectors.detach()[rows].to(**like(target), copy=True)
