"""What `help(LoRA)` says: a method's own options, and behind them those that all methods have."""

import inspect


def with_shared_options(doc: str | None, shared: str | None) -> str | None:
    """Returns the docstring of a method with the options in the docstring of its base class behind its own.

    Under `python -OO` there are none, and it returns None.

    A field that a dataclass inherits has no text in the docstring of the class.

    >>> base = "A method.\\n\\n    Args:\\n        at: the targets.\\n\\n    Raises:\\n        OptionError: if one is bad."
    >>> print(with_shared_options("Scales outputs.\\n\\n    Raises:\\n        OptionError: if r is bad.", base))
    Scales outputs.
    <BLANKLINE>
    Args:
        at: the targets.
    <BLANKLINE>
    Raises:
        OptionError: if r is bad.
    """
    if doc is None or shared is None:
        return doc
    _, _, options = inspect.cleandoc(shared).partition("\nArgs:\n")
    options = options.partition("\n\n")[0]
    own, raises, tail = inspect.cleandoc(doc).partition("\n\nRaises:\n")
    between = "\n" if "\nArgs:\n" in own else "\n\nArgs:\n"
    return own.rstrip() + between + options + raises + tail
