"""Adapters that PEFT saved give PEFT's own outputs, train on, and come off exactly; others are refused by name."""

import json
import re

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import deltakit as dk
from support.models import same, snapshot
from support.peft_models import (
    MODELS,
    OTHER_STACKS,
    QUERIES,
    adapted,
    close,
    opened,
    outputs,
    read_by_peft,
    saved,
    wide,
)

peft = pytest.importorskip("peft")

IA3 = {
    "bert": (["key", "value", "output.dense"], ["output.dense"]),
    "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    "llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "t5": (["k", "v", "wo"], ["wo"]),
    "mixtral": (["k_proj", "v_proj"], []),
    "resnet": (["convolution", "0.shortcut.convolution"], ["0.shortcut.convolution"]),
}


def loads_as(name, expected, folder):
    model = wide(name)
    before, bare = snapshot(model), outputs(name, model)
    assert (bare - expected).abs().max() > 1e-5
    delta = dk.load(folder, model)
    close(name, outputs(name, model), expected)
    assert any(parameter.requires_grad for parameter in delta.parameters())
    delta.detach()
    same(before, snapshot(model))
    return delta


@pytest.mark.parametrize("name", QUERIES)
def test_lora(name, tmp_path):
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=QUERIES[name])
    delta = loads_as(name, saved(name, config, tmp_path), tmp_path)
    assert [(method.r, method.alpha) for method in delta.methods] == [(3, 5)]


def test_from_the_hub(hub, tmp_path):
    expected = saved("llama", peft.LoraConfig(r=3, target_modules=["q_proj"]), tmp_path)
    hub.add_repo("me/theirs", {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()})
    model = wide("llama")
    dk.load("me/theirs", model)
    close("llama", outputs("llama", model), expected)


@pytest.mark.parametrize("name", IA3)
def test_ia3(name, tmp_path):
    targets, inputs = IA3[name]
    config = peft.IA3Config(target_modules=targets, feedforward_modules=inputs)
    loads_as(name, saved(name, config, tmp_path), tmp_path)


LLAMA = {
    "all linear layers": {"target_modules": "all-linear"},
    "a regular expression": {"target_modules": r".*\.1\.mlp\.(up|down)_proj"},
    "ranks and alphas": {
        "target_modules": ["q_proj", "v_proj", "o_proj"],
        "rank_pattern": {"layers.0.self_attn.q_proj": 2, "v_proj": 1},
        "alpha_pattern": {"v_proj": 7, r"^model\.layers\.1\..*o_proj": 3},
    },
    "rslora": {"target_modules": ["q_proj"], "use_rslora": True},
    "some layers": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "biases": {"target_modules": ["q_proj"], "bias": "lora_only"},
    "all biases": {"target_modules": ["q_proj"], "bias": "all"},
    "a module in full": {"target_modules": ["q_proj"], "modules_to_save": ["norm", "lm_head"]},
    "embeddings": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "dropout": {"target_modules": ["q_proj", "embed_tokens"], "lora_dropout": 0.3},
    "gaussian": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("case", LLAMA)
@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "pickle"])
def test_forms_of_lora(case, pickled, tmp_path):
    config = peft.LoraConfig(r=4, lora_alpha=6, **LLAMA[case])
    loads_as("llama", saved("llama", config, tmp_path, safe_serialization=not pickled), tmp_path)


def test_a_head_and_the_biases_of_a_classifier(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["query"], bias="all", task_type="SEQ_CLS")
    delta = loads_as("bert", saved("bert", config, tmp_path), tmp_path)
    assert "classifier.weight" in delta.fully_trained
    assert "bert.encoder.layer.0.attention.self.key.bias" in delta.fully_trained


def test_a_module_alone_whose_weight_is_tied(tmp_path):
    """PEFT adapts the head and leaves the embedding, although they are one weight."""
    config = peft.LoraConfig(r=2, target_modules=["lm_head", "c_attn"])
    delta = loads_as("gpt2", saved("gpt2", config, tmp_path), tmp_path)
    assert {method.untie for method in delta.methods} == {False, True}


