"""Reads options that differ between targets: `LoRA(r={"layers.{0-5}": 4, "*": 8})` becomes a method for each value."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from deltakit.core import Method, Target, above, fold
from deltakit.errors import OptionError, SelectorError
from deltakit.selection.index import BackboneIndex


class OptionSelectors:
    """The selectors in a method's options, and what they match on one backbone.

    A selector matches a target if it matches the target itself, or a module that the target is in. Of several that match,
    the first one counts, as in PEFT's `rank_pattern`.
    """

    def __init__(self, index: BackboneIndex, method: Method) -> None:
        self.index, self.method = index, method
        self.options: dict[str, Mapping[str, Any]] = {
            name: value for name in method.per_target if isinstance(value := getattr(method, name), Mapping)
        }

    def at(self, target: Target) -> Method:
        """Returns the method with the options that it has at a target.

        Raises:
            OptionError: if no selector of an option matches the target.
            SelectorError, RoleError: if a selector is malformed, or matches nothing in the backbone.
        """
        return replace(self.method, **{name: self._value(name, target) for name in self.options})

    def apart(self, targets: Sequence[Target]) -> list[tuple[Method, list[Target]]]:
        """Returns a method for each combination of values, with its targets; the method itself if its values are for all.

        Raises:
            OptionError: if a selector matches none of the targets, or only such that an earlier one matches, or a target is
                matched by none.
            SelectorError, RoleError: if a selector is malformed, or matches nothing in the backbone.
        """
        if not self.options:
            return [(self.method, list(targets))]
        groups: list[tuple[Method, list[Target]]] = []
        for target in targets:
            method = self.at(target)
            own = next((group for other, group in groups if other == method), None)
            if own is None:
                own = []
                groups.append((method, own))
            own.append(target)
        for name in self.options:
            self._refuse_unused(name, targets)
        if len(groups) == 1:
            return groups
        # Each is a method of its own from here on, so it says itself where it is.
        return [
            (replace(method, at=fold([target.path or "^" for target in own]), of=None, exclude=None), own)
            for method, own in groups
        ]

    @cached_property
    def _matched(self) -> dict[str, frozenset[str]]:
        """What each selector matches, by selector."""
        found = {}
        for name, by_selector in self.options.items():
            for selector in by_selector:
                try:
                    found[selector] = frozenset(self.index.select(selector))
                except SelectorError as error:
                    raise SelectorError(f"{self._where(name)}: {error}") from error
        return found

    def _matching(self, name: str, target: Target) -> list[str]:
        base, _ = self.index.split(target.path)
        there = {target.path, base, *above(target.owner)}
        return [selector for selector in self.options[name] if not there.isdisjoint(self._matched[selector])]

    def _value(self, name: str, target: Target) -> Any:
        matching = self._matching(name, target)
        if not matching:
            add = f"{target.path!r}, or '*' for all others" if target.owner else "'^' for all others"
            raise OptionError(
                f"{self._where(name)}: no selector matches {target.named}, so it has no {name}; add {add}"
            )
        return self.options[name][matching[0]]

    def _refuse_unused(self, name: str, targets: Sequence[Target]) -> None:
        matching = [self._matching(name, target) for target in targets]
        for selector in self.options[name]:
            first = [one[0] for one in matching if selector in one]
            if not first:
                raise OptionError(
                    f"{self._where(name)}: {selector!r} matches none of the {len(targets)} targets, such as "
                    f"{targets[0].named}; correct it, or omit it"
                )
            if selector not in first:
                raise OptionError(
                    f"{self._where(name)}: {selector!r} has no effect, because {first[0]!r} stands before it and matches the "
                    "same targets; the first one counts, so write it first"
                )

    def _where(self, name: str) -> str:
        return f"{type(self.method).__name__}({name}={dict(self.options[name])!r})"
