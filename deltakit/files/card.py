"""Writes the model card of a saved delta: what the delta is, and how to load it."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from deltakit.errors import printable

_NOT_OPTIONS = ("method", "at", "of", "exclude", "targets")


class _Library(NamedTuple):
    """The library that opens a format: its name, its package, and the lines that do so."""

    name: str
    package: str
    imported: str
    model: str
    loading: str


_MODEL = "model = ...  # the backbone named above, as your library loads it"
_LIBRARIES = {
    "deltakit": _Library("deltakit", "deltakit-tuning", "import deltakit as dk", _MODEL, "delta = dk.load({}, model)"),
    "peft": _Library(
        "peft", "peft", "from peft import PeftModel", _MODEL, "model = PeftModel.from_pretrained(model, {})"
    ),
    "diffusers": _Library(
        "diffusers",
        "diffusers peft",
        "from diffusers import DiffusionPipeline",
        "pipe = DiffusionPipeline.from_pretrained(...)  # one with the backbone named above",
        "pipe.load_lora_weights({})",
    ),
}
"""By format."""


@dataclass(frozen=True)
class CardDetails:
    """What a model card says besides the config of the delta."""

    format: str = "deltakit"
    sizes: Sequence[int] = ()
    """The number of parameters of each method."""
    repository: str | None = None
    is_transformers: bool = False
    """Whether the backbone's class is one of transformers."""
    results: Mapping[str, object] | None = None


def model_card(config: Mapping[str, Any], details: CardDetails = CardDetails()) -> str:
    """Returns the text of a README.md for the delta that a config describes, with the front matter for the Hub."""
    base, kind = config["backbone"]["id"], config["backbone"]["class"]
    names = list(dict.fromkeys(entry["method"] for entry in config["methods"]))
    total = config["backbone"]["fingerprint"]["parameters"]
    lines = [
        *_front(base, names, details),
        "",
        f"# A delta for {_plain(base or kind)}",
        "",
        f"{config['num_parameters']:,} parameters beside a frozen {_plain(kind)} of {total:,}.",
        "",
        *_methods(config, details.sizes),
        *_results(details.results or {}),
        *_usage(base, kind, details),
    ]
    return "\n".join(lines)


def _front(base: str | None, names: Sequence[str], details: CardDetails) -> list[str]:
    library = _LIBRARIES[details.format].name
    entries: dict[str, object] = {
        "tags": list(dict.fromkeys([library, "deltakit", *names])),
        **({"base_model": base, "base_model_relation": "adapter"} if base else {}),
        **({"metrics": list(details.results)} if details.results else {}),
    }
    # Every JSON value is a valid YAML value, and has no line break, bar or control character. The Hub's own ModelCardData
    # writes such characters of a name as they are (measured with huggingface_hub 2.4).
    return [
        "---",
        f"library_name: {library}",
        *(f"{key}: {json.dumps(value)}" for key, value in entries.items()),
        "---",
    ]


def _methods(config: Mapping[str, Any], sizes: Sequence[int]) -> list[str]:
    lines = ["| method | options | modules | parameters |", "|---|---|---|---:|"]
    for number, entry in enumerate(config["methods"]):
        size = f"{sizes[number]:,}" if sizes else ""
        lines.append(_row(_span(entry["method"]), _options(entry), _code(entry["targets"]), size))
    if config["train"]["names"]:
        size = f"{config['num_parameters'] - sum(sizes):,}" if sizes else ""
        lines.append(_row("fully trained", "", _code(config["train"]["names"]), size))
    return [*lines, ""]


def _results(results: Mapping[str, object]) -> list[str]:
    rows = [_row(_plain(name), _plain(str(value))) for name, value in results.items()]
    return ["## Results", "", "| figure | value |", "|---|---|", *rows, ""] if rows else []


def _usage(base: str | None, kind: str, details: CardDetails) -> list[str]:
    library = _LIBRARIES[details.format]
    imported, model = library.imported, library.model
    if base and details.is_transformers and kind.isidentifier() and model == _MODEL:
        imported = f"{imported}\nfrom transformers import {kind}"
        model = f"model = {kind}.from_pretrained({json.dumps(base)})"
    source = json.dumps(details.repository or "FOLDER_OR_REPOSITORY")
    code = ["```python", imported, "", model, library.loading.format(source), "```"]
    return ["## Use it", "", "```", f"pip install {library.package}", "```", "", *code, ""]


def _row(*cells: str) -> str:
    # A bar ends a cell, also within code. With a backslash, which is taken away, it does not.
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _options(entry: Mapping[str, Any]) -> str:
    options = {
        key: value
        for key, value in entry.items()
        if key not in _NOT_OPTIONS and value is not None and value is not False and value not in ([], ())
    }
    return ", ".join(_plain(f"{key}={value}") for key, value in options.items()) or "defaults"


def _code(selectors: Iterable[str]) -> str:
    return ", ".join(map(_span, filter(None, selectors))) or "the whole backbone"


def _span(text: str) -> str:
    """Returns a text as a span of code. Its fence is longer than any row of backticks in it, so that none of them ends it."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {printable(text)} {fence}" if "`" in text else f"{fence}{printable(text)}{fence}"


def _plain(text: str) -> str:
    """Returns a text that Markdown shows as it is, without tags, links or line breaks of its own."""
    return re.sub(r"([\\`*\[\]<>!|&])", r"\\\1", printable(text))
