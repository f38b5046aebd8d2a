"""Writes the model card of a saved delta: what the delta is, and how to load it."""

import json
import re
from collections.abc import Mapping
from typing import Any

from deltakit.errors import printable

_NOT_OPTIONS = ("method", "at", "of", "exclude", "targets")


def model_card(config: Mapping[str, Any]) -> str:
    """Returns the text of a README.md for the delta that a config describes, with the front matter for the Hub."""
    methods = config["methods"]
    base, kind = config["backbone"]["id"], _plain(config["backbone"]["class"])
    names = [entry["method"] for entry in methods]
    front = ["---", "library_name: deltakit", f"tags: {json.dumps(['deltakit', *dict.fromkeys(names)])}"]
    if base:
        # Every JSON string is a valid YAML string, so quotes and colons in names are escaped correctly.
        front += [f"base_model: {json.dumps(base)}", "base_model_relation: adapter"]
    lines = [f"- {_code([entry['method']])} ({_options(entry)}) at {_code(entry['targets'])}" for entry in methods]
    if config["train"]["names"]:
        lines.append(f"- fully trained: {_code(config['train']['names'])}")
    return "\n".join(
        [
            *front,
            "---",
            "",
            f"# A delta for {base or kind}",
            "",
            f"{config['num_parameters']:,} parameters beside a frozen {kind} of "
            f"{config['backbone']['fingerprint']['parameters']:,}:",
            "",
            *lines,
            "",
            "```python",
            "import deltakit as dk",
            "",
            "model = ...  # the backbone named above, as your library loads it",
            'delta = dk.load("FOLDER_OR_REPOSITORY", model)',
            "```",
            "",
        ]
    )


def _options(entry: Mapping[str, Any]) -> str:
    options = {key: value for key, value in entry.items() if key not in _NOT_OPTIONS and value is not None}
    return ", ".join(_plain(f"{key}={value}") for key, value in options.items()) or "defaults"


def _code(selectors: list[str]) -> str:
    return ", ".join(map(_span, filter(None, selectors))) or "the whole backbone"


def _span(text: str) -> str:
    """Returns a text as a span of code. Its fence is longer than any row of backticks in it, so that none of them ends it."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {printable(text)} {fence}" if "`" in text else f"{fence}{printable(text)}{fence}"


def _plain(text: str) -> str:
    """Returns a text that Markdown shows as it is, without tags, links or line breaks of its own."""
    return re.sub(r"([\\`*\[\]<>!|&])", r"\\\1", printable(text))
