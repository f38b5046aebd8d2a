"""Parts of a module that a delta module changes alone: a parameter or a feature slice, and how they are named."""

import re

from deltakit.core.paths import join, split_slice


def word_of(part: str) -> str:
    """Returns the name of a parameter or feature slice as a word, for names of modules.

    >>> word_of("in_proj_weight[q]")
    'in_proj_weight_q'
    """
    return re.sub(r"\W+", "_", part).strip("_")


def is_slice(part: str) -> bool:
    """Returns whether a part of a module is a feature slice of its weight, and no parameter."""
    return part.startswith("[") and part.endswith("]")


def are_apart(one: str, other: str) -> bool:
    """Returns whether two parts of one module have nothing in common: different parameters, or different feature slices.

    >>> are_apart("[q]", "[v]"), are_apart("weight", "bias"), are_apart("[q]", "weight"), are_apart("", "weight")
    (True, True, False, False)
    """
    # A slice without a parameter is one of the weight, whatever its name.
    (base, letter), (other_base, other_letter) = (
        ("", part) if is_slice(part) else split_slice(part) for part in (one, other)
    )
    letters = {letter.strip("[]"), other_letter.strip("[]")}
    return (len(letters) == 2 and "" not in letters) or ("" not in (base, other_base) and base != other_base)


def path_with_part(path: str, part: str) -> str:
    """Returns the path of a parameter or a feature slice of the module at a path.

    >>> path_with_part("h.0.attn.c_attn", "[q]"), path_with_part("mlp.experts", "down_proj")
    ('h.0.attn.c_attn[q]', 'mlp.experts.down_proj')
    """
    return path + part if is_slice(part) else join(path, part) if part else path
