"""Reads a table of texts and labels, and holds a part of it out."""

import csv
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from deltakit.demo.task import Texts
from deltakit.errors import OptionError

FEWEST = 10
"""The fewest rows of which a part can be held out."""


def read_texts(file: Path, *, text: str, label: str) -> list[tuple[str, str]]:
    """Returns the texts of a CSV file, or of a TSV file if its name ends in .tsv, each with its label.

    Args:
        text, label: the names of the two columns in the first line.

    Raises:
        OptionError: if the file cannot be read, a column is missing, a row has no text or no label, or there are too few rows
            or labels.
    """
    tabs = file.suffix.lower() == ".tsv"
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            # In TSV files quotes are characters like others.
            reader = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.DictReader(lines)
            columns = list(reader.fieldnames or ())
            for name, option in ((text, "--text"), (label, "--label")):
                if name not in columns:
                    have = ", ".join(columns) or "none, the file is empty"
                    raise OptionError(
                        f"{file}: it has no column {name!r}; its columns are {have}; name one with {option}"
                    )
            found = [(_cell(row, text), _cell(row, label), reader.line_num) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise OptionError(f"{file}: it cannot be read: {why}; pass a CSV or TSV file in UTF-8") from error
    empty = [number for one, other, number in found if not one or not other]
    if empty:
        more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
        where = ", ".join(map(str, empty[:5]))
        raise OptionError(
            f"{file}: there is no {text} or no {label} in line {where}{more}; fill it in, or remove the row"
        )
    rows = [(one, other) for one, other, _ in found]
    _check(file, rows, label)
    return rows


def _cell(row: dict[str, str | None], name: str) -> str:
    return (row.get(name) or "").strip()


def _check(file: Path, rows: Texts, label: str) -> None:
    counts = Counter(name for _, name in rows)
    if len(rows) < FEWEST:
        raise OptionError(f"{file}: it has {len(rows)} rows; expected at least {FEWEST}, some of which are held out")
    if len(counts) == 1:
        raise OptionError(f"{file}: all rows have the {label} {rows[0][1]!r}; expected at least two different ones")
    alone = sorted(name for name, count in counts.items() if count == 1)
    if alone:
        more = f" and {len(alone) - 5} more" if len(alone) > 5 else ""
        raise OptionError(
            f"{file}: only one row has the {label} {', '.join(map(repr, alone[:5]))}{more}; expected at least two rows of "
            "each, one to learn from and one to test with: add rows, or join labels"
        )


def held_out(rows: Texts, share: float) -> tuple[Texts, Texts]:
    """Returns the rows in two parts, to learn from and to test with. Both have every label. The parts are always the same.

    Args:
        share: the share of the rows of each label that is for testing, above 0 and below 1.
    """
    by_label: dict[str, list[tuple[str, str]]] = {}
    for row in rows:
        by_label.setdefault(row[1], []).append(row)
    learn: list[tuple[str, str]] = []
    test: list[tuple[str, str]] = []
    for label in sorted(by_label):
        own = list(by_label[label])
        random.Random(0).shuffle(own)
        count = min(len(own) - 1, max(1, round(share * len(own))))
        test += own[:count]
        learn += own[count:]
    return learn, test


def labels_of(rows: Texts) -> Sequence[str]:
    """Returns the different labels, sorted."""
    return sorted({label for _, label in rows})
