"""AdapterHub's adapters: bottlenecks, compacters, invertible adapters, LoRA, IA3, ReFT, prefixes, and unions of them.

The forms of keys and the formulas are those of adapters 1.2.0, found by saving and running adapters of each kind.
"""

from deltakit.files.formats.adapterhub.keys import FILES
from deltakit.files.formats.adapterhub.reader import read, recognises
from deltakit.files.formats.format import Format

FORMAT = Format(
    "adapterhub",
    "bottleneck and invertible adapters, LoRA, IA3, ReFT and prefixes of AdapterHub",
    FILES,
    recognises=recognises,
    read=read,
)
