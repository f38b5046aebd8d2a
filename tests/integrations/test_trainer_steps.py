"""AdaLoRA in transformers' Trainer: its penalty and its steps, also with several batches in a step."""

import pytest
import torch
import transformers as tf

import deltakit as dk
from deltakit.integrations import training_steps
from support.models import randomize
from support.tiny_transformers import build

STEPS = 3
ROWS = torch.randint(3, 90, (4 * STEPS, 7), generator=torch.Generator().manual_seed(5)).tolist()
PLAN = {"total_steps": STEPS, "init_r": 4, "target_r": 2, "orthogonality": 3.0}


def trained(kind, folder, batches, steps=training_steps, **options):
    torch.manual_seed(1)
    auto = tf.AutoModelForCausalLM if kind == "gpt2" else tf.AutoModelForSequenceClassification
    model = build(kind, auto)
    for module in model.modules():
        # Two batches of two examples have other random numbers than one of four.
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    data = [{"input_ids": row, "labels": row if kind == "gpt2" else sum(row) % 2} for row in ROWS]
    delta = randomize(dk.attach(model, dk.AdaLoRA(**{**PLAN, **options}), train=()))
    arguments = tf.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4 // batches,
        gradient_accumulation_steps=batches,
        learning_rate=0.1,
        optim="sgd",
        max_grad_norm=0,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = tf.Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    # That of BERT takes the number of items, and does not use it.
    trainer.model_accepts_loss_kwargs = kind == "gpt2"
    assert steps(trainer) is trainer
    trainer.train()
    return delta, trainer


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_a_step_of_two_batches_is_one_of_a_batch_of_both(kind, tmp_path):
    one, trainer = trained(kind, tmp_path, 1)
    two, _ = trained(kind, tmp_path, 2)
    for delta in (one, two):
        assert {int(module.steps) for modules in delta.modules.values() for module in modules} == {STEPS}
        assert sum(module.rank for (module,) in delta.modules.values()) == 2 * len(delta.modules)
    found = dict(two.named_parameters())
    for name, value in one.named_parameters():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    free, _ = trained(kind, tmp_path, 1, orthogonality=0.0)
    assert any(
        (value - dict(free.named_parameters())[name]).abs().max() > 1e-2 for name, value in one.named_parameters()
    )
    if kind == "bert":
        # The penalty is no part of what is evaluated.
        inputs = torch.tensor(ROWS)
        with torch.no_grad():
            expected = one.backbone.eval()(input_ids=inputs, labels=inputs.sum(1) % 2).loss
        assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected), rel=1e-3)


def test_without_it_saving_warns(tmp_path):
    delta, _ = trained("bert", tmp_path, 1, steps=lambda trainer: trainer)
    with pytest.warns(dk.DeltaWarning, match=r"trained without delta.step\(\), so AdaLoRA chose no ranks"):
        delta.save(tmp_path / "delta")


def test_something_else_than_a_trainer():
    with pytest.raises(
        dk.OptionError, match="expected a transformers.Trainer, found a Linear, which has no compute_loss"
    ):
        training_steps(torch.nn.Linear(2, 3))
