"""The code of `benchmarks/tasks_beside_peft.py` does what it says, on both sides, and the guide is written of it."""

import copy
import importlib.util
import io
import sys
import warnings
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import nn

import deltakit as dk
from support.paths import ROOT

peft = pytest.importorskip("peft")
sys.path.insert(0, str(ROOT / "benchmarks"))
from lines import guide  # noqa: E402
from tasks_beside_peft import TASKS  # noqa: E402

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}
T5 = {
    "d_model": 32,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "d_kv": 8,
    "vocab_size": 100,
    "decoder_start_token_id": 0,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {"num_local_experts": 4, "num_key_value_heads": 2}
BACKBONES = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, num_key_value_heads=2)),
    "tied": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**SMALL, **EXPERTS)),
    "bert": lambda: tf.BertForSequenceClassification(tf.BertConfig(**SMALL, num_labels=3)),
    "t5": lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2)),
    "own": lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)),
    "new architecture": lambda: nn.Sequential(Attending(), Attending()),
}


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(12, 12) for _ in range(4))

    def forward(self, x):
        found = nn.functional.scaled_dot_product_attention(self.to_q(x), self.to_k(x), self.to_v(x))
        return x + self.to_out(found)


def fresh(kind):
    torch.manual_seed(0)
    return BACKBONES[kind]().eval()


def in_4_bits(folder):
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("needs bitsandbytes")
    # In the sizes of bitsandbytes' blocks of 64 weights.
    tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL | {"hidden_size": 64, "intermediate_size": 128})).save_pretrained(folder)
    settings = tf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    return tf.AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, device_map="cpu").eval()


BATCH = {"input_ids": torch.arange(1, 15).reshape(2, 7)}
T5_BATCH = BATCH | {"decoder_input_ids": BATCH["input_ids"]}
INPUTS = {"t5": T5_BATCH, "own": {"input": torch.ones(2, 6)}, "new architecture": {"input": torch.ones(1, 5, 12)}}


class Side:
    """What the code of one side of a task finds: the model, and functions of it."""

    def __init__(self, side, task, folder):
        model = in_4_bits(folder / "whole") if task.backbone == "4 bits" else fresh(task.backbone)
        self.batch = INPUTS.get(task.backbone, BATCH)
        three = {"input_ids": torch.arange(1, 22).reshape(3, 7)}
        self.names = {
            **vars(peft.utils.save_and_load),
            **vars(peft),
            "peft": peft,
            "dk": dk,
            "tf": tf,
            "torch": torch,
            "copy": copy,
            "side": side,
        }
        self.names |= {"model": model, "batch": self.batch, "three": three, "original": self.logits(model)}
        own = ("logits", "learn", "trained", "trained_names", "close", "raises", "largest", "shake")
        self.names |= {"fresh": fresh, "trainer_settings": trainer_settings} | {
            name: getattr(self, name) for name in own
        }

    def run(self, code):
        with warnings.catch_warnings():
            # PEFT's, of options and of files.
            warnings.simplefilter("ignore")
            with redirect_stdout(io.StringIO()) as printed:
                exec(code, self.names)
            self.names["printed"] = printed.getvalue()

    def holds(self, expression):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return eval(expression, self.names)

    def logits(self, model):
        with torch.no_grad():
            found = model.eval()(*self.batch.values()) if "input" in self.batch else model.eval()(**self.batch)
        return getattr(found, "logits", found).clone()

    def learn(self, model):
        """Some steps of training, in which the outputs change."""
        optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=1.0)
        for _ in range(3):
            found = model.eval()(**self.batch)
            found.logits.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return True

    @staticmethod
    def shake(model):
        torch.manual_seed(1)
        with torch.no_grad():
            for name, value in model.named_parameters():
                if "lora" in name.lower():
                    value.normal_()

    @staticmethod
    def trained_names(model):
        return [name for name, value in model.named_parameters() if value.requires_grad]

    @staticmethod
    def trained(model):
        return sum(value.numel() for value in model.parameters() if value.requires_grad)

    @staticmethod
    def close(found, expected):
        return torch.allclose(found, expected, rtol=1e-4, atol=1e-5)

    @staticmethod
    def raises(error, call):
        with pytest.raises(error):
            call()
        return True

    @staticmethod
    def largest(folder):
        return max(file.stat().st_size for file in Path(folder).rglob("*model*.safetensors"))


def trainer_settings():
    data = [{"input_ids": row, "labels": row} for row in torch.randint(1, 100, (4, 7))]
    options = {"max_steps": 1, "save_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    return tf.TrainingArguments("checkpoints", **options, dataloader_pin_memory=False), data


@pytest.mark.parametrize("side", ["deltakit", "PEFT"])
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.title)
def test_a_task_is_done(task, side, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = Side(side, task, tmp_path)
    here.run(task.before)
    if side == "PEFT" and task.theirs is None:
        assert task.why
        assert here.holds(task.cannot)
        return
    here.run(task.ours if side == "deltakit" else task.theirs)
    assert here.holds(task.done)


def test_there_are_34_tasks():
    assert len({task.title for task in TASKS}) == len(TASKS) == 34


def test_the_guide_is_written_of_the_tasks():
    """`python benchmarks/lines.py --guide examples/guides/lines_beside_peft.md` writes it again."""
    assert (ROOT / "examples" / "guides" / "lines_beside_peft.md").read_text(encoding="utf-8") == guide(TASKS)