def test_it_trains_on_and_is_saved_as_a_delta(tmp_path):
    expected = saved("llama", peft.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1), tmp_path / "theirs")
    model = wide("llama")
    delta = dk.load(tmp_path / "theirs", model, name="theirs")
    assert delta.name == "theirs"
    assert delta.methods[0].dropout == 0.1
    optimizer = torch.optim.SGD(delta.parameters(), lr=0.1)
    outputs("llama", model).square().mean().backward()
    optimizer.step()
    trained = outputs("llama", model)
    assert not torch.equal(trained, expected)
    delta.save(tmp_path / "ours")
    delta.detach()
    dk.load(tmp_path / "ours", model)
    assert torch.equal(outputs("llama", model), trained)


def adapter(folder, **config):
    """The files of a LoRA on a Llama, with changes to its config."""
    saved("llama", peft.LoraConfig(r=2, target_modules=["q_proj"]), folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


def with_tensors(folder, change):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


Q = "base_model.model.model.layers.0.self_attn.q_proj"
REFUSED = {
    "another kind": (lambda f: adapter(f, peft_type="XLORA"), "this is PEFT's XLORA, which deltakit does not read; use it in PEFT"),
    "no kind": (lambda f: adapter(f, peft_type=None), r"its adapter_config.json has no peft_type, so it is not an adapter of PEFT; pass"),
    "QALoRA": (lambda f: adapter(f, use_qalora=True), r"has QALoRA \(use_qalora\), which deltakit does not have; merge it"),
    "DoRA without magnitudes": (lambda f: adapter(f, use_dora=True), "use_dora=True does not fit its tensors: .* has none"),
    "PiSSA": (lambda f: adapter(f, init_lora_weights="pissa_niter_4"), r"changing the backbone's weights \(init_lora_weights='pissa_niter_4'\)"),
    "a wrong type": (lambda f: adapter(f, lora_alpha="much"), r"adapter_config.json is damaged at lora_alpha: expected `float`, got `str`"),
    "a hostile alpha": (lambda f: adapter(f, lora_alpha=1e300), r"LoRA\(alpha=1e\+300\): expected a finite number"),
    "a bad pattern": (lambda f: adapter(f, alpha_pattern={"(": 3.0}), r"adapter_config.json/alpha_pattern: a pattern is no regular expression \(missing \)"),
    "a pattern without an end": (lambda f: adapter(f, alpha_pattern={"((.|.)*)*[A-Z]": 3.0}), r"alpha_pattern: a pattern takes too long"),
    "no tensors": (lambda f: (adapter(f) / "adapter_model.safetensors").unlink(), "neither adapter_model.safetensors nor adapter_model.bin; save or"),
    "damaged": (lambda f: (adapter(f) / "adapter_model.safetensors").write_bytes(b"x"), "is damaged or cut off"),
    "empty": (lambda f: with_tensors(adapter(f), dict.clear), "it has no tensor of a LORA adapter"),
    "factors of one number": (lambda f: with_tensors(adapter(f), lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(3)})), r"q_proj has no two factors of LoRA"),
    "a long pattern": (lambda f: adapter(f, alpha_pattern={"a" * 2000: 3.0}), r"alpha_pattern: a pattern is longer or repeats more than paths need"),
    "a hungry pattern": (lambda f: adapter(f, alpha_pattern={"(a{60000}){60000}": 3.0}), r"a pattern is longer or repeats more"),
    "a recursive pattern": (lambda f: adapter(f, alpha_pattern={"(?R)": 3.0}), r"a pattern is no regular expression \(unknown extension"),
    "one factor": (lambda f: with_tensors(adapter(f), lambda t: t.pop(f"{Q}.lora_A.weight")), r"layers.0.self_attn.q_proj has no two factors of LoRA"),
    "unknown tensor": (lambda f: with_tensors(adapter(f), lambda t: t.update({f"{Q}.lora_other_vector": torch.ones(32)})), "q_proj.lora_other_vector is in no module"),
    "another module": (lambda f: with_tensors(adapter(f), lambda t: t.update({k.replace("layers.0", "layers.9"): t.pop(k) for k in list(t)})), r"1 of its 2 targets are not in this backbone, such as model.layers.9"),
    "another shape": (lambda f: with_tensors(adapter(f), lambda t: t.update({f"{Q}.lora_B.weight": torch.ones(31, 2)})), r"the file has \(31, 2\), the backbone needs \(32, 2\)"),
    "not finite": (lambda f: with_tensors(adapter(f), lambda t: t[f"{Q}.lora_B.weight"].fill_(torch.nan)), "has values that are infinite or not a number"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*its config names modules of this backbone that it has no tensors for")
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case, tmp_path):
    make, message = REFUSED[case]
    make(tmp_path)
    model = MODELS["llama"]()
    before = snapshot(model)
    with pytest.raises(dk.CheckpointError, match=message):
        dk.load(tmp_path, model)
    same(before, snapshot(model))


