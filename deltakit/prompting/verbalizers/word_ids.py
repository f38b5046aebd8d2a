"""Turns label words into token ids, and refuses those that cannot stand for a class."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from deltakit.errors import OptionError

Words = Mapping[str, str | Sequence[str]]
"""For each class its word, or several."""
Multi = Literal["refuse", "mean", "first", "score", "drop"]

_SPACE = "▁"
"""How SentencePiece writes a space."""
_LEADS = ("a", "1", "(", "。")
"""What a word without a space ahead of it is put behind, to see its tokens there."""


class LabelWord(NamedTuple):
    """A word that stands for a class, by its index, and its token ids."""

    word: str
    label: int
    ids: tuple[int, ...]


def label_words(tokenizer: Any, words: Words, prefix: str, multi: Multi, where: str) -> list[LabelWord]:
    """Returns the words of all classes, in the order of the classes. With "drop" those of several tokens are left out.

    Args:
        where: the verbalizer, for error messages.

    Raises:
        OptionError: if there is no tokenizer, a class has no word, or a word is unknown, split, of two classes, or not to be
            told from another.
    """
    if not callable(tokenizer) or not hasattr(tokenizer, "convert_ids_to_tokens"):
        raise OptionError(
            f"{where}: expected a tokenizer, found {type(tokenizer).__name__}; pass the backbone's tokenizer, as "
            "AutoTokenizer.from_pretrained returns"
        )
    found: list[LabelWord] = []
    for label, (name, own) in enumerate(words.items()):
        listed = [own] if isinstance(own, str) else list(own)
        if not listed or not all(isinstance(word, str) and word.strip() for word in listed):
            raise OptionError(
                f"{where}: expected at least one word for the class {name!r}, found {own!r}; write its words"
            )
        of_class = [LabelWord(word, label, word_ids(tokenizer, word, prefix, where)) for word in dict.fromkeys(listed)]
        kept = [one for one in of_class if multi != "drop" or len(one.ids) == 1]
        if not kept:
            raise _split(tokenizer, of_class[0], where, f"all words of the class {name!r} are split")
        found += kept
    if multi == "refuse":
        for one in found:
            if len(one.ids) > 1:
                raise _split(tokenizer, one, where, "it is split")
    _refuse_same(tokenizer, found, list(words), multi, where)
    return found


def word_ids(tokenizer: Any, word: str, prefix: str, where: str, *, starts_text: bool = False) -> tuple[int, ...]:
    """Returns the ids of a word as it stands in a text, behind `prefix`.

    Args:
        starts_text: whether prefix and word are tokenized as a text of their own, as OpenPrompt does.

    Raises:
        OptionError: if the tokenizer does not know it.
    """
    ids = _ids(tokenizer, prefix + word)
    if not starts_text and (prefix or _has_own_space(tokenizer, word, ids)):
        # Some tokenizers put a space of their own ahead of a text: " yes" alone would have two, and "yes" one.
        behind = (_behind(tokenizer, lead, prefix + word) for lead in (("a",) if prefix else _LEADS))
        ids = next((found for found in behind if found), ids)
    if not ids or getattr(tokenizer, "unk_token_id", None) in ids:
        raise OptionError(
            f"{where}: the tokenizer does not know the word {word!r} ({_shown(tokenizer, ids)}); choose another word, or pass "
            "the backbone's own tokenizer"
        )
    return ids


def _has_own_space(tokenizer: Any, word: str, ids: Sequence[int]) -> bool:
    first = tokenizer.convert_ids_to_tokens(list(ids[:1]))
    return bool(first) and str(first[0]).startswith(_SPACE) and not word.startswith((_SPACE, " "))


def _behind(tokenizer: Any, lead: str, text: str) -> tuple[int, ...]:
    """Returns the ids of a text behind another one; none if the two are not tokenized apart."""
    before, both = _ids(tokenizer, lead), _ids(tokenizer, lead + text)
    return both[len(before) :] if both[: len(before)] == before else ()


def _ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def _shown(tokenizer: Any, ids: Sequence[int]) -> str:
    return " ".join(map(repr, tokenizer.convert_ids_to_tokens(list(ids)))) or "no tokens"


def _split(tokenizer: Any, one: LabelWord, where: str, what: str) -> OptionError:
    return OptionError(
        f"{where}: the word {one.word!r} is no single token: {what}: {_shown(tokenizer, one.ids)}; choose another word, or "
        "pass multi='mean', 'first' or 'score'"
    )


def _refuse_same(tokenizer: Any, found: Sequence[LabelWord], classes: Sequence[str], multi: Multi, where: str) -> None:
    seen: dict[tuple[int, ...], LabelWord] = {}
    for one in found:
        read = one.ids[:1] if multi == "first" else one.ids
        other = seen.setdefault(read, one)
        if other.label == one.label:
            continue
        words = repr(one.word) if one.word == other.word else f"{other.word!r} and {one.word!r}"
        why = "have the same first token" if multi == "first" and one.ids != other.ids else "are the same"
        why = "stands for both" if one.word == other.word else why
        raise OptionError(
            f"{where}: the classes {classes[other.label]!r} and {classes[one.label]!r} cannot be told apart: {words} {why} "
            f"({_shown(tokenizer, read)}); choose another word"
            + (", or pass multi='mean' or 'score'" if multi == "first" else "")
        )
