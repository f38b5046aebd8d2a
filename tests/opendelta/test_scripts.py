"""The forty commonest patterns of scripts written for OpenDelta, as in public code."""

import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import deltakit as dk
from deltakit.opendelta.delta_models.layers.init import glorot_normal, glorot_uniform
from deltakit.opendelta.utils.utils import regex_match, substring_in
from support.models import randomize
from support.opendelta_models import MODELS

# `m` is BERT with a new classifier if the script does not make another model.
PATTERNS = {
    "1": "from opendelta import LoraModel",
    "2": "from opendelta import AdapterModel",
    "3": "from opendelta import AutoDeltaConfig, AutoDeltaModel",
    "4": "from opendelta.auto_delta import AutoDeltaModel",
    "5": "from opendelta import Visualization; Visualization(m).structure_graph()",
    "6": "from opendelta import AdapterModel, BitFitModel, CompacterModel, LoraModel, LowRankAdapterModel, PrefixModel",
    "7": "from opendelta.delta_models.lora import LoraConfig as DeltaLoraConfig",
    "8": "from opendelta.delta_models import BitFitModel, LoraConfig, LoraModel",
    "9": "import opendelta as od; od.AdapterModel(m); od.Visualization(m).structure_graph()",
    "10": "from opendelta.utils.inspect import inspect_module_statistics as stat\nassert stat(m)['trainable_ratio'] == 1.0",
    "11": "from opendelta.basemodel import DeltaBase, is_leaf_module, non_module_param\nassert not is_leaf_module(m)",
    "12": "from opendelta.utils.decorate import decorate\n"
    "def caller(func, *args, **kw): return func(*args, **kw) + 1\n"
    "assert decorate(lambda a, b=2: a * b, caller)(3) == 7",
    "13": 'delta = LoraModel(backbone_model=m, modified_modules=["attention.self.key"])',
    "14": 'm = MODELS["opt"](); LoraModel(backbone_model=m, modified_modules=["q_proj", "v_proj"])',
    "15": 'm = Projections(); LoraModel(backbone_model=m, modified_modules=["project_q", "project_v"])',
    "16": 'm = MODELS["bart"](); LoraModel(backbone_model=m, modified_modules=["fc2"])',
    "17": "LoraModel(m)",
    "18": "AdapterModel(m); AdapterModel(MODELS['t5'](), bottleneck_dim=12)",
    "19": r'AdapterModel(m, modified_modules=["attention", r"[r](\d)+\.output"])',
    "20": 'BitFitModel(m); BitFitModel(MODELS["bert"](), modified_modules=["encoder"])',
    "21": "PrefixModel(backbone_model=m)",
    "22": "SoftPromptModel(m, soft_token_num=7, token_init=True)",
    "23": "CompacterModel(m)",
    "24": "LowRankAdapterModel(m)",
    "25": r'ParallelAdapterModel(m, modified_modules=["attention", "attention", "intermediate.dense", r"[r]\d+\.output\.dense"])',
    "26": 'LoraModel.from_config(LoraConfig(4, 8, 0.1, modified_modules=["query"]), m)',
    "27": 'c = LoraConfig.from_dict({"lora_r": 3}, lora_r=5); assert c.lora_r == 5; LoraModel.from_config(c, m)',
    "28": 'c = AutoDeltaConfig.from_dict(vars(Namespace(delta_type="adapter", bottleneck_dim=5, seed=42, output_dir="x")))\n'
    "d = AutoDeltaModel.from_config(c, backbone_model=m); assert type(d) is AdapterModel",
    "29": 'kwargs = {"lora_r": 4}; LoraModel(m.base_model, **kwargs); m(torch.tensor([[3, 4]]))',
    "30": 'LoraModel(m, backend="hf")',
    "31": 'LoraModel(m).freeze_module(exclude=["deltas"], set_state_dict=True)',
    "32": 'LoraModel(m).freeze_module(exclude=["deltas", "classifier"])',
    "33": 'LoraModel(m).freeze_module(exclude=["deltas", "layernorm_embedding"])',
    "34": "LoraModel(m).freeze_module(set_state_dict=True); LoraModel(m).freeze_module(set_state_dict=False)",
    "35": 'd = AdapterModel(m); d.freeze_module(m, exclude=["adapter", "classifier"])',
    "36": "d = LoraModel(m); d.log(); d.log(delta_ratio=True, trainable_ratio=True, visualization=False)",
    "37": 'd = LoraModel(m); d.save_finetuned("out"); d.save_finetuned("again", push_to_dc=True, center_args={"name": "x"})',
    "38": 'LoraModel(m).save_finetuned("out"); k = copy(m); AutoDeltaModel.from_finetuned("out", backbone_model=k)\n'
    'AutoDeltaModel.from_finetuned("out", copy(m), check_hash=False, cache_dir=None, local_files_only=True)',
    "39": 'LoraModel(m).freeze_module(); torch.save(m.state_dict(), "f.pt"); n = copy(m); LoraModel(n)\n'
    'n.load_state_dict(torch.load("f.pt"), strict=False)',
    "40": 'd = LoraModel(m); d.detach(); d.attach(); d.to("cpu"); d.to(torch.float64); d.to(torch.float32)',
}
WARNS = {
    "28": "AdapterConfig.from_dict: output_dir, seed are no options of this delta type",
    "31": "classifier: new in this BertForSequenceClassification and frozen",
    "33": "'layernorm_embedding' matched nothing and has no effect",
    "37": "save_finetuned: no effect of push_to_dc, center_args: the delta is saved to again alone",
}
"""What a pattern warns of. OpenDelta says nothing of the second to fourth."""

