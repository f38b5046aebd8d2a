"""Design: a method in the unified view of He et al. 2022, https://arxiv.org/abs/2110.04366, section 3.3 and table 1."""

from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class Design:
    """What a method changes, and how. Each kind of delta module has one, and a method says where it differs.

    Args:
        form: the change as a formula of the target's input x and output y: "B A x".
        changes: what is changed: "output", "input", "weight", "attention" or "embeddings".
        insertion: "parallel" if the change is computed from the input of what is changed, "sequential" if from its output.
        composition: how the change enters: "addition", "scaled addition", "gated addition", "product", "concatenation" or
            "replacement".
    """

    form: str = ""
    changes: str = ""
    insertion: str = ""
    composition: str = ""

    def over(self, other: "Design") -> "Design":
        """Returns this design, with the other's words where this one is empty.

        >>> Design(form="B A x").over(Design(form="f(y)", changes="output"))
        Design(form='B A x', changes='output', insertion='', composition='')
        """
        words = {field.name: getattr(self, field.name) or getattr(other, field.name) for field in fields(self)}
        return Design(**words)
