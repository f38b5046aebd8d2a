"""Every public function, method, setter and option with values that do not belong there, and what comes of each.

A value that fits by chance is accepted; which ones those are, and why, is said for each argument in `test_bad_arguments.py`.
"""

import contextlib
import inspect
import json
import math
import warnings
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import nn

import deltakit as dk
from support.models import Transformer, beside, method_of, needed, randomize, same, snapshot

WEIGHT_METHODS = ("VeRA", "LoHa", "LoKr", "HiRA", "MiSS", "DeLoRA", "GraLoRA", "RandLoRA", "VBLoRA")


class Awkward:
    """Refuses to be looked at."""

    def __bool__(self):
        raise RuntimeError

    __eq__ = __len__ = __iter__ = __str__ = __repr__ = __fspath__ = __float__ = __index__ = __bool__
    __hash__ = object.__hash__


class Text(str):
    """A text of a class of its own."""


BAD = {
    "None": lambda: None,
    "empty text": lambda: "",
    "no": lambda: "no",
    "false": lambda: "false",
    "16": lambda: "16",
    "zero byte": lambda: "a\0b",
    "control": lambda: "\x1b[2J\n",
    "long text": lambda: "x" * 100_000,
    "own text": lambda: Text("no"),
    "bytes": lambda: b"x",
    "True": lambda: True,
    "False": lambda: False,
    "0": lambda: 0,
    "-1": lambda: -1,
    "1": lambda: 1,
    "1.5": lambda: 1.5,
    "2**70": lambda: 2**70,
    "2**5000": lambda: 2**5000,
    "nan": lambda: math.nan,
    "inf": lambda: math.inf,
    "complex": lambda: 1j,
    "empty list": list,
    "list of None": lambda: [None],
    "nested list": lambda: [[["q"]]],
    "empty dict": dict,
    "dict of objects": lambda: {"a": object()},
    "dict of numbers": lambda: {5: 5},
    "empty tuple": tuple,
    "set": lambda: {"q_proj"},
    "object": object,
    "awkward": Awkward,
    "function": lambda: lambda: None,
    "generator": lambda: (name for name in ["q_proj"]),
    "range": lambda: range(3),
    "class": lambda: int,
    "module class": lambda: nn.Linear,
    "method class": lambda: dk.LoRA,
    "module": lambda: nn.Linear(2, 3),
    "number tensor": lambda: torch.tensor(3.0),
    "matrix": lambda: torch.zeros(2, 3),
    "numpy int": lambda: np.int64(3),
    "numpy nan": lambda: np.float64("nan"),
    "numpy array": lambda: np.array([1, 2]),
    "numpy bool": lambda: np.bool_(True),
    "path": lambda: Path("nowhere"),
    "exception": lambda: ValueError("x"),
}
"""The values by name, each made anew for each call."""


class Tokenizer:
    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [len(word) for word in text.split()]}


class Scene:
    """A backbone with a delta, another delta that is not attached, a bare backbone, and a saved delta."""

    def __init__(self, saved):
        self.saved = saved
        self.bare, self.model = Transformer(blocks=1), Transformer(blocks=1)
        self.delta = dk.attach(self.model, dk.LoRA(r=2, at="q_proj"), name="d")
        self.other = dk.attach(self.model, dk.LoRA(r=2, at="q_proj"), name="e").detach()
        self.before = self.state()

    def state(self):
        delta = (self.delta, self.other)
        flags = [(d.name, d.attached, d.active, d.trainable, d.merged, d.scale, tuple(d.fully_trained)) for d in delta]
        return [snapshot(self.bare), snapshot(self.model)], flags

    def check_unchanged(self):
        (models, flags), (models_now, flags_now) = self.before, self.state()
        assert flags == flags_now
        for was, now in zip(models, models_now, strict=True):
            same(was, now)

    @property
    def target(self):
        from deltakit.selection import BackboneIndex

        return BackboneIndex(self.bare).target("layers.0.self_attn.q_proj")


