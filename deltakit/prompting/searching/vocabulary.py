"""Which tokens of a vocabulary are words: a template that has them as text is tokenized into the same tokens."""

from collections.abc import Collection, Iterable, Iterator
from typing import Any

from deltakit.errors import OptionError
from deltakit.prompting.verbalizers.word_ids import word_ids


class WordTokens:
    """The tokens that a search may choose. `size` is how many ids the backbone's head has; `without` are ids to leave out."""

    def __init__(self, tokenizer: Any, size: int, without: Collection[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.size = min(size, len(tokenizer))
        self._refused = {*without, *tokenizer.all_special_ids}
        self._words: dict[int, str | None] = {}

    def word(self, token: int) -> str | None:
        """Returns the word of a token; None if it is special, a part of a word, or does not come back from its text."""
        if token not in self._words:
            self._words[token] = None if token in self._refused or token >= self.size else self._read(token)
        return self._words[token]

    def _read(self, token: int) -> str | None:
        word = self.tokenizer.decode([token]).strip()
        if not word or not word.isprintable() or any(mark in word for mark in ("{", "}", "\ufffd")):
            return None
        try:
            return word if word_ids(self.tokenizer, word, " ", "search") == (token,) else None
        except OptionError:
            return None

    def among(self, tokens: Iterable[int]) -> Iterator[int]:
        """Yields those of some tokens that are words."""
        return (token for token in tokens if self.word(token) is not None)
