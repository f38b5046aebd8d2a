"""Deltas that are saved as adapters of PEFT: PEFT and transformers open them, with the outputs that the delta gave."""

import json
import re

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import nn

import deltakit as dk
from support.models import attached, randomize
from support.peft_models import MODELS, QUERIES, close, outputs, read_by_peft, saved, wide

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
    close(name, read_by_peft(name, tmp_path), expected)
    # And back.
    again = wide(name)
    dk.load(tmp_path, again)
    close(name, outputs(name, again), expected)


PROMPTS = {
    "bert": (dk.SoftPrompt(tokens=5, where="start"), "classifier"),
    "distilbert": (dk.SoftPrompt(tokens=5, where="start", trim=False), ["classifier", "pre_classifier"]),
    "gpt2": (dk.SoftPrompt(tokens=5), ()),
    "llama": (dk.PTuning(tokens=5, encoder=None), ()),
    "t5": (dk.SoftPrompt(tokens=5), ()),
    "prefix bert": (dk.Prefix(tokens=5, shift=True), "classifier"),
    "frozen head bert": (dk.SoftPrompt(tokens=5, where="start"), ()),
    "prefix frozen head bert": (dk.Prefix(tokens=5, shift=True), ()),
    "prefix gpt2": (dk.Prefix(tokens=5, shift=True), ()),
    "prefix llama": (dk.Prefix(tokens=5, shift=True), ()),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_peft_opens_prompts_and_prefixes(case, tmp_path):
    name, (method, train) = case.split()[-1], PROMPTS[case]
    model = wide(name)
    bare = outputs(name, model)
    delta = randomize(dk.attach(model, method, train=train), 0.3)
    for value in delta.parameters():
        # PEFT holds prompts in float32.
        value.data.copy_(value.data.float())
    expected = outputs(name, model)
    assert (bare - expected).abs().max() > 1e-4
    delta.save(tmp_path, format="peft")
    found = read_by_peft(name, tmp_path)
    # PEFT leaves the hidden states of a prompt in the output.
    close(name, found if found.ndim == 2 else found[:, -expected.shape[1] :], expected)
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
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_a_head_is_a_module_to_save(tmp_path):
    model = wide("bert")
    delta = randomize(dk.attach(model, dk.LoRA(r=2), train="@head"), 0.3)
    expected = outputs("bert", model)
    delta.save(tmp_path, format="peft")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["classifier"]
    close("bert", read_by_peft("bert", tmp_path), expected)


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
    close("bert", read_by_peft("bert", tmp_path / "ours"), outputs("bert", model))


PARAMETERS = {
    "experts": (dk.LoRA(r=3, alpha=5, at=["experts.gate_up_proj", "experts.down_proj"]),),
    "beside modules": (dk.LoRA(r=3, alpha=5, at=["q_proj", "experts.down_proj", "gate.weight"]),),
    "ranks": (dk.LoRA(r=2, at="q_proj", dropout=0.1), dk.LoRA(r=5, alpha=3, at="experts.down_proj")),
    "one layer": (dk.LoRA(r=2, at="layers.1.mlp.experts.gate_up_proj"),),
}  # fmt: skip


@pytest.mark.parametrize("case", PARAMETERS)
def test_parameters(case, tmp_path):
    model = wide("mixtral")
    bare = outputs("mixtral", model)
    delta = randomize(dk.attach(model, *PARAMETERS[case], train=()), 0.3)
    expected = outputs("mixtral", model)
    assert (bare - expected).abs().max() > 1e-3
    delta.save(tmp_path, format="peft")
    close("mixtral", read_by_peft("mixtral", tmp_path), expected)
    again = wide("mixtral")
    dk.load(tmp_path, again)
    close("mixtral", outputs("mixtral", again), expected)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "resnet"])
def test_biases_of_the_second_factor(name, tmp_path):
    """They are BitFit beside LoRA here."""
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=QUERIES[name], lora_bias=True)
    expected, model = saved(name, config, tmp_path / "theirs"), wide(name)
    delta = dk.load(tmp_path / "theirs", model)
    delta.save(tmp_path / "ours", format="peft")
    theirs, ours = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    close(name, read_by_peft(name, tmp_path / "ours"), expected)


def test_biases_on_some_targets(tmp_path):
    model = wide("gpt2")
    methods = dk.LoRA(r=2, at="c_attn"), dk.LoRA(r=3, at="c_fc"), dk.BitFit(at="c_attn[k]")
    randomize(dk.attach(model, *methods), 0.3).save(tmp_path, format="peft")
    close("gpt2", read_by_peft("gpt2", tmp_path), outputs("gpt2", model))


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
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    delta = randomize(dk.attach(model, dk.LoRA(r=3)), 0.3)
    delta.save(tmp_path / "adapter", format="peft")
    expected = outputs("llama", model)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded.load_adapter(str(tmp_path / "adapter"))
    torch.testing.assert_close(outputs("llama", loaded.eval()), expected, rtol=1e-5, atol=1e-6)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(outputs("llama", loaded.eval()), expected, rtol=1e-5, atol=1e-6)
    assert str(tmp_path) not in (tmp_path / "adapter" / "README.md").read_text()
    with pytest.raises(dk.CheckpointError, match=r"base: a model is here, .* save to another folder$"):
        delta.save(tmp_path / "base", format="peft")
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert not hasattr(loaded, "peft_config")


