"""Every public function, method, setter and option with bad values: our own error and no change, or a meaning."""

import inspect
from collections import Counter

import pytest
import torch

import deltakit as dk
from deltakit.core.arguments import Door
from deltakit.picking import front_ends
from support.bad_arguments import BAD, CALLS, WEIGHT_METHODS, Scene, Trial, may_fit
from support.models import Transformer, randomize

SWITCH = {"True", "False", "numpy bool"}
COUNT = {"1", "numpy int"}
YES, NO, ONE = {"True", "numpy bool"}, {"False"}, {"1"}
NUMBER = {"0", "-1", "1", "1.5", "2**70", "numpy int"}
NOTHING = {"None"}
NO_SELECTORS = {"empty list", "empty tuple"}
WORD = {"no", "false", "16", "own text", "long text"}
TEXT = WORD | {"empty text", "zero byte", "control"}
MODEL = {"module"}
BOTTLENECKS = ("Adapter", "LowRankAdapter", "Compacter", "ParallelAdapter")
MAPS = ("OFT", "BOFT", "HRA", "RoAd", "ReFT", "FourierFT", "C3A", "SHiRA")
WEIGHING = ("AdapterFusion", "Average")
ON_MODULES = ("LoRA", "AdaLoRA", "BitFit", "IA3", "SAID", *BOTTLENECKS, *WEIGHT_METHODS, *MAPS, *WEIGHING)
PREFIXES, STARTED = ("Prefix", "PTuningV2"), ("SoftPrompt", "MultitaskPrompt")
PROMPTS = (*STARTED, "PTuning", "IntrinsicPrompt")
ON_PARTS = (*PREFIXES, *PROMPTS, "LNTuning", "TrainableTokens", "LST", "LlamaAdapter", "InvertibleAdapter")
ALL_METHODS = (*ON_MODULES, *ON_PARTS)

OPENDELTA = {
    "LoraModel": {"counts": ["lora_r"]},
    "AdapterModel": {"counts": ["bottleneck_dim"]},
    "BitFitModel": {"counts": []},
    "PrefixModel": {"counts": ["prefix_token_num", "embed_dim", "mid_dim"]},
    "SoftPromptModel": {"counts": ["soft_token_num"]},
    "CompacterModel": {"counts": ["reduction_factor", "phm_rank"]},
    "LowRankAdapterModel": {"counts": ["reduction_factor"]},
    "ParallelAdapterModel": {"counts": ["bottleneck_dim"]},
}
"""OpenDelta's classes, each with its options that are counts."""

