"""OpenPrompt's tutorial (CommitmentBank with T5): its code runs with the import changed, and prints what the original printed.

Two lines are changed for other reasons: `load_dataset` needs a network, and transformers has no AdamW any more. The model is
tiny and random, so the learning rate is larger, and there are more epochs. One difference is intended: OpenPrompt tokenizes
pieces one by one, so that the piece "." behind "down" became "▁" and ".". T5's own tokenizer puts the second "▁" of the printed
tokens behind the sentinel.
"""

import torch
import transformers as tf

from support.seed_tokenizer import LABEL_WORDS, PRINTED_IDS, PRINTED_TOKENS, saved_t5, super_glue_cb, t5_tokenizer

TUTORIAL = """
raw_dataset = super_glue_cb()

from openprompt.plms import load_plm
plm, tokenizer, model_config, WrapperClass = load_plm("t5", "t5-base")

from openprompt.data_utils import InputExample

dataset = {}
for split in ['train', 'validation', 'test']:
    dataset[split] = []
    for data in raw_dataset[split]:
        input_example = InputExample(text_a = data['premise'], text_b = data['hypothesis'], label=int(data['label']), guid=data['idx'])
        dataset[split].append(input_example)
print(dataset['train'][0])

from openprompt.prompts import ManualTemplate
template_text = '{"placeholder":"text_a"} Deduction: {"placeholder":"text_b"}. Is it correct? {"mask"}.'
mytemplate = ManualTemplate(tokenizer=tokenizer, text=template_text)
wrapped_example = mytemplate.wrap_one_example(dataset['train'][0])

wrapped_t5tokenizer = WrapperClass(max_seq_length=128, decoder_max_length=3, tokenizer=tokenizer,truncate_method="head")
# or
from openprompt.plms import T5TokenizerWrapper
wrapped_t5tokenizer= T5TokenizerWrapper(max_seq_length=128, decoder_max_length=3, tokenizer=tokenizer,truncate_method="head")

# You can see what a tokenized example looks like by
tokenized_example = wrapped_t5tokenizer.tokenize_one_example(wrapped_example, teacher_forcing=False)
print(tokenized_example)
print(tokenizer.convert_ids_to_tokens(tokenized_example['input_ids']))
print(tokenizer.convert_ids_to_tokens(tokenized_example['decoder_input_ids']))

model_inputs = {}
for split in ['train', 'validation', 'test']:
    model_inputs[split] = []
    for sample in dataset[split]:
        tokenized_example = wrapped_t5tokenizer.tokenize_one_example(mytemplate.wrap_one_example(sample), teacher_forcing=False)
        model_inputs[split].append(tokenized_example)

from openprompt import PromptDataLoader

train_dataloader = PromptDataLoader(dataset=dataset["train"], template=mytemplate, tokenizer=tokenizer,
    tokenizer_wrapper_class=WrapperClass, max_seq_length=256, decoder_max_length=3,
    batch_size=4,shuffle=True, teacher_forcing=False, predict_eos_token=False,
    truncate_method="head")

from openprompt.prompts import ManualVerbalizer
import torch

# for example the verbalizer contains multiple label words in each class
myverbalizer = ManualVerbalizer(tokenizer, num_classes=3,
                        label_words=[["yes"], ["no"], ["maybe"]])

print(myverbalizer.label_words_ids)
logits = torch.randn(2,len(tokenizer)) # creating a pseudo output from the plm, and
processed = myverbalizer.process_logits(logits)

from openprompt import PromptForClassification

use_cuda = torch.cuda.is_available()
print("GPU enabled? {}".format(use_cuda))
prompt_model = PromptForClassification(plm=plm,template=mytemplate, verbalizer=myverbalizer, freeze_plm=False)
if use_cuda:
    prompt_model=  prompt_model.cuda()

# Now the training is standard
from torch.optim import AdamW
loss_func = torch.nn.CrossEntropyLoss()
no_decay = ['bias', 'LayerNorm.weight']
# it's always good practice to set no decay to biase and LayerNorm parameters
optimizer_grouped_parameters = [
    {'params': [p for n, p in prompt_model.named_parameters() if not any(nd in n for nd in no_decay)], 'weight_decay': 0.01},
    {'params': [p for n, p in prompt_model.named_parameters() if any(nd in n for nd in no_decay)], 'weight_decay': 0.0}
]

optimizer = AdamW(optimizer_grouped_parameters, lr=3e-2)

losses = []
for epoch in range(12):
    tot_loss = 0
    for step, inputs in enumerate(train_dataloader):
        if use_cuda:
            inputs = inputs.cuda()
        logits = prompt_model(inputs)
        labels = inputs['label']
        loss = loss_func(logits, labels)
        loss.backward()
        tot_loss += loss.item()
        optimizer.step()
        optimizer.zero_grad()
    losses.append(tot_loss/(step+1))

validation_dataloader = PromptDataLoader(dataset=dataset["validation"], template=mytemplate, tokenizer=tokenizer,
    tokenizer_wrapper_class=WrapperClass, max_seq_length=256, decoder_max_length=3,
    batch_size=4,shuffle=False, teacher_forcing=False, predict_eos_token=False,
    truncate_method="head")

allpreds = []
alllabels = []
for step, inputs in enumerate(validation_dataloader):
    if use_cuda:
        inputs = inputs.cuda()
    logits = prompt_model(inputs)
    labels = inputs['label']
    alllabels.extend(labels.cpu().tolist())
    allpreds.extend(torch.argmax(logits, dim=-1).cpu().tolist())

acc = sum([int(i==j) for i,j in zip(allpreds, alllabels)])/len(allpreds)
print(acc)
"""
PRINTED_EXAMPLE = """{
  "guid": 0,
  "label": 0,
  "meta": {},
  "text_a": "It was a complex language. Not written down but handed down. One might say it was peeled down.",
  "text_b": "the language was peeled down",
  "tgt_text": null
}
"""
PRINTED_PIECES = [
    [
        {
            "text": "It was a complex language. Not written down but handed down. One might say it was peeled down.",
            "loss_ids": 0,
            "shortenable_ids": 1,
        },
        {"text": " Deduction:", "loss_ids": 0, "shortenable_ids": 0},
        {"text": " the language was peeled down", "loss_ids": 0, "shortenable_ids": 1},
        {"text": ". Is it correct?", "loss_ids": 0, "shortenable_ids": 0},
        {"text": "<mask>", "loss_ids": 1, "shortenable_ids": 0},
        {"text": ".", "loss_ids": 0, "shortenable_ids": 0},
    ],
    {"guid": 0, "label": 0},
]
STRAY = 34
"""Where the printed tokens have the "▁" that is in no text."""


