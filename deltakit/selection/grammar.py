"""The selector grammar. A selector is text, and it is matched against path names only; no module is touched.

    q_proj, self_attn.q_proj    whole components, matched from the end of a path
    ^encoder.block.0, ^         anchored at the root; the root itself
    {q,v}  {0-11}  {0-22:2}  {0-39!3-38:5}    alternatives; index ranges, also with a step, also with a range removed
    *   **                      any one component (or a part of one); any number of components
    re:REGEX  [r]REGEX          a regular expression for the whole path; for its end (OpenDelta)
    @attn.q  @attn.{q,v}        roles, the same on every architecture
    attn@.q@                    the same roles in OpenDelta's spelling
    encoder/@attn.q             any selector, only below the modules that the part before the slash selects
    experts.gate_up_proj        a parameter, if the last component has no wildcard
    c_attn[q]  c_attn[{q,v}]    the feature slices of a fused projection: queries, keys or values

A full path means exactly that module or parameter, whatever characters are in its names: it is tried first. Then comes the
end of a path as it is written, for names such as `a/b`. Only then the characters above have their meaning. A selector that
matches from the root is anchored there.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from difflib import get_close_matches
from itertools import product
from math import prod

from deltakit.core import above, breadth, expand, is_plain, parent_of
from deltakit.errors import SelectorError

_MOST_TEXTS = 1_000
"""The most names that braces may stand for where they are not compared with the backbone's own paths."""

Roles = Callable[[str], Sequence[str]]
"""Returns the paths that have a role such as `attn.q`."""

_OPENDELTA_ROLES = {"attn": "attn", "ff": "ff", "q": "q", "k": "k", "v": "v", "proj": "o", "w1": "up", "w2": "down"}

Explicit = Callable[[bool], Collection[str]]
"""Returns the paths that only an explicit selector matches: parameters, or with True the feature slices."""


def modules_only(_slices: bool) -> Sequence[str]:
    """Returns no parameters and no feature slices, so that selectors match modules only."""
    return ()


def select_paths(
    selectors: str | Sequence[str],
    paths: Collection[str],
    roles: Roles,
    *,
    owner: str,
    explicit: Explicit = modules_only,
) -> list[str]:
    """Returns the paths that at least one selector matches: modules in the order of `paths`, then other paths.

    Args:
        paths: the paths of all modules.
        owner: the class name of the backbone, for the error message.

    Raises:
        SelectorError: if the list is empty, if a selector is malformed, or if one of them matches nothing.
        RoleError: if a role does not exist, or the backbone has no sure answer for it.
    """
    entries = [selectors] if isinstance(selectors, str) else list(selectors)
    if not entries:
        raise SelectorError("an empty list of selectors selects nothing; pass at least one selector")
    hits: dict[str, None] = {}
    for entry in entries:
        found = match(entry, paths, roles, explicit)
        if not found:
            raise SelectorError(_miss(entry, paths, owner))
        hits.update(dict.fromkeys(found))
    modules = [path for path in paths if path in hits]
    known = set(modules)
    return modules + [path for path in hits if path not in known]


