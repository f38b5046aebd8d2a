"""Arguments are checked by their annotations: what is accepted and converted, and what the error says."""

import copy
import inspect
import json
import pickle
import pydoc
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal, Protocol, TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import deltakit as dk
from deltakit.core import METHODS, checked
from deltakit.core.annotations import Unfit, reader
from deltakit.core.argument_words import expected
from support.kind_methods import AffineDelta
from support.models import Transformer


@pytest.fixture(autouse=True)
def _(unchecked):
    """Without beartype, which checks the same functions in tests only."""


class Shape(Protocol):
    size: int


@pytest.mark.parametrize(
    ("hint", "value", "wanted"),
    [
        (int, np.int64(4), 4),
        (int, -(2**63), -(2**63)),
        (int, 2**63 - 1, 2**63 - 1),
        (float, np.float32(0.5), 0.5),
        (float, 16, 16),
        (float, 2**80, float(2**80)),
        (bool, np.bool_(False), False),
        (str, np.str_("q"), "q"),
        (int | None, None, None),
        (Sequence[int], (np.int64(1), 2), (1, 2)),
        (Sequence[int], range(2), [0, 1]),
        (tuple[int, ...], [1, 2], (1, 2)),
        (tuple[str, int], ["a", 1], ("a", 1)),
        (Mapping[str, float], {"a": np.float64(0.5)}, {"a": 0.5}),
        (Literal["a", 1], 1, 1),
        (Annotated[int, "at least 1"], 3, 3),
        (type[nn.Module], nn.Linear, nn.Linear),
        (Callable[[int], int], int, int),
        (TypeVar("T"), "x", "x"),
        (Shape, "x", "x"),
        ("unknown", 5, 5),
        (Any, None, None),
    ],
)  # fmt: skip
def test_what_fits(hint, value, wanted):
    found = reader(hint)(value)
    assert found == wanted
    assert type(found) is type(wanted)


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (int, True),
        (int, 8.0),
        (int, 2**63),
        (int, -(2**63) - 1),
        (int, torch.tensor(8)),
        (float, "0.5"),
        (float, float("nan")),
        (float, 2**5000),
        (bool, 1),
        (bool, ""),
        (str, b"q"),
        (Sequence[str], "q"),
        (Sequence[str], {"q"}),
        (Sequence[str], ["q"] * 99 + [5]),
        (Mapping[str, int], {"a": "b"}),
        (tuple[str, int], ["a"]),
        (Literal["a", 1], True),
        (type[nn.Module], int),
        (str | Path, 5),
        (nn.Module, nn.Linear),
    ],
)
def test_what_does_not_fit(hint, value):
    for _ in range(20):
        # Each time: beartype looks at one random entry of a list.
        with pytest.raises(Unfit):
            reader(hint)(value)


def test_the_callers_own_mapping_is_passed_on():
    state = {"a": torch.zeros(1)}
    assert reader(Mapping[str, Tensor])(state) is state