@pytest.mark.parametrize(
    ("lost", "named"),
    [
        ("v_proj", "model.layers.0.self_attn.v_proj, model.layers.1.self_attn.v_proj"),
        ("layers.1", "model.layers.1.self"),
    ],
)
def test_modules_without_tensors_are_named(lost, named, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    saved("llama", config, tmp_path)
    with_tensors(tmp_path, lambda t: [t.pop(key) for key in list(t) if lost in key])
    with pytest.warns(dk.DeltaWarning, match=rf"that it has no tensors for: {named}.*; they stay as they are; save or"):
        dk.load(tmp_path, wide("llama"))


def test_a_head_without_tensors_is_named(tmp_path):
    saved("bert", peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"), tmp_path)
    with_tensors(tmp_path, lambda t: [t.pop(key) for key in list(t) if "classifier" in key])
    with pytest.warns(dk.DeltaWarning, match="that it has no tensors for: classifier; they stay"):
        dk.load(tmp_path, wide("bert"))


def test_options_of_later_releases_are_named(tmp_path):
    adapter(tmp_path, new_option_of_peft_9=True, other_option_of_peft_9=False)
    with pytest.warns(
        dk.DeltaWarning, match="options that deltakit does not know: new_option_of_peft_9; if they change"
    ):
        dk.load(tmp_path, MODELS["llama"]())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_embeddings_beside_the_adapter_are_the_backbone_s_in_any_dtype(dtype, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"])
    adapted(MODELS["llama"](), config, tmp_path, save_embedding_layers=True)
    assert not dk.load(tmp_path, MODELS["llama"]().to(dtype)).fully_trained


def test_a_value_that_the_backbone_s_dtype_cannot_hold(tmp_path):
    adapter(tmp_path)
    with_tensors(tmp_path, lambda t: t[f"{Q}.lora_B.weight"].fill_(70_000.0))
    with pytest.raises(dk.CheckpointError, match=r"q_proj.lora.B has values that torch.float16 cannot hold"):
        dk.load(tmp_path, MODELS["llama"]().half())


def test_an_adapter_without_its_config(tmp_path):
    adapter(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    for name in ("adapter_model.safetensors", "lone.safetensors"):
        file = (tmp_path / "adapter_model.safetensors").rename(tmp_path / name)
        with pytest.raises(dk.CheckpointError, match=rf"{name}: .*adapter of PEFT without its adapter_config.json"):
            dk.load(file, MODELS["llama"]())


def test_a_lora_without_values(tmp_path):
    adapter(tmp_path)
    with_tensors(
        tmp_path, lambda t: t.update({key: value[:0] if "lora_A" in key else value[:, :0] for key, value in t.items()})
    )
    with pytest.raises(dk.CheckpointError, match="has no values; save or download it again"):
        dk.load(tmp_path, MODELS["llama"]())


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save({"a": re.compile("x")}, tmp_path / "adapter_model.bin")
    with pytest.raises(
        dk.CheckpointError, match=r"adapter_model.bin is damaged, or holds more than tensors: UnpicklingError"
    ):
        dk.load(tmp_path, MODELS["llama"]())
    torch.save({"a": 3}, tmp_path / "adapter_model.bin")
    with pytest.raises(dk.CheckpointError, match=r"adapter_model.bin holds more than tensors; save it again"):
        dk.load(tmp_path, MODELS["llama"]())


def test_a_module_in_full_that_is_tied_here(tmp_path):
    saved("gpt2", peft.LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=["lm_head"]), tmp_path)
    with pytest.raises(dk.CheckpointError, match=r"lm_head.weight trained in full, .* tied to transformer.wte.weight"):
        dk.load(tmp_path, MODELS["gpt2"]())


def test_several_adapters_in_one_folder(tmp_path):
    adapter(tmp_path / "poems")
    adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(dk.CheckpointError, match=r"pass one of its folders poems$"):
        dk.load(tmp_path, MODELS["llama"]())


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("head_config.json", "this is a prediction head of AdapterHub, which"),
        ("model.safetensors", "this is a whole model, which"),
        ("notes.txt", r"there is no delta here: expected delta_model.safetensors, .* found notes.txt; pass the folder"),
    ],
)
def test_folders_of_others(file, message, tmp_path):
    (tmp_path / file).write_text("")
    with pytest.raises(dk.CheckpointError, match=message):
        dk.load(tmp_path, MODELS["llama"]())


def test_both_ends_of_a_tied_weight_in_full(tmp_path):
    """PEFT trains two copies."""
    saved("gpt2", peft.LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=["wte", "lm_head"]), tmp_path)
    with pytest.raises(dk.CheckpointError, match=r"trained in full, .* tied to .*; untie the two first"):
        dk.load(tmp_path, MODELS["gpt2"]())


