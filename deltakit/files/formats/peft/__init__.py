"""PEFT's adapters: one file for each kind that is read, and the writer.

The forms of keys and the rules for patterns are those of PEFT 0.21.2, found by saving and loading adapters of each kind.
"""

from deltakit.files.formats.adapter_config import CONFIG
from deltakit.files.formats.format import Format
from deltakit.files.formats.peft.keys import FILES
from deltakit.files.formats.peft.reader import KINDS, is_alone, read, recognises
from deltakit.files.formats.peft.writer import write

__all__ = ["CONFIG", "FORMAT", "is_alone"]

FORMAT = Format("peft", f"{', '.join(KINDS)} of PEFT", FILES, recognises=recognises, read=read, write=write)