PREAMBLE = """
from argparse import Namespace
import torch
from opendelta import *
from opendelta import AdapterModel, AutoDeltaConfig, AutoDeltaModel, BitFitModel, CompacterModel, LoraModel
from opendelta import LowRankAdapterModel, ParallelAdapterModel, PrefixModel, SoftPromptModel
from opendelta.delta_models.lora import LoraConfig
"""


class Projections(torch.nn.Module):
    """CPM's names."""

    def __init__(self):
        super().__init__()
        self.project_q, self.project_v = torch.nn.Linear(11, 13), torch.nn.Linear(11, 13)


@pytest.fixture
def opendelta(monkeypatch):
    """`import opendelta` is deltakit's, until the test ends."""
    for name in list(sys.modules):
        if name.partition(".")[0] == "opendelta":
            monkeypatch.delitem(sys.modules, name)
    before = set(sys.modules)
    dk.opendelta.install()
    yield
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == "opendelta":
            del sys.modules[name]


def fresh(model):
    """The same model without deltas."""
    other = MODELS["bert"]()
    other.load_state_dict(dk.base_state_dict(model), strict=True)
    return other


@pytest.mark.parametrize("number", PATTERNS)
def test_a_pattern_runs(number, opendelta, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"m": MODELS["bert"](), "MODELS": MODELS, "Projections": Projections, "copy": fresh}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        exec(PREAMBLE + PATTERNS[number], names)
    messages = [str(one.message) for one in told]
    assert number not in WARNS or any(WARNS[number] in message for message in messages), messages
    if (
        isinstance(names["m"], torch.nn.Module)
        and not isinstance(names["m"], Projections)
        and "bart" not in PATTERNS[number]
    ):
        assert names["m"].eval()(torch.tensor([[3, 4, 5]])).logits.isfinite().all()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("SoftPromptModel(m, interactive_modify=True)", "so there are no modules to pick; omit interactive_modify="),
        ('LoraModel(m, backend="bmt")', "backend='bmt'): only backend='hf' is served; models of BMTrain are not"),
        ('AdapterModel(m, non_linearity="sigmoid")', "activation='sigmoid'): expected one of gelu"),
        ("AutoDeltaModel()", "AutoDeltaModel has no instances: call AutoDeltaModel.from_config or from_finetuned"),
        ('AutoDeltaConfig.from_dict({"lora_r": 3})', "unknown delta_type None; use one of lora, adapter"),
        ('AutoDeltaModel.from_config({"delta_type": "lora"}, m)', "expected a config, found a dict; make one with"),
        ('LoraModel.from_config(AutoDeltaConfig.from_dict({"delta_type": "adapter"}), m)', "expected a LoraConfig"),
        ('LoraModel.from_finetuned("out")', "backbone_model= is missing; pass a folder, and the backbone"),
        ('AutoDeltaModel.from_finetuned("out")', "AutoDeltaModel.from_finetuned: backbone_model= is missing"),
        ("LoraModel(m)(1)", "LoraModel has no forward of its own; call the backbone"),
        (
            'LoraModel(m).save_finetuned("x", push_to_hub=True)',
            "expected a repository, such as push_to_hub='user/name'",
        ),
        ("SoftPromptModel(m, other_expand_ids={})", "is served: the mask and the token types grow with the prompt"),
        (
            "from opendelta import set_axis_order; set_axis_order(); set_axis_order([1, 0, 2])",
            "only [0, 1, 2] is served",
        ),
        (
            "SoftPromptModel(m, 101)",
            "the first 101 tokens of the vocabulary, and this backbone has 100; pass soft_token_num=100 or less, or token_init",
        ),
        ("LoraModel(m).insert_sequential_module(m)", "modules of one's own are not inserted by deltakit.opendelta"),
        ("CompacterModel(m, learn_phm=False)", "CompacterModel(learn_phm=False): only True is served; omit it"),
        ("CompacterModel(m, use_bias_up_sampler=False)", "use_bias_up_sampler and use_bias_down_sampler differ"),
        (
            'from opendelta.utils.delta_center import download; download("x")',
            "x: DeltaCenter is not served; pass a folder",
        ),
        ("LoraModel(m, 8, 16, 0, None, None, None, None, False, 'hf', 1)", "LoraModel: it takes at most 10 values"),
    ],
)
def test_what_is_not_served_says_so(script, message, opendelta):
    with pytest.raises(dk.DeltaError, match=re.escape(message)):
        exec(PREAMBLE + script, {"m": MODELS["bert"]()})