def match(selector: str, paths: Collection[str], roles: Roles, explicit: Explicit = modules_only) -> list[str]:
    """Returns the paths that one selector matches, in the order of `paths`. The result may be empty.

    >>> match("{q,v}", ["a.q", "a.k", "a.v", "a.qk"], lambda role: ())
    ['a.q', 'a.v']

    Raises:
        SelectorError: if the selector is malformed.
        RoleError: if a role does not exist, or the backbone has no sure answer for it.
    """
    if not isinstance(selector, str) or not selector:
        raise SelectorError(
            f"selector {selector!r}: expected a text that is not empty, such as 'q_proj', '@attn.q' or '**.{{q,v}}'"
        )
    literal = _literal(selector, paths, explicit)
    if literal:
        return literal
    for prefix, whole_path in (("re:", True), ("[r]", False)):
        if selector.startswith(prefix):
            return _match_regex(selector, selector[len(prefix) :], paths, explicit, whole_path=whole_path)
    scope, slash, rest = selector.rpartition("/")
    if slash:
        if not scope or not rest:
            raise SelectorError(
                f"selector {selector!r}: one side of the slash is empty; write the modules around before it and a selector "
                "of what is in them after it, such as 'encoder/@attn.q'"
            )
        scopes = set(match(scope, paths, roles, explicit))
        found = match(rest, paths, roles, explicit) if scopes else []
        return [path for path in found if not scopes.isdisjoint(above(parent_of(path)))]
    if selector.endswith("@"):
        return match(_from_opendelta(selector), paths, roles, explicit)
    if selector.startswith("@"):
        return _match_roles(selector, paths, roles)
    hits = _match_components(selector, [*paths, *explicit(True)] if "[" in selector else paths)
    if "*" in selector.rpartition(".")[2]:
        return hits
    known = set(hits)
    return hits + [name for name in _match_components(selector, explicit(False)) if name not in known]


def _literal(selector: str, paths: Collection[str], explicit: Explicit) -> list[str]:
    """Returns the path that the selector is, or else the paths that end with a selector that has special characters."""
    parameters = explicit(False)
    if selector in paths or selector in parameters:
        return [selector]
    if all(map(is_plain, selector.split("."))):
        return []
    end = f".{selector}"
    return [path for path in paths if path.endswith(end)] or [path for path in parameters if path.endswith(end)]


def _match_regex(
    selector: str, pattern: str, paths: Collection[str], explicit: Explicit, *, whole_path: bool
) -> list[str]:
    if not pattern:
        # It would match the backbone itself, and so mean all of it.
        raise SelectorError(
            f"selector {selector!r}: no regular expression follows the prefix; write one, such as {selector + '.*query'!r}, "
            "or '^' for the backbone itself"
        )
    try:
        compiled = re.compile(pattern if whole_path else rf"(?:.*\.)?(?:{pattern})")
    except (re.error, OverflowError, RecursionError) as error:
        raise SelectorError(
            f"selector {selector!r}: invalid regular expression: {error}; correct what follows the prefix"
        ) from error
    hits = [path for path in paths if compiled.fullmatch(path)]
    return hits or [name for name in explicit(False) if compiled.fullmatch(name)]


def _match_roles(selector: str, paths: Collection[str], roles: Roles) -> list[str]:
    wanted = alternatives(selector[1:], selector)
    if any("" in role.split(".") for role in wanted):
        raise SelectorError(
            f"selector {selector!r}: a part of the role is empty; write '@' and one role, such as '@attn', '@attn.q' or "
            "'@attn.{q,v}'"
        )
    hits = dict.fromkeys(path for role in wanted for path in roles(role))
    modules = [path for path in paths if path in hits]
    known = set(modules)
    return modules + [path for path in hits if path not in known]


def _match_components(selector: str, paths: Collection[str]) -> list[str]:
    if selector == "^":
        return [path for path in paths if path == ""]
    components = selector.removeprefix("^").split(".")
    if "" in components:
        raise SelectorError(f"selector {selector!r}: an empty component; separate names by single dots")
    numbers = _numbers_in(paths) if "{" in selector else ()
    last = len(components) - 1
    pattern = "".join(_component_regex(c, selector, numbers, last=i == last) for i, c in enumerate(components))
    if not components[0].startswith("*"):
        at_root = re.compile(pattern)
        anchored = [path for path in paths if at_root.fullmatch(path)]
        if anchored or selector.startswith("^"):
            return anchored
    anywhere = re.compile(pattern if selector.startswith("^") else rf"(?:.*\.)?{pattern}")
    return [path for path in paths if path and anywhere.fullmatch(path)]


def _component_regex(component: str, selector: str, numbers: Collection[int], *, last: bool) -> str:
    if component == "**":
        return r"[^.]+(?:\.[^.]+)*" if last else r"(?:[^.]+\.)*"
    found = ""
    for piece in _pieces(component, selector):
        names = [re.escape(name).replace(r"\*", "[^.]*") for name in expand(piece, numbers)]
        # The group of a range with none of the numbers is `(?!)`, which matches nothing.
        found += f"(?:{'|'.join(names)})" if names else "(?!)"
    return found + ("" if last else r"\.")


