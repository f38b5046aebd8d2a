"""OpenDelta's deltas: all eight types, with the modules that were trained beside them.

The names of tensors and the formulas are those of OpenDelta of August 2023 (its version 0.3.0), found by saving deltas of each
type (`benchmarks/opendelta_files.py`).
"""

from deltakit.files.formats.format import Format
from deltakit.files.formats.opendelta.reader import CONFIG, PICKLE, read, recognises

FORMAT = Format(
    "opendelta",
    "the deltas of OpenDelta",
    (CONFIG,),
    recognises=recognises,
    read=read,
    late_files=(PICKLE,),
)
