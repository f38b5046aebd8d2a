"""aLoRA of PEFT: its files give its outputs, also of padded texts, and it opens those of deltakit."""

import json

import pytest
import torch

import deltakit as dk
from support.models import attached, same, snapshot
from support.peft_models import MODELS, QUERIES, adapted, close, opened, wide

peft = pytest.importorskip("peft")

CALL = [7, 5]
TEXTS = torch.tensor(
    [[3, 7, 5, 9, 8, 2], [0, 0, 7, 5, 7, 5], [7, 5, 9, 4, 0, 0], [3, 4, 9, 9, 8, 7], [7, 5, 3, 7, 5, 2]]
)
MASK = (TEXTS != 0).long()
GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


def config(name, **options):
    options = {"alora_invocation_tokens": CALL, "task_type": "CAUSAL_LM", **options}
    return peft.LoraConfig(r=3, lora_alpha=50, target_modules=QUERIES[name], **options)


def logits(model):
    return model(input_ids=TEXTS, attention_mask=MASK).logits


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_outputs_and_answers_are_those_of_peft(name, tmp_path):
    theirs = adapted(wide(name), config(name), tmp_path)
    model = wide(name)
    before, bare = snapshot(model), logits(model)
    delta = dk.load(tmp_path, model)
    assert delta.methods[0].invocation == (7, 5)
    found, expected = logits(model), logits(theirs)
    assert ((expected - bare).abs().amax((1, 2)) > 1e-5).tolist() == [True, True, True, False, True]
    close(name, found, expected)
    for output in (found, expected):
        output.square().mean().backward()
    for key, parameter in delta.named_parameters():
        path, _, factor = key.rpartition(".lora.")
        wanted = theirs.get_parameter(f"base_model.model.{path}.lora_{factor}.default.weight").grad
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-8, atol=1e-12)
        assert wanted.any()
    with torch.no_grad():
        answers = [one.generate(input_ids=TEXTS, attention_mask=MASK, **GREEDY) for one in (model, theirs)]
    assert torch.equal(*answers)
    delta.detach()
    same(before, snapshot(model))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_peft_opens_it(name, tmp_path):
    model = wide(name)
    bare = logits(model)
    delta = attached(model, dk.LoRA(r=3, alpha=50, invocation=CALL))
    expected = logits(model)
    assert (bare - expected).abs().max() > 1e-5
    delta.save(tmp_path, format="peft")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["alora_invocation_tokens"] == CALL
    close(name, logits(opened(wide(name), tmp_path)), expected)
    again = wide(name)
    dk.load(tmp_path, again)
    close(name, logits(again), expected)


def test_one_invocation_for_all(tmp_path):
    model = wide("llama")
    delta = attached(model, dk.LoRA(r=2, at="q_proj", invocation=CALL), dk.LoRA(r=2, at="v_proj"))
    with pytest.raises(
        dk.CheckpointError, match=r"one invocation for all LoRAs, and that of .*q_proj is \[7, 5\], that of"
    ):
        delta.save(tmp_path, format="peft")
    delta.detach()
    delta = attached(model, dk.LoRA(r=2, at="q_proj", invocation=CALL), dk.BitFit(at="q_proj"), name="biases")
    with pytest.raises(
        dk.CheckpointError, match="it has biases beside activated LoRA, which PEFT does not have together"
    ):
        delta.save(tmp_path, format="peft")
    delta.detach()
    delta = attached(model, dk.LoRA(r=2, at="q_proj", invocation=CALL), name="image")
    with pytest.raises(dk.CheckpointError, match="diffusers has LoRA, and this delta is activated LoRA"):
        delta.save(tmp_path, format="diffusers")


def test_not_of_other_models(tmp_path):
    """PEFT opens it there, and applies it to no token."""
    delta = attached(wide("bert"), dk.LoRA(r=2, invocation=CALL), train=())
    with pytest.raises(
        dk.CheckpointError, match="PEFT has activated LoRA in causal language models alone, and this is a "
    ):
        delta.save(tmp_path, format="peft")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"lora_bias": True},
            "it has activated LoRA together with lora_bias, target_parameters or alora_invocation_tokens",
        ),
        (
            {"use_dora": True},
            "it has DoRA together with lora_bias, target_parameters or alora_invocation_tokens, which delt",
        ),
    ],
)
def test_what_is_refused(changes, message, tmp_path):
    options = {} if "use_dora" in changes else changes
    adapted(
        wide("llama"),
        peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora="use_dora" in changes, **options),
        tmp_path,
    )
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"alora_invocation_tokens": CALL}))
    with pytest.raises(dk.CheckpointError, match=message):
        dk.load(tmp_path, MODELS["llama"]())


def test_embeddings_of_older_releases_act_on_all_tokens(tmp_path):
    """PEFT 0.18 has both in one adapter, and no invocation for embeddings; later ones refuse it."""
    adapted(wide("llama"), peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"alora_invocation_tokens": CALL}))
    delta = dk.load(tmp_path, wide("llama"))
    assert {method.invocation for method in delta.methods} == {(), (7, 5)}