ACCEPTED = {
    # Any word without dots and spaces is a name.
    **dict.fromkeys(["attach.name", "attach_from_data.name", "load.name", "combine.name"], NOTHING | WORD),
    **dict.fromkeys(["attach.freeze", "attach_from_data.freeze", "load.freeze", "load.attach", "Delta.active.value", "Delta.trainable.value"], SWITCH),
    # No selectors: nothing is fully trained, and nothing is excluded.
    **dict.fromkeys(["attach.train", "attach_from_data.train", "plan.train", "Delta.freeze.train"], NOTHING | NO_SELECTORS),
    **dict.fromkeys(["load.revision", "inspect.revision"], NOTHING),
    # Not needed for a folder.
    **dict.fromkeys(["load.subfolder", "inspect.subfolder"], NOTHING),
    **dict.fromkeys(["load.cache_dir", "inspect.cache_dir"], (NOTHING | TEXT | {"path"}) - {"empty text", "zero byte"}),
    **dict.fromkeys(["load.local_files_only", "inspect.local_files_only"], SWITCH),
    # Scripts pass their token for folders, too, where it is not needed.
    **dict.fromkeys(["load.token", "inspect.token"], NOTHING | TEXT | SWITCH),
    # A single layer is a model.
    **dict.fromkeys(["show.backbone", "roles.backbone", "deltas.backbone", "base_state_dict.backbone", "merged_state_dict.backbone", "targets.backbone", "account.backbone"], MODEL),
    # A state dict may be empty.
    **dict.fromkeys(["diff.a", "diff.b"], MODEL | {"empty dict"}),
    **dict.fromkeys(["plan.inputs", "show.inputs", "account.optimizer", "account.inputs", "show.filter"], NOTHING),
    **dict.fromkeys(["Delta.show.top", "Delta.show.width", "diff.width", "targets.width"], NOTHING | COUNT),
    "Visualization.plm": MODEL,
    **dict.fromkeys(["show.depth", "show.width", "View.width", "combine.rank"], NOTHING | COUNT),
    **dict.fromkeys(["show.fold", "show.all_modules", "show.buffers"], SWITCH),
    **dict.fromkeys(["show.ascii", "View.ascii"], NOTHING | SWITCH),
    # No columns: only the structure is printed.
    **dict.fromkeys(["show.columns", "View.columns", "Visualization.structure_graph.columns"], NO_SELECTORS),
    # The label of the first line is any text.
    "Visualization.structure_graph.rootname": TEXT,
    **{f"Visualization.structure_graph.{option}": SWITCH for option in ("expand_params", "keep_non_params", "common_structure", "only_common", "printTree", "print_tree")},
    "Visualization.structure_graph.mapping": NOTHING | {"empty dict", "dict of objects"},
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
    **dict.fromkeys(["Delta.save.folder"], (WORD | {"control", "path"}) - {"long text"}),
    "Delta.save.results": NOTHING | {"empty dict"},
    # A text for error messages.
    "Delta.load_state_dict.where": TEXT,
    "Delta.modules_of.method": NOTHING,
    # The optimiser's options; it checks them itself.
    "Delta.parameter_groups.by_tag": {"empty dict", "dict of objects"},
    **{f"{kind}.at": NOTHING for kind in ALL_METHODS},
    **{f"{kind}.of": NOTHING | {"module class"} for kind in ON_MODULES},
    **{f"{kind}.of": NOTHING for kind in ON_PARTS},
    # Their usual targets here are whole blocks of layers.
    **dict.fromkeys(["ParallelAdapter.of", "ReFT.of"], NOTHING),
    "TrainableTokens.ids": {"range"},
    "TrainableTokens.untie": SWITCH,
    **{f"{kind}.untie": SWITCH for kind in WEIGHT_METHODS},
    # Of the others the rank must be a multiple of k, which is 2.
    **{f"{kind}.r": COUNT for kind in WEIGHT_METHODS if kind != "GraLoRA"},
    **{f"{kind}.alpha": NUMBER - {"-1"} for kind in ("LoHa", "LoKr", "GraLoRA", "RandLoRA")},
    **{f"{kind}.dropout": {"0"} for kind in ("VeRA", "MiSS", "DeLoRA", "GraLoRA", "RandLoRA", "VBLoRA")},
    **{f"{kind}.seed": COUNT | {"0"} for kind in ("VeRA", "RandLoRA")},
    **dict.fromkeys(["VeRA.sizes", "RandLoRA.sizes", "LoKr.left"], NOTHING),
    "VeRA.start": NUMBER - {"0"},
    "DeLoRA.strength": NUMBER - {"0", "-1"},
    "LoKr.factor": COUNT | {"-1"},
    **dict.fromkeys(["LoHa.tucker", "LoKr.both", "LoKr.full", "LoKr.tucker", "MiSS.bat"], SWITCH),
    # It divides the number of features, 20.
    "MiSS.mini": NOTHING | ONE,
    **dict.fromkeys(["GraLoRA.k", "VBLoRA.length"], ONE),
    "GraLoRA.hybrid": COUNT | {"0"},
    "VBLoRA.vectors": {"numpy int"},
    "VBLoRA.top": COUNT,
    **{f"{kind}.exclude": NOTHING | NO_SELECTORS for kind in ALL_METHODS},
    "select.of": NOTHING | {"module class"},
    "select.exclude": NOTHING | NO_SELECTORS,
    **dict.fromkeys(["LoRA.r", "SoftPrompt.from_text.options", "SoftPrompt.from_delta.options", "PTuning.layers"], COUNT),
    # At alpha 0 the update is zero: sweeps begin there.
    "LoRA.alpha": NUMBER - {"-1"},
    "LoRA.dropout": {"0"},
    "LoRA.invocation": NO_SELECTORS | {"range"},
    **dict.fromkeys(["LoRA.rslora", "LoRA.dora", "LoRA.frozen_a", "LoRA.untie", "BOFT.untie", "FourierFT.untie", "SHiRA.untie"], SWITCH),
    **{f"{kind}.reparam": SWITCH for kind in PREFIXES},
    # The scene's backbone takes no positions, which it would shift.
    **{f"{kind}.shift": {"False"} for kind in PREFIXES},
    **{f"{kind}.{option}": COUNT for kind in PREFIXES for option in ("tokens", "hidden")},
    **{f"{kind}.{option}": {"0"} if option == "dropout" else NOTHING | COUNT for kind in PREFIXES for option in ("embed", "dropout")},
    **{f"{kind}.{option}": SWITCH for kind in PROMPTS for option in ("prepend", "trim")},
    **{f"{kind}.tokens": COUNT for kind in PROMPTS},
    **{f"{kind}.where": NOTHING for kind in PROMPTS},
    **{f"LlamaAdapter.{option}": COUNT for option in ("tokens", "layers")},
    **{f"LST.{option}": NOTHING | COUNT if option == "size" else COUNT for option in ("size", "reduction", "every")},
    # The backbone has more targets than a size of 1 or 3 has room for.
    "SAID.structured": SWITCH,
    "SAID.seed": COUNT | {"0"},
    "PTuning.encoder": NOTHING,
    "PTuning.hidden": NOTHING | COUNT,
    "PTuning.dropout": {"0"},
    "PTuning.anchors": NOTHING | {"empty dict", "dict of numbers"},
    **{f"{kind}.{option}": NOTHING | COUNT for kind in BOTTLENECKS for option in ("size", "reduction")},
    # The scene has 10 steps, and ranks from 3 to 2.
    **dict.fromkeys(["AdaLoRA.total_steps", "AdaLoRA.delta_t"], COUNT),
    **dict.fromkeys(["AdaLoRA.tinit", "AdaLoRA.tfinal"], COUNT | {"0"}),
    "AdaLoRA.init_r": {"numpy int"}, "AdaLoRA.target_r": COUNT, "AdaLoRA.dropout": {"0"}, "AdaLoRA.untie": SWITCH,
    **dict.fromkeys(["AdaLoRA.alpha", "AdaLoRA.orthogonality"], NUMBER - {"-1"}),
    "InvertibleAdapter.reduction": COUNT,
    **dict.fromkeys(["AdapterFusion.value", "Average.normalize"], SWITCH),
    "AdapterFusion.regularization": NUMBER - {"-1"},
    "AdapterFusion.dropout": {"0"},
    "Average.weights": NOTHING,
    "attach_from_data.rho": NUMBER - {"0", "-1"},
    "search.train": NOTHING | NO_SELECTORS,
    "search.steps": COUNT,
    "search.seed": COUNT | {"0"},
    **dict.fromkeys(["search.gate_lr", "search.beta", "search.max_norm"], NUMBER - {"0", "-1"}),
    # At the largest one the loss is no number.
    "search.lr": NUMBER - {"0", "-1", "2**70"},
    # A size is a multiple of the division, which divides the features (20 here). A rank is at most the size (1 here).
    "Compacter.size": NOTHING,
    **{option: {"1"} for option in ("Compacter.division", "LowRankAdapter.r")},
    "Compacter.r": COUNT,
    **dict.fromkeys(["Compacter.shared_rule", "Compacter.bias"], SWITCH),
    "ParallelAdapter.scaling": NUMBER,
    "ParallelAdapter.source": NOTHING,
    # A block has at least two features, and a series four terms.
    **dict.fromkeys(["OFT.block_size", "BOFT.block_size", "RoAd.group_size"], NOTHING),
    # They divide the 20 features.
    **dict.fromkeys(["OFT.blocks", "C3A.block_size"], NOTHING | ONE),
    "OFT.block_share": SWITCH,
    **{f"{kind}.gate": SWITCH for kind in (*BOTTLENECKS, *PREFIXES, "LoRA")},
    **dict.fromkeys(["FourierFT.n", "SHiRA.r"], NOTHING | COUNT),
    "FourierFT.scaling": NUMBER - {"0", "-1"},
    **dict.fromkeys(["FourierFT.seed", "SHiRA.seed"], COUNT | {"0"}),
    **dict.fromkeys(["ReFT.r", "ReFT.prefix_positions"], COUNT),
    "ReFT.suffix_positions": COUNT | {"0"},
    "ReFT.tied": SWITCH,
    # 2 to its power divides them.
    "BOFT.factors": ONE,
    **{f"{kind}.init_ids": NOTHING | {"range"} for kind in STARTED},
    # Any vectors of the right width, repeated to the length: this matrix has another one.
    **{f"{kind}.init_vectors": NOTHING for kind in STARTED},
    # Any text with a token.
    "SoftPrompt.from_text.text": (TEXT - {"empty text", "long text"}),
    "WeightMap.view": NOTHING,
    **{f"{kind}.init_range": NUMBER - {"0", "-1"} for kind in STARTED},
    # More than one task only without prepend=.
    "MultitaskPrompt.tasks": {"1"},
    "MultitaskPrompt.rank": COUNT,
    **{f"PromptDecoder.{option}": COUNT for option in ("tokens", "width", "size", "hidden")},
    **{f"PromptDecoder.fit.{option}": COUNT for option in ("size", "hidden", "steps")},
    "PromptDecoder.fit.lr": NUMBER - {"0", "-1"},
    # Any seed of torch's.
    "PromptDecoder.fit.seed": COUNT | {"0", "-1"},
    "IntrinsicPrompt.size": NOTHING | COUNT,
    # A seed is a count from 0; a decoder is what PromptDecoder.fit returns.
    "IntrinsicPrompt.seed": COUNT | {"0"},
    "IntrinsicPrompt.decoder": NOTHING,
    **dict.fromkeys([f"{kind}.{option}" for kind, options in OPENDELTA.items() for option in options["counts"]], COUNT),
    **dict.fromkeys(["CompacterModel.hypercomplex_division", "LowRankAdapterModel.low_rank_rank"], ONE),
    "LoraModel.lora_alpha": NUMBER - {"-1"},
    "LoraModel.lora_dropout": {"0"},
    "SoftPromptModel.init_range": NUMBER - {"0", "-1"},
    **dict.fromkeys(["PrefixModel.reparameterize", "SoftPromptModel.token_init", "CompacterModel.shared_phm_rule"], SWITCH),
    # As in OpenDelta, any text is a name; one that matches nothing is a warning. A parallel adapter has pairs of names.
    **{f"{kind}.{option}": NOTHING | TEXT | NO_SELECTORS for kind in OPENDELTA for option in ("modified_modules", "exclude_modules", "unfrozen_modules")},
    "ParallelAdapterModel.modified_modules": NOTHING | NO_SELECTORS | {"empty text"},
    "LoraModel.freeze_module.exclude": NOTHING | TEXT | NO_SELECTORS,
    "LoraModel.freeze_module.module": NOTHING | MODEL,
    "LoraModel.freeze_module.set_state_dict": SWITCH,
    "LoraModel.freeze_module.prefix": TEXT,
    **{f"{kind}.common_structure": NOTHING | SWITCH for kind in OPENDELTA},
    # With a port or True, a picker is shown in which the fixture cancels, which is an error.
    **{f"{kind}.interactive_modify": {"False", "0"} for kind in OPENDELTA},
    "pick.port": COUNT | {"0"},
    # Without effect, which is a warning.
    **dict.fromkeys(["CompacterModel.phm_c_init", "CompacterModel.hypercomplex_nonlinearity", "LowRankAdapterModel.low_rank_w_init"], TEXT),
    "CompacterModel.phm_init_range": NUMBER,
    **dict.fromkeys([f"CompacterModel.{option}" for option in ("learn_phm", "factorized_phm", "use_bias_up_sampler", "use_bias_down_sampler")], YES),
    **dict.fromkeys(["CompacterModel.shared_W_phm", "CompacterModel.factorized_phm_rule"], NO),
    "CompacterModel.kronecker_prod": NOTHING,
}  # fmt: skip
"""What each argument takes of the values, with the reason where it is not that the value is of its type and range."""

