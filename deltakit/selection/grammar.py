"""The one grammar that picks paths. A selector is text; matching runs over path names and never touches a module.

    q_proj, self_attn.q_proj    whole components, matched from the end
    ^encoder.block.0, ^         anchored at the root; the root itself
    {q,v}  {0-11}  {0-22:2}  {0-39!3-38:5}    one of these; index ranges, with a step, with a part left out
    *   **                      one component (or a part of one); any number of components
    re:REGEX  [r]REGEX          a regular expression over the whole path; over its end (OpenDelta)
    @attn.q  @attn.{q,v}        roles, the same on every architecture
    attn@.q@                    the same in OpenDelta's spelling
    encoder/@attn.q             any of these, only below what the part before the slash picks
    experts.gate_up_proj        a parameter, by a last component without wildcards
    c_attn[q]  c_attn[{q,v}]    the rows of a fused projection that are queries, keys or values

A selector that matches from the root is anchored there: a full path means that module and no other.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from itertools import product

from deltakit.core import expand
from deltakit.errors import SelectorError

Roles = Callable[[str], Sequence[str]]
"""Gives the paths that answer a role such as `attn.q`."""

_OPENDELTA_ROLES = {"attn": "attn", "ff": "ff", "q": "q", "k": "k", "v": "v", "proj": "o", "w1": "up", "w2": "down"}


Named = Callable[[bool], Sequence[str]]
"""Gives what is picked only where it is written out: parameters; or, for True, rows of fused projections."""


def nothing_named(_rows: bool) -> Sequence[str]:
    """No parameters and no rows: for matching among modules alone."""
    return ()


def select_paths(
    selectors: str | Sequence[str], paths: Sequence[str], roles: Roles, *, owner: str, named: Named = nothing_named
) -> list[str]:
    """The paths that at least one of the selectors matches, in the order of `paths`; parameters and rows last.

    Args:
        owner: what the paths belong to, for the error message.

    Raises:
        SelectorError: if a selector is malformed, or if one of them matches nothing although others do.
    """
    entries = [selectors] if isinstance(selectors, str) else list(selectors)
    if not entries:
        raise SelectorError("an empty list of selectors selects nothing; expected at least one selector")
    hits: dict[str, None] = {}
    for entry in entries:
        found = match(entry, paths, roles, named)
        if not found:
            raise SelectorError(_miss(entry, paths, owner))
        hits.update(dict.fromkeys(found))
    modules = [path for path in paths if path in hits]
    known = set(modules)
    return modules + [path for path in hits if path not in known]


def match(selector: str, paths: Sequence[str], roles: Roles, named: Named = nothing_named) -> list[str]:
    """The paths that one selector matches, in the order of `paths`; possibly none.

    >>> match("{q,v}", ["a.q", "a.k", "a.v", "a.qk"], lambda role: ())
    ['a.q', 'a.v']

    Raises:
        SelectorError: if the selector is malformed.
    """
    if not isinstance(selector, str) or not selector:
        raise SelectorError(f"selector {selector!r}: expected text such as 'q_proj', '@attn.q' or '**.{{q,v}}'")
    for prefix, whole in (("re:", True), ("[r]", False)):
        if selector.startswith(prefix):
            return _match_regex(selector, selector[len(prefix) :], paths, named, whole=whole)
    scope, slash, rest = selector.rpartition("/")
    if slash:
        below = tuple(f"{path}." if path else "" for path in match(scope, paths, roles, named))
        return [path for path in match(rest, paths, roles, named) if path.startswith(below)] if below else []
    if selector.endswith("@"):
        return match(_from_opendelta(selector), paths, roles, named)
    if selector.startswith("@"):
        return _match_roles(selector, paths, roles)
    hits = _match_components(selector, [*paths, *named(True)] if "[" in selector else paths)
    if "*" in selector.rpartition(".")[2]:
        return hits
    return hits + [name for name in _match_components(selector, named(False)) if name not in hits]


def _match_regex(selector: str, pattern: str, paths: Sequence[str], named: Named, *, whole: bool) -> list[str]:
    try:
        compiled = re.compile(pattern if whole else rf"(?:.*\.)?(?:{pattern})")
    except re.error as error:
        raise SelectorError(f"selector {selector!r}: no regular expression: {error}") from error
    hits = [path for path in paths if compiled.fullmatch(path)]
    return hits or [name for name in named(False) if compiled.fullmatch(name)]


def _match_roles(selector: str, paths: Sequence[str], roles: Roles) -> list[str]:
    hits = dict.fromkeys(path for role in alternatives(selector[1:], selector) for path in roles(role))
    modules = [path for path in paths if path in hits]
    known = set(modules)
    return modules + [path for path in hits if path not in known]


def _match_components(selector: str, paths: Sequence[str]) -> list[str]:
    if selector == "^":
        return [path for path in paths if path == ""]
    components = selector.removeprefix("^").split(".")
    if "" in components:
        raise SelectorError(f"selector {selector!r}: an empty component; expected names between single dots")
    pattern = "".join(_component_regex(c, selector, last=i == len(components) - 1) for i, c in enumerate(components))
    if not components[0].startswith("*"):
        at_root = re.compile(pattern)
        anchored = [path for path in paths if at_root.fullmatch(path)]
        if anchored or selector.startswith("^"):
            return anchored
    anywhere = re.compile(pattern if selector.startswith("^") else rf"(?:.*\.)?{pattern}")
    return [path for path in paths if path and anywhere.fullmatch(path)]


def _component_regex(component: str, selector: str, *, last: bool) -> str:
    if component == "**":
        return r"[^.]+(?:\.[^.]+)*" if last else r"(?:[^.]+\.)*"
    names = [re.escape(name).replace(r"\*", "[^.]*") for name in alternatives(component, selector)]
    return f"(?:{'|'.join(names)})" + ("" if last else r"\.")


def alternatives(text: str, selector: str) -> list[str]:
    """What a text with braces stands for, each brace replaced by each of its members.

    >>> alternatives("{q,v}_proj", "{q,v}_proj")
    ['q_proj', 'v_proj']
    """
    pieces = re.split(r"(\{[^{}]*\})", text)
    if any(brace in piece for piece in pieces[::2] for brace in "{}"):
        raise SelectorError(
            f"selector {selector!r}: a brace without its partner in {text!r}; expected {{q,v}} or {{0-11}}"
        )
    choices = [expand(piece) if i % 2 else (piece,) for i, piece in enumerate(pieces)]
    return ["".join(choice) for choice in product(*choices)]


def _from_opendelta(selector: str) -> str:
    parts = selector.split(".")
    scope = parts.pop(0)[:-1] + "/" if parts[0] in ("encoder@", "decoder@") and len(parts) > 1 else ""
    known = [_OPENDELTA_ROLES.get(part[:-1]) for part in parts if part.endswith("@")]
    if len(known) != len(parts) or None in known:
        raise SelectorError(
            f"selector {selector!r}: expected OpenDelta's common names {', '.join(n + '@' for n in _OPENDELTA_ROLES)} "
            "only; write a role such as '@attn.q', or a path"
        )
    return f"{scope}@{'.'.join(str(name) for name in known)}"


def _miss(selector: str, paths: Sequence[str], owner: str) -> str:
    leaves = Counter(path.rpartition(".")[2] for path in paths if path)
    message = f"selector {selector!r} selects none of the {sum(leaves.values())} modules of {owner}"
    near = _nearest(selector, leaves, paths)
    if near:
        message += f"; nearest: {', '.join(near)}"
    names = [name for name in leaves if not name.isdigit()]
    more = f" and {len(names) - 24} more" if len(names) > 24 else ""
    return f"{message}; leaf names there are: {', '.join(names[:24])}{more}"


def _nearest(selector: str, leaves: Iterable[str], paths: Sequence[str]) -> list[str]:
    if selector.startswith(("re:", "[r]", "@")):
        return []
    wanted = [name for name in alternatives(selector.split(".")[-1], selector) if name.strip("*")]
    near = {name for want in wanted for name in get_close_matches(want, leaves, n=3, cutoff=0.6)}
    return [path for path in paths if path.rpartition(".")[2] in near][:3]
