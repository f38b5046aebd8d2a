"""Deltas that are saved as adapters of PEFT: PEFT and transformers open them, with the outputs that the delta gave."""

import json

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import nn

import deltakit as dk
from support.models import attached, randomize
from support.peft_models import MODELS, close, opened, outputs, saved, wide

peft = pytest.importorskip("peft")

DELTAS = {
    "bert": (dk.LoRA(r=3, alpha=5),),
    "gpt2": (dk.LoRA(r=3, alpha=5),),
    "llama": (dk.LoRA(r=3, alpha=5, rslora=True),),
    "t5": (dk.LoRA(r=3, alpha=5),),
    "mixtral": (dk.LoRA(r=3, alpha=5),),
    "resnet": (dk.LoRA(r=3, alpha=5),),
    "ia3 bert": (dk.IA3(),),
    "ia3 gpt2": (dk.IA3(at=["mlp.c_proj", "attn.c_attn"]),),
    "ia3 llama": (dk.IA3(),),
    "ia3 t5": (dk.IA3(),),
    "ia3 resnet": (dk.IA3(at="**", of=nn.Conv2d),),
    "slices gpt2": (dk.LoRA(r=2, at="c_attn[q]"), dk.LoRA(r=3, at="c_attn[v]", alpha=7)),
    "ranks llama": (dk.LoRA(r=2, at="q_proj"), dk.LoRA(r=5, alpha=3, at="v_proj"), dk.LoRA(r=1, at="embed_tokens")),
    "weights llama": (dk.LoRA(r=2, at="q_proj.weight"),),
    "head gpt2": (dk.LoRA(r=2, at=["lm_head", "c_attn"], untie=True),),
}


@pytest.mark.parametrize("case", DELTAS)
def test_peft_opens_it(case, tmp_path):
    name, model = case.split()[-1], wide(case.split()[-1])
    bare = outputs(name, model)
    delta = randomize(dk.attach(model, *DELTAS[case], train=()), 0.3)
    expected = outputs(name, model)
    assert (bare - expected).abs().max() > 1e-5
    assert delta.save(tmp_path, format="peft") == tmp_path
    close(name, opened(name, tmp_path), expected)
    # And back.
    again = wide(name)
    dk.load(tmp_path, again)
    close(name, outputs(name, again), expected)