class Call(NamedTuple):
    """A public function: how to get it, and arguments that it takes. `use` does with the result what users do next."""

    function: object
    arguments: object = lambda scene: {}
    use: object = lambda scene, result: None


def _used(scene, method):
    """A method is attached, its options are written as JSON, and its delta saved: only then an option has done anything."""
    dk.Method.from_dict(json.loads(json.dumps(method.to_dict(), allow_nan=False)))
    randomize(dk.attach(scene.bare, method)).save("used").stat()


def _entered(scene, context):
    with context:
        pass


def _consumed(scene, result):
    list(result)


def _set(name):
    return lambda scene: lambda value: setattr(scene.delta, name, value)


def _prompted(scene):
    return dk.attach(Transformer(blocks=1), dk.SoftPrompt(tokens=3))


def _option(kind):
    def ready(scene):
        # What it weighs is there before anything is compared.
        beside(scene.bare, method_of(kind.name))
        return kind

    return Call(ready, lambda s: needed(kind), _used)


def _opendelta(kind):
    return Call(lambda s: kind, lambda s: {"backbone_model": s.bare})


def _opendelta_method(name, arguments=lambda s: {}):
    return Call(lambda s: getattr(dk.LoraModel(s.bare, lora_r=2), name), arguments)


class _Trainer:
    """Has what the functions for a Trainer look for."""

    def _save(self):
        pass

    _load_from_checkpoint = _load_best_model = _push_from_checkpoint = _save

    def compute_loss(self):
        pass

    def add_callback(self, callback):
        pass


class _Accelerator:
    """Has what `small_states` looks for in an Accelerator."""

    def register_save_state_pre_hook(self, hook):
        pass

    register_load_state_pre_hook = register_save_state_pre_hook


