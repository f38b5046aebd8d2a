"""Trained rows of embeddings in adapters of PEFT: read with PEFT's outputs, and written so that PEFT gives deltakit's."""

import json
import re

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import deltakit as dk
from support.models import randomize, same, snapshot
from support.peft_models import adapted, opened
from support.tiny_transformers import build

peft = pytest.importorskip("peft")

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
IDS = (89, 5, 11)
SEQ2SEQ = ("t5", "bart")


def wide(kind):
    auto = tf.AutoModelForSeq2SeqLM if kind in SEQ2SEQ else tf.AutoModelForCausalLM
    more = {"scale_embedding": True} if kind == "bart" else {}
    return build(kind, tf.AutoModelForMaskedLM if kind == "bert" else auto, **more).double()


def outputs(model):
    tokens = torch.tensor([[5, 3, 89, 7, 5], [11, 0, 30, 8, 2]])
    more = {"decoder_input_ids": tokens[:, :4]} if model.config.is_encoder_decoder else {}
    return model(input_ids=tokens, **more).logits


def token_config(**options):
    return peft.TrainableTokensConfig(token_indices=list(IDS), **options)


def lora_config(targets, indices=IDS, **options):
    indices = list(indices) if isinstance(indices, tuple) else indices
    return peft.LoraConfig(r=2, target_modules=targets, trainable_token_indices=indices, **options)


READ = {
    "llama": token_config(),
    "gpt2": token_config(),
    "t5": token_config(),
    "bart": token_config(),
    "gemma3_text": token_config(),
    "head llama": token_config(target_modules=["embed_tokens", "lm_head"]),
    "lora llama": lora_config(["q_proj"]),
    "lora gpt2": lora_config(["c_attn"]),
    "lora t5": lora_config(["q"], {"shared": list(IDS)}),
    "lora bart": lora_config(["q_proj"]),
    "two modules llama": lora_config(["q_proj"], {"embed_tokens": [5, 3], "lm_head": [7, 0, 30]}),
    # PEFT unties them then.
    "other ids gpt2": lora_config(["c_attn"], {"wte": [5, 3], "lm_head": [7, 0, 30]}),
    "not the input t5": lora_config(["q"], {"embed_tokens": [89, 5]}),
    "adalora llama": peft.AdaLoraConfig(
        total_step=10, init_r=2, target_modules=["q_proj"], trainable_token_indices=list(IDS)
    ),
}


@pytest.mark.parametrize("case", READ)
def test_reading(case, tmp_path):
    kind = case.split()[-1]
    theirs = adapted(wide(kind), READ[case], tmp_path)
    # PEFT trains AdaLoRA's divisor by accident, and does not save it.
    expected = outputs(opened(wide(kind), tmp_path) if "adalora" in case else theirs)
    model = wide(kind)
    before, bare = snapshot(model), outputs(model)
    delta = dk.load(tmp_path, model)
    torch.testing.assert_close(outputs(model), expected, **CLOSE)
    without = {key: value.clone() for key, value in delta.state_dict().items()}
    for key, value in delta.state_dict().items():
        if key.endswith(".rows"):
            value.zero_()
    assert (outputs(model) - expected).abs().max() > 1e-4
    delta.load_state_dict(without)
    # A delta of deltakit's own, and off again.
    again = wide(kind)
    dk.load(delta.save(tmp_path / "own"), again)
    torch.testing.assert_close(outputs(again), expected, **CLOSE)
    delta.detach()
    same(before, snapshot(model))
    torch.testing.assert_close(outputs(model), bare, rtol=1e-13, atol=1e-13)