def test_one_rank_and_one_scale_are_written_as_they_are(tmp_path):
    delta = randomize(dk.attach(wide("llama"), dk.LoRA(r=3, alpha=5, dropout=0.1)))
    delta.save(tmp_path, format="peft")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {key: config[key] for key in ("r", "lora_alpha", "use_rslora", "lora_dropout", "task_type")} == {
        "r": 3,
        "lora_alpha": 5,
        "use_rslora": False,
        "lora_dropout": 0.1,
        "task_type": "CAUSAL_LM",
    }
    tensors, own = load_file(tmp_path / "adapter_model.safetensors"), delta.state_dict()
    for factor in "AB":
        found = tensors[f"base_model.model.model.layers.1.self_attn.v_proj.lora_{factor}.weight"]
        assert torch.equal(found, own[f"model.layers.1.self_attn.v_proj.lora.{factor}"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_head_is_a_module_to_save(tmp_path):
    model = wide("bert")
    delta = randomize(dk.attach(model, dk.LoRA(r=2), train="@head"), 0.3)
    expected = outputs("bert", model)
    delta.save(tmp_path, format="peft")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["classifier"]
    close("bert", opened("bert", tmp_path), expected)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases(bias, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["query"], bias=bias, modules_to_save=["classifier"])
    saved("bert", config, tmp_path / "theirs")
    model = wide("bert")
    delta = dk.load(tmp_path / "theirs", model)
    randomize(delta, 0.3)
    delta.save(tmp_path / "ours", format="peft")
    found = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert (found["bias"], found["modules_to_save"]) == (bias, ["classifier"])
    close("bert", opened("bert", tmp_path / "ours"), outputs("bert", model))


def test_names_that_are_ends_of_others(tmp_path):
    """PEFT takes a name for the end of a path."""

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = nn.Linear(5, 5)
            self.inner = nn.ModuleDict({"q": nn.Linear(5, 5)})

        def forward(self, x):
            return self.inner["q"](torch.tanh(self.q(x)))

    torch.manual_seed(0)
    model, x = Outer().double(), torch.randn(2, 5, dtype=torch.float64)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    randomize(dk.attach(model, dk.LoRA(r=2, at="^q"))).save(tmp_path, format="peft")
    fresh = Outer().double()
    fresh.load_state_dict(state)
    adapted = peft.PeftModel.from_pretrained(fresh, tmp_path)
    torch.testing.assert_close(adapted(x), model(x))
    assert not hasattr(fresh.inner["q"], "lora_A")


def test_transformers_opens_it(tmp_path):
    """`from_pretrained` with the adapter's folder alone, and `load_adapter`."""
    model = MODELS["llama"]()
    model.save_pretrained(tmp_path / "base")
    randomize(dk.attach(model, dk.LoRA(r=3)), 0.3).save(tmp_path / "adapter", format="peft")
    expected = outputs("llama", model)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded.load_adapter(str(tmp_path / "adapter"))
    torch.testing.assert_close(outputs("llama", loaded.eval()), expected, rtol=1e-5, atol=1e-6)
    file = tmp_path / "adapter" / "adapter_config.json"
    assert json.loads(file.read_text())["base_model_name_or_path"] is None
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": str(tmp_path / "base")}))
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(outputs("llama", loaded.eval()), expected, rtol=1e-5, atol=1e-6)


REFUSED = {
    "another method": ("llama", (dk.Prefix(tokens=2),), (), "an adapter of PEFT is LoRA or IA3, and this delta is prefix"),
    "two methods": ("llama", (dk.LoRA(), dk.BitFit(at="norm")), (), "this delta is bitfit and lora"),
    "experts": ("mixtral", (dk.LoRA(r=2, at="@ff.down"),), (), "experts.down_proj is a parameter, and deltakit writes LoRA of modules"),
    "a tied weight": ("gpt2", (dk.LoRA(r=2, at="wte.weight"),), (), "transformer.wte.weight and lm_head.weight are one weight here"),
    "a layer that PEFT does not know": ("llama", (dk.IA3(at="embed_tokens", side="output"),), (), "embed_tokens is a Embedding, for which PEFT has no ia3"),
    "a target in full": ("bert", (dk.LoRA(r=2, at="classifier"),), "classifier", "it trains classifier in full beside its lora"),
    "a slice": ("gpt2", (dk.IA3(at="c_attn[k]"),), (), r"c_attn\[k\] is a part of a module, and IA3"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_cannot_express(case, tmp_path):
    name, methods, train, message = REFUSED[case]
    delta = randomize(dk.attach(MODELS[name](), *methods, train=train))
    with pytest.raises(dk.CheckpointError, match=f"delta 'delta' cannot be saved as an adapter of PEFT: .*{message}"):
        delta.save(tmp_path / "adapter", format="peft")
    assert not (tmp_path / "adapter").exists()


def test_small_and_large_layers_are_read_again(tmp_path):
    """All are padded to the largest rank, which is above the size of the classifier."""
    model = wide("bert")
    methods = dk.LoRA(r=8, at="query"), dk.LoRA(r=2, at="classifier")
    randomize(dk.attach(model, *methods, train=()), 0.3).save(tmp_path, format="peft")
    close("bert", opened("bert", tmp_path), outputs("bert", model))
    again = wide("bert")
    delta = dk.load(tmp_path, again)
    close("bert", outputs("bert", again), outputs("bert", model))
    assert {len(module.A) for modules in delta.modules.values() for module in modules} == {8, 2}


@pytest.mark.filterwarnings("ignore:pre_classifier")
def test_an_accidental_module(tmp_path):
    """PEFT takes a name in `modules_to_save` for the end of a path, also within a word."""
    delta = randomize(dk.attach(wide("distilbert"), dk.LoRA(r=2), train="^classifier"))
    with pytest.raises(
        dk.CheckpointError, match="it trains classifier, and PEFT would also take pre_classifier; train both"
    ):
        delta.save(tmp_path / "adapter", format="peft")


def test_moved_statistics_have_no_place(tmp_path):
    model = MODELS["resnet"]().train()
    delta = randomize(dk.attach(model, dk.LoRA(r=2), train=()))
    outputs("resnet", model).sum().backward()
    with pytest.raises(
        dk.CheckpointError, match=r"running statistics moved, such as .*, and PEFT has no place for them"
    ):
        delta.save(tmp_path / "adapter", format="peft")


def test_an_unknown_format(tmp_path):
    delta = attached(MODELS["llama"](), dk.LoRA(r=2))
    with pytest.raises(dk.OptionError, match=r"Delta.save\(format='gguf'\): expected 'deltakit' or 'peft'"):
        delta.save(tmp_path, format="gguf")


def test_it_can_be_pushed(hub, tmp_path):
    model = wide("llama")
    delta = randomize(dk.attach(model, dk.LoRA(r=2)))
    delta.push("me/adapter", token=hub.TOKEN, format="peft")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= hub.repos["me/adapter"].commits[-1][1].keys()
    again = wide("llama")
    dk.load("me/adapter", again)
    close("llama", outputs("llama", again), outputs("llama", model))
