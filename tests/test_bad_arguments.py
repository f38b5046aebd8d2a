"""Every public function, method, setter and option with bad values: our own error and no change, or a meaning."""

import inspect
from collections import Counter

import pytest
import torch

import deltakit as dk
from deltakit.core.arguments import Door
from support.bad_arguments import BAD, CALLS, Scene, arguments_of, outcome
from support.models import Transformer, randomize

SWITCH = {"True", "False", "numpy bool"}
COUNT = {"1", "numpy int"}
NUMBER = {"0", "-1", "1", "1.5", "2**70", "numpy int"}
NOTHING = {"None"}
NO_SELECTORS = {"empty list", "empty tuple"}
WORD = {"no", "false", "16", "own text", "long text"}
TEXT = WORD | {"empty text", "zero byte", "control"}
MODEL = {"module"}
BOTTLENECKS = ("Adapter", "LowRankAdapter", "Compacter", "ParallelAdapter")
ON_MODULES = ("LoRA", "BitFit", "IA3", *BOTTLENECKS)
ALL_METHODS = (*ON_MODULES, "Prefix", "SoftPrompt")

ACCEPTED = {
    # Any word without dots and spaces is a name.
    **dict.fromkeys(["attach.name", "load.name", "combine.name"], NOTHING | WORD),
    **dict.fromkeys(["attach.freeze", "load.freeze", "load.attach", "Delta.active.value", "Delta.trainable.value"], SWITCH),
    # No selectors: nothing is fully trained, and nothing is excluded.
    **dict.fromkeys(["attach.train", "plan.train", "Delta.freeze.train"], NOTHING | NO_SELECTORS),
    **dict.fromkeys(["load.revision", "inspect.revision"], NOTHING),
    # Not needed for a folder.
    **dict.fromkeys(["load.cache_dir", "inspect.cache_dir"], NOTHING | TEXT | {"path"}),
    **dict.fromkeys(["load.local_files_only", "inspect.local_files_only"], SWITCH),
    # Scripts pass their token for folders, too, where it is not needed.
    **dict.fromkeys(["load.token", "inspect.token", "AutoDeltaModel.from_finetuned.token"], NOTHING | TEXT | SWITCH),
    "AutoDeltaModel.from_finetuned.revision": NOTHING,
    # A single layer is a model.
    **dict.fromkeys(["show.backbone", "roles.backbone", "deltas.backbone", "base_state_dict.backbone"], MODEL),
    "Visualization.backbone": MODEL,
    **dict.fromkeys(["show.depth", "show.width", "View.width", "combine.rank"], NOTHING | COUNT),
    **dict.fromkeys(["show.fold", "show.all_modules", "Visualization.structure_graph.print_tree"], SWITCH),
    **dict.fromkeys(["show.ascii", "View.ascii"], NOTHING | SWITCH),
    # No columns: only the structure is printed.
    **dict.fromkeys(["show.columns", "View.columns", "Visualization.structure_graph.columns"], NO_SELECTORS),
    # The label of the first line is any text.
    "Visualization.structure_graph.rootname": TEXT,
    # All examples on the bare backbone.
    "rows.names": {"list of None"},
    # Documented as any finite number.
    **dict.fromkeys(["Delta.scale.value", "LowRank.scaling"], NUMBER),
    "LowRank.dropout": {"0"},
    # Not called where no weight is quantized. A class is a function, and so is a module.
    **dict.fromkeys(["Delta.merge.quantize", "Delta.merge_and_unload.quantize"], NOTHING | {"function", "class", "module class", "method class", "module"}),
    # No delta.
    "use.names": NOTHING,
    # Folders may be called so. A path with a zero byte or of 100,000 characters cannot be.
    **dict.fromkeys(["Delta.save.folder", "LoraModel.save_finetuned.finetuned_delta_path"], (WORD | {"control", "path"}) - {"long text"}),
    # A text for error messages.
    "Delta.load_state_dict.where": TEXT,
    "Delta.modules_of.method": NOTHING,
    # The optimiser's options; it checks them itself.
    "Delta.parameter_groups.by_tag": {"empty dict", "dict of objects"},
    **{f"{kind}.at": NOTHING for kind in ALL_METHODS},
    **{f"{kind}.of": NOTHING | {"module class"} for kind in ON_MODULES},
    **dict.fromkeys(["Prefix.of", "SoftPrompt.of"], NOTHING),
    **{f"{kind}.exclude": NOTHING | NO_SELECTORS for kind in ALL_METHODS},
    "select.of": NOTHING | {"module class"},
    "select.exclude": NOTHING | NO_SELECTORS,
    **dict.fromkeys(["LoRA.r", "Prefix.tokens", "Prefix.hidden", "SoftPrompt.tokens", "SoftPrompt.from_text.options"], COUNT),
    # At alpha 0 the update is zero: sweeps begin there.
    "LoRA.alpha": NUMBER - {"-1"},
    "LoRA.dropout": {"0"},
    **dict.fromkeys(["LoRA.rslora", "LoRA.untie", "Prefix.reparam", "SoftPrompt.prepend"], SWITCH),
    **{f"{kind}.{option}": NOTHING | COUNT for kind in BOTTLENECKS for option in ("size", "reduction")},
    # A size is a multiple of the division, which divides the features (20 here). A rank is at most the size (1 here).
    "Compacter.size": NOTHING,
    **{option: {"1"} for option in ("Compacter.division", "LowRankAdapter.r")},
    "Compacter.r": COUNT,
    **dict.fromkeys(["Compacter.shared_rule", "Compacter.bias"], SWITCH),
    "ParallelAdapter.scaling": NUMBER,
    "ParallelAdapter.source": NOTHING,
    "SoftPrompt.init_ids": NOTHING | {"range"},
    "SoftPrompt.where": NOTHING,
    # Any text with a token.
    "SoftPrompt.from_text.text": (TEXT - {"empty text", "long text"}),
    "WeightMap.view": NOTHING,
    **dict.fromkeys(["LoraModel.lora_r", "AdapterModel.bottleneck_dim", "PrefixModel.prefix_token_num"], COUNT),
    **dict.fromkeys(["PrefixModel.mid_dim", "SoftPromptModel.soft_token_num"], COUNT),
    "LoraModel.lora_alpha": NUMBER - {"-1"},
    "LoraModel.lora_dropout": {"0"},
    **dict.fromkeys(["PrefixModel.reparameterize", "SoftPromptModel.token_init"], SWITCH),
    **{f"{kind}.modified_modules": NOTHING for kind in ("LoraModel", "AdapterModel", "BitFitModel", "PrefixModel")},
    **{f"{kind}.exclude_modules": NOTHING | NO_SELECTORS for kind in ("LoraModel", "AdapterModel", "BitFitModel", "PrefixModel")},
    # As in OpenDelta, it freezes all but what is named.
    "LoraModel.freeze_module.exclude": NO_SELECTORS,
    # Checked when the delta is made from the config.
    "AutoDeltaConfig.options": {"empty dict", "dict of objects"},
}  # fmt: skip
"""What each argument takes of the values, with the reason where it is not that the value is of its type and range."""

