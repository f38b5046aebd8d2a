"""The bases of OpenPrompt's templates and verbalizers."""

import json
import re
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from deltakit.core import checked
from deltakit.errors import OptionError
from deltakit.openprompt.data_utils.utils import InputExample
from deltakit.prompting import Field, Piece, SlotOutput, Soft, Text, parse_template, value_of

WrappedPiece = dict[str, Any]
"""One part of a wrapped example: its "text", and flags with OpenPrompt's names."""
SPECIAL = ("<eos>", "<bos>", "<sep>", "<cls>", "<pad>")
"""How templates of OpenPrompt write a tokenizer's special tokens."""


class Template(nn.Module):
    """The base of templates: it turns an example into pieces of text, each with flags.

    Args:
        tokenizer: the backbone's tokenizer.
        text: the template, in the syntax of `deltakit.prompting.Template`; also `{"special": "<eos>"}`. It may be set later.
        placeholder_mapping: as of OpenPrompt; the example's fields that it names are left out of what follows the pieces.
        filters: functions that `"post_processing": "name"` may name. OpenPrompt executes Python code in templates instead.
    """

    registered_inputflag_names: ClassVar[Sequence[str]] = ("loss_ids", "shortenable_ids")

    @checked
    def __init__(
        self,
        tokenizer: Any,
        text: str | None = None,
        placeholder_mapping: Mapping[str, str] | None = None,
        filters: Mapping[str, Callable[[str], str]] | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer, self.filters = tokenizer, dict(filters or {})
        self.placeholder_mapping = dict(placeholder_mapping or {"<text_a>": "text_a", "<text_b>": "text_b"})
        self.pieces: list[Piece] = []
        self.text = text

    @property
    def text(self) -> str | None:
        """The template as it was written. Setting it parses it.

        Raises:
            OptionError: if it is malformed, has no slot, or names a filter that is not there.
        """
        return self._text

    @text.setter
    def text(self, text: str | None) -> None:
        self._text = text
        if text is None:
            return
        # The same length, so that errors name the right column.
        self.pieces = parse_template(re.sub(r"([\"'])special\1(?=\s*:)", r"\1text\1   ", text))
        if not any(not isinstance(piece, (Text, Field, Soft)) for piece in self.pieces):
            raise OptionError(f'{type(self).__name__}: {text!r} has no slot; write {{"mask"}} where the answer stands')
        for piece in self.pieces:
            if isinstance(piece, Field) and piece.filter is not None and piece.filter not in self.filters:
                raise OptionError(
                    f"{type(self).__name__}: column {piece.column + 1}: no function {piece.filter!r} was given; pass "
                    f"filters={{{piece.filter!r}: function}}"
                )
        self.on_text_set()

    def on_text_set(self) -> None:
        """Is called when the text was set."""

    def from_file(self, path: str, choice: int = 0) -> "Template":
        """Takes the text from a line of a file, counted from 0, and returns itself."""
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        if not 0 <= choice < len(lines):
            raise OptionError(f"from_file({path!r}, choice={choice}): the file has {len(lines)} lines, counted from 0")
        self.text = lines[choice].rstrip()
        return self

    @checked
    def wrap_one_example(self, example: InputExample) -> list[Any]:
        """Returns the pieces of an example, and a dict of its other values that are not None, such as its label.

        Raises:
            OptionError: if the template has no text, or the example is none or lacks a field.
        """
        if self.text is None:
            raise OptionError(f"{type(self).__name__}: it has no text yet; pass text=, or call from_file")
        read = {"meta", *self.placeholder_mapping.values()}
        return [self._wrapped(example), {name: getattr(example, name) for name in example.keys() if name not in read}]  # noqa: SIM118

    def _wrapped(self, example: InputExample) -> list[WrappedPiece]:
        found, space = [], ""
        for index, piece in enumerate(self.pieces):
            # Spaces ahead of a piece belong to it, and those at the end of a text to what follows.
            if isinstance(piece, Text):
                text = piece.text.strip(" ")
                ahead = " " if space or piece.text[:1] == " " else ""
                if text:
                    found.append(self._flagged(text if text in SPECIAL else ahead + text, piece.shortenable))
                space = " " if piece.text[-1:] == " " else "" if text else ahead
            elif isinstance(piece, Field):
                value = value_of(vars(example), piece, self.filters)
                found.append(self._flagged(space + value, piece.shortenable))
                space = ""
            else:
                found += (
                    self.soft_pieces(index, piece) if isinstance(piece, Soft) else [self._flagged("<mask>", slot=True)]
                )
                space = ""
        return found

    def _flagged(self, text: str, shortenable: bool = False, slot: bool = False, soft: int = 0) -> WrappedPiece:
        flags = {"soft_token_ids": soft, "loss_ids": int(slot), "shortenable_ids": int(shortenable)}
        return {"text": text, **{name: flags[name] for name in self.registered_inputflag_names}}

    def soft_pieces(self, index: int, piece: Soft) -> list[WrappedPiece]:
        """Returns the wrapped pieces of a soft piece, by its index.

        Raises:
            OptionError: if this kind of template has no soft tokens.
        """
        raise OptionError(
            f"{type(self).__name__}: column {piece.column + 1}: it has no soft tokens; use a "
            "MixedTemplate(model, tokenizer, text)"
        )

    def process_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Returns the backbone's arguments for a batch; templates with trained vectors put them in."""
        return batch

    @property
    def added_positions(self) -> int:
        """How many positions `process_batch` adds ahead of the text."""
        return 0


class Verbalizer(nn.Module):
    """The base of verbalizers: it turns what a backbone predicts in the slot into scores of classes.

    Args:
        tokenizer: the backbone's tokenizer.
        classes: the names of the classes.
        num_classes: how many there are, if they have no names.

    Raises:
        OptionError: if both are given and differ.
    """

    @checked
    def __init__(
        self, tokenizer: Any = None, classes: Sequence[Any] | None = None, num_classes: int | None = None
    ) -> None:
        super().__init__()
        if classes is not None and num_classes is not None and len(classes) != num_classes:
            raise OptionError(f"{type(self).__name__}: num_classes={num_classes}, and there are {len(classes)} classes")
        self.tokenizer, self.classes = tokenizer, classes
        self.num_classes = len(classes) if classes is not None else num_classes
        self._label_words: list[list[str]] | None = None

    @property
    def label_words(self) -> list[list[str]]:
        """The words of each class. Setting them (a list, or a dict by the names of classes) makes the verbalizer's table.

        Raises:
            OptionError: if none were set, or they do not fit the classes.
        """
        if self._label_words is None:
            raise OptionError(f"{type(self).__name__}: no label words were set; pass label_words=, or call from_file")
        return self._label_words

    @label_words.setter
    def label_words(self, words: Any) -> None:
        if words is None:
            return
        where = f"{type(self).__name__}(label_words=...)"
        if isinstance(words, Mapping):
            if self.classes is None or set(words) != set(self.classes):
                raise OptionError(f"{where}: the words are those of {list(words)}, and classes= has {self.classes}")
            words = [words[name] for name in self.classes]
        found = [[own] if isinstance(own, str) else list(own) for own in words]
        if self.num_classes is None:
            self.num_classes = len(found)
        if len(found) != self.num_classes or not all(found):
            raise OptionError(f"{where}: expected words for {self.num_classes} classes, found {found}")
        self._label_words = found
        self.on_label_words_set()

    def on_label_words_set(self) -> None:
        """Is called when the words were set."""

    def from_file(self, path: str, choice: int = 0) -> "Verbalizer":
        """Takes the words from a file, and returns itself.

        A .json or .jsonl file has the dict of a verbalizer, or a list of verbalizers. Other files have a line with commas for
        each class, and an empty line between verbalizers. `choice` counts from 0.
        """
        text = Path(path).read_text(encoding="utf-8")
        if Path(path).suffix in (".json", ".jsonl"):
            read = json.loads(text)
            listed = read if isinstance(read, list) else [read]
        else:
            groups = re.split(r"\n\s*\n", text.strip())
            listed = [[line.strip().split(",") for line in group.splitlines()] for group in groups]
        if not 0 <= choice < len(listed):
            raise OptionError(
                f"from_file({path!r}, choice={choice}): the file has {len(listed)} verbalizers, counted from 0"
            )
        self.label_words = cast(Any, listed[choice])
        return self

    def process_outputs(self, output: SlotOutput) -> Tensor:
        """Returns the scores of the classes [batch, classes]."""
        return self.process_logits(at_one_slot(output.logits))

    @abstractmethod
    def process_logits(self, logits: Tensor) -> Tensor:
        """Returns the scores of the classes [batch, classes] for the logits in the slot [batch, vocabulary]."""


def at_one_slot(found: Tensor) -> Tensor:
    """Returns [batch, slots, n] as OpenPrompt does: [batch, n] if there is one slot."""
    return found[:, 0] if found.shape[1] == 1 else found