UNCHECKED = {
    # Called by deltakit itself, with its own types, for each target or in each forward; authors override them.
    **dict.fromkeys(["CallContext", "DeltaModule", "Target"], "for authors of methods"),
    "Method": "abstract; its options are those of LoRA",
    # Python's own containers and what only deltakit makes.
    "METHODS": "a dict",
    "PromptDecoder.forward": "torch's own way of calling a module",
    "Combination": "a named tuple",
    **dict.fromkeys(["SavedDelta", "SavedMethod"], "what inspect returns"),
    "Plan": "the result of plan",
    "Structure": "the result of search",
    "RoleTable": "the result of roles",
    "Selection": "the result of pick",
    **dict.fromkeys(["AutoDeltaConfig", "AutoDeltaModel"], "as loose as OpenDelta; they have no instances"),
}  # fmt: skip
OF_AUTHORS = (dk.Method, dk.DeltaModule)
AS_LOOSE = (dk.opendelta.DeltaBase, dk.AutoDeltaConfig, dk.AutoDeltaModel)
"""OpenDelta's classes: their methods take what OpenDelta's take, and warn of what has no effect (`tests/opendelta`)."""


@pytest.fixture
def saved(tmp_path, monkeypatch, unchecked):
    """A saved delta of the scene's bare backbone, and an empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(front_ends, "_usual", lambda: "browser")
    monkeypatch.setattr(front_ends, "_submitted", lambda place, picker, port: False)
    torch.manual_seed(0)
    return randomize(dk.attach(Transformer(blocks=1), dk.LoRA(r=2))).save(tmp_path / "saved")


def outcomes(name, saved, values):
    """Counts what comes of each value for each argument, and lists what the table says otherwise."""
    found, other, trial = Counter(), [], Trial(name, saved)
    for argument in trial.arguments():
        for value in values:
            message = trial.outcome(argument, BAD[value]())
            meant = value in ACCEPTED.get(f"{name}.{argument}", ())
            if (message is None) != meant and value not in may_fit(name, argument):
                other.append(f"{name}({argument}=): {value} gave {message}")
            found["accepted" if message is None else "our error"] += 1
    return found, other


@pytest.mark.parametrize("name", CALLS)
def test_some_bad_values(saved, name):
    """Every seventh value, others for each function."""
    first = list(CALLS).index(name) % 7
    found, other = outcomes(name, saved, list(BAD)[first::7])
    assert not other
    assert found.total() > 0


@pytest.mark.slow
def test_all_bad_values(saved, capsys, tmp_path, monkeypatch):
    found, others = Counter(), []
    for name in CALLS:
        # `save("no")` makes a folder that `load("no")` would find.
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        counted, other = outcomes(name, saved, BAD)
        found += counted
        others += other
    assert not others, "\n".join(others)
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
            for member in dict.fromkeys(own) if not issubclass(thing, OF_AUTHORS + AS_LOOSE) else ():
                known = inspect.getattr_static(thing, member)
                settable = isinstance(known, property) and known.fset is not None
                if not member.startswith("_") and (settable or inspect.isroutine(getattr(thing, member))):
                    yield f"{name}.{member}"
        elif inspect.isfunction(thing):
            yield name


def test_no_public_function_is_left_out():
    of_mappings = {f"RoleTable.{member}" for member in ("get", "keys", "values", "items")}
    asked = {*CALLS, *UNCHECKED, *of_mappings}
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