CALLS = {
    "attach": Call(lambda s: dk.attach, lambda s: {"backbone": s.bare, "methods": dk.LoRA(r=2)}),
    "attach_from_data": Call(
        lambda s: dk.attach_from_data,
        lambda s: {
            "backbone": s.bare,
            "methods": dk.LoRA(r=2, at="q_proj"),
            "run": lambda: s.bare(torch.tensor([[3, 5, 7, 11]])),
        },
    ),
    "plan": Call(lambda s: dk.plan, lambda s: {"backbone": s.bare, "methods": dk.LoRA(r=2)}),
    "load": Call(lambda s: dk.load, lambda s: {"source": s.saved, "backbone": s.bare}),
    "inspect": Call(lambda s: dk.inspect, lambda s: {"source": s.saved}),
    "show": Call(lambda s: dk.show, lambda s: {"backbone": s.model}, lambda s, view: str(view)),
    "roles": Call(lambda s: dk.roles, lambda s: {"backbone": s.model}),
    # A port would be asked for, and a page would wait for a user.
    "pick": Call(lambda s: dk.pick, lambda s: {"backbone": s.bare}),
    "select": Call(lambda s: dk.select, lambda s: {"backbone": s.model, "at": "q_proj"}),
    "search": Call(
        lambda s: dk.search,
        lambda s: {
            "backbone": s.bare,
            "candidates": [dk.LoRA(r=1)],
            "budget": 40,
            "train_step": lambda part: s.bare(torch.tensor([[3, 5]])).square().mean(),
            "steps": 1,
        },
    ),
    "targets": Call(lambda s: dk.targets, lambda s: {"backbone": s.model}),
    "account": Call(lambda s: dk.account, lambda s: {"backbone": s.model}),
    "diff": Call(lambda s: dk.diff, lambda s: {"a": s.bare, "b": s.model}),
    "rows": Call(lambda s: dk.rows, lambda s: {"backbone": s.model, "names": ["d"]}, _entered),
    "combine": Call(lambda s: dk.combine, lambda s: {"backbone": s.model, "weights": {"d": 0.5}}),
    "deltas": Call(lambda s: dk.deltas, lambda s: {"backbone": s.model}),
    "use": Call(lambda s: dk.use, lambda s: {"backbone": s.model, "names": "d"}),
    "base_state_dict": Call(lambda s: dk.base_state_dict, lambda s: {"backbone": s.model}),
    "merged_state_dict": Call(lambda s: dk.merged_state_dict, lambda s: {"backbone": s.model}),
    "integrations.small_checkpoints": Call(
        lambda s: dk.integrations.small_checkpoints, lambda s: {"trainer": _Trainer()}
    ),
    "integrations.training_steps": Call(lambda s: dk.integrations.training_steps, lambda s: {"trainer": _Trainer()}),
    "integrations.small_states": Call(
        lambda s: dk.integrations.small_states, lambda s: {"accelerator": _Accelerator()}
    ),
    "Delta.active": Call(_set("active")),
    "Delta.scale": Call(_set("scale")),
    "Delta.trainable": Call(_set("trainable")),
    "Delta.attached": Call(_set("attached")),
    "Delta.activ": Call(_set("activ")),
    "Delta": Call(lambda s: dk.Delta, lambda s: {"attachment": s.delta._attachment}),
    "Delta.attach": Call(lambda s: s.other.attach),
    "Delta.detach": Call(lambda s: s.delta.detach),
    "Delta.detached": Call(lambda s: s.delta.detached, use=_entered),
    "Delta.freeze": Call(lambda s: s.delta.freeze),
    "Delta.merge": Call(lambda s: s.delta.merge),
    "Delta.merge_and_unload": Call(lambda s: s.delta.merge_and_unload),
    "Delta.unmerge": Call(lambda s: s.delta.unmerge),
    "Delta.swap": Call(lambda s: s.delta.swap, lambda s: {"other": s.other}),
    "Delta.save": Call(lambda s: s.delta.save, lambda s: {"folder": "new"}),
    "Delta.push": Call(lambda s: s.delta.push, lambda s: {"repo_id": "user/name"}),
    "Delta.state_dict": Call(lambda s: s.delta.state_dict),
    "Delta.load_state_dict": Call(lambda s: s.delta.load_state_dict, lambda s: {"state": s.delta.state_dict()}),
    "Plan.to_dict": Call(lambda s: dk.plan(s.bare, dk.LoRA(r=2)).to_dict),
    "Delta.show": Call(lambda s: s.delta.show),
    "Delta.penalty": Call(lambda s: s.delta.penalty),
    "Delta.step": Call(lambda s: s.delta.step),
    "Delta.modules_of": Call(lambda s: s.delta.modules_of, lambda s: {"method": "lora"}),
    "Delta.named_parameters": Call(lambda s: s.delta.named_parameters, use=_consumed),
    "Delta.parameters": Call(lambda s: s.delta.parameters, use=_consumed),
    "Delta.parameter_groups": Call(lambda s: s.delta.parameter_groups, lambda s: {"up": {"lr": 1e-3}}),
    "LoRA": _option(dk.LoRA),
    "AdaLoRA": Call(lambda s: dk.AdaLoRA, lambda s: {"total_steps": 10, "init_r": 3, "target_r": 2}, _used),
    "Adapter": _option(dk.Adapter),
    "AdapterFusion": _option(dk.AdapterFusion),
    "Average": _option(dk.Average),
    "LowRankAdapter": _option(dk.LowRankAdapter),
    "Compacter": _option(dk.Compacter),
    "ParallelAdapter": _option(dk.ParallelAdapter),
    "BitFit": _option(dk.BitFit),
    "IA3": _option(dk.IA3),
    "InvertibleAdapter": _option(dk.InvertibleAdapter),
    "OFT": _option(dk.OFT),
    "BOFT": _option(dk.BOFT),
    "HRA": _option(dk.HRA),
    "RoAd": _option(dk.RoAd),
    "FourierFT": _option(dk.FourierFT),
    "C3A": _option(dk.C3A),
    "SHiRA": _option(dk.SHiRA),
    "ReFT": _option(dk.ReFT),
    "LNTuning": _option(dk.LNTuning),
    "Prefix": _option(dk.Prefix),
    "SoftPrompt": _option(dk.SoftPrompt),
    "LlamaAdapter": _option(dk.LlamaAdapter),
    "LST": _option(dk.LST),
    "SAID": _option(dk.SAID),
    "PTuning": _option(dk.PTuning),
    "MultitaskPrompt": _option(dk.MultitaskPrompt),
    "IntrinsicPrompt": _option(dk.IntrinsicPrompt),
    "PromptDecoder": Call(lambda s: dk.PromptDecoder, lambda s: {"tokens": 3, "width": 5}),
    "PromptDecoder.fit": Call(
        lambda s: dk.PromptDecoder.fit, lambda s: {"prompts": [torch.zeros(2, 3), torch.ones(2, 3)], "steps": 1}
    ),
    "PTuningV2": _option(dk.PTuningV2),
    **{kind: _option(getattr(dk, kind)) for kind in ("TrainableTokens", *WEIGHT_METHODS)},
    "SoftPrompt.from_text": Call(
        lambda s: dk.SoftPrompt.from_text, lambda s: {"text": "a bc", "tokenizer": Tokenizer()}, _used
    ),
    "SoftPrompt.from_delta": Call(lambda s: dk.SoftPrompt.from_delta, lambda s: {"delta": _prompted(s)}, _used),
    "Method.from_dict": Call(lambda s: dk.Method.from_dict, lambda s: {"data": dk.LoRA(r=2).to_dict()}, _used),
    "RoleTable[]": Call(lambda s: lambda role: dk.roles(s.bare)[role], lambda s: {"role": "@attn.q"}),
    "View": Call(lambda s: dk.View, lambda s: {"node": dk.show(s.bare).node, "columns": ()}, lambda s, view: str(view)),
    "View.html": Call(lambda s: dk.show(s.bare).html),
    "View.svg": Call(lambda s: dk.show(s.bare).svg),
    "View.to_dict": Call(lambda s: dk.show(s.bare).to_dict),
    "View.json": Call(lambda s: dk.show(s.bare).json),
    "View.save": Call(lambda s: dk.show(s.bare).save, lambda s: {"path": "tree.html"}),
    "Visualization": Call(lambda s: dk.Visualization, lambda s: {"plm": s.bare}),
    "Visualization.structure_graph": Call(lambda s: dk.Visualization(s.bare).structure_graph),
    "OutputMap": Call(lambda s: dk.OutputMap, lambda s: {"target": s.target}),
    "InputMap": Call(lambda s: dk.InputMap, lambda s: {"target": s.target}),
    "WeightMap": Call(lambda s: dk.WeightMap, lambda s: {"target": s.target}),
    "LowRank": Call(lambda s: dk.LowRank, lambda s: {"target": s.target}),
    "Weighing": Call(lambda s: dk.Weighing, lambda s: {"target": s.target, "deltas": ("a", "b")}),
    "LoraModel": _opendelta(dk.LoraModel),
    "AdapterModel": _opendelta(dk.AdapterModel),
    "BitFitModel": _opendelta(dk.BitFitModel),
    "PrefixModel": _opendelta(dk.PrefixModel),
    # The scene's vocabulary is smaller than OpenDelta's default.
    "SoftPromptModel": Call(lambda s: dk.SoftPromptModel, lambda s: {"backbone_model": s.bare, "soft_token_num": 3}),
    "CompacterModel": _opendelta(dk.CompacterModel),
    "LowRankAdapterModel": _opendelta(dk.LowRankAdapterModel),
    "ParallelAdapterModel": _opendelta(dk.ParallelAdapterModel),
    "LoraModel.freeze_module": _opendelta_method("freeze_module"),
}
"""Every public function by name."""

