"""Writes the model card of a saved delta: what the delta is, and how to load it."""

import json
from collections.abc import Mapping
from typing import Any

_NOT_OPTIONS = ("method", "at", "of", "exclude", "targets")


def model_card(config: Mapping[str, Any]) -> str:
    """Returns the text of a README.md for the delta that a config describes, with the front matter for the Hub."""
    methods = config["methods"]
    base = config["backbone"]["id"]
    names = [entry["method"] for entry in methods]
    front = ["---", "library_name: deltakit", f"tags: {json.dumps(['deltakit', *dict.fromkeys(names)])}"]
    if base and _is_repository(base):
        # Every JSON string is a valid YAML string, so quotes and colons in names are escaped correctly.
        front += [f"base_model: {json.dumps(base)}", "base_model_relation: adapter"]
    lines = [f"- `{entry['method']}` ({_options(entry)}) at {_code(entry['targets'])}" for entry in methods]
    if config["train"]["names"]:
        lines.append(f"- fully trained: {_code(config['train']['names'])}")
    return "\n".join(
        [
            *front,
            "---",
            "",
            f"# A delta for {base or config['backbone']['class']}",
            "",
            f"{config['num_parameters']:,} parameters beside a frozen {config['backbone']['class']} of "
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


def _is_repository(name: str) -> bool:
    return name.count("/") <= 1 and not name.startswith((".", "/", "~")) and "\\" not in name


def _options(entry: Mapping[str, Any]) -> str:
    options = {key: value for key, value in entry.items() if key not in _NOT_OPTIONS and value is not None}
    return ", ".join(f"{key}={value}" for key, value in options.items()) or "defaults"


def _code(selectors: list[str]) -> str:
    return ", ".join(f"`{selector}`" for selector in selectors) or "the whole backbone"