PEFT = type("LoraConfig", (SimpleNamespace,), {"__module__": "peft.tuners.lora.config"})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: dk.LoRA(alpha="16"), "LoRA(alpha='16'): expected a finite number or a dictionary of finite numbers, found the text '16'; write alpha=16"),
        (lambda m: dk.LoRA(r=8.0), "LoRA(r=8.0): expected a whole number or a dictionary of whole numbers, found the number 8.0; write r=8"),
        (lambda m: dk.LoRA(r=torch.tensor(8)), "LoRA(r=...): expected a whole number or a dictionary of whole numbers, found a tensor of shape []; write .item() behind it"),
        (lambda m: dk.LoRA(rslora="no"), "LoRA(rslora='no'): expected True or False, found the text 'no'; write rslora=False"),
        (lambda m: dk.LoRA(rslora=""), "LoRA(rslora=''): expected True or False, found an empty text; write rslora=False"),
        (lambda m: dk.LoRA(at=["q", 5]), "LoRA(at=...): expected a text, a list of texts or None, found a list with the number 5; omit at= for None"),
        (lambda m: dk.LoRA(at={"q"}), "LoRA(at=...): expected a text, a list of texts or None, found a set; put list(...) around it"),
        (lambda m: dk.LoRA(8), "LoRA: it takes no values without a name, and the number 8 is one more; write r=8"),
        (lambda m: dk.LoRA("q"), "LoRA: it takes no values without a name, and the text 'q' is one more; write at='q'"),
        (lambda m: dk.LoRA(target_modules=["q"], lora_alpha=3), "LoRA(target_modules=..., lora_alpha=...): no such options; write at= for target_modules, write alpha= for lora_alpha"),
        (lambda m: dk.LoRA(task_type="CAUSAL_LM"), "LoRA(task_type=...): no such option; task_type: omit it; attach(model, ..., train='@head') trains the head of a task"),
        (lambda m: dk.LoRA(dropuot=0.1), "LoRA(dropuot=...): no such option; the nearest to dropuot are dropout="),
        (lambda m: dk.Prefix(num_virtual_tokens=3), "Prefix(num_virtual_tokens=...): no such option; write tokens= for num_virtual_tokens"),
        (lambda m: dk.LoRA(modules_to_save=["x"]), "LoRA(modules_to_save=...): no such option; modules_to_save: write attach(model, ..., train='@head') to train modules fully"),
        (lambda m: dk.IA3(zzz=1), "IA3(zzz=...): no such option; the options are at, of, exclude, side"),
        (lambda m: dk.attach(m, dk.LoRA), "attach(): expected a method such as LoRA(r=8), found the class LoRA; write LoRA() with parentheses"),
        (lambda m: dk.attach(m, "lora"), "attach(): expected a method such as LoRA(r=8), found the text 'lora'; write LoRA()"),
        (lambda m: dk.attach(m, [dk.LoRA()]), "attach(): expected a method such as LoRA(r=8), found a list; put a star before the list: attach(..., *[...])"),
        (lambda m: dk.attach(m, PEFT(r=4, lora_alpha=32, target_modules={"v", "q"})), "attach(): expected a method such as LoRA(r=8), found a LoraConfig; write a method with its options, such as LoRA(r=4, alpha=32, at=['q', 'v'])"),
        (lambda m: dk.attach(m, modules_to_save="x"), "attach(modules_to_save=...): no such option; write train= for modules_to_save"),
        (lambda m: dk.attach(), "attach: backbone= is missing; pass a torch.nn.Module"),
        (lambda m: dk.attach("bert", dk.LoRA()), "attach(backbone='bert'): expected a torch.nn.Module, found the text 'bert'; load the model first, such as by transformers' AutoModel.from_pretrained('bert')"),
        (lambda m: dk.attach(nn.Linear, dk.LoRA()), "attach(backbone=Linear): expected a torch.nn.Module, found the class Linear; write Linear() with parentheses"),
        (lambda m: dk.attach([m], dk.LoRA()), "attach(backbone=...): expected a torch.nn.Module, found a list; put the modules into one with torch.nn.ModuleList"),
        (lambda m: dk.show(SimpleNamespace(model=m)), "show(backbone=...): expected a torch.nn.Module, found a SimpleNamespace; pass its .model"),
        (lambda m: dk.deltas(5), "deltas(backbone=5): expected a torch.nn.Module, found the number 5; pass the model itself"),
        (lambda m: dk.show(m, columns="count"), "show(columns='count'): expected a list of texts, found the text 'count'; write columns=['count']"),
        (lambda m: dk.rows(m, ["a", 5]), "rows(names=...): expected a list of texts or None, found a list with the number 5"),
        (lambda m: dk.combine(m, {"a": "x"}), "combine(weights=...): expected a dictionary of finite numbers, found a dictionary with the text 'x'"),
        (lambda m: dk.load("", m), "load(source=''): expected a text or a path, found an empty text; write '.' for the working directory"),
        (lambda m: dk.load("x", m, check="no"), "load(check='no'): expected 'error' or 'warn', found the text 'no'; omit check= for 'error'"),
        (lambda m: dk.LoraModel(m, r=8), "LoraModel(r=...): no such option; write lora_r= for r"),
        (lambda m: dk.LoRA(r=2**2000), "LoRA(r=2**2001): expected a whole number or a dictionary of whole numbers, found the number 2**2001; omit r= for 8"),
        # An argument whose type is a protocol.
        (lambda m: dk.SoftPrompt(init=nn.Linear), "SoftPrompt(init=Linear): expected a text or a delta with a soft prompt, such as attach and load return, found the class Linear; omit init= for 'vocab'"),
        (lambda m: dk.SoftPrompt.from_delta(dk.Delta), "SoftPrompt.from_delta(delta=Delta): expected a delta with a soft prompt, such as attach and load return, found the class Delta"),
        (lambda m: dk.AutoDeltaModel(), "AutoDeltaModel has no instances: call AutoDeltaModel.from_config or from_finetuned"),
    ],
)  # fmt: skip
def test_what_errors_say(call, message):
    with pytest.raises(dk.DeltaError) as caught:
        call(Transformer(blocks=1))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("active", "false", "Delta.active='false': expected True or False, found the text 'false'; write active=False"),
        ("trainable", 0, "Delta.trainable=0: expected True or False, found the number 0; write trainable=False"),
        ("scale", "2", "Delta.scale='2': expected a finite number, found the text '2'; write scale=2"),
        ("activ", False, "delta.activ does not exist; active, scale, trainable can be set"),
        (
            "attached",
            False,
            "delta.attached cannot be set; active, scale, trainable can be set; call attach() or detach()",
        ),
    ],
)
def test_what_setters_say(name, value, message):
    delta = dk.attach(Transformer(blocks=1), dk.LoRA(r=2))
    with pytest.raises(dk.OptionError) as caught:
        setattr(delta, name, value)
    assert str(caught.value) == message