def test_a_prompt_as_long_as_the_vocabulary_or_longer_with_random_start_values():
    assert dk.SoftPromptModel(MODELS["bert"](), 100).delta.num_parameters == 100 * 64
    assert dk.SoftPromptModel(MODELS["bert"](), 101, token_init=False).delta.num_parameters == 101 * 64


@pytest.mark.parametrize("kind", ["LoraModel", "AutoDeltaModel"])
def test_another_backbone_is_a_warning_as_in_opendelta_and_nothing_with_check_hash_false(kind, tmp_path):
    torch.manual_seed(1)
    delta = dk.LoraModel(MODELS["bert"]())
    randomize(delta.delta)
    delta.save_finetuned(tmp_path)
    other = MODELS["bert"]()
    with pytest.warns(dk.DeltaWarning, match="not the backbone the delta was trained on"):
        loaded = getattr(dk, kind).from_finetuned(tmp_path, backbone_model=other)
    torch.testing.assert_close(loaded.delta.state_dict(), delta.delta.state_dict())
    loaded.detach()
    # A warning is an error here.
    getattr(dk, kind).from_finetuned(tmp_path, backbone_model=other, check_hash=False)


def test_glorot_start_values_have_the_variance_of_opendelta_and_names_are_tested():
    for fill in (glorot_uniform, glorot_normal):
        matrix = torch.empty(211, 307)
        assert fill(matrix) is matrix
        assert abs(matrix.var().item() / (4 / (211 + 307)) - 1) < 0.03
    assert substring_in("layer.query", ["x", "query"])
    assert not substring_in("query", ["layer.query"])
    assert regex_match("layer.1", [r"x", r"layer\.\d"])
    assert not regex_match("layer.12", [r"layer\.\d"])


