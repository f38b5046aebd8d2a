"""PEFT's prompts and prefixes give PEFT's own outputs."""

import json

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import deltakit as dk
from deltakit.files import read_saved
from support.models import same, snapshot
from support.peft_models import MODELS, adapted, close, opened, outputs, saved, wide
from support.tiny_transformers import build

peft = pytest.importorskip("peft")

TASKS = {"bert": "SEQ_CLS", "gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM", "mixtral": "CAUSAL_LM"}
PROMPTS = {
    "prompt tuning": lambda task: peft.PromptTuningConfig(num_virtual_tokens=5, task_type=task),
    "p-tuning": lambda task: peft.PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=11, task_type=task),
}


def equal(name, found, expected, tokens=5):
    """PEFT leaves the hidden states of the prompt in the output."""
    prompted = expected.ndim == 3 and expected.shape[1] != found.shape[1]
    close(name, found, expected[:, tokens:] if prompted else expected)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("kind", PROMPTS)
def test_prompts(kind, name, tmp_path):
    expected = saved(name, PROMPTS[kind](TASKS[name]), tmp_path)
    model = wide(name)
    before, bare = snapshot(model), outputs(name, model)
    delta = dk.load(tmp_path, model)
    found = outputs(name, model)
    assert (bare - found).abs().max() > 1e-5
    equal(name, found, expected)
    assert delta.methods[0].tokens == 5
    # And as a delta of ours.
    delta.save(tmp_path / "ours")
    delta.detach()
    same(before, snapshot(model))
    dk.load(tmp_path / "ours", model)
    assert torch.equal(outputs(name, model), found)


def classifier(name):
    return build(name, tf.AutoModelForSequenceClassification).double()


@pytest.mark.parametrize("name", ["roberta", "distilbert", "electra", "gpt2", "llama"])
def test_a_classifier_reads_the_token_that_it_reads_in_peft(name, tmp_path):
    """RoBERTa's reads the first one outside of the text stack, and GPT-2's the last."""
    sizes = {"token_dim": 24, "num_layers": 2, "num_attention_heads": 4}
    config = peft.PromptTuningConfig(num_virtual_tokens=5, task_type="SEQ_CLS", **sizes)
    theirs, model = adapted(classifier(name), config, tmp_path), classifier(name)
    dk.load(tmp_path, model)
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(4))
    mask = torch.ones(2, 7, dtype=torch.long)
    torch.testing.assert_close(
        model(ids, attention_mask=mask).logits, theirs(ids, attention_mask=mask).logits, rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("name", ["gemma3_text", "bart"])
def test_an_embedding_that_scales_its_vectors(name, tmp_path):
    """PEFT puts the prompt behind the scale."""

    def language_model():
        auto = tf.AutoModelForSeq2SeqLM if name == "bart" else tf.AutoModelForCausalLM
        return build(name, auto, **({"scale_embedding": True} if name == "bart" else {})).double()

    config = peft.PromptTuningConfig(num_virtual_tokens=5, task_type="SEQ_2_SEQ_LM" if name == "bart" else "CAUSAL_LM")
    theirs, model = adapted(language_model(), config, tmp_path), language_model()
    assert model.get_input_embeddings().embed_scale != 1
    dk.load(tmp_path, model)
    found, expected = outputs(name, model), outputs(name, theirs)
    expected = expected[:, -found.shape[1] :]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
def test_padded_texts_and_generation(tmp_path):
    saved("llama", PROMPTS["prompt tuning"]("CAUSAL_LM"), tmp_path)
    theirs = opened(wide("llama"), tmp_path)
    model = wide("llama")
    dk.load(tmp_path, model)
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(4))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    found, expected = (m(input_ids=ids, attention_mask=mask).logits for m in (model, theirs))
    torch.testing.assert_close(found[mask.bool()], expected[:, 5:][mask.bool()], rtol=1e-10, atol=1e-10)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    found, expected = (m.generate(input_ids=ids, attention_mask=mask, **options) for m in (model, theirs))
    assert found.tolist() == expected.tolist()