def test_a_rank_above_the_size_of_the_layer(tmp_path):
    config = peft.LoraConfig(r=9, lora_alpha=5, target_modules=["classifier", "query"])
    delta = loads_as("bert", saved("bert", config, tmp_path), tmp_path)
    assert {len(module.A) for module in delta.modules["classifier"]} == {2}


def test_biases_inside_a_module_in_full(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["query"], bias="all", modules_to_save=["classifier", "pooler"])
    loads_as("bert", saved("bert", config, tmp_path), tmp_path)


def test_a_narrower_adapter_leaves_the_embedding_as_it_is(tmp_path):
    """PEFT saves the embedding beside its LoRA, in the adapter's dtype."""
    saved("llama", peft.LoraConfig(r=2, target_modules=["embed_tokens"]), tmp_path)
    with_tensors(tmp_path, lambda t: t.update({key: value.bfloat16() for key, value in t.items()}))
    assert dk.load(tmp_path, wide("llama")).fully_trained == []


PARAMETERS = {
    "both": {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    "one beside a module": {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]},
    "alphas": {
        "target_modules": ["q_proj"],
        "target_parameters": ["experts.down_proj", "experts.gate_up_proj"],
        "alpha_pattern": {"experts.down_proj": 3},
    },
    "a plain weight": {"target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight"]},
}


@pytest.mark.parametrize("case", PARAMETERS)
def test_parameters_of_experts(case, tmp_path):
    config = peft.LoraConfig(r=3, lora_alpha=5, **PARAMETERS[case])
    expected = saved("mixtral", config, tmp_path)
    loads_as("mixtral", expected, tmp_path)
    if OTHER_STACKS:
        return
    # And back.
    dk.load(tmp_path, wide("mixtral")).save(tmp_path / "ours", format="peft")
    close("mixtral", read_by_peft("mixtral", tmp_path / "ours"), expected)


