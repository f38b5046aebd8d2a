"""LoRAs of image models: diffusers' own files, and those of kohya's sd-scripts and of LyCORIS.

The forms of keys are those of diffusers 0.42.1, found by saving and loading each kind, and of lycoris-lora 4.1.3.
"""

from deltakit.files.formats.format import Format
from deltakit.files.formats.images.keys import FILES
from deltakit.files.formats.images.reader import is_diffusers, is_kohya, read
from deltakit.files.formats.images.writer import write

DIFFUSERS = Format("diffusers", "LoRA of diffusers", FILES, recognises=is_diffusers, read=read, write=write)
KOHYA = Format("kohya", "LoRA of kohya and LyCORIS", (), recognises=is_kohya, read=read)
