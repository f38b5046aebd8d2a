"""Templates of words."""

from deltakit.openprompt.prompt_base import Template


class ManualTemplate(Template):
    """A template of words, fields and slots.

    `ManualTemplate(tokenizer=tokenizer, text='{"placeholder": "text_a"} It was {"mask"}.')`
    """
