"""Paths folded into patterns of braces, and expanded again."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltakit.core.folding import expand, fold, span


@given(
    paths=st.lists(
        st.lists(st.sampled_from(["a", "b", "0", "1", "2", "3", "5", "07"]), max_size=4).map(".".join), unique=True
    )
)
def test_folding_and_expanding_are_inverse(paths):
    folded = fold(paths)
    back = [".".join(c) for text in folded for c in product(*(expand(part) for part in text.split(".")))]
    assert sorted(back) == sorted(paths)
    assert len(folded) <= len(paths)


@pytest.mark.parametrize(
    ("numbers", "wanted"),
    [
        ([39], "39"),
        ([0, 1], "0-1"),
        (range(1, 24), "1-23"),
        ([3, 8, 13], "3-13:5"),
        ([n for n in range(40) if n % 5 != 3], "0-39!3-38:5"),
        ([0, 2, 3, 4, 5], "0-5!1"),
        ([0, 2], "0,2"),
        ([0, 4], "0,4"),
        ([0, 1, 7, 8, 20], "0-1,7-8,20"),
    ],
)
def test_spans(numbers, wanted):
    names = [str(n) for n in numbers]
    assert span(names) == wanted
    assert list(expand("{" + wanted + "}")) == names
