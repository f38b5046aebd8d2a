"""Checkpoints of transformers' Trainer: only what is trained is in them, and training goes on from them as if never stopped."""

import logging

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import nn

import deltakit as dk
from deltakit.integrations import small_checkpoints
from support.models import Transformer, randomize
from support.tiny_transformers import build

STEPS, SAVED = 4, 2


def data(kind):
    rows = torch.randint(3, 90, (8, 7), generator=torch.Generator().manual_seed(5)).tolist()
    labels = (lambda i, row: i % 2) if kind == "bert" else (lambda i, row: row)
    return [{"input_ids": row, "labels": labels(i, row)} for i, row in enumerate(rows)]


def bert():
    # With dropout, so that the random numbers must go on, too.
    return build("bert", tf.AutoModelForSequenceClassification).train()


def attached(model, **options):
    return dk.attach(model, dk.LoRA(r=3, dropout=0.1), dk.Prefix(tokens=2, reparam=True), train="@head", **options)


def trainer_of(model, folder, kind="bert", cls=tf.Trainer, args=tf.TrainingArguments, **options):
    own = {
        name: options.pop(name) for name in list(options) if name in ("eval_dataset", "compute_metrics", "model_init")
    }
    settings = args(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        save_steps=SAVED,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    return cls(model, settings, train_dataset=data(kind), **own)


def trained(model):
    return {name: value.clone() for delta in dk.deltas(model) for name, value in delta.state_dict().items()}


def equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(autouse=True)
def quiet(caplog):
    yield
    # transformers only logs what a checkpoint lacks.
    said = [
        r.getMessage() for r in caplog.records if r.name.startswith("transformers") and r.levelno >= logging.WARNING
    ]
    assert not [message for message in said if "keys" in message]


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5"])
def test_a_run_resumes_as_if_it_had_not_stopped(kind, tmp_path):
    def model():
        if kind == "bert":
            return bert()
        return build(kind, tf.AutoModelForCausalLM if kind == "gpt2" else tf.AutoModelForSeq2SeqLM).train()

    def attach(backbone):
        return attached(backbone) if kind == "bert" else dk.attach(backbone, dk.LoRA(r=3, dropout=0.1))

    classes = (tf.Seq2SeqTrainer, tf.Seq2SeqTrainingArguments) if kind == "t5" else (tf.Trainer, tf.TrainingArguments)
    options = dict(zip(("cls", "args"), classes, strict=True))
    first = model()
    bare = {name: value.clone() for name, value in first.state_dict().items()}
    attach(first)
    trainer_of(first, tmp_path, kind, **options).train()
    again = model()
    attach(again)
    trainer_of(again, tmp_path, kind, **options).train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{SAVED}"))
    equal(trained(first), trained(again))
    for name, value in dk.base_state_dict(again).items():
        assert torch.equal(value, bare[name]), name
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    own = sum(value.numel() for key, value in saved.items() if key in bare)
    assert own == 0
    assert not (tmp_path / "checkpoint-2" / "config.json").exists()
    loaded = model()
    dk.load(tmp_path / f"checkpoint-{STEPS}", loaded)
    equal(trained(first), trained(loaded))


def test_two_deltas_resume_each_with_its_own(tmp_path):
    def both(change=lambda delta: delta):
        model = bert()
        dk.attach(model, dk.LoRA(r=3), name="one", train="@head")
        two = change(dk.attach(model, dk.LoRA(r=2, at="@ff.up"), name="two", train="pooler"))
        two.active = False
        return model

    # The second is not active, so its trained pooler is beside the backbone.
    first, again = both(randomize), both()
    trainer_of(first, tmp_path).train()
    trainer_of(again, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name in ("one", "two"):
        mine, other = (next(d for d in dk.deltas(model) if d.name == name) for model in (first, again))
        equal(mine.state_dict(), other.state_dict())
    for model in (first, again):
        next(d for d in dk.deltas(model) if d.name == "two").active = True
    equal(dict(first.state_dict()), dict(again.state_dict()))
    assert dk.load(tmp_path / "checkpoint-4" / "two", bert()).name == "two"


def test_the_best_checkpoint_is_loaded_and_old_ones_are_removed(tmp_path):
    losses = iter([1.0, 2.0])

    model = bert()
    attached(model)
    trainer = trainer_of(
        model,
        tmp_path,
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=2,
        save_total_limit=1,
        metric_for_best_model="own",
        greater_is_better=False,
        eval_dataset=data("bert"),
        compute_metrics=lambda _: {"own": next(losses)},
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    best = bert()
    dk.load(tmp_path / "checkpoint-2", best)
    equal(trained(model), trained(best))
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2"]


def test_resuming_another_run_is_refused(tmp_path):
    def run(alphas=(16, 16), names="ab", change=0.0, **options):
        model = bert()
        with torch.no_grad():
            model.bert.encoder.layer[1].output.dense.weight.add_(change)
        for alpha, name in zip(alphas, names, strict=True):
            dk.attach(model, dk.LoRA(r=3, alpha=alpha), name=name, train=())
        trainer_of(model, tmp_path).train(**options)

    run()
    resume = {"resume_from_checkpoint": str(tmp_path / "checkpoint-2")}
    with pytest.raises(dk.CheckpointError, match="other options of the delta 'b': alpha was 16 and is 8; attach"):
        run(alphas=(16, 8), **resume)
    with pytest.raises(dk.CheckpointError, match="in the order a, b, and here in the order b, a; the states"):
        run(names="ba", **resume)
    with pytest.raises(
        dk.BackboneMismatch, match="not the backbone.*the weights differ in 1 of .*layer.1.output.dense"
    ):
        run(change=0.5, **resume)
    run(**resume)
    # Copies: the loaded ones may be views of the file, which is written over.
    damaged = {
        name: value.clone() for name, value in load_file(tmp_path / "checkpoint-2" / "model.safetensors").items()
    }
    mark = "deltakit: attach this delta first: a"
    for text in (b"[", b"{}", b'{"place": 0, "methods": [1]}'):
        damaged[mark] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        save_file(damaged, tmp_path / "checkpoint-2" / "model.safetensors", {"format": "pt"})
        with pytest.raises(
            dk.CheckpointError, match="what it says of the delta 'a' is damaged; use another checkpoint"
        ):
            run(**resume)
    # Those of earlier versions say less, and the first ones nothing.
    damaged[mark] = torch.frombuffer(
        bytearray(b'{"place": 0, "methods": [{"method": "lora", "r": 3}]}'), dtype=torch.uint8
    )
    save_file(damaged, tmp_path / "checkpoint-2" / "model.safetensors", {"format": "pt"})
    run(**resume)
    damaged[mark] = torch.zeros(1)
    save_file(damaged, tmp_path / "checkpoint-2" / "model.safetensors", {"format": "pt"})
    run(alphas=(8, 8), **resume)


@pytest.mark.parametrize("follow", [None, "merge_and_unload", "unmerge"])
def test_a_merged_delta_is_made_part_of_the_model_or_unmerged_before_training(follow, tmp_path):
    def prepared():
        model = bert()
        old = randomize(dk.attach(model, dk.LoRA(r=2), name="old", train=()))
        old.merge().trainable = False
        if follow:
            getattr(old, follow)()
        return model, attached(model, name="new")

    model, delta = prepared()
    if not follow:
        with pytest.raises(
            dk.StateError, match=r"'old' is merged.*before training, call merge_and_unload\(\).*or unmerge"
        ):
            trainer_of(model, tmp_path).train()
        return
    trainer_of(model, tmp_path).train()
    again, other = prepared()
    trainer_of(again, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    equal(delta.state_dict(), other.state_dict())


def test_save_model_writes_the_backbone_and_the_delta(tmp_path):
    model = bert()
    bare = {name: value.clone() for name, value in model.state_dict().items()}
    attached(model)
    trainer = trainer_of(model, tmp_path / "out")
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    again = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    for name, value in again.state_dict().items():
        assert torch.equal(value, bare[name]), name
    dk.load(tmp_path / "saved", again)
    batch = torch.tensor([[5, 6, 7]])
    assert torch.equal(again.eval()(batch).logits, model.eval()(batch).logits)


def test_resuming_without_the_delta_fails(tmp_path):
    model = bert()
    attached(model, name="topic")
    trainer_of(model, tmp_path).train()
    folder = str(tmp_path / "checkpoint-2")
    with pytest.raises(RuntimeError, match=r"size mismatch for .*torch.Size\(\[0\]\)"):
        trainer_of(bert(), tmp_path).train(resume_from_checkpoint=folder)
    with pytest.raises(
        dk.CheckpointError, match=r"checkpoint-2: it holds what these deltas have trained: 'topic'; none is attached"
    ):
        small_checkpoints(trainer_of(bert(), tmp_path)).train(resume_from_checkpoint=folder)
    other = bert()
    attached(other, name="other")
    with pytest.raises(
        dk.CheckpointError, match="'topic'; the attached are 'other'; attach the same deltas by the same names"
    ):
        trainer_of(other, tmp_path).train(resume_from_checkpoint=folder)
    smaller = bert()
    dk.attach(smaller, dk.LoRA(r=3), name="topic", train="@head")
    before = trained(smaller)
    with pytest.raises(
        dk.CheckpointError, match="is unknown in this delta.*attach the deltas with the methods, options and"
    ):
        trainer_of(smaller, tmp_path).train(resume_from_checkpoint=folder)
    equal(before, trained(smaller))
    with pytest.raises(ValueError, match="Unrecognized model in .*config.json"):
        tf.AutoModelForSequenceClassification.from_pretrained(folder)


def test_a_backbone_that_is_trained_too_is_in_the_checkpoint(tmp_path):
    def model():
        backbone = bert()
        dk.attach(backbone, dk.LoRA(r=3), freeze=False)
        return backbone

    first, again = model(), model()
    trainer_of(first, tmp_path).train()
    trainer_of(again, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    equal(dict(first.state_dict()), dict(again.state_dict()))


class Tied(nn.Module):
    """A module that transformers does not know, with a tied weight."""

    def __init__(self):
        super().__init__()
        self.inner = Transformer()
        self.out = nn.Linear(20, 31, bias=False)
        self.out.weight = self.inner.embed.weight

    def forward(self, input_ids, labels):
        hidden = self.inner.embed(input_ids % 31)
        for layer in self.inner.layers:
            hidden = layer(hidden)
        logits = self.out(hidden)
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten() % 31), "logits": logits}


def test_a_plain_module_needs_one_line(tmp_path):
    def model():
        torch.manual_seed(3)
        backbone = Tied()
        dk.attach(backbone, dk.LoRA(r=3, at="q_proj"))
        return backbone

    first, again = model(), model()
    small_checkpoints(trainer_of(first, tmp_path, "gpt2")).train()
    folder = tmp_path / "checkpoint-2"
    small_checkpoints(trainer_of(again, tmp_path, "gpt2")).train(resume_from_checkpoint=str(folder))
    equal(trained(first), trained(again))
    assert (folder / "model.safetensors").stat().st_size < 4000
    torch.manual_seed(3)
    assert trained_after_load(folder, Tied())


def trained_after_load(folder, model):
    dk.load(folder, model)
    return trained(model)


def test_small_checkpoints_takes_a_trainer():
    with pytest.raises(dk.OptionError, match=r"expected a transformers.Trainer, found a Linear, which has no _save"):
        small_checkpoints(nn.Linear(2, 2))