def test_what_is_expected_in_words():
    assert expected(Sequence[int | None]) == "a list of whole numbers or None"
    assert expected(int | None) == "a whole number or None"


def test_what_is_said_without_a_name_and_of_a_default_that_is_long():
    @checked
    def add(*sizes: int, by: int | Sequence[int] = (1,)) -> None:
        """Takes numbers."""

    with pytest.raises(dk.OptionError) as caught:
        add("3")
    assert str(caught.value) == "add(): expected a whole number, found the text '3'; write 3"
    with pytest.raises(dk.OptionError) as caught:
        add(by=5.5)
    assert str(caught.value) == (
        "add(by=5.5): expected a whole number or a list of whole numbers, found the number 5.5; omit by="
    )


FOREIGN = {
    dk.LoRA: {
        "r": ("rank", "lora_r", "lora_rank"),
        "alpha": ("lora_alpha",),
        "at": ("target_modules", "target_parameters", "modified_modules", "targets", "modules", "layers"),
        "exclude": ("exclude_modules",),
        "dropout": ("lora_dropout",),
        "rslora": ("use_rslora", "use_rs_lora"),
    },
    dk.Prefix: {
        "tokens": ("num_virtual_tokens", "prefix_token_num", "num_tokens", "prefix_length"),
        "reparam": ("prefix_projection", "reparameterize"),
        "hidden": ("encoder_hidden_size", "mid_dim"),
    },
    dk.SoftPrompt: {"tokens": ("soft_token_num",), "init": ("prompt_tuning_init", "token_init")},
    dk.Adapter: {
        "size": ("bottleneck_dim", "bottleneck_size", "adapter_size", "adapter_dim"),
        "reduction": ("reduction_factor",),
        "activation": ("non_linearity",),
    },
}


@pytest.mark.parametrize(
    ("method", "ours", "theirs"),
    [(method, ours, one) for method, names in FOREIGN.items() for ours, others in names.items() for one in others],
)
def test_names_of_others_are_answered_with_ours(method, ours, theirs):
    with pytest.raises(dk.OptionError, match=rf"write {ours}= for {theirs}$"):
        method(**{theirs: 1})


def test_numbers_of_numpy_can_be_saved():
    method = dk.LoRA(r=np.int64(4), alpha=np.float32(0.5), rslora=np.bool_(True), at=[np.str_("q")])
    assert json.loads(json.dumps(method.to_dict()))["alpha"] == 0.5
    assert method == dk.LoRA(r=4, alpha=0.5, rslora=True, at="q") or method.at == ("q",)
    assert repr(method).endswith(
        "r=4, alpha=0.5, rslora=True, dora=False, invocation=(), frozen_a=False, gate=False, start='kaiming', dropout=0.0, keep='exact', untie=False)"
    )


