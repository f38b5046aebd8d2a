"""Saved deltas that somebody has changed on purpose: their seals are right, so only their contents can give them away."""

import hashlib
import json

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from deltakit.files.seal import sealed


def forge(folder, *, config=lambda config: None, tensors=lambda tensors: None):
    """Changes the config and the tensors of a saved delta in place, in both files, with new seals."""
    file = folder / "delta_model.safetensors"
    with safe_open(file, "pt") as opened:
        changed = json.loads(opened.metadata()["delta"])
    values = {name: value.clone() for name, value in load_file(file).items()}
    config(changed)
    tensors(values)
    digest = sealed({}, values, folder)["tensors_sha256"]
    changed = {key: value for key, value in changed.items() if key != "config_sha256"} | {"tensors_sha256": digest}
    # Python writes NaN into JSON, and `sealed` refuses it.
    text = json.dumps(changed, sort_keys=True)
    changed["config_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    save_file(values, file, metadata={"delta": json.dumps(changed)})
    (folder / "delta_config.json").write_text(json.dumps(changed))


def edit(folder, change):
    """Changes the readable copy of the config alone, as somebody with a text editor would."""
    copy = folder / "delta_config.json"
    config = json.loads(copy.read_text())
    change(config)
    copy.write_text(json.dumps(config))
