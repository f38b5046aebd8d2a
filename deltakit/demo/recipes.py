"""What is compared: methods with their learning rates, a linear probe, and full fine-tuning."""

from collections.abc import Sequence
from dataclasses import dataclass

from deltakit.core import METHODS, Method
from deltakit.delta import method_rows
from deltakit.methods.adapter import Adapter
from deltakit.methods.bitfit import BitFit
from deltakit.methods.lora import LoRA
from deltakit.methods.prefix import Prefix


@dataclass(frozen=True)
class Recipe:
    """One line of the table: its methods and its learning rate.

    Without methods it trains the head only, or all weights if `full` is set.
    """

    title: str
    methods: tuple[Method, ...]
    lr: float
    full: bool = False


PROBE = Recipe("linear probe", (), 2e-2)
FULL = Recipe("full fine-tuning", (), 2e-4, full=True)
RECIPES = (
    PROBE,
    Recipe("LoRA", (LoRA(r=8),), 6e-3),
    # Chosen by benchmarks/accuracy.py. At 3e-3 the accuracy is 86 to 97 %, depending on the seed.
    Recipe("Adapter", (Adapter(),), 6e-3),
    Recipe("BitFit", (BitFit(),), 2e-2),
    Recipe("Prefix", (Prefix(),), 5e-2),
    FULL,
)
"""The lines of the demo."""

_RATE, _HIGH_RATE = 6e-3, 3e-2


def recipes_of(names: Sequence[str], *, full: bool) -> list[Recipe]:
    """Returns the recipes of methods with their default options, between the linear probe and full fine-tuning.

    Args:
        full: whether full fine-tuning is among them.

    Raises:
        OptionError: if there is no method of a name.
    """
    tuned = {recipe.methods[0].name: recipe for recipe in RECIPES if recipe.methods}
    rows = {row.name: row for row in method_rows(list(names))}
    found = [PROBE]
    for name in dict.fromkeys(names):
        kind, row = METHODS[name], rows[name]
        # Prompts, prefixes and scales need larger steps.
        high = row.design.changes in ("attention", "embeddings") or row.design.composition == "product"
        rate = _HIGH_RATE if high else _RATE
        found.append(tuned.get(name) or Recipe(kind.__name__, (kind(**kind.example),), rate))
    return [*found, *([FULL] if full else [])]
