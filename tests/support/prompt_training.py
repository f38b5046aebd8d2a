"""Prompt models, their data and their Trainers, for tests of training and of checkpoints."""

import transformers as tf

import deltakit as dk
from deltakit.integrations import small_checkpoints
from deltakit.prompting import PromptModel, SoftVerbalizer, Template
from support.prompt_models import TOKENIZER_OF, model_of, tokenizer_of

STEPS, SAVED = 6, 3
TEXTS = {
    "good": ["a film to remember", "great and fine", "yes so good"],
    "bad": ["boring plot", "awful and bad", "no a bad word"],
}
DATA = [{"text": text, "label": label} for label, texts in TEXTS.items() for text in texts] * 4
SOFT = '{"placeholder": "text"} {"soft": "it was"} {"mask"}'


def prompt_model(kind="bert", *, attach=True, freeze=True):
    """A prompt model with dropout, whose soft tokens, LoRA and verbalizer are trained."""
    tokenizer, model = tokenizer_of(TOKENIZER_OF[kind]), model_of(kind)
    template = Template(SOFT if attach else SOFT.replace('{"soft": "it was"}', ""), tokenizer, model)
    if attach:
        dk.attach(model, template.soft_prompt(), dk.LoRA(r=3, dropout=0.1), freeze=freeze)
    return PromptModel(model, template, SoftVerbalizer(model, {"good": "good", "bad": "bad"}, tokenizer=tokenizer))


def settings(folder, **options):
    """The arguments of a Trainer on a CPU that prints nothing."""
    return tf.TrainingArguments(
        output_dir=str(folder),
        learning_rate=2e-2,
        remove_unused_columns=False,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )


def trainer_of(model, folder, small=True, **options):
    own = {name: options.pop(name) for name in list(options) if name != "compute_metrics"}
    arguments = settings(folder, per_device_train_batch_size=4, max_steps=STEPS, save_steps=SAVED, **own)
    trainer = tf.Trainer(
        model, arguments, train_dataset=DATA, eval_dataset=DATA, data_collator=model.collate, **options
    )
    return small_checkpoints(trainer) if small else trainer
