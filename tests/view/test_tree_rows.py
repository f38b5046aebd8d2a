"""What the rows of a tree say: counts that add up, what is folded, and what gives way where a line is too narrow."""

import re
from types import SimpleNamespace

import pytest
import torch
from rich.cells import cell_len
from torch import nn

import deltakit as dk
from deltakit.core import local_bytes
from deltakit.view.folding import folded, unfolded
from deltakit.view.text import text
from deltakit.view.tree import build as tree
from deltakit.view.tree_rows import rows
from support.models import Transformer
from support.steps import bend, steps
from support.tiny_transformers import build

LLAMA = {"num_attention_heads": 4, "num_key_value_heads": 2}


class TiedWithin(nn.Module):
    """A block whose second layer has the weight of its first; and one that is there twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3)
        self.b.weight = self.a.weight
        self.again = self.b


def tied_twice():
    model = nn.ModuleDict({"blocks": nn.ModuleList(TiedWithin() for _ in range(3)), "own": nn.Linear(3, 3, bias=False)})
    model["same"], model["like"] = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    model["same"].weight = model["own"].weight
    return model


def mixed():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3, bias=False))
    model[3].weight.requires_grad_(False)
    return model


def with_deltas(kind):
    model = build(kind)
    dk.attach(model, dk.LoRA(r=3), dk.BitFit(at="norm") if kind == "mixtral" else dk.BitFit(at="@ff.down"))
    return model


MODELS = {
    **{kind: lambda kind=kind: with_deltas(kind) for kind in ("bert", "t5", "mixtral", "clip")},
    "albert": lambda: build("albert"),
    "tied": tied_twice,
    "mixed": mixed,
}


@pytest.mark.parametrize("name", MODELS)
def test_folding_and_unfolding_are_inverse(name):
    plain = tree(MODELS[name](), buffers=True, memory=True)
    short = folded(plain)
    assert short != plain
    assert unfolded(short) == plain
    assert folded(unfolded(short)) == short
    lines = [line.plain for line in text(plain, columns=["members", "state", "count"], width=None, ascii=False)]
    again = text(unfolded(short), columns=["members", "state", "count"], width=None, ascii=False)
    assert lines == [line.plain for line in again]


@pytest.mark.parametrize("name", MODELS)
def test_counts_are_sums_of_the_rows_below(name):
    model = MODELS[name]()

    def check(node, times):
        below = sum(check(child, times * (1 if child.twins else child.members)) for child in node.children)
        own = sum(torch.Size(w.shape).numel() for w in node.weights if w.tied is None) * times
        assert node.sizes.parameters * times == own + below
        return own + below

    total = sum(p.numel() for _, p in dk_free(model))
    assert check(folded(tree(model)), 1) == check(tree(model), 1) == total


def dk_free(model):
    own = {id(p) for delta in dk.deltas(model) for p in delta.parameters()}
    return [(name, p) for name, p in model.named_parameters() if id(p) not in own]


def test_a_row_counts_all_modules_that_it_stands_for():
    model = build("llama")
    delta = dk.attach(model, dk.LoRA(r=3, at="q_proj"))
    (line,) = [
        line
        for line in str(dk.show(model, columns=("members", "state", "count", "each"))).splitlines()
        if "+lora" in line
    ]
    blocks, size = len(delta.modules), delta.num_parameters
    assert line.split()[-4:] == [f"×{blocks}", "Δ", str(size), str(size // blocks)]
    assert "each: in one module" in str(dk.show(model, columns=("each",)))


@pytest.mark.parametrize("name", [name for name in MODELS if name != "tied"])
def test_selectors_of_rows_select_their_modules(name):
    model = MODELS[name]()
    found = [row for row in rows(folded(tree(model))) if row.state != "delta"]
    hit = []
    for row in found:
        paths = dk.select(model, row.selector)
        assert len(paths) == int(row.cells["members"].removeprefix("×") or 1)
        hit += paths
    assert sorted(hit) == sorted({path for path, _ in rows_of(tree(model))})


def rows_of(node, path=""):
    yield path, node
    for child in node.children:
        yield from rows_of(child, f"{path}.{child.names[0]}".lstrip("."))


def test_selectors_of_odd_names():
    model = nn.ModuleDict({name: nn.Linear(2, 3) for name in ("a,b", "0-3", "{q}", "plain")})
    for row in rows(folded(tree(model)))[1:]:
        assert list(dk.select(model, row.selector)) == [row.selector]
    deep = nn.ModuleDict({"x": nn.ModuleDict({"a,b": nn.Linear(2, 3)}), "y": nn.ModuleDict({"a,b": nn.Linear(2, 3)})})
    assert [row.selector for row in rows(folded(tree(deep)))] == ["^", "{x,y}", ""]


def test_ties_say_so_also_in_folds():
    shown = str(dk.show(tied_twice()))
    assert re.search(r"b \(Linear\) weight:\[3, 3\] bias:\[3\]  = blocks\.\{0-2\}\.a\.weight +×3 ● +9", shown)
    assert "again (Linear) → blocks.{0-2}.b" in shown
    assert re.search(r"own,same \(Linear\) weight:\[3, 3\]  tied +×2 ● +9", shown)
    # A third one of the same shape has a weight of its own.
    assert re.search(r"like \(Linear\) weight:\[3, 3\] +● +9", shown)
    assert re.search(r"again \(Linear\) → blocks\.1\.b", str(dk.show(tied_twice(), fold=False)))


def test_a_sibling_with_the_name_of_an_owner_elsewhere_is_not_tied():
    inner = nn.ModuleDict({"shared": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    model = nn.ModuleDict({"shared": nn.Embedding(5, 3), "part": inner})
    inner["head"].weight = model["shared"].weight
    shown = str(dk.show(model))
    assert re.search(r"head \(Linear\) weight:\[5, 3\]  = shared\.weight +tied", shown)
    assert shown.splitlines()[-1].startswith("30 parameters")


def test_names_with_gaps_are_spelled_like_others():
    shown = str(dk.show(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))))
    assert "0,2 (Linear)" in shown
    assert "missing numbers have no parameters (all_modules=True)" in shown
    assert "missing" not in str(dk.show(nn.Sequential(nn.Linear(3, 3), nn.ReLU())))


def test_inactive_frozen_and_merged_deltas_are_counted_as_what_they_are():
    model = Transformer(blocks=1)
    delta = dk.attach(model, dk.LoRA(r=3, at="q_proj"))
    other = dk.attach(model, dk.BitFit(at="v_proj"), name="b")
    size, small, own = delta.num_parameters, other.num_parameters, sum(p.numel() for _, p in dk_free(model))
    assert f"+{size + small} in deltas · trainable {size + small}" in totals(model)
    other.active, delta.trainable = False, False
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"+{size + small} in deltas ({small} inactive, {size} frozen)" in totals(model)
    assert f"trainable {trained} ({100 * trained / own:.3g} % of {own:,})" in totals(model)
    other.detach()
    delta.merge()
    assert f"({size} merged, {size} frozen)" in totals(model)
    assert re.search(r"\+lora .* merged frozen .*merged +\d", str(dk.show(model)))


def totals(model):
    return " · ".join(str(dk.show(model)).splitlines()[-2:])


def test_convolutions_have_kernels_and_buffers_are_shown_on_request():
    model = nn.Sequential(
        nn.Conv2d(6, 4, (7, 5), stride=2, groups=2), nn.Conv1d(4, 4, 3, dilation=2), nn.ConvTranspose2d(2, 3, 1, stride=(1, 2)), nn.BatchNorm2d(4)
    )  # fmt: skip
    shown = str(dk.show(model))
    assert "0 (Conv2d) kernel 7×5 stride 2 groups 2 weight:[4, 3, 7, 5]" in shown
    assert "1 (Conv1d) kernel 3 dilation 2 weight" in shown
    assert "kernel 1×1 stride 1×2 weight" in shown
    assert "buffers" not in shown
    buffers = str(dk.show(model, buffers=True))
    assert "buffers running_mean:[4] running_var:[4] num_batches_tracked:[]" in buffers
    assert buffers.splitlines()[-1] == shown.splitlines()[-1]


def test_columns_on_request():
    model = nn.Sequential(nn.Linear(3, 5).half(), nn.Linear(5, 7, dtype=torch.float64))
    columns = ("count", "dtype", "bytes", "device")
    first, second, third = str(dk.show(model, columns=columns)).splitlines()[:3]
    assert re.search(r"62 +mixed 376 B cpu$", first)
    assert re.search(r"20 float16 +40 B cpu$", second)
    assert re.search(r"42 float64 336 B cpu$", third)
    assert str(dk.show(model, columns=columns)).splitlines()[-1].endswith("376 B")
    assert re.search(r"62 +mixed 376 B cpu$", str(dk.show(model, columns=columns, depth=1)).splitlines()[0])


def test_memory_of_quantized_and_lazy_tensors():
    packed = torch.zeros(6, dtype=torch.uint8)
    scales = torch.zeros(3)
    packed.quant_state = SimpleNamespace(absmax=torch.zeros(2), state2=SimpleNamespace(absmax=scales))
    assert local_bytes(packed) == 6 + 8 + 12
    assert local_bytes(nn.LazyLinear(3).weight) == 0


def narrow(kind, width, **options):
    return str(dk.show(with_deltas(kind), width=width, **options)).splitlines()


@pytest.mark.parametrize("kind", ["t5", "clip"])
@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_columns_stay_where_lines_are_narrow(kind, width):
    wide, lines = narrow(kind, 400), narrow(kind, width)
    for all_of_it, line in zip(wide, lines, strict=False):
        if all_of_it[:1] in "r├└│ ":
            cells = -1 if all_of_it.endswith("tied") else -2
            assert line.split("…")[-1].split()[cells:] == all_of_it.split()[cells:], line
    assert max(map(cell_len, lines)) <= width
    # The footer is wrapped, and says the same.
    assert " · ".join(lines[len(rows(folded(tree(with_deltas(kind))))) :]) == " · ".join(wide[-2:])


def test_what_gives_way_first():
    model = nn.ModuleDict({"some_long_name": nn.Conv2d(2, 3, 5, stride=2)})
    widths = {width: str(dk.show(model, width=width)).splitlines()[1] for width in (90, 70, 50, 40, 26)}
    assert [re.sub(" +● 153", "", line) for line in widths.values()] == [
        "└── some_long_name (Conv2d) kernel 5×5 stride 2 weight:[3, 2, 5, 5] bias:[3]",
        "└── some_long_name (Conv2d) kernel 5×5 stride 2 …",
        "└── some_long_name (Conv2d) …",
        "└── some_long_name (Conv2d) …",
        "└── some_long_name…",
    ]


def test_a_long_line_does_not_push_the_columns_of_others():
    names = [f"a_name_of_twenty_cells_{n}" for n in range(6)]
    model = nn.ModuleDict({"short": nn.Linear(3, 4), **{name: nn.LayerNorm(3) for name in names}})
    root, short, long = str(dk.show(model, width=400)).splitlines()[:3]
    assert cell_len(root) == cell_len(short) == 120
    assert cell_len(long) > 120
    assert long.endswith("bias:[3]  ×6 ● 36")
    assert cell_len(str(dk.show(model)).splitlines()[2]) == 120


def test_the_legend_explains_what_is_there():
    frozen = nn.Linear(2, 3).requires_grad_(False)
    assert str(dk.show(frozen)).splitlines()[1:] == ["○ frozen", "9 parameters · trainable 0 (0 %) · frozen 9"]
    assert str(dk.show(frozen, columns=())).splitlines() == ["root weight:[3, 2] bias:[3]"]


def test_time_grows_as_the_number_of_modules(unchecked):
    def model(count):
        blocks = nn.ModuleList()
        for width in range(1, count + 1):
            # All differ, so that nothing is folded.
            blocks.append(nn.Sequential(nn.Linear(1, width), nn.LayerNorm(width)))
        return blocks

    for call in (str, lambda view: view.html(), lambda view: view.json()):
        made = [model(count) for count in (10, 20, 30)]
        call(dk.show(made[0]))
        assert bend([steps(lambda m=m, call=call: call(dk.show(m))) for m in made]) < 0.02


def test_a_fold_names_what_it_is_of():
    node = folded(tree(nn.ModuleList(nn.Linear(2, 2) for _ in range(3))))
    (child,) = node.children
    assert (child.names, child.order) == (("0", "1", "2"), (0, 1, 2))
    assert unfolded(node._replace(children=(child._replace(order=(2, 1, 0)),))).children[0].names == ("2",)


def test_equal_parts_of_a_tree_are_one_object():
    one, other = tree(nn.ModuleList(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)) for _ in range(2))).children
    assert all(a is b for a, b in zip(one.children, other.children, strict=True))
    halves = tree(nn.ModuleList(nn.Sequential(nn.Linear(2, 3, dtype=kind)) for kind in (torch.half, torch.double)))
    assert halves.children[0].children[0] is not halves.children[1].children[0]