def test_experts_that_are_stored_transposed(tmp_path):
    def model():
        torch.manual_seed(1)
        sizes = {"hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 4}
        more = {"num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 3, "vocab_size": 97, "pad_token_id": 0}
        return tf.GptOssForCausalLM(tf.GptOssConfig(**sizes, **more, num_experts_per_tok=2)).eval()

    assert model().model.layers[0].mlp.experts.is_transposed
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=[], target_parameters=["experts.down_proj"])
    theirs, fresh = adapted(model(), config, tmp_path), model()
    delta = dk.load(tmp_path, fresh)
    close("mixtral", outputs("gpt_oss", fresh), outputs("gpt_oss", theirs))
    delta.save(tmp_path / "ours", format="peft")
    close("mixtral", outputs("gpt_oss", opened(model(), tmp_path / "ours")), outputs("gpt_oss", theirs))


def _mixtral(intermediate):
    torch.manual_seed(1)
    sizes = {"hidden_size": 24, "intermediate_size": intermediate, "num_hidden_layers": 1, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "num_local_experts": 3, "vocab_size": 97, "pad_token_id": 0}
    return tf.MixtralForCausalLM(tf.MixtralConfig(**sizes, **more, num_experts_per_tok=2)).eval()


def _as_before_0_19(folder, stack, **config):
    """Rewrites an adapter as PEFT stored it before 0.19: of the stack [e, d_in, d_out], so that A and B change places."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if "lora_A" in name]:
        a, b = tensors[name], tensors[name.replace("lora_A", "lora_B")]
        a, b = a.reshape(stack, -1, a.shape[1]), b.reshape(len(b), -1, stack)
        tensors[name] = b.permute(2, 1, 0).flatten(0, 1).contiguous()
        tensors[name.replace("lora_A", "lora_B")] = a.permute(2, 1, 0).flatten(1).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    written = json.loads((folder / "adapter_config.json").read_text())
    written = {name: value for name, value in written.items() if name != "peft_version"} | config
    (folder / "adapter_config.json").write_text(json.dumps(written))


@pytest.mark.skipif(OTHER_STACKS, reason="it rewrites what PEFT stores since 0.19")
@pytest.mark.parametrize("intermediate", [12, 28])
def test_experts_of_peft_before_0_19(intermediate, tmp_path):
    """Where the matrices are square, only the version tells A from B. PEFT itself loads such a file as another adapter."""
    names = ["experts.gate_up_proj", "experts.down_proj"]
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=[], target_parameters=names)
    expected = outputs("mixtral", adapted(_mixtral(intermediate), config, tmp_path))
    _as_before_0_19(tmp_path, 3, peft_version="0.18.1")
    fresh = _mixtral(intermediate)
    delta = dk.load(tmp_path, fresh)
    close("mixtral", outputs("mixtral", fresh), expected)
    delta.save(tmp_path / "ours", format="peft")
    close("mixtral", outputs("mixtral", opened(_mixtral(intermediate), tmp_path / "ours")), expected)
    again = _mixtral(intermediate)
    dk.load(tmp_path / "ours", again)
    close("mixtral", outputs("mixtral", again), expected)


@pytest.mark.skipif(OTHER_STACKS, reason="it rewrites what PEFT stores since 0.19")
def test_square_experts_without_a_version(tmp_path):
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=[], target_parameters=["experts.gate_up_proj"])
    expected = outputs("mixtral", adapted(_mixtral(12), config, tmp_path))
    _as_before_0_19(tmp_path, 3)
    fresh = _mixtral(12)
    with pytest.raises(dk.CheckpointError, match="it has no peft_version, which says how the LoRA on .*gate_up_proj"):
        dk.load(tmp_path, fresh)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "peft_version": "0.18.0"}))
    dk.load(tmp_path, fresh)
    close("mixtral", outputs("mixtral", fresh), expected)


class _Experts(torch.nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(*shape))

    def forward(self, x):
        return torch.einsum("bi,eoi->bo", x, self.weight)


@pytest.mark.skipif(OTHER_STACKS, reason="it rewrites what PEFT stores since 0.19")
@pytest.mark.parametrize("version", ["0.18.1", "0.21.2", None])
def test_a_stack_of_one_square_matrix(version, tmp_path):
    """It is a matrix for all releases: A was never exchanged with B."""
    backbone = torch.nn.ModuleDict({"experts": _Experts(1, 6, 6)})
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=[], target_parameters=["experts.weight"])
    theirs = adapted(backbone, config, tmp_path).base_model.model.experts
    x = torch.randn(2, 6)
    expected, fresh = theirs(x), torch.nn.ModuleDict({"experts": _Experts(1, 6, 6)})
    fresh["experts"].weight.data.copy_(backbone["experts"].get_base_layer().weight)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "peft_version": version}))
    dk.load(tmp_path, fresh)
    torch.testing.assert_close(fresh["experts"](x), expected)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "resnet"])
def test_biases_of_the_second_factor(name, tmp_path):
    """They are BitFit beside LoRA."""
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=QUERIES[name], lora_bias=True)
    delta = loads_as(name, saved(name, config, tmp_path), tmp_path)
    assert [method.name for method in delta.methods] == ["lora", "bitfit"]


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "resnet"])
@pytest.mark.parametrize("pattern", [False, True], ids=["one rank", "a rank pattern"])
def test_adalora(name, pattern, tmp_path):
    """It is LoRA, with the singular values in A."""
    config = peft.AdaLoraConfig(target_modules=QUERIES[name], total_step=10, init_r=4, lora_alpha=5)
    theirs = adapted(wide(name), config, tmp_path)
    if pattern:
        # The ranks that are left, as PEFT counts them at the end of training.
        paths = [path.removesuffix(".lora_E.default") for path, _ in theirs.named_parameters() if "lora_E" in path]
        left = [[False, False, True, False], [True, False, True, True], [True] * 4]
        theirs.peft_config["default"].rank_pattern = {
            f"{path.removeprefix('base_model.model.')}.lora_E": left[min(number, 2)]
            for number, path in enumerate(paths)
        }
        theirs.save_pretrained(tmp_path)
    # PEFT trains its divisor by accident, and does not save it, so what counts is the adapter that it reads again.
    delta = loads_as(name, outputs(name, opened(wide(name), tmp_path)), tmp_path)
    assert {method.r for method in delta.methods} >= ({1, 3} if pattern else {4})


EXPERTS = "base_model.model.model.layers.0.mlp.experts"
PARTS_REFUSED = {
    "AdaLoRA without E": ("llama", lambda: peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10, init_r=4), lambda t: t.pop(f"{Q}.lora_E"), "q_proj has no three factors of AdaLoRA that fit"),
    "another stack": ("mixtral", lambda: peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"]), lambda t: t.update({f"{EXPERTS}.lora_A.weight": torch.ones(5, 52), f"{EXPERTS}.lora_B.weight": torch.ones(24, 5)}), r"the factors of model.layers.0.mlp.experts.down_proj have shapes \(5, 52\) and \(24, 5\), which fit no stack of 3"),
    "one parameter more": ("mixtral", lambda: peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"]), lambda t: t.update({f"{EXPERTS}.base_layer.lora_{x}.weight": t[f"{EXPERTS}.lora_{x}.weight"].clone() for x in "AB"}), "it has 2 LoRAs on parameters of model.layers.0.mlp.experts, and target_parameters names 1 there"),
}  # fmt: skip


@pytest.mark.parametrize("case", PARTS_REFUSED)
def test_parts_that_do_not_fit(case, tmp_path):
    name, config, change, message = PARTS_REFUSED[case]
    saved(name, config(), tmp_path)
    with_tensors(tmp_path, change)
    with pytest.raises(dk.CheckpointError, match=message):
        dk.load(tmp_path, MODELS[name]())


class Square(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.dup = torch.nn.Linear(5, 5), torch.nn.Linear(5, 5)

    def forward(self, x):
        return self.dup(torch.tanh(self.up(x)))


def test_scales_of_inputs_and_outputs_are_told_by_their_shape(tmp_path):
    """PEFT takes a name in `feedforward_modules` for the end of a path, also within a word."""
    torch.manual_seed(0)
    model, x = Square().double(), torch.randn(2, 5, dtype=torch.float64)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    adapted = peft.get_peft_model(model, peft.IA3Config(target_modules=["up", "dup"], feedforward_modules=["up"]))
    with torch.no_grad():
        for value in adapted.parameters():
            if value.requires_grad:
                value.uniform_(0.5, 2)
    adapted.save_pretrained(tmp_path)
    fresh = Square().double()
    fresh.load_state_dict(state)
    dk.load(tmp_path, fresh)
    torch.testing.assert_close(fresh(x), adapted(x))


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd")
@pytest.mark.parametrize("options", [{"padding_mode": "reflect", "padding": 1}, {"dilation": 2}, {"groups": 2}])
def test_convolutions_of_other_kinds_are_refused(options, tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3, **options))
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"])).save_pretrained(tmp_path)
    fresh = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3, **options))
    with pytest.raises(dk.CheckpointError, match=r"0 is a .*convolution.*, where PEFT's LoRA computes something else"):
        dk.load(tmp_path, fresh)


def test_two_formats_in_one_folder(tmp_path):
    adapter(tmp_path)
    model = MODELS["llama"]()
    delta = dk.load(tmp_path, model)
    with pytest.raises(
        dk.CheckpointError, match=r"a delta in the format 'peft' is here already, and would stay beside"
    ):
        delta.save(tmp_path)
    delta.save(tmp_path / "ours")
    with pytest.raises(dk.CheckpointError, match=r"a delta in the format 'deltakit' is here already"):
        delta.save(tmp_path / "ours", format="peft")
    (tmp_path / "ours" / "adapter_config.json").write_text("{}")
    delta.detach()
    with pytest.raises(dk.CheckpointError, match=r"deltas of two formats, deltakit and peft, which may differ"):
        dk.load(tmp_path / "ours", model)


def test_a_weight_that_is_read_directly(tmp_path):
    """PEFT's layer is not called there."""

    class Reads(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = torch.nn.Linear(5, 5)

        def forward(self, x):
            return torch.nn.functional.linear(x, self.proj.weight)

    model = torch.nn.Sequential(Reads())
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["proj"])).save_pretrained(tmp_path)
    with pytest.raises(
        dk.CheckpointError, match=r"the module around 0.proj reads its weight directly, so the adapter has no"
    ):
        dk.load(tmp_path, torch.nn.Sequential(Reads()))
