"""PEFT's prompt tuning and P-tuning, as tutorials show them, and the lines beside them in `examples/prompt_tuning.py`."""

import peft
import pytest
import torch
import transformers as tf

import deltakit as dk
from support.prompt_models import tokenizer_of

# PEFT asks transformers' models for an attribute with an old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
ASK = "the plot was bad, people say"
SIZES = {"vocab_size": 401, "hidden_size": 1024, "n_layer": 1, "n_head": 8}


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return tf.BloomForCausalLM(tf.BloomConfig(**SIZES)).eval()


@pytest.fixture
def folder(tmp_path):
    tokenizer_of("bpe").save_pretrained(tmp_path)
    return str(tmp_path)


def prompt_tuning(folder):
    theirs = peft.PromptTuningConfig(
        task_type="CAUSAL_LM",
        prompt_tuning_init=peft.PromptTuningInit.TEXT,
        num_virtual_tokens=8,
        prompt_tuning_init_text=ASK,
        tokenizer_name_or_path=folder,
    )
    return theirs, dk.SoftPrompt(tokens=8, init_ids=tokenizer_of("bpe")(ASK)["input_ids"]), 8_192


def p_tuning(_):
    theirs = peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=20, encoder_hidden_size=128)
    return theirs, dk.PTuning(tokens=20, hidden=128), 300_288


@pytest.mark.parametrize("make", [prompt_tuning, p_tuning])
def test_as_many_parameters_as_peft_and_the_tutorials_print(make, backbone, folder):
    theirs, method, printed = make(folder)
    delta = dk.attach(backbone, method)
    assert delta.num_parameters == printed
    delta.detach()
    assert peft.get_peft_model(backbone, theirs).get_nb_trainable_parameters()[0] == printed


def test_a_prompt_that_starts_as_a_text_has_the_outputs_of_pefts(backbone, folder):
    theirs, method, _ = prompt_tuning(folder)
    text = torch.tensor([[5, 7, 11, 13]])
    labels = torch.tensor([[-100, -100, 11, 13]])
    delta = dk.attach(backbone, method)
    with torch.no_grad():
        own = backbone(text, labels=labels)
    delta.detach()
    with torch.no_grad():
        other = peft.get_peft_model(backbone, theirs).eval()(
            input_ids=text, attention_mask=torch.ones_like(text), labels=labels
        )
    torch.testing.assert_close(own.loss, other.loss)
    # PEFT's logits are longer by the prompt.
    torch.testing.assert_close(own.logits[:, -4:], other.logits[:, 8:])