def test_another_type_than_the_class(tmp_path):
    model = MODELS["bert"]()
    with pytest.warns(dk.DeltaWarning, match="as it was attached"):
        dk.LoraModel(model).save_finetuned(tmp_path)
    message = "expected the delta_type 'adapter' for AdapterModel, found lora; use AutoDeltaModel.from_finetuned"
    with pytest.raises(dk.CheckpointError, match=message):
        dk.AdapterModel.from_finetuned(tmp_path, model)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ('d.save_finetuned("out", save_config=False)', "no effect of save_config=False"),
        (
            "d.freeze_module(); d.detach(reset_state_dict=False); assert d.delta.state_dict()",
            "no effect of reset_state_dict=False",
        ),
        (
            'd.save_finetuned("out"); AutoDeltaModel.from_finetuned("out", n, x=1)',
            "AutoDeltaModel.from_finetuned: no effect of x",
        ),
    ],
)
def test_an_option_without_effect_is_a_warning(script, message, opendelta, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = MODELS["bert"]()
        exec(PREAMBLE + script, {"d": dk.LoraModel(model), "n": fresh(model)})
    assert any(message in str(one.message) for one in told)


def test_the_advice_for_a_checkpoint_with_a_trained_head_works(tmp_path):
    delta = dk.LoraModel(MODELS["bert"]())
    delta.freeze_module(exclude=["deltas", "classifier"])
    with torch.no_grad():
        delta.backbone_model.classifier.bias.fill_(0.5)
    delta.save_checkpoint(tmp_path / "delta.bin")
    other = dk.LoraModel(MODELS["bert"]())
    with pytest.raises(dk.CheckpointError) as error:
        other.load_checkpoint(tmp_path / "delta.bin")
    call = re.search(r"call (freeze_module\(.*\)) before load_checkpoint$", str(error.value))
    eval(f"other.{call[1]}", {"other": other})
    other.load_checkpoint(tmp_path / "delta.bin")
    assert other.backbone_model.classifier.bias.eq(0.5).all()


def test_every_module_has_its_name():
    """In a process of its own, where nothing has imported OpenDelta's names before."""
    code = """
import deltakit.opendelta
deltakit.opendelta.install()
import opendelta, opendelta.utils.inspect
assert opendelta.__version__ == "0.3.0"
from opendelta.delta_models.layers.init import glorot_normal, glorot_uniform
from opendelta.utils.utils import *
assert endswith_in and regex_match and substring_in and superstring_in
from opendelta import logging, DeltaBase, BaseDeltaConfig, SaveLoadMixin, CommonStructureMap
from opendelta.basemodel import DeltaBase
from opendelta.delta_configs import BaseDeltaConfig
from opendelta.delta_models.adapter import AdapterConfig, AdapterLayer, AdapterModel
from opendelta.delta_models.bitfit import BiasLayer, BitFitConfig, BitFitModel
from opendelta.delta_models.compacter import CompacterConfig, HyperComplexAdapterLayer
from opendelta.delta_models.layers.activations import Activations
from opendelta.delta_models.layers.hypercomplex_linear import PHMLinear
from opendelta.delta_models.layers.low_rank_linear import LowRankLinear
from opendelta.delta_models.lora import LoraConfig, LoraModel, LowRankLinear
from opendelta.delta_models.low_rank_adapter import LowRankAdapter, LowRankAdapterConfig
from opendelta.delta_models.parallel_adapter import ParallelAdapterConfig, ParallelAdapterLayer
from opendelta.delta_models.prefix import PrefixConfig, PrefixLayer, ReparameterizeFunction
from opendelta.delta_models.soft_prompt import SoftPromptConfig, SoftPromptLayer
from opendelta.utils.cuda import get_device, get_dtype
from opendelta.utils.delta_hub import create_hub_repo_name
from opendelta.utils.logging import get_logger
from opendelta.utils.model_md5 import gen_model_hash
from opendelta.utils.name_based_addressing import endswith_in, is_child_key
from opendelta.utils.saving_loading_utils import SaveLoadMixin
from opendelta.utils.signature import get_arg_names, get_arg_names_inside_func
from opendelta.utils.structure_mapping import CommonStructureMap, transform
from opendelta.utils.visualization import Visualization
assert opendelta.LoraModel is LoraModel is deltakit.LoraModel
print("all there")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout == "all there\n", run.stderr[-2000:]


def test_install_after_opendelta_itself(monkeypatch):
    monkeypatch.setitem(sys.modules, "opendelta", sys)
    with pytest.raises(dk.StateError, match=r"call deltakit\.opendelta\.install\(\) before `import opendelta`"):
        dk.opendelta.install()


def test_configs(tmp_path):
    config = dk.opendelta.delta_models.LoraConfig(4, 8, 0.1, modified_modules=["query"])
    assert (config.lora_r, config.lora_alpha, config.lora_dropout) == (4, 8, 0.1)
    config.save_finetuned(tmp_path)
    again = dk.opendelta.delta_models.LoraConfig.from_finetuned(tmp_path, lora_r=5)
    assert (again.lora_r, again.modified_modules, type(again)) == (5, ["query"], type(config))
    again.update({"lora_r": 4})
    assert again.to_dict() | {"unfrozen_modules": None} == config.to_dict() | {"unfrozen_modules": None}
    assert type(dk.AutoDeltaConfig.from_finetuned(tmp_path)) is type(config)
    with pytest.raises(dk.CheckpointError, match=r"no config of OpenDelta could be read"):
        dk.AutoDeltaConfig.from_finetuned(tmp_path / "nowhere")


@pytest.mark.parametrize("delta_type", list(dk.opendelta.auto_delta.MODELS))
def test_options_come_back_from_files(delta_type, tmp_path):
    model = MODELS["bert"]()
    options = {
        "lora": {"lora_r": 3, "lora_alpha": 5.0},
        "adapter": {"bottleneck_dim": 5, "non_linearity": "GELU_orig"},
        "parallel_adapter": {"bottleneck_dim": 5, "non_linearity": "leakyrelu"},
        "low_rank_adapter": {"reduction_factor": 16, "low_rank_rank": 2},
        "compacter": {"reduction_factor": 8, "hypercomplex_division": 2},
        "prefix": {"prefix_token_num": 3, "mid_dim": 7, "embed_dim": 5},
        "soft_prompt": {"soft_token_num": 5, "token_init": False, "init_range": 0.1},
    }.get(delta_type, {})
    delta = dk.AutoDeltaModel.from_config(dk.AutoDeltaConfig.from_dict({"delta_type": delta_type, **options}), model)
    for parameter in delta.parameters():
        torch.nn.init.normal_(parameter)
    logits = model.eval()(torch.tensor([[3, 4, 5]])).logits
    folder = delta.save_finetuned(tmp_path)
    assert isinstance(folder, Path)
    delta.detach()
    loaded = dk.AutoDeltaModel.from_finetuned(tmp_path, model)
    torch.testing.assert_close(model(torch.tensor([[3, 4, 5]])).logits, logits)
    expected = {name: value.lower() if isinstance(value, str) else value for name, value in options.items()}
    assert {name: getattr(loaded, name) for name in options} == expected
    assert type(loaded) is type(delta)
    assert type(loaded.config).from_finetuned(tmp_path).to_dict()["delta_type"] == delta_type
    loaded.save_checkpoint(tmp_path / "tensors.pt")
    loaded.load_checkpoint(tmp_path / "tensors.pt")


def test_the_delta_model_is_a_module_of_its_delta():
    model = MODELS["bert"]()
    delta = dk.LoraModel(model)
    assert isinstance(delta, torch.nn.Module)
    assert sum(p.numel() for p in delta.parameters()) == 4096 == delta.num_total_parameters()
    assert next(iter(delta.state_dict())) == "delta_modules.0.A"
    assert delta.num_trainable_parameters(model) == 79938 + 4096
    assert len(list(delta.frozen_parameters_names())) == 0
    assert delta.find_key("bert.encoder.layer.0.attention.self.query", ["attn@.q@"])
    parent, name, child = delta.find_module(model, "bert.pooler.dense")
    assert getattr(parent, name) is child
    delta.merge()
    assert delta.delta.merged
    delta.unmerge()


def test_a_soft_prompt_stands_in_front_and_stays_in_the_result():
    model = MODELS["bert"]().bert.eval()
    ids = torch.tensor([[3, 4, 5]])
    delta = dk.SoftPromptModel(model, soft_token_num=7)
    embedding = model.embeddings.word_embeddings.weight
    assert torch.equal(next(delta.parameters()), embedding[:7])
    # It starts from the first tokens, so it does what these do.
    with_prompt = model(ids).last_hidden_state
    assert with_prompt.shape == (1, 10, 64)
    delta.detach()
    torch.testing.assert_close(model(torch.cat([torch.arange(7)[None], ids], 1)).last_hidden_state, with_prompt)


def test_statistics(capsys):
    model = MODELS["bert"]()
    delta = dk.LoraModel(model)
    with pytest.warns(dk.DeltaWarning, match="classifier"):
        delta.freeze_module()
    delta.log(visualization=False)
    assert (delta.stat["trainable_parameters"], delta.stat["delta_parameters"]) == (4096, 4096)
    assert delta.stat["total_parameters"] == 79938 + 4096
    assert "Trainable Ratio: 4096/84034=4.874218%\n" in capsys.readouterr().err
    from deltakit.opendelta.utils.inspect import inspect_optimizer_statistics

    optimizer = torch.optim.SGD(delta.parameters(), lr=0.1)
    assert inspect_optimizer_statistics(optimizer)["trainable_ratio"] == "100.000000%"