def without(listed, place):
    return [*listed[:place], *listed[place + 1 :]]


def test_the_tutorial_with_the_import_changed(tmp_path, capsys):
    folder = saved_t5(tmp_path / "t5-base")
    code = TUTORIAL.replace("from openprompt", "from deltakit.openprompt").replace("t5-base", folder)
    names = {"super_glue_cb": super_glue_cb}
    torch.manual_seed(0)
    exec(code, names)
    out = capsys.readouterr().out
    assert PRINTED_EXAMPLE in out
    assert names["wrapped_example"] == PRINTED_PIECES
    padding = [0] * (128 - len(PRINTED_IDS) + 1)
    ids, tokens = without(PRINTED_IDS, STRAY), without(PRINTED_TOKENS, STRAY)
    assert PRINTED_TOKENS[STRAY - 1 : STRAY + 2] == ["▁down", "▁", "."]
    tokenized = {
        "input_ids": [*ids, *padding],
        "attention_mask": [*[1] * len(ids), *padding],
        "decoder_input_ids": [0, 32099, 0],
        "loss_ids": [0, 1, 0],
    }
    assert f"{tokenized}\n{[*tokens, *['<pad>'] * len(padding)]}\n['<pad>', '<extra_id_0>', '<pad>']\n" in out
    assert "Parameter containing:\ntensor([[[4273]],\n\n        [[ 150]],\n\n        [[2087]]])\n" in out
    torch.testing.assert_close(names["processed"].exp().sum(-1), torch.ones(2))
    assert names["losses"][-1] < 0.5 < names["losses"][0]
    assert out.endswith("\n1.0\n")


def test_a_tokenizer_whose_sentinels_start_no_word_has_no_stray_token_behind_them():
    """T5's tokenizers put "▁" behind a sentinel themselves, and with `legacy=False` none."""
    from deltakit.openprompt.plms import T5TokenizerWrapper

    wrapper = T5TokenizerWrapper(max_seq_length=44, tokenizer=t5_tokenizer(joined_sentinels=True))
    ids = wrapper.tokenize_one_example(PRINTED_PIECES)["input_ids"]
    assert ids == [*without(without(PRINTED_IDS, STRAY), STRAY + 7), 0]


def test_label_words_are_single_tokens_of_the_tutorial():
    tokenizer = t5_tokenizer()
    assert isinstance(tokenizer, tf.PreTrainedTokenizerFast)
    assert {word: tokenizer.convert_tokens_to_ids(word) for word in LABEL_WORDS} == LABEL_WORDS