def with_config(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def with_tensors(folder, change):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


REFUSED = {
    "no task": (lambda f: with_config(f, task_type=None), "it has no task_type, and without one PEFT puts no prompt into a model"),
    "no length": (lambda f: with_config(f, num_virtual_tokens=None), "damaged at num_virtual_tokens: expected `int`, got `null`"),
    "another length": (lambda f: with_config(f, num_virtual_tokens=4), r"prompt_embeddings has shape \(5, 24\), and num_virtual_tokens is 4"),
    "another width": (lambda f: with_tensors(f, lambda t: t.update(prompt_embeddings=torch.ones(5, 23))), r"\(5, 23\), the backbone needs \(5, 24\)"),
    "no tensor": (lambda f: with_tensors(f, lambda t: t.update(other=t.pop("prompt_embeddings"))), "it has no prompt_embeddings"),
    "more tensors": (lambda f: with_tensors(f, lambda t: t.update(other=torch.ones(2))), "other is in no module of this backbone"),
    "not finite": (lambda f: with_tensors(f, lambda t: t["prompt_embeddings"].fill_(torch.nan)), "infinite or not a number"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case, tmp_path):
    change, message = REFUSED[case]
    saved("llama", PROMPTS["prompt tuning"]("CAUSAL_LM"), tmp_path)
    change(tmp_path)
    model = MODELS["llama"]()
    before = snapshot(model)
    with pytest.raises(dk.CheckpointError, match=message):
        dk.load(tmp_path, model)
    same(before, snapshot(model))


def test_a_backbone_without_a_place_for_it(tmp_path):
    saved("llama", PROMPTS["prompt tuning"]("CAUSAL_LM"), tmp_path)
    with pytest.raises(dk.CheckpointError, match="soft_prompt: .* it has no embedding of token ids"):
        dk.load(tmp_path, MODELS["resnet"]())


def causal(name):
    return build(name, tf.AutoModelForCausalLM).double()


PREFIX = ["gpt2", "llama", "qwen2", "qwen3", "gemma", "phi", "phi3", "gptj", "gpt_neox", "opt", "gemma3_text"]


@pytest.mark.parametrize("name", PREFIX)
@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.filterwarnings("ignore:.*only the first .* tokens see this prefix")
def test_prefix_tuning(name, projection, tmp_path):
    """PEFT counts the prefix among the positions of the text, absolute ones (GPT-2, OPT) and rotary ones (the others)."""
    config = peft.PrefixTuningConfig(
        num_virtual_tokens=5, prefix_projection=projection, encoder_hidden_size=11, task_type="CAUSAL_LM"
    )
    theirs, model = adapted(causal(name), config, tmp_path), causal(name)
    bare, before = outputs(name, model), snapshot(model)
    delta = dk.load(tmp_path, model)
    found = outputs(name, model)
    assert (found - bare).abs().max() > 1e-3
    torch.testing.assert_close(found, outputs(name, theirs), rtol=1e-10, atol=1e-10)
    delta.save(tmp_path / "ours")
    delta.detach()
    same(before, snapshot(model))
    dk.load(tmp_path / "ours", model)
    assert torch.equal(outputs(name, model), found)


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_prefix_tuning_of_a_classifier(name, tmp_path):
    config = peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="SEQ_CLS")
    theirs, model = adapted(classifier(name), config, tmp_path), classifier(name)
    dk.load(tmp_path, model)
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(4))
    ids[0, 5:] = 0
    mask = (ids != 0).long()
    torch.testing.assert_close(
        model(ids, attention_mask=mask).logits, theirs(ids, attention_mask=mask).logits, rtol=1e-10, atol=1e-10
    )


def test_prefix_tuning_generates_as_in_peft(tmp_path):
    config = peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")
    for name in ("gpt2", "llama"):
        theirs, model = adapted(causal(name), config, tmp_path), causal(name)
        dk.load(tmp_path, model)
        ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(4))
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
        assert model.generate(ids, **options).tolist() == theirs.generate(input_ids=ids, **options).tolist()


PREFIX_REFUSED = {
    "an encoder and a decoder": ({"num_transformer_submodules": 2}, "this prefix of PEFT is one of an encoder and a decoder"),
    "other heads": ({"num_attention_heads": 3}, r"prompt_embeddings has shape \(5, 64\), and the config says 5 tokens, 2 layers and 16 features in 3 heads"),
    "other sizes": ({"token_dim": 8}, r"the config says 5 tokens, 2 layers and 8 features"),
    "other shapes": ({"num_attention_heads": 4}, r"layers.0.self_attn.prefix.key: the file has \(4, 5, 4\), the backbone needs \(2, 5, 8\)"),
    "other layers": ({"num_layers": 1, "token_dim": 32, "num_attention_heads": 4}, "it has the tensors of 1 prefix modules, and this backbone has places for 2"),
}  # fmt: skip


@pytest.mark.parametrize("case", PREFIX_REFUSED)
def test_prefixes_that_are_refused(case, tmp_path):
    changes, message = PREFIX_REFUSED[case]
    adapted(causal("llama"), peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"), tmp_path)
    with_config(tmp_path, **changes)
    model = causal("llama")
    before = snapshot(model)
    with pytest.raises(dk.CheckpointError, match=message):
        dk.load(tmp_path, model)
    same(before, snapshot(model))


def test_positions_that_cannot_be_moved(tmp_path):
    """BLOOM has distances only, and PEFT's prefix would be at distances, too."""
    adapted(causal("bloom"), peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"), tmp_path)
    with pytest.raises(
        dk.CheckpointError, match=r"transformer: Prefix\(shift=True\) expects one text stack that takes pos"
    ):
        dk.load(tmp_path, causal("bloom"))


def test_a_sliding_window(tmp_path):
    adapted(causal("mistral"), peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"), tmp_path)
    with pytest.warns(dk.DeltaWarning, match="in PEFT only the first 4096 tokens see this prefix"):
        dk.load(tmp_path, causal("mistral"))


ALONE = {
    "prompt": ("llama", lambda: PROMPTS["prompt tuning"]("CAUSAL_LM"), [("soft_prompt", [])]),
    "prefix": ("llama", lambda: peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"), [("prefix", [])]),
    "adalora": (
        "bert",
        lambda: peft.AdaLoraConfig(target_modules=["query"], total_step=10, init_r=4),
        [("lora", [f"bert.encoder.layer.{layer}.attention.self.query" for layer in (0, 1)])],
    ),
    "experts": (
        "mixtral",
        lambda: peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"]),
        [("lora", [f"model.layers.{layer}.mlp.experts.down_proj" for layer in (0, 1)])],
    ),
}


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("case", ALONE)
def test_what_the_files_alone_say(case, values, tmp_path):
    name, config, methods = ALONE[case]
    saved(name, config(), tmp_path)
    found = read_saved(tmp_path, None, "there", values=values)
    assert [(entry["method"], list(entry["targets"])) for entry in found.methods] == methods
    states = [state for states in found.in_order.values() for state in states]
    tensors = [*found.tensors.values(), *(tensor for state in states for tensor in state.values())]
    assert tensors
    assert all(tensor.is_meta is not values for tensor in tensors)
