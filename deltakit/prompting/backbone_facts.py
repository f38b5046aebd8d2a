"""What templates and verbalizers must know of a backbone: its kind of language model, its vocabulary, its head, its length."""

from typing import Any, Literal

from torch import nn

from deltakit.core import own_modules
from deltakit.errors import OptionError, TargetError

Kind = Literal["mlm", "causal", "seq2seq"]
"""mlm: predicts a masked word. causal: predicts the next word. seq2seq: an encoder and a decoder, which fills a gap."""


def kind_of(backbone: nn.Module) -> Kind:
    """Returns the kind of language model that a backbone is.

    Raises:
        TargetError: if neither its config, its class nor its attention shows it.
    """
    config = getattr(backbone, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return "seq2seq"
    if getattr(config, "is_decoder", False):
        return "causal"
    listed = _listed(backbone)
    if listed is not None:
        return listed
    causal = {bool(module.is_causal) for _, module in own_modules(backbone) if hasattr(module, "is_causal")}
    if len(causal) != 1:
        raise TargetError(
            f"{type(backbone).__name__}: nothing shows whether it predicts masked or next words; pass Template(..., "
            "kind='mlm'), 'causal' or 'seq2seq'"
        )
    return "causal" if causal.pop() else "mlm"


def _listed(backbone: nn.Module) -> Kind | None:
    """Returns the kind under which transformers lists the class of a backbone, or None."""
    if type(backbone).__module__.split(".")[0] != "transformers":
        return None
    from transformers.models.auto import modeling_auto as auto

    name = type(backbone).__name__
    masked, causal = (
        name in lists.values()
        for lists in (auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    )
    return None if masked == causal else "mlm" if masked else "causal"


def head_of(backbone: nn.Module) -> nn.Module:
    """Returns the module that turns hidden states into scores of the vocabulary.

    Raises:
        TargetError: if the backbone has none.
    """
    found = getattr(backbone, "get_output_embeddings", lambda: None)()
    if not isinstance(found, nn.Module):
        raise TargetError(
            f"{type(backbone).__name__}: it has no language-model head (get_output_embeddings() returns none), so it predicts "
            "no words; load it with AutoModelForMaskedLM, AutoModelForCausalLM or AutoModelForSeq2SeqLM"
        )
    return found


def vocabulary_of(backbone: nn.Module) -> int:
    """Returns the number of rows of the input embedding. Soft tokens have the ids that follow.

    Raises:
        TargetError: if the backbone has no input embedding.
    """
    return int(embedding_of(backbone).num_embeddings)


def embedding_of(backbone: nn.Module) -> nn.Embedding:
    """Returns the embedding of the input ids.

    Raises:
        TargetError: if there is none.
    """
    try:
        found = backbone.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError, TypeError):
        found = None
    if not isinstance(found, nn.Embedding):
        raise TargetError(
            f"{type(backbone).__name__}: it has no embedding of token ids (get_input_embeddings()); pass a language model of "
            "transformers, or a module with that function"
        )
    return found


def longest_input(backbone: nn.Module | None, tokenizer: Any) -> int | None:
    """Returns the most tokens that a backbone takes, by its table of positions and its tokenizer; None if nothing says it."""
    limits = [] if backbone is None else [positions_of(backbone)]
    # transformers writes 10 to the power of 30 where a tokenizer does not know.
    said = getattr(tokenizer, "model_max_length", None)
    if isinstance(said, int) and said < 10**9:
        limits.append(said)
    return min((limit for limit in limits if limit is not None), default=None)


def positions_of(backbone: nn.Module) -> int | None:
    """Returns for how many tokens a backbone has positions in a table; None if it has no table."""
    length = getattr(getattr(backbone, "config", None), "max_position_embeddings", None)
    if not isinstance(length, int):
        return None
    # By the weight: encoder and decoder may have modules of their own for it.
    words = getattr(getattr(backbone, "get_input_embeddings", lambda: None)(), "weight", None)
    # Only a table is a limit: relative and rotary positions go on. RoBERTa's positions start behind its padding_idx, and the
    # tables of BART and OPT have two rows more than positions.
    limits = [
        length if module.padding_idx is None else module.num_embeddings - module.padding_idx - 1
        for _, module in own_modules(backbone)
        if isinstance(module, nn.Embedding)
        and module.weight is not words
        and length <= module.num_embeddings <= length + 2
    ]
    return min(limits, default=None)


def refuse_slow(tokenizer: Any) -> None:
    """Refuses a tokenizer that does not say where in a text its tokens are.

    Raises:
        OptionError: if it is one.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise OptionError(
            f"Template: the tokenizer {type(tokenizer).__name__} gives no offsets of its tokens in the text; pass a fast "
            "tokenizer, as AutoTokenizer.from_pretrained returns"
        )
