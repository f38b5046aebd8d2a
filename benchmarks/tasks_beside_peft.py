"""Tasks that users of adapter libraries have, each as the least idiomatic code in deltakit and in PEFT.

`tests/test_tasks_beside_peft.py` runs them all, and `benchmarks/lines.py` counts their lines. Not counted are imports, the
model, and `before`, which both sides share. Functions such as `learn`, `logits` and `fresh` are those of the test.
"""

from typing import NamedTuple


class Task(NamedTuple):
    """One task: the code of both sides, and an expression that is true if it was done.

    Without code for PEFT, `why` says in one sentence why it cannot, and `cannot` is true of the installed version if so.
    """

    title: str
    ours: str
    theirs: str | None
    done: str
    backbone: str = "llama"
    before: str = ""
    why: str = ""
    cannot: str = ""


QV = 'target_modules=["q_proj", "v_proj"]'
OURS = 'dk.attach(model, dk.LoRA(r=4, at="{q,v}_proj"))'
THEIRS = f"model = get_peft_model(model, LoraConfig(r=4, {QV}))"
CHANGED = "not torch.equal(logits(model), original)"
LEARNT = "learn(model); after = logits(model)"
# What one side saves is what the other task begins with.
OUR_FILE = (
    f'one = fresh("llama"); saved = dk.attach(one, dk.LoRA(r=4)); {LEARNT.replace("model", "one")}; saved.save("ours")'
)
PEFT_FILE = (
    'one = get_peft_model(fresh("llama"), LoraConfig(r=4, target_modules=["q_proj", "v_proj"])); '
    f'{LEARNT.replace("model", "one")}; one.save_pretrained("peft")'
)
ON = f'delta = {OURS} if side == "deltakit" else None\nif side == "PEFT": {THEIRS}'
TWO = """if side == "deltakit":
    a, b = (dk.attach(model, dk.LoRA(r=4, at="{q,v}_proj", dropout=0.0), name=name) for name in "ab")
else:
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), adapter_name="a")
    model.add_adapter("b", LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
shake(model)"""

