"""Numbers as text with three significant digits and a unit: counts, memory and floating-point operations."""

from collections.abc import Sequence

_COUNTS = ("", "K", "M", "B", "T")
_BYTES = (" B", " KiB", " MiB", " GiB", " TiB")
_OPERATIONS = (" FLOP", " kFLOP", " MFLOP", " GFLOP", " TFLOP", " PFLOP")


def _in_units(number: float, units: Sequence[str], step: int) -> str:
    """Returns a number in the largest unit of which it is at least one. Each unit is `step` times the one before it."""
    for power in range(len(units) - 1, 0, -1):
        value = number / step**power
        # Three digits round to one unit from here on, and four digits need no exponent.
        if value >= 0.9995:
            return f"{value:.3g}{units[power]}" if value < 999.5 else f"{value:.0f}{units[power]}"
    return f"{number:.3g}{units[0]}" if number < 999.5 else f"{number:.0f}{units[0]}"


def short(number: float) -> str:
    """Returns a count as text of at most six characters; "" for none.

    >>> short(512), short(16_384), short(4_200_000), short(70_553_706_496)
    ('512', '16.4K', '4.2M', '70.6B')
    """
    return _in_units(number, _COUNTS, 1000) if number else ""


def flops_in_words(number: int) -> str:
    """Returns a number of floating-point operations as text; "" for none.

    >>> flops_in_words(96), flops_in_words(1_234_567), flops_in_words(70_553_706_496_000)
    ('96 FLOP', '1.23 MFLOP', '70.6 TFLOP')
    """
    return _in_units(number, _OPERATIONS, 1000) if number else ""


def binary_size(number: int) -> str:
    """Returns a number of bytes as text.

    >>> binary_size(0), binary_size(32_768), binary_size(2_986_344_448)
    ('0 B', '32 KiB', '2.78 GiB')
    """
    return _in_units(number, _BYTES, 1024)


def memory(number: int) -> str:
    """Returns a number of bytes as text; "" for none.

    >>> memory(0), memory(700), memory(2048), memory(3 * 2**30)
    ('', '700 B', '2 KiB', '3 GiB')
    """
    return binary_size(number) if number else ""