UNCHECKED = {
    # Called by deltakit itself, with its own types, for each target or in each forward; authors override them.
    **dict.fromkeys(["CallContext", "DeltaModule", "Target"], "for authors of methods"),
    "Method": "abstract; its options are those of LoRA",
    # Python's own containers and what only deltakit makes.
    "METHODS": "a dict",
    "Combination": "a named tuple",
    **dict.fromkeys(["SavedDelta", "SavedMethod"], "what inspect returns"),
    "Plan": "the result of plan",
    "RoleTable": "the result of roles",
    "DeltaModel": "not in deltakit itself",
}  # fmt: skip
OF_AUTHORS = (dk.Method, dk.DeltaModule)


@pytest.fixture
def saved(tmp_path, monkeypatch, unchecked):
    """A saved delta of the scene's bare backbone, and an empty working directory."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    return randomize(dk.attach(Transformer(blocks=1), dk.LoRA(r=2))).save(tmp_path / "saved")


def outcomes(name, saved, values):
    """Counts what comes of each value for each argument, after checking that it is what the table says."""
    found = Counter()
    for argument in arguments_of(name, saved):
        for value in values:
            torch.manual_seed(0)
            message = outcome(name, argument, BAD[value](), saved)
            meant = value in ACCEPTED.get(f"{name}.{argument}", ())
            assert (message is None) == meant, f"{name}({argument}=): {value} gave {message}"
            found["accepted" if message is None else "our error"] += 1
    return found


@pytest.mark.parametrize("name", CALLS)
def test_some_bad_values(saved, name):
    """Every seventh value, others for each function."""
    first = list(CALLS).index(name) % 7
    assert outcomes(name, saved, list(BAD)[first::7]).total() > 0


@pytest.mark.slow
def test_all_bad_values(saved, capsys, tmp_path, monkeypatch):
    found = Counter()
    for name in CALLS:
        # `save("no")` makes a folder that `load("no")` would find.
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        found += outcomes(name, saved, BAD)
    with capsys.disabled():
        print(
            f"\n{found.total():,} calls of {len(CALLS)} functions with {len(BAD)} values: {dict(found)}, other errors: 0"
        )


def public_functions():
    for name in dk.__all__:
        thing = getattr(dk, name)
        if isinstance(thing, type) and not issubclass(thing, BaseException | Warning):
            yield name
            own = (member for kind in thing.__mro__ if kind.__module__.startswith("deltakit") for member in vars(kind))
            for member in dict.fromkeys(own) if not issubclass(thing, OF_AUTHORS) else ():
                known = inspect.getattr_static(thing, member)
                settable = isinstance(known, property) and known.fset is not None
                if not member.startswith("_") and (settable or inspect.isroutine(getattr(thing, member))):
                    yield f"{name}.{member}"
        elif inspect.isfunction(thing):
            yield name


def test_no_public_function_is_left_out():
    of_all_models = {f"{kind}.{verb}" for kind in ("AdapterModel", "BitFitModel", "PrefixModel", "SoftPromptModel") for verb in ("attach", "detach", "freeze_module", "log", "save_finetuned")}  # fmt: skip
    of_mappings = {f"RoleTable.{member}" for member in ("get", "keys", "values", "items")}
    asked = {*CALLS, *UNCHECKED, *of_all_models, *of_mappings}
    left_out = [name for name in public_functions() if name not in asked]
    assert not left_out


@pytest.mark.parametrize(
    "name", [name for name in CALLS if name not in ("Delta.attached", "Delta.activ", "RoleTable[]")]
)
def test_annotations_can_be_looked_up(saved, name):
    """Those that cannot would check nothing."""
    function = CALLS[name].function(Scene(saved))
    function = function.__init__ if isinstance(function, type) else function
    door = Door(function)
    hints = inspect.get_annotations(inspect.unwrap(function))
    assert set(door.readers) >= {p for p in door.signature.parameters if p in hints}


def test_all_checks_come_before_the_first_change(unchecked):
    model = Transformer(blocks=1)
    keys = list(model.state_dict())
    with pytest.raises(
        dk.OptionError,
        match=r"attach\(freeze=...\): expected True or False, found a tensor of shape \[2\]; omit freeze= for True",
    ):
        dk.attach(model, dk.LoRA(r=2), freeze=torch.zeros(2))
    assert list(model.state_dict()) == keys
    assert all(p.requires_grad for p in model.parameters())
    assert dk.deltas(model) == []
