"""What is known of a target that says no more than where it is."""

from torch import nn

from deltakit.core import Target


def test_a_target_that_says_no_more_is_its_module():
    target = Target("a.b", nn.Linear(2, 2))
    assert (target.part, target.owner, target.never_called) == ("", "a.b", False)
    assert target.roles == frozenset()
