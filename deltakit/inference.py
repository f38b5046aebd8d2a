"""Roles inferred from structure, with no table per architecture.

Attention is where projections to queries, keys and values stand side by side, or one that fuses them; its output
projection gives back their input size. A feed-forward part is a pair of linear layers in a block, out of the hidden
size and back to it, outside the attention. What cannot be told for sure is left out, never guessed.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

from torch import nn

from deltakit.linears import linear_sizes
from deltakit.role_names import FUSED, FUSED_GATES, FUSED_KV, GATES, HEADS, OUTPUTS, PROJECTIONS, says_attention
from deltakit.roles import RoleMap, Unit


def infer_roles(backbone: nn.Module, modules: Mapping[str, nn.Module] | None = None) -> RoleMap:
    """The roles on a backbone. `modules`: its modules by path, if some of them are not to be looked at."""
    return _Inference(backbone, dict(backbone.named_modules()) if modules is None else dict(modules)).roles()


class _Inference:
    """One walk over the modules of a backbone."""

    def __init__(self, backbone: nn.Module, modules: dict[str, nn.Module]) -> None:
        self.backbone = backbone
        self.modules = modules
        self.order = {path: place for place, path in enumerate(modules)}
        self.linears = {path: size for path, module in modules.items() if (size := linear_sizes(module)) is not None}
        self.children: dict[str, list[str]] = {path: [] for path in modules}
        for path in modules:
            parent = _parent(path)
            if path and parent in self.children:
                self.children[parent].append(path)

    def roles(self) -> RoleMap:
        attention = list(self._attention())
        widths = {self._block(unit.path): unit.width for unit in attention}
        units = sorted([*attention, *self._feed_forward(attention, widths)], key=lambda unit: self.order[unit.path])
        blocks = sorted((block for block in widths if block in self._repeated), key=self.order.__getitem__)
        norms = tuple(path for path, module in self.modules.items() if _is_norm(module))
        return RoleMap(tuple(units), tuple(blocks), norms, self._embed(), self._head(), self.order)

    def _names(self, path: str) -> dict[str, str]:
        """The linear layers directly at a path, or in a Sequential there, by the name they go under."""
        names = {}
        for child in self.children[path]:
            inner = self.children[child] if isinstance(self.modules[child], nn.Sequential | nn.ModuleList) else []
            found = next((linear for linear in (child, *inner) if linear in self.linears), None)
            if found is not None:
                names[_name(child)] = found
        return names

    def _attention(self) -> Iterator[Unit]:
        found: set[str] = set()
        for path in reversed(self.modules):
            module = self.modules[path]
            says = says_attention(type(module).__name__)
            parts = self._projections(self._names(path), says)
            if not parts and (not says or any(other.startswith(f"{path}.") for other in found)):
                continue
            unit = self._unit(path, parts)
            if isinstance(module, nn.MultiheadAttention) or unit.parts:
                found.add(path)
                yield unit

    def _projections(self, names: Mapping[str, str], says: bool) -> dict[str, str]:
        parts = {letter: names[name] for letter, known in PROJECTIONS.items() for name in names if name in known}
        if "q" in parts and ("k" in parts or "v" not in parts):
            kv = [path for name, path in names.items() if name in FUSED_KV]
            if "k" not in parts and kv:
                parts["kv"] = kv[0]
            if "k" in parts or "kv" in parts:
                return parts
        # `in_proj` is what state-space mixers call theirs too: there the class must say that it is attention.
        fused = [path for name, path in names.items() if name in FUSED and (name != "in_proj" or says)]
        return {"qkv": fused[0]} if fused and "q" not in parts else {}

    def _unit(self, path: str, parts: dict[str, str]) -> Unit:
        if isinstance(self.modules[path], nn.MultiheadAttention):
            # It reads the weights of its projections and never calls them.
            return Unit("attn", path, self.modules[path].embed_dim, {})  # type: ignore[arg-type]
        first = parts.get("q") or parts.get("qkv")
        width = self.linears[first][0] if first else None
        own = {name: linear for name, linear in self._names(path).items() if linear not in parts.values()}
        outputs = [linear for name, linear in own.items() if name in OUTPUTS and self._gives(linear, width)]
        if not outputs and first:
            beside = self._beside(path, width)
            if beside:
                return Unit("attn", _parent(path), width, {**parts, "o": beside})
        if len(outputs) == 1:
            parts = {**parts, "o": outputs[0]}
            width = width or self.linears[outputs[0]][1]
        return Unit("attn", path, width, parts)

    def _gives(self, linear: str, width: int | None) -> bool:
        return width is None or self.linears[linear][1] == width

    def _beside(self, path: str, width: int | None) -> str | None:
        """The output projection where it stands in a sibling of the projections (BERT), if there is just one."""
        parent = _parent(path)
        if not path or parent in self._repeated:
            return None
        linears = [p for p in self.linears if p.startswith(f"{parent}.") and not p.startswith(f"{path}.")]
        return linears[0] if len(linears) == 1 and self._gives(linears[0], width) else None

    @cached_property
    def _repeated(self) -> set[str]:
        """The children of lists in which some children are alike: repeated blocks.

        A list whose children are all different is the inside of a block (T5's `layer`).
        """
        repeated: set[str] = set()
        for path, module in self.modules.items():
            if isinstance(module, nn.ModuleList | nn.Sequential | nn.ModuleDict):
                inner = [child for child in self.children[path] if self.children[child]]
                kinds = {type(self.modules[child]) for child in inner}
                if len(inner) == 1 or len(kinds) < len(inner):
                    repeated.update(inner)
        return repeated

    def _block(self, path: str) -> str:
        """The repeated block around a unit; in a backbone without any, the module around it."""
        return next((above for above in _above(_parent(path)) if above in self._repeated), _parent(path))

    def _feed_forward(self, attention: Sequence[Unit], widths: Mapping[str, int | None]) -> Iterator[Unit]:
        """What is left of the blocks when their attention is taken out, in pairs of linear layers."""
        taken = {unit.path for unit in attention}
        for path in self.modules:
            above = list(_above(path))
            block = next((other for other in above if other in widths), None)
            if block is None or not taken.isdisjoint(above[: above.index(block) + (block in taken)]):
                continue
            yield from self._pair(path, block, widths[block], taken)
            if any(p is not None and p.ndim == 3 for p in self.modules[path]._parameters.values()):
                yield self._experts(path, block, widths[block])

    def _pair(self, path: str, block: str, width: int | None, taken: set[str]) -> Iterator[Unit]:
        """The feed-forward unit whose linear layers stand at a path, or one each in children there."""
        names = dict(self._names(path))
        for child in self.children[path]:
            alone = list(self._names(child).values())
            if len(alone) == 1 and not self.children[alone[0]]:
                names.setdefault(_name(child), alone[0])
        linears = [linear for linear in names.values() if taken.isdisjoint(_above(linear))]
        down = next((b for b in reversed(linears) if self._is_down(b, linears, width)), None)
        if down is None:
            return
        inner, out = self.linears[down]
        # Where the inner size is the hidden size, only the order tells up from down.
        before = [a for a in linears if inner != out or self.order[a] < self.order[down]]
        ups = [a for a in before if a != down and self.linears[a] == (out, inner)]
        fused = [a for a in linears if self.linears[a] == (out, 2 * inner)]
        parts = {"down": down, **self._ups(ups), **({"gate_up": fused[0]} if fused and not ups else {})}
        yield Unit("ff", path, out, parts, own=path != block)

    def _is_down(self, linear: str, linears: Sequence[str], width: int | None) -> bool:
        inner, out = self.linears[linear]
        if width is not None and out != width:
            return False
        sizes = [self.linears[other] for other in linears if other != linear]
        return (out, inner) in sizes or (
            (out, 2 * inner) in sizes and any(fused in _name(other) for other in linears for fused in FUSED_GATES)
        )

    def _ups(self, ups: Sequence[str]) -> dict[str, str]:
        gates = [up for up in ups if _name(up) in GATES]
        plain = [up for up in ups if up not in gates]
        return {**({"gate": gates[0]} if len(gates) == 1 else {}), **({"up": plain[0]} if len(plain) == 1 else {})}

    def _experts(self, path: str, block: str, width: int | None) -> Unit:
        """The mixture of experts whose experts' weights are 3-d parameters at a path: no projection is a module."""
        parent = _parent(path)
        whole = parent if parent != block and parent.startswith(block) else path
        return Unit("ff", whole, width, {})

    def _embed(self) -> tuple[str, ...]:
        getter = getattr(self.backbone, "get_input_embeddings", None)
        try:
            embedding = getter() if getter else None
        except (NotImplementedError, AttributeError):
            # transformers' own getter where a model has none, or more than one, to give.
            embedding = None
        if embedding is not None:
            return tuple(path for path, module in self.modules.items() if module is embedding)
        tables = {path: m.num_embeddings for path, m in self.modules.items() if isinstance(m, nn.Embedding)}
        return (max(tables, key=tables.__getitem__),) if tables else ()

    def _head(self) -> tuple[str, ...]:
        getter = getattr(self.backbone, "get_output_embeddings", None)
        head = getter() if getter else None
        if head is not None:
            return tuple(path for path, module in self.modules.items() if module is head)
        base = getattr(self.backbone, "base_model_prefix", "")
        roots = [child for child in self.children[""] if any(True for _ in self.modules[child].parameters())]
        if base and base in roots:
            return tuple(child for child in roots if child != base)
        return tuple(child for child in roots if child in HEADS)


def _is_norm(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return "norm" in type(module).__name__.lower() and weight is not None and weight.ndim == 1


def _name(path: str) -> str:
    return path.rpartition(".")[2]


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _above(path: str) -> Iterator[str]:
    """The path itself and every path above it, from the inside out."""
    while path:
        yield path
        path = _parent(path)
    yield ""
