"""Multitask prompts against their formula in float64, PEFT's own on the same weights, and PEFT's files."""

import peft
import pytest
import torch
import transformers as tf
from peft.tuners.multitask_prompt_tuning import MultitaskPromptTuningInit

import deltakit as dk
from support.models import Transformer, ids, randomize
from support.tiny_transformers import build


def tensors(delta):
    found = delta.state_dict()
    assert {name.rpartition(".")[2] for name in found} == {"prompt", "columns", "rows"}
    return {name.rpartition(".")[2]: value for name, value in found.items()}


def test_each_task_has_the_formula_s_prompt():
    model = build("gpt2", tf.AutoModelForCausalLM).double()
    delta = dk.attach(model, dk.MultitaskPrompt(tokens=3, tasks=2, rank=2, prepend=False), train=())
    values = tensors(randomize(delta))
    text = torch.tensor([[97, 98, 99, 5, 6], [100, 101, 102, 7, 8]])
    ours = model(text).logits
    delta.detach()
    x = model.get_input_embeddings()(text.clamp(max=96))
    for task in (0, 1):
        u, v = values["columns"][task], values["rows"][task]
        for i in range(3):
            x[task, i] = values["prompt"][i] * (u[i, 0] * v[0] + u[i, 1] * v[1])
    torch.testing.assert_close(ours, model(inputs_embeds=x).logits, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_equals_peft_on_the_same_weights_and_reads_its_files(tmp_path):
    model = build("llama", tf.AutoModelForCausalLM)
    text, tasks = torch.arange(3, 10)[None].repeat(2, 1), torch.tensor([1, 0])
    config = peft.MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=5,
        num_tasks=2,
        num_ranks=3,
        prompt_tuning_init=MultitaskPromptTuningInit.RANDOM,
    )
    theirs = peft.get_peft_model(model, config)
    randomize(theirs.prompt_encoder["default"])
    expected = theirs(input_ids=text, task_ids=tasks).logits
    theirs.save_pretrained(tmp_path)
    model = theirs.base_model
    delta = dk.load(tmp_path, model)
    assert delta._attachment.record.methods[0].tasks == 2
    prompts = 97 + 5 * tasks[:, None] + torch.arange(5)
    torch.testing.assert_close(model(torch.cat([prompts, text], 1)).logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_peft_opens_the_prompt_of_one_task(kind, tmp_path):
    model = build(kind, tf.AutoModelForCausalLM if kind == "llama" else tf.AutoModelForSeq2SeqLM)
    text = {"input_ids": torch.arange(3, 10)[None].repeat(2, 1)}
    # PEFT drops decoder_input_ids here.
    text |= {"labels": text["input_ids"][:, :4].clone()} if kind == "t5" else {}
    delta = randomize(dk.attach(model, dk.MultitaskPrompt(tokens=5, rank=2)))
    expected = model(**text).logits
    delta.save(tmp_path, format="peft")
    theirs = peft.PeftModel.from_pretrained(delta.detach().backbone, tmp_path)
    found = theirs(**text, task_ids=torch.zeros(2, dtype=torch.long)).logits
    torch.testing.assert_close(found[:, -expected.shape[1] :], expected, rtol=1e-5, atol=1e-6)


def test_tasks_start_as_the_shared_prompt_and_new_ones_from_a_delta():
    model = Transformer().eval()
    plain = randomize(dk.attach(model, dk.SoftPrompt(tokens=3), name="plain", train=()))
    wanted = model(ids())
    plain.detach()
    first = dk.attach(model, dk.MultitaskPrompt.from_delta(plain, rank=2), name="first", train=())
    assert torch.equal(model(ids()), wanted)
    randomize(first).detach()
    second = dk.attach(model, dk.MultitaskPrompt.from_delta(first), train=())
    assert torch.equal(tensors(second)["prompt"], tensors(first)["prompt"])
    assert tensors(second)["columns"].eq(1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": 0}, r"MultitaskPrompt\(tasks=0\): expected at least 1"),
        ({"rank": 0}, r"MultitaskPrompt\(rank=0\): expected at least 1"),
        ({"tasks": 2}, r"so the delta cannot insert them; pass prepend=False"),
        ({"init": "text"}, r"MultitaskPrompt\(init='text'\): expected 'vocab' or 'random'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(dk.OptionError, match=message):
        dk.MultitaskPrompt(**options)
