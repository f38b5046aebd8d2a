"""PEFT's adapters: LoRA and IA3, with fully trained modules.

The forms of keys and the rules for patterns are those of PEFT 0.21.2, found by saving and loading adapters of each kind.
"""

from deltakit.files.formats.peft.keys import CONFIG, FILES, TENSORS
from deltakit.files.formats.peft.reader import read, recognises
from deltakit.files.formats.peft.writer import write

__all__ = ["CONFIG", "FILES", "TENSORS", "read", "recognises", "write"]