def test_methods_of_others_are_checked_by_their_own_annotations():
    @dataclass(frozen=True, kw_only=True)
    class Theirs(dk.Method, name="theirs"):
        kind = AffineDelta
        needed: int
        sizes: tuple[int, ...] = ()
        mode: Literal["a", "b"] = "a"
        later: "Undefined" = None

    @dataclass(frozen=True, kw_only=True)
    class Known(dk.Method, name="known"):
        kind = AffineDelta
        needed: int
        sizes: tuple[int, ...] = ()

    try:
        assert Theirs(needed="not checked, as an annotation cannot be looked up").mode == "a"
        assert Known(needed=3, sizes=[1, 2]).sizes == (1, 2)
        for call, message in (
            (lambda: Known(), "Known: needed= is missing; pass a whole number"),
            (
                lambda: Known(needed="3"),
                r"Known\(needed='3'\): expected a whole number, found the text '3'; write needed=3",
            ),
            (
                lambda: Known(needed=3, sizes=["a"]),
                r"Known\(sizes=...\): expected a list of whole numbers, found a list with the text 'a'",
            ),
            (lambda: Known(need=3), r"Known\(need=...\): no such option; the nearest to need are needed="),
        ):
            with pytest.raises(dk.OptionError, match=message):
                call()
    finally:
        del METHODS["theirs"], METHODS["known"]


def test_signatures_copies_and_pickles_are_as_without_checks():
    assert list(inspect.signature(dk.attach).parameters) == ["backbone", "methods", "name", "train", "freeze"]
    assert list(inspect.signature(dk.LoRA).parameters)[:4] == ["at", "of", "exclude", "r"]
    assert "dropout: float = 0.0" in pydoc.render_doc(dk.LoRA)
    assert inspect.getmodule(dk.attach).__name__ == "deltakit.delta.attaching"
    method = dk.LoRA(r=3, at=["q"])
    assert pickle.loads(pickle.dumps(method)) == copy.deepcopy(method) == replace(method) == method
    assert type(dk.Delta.active) is property
    assert "Can be set" in dk.Delta.active.__doc__


def test_a_class_is_checked_in_all_that_is_public():
    @checked
    class Thing:
        def __init__(self, size: int) -> None:
            self.size = size

        def grow(self, by: int) -> int:
            return self.size + by

        @classmethod
        def of(cls, size: int) -> Any:
            return cls(size)

        @staticmethod
        def double(size: int) -> int:
            return 2 * size

        def _own(self, by: int) -> int:
            return by

    assert Thing.of(3).grow(4) == 7
    assert Thing(3)._own("x") == "x"
    for call, where in (
        (lambda: Thing("x"), r"Thing\(size='x'\): "),
        (lambda: Thing(3).grow("x"), r"Thing\.grow\(by='x'\): "),
        (lambda: Thing.of("x"), r"Thing\.of\(size='x'\): "),
        (lambda: Thing.double("x"), r"double\(size='x'\): "),
        (lambda: Thing(3).grow(1, 2), r"Thing\.grow: it takes at most 1 values"),
    ):
        with pytest.raises(dk.OptionError, match=f"^{where}"):
            call()


def test_warnings_point_at_the_users_line(tmp_path):
    """In a process of its own: the suite wraps all functions once more."""
    (tmp_path / "user.py").write_text(
        "import torch, deltakit as dk\n"
        "model, other = torch.nn.Sequential(torch.nn.Linear(3, 5)), torch.nn.Sequential(torch.nn.Linear(3, 5))\n"
        "delta = dk.attach(model, dk.LoRA(r=2, at='0'))\n"
        "torch.nn.init.ones_(delta.modules['0'][0].B)\n"
        "delta.save('saved')\n"
        "dk.load('saved', other, check='warn')\n"
    )
    run = subprocess.run([sys.executable, "user.py"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "user.py:6: DeltaWarning: saved: this is not the backbone" in run.stderr
    assert "dk.load('saved', other, check='warn')" in run.stderr