LORA = {"llama": "q_proj", "gpt2": "c_attn", "t5": "q", "bart": "q_proj", "gemma3_text": "q_proj"}
HEAD = dk.TrainableTokens(ids=(7, 2), at="lm_head")
WRITTEN = {
    **{kind: (dk.TrainableTokens(ids=IDS),) for kind in LORA},
    **{f"lora {kind}": (dk.LoRA(r=3, at=at), dk.TrainableTokens(ids=IDS)) for kind, at in LORA.items()},
    "both ends llama": (dk.TrainableTokens(ids=IDS, at=["embed_tokens", "lm_head"]),),
    "other ids llama": (dk.LoRA(r=3, at="q_proj"), dk.TrainableTokens(ids=IDS), HEAD),
    "two ranks llama": (dk.LoRA(r=3, at="q_proj"), dk.LoRA(r=2, at="v_proj"), dk.TrainableTokens(ids=IDS)),
    "by its weight gpt2": (dk.TrainableTokens(ids=IDS, at="wte.weight"),),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_writing(case, tmp_path):
    kind = case.split()[-1]
    model = wide(kind)
    delta = randomize(dk.attach(model, *WRITTEN[case]), 0.3)
    expected = outputs(model)
    delta.save(tmp_path, format="peft")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == ("LORA" if len(WRITTEN[case]) > 1 else "TRAINABLE_TOKENS")
    torch.testing.assert_close(outputs(opened(wide(kind), tmp_path)), expected, **CLOSE)
    # And back.
    again = wide(kind)
    dk.load(tmp_path, again)
    torch.testing.assert_close(outputs(again), expected, **CLOSE)


REFUSED = {
    "tied alone gpt2": (
        (dk.TrainableTokens(ids=IDS, untie=True),),
        "transformer.wte and lm_head share a weight, and PEFT would train rows of both",
    ),
    "other ids llama": (
        (dk.TrainableTokens(ids=IDS), HEAD),
        "its modules have different ids, and TRAINABLE_TOKENS of PEFT has the same for all",
    ),
    "twice llama": (
        (dk.TrainableTokens(ids=(3,)), dk.TrainableTokens(ids=(5,), at="embed_tokens.weight")),
        "it has two TrainableTokens at model.embed_tokens, and PEFT has one",
    ),
    "a lora there llama": (
        (dk.LoRA(r=2, at="embed_tokens"), dk.TrainableTokens(ids=(5,))),
        "it has a LoRA and TrainableTokens at model.embed_tokens, and PEFT has one of them there",
    ),
    "a bias bert": ((dk.TrainableTokens(ids=IDS),), "cls.predictions.decoder has a bias, which PEFT leaves out"),
    "ia3 llama": ((dk.IA3(), dk.TrainableTokens(ids=(5,))), "this delta is ia3 and trainable_tokens"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_cannot_do_is_not_written(case, tmp_path):
    methods, message = REFUSED[case]
    delta = randomize(dk.attach(wide(case.split()[-1]), *methods))
    with pytest.raises(dk.CheckpointError, match=f"cannot be saved as an adapter of PEFT.*{re.escape(message)}"):
        delta.save(tmp_path, format="peft")
    assert not list(tmp_path.iterdir())


def test_files_that_do_not_fit(tmp_path):
    adapted(wide("bert"), token_config(), tmp_path / "bias")
    with pytest.raises(dk.CheckpointError, match=r"decoder has a bias, which PEFT leaves out, where PEFT's trained"):
        dk.load(tmp_path / "bias", wide("bert"))
    adapted(wide("llama"), token_config(), tmp_path)
    file, config_file = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    config = json.loads(config_file.read_text())
    for ids in ([89, 5], [89, 5, 5], [89, 5, -11], [], "all"):
        config_file.write_text(json.dumps(config | {"token_indices": ids}))
        with pytest.raises(dk.CheckpointError, match="ids for them; save or download|at token_indices: expected"):
            dk.load(tmp_path, wide("llama"))
    config_file.write_text(json.dumps(config | {"token_indices": [5, 89, 97]}))
    with pytest.raises(dk.CheckpointError, match="no embedding or linear layer with so many rows"):
        dk.load(tmp_path, wide("llama"))
    config_file.write_text(json.dumps(config))
    save_file({f"{key[:-3]}s": value for key, value in load_file(file).items()}, file)
    with pytest.raises(dk.CheckpointError, match="it has no tensor of a TRAINABLE_TOKENS adapter|no part of a method"):
        dk.load(tmp_path, wide("llama"))


def test_looking_into_it(tmp_path):
    adapted(wide("llama"), lora_config(["q_proj"]), tmp_path)
    found = dk.inspect(tmp_path)
    assert [method.name for method in found.methods] == ["lora", "trainable_tokens"]
