"""PromptModel in transformers' Trainer and in a loop with accelerate."""

import pytest
import torch
import transformers as tf
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils.data import DataLoader

import deltakit as dk
from deltakit.errors import OptionError, TargetError
from deltakit.prompting import Ensemble, PromptModel, SoftVerbalizer, Template, WordVerbalizer
from support.prompt_models import TOKENIZER_OF, WORDS, model_of, tokenizer_of
from support.prompt_training import DATA, SOFT, settings


@pytest.fixture(autouse=True)
def fresh_state():
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def prompt_model(kind="bert", *, delta=True, soft_verbalizer=False):
    model, tokenizer = model_of(kind), tokenizer_of(TOKENIZER_OF[kind])
    for module in model.modules():
        # The figures of a short run are those of the data, not of dropout.
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    template = Template(SOFT if delta else SOFT.replace('{"soft": "it was"}', "it was"), tokenizer, model)
    if delta:
        dk.attach(model, template.soft_prompt(), dk.LoRA(r=4, alpha=64))
    words = {"good": "good", "bad": "bad"} if soft_verbalizer else WORDS
    verbalizer = (
        SoftVerbalizer(model, words, tokenizer=tokenizer)
        if soft_verbalizer
        else WordVerbalizer(tokenizer, words, multi="mean")
    )
    return PromptModel(model, template, verbalizer)


def trainer_of(model, folder, *, save="no", epochs=4, **options):
    arguments = settings(folder, per_device_train_batch_size=5, num_train_epochs=epochs, save_strategy=save, **options)

    def accuracy(found):
        return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}

    return tf.Trainer(
        model, arguments, train_dataset=DATA, eval_dataset=DATA, data_collator=model.collate, compute_metrics=accuracy
    )


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5"])
def test_the_trainer_trains_evaluates_and_predicts(kind, tmp_path):
    # The tokenizers are trained anew in each process, with other pieces where these are equally good: enough epochs for all.
    trainer = trainer_of(prompt_model(kind), tmp_path, epochs=12)
    before = trainer.evaluate()
    trainer.train()
    after, found = trainer.evaluate(), trainer.predict(DATA)
    assert after["eval_loss"] < 0.97 * before["eval_loss"]
    assert after["eval_accuracy"] > 0.8
    assert found.predictions.shape == (24, 2)
    assert found.metrics["test_accuracy"] == after["eval_accuracy"]
    predicted = [one.label for one in trainer.model.predict(DATA)]
    assert (
        sum(one == example["label"] for one, example in zip(predicted, DATA, strict=True)) / 24
        == after["eval_accuracy"]
    )


@pytest.mark.parametrize(
    "options", [{}, {"delta": False}, {"soft_verbalizer": True}], ids=["delta", "full", "verbalizer"]
)
def test_a_resumed_run_ends_as_an_uninterrupted_one(options, tmp_path):
    first = trainer_of(prompt_model(**options), tmp_path, save="epoch")
    first.train()
    second = trainer_of(prompt_model(**options), tmp_path / "second")
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-15"))
    expected, found = first.model.state_dict(), second.model.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_columns_that_the_trainer_removes(tmp_path):
    trainer = trainer_of(prompt_model(), tmp_path)
    trainer.args.remove_unused_columns = True
    with pytest.raises(OptionError, match="with the Trainer pass remove_unused_columns=False"):
        trainer.train()


def test_a_loop_with_accelerate():
    accelerator = Accelerator(cpu=True)
    model = prompt_model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    loader = DataLoader(DATA, batch_size=6, shuffle=True, collate_fn=model.collate)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    # The trainer of WordPiece orders pieces at random, so the texts have other tokens in each process.
    for _ in range(10):
        for batch in loader:
            loss = model(**batch)["loss"]
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_only_what_the_user_trains_gets_gradients():
    model = prompt_model(soft_verbalizer=True)
    model(**model.collate(DATA))["loss"].backward()
    names = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert names == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("soft_prompt" in name for name in names)
    assert {"verbalizer.vectors", "verbalizer.bias"} <= names


def test_gradient_checkpointing_and_small_numbers():
    model = prompt_model("gpt2")
    expected = model(**model.collate(DATA))["loss"]
    model.backbone.activation_checkpointing_enable()
    model.train()
    found = model(**model.collate(DATA))["loss"]
    found.backward()
    torch.testing.assert_close(found, expected)
    half = prompt_model("bert").to(torch.bfloat16)
    assert half(**half.collate(DATA))["loss"].dtype == torch.float32


def test_the_trainer_trains_an_ensemble(tmp_path):
    backbone, tokenizer = model_of("bert"), tokenizer_of("wordpiece")
    dk.attach(backbone, dk.LoRA(r=4, alpha=64))
    words = WordVerbalizer(tokenizer, WORDS)
    texts = ('{"placeholder": "text"} it was {"mask"}', '{"mask"} : {"placeholder": "text"}')
    both = Ensemble([PromptModel(backbone, Template(text, tokenizer, backbone), words) for text in texts])
    trainer = trainer_of(both, tmp_path)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    assert trainer.predict(DATA).predictions.shape == (24, 2)


OPTIONS = {
    "checkpointing": {"activation_checkpointing": True},
    "smoothing": {"label_smoothing_factor": 0.1},
    "noise": {"neftune_noise_alpha": 1.0},
}
"""What the Trainer asks of the model that it trains, besides a loss."""


@pytest.mark.parametrize(
    ("kind", "option"),
    [(kind, "checkpointing") for kind in ("bert", "gpt2", "t5", "bart")] + [("bert", "smoothing"), ("gpt2", "noise")],
)
def test_options_of_the_trainer(kind, option, tmp_path):
    trainer = trainer_of(prompt_model(kind), tmp_path, **OPTIONS[option])
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    if option == "checkpointing":
        assert trainer.model.backbone.is_activation_checkpointing


def test_options_of_the_trainer_with_an_ensemble(tmp_path):
    both = Ensemble([prompt_model("bert"), prompt_model("bert")])
    trainer_of(both, tmp_path, activation_checkpointing=True, label_smoothing_factor=0.1).train()
    assert all(model.backbone.is_activation_checkpointing for model in both.members)
    both.activation_checkpointing_disable()
    assert not any(model.backbone.is_activation_checkpointing for model in both.members)
    with pytest.raises(TargetError, match="it has 2 backbones"):
        both.get_input_embeddings()
    assert both.members[0].get_input_embeddings() is both.members[0].backbone.get_input_embeddings()