NEW = [kind.__name__ for kind in dk.METHODS.values() if hasattr(dk, kind.__name__) and kind.__name__ not in CALLS]
"""The methods without a line above: what their options accept is seen by their types alone (`may_fit`)."""

CALLS |= {name: _option(getattr(dk, name)) for name in NEW}

_OF_TYPE = {
    bool: {"True", "False", "numpy bool"},
    int: {"0", "-1", "1", "2**70", "numpy int"},
    float: {"0", "-1", "1", "1.5", "2**70", "numpy int"},
    str: {"empty text", "no", "false", "16", "zero byte", "control", "long text", "own text"},
    tuple: {"empty list", "empty tuple", "range"},
    dict: {"empty dict"},
    type(None): {"None"},
}
_OF_ALL = {"at": {"None"}, "of": {"None", "module class"}, "exclude": {"None", "empty list", "empty tuple"}}


def may_fit(name, argument):
    """The values of an option's types, which its range may or may not include, for methods without a line of their own."""
    if name not in NEW or argument in _OF_ALL:
        return _OF_ALL.get(argument, ()) if name in NEW else ()
    hint = get_type_hints(getattr(dk, name)).get(argument)
    return {value for kind in _types(hint) for value in _OF_TYPE.get(kind, ())}


def _types(hint):
    """The types in an annotation; a `Literal` has texts of its own, of which none is bad."""
    inside = () if get_origin(hint) is Literal else get_args(hint)
    return {get_origin(hint) or hint}.union(*(_types(part) for part in inside))


