"""PEFT's prompt tuning and P-tuning of tweets: PEFT's lines in comments, and deltakit's three lines below each of them.

python examples/prompt_tuning.py
"""

import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers

import deltakit as dk

TWEETS = [(tweet, "complaint") for tweet in ["my train is late again", "I have no water", "the bill is wrong"]]
TWEETS += [(tweet, "no complaint") for tweet in ["what a lovely day", "this is my first job", "see you there"]]
ASK = "Classify if the tweet is a complaint or not :"

# In your code: AutoTokenizer.from_pretrained("bigscience/bloomz-560m")
words = dict.fromkeys(f"<pad> </s> {ASK} Tweet text Label {' '.join(' '.join(row) for row in TWEETS)}".split())
own = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<pad>"))
own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=own, pad_token="<pad>", eos_token="</s>")


def backbone():
    # In your code: AutoModelForCausalLM.from_pretrained("bigscience/bloomz-560m"). This one's weights are random and large.
    torch.manual_seed(0)
    sizes = {"vocab_size": len(words), "hidden_size": 64, "n_layer": 2, "n_head": 4}
    return tf.BloomForCausalLM(tf.BloomConfig(initializer_range=0.3, **sizes))


def preprocess(tweet, label):
    ids, answer = tokenizer(f"Tweet text : {tweet} Label :")["input_ids"], tokenizer(f"{label} </s>")["input_ids"]
    return {"input_ids": ids + answer, "attention_mask": [1] * len(ids + answer), "labels": [-100] * len(ids) + answer}


def answer(model, tweet):
    inputs = tokenizer(f"Tweet text : {tweet} Label :", return_tensors="pt", return_token_type_ids=False)
    found = model.eval().generate(**inputs, max_new_tokens=10, eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    return tokenizer.decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


data, collate = [preprocess(*row) for row in TWEETS], tf.DataCollatorForSeq2Seq(tokenizer, padding=True)

# Prompt tuning in a loop. PEFT: peft_config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=8,
#     prompt_tuning_init=PromptTuningInit.TEXT, prompt_tuning_init_text=ASK, tokenizer_name_or_path=model_name_or_path)
# model = get_peft_model(model, peft_config); model.print_trainable_parameters(); model.save_pretrained("tweets")
model = backbone()
delta = dk.attach(model, dk.SoftPrompt(tokens=8, init_ids=tokenizer(ASK)["input_ids"]))  # 1
print(delta)  # 2
optimizer = torch.optim.AdamW(delta.parameters(), lr=3e-2)
for _ in range(30):
    for batch in torch.utils.data.DataLoader(data, batch_size=3, shuffle=True, collate_fn=collate):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
print(f"prompt tuning: loss {loss.item():.2f}; the bill is wrong: {answer(model, 'the bill is wrong')}")
delta.save("tweets")  # 3

# PEFT: config = PeftConfig.from_pretrained("tweets"); model = PeftModel.from_pretrained(AutoModel..., "tweets")
again = backbone()
dk.load("tweets", again)
print("loaded, same answers:", all(answer(again, tweet) == answer(model, tweet) for tweet, _ in TWEETS))

# P-tuning with the Trainer. PEFT: PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=20, encoder_hidden_size=128)
model = backbone()
delta = dk.attach(model, dk.PTuning(tokens=20, hidden=128))
print(delta)
settings = tf.TrainingArguments("out", num_train_epochs=60, learning_rate=1e-2, report_to=[], use_cpu=True)
trainer = tf.Trainer(model, settings, train_dataset=data, data_collator=collate, processing_class=tokenizer)
print(f"P-tuning: loss {trainer.train().training_loss:.2f}; see you there: {answer(model, 'see you there')}")