def by_the_rules_of_vllm(folder, model):
    """Adds an adapter to a model's weights as vLLM does: one rank, one scale, and no other keys than those of factors."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert not config.get("use_dora")
    assert not config["modules_to_save"]
    assert config["bias"] == "none"
    assert isinstance(config["target_modules"], list)
    assert {"rank_pattern", "alpha_pattern"}.isdisjoint(config)
    r = config["r"]
    scale = config["lora_alpha"] / (r**0.5 if config["use_rslora"] else r)
    tensors = load_file(folder / "adapter_model.safetensors")
    pairs = {}
    for key, tensor in tensors.items():
        path, factor = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key).groups()
        # The last part of each path must be a module that vLLM knows.
        assert path.rpartition(".")[2] in {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
        assert tensor.shape[factor == "B"] == r
        pairs.setdefault(path, {})[factor] = tensor
    with torch.no_grad():
        for path, pair in pairs.items():
            model.get_submodule(path).weight += scale * pair["B"] @ pair["A"]


SERVED = {
    "one rank": (dk.LoRA(r=3, alpha=5),),
    "rslora": (dk.LoRA(r=3, alpha=5, rslora=True),),
    "ranks and alphas": (dk.LoRA(r={"layers.0": 4, "*": 2}, alpha={"q_proj": 3, "*": 7}, at="@attn.{q,k,v,o}"),),
    "several": (dk.LoRA(r=2, at="mlp"), dk.LoRA(r=3, at="q_proj", rslora=True)),
}


@pytest.mark.parametrize("case", SERVED)
def test_it_keeps_the_rules_of_vllm(case, tmp_path):
    model = wide("llama")
    delta = randomize(dk.attach(model, *SERVED[case], train=()), 0.3)
    delta.save(tmp_path, format="peft")
    fresh = wide("llama")
    by_the_rules_of_vllm(tmp_path, fresh)
    close("llama", outputs("llama", fresh), outputs("llama", model))


REFUSED = {
    "another method": ("llama", (dk.Adapter(size=2),), (), "an adapter of PEFT is one of lora, ia3, .*soft_prompt, .*p_tuning_v2, and this delta is adapter"),
    "positions that stay": ("llama", (dk.Prefix(tokens=2),), (), r"the text start after a prefix, as with Prefix\(shift=True\)"),
    "a prefix in one layer": ("llama", (dk.Prefix(tokens=2, shift=True, at="layers.0"),), (), "into every layer, and it has 1 pairs for 2 layers"),
    "a prompt by its ids": ("llama", (dk.SoftPrompt(tokens=2, prepend=False),), (), "its prompt stands where the ids are"),
    "a prompt after the first token": ("bert", (dk.SoftPrompt(tokens=2),), (), "its prompt stands after the first token"),
    "a first token that is read": ("distilbert", (dk.SoftPrompt(tokens=2),), (), r"the classifier reads the first token, .* as with SoftPrompt\(trim=False\)"),
    "two prompts' methods": ("llama", (dk.SoftPrompt(tokens=2), dk.Prefix(tokens=2)), (), "this delta is prefix and soft_prompt"),
    "two methods": ("llama", (dk.LoRA(), dk.IA3(at="v_proj")), (), "this delta is ia3 and lora"),
    "a bias without a LoRA": ("llama", (dk.LoRA(), dk.BitFit(at="norm")), (), "it has a bias on model.norm, and PEFT has biases only beside a LoRA"),
    "a bias beside an embedding": ("llama", (dk.LoRA(at=["q_proj", "embed_tokens"]), dk.BitFit(at="q_proj")), (), "biases beside the LoRA of an embedding"),
    "a bias beside experts": ("mixtral", (dk.LoRA(r=2, at="@ff.down"), dk.BitFit(at="q_proj")), (), "it has biases beside LoRA on parameters"),
    "an alpha of 0": ("llama", (dk.LoRA(alpha=0), dk.BitFit(at="q_proj")), (), "PEFT multiplies the biases by the LoRA's alpha, which is 0"),
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
    close("bert", read_by_peft("bert", tmp_path), outputs("bert", model))
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


def test_the_card_counts_what_is_fully_trained(tmp_path):
    model = MODELS["bert"]()
    randomize(dk.attach(model, dk.LoRA(r=2), train="@head")).save(tmp_path)
    size = sum(p.numel() for p in model.classifier.parameters())
    (row,) = (line for line in (tmp_path / "README.md").read_text().splitlines() if line.startswith("| fully trained"))
    assert row.endswith(f" | {size:,} |")


def test_an_unknown_format(tmp_path):
    delta = attached(MODELS["llama"](), dk.LoRA(r=2))
    with pytest.raises(
        dk.OptionError, match=r"Delta.save\(format='gguf'\): expected 'deltakit', 'peft' or 'diffusers'"
    ):
        delta.save(tmp_path, format="gguf")


def test_it_can_be_pushed(hub, tmp_path):
    model = wide("llama")
    model.config._name_or_path = str(tmp_path)
    delta = randomize(dk.attach(model, dk.LoRA(r=2)))
    delta.push("me/adapter", token=hub.TOKEN, format="peft")
    files = hub.repos["me/adapter"].commits[-1][1]
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files.keys()
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] is None
    again = wide("llama")
    dk.load("me/adapter", again)
    close("llama", outputs("llama", again), outputs("llama", model))