def _numbers_in(paths: Collection[str]) -> list[int]:
    """Returns every number that a range could mean: those in the paths, and parts of them, as in `h{0-1}2`."""
    # A range is never expanded beyond these, so `{0-99999999999}` costs no more than `{0-9}`.
    digits = set(re.findall("[0-9]+", "\n".join(paths)))
    parts = {text[i:j] for text in digits for i in range(len(text)) for j in range(i + 1, min(len(text), i + 18) + 1)}
    return sorted(int(text) for text in parts if text == "0" or text[0] != "0")


def _pieces(text: str, selector: str) -> list[str]:
    """Divides a text with braces into the braces, and what stands before, between and after them."""
    pieces = re.split(r"(\{[^{}]*\})", text)
    if any(brace in piece for piece in pieces[::2] for brace in "{}"):
        raise SelectorError(f"selector {selector!r}: an unbalanced brace in {text!r}; write {{q,v}} or {{0-11}}")
    return [piece for piece in pieces if piece]


def alternatives(text: str, selector: str) -> list[str]:
    """Returns all texts that a text with braces stands for.

    >>> alternatives("{q,v}_proj", "{q,v}_proj")
    ['q_proj', 'v_proj']

    Args:
        selector: the whole selector, for the error message.

    Raises:
        SelectorError: if a brace has no partner, its members are malformed, or they stand for more than a thousand texts.
    """
    pieces = _pieces(text, selector)
    if prod(map(breadth, pieces)) > _MOST_TEXTS:
        raise SelectorError(
            f"selector {selector!r}: {text!r} stands for more than {_MOST_TEXTS:,} names; write the ones that you mean"
        )
    return ["".join(choice) for choice in product(*map(expand, pieces))]


def _from_opendelta(selector: str) -> str:
    parts = selector.split(".")
    scope = parts.pop(0)[:-1] + "/" if parts[0] in ("encoder@", "decoder@") and len(parts) > 1 else ""
    known = [_OPENDELTA_ROLES.get(part[:-1]) for part in parts if part.endswith("@")]
    if len(known) != len(parts) or None in known:
        raise SelectorError(
            f"selector {selector!r}: OpenDelta's common names are {', '.join(n + '@' for n in _OPENDELTA_ROLES)}, and every "
            "component must be one of them; use a role such as '@attn.q', or a path"
        )
    return f"{scope}@{'.'.join(str(name) for name in known)}"


def _miss(selector: str, paths: Collection[str], owner: str) -> str:
    leaves = Counter(path.rpartition(".")[2] for path in paths if path)
    message = f"selector {selector!r} matches none of the {sum(leaves.values())} modules of {owner}"
    near = _nearest(selector, leaves, paths)
    if near:
        message += f"; nearest: {', '.join(near)}"
    names = [name for name in leaves if not name.isdigit()]
    more = f" and {len(names) - 24} more" if len(names) > 24 else ""
    if not all(map(is_plain, leaves)):
        message += "; write a name with special characters with its full path, or as 're:' and a regular expression"
    if not names:
        return f"{message}; print(dk.show(model)) lists its paths"
    shown = f"{', '.join(names[:24])}{more}"
    return f"{message}; last components of its paths: {shown} (dk.targets(model) says what they are)"


def _nearest(selector: str, leaves: Iterable[str], paths: Collection[str]) -> list[str]:
    if selector.startswith(("re:", "[r]", "@")):
        return []
    last = selector.rpartition(".")[2]
    if prod(map(breadth, _pieces(last, selector))) > _MOST_TEXTS:
        return []
    wanted = [name for name in alternatives(last, selector) if name.strip("*")]
    near = {name for want in wanted for name in get_close_matches(want, leaves, n=3, cutoff=0.6)}
    return [path for path in paths if path.rpartition(".")[2] in near][:3]
