"""What a template makes of an example, for people to read."""


class Explanation:
    """The tokens of an example, each with its kind, and whether truncation deletes it.

    `print` shows it in colors in a terminal; a notebook shows it as HTML.
    """