TOO_MANY, UNKNOWN = "one more", "unknown option"


class Trial:
    """Calls one function with bad values."""

    def __init__(self, name, saved):
        self.name, self.saved = name, saved
        self._set_up()
        signature = inspect.signature(self.function)
        self.parameters = signature.parameters
        self.several = next((p.name for p in self.parameters.values() if p.kind is p.VAR_POSITIONAL), None)

    def _set_up(self):
        # As `saved` does: its backbone is the one that the delta was trained on.
        torch.manual_seed(0)
        self.scene = Scene(self.saved)
        self.function = CALLS[self.name].function(self.scene)
        self.scene.before = self.scene.state()

    def arguments(self):
        """The names of the function's arguments, and what every function has: one argument too many, and an unknown option."""
        last = self.name.partition(".")[2]
        setter = last in ("active", "scale", "trainable", "attached", "activ") or self.name == "RoleTable[]"
        return [*self.parameters, *([] if setter else [UNKNOWN]), *([] if setter or self.several else [TOO_MANY])]

    def outcome(self, argument, value):
        """What comes of one bad value: None if it is accepted, or the message. Other errors than ours are raised."""
        extra, given = self._given(argument, value)
        with warnings.catch_warnings(), contextlib.redirect_stdout(None):
            warnings.simplefilter("ignore")
            try:
                result = self.function(*extra, **given)
                CALLS[self.name].use(self.scene, result)
            except dk.DeltaError as error:
                message = str(error)
            else:
                message = None
        if message is None or self.name.startswith(("LoraModel.", "AutoDelta")):
            self._set_up()
        else:
            # So the next call may have the same scene: making one takes ten times as long as this.
            self.scene.check_unchanged()
        return message

    def _given(self, argument, value):
        given, extra = dict(CALLS[self.name].arguments(self.scene)), []
        if argument == TOO_MANY:
            by_place = [p for p in self.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
            extra = [given.pop(p.name, p.default) for p in by_place] + [value]
        elif argument == UNKNOWN:
            given["typo"] = value
        elif argument in self.parameters and self.parameters[argument].kind is inspect.Parameter.VAR_KEYWORD:
            given["up" if self.name == "Delta.parameter_groups" else "tokens"] = value
        else:
            given[argument] = value
        if self.several in given and "backbone" in given:
            extra = [given.pop("backbone"), given.pop(self.several)]
        return extra, given
