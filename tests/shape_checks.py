"""The checker of types and shapes that the test run puts around the functions with shapes in their signatures.

It is not put around the others, whose types mypy checks: around all functions it took two thirds of the suite's time.
"""

from beartype import BeartypeConf, beartype

checks = beartype(conf=BeartypeConf(is_pep484_tower=True))