TASKS = (
    Task(
        "LoRA on layers by name",
        'delta = dk.attach(model, dk.LoRA(r=4, at=["q_proj", "v_proj"]))',
        'model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))',
        "trained(model) == 896",
    ),
    Task(
        "LoRA on a model of your own",
        'delta = dk.attach(model, dk.LoRA(r=2, at=["0", "2"]))',
        'model = get_peft_model(model, LoraConfig(r=2, target_modules=["0", "2"]))',
        "trained(model) == 2 * (6 + 8) + 2 * (8 + 3)",
        "own",
    ),
    Task(
        "LoRA on queries and values, without names of the architecture",
        'delta = dk.attach(model, dk.LoRA(r=2, at="@attn.{q,v}"))',
        None,
        "trained(model) == 4 * 2 * (12 + 12)",
        "new architecture",
        why="A model type that is not in its table needs `target_modules`.",
        cannot="raises(ValueError, lambda: get_peft_model(model, LoraConfig(r=2)))",
    ),
    Task(
        "LoRA in the encoder only",
        'delta = dk.attach(model, dk.LoRA(r=4, at="encoder/{q,v}"))',
        r'model = get_peft_model(model, LoraConfig(r=4, target_modules=r"encoder\..*\.(q|v)"))',
        'trained(model) == 1024 and all("decoder" not in name for name in trained_names(model))',
        "t5",
    ),
    Task(
        "another rank in the first layer",
        'delta = dk.attach(model, dk.LoRA(r={"layers.0": 2, "*": 4}, at="q_proj"))',
        r'model = get_peft_model(model, LoraConfig(r=4, rank_pattern={r"layers\.0\..*": 2}, target_modules=["q_proj"]))',
        "trained(model) == 2 * 64 + 4 * 64",
    ),
    Task(
        "LoRA in some layers only",
        'delta = dk.attach(model, dk.LoRA(r=4, at="layers.1.**.q_proj"))',
        'model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], layers_to_transform=[1]))',
        "trained(model) == 4 * 64",
    ),
    Task(
        "LoRA on all linear layers but the head",
        'delta = dk.attach(model, dk.LoRA(r=4, at="@block"))',
        'model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))',
        'all("lm_head" not in name for name in trained_names(model)) and trained(model) == 4096',
    ),
    Task(
        "train a new head, too",
        'delta = dk.attach(model, dk.LoRA(r=4), train="@head")',
        'model = get_peft_model(model, LoraConfig(r=4, task_type="SEQ_CLS"))',
        'any("classifier" in name for name in trained_names(model))',
        "bert",
    ),
    Task(
        "train the norms only",
        "delta = dk.attach(model, dk.LNTuning())",
        'names = ["input_layernorm", "post_attention_layernorm", "norm"]\n'
        "model = get_peft_model(model, LNTuningConfig(target_modules=names))",
        "trained(model) == 5 * 32",
    ),
    Task(
        "bottleneck adapters",
        "delta = dk.attach(model, dk.Adapter(size=4))",
        None,
        "trained(model) > 0",
        why="It has no bottleneck adapters.",
        cannot='not [kind for kind in peft.PeftType if "BOTTLENECK" in kind.value or kind.value == "ADAPTER"]',
    ),
    Task(
        "a soft prompt",
        "delta = dk.attach(model, dk.SoftPrompt(tokens=5))",
        'model = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))',
        "trained(model) == 5 * 32",
    ),
    Task(
        "embeddings of new tokens",
        "delta = dk.attach(model, dk.TrainableTokens(ids=[97, 98]))",
        'model = get_peft_model(model, TrainableTokensConfig(token_indices=[97, 98], target_modules=["embed_tokens"]))',
        "trained(model) == 2 * 32",
    ),
    Task(
        "LoRA on fused experts",
        'delta = dk.attach(model, dk.LoRA(r=2, at="experts.gate_up_proj"))',
        'model = get_peft_model(model, LoraConfig(r=2, target_modules=[], target_parameters=["experts.gate_up_proj"]))',
        f"learn(model) and {CHANGED}",
        "mixtral",
    ),
    Task(
        "LoRA on a tied weight, wherever it is used",
        'delta = dk.attach(model, dk.LoRA(r=4, at="lm_head.weight"))',
        'model = get_peft_model(model, LoraConfig(r=4, target_modules=["lm_head"], ensure_weight_tying=True))',
        f"learn(model) and {CHANGED}",
        "tied",
    ),
    Task(
        "LoRA on the queries of a fused projection",
        'delta = dk.attach(model, dk.LoRA(r=4, at="c_attn[q]"))',
        None,
        "trained(model) == 2 * 4 * (32 + 32)",
        "gpt2",
        why="A LoRA of it changes a whole layer.",
        cannot="'enable_lora' not in LoraConfig.__dataclass_fields__",
    ),
    Task(
        "LoRA on a model in 4 bits (QLoRA)",
        'delta = dk.attach(model, dk.LoRA(r=4, at="@block"))',
        "model = prepare_model_for_kbit_training(model)\n"
        'model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))',
        f"learn(model) and {CHANGED}",
        "4 bits",
    ),
    Task(
        "several methods in one adapter (LoRA and a prefix)",
        "delta = dk.attach(model, dk.LoRA(r=4), dk.Prefix(tokens=3))",
        None,
        "delta.num_parameters == trained(model) and len(delta.methods) == 2",
        why="A mixed model takes no prefixes.",
        cannot="raises(ValueError, lambda: get_peft_model(model, PrefixTuningConfig(num_virtual_tokens=3), mixed=True))",
    ),
    Task(
        "a start from the training data (EVA)",
        'delta = dk.attach_from_data(model, dk.LoRA(r=2, at="{q,v}_proj"), run=lambda: model(**batch))',
        'settings = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights="eva", eva_config=EvaConfig())\n'
        "model = get_peft_model(model, settings, low_cpu_mem_usage=True)\n"
        "initialize_lora_eva_weights(model, dataloader=[batch])",
        "trained(model) > 0",
    ),
    Task(
        "see the model with its adapters",
        "print(dk.show(model))",
        "print(model)",
        '"q_proj (Linear)" in printed and "+lora" in printed or "lora_A" in printed',
        before=ON,
    ),
    Task(
        "see where an adapter would go before you attach it",
        'print(dk.plan(model, dk.LoRA(r=4, at="q_proj")))',
        'copied = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, target_modules=["q_proj"]))\n'
        "print(copied.targeted_module_names)",
        '"q_proj" in printed and "v_proj" not in printed and trained(model) == trained(fresh("llama"))',
    ),
    Task("count what is trained", "print(delta)", "model.print_trainable_parameters()", "'896' in printed", before=ON),
    Task(
        "compute the model's own outputs for a while, as DPO's reference",
        "with delta.detached(), torch.no_grad():\n    reference = logits(model)",
        "with model.disable_adapter(), torch.no_grad():\n    reference = logits(model)",
        f"torch.equal(reference, original) and {CHANGED}",
        before=f"{ON}\nlearn(model)",
    ),
    Task(
        "remove an adapter, with the original outputs afterwards",
        "delta.detach()",
        "model = model.unload()",
        'torch.equal(logits(model), original) and model.state_dict().keys() == fresh("llama").state_dict().keys()',
        before=f"{ON}\nlearn(model)",
    ),
    Task(
        "put a removed adapter back",
        "delta.detach()\ndelta.attach()",
        'model.save_pretrained("out")\nmodel = PeftModel.from_pretrained(model.unload(), "out")',
        "close(logits(model), after)",
        before=f"{ON}\n{LEARNT}",
    ),
    Task(
        "save what was trained, and load it on a fresh model",
        'delta.save("out")\ndelta = dk.load("out", other)',
        'model.save_pretrained("out")\nother = PeftModel.from_pretrained(other, "out")',
        "close(logits(other), after)",
        before=f"{ON}\n{LEARNT}\nother = fresh('llama')",
    ),
    Task(
        "continue to train a saved adapter",
        'delta = dk.load("ours", model)',
        'model = PeftModel.from_pretrained(model, "peft", is_trainable=True)',
        "trained(model) > 0 and learn(model) and not close(logits(model), after)",
        before=f"if side == 'PEFT': {PEFT_FILE}\nelse: {OUR_FILE}",
    ),
    Task(
        "checkpoints of transformers' Trainer with what was trained only",
        "delta = dk.attach(model, dk.LoRA(r=4))\ntrainer = tf.Trainer(model, settings, train_dataset=data)",
        'model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))\n'
        "trainer = tf.Trainer(model, settings, train_dataset=data)",
        'trainer.train() and largest("checkpoints") < 20_000',
        before="settings, data = trainer_settings()",
    ),
    Task(
        "switch between tasks",
        'dk.use(model, "b")',
        'model.set_adapter("b")',
        "not close(logits(model), first)",
        before=f"{TWO}\nif side == 'deltakit': dk.use(model, 'a')\nfirst = logits(model)",
    ),
    Task(
        "three tasks in one batch: two adapters and none",
        'with dk.rows(model, ["a", "b", None]):\n    found = model(**three).logits',
        'found = model(**three, adapter_names=["a", "b", "__base__"]).logits',
        "close(found[2], base[2]) and not close(found[0], base[0]) and not close(found[1], base[1])",
        before=f"base = model.eval()(**three).logits\n{TWO}\nmodel.eval()",
    ),
    Task(
        "three tasks in one batch of training",
        'with dk.rows(model, ["a", "b", None]):\n    model.train()(**three, labels=three["input_ids"]).loss.backward()',
        None,
        "all(value.grad is not None for value in [*a.parameters(), *b.parameters()])",
        before=TWO,
        why="`adapter_names` are refused in training.",
        cannot='raises(ValueError, lambda: model.train()(**three, adapter_names=["a", "b", "__base__"]))',
    ),
    Task(
        "a weighted sum of two adapters",
        'mix, error = dk.combine(model, {"a": 0.7, "b": 0.3}, name="mix")\nmix.attach()\ndk.use(model, "mix")',
        'model.add_weighted_adapter(["a", "b"], [0.7, 0.3], "mix", combination_type="cat")\nmodel.set_adapter("mix")',
        f"{CHANGED} and not close(logits(model), first)",
        before=f"{TWO}\nif side == 'deltakit': dk.use(model, 'a')\nfirst = logits(model)",
    ),
    Task(
        "merge into a plain model",
        "plain = delta.merge_and_unload()",
        "plain = model.merge_and_unload()",
        "type(plain) is tf.LlamaForCausalLM and close(logits(plain), after)",
        before=f"{ON}\n{LEARNT}",
    ),
    Task(
        "read an adapter of PEFT, and write one",
        'delta = dk.load("peft", model)\ndelta.save("again", format="peft")',
        'model = PeftModel.from_pretrained(model, "peft")\nmodel.save_pretrained("again")',
        'close(logits(PeftModel.from_pretrained(fresh("llama"), "again")), after)',
        before=PEFT_FILE,
    ),
    Task(
        "load a checkpoint of the base model while an adapter is attached",
        "model.load_state_dict(base)",
        "set_base_model_state_dict(model, base)",
        "trained(model) == 896 and close(logits(model), after)",
        before=f"whole = fresh('llama')\n{LEARNT.replace('model', 'whole')}\nbase = whole.state_dict()\n{ON}",
    ),
)
