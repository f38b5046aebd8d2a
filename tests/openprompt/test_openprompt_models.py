"""OpenPrompt's loaders and models, and `import openprompt`."""

import sys

import pytest
import torch

import deltakit as dk
import deltakit.openprompt
from deltakit.errors import OptionError, StateError
from deltakit.openprompt import PromptDataLoader, PromptForClassification
from deltakit.openprompt.data_utils import FewShotSampler, InputExample, InputFeatures
from deltakit.openprompt.plms import LMTokenizerWrapper, MLMTokenizerWrapper, T5TokenizerWrapper, load_plm
from deltakit.openprompt.prompts import ManualTemplate, ManualVerbalizer, MixedTemplate, ProtoVerbalizer, SoftTemplate
from deltakit.openprompt.utils.calibrate import calibrate
from deltakit.openprompt.utils.reproduciblity import set_seed
from support.prompt_models import TOKENIZER_OF, model_of, tokenizer_of

EXAMPLES = [
    InputExample(guid=0, text_a="a film to remember", label=0),
    InputExample(guid=1, text_a="the plot was boring, bad and awful", label=1),
    InputExample(guid=2, text_a="great", label=0),
]
WRAPPERS = {
    "bert": MLMTokenizerWrapper,
    "gpt2": LMTokenizerWrapper,
    "t5": T5TokenizerWrapper,
    "bart": T5TokenizerWrapper,
}
TEXTS = {
    "manual": '{"placeholder": "text_a"} It was {"mask"}',
    "mixed": '{"soft"} {"placeholder": "text_a"} {"soft": "It was"} {"mask"}',
    "soft": '{"placeholder": "text_a"} It was {"mask"}',
}


def made(kind, template="manual", **options):
    """A model, and a loader with one batch."""
    tokenizer, plm = tokenizer_of(TOKENIZER_OF[kind]), model_of(kind)
    templates = {
        "manual": lambda: ManualTemplate(tokenizer, TEXTS[template]),
        "mixed": lambda: MixedTemplate(plm, tokenizer, TEXTS[template]),
        "soft": lambda: SoftTemplate(plm, tokenizer, TEXTS[template], num_tokens=3),
    }
    own = templates[template]()
    verbalizer = ManualVerbalizer(tokenizer, num_classes=2, label_words=[["good", "great"], ["bad"]])
    loader = PromptDataLoader(EXAMPLES, own, None, tokenizer, WRAPPERS[kind], max_seq_length=37, batch_size=3)
    return PromptForClassification(plm, own, verbalizer, **options).eval(), loader


@pytest.mark.parametrize(
    ("kind", "template"),
    [(kind, template) for kind in WRAPPERS for template in TEXTS],
)
def test_scores_are_those_of_the_full_logits(kind, template):
    model, loader = made(kind, template)
    (batch,) = loader
    assert batch["label"].tolist() == [0, 1, 0]
    assert batch.guid.tolist() == [0, 1, 2]
    scores, full = model(batch), model.prompt_model(batch).logits
    places = [row.index(1) for row in batch["loss_ids"].tolist()]
    added = 3 if template == "soft" and kind in ("bert", "gpt2") else 0
    at_slot = torch.stack([full[row, place + added] for row, place in enumerate(places)])
    torch.testing.assert_close(model.forward_without_verbalize(batch), at_slot)
    torch.testing.assert_close(scores, model.verbalizer.process_logits(at_slot))
    assert scores.shape == (3, 2)
    # Padding, also where it is not cut, changes nothing; neither do the other examples of the batch.
    one = InputFeatures.collate_fct([loader.tensor_dataset[2]])
    torch.testing.assert_close(model(one), scores[2:])
    model.zero_grad()
    torch.nn.functional.cross_entropy(scores, batch["label"]).backward()
    for name, parameter in model.template.named_parameters():
        moved = parameter.grad.abs().sum(-1) > 0
        assert moved.tolist() == [not (template == "mixed" and row == 0) for row in range(len(parameter))], name


def test_soft_tokens_stand_where_the_template_has_them():
    model, loader = made("bert", "mixed")
    (batch,) = loader
    template, soft = model.template, batch["soft_token_ids"]
    words = model.plm.get_input_embeddings().weight
    rows = [
        torch.stack([template.soft_embedding.weight[s] if s else words[i] for i, s in zip(ids, own, strict=True)])
        for ids, own in zip(batch["input_ids"].tolist(), soft.tolist(), strict=True)
    ]
    expected = model.plm(inputs_embeds=torch.stack(rows), attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(model.prompt_model(batch).logits, expected)


def test_only_the_slots_reach_the_head(monkeypatch):
    model, loader = made("t5")
    head, seen = model.plm.get_output_embeddings(), []
    head.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    model(next(iter(loader)))
    assert seen == [(3, 1, 28)]


def test_deltas_compose_and_are_removed_again():
    model, loader = made("t5", freeze_plm=True)
    (batch,) = loader
    before = model(batch)
    delta = dk.attach(model.plm, dk.LoRA(r=2))
    assert torch.equal(model(batch), before)
    optimizer = torch.optim.AdamW(delta.parameters(), lr=1e-2)
    for _ in range(8):
        loss = torch.nn.functional.cross_entropy(model(batch), batch["label"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < torch.nn.functional.cross_entropy(before, batch["label"])
    delta.detach()
    assert torch.equal(model(batch), before)


def test_frozen_and_evaluated():
    model, _ = made("bert", "mixed", freeze_plm=True)
    assert {name for name, one in model.named_parameters() if one.requires_grad} == {
        "prompt_model.template.soft_embedding.weight"
    }
    model.train()
    assert model.plm.training
    model, _ = made("bert", plm_eval_mode=True)
    model.train()
    assert model.training
    assert model.verbalizer.training
    assert not any(module.training for module in model.plm.modules())
    assert not any(one.requires_grad for one in model.plm.parameters())


def test_different_numbers_of_slots_are_refused():
    model, _ = made("bert")
    tokenizer = tokenizer_of("wordpiece")
    wrapper = MLMTokenizerWrapper(max_seq_length=9, tokenizer=tokenizer)
    rows = [
        InputFeatures(**wrapper.tokenize_one_example(ManualTemplate(tokenizer, text).wrap_one_example(EXAMPLES[2])))
        for text in ('{"mask"}', '{"mask"} {"mask"}')
    ]
    with pytest.raises(OptionError, match="the examples of a batch have \\[1, 2\\] slots; expected as many in each"):
        model(InputFeatures.collate_fct([row.to_tensor() for row in rows]))


def test_calibration():
    model, loader = made("gpt2")
    (batch,) = loader
    logits = calibrate(model, loader)
    torch.testing.assert_close(logits, model.forward_without_verbalize(batch).mean(0))
    before = model(batch)
    model.verbalizer.register_calibrate_logits(logits)
    assert not torch.allclose(model(batch), before)
    with pytest.raises(OptionError, match="calibrate: the dataloader has no batches"):
        calibrate(model, [])


def test_prototypes_are_trained():
    model, loader = made("bert")
    words = [["good"], ["bad"]]
    model.verbalizer = ProtoVerbalizer(
        model.tokenizer, model.plm, num_classes=2, label_words=words, epochs=30, multi_verb="proto", lr=3e-2
    )
    model.train()
    model.verbalizer.train_proto(model, loader)
    assert model.training
    (batch,) = loader
    assert model.eval()(batch).argmax(1).tolist() == [0, 1, 0]
    with pytest.raises(OptionError, match="train_proto: the dataloader has no batches"):
        model.verbalizer.train_proto(model, [])


def test_loaders():
    model, loader = made("bert")
    assert len(loader) == 1
    assert len(loader.wrapped_dataset) == 3
    with pytest.raises(OptionError, match="nothing says how to tokenize; pass tokenizer= and tokenizer_wrapper_class="):
        PromptDataLoader(EXAMPLES, model.template)
    with pytest.raises(OptionError, match="the dataset is empty"):
        PromptDataLoader([], model.template, tokenizer_wrapper=loader.tokenizer_wrapper)


def test_features_are_a_dict_with_attributes():
    found = InputFeatures(input_ids=[1, 2], label=1, guid="a", mine=[3], loss_ids=None).to_tensor().to("cpu")
    assert list(found) == ["input_ids", "label", "guid", "mine"]
    assert found.loss_ids is None
    assert found.input_ids.tolist() == [1, 2]
    found.label = torch.tensor(0)
    assert found["label"] == 0
    assert found.to_dict(keep_none=True)["inputs_embeds"] is None
    assert type(found)({"label": 1}).label == 1
    with pytest.raises(
        OptionError, match="only some examples of the batch have guid, input_ids, mine; give all of them"
    ):
        InputFeatures.collate_fct([found, InputFeatures(label=torch.tensor(1))])
    with pytest.raises(AttributeError, match="InputFeatures has no 'lable', only input_ids"):
        _ = found.lable


def test_examples_are_saved_and_loaded(tmp_path):
    InputExample.save_examples(EXAMPLES, str(tmp_path / "examples"))
    assert InputExample.load_examples(str(tmp_path / "examples"))[1].to_dict() == EXAMPLES[1].to_dict()


def test_few_shot_samples():
    data = [InputExample(guid=number, label=number % 3) for number in range(23)]
    sampler = FewShotSampler(num_examples_per_label=2, also_sample_dev=True)
    train, dev = sampler(data, seed=5)
    for found in (train, dev):
        assert sorted(one.label for one in found) == [0, 0, 1, 1, 2, 2]
    assert not {one.guid for one in train} & {one.guid for one in dev}
    assert [one.guid for one in sampler(data, seed=5)[0]] == [one.guid for one in train]
    assert len(FewShotSampler(num_examples_total=5)(data)) == 5
    assert FewShotSampler(num_examples_total=5)(data, dev)[1] == dev
    with pytest.raises(OptionError, match="pass num_examples_total or num_examples_per_label, and not both"):
        FewShotSampler()
    with pytest.warns(dk.DeltaWarning, match="the label 2 has 7 examples left, fewer than 8"):
        FewShotSampler(num_examples_per_label=8)(data)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "bart"])
@pytest.mark.parametrize("name", ["openprompts", "another"])
def test_load_plm(kind, name, tmp_path):
    model_of(kind).save_pretrained(tmp_path)
    tokenizer_of(TOKENIZER_OF[kind]).save_pretrained(tmp_path)
    plm, tokenizer, config, wrapper = load_plm(kind if name == "openprompts" else "new", str(tmp_path))
    assert type(plm) is type(model_of(kind))
    assert wrapper is WRAPPERS[kind]
    assert config.model_type == kind
    assert tokenizer.get_vocab() == tokenizer_of(TOKENIZER_OF[kind]).get_vocab()


def test_load_plm_adds_a_token_for_padding(tmp_path):
    own = tokenizer_of("bpe")
    model_of("gpt2", own).resize_token_embeddings(len(own), mean_resizing=False)
    plm = model_of("gpt2")
    plm.resize_token_embeddings(len(own), mean_resizing=False)
    plm.save_pretrained(tmp_path)
    own.save_pretrained(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(config.read_text(encoding="utf-8").replace('"pad_token"', '"_"'), encoding="utf-8")
    plm, tokenizer, _, _ = load_plm("gpt2", str(tmp_path), specials_to_add=["<padding>"])
    assert tokenizer.pad_token == "<padding>"
    assert plm.get_input_embeddings().num_embeddings == len(tokenizer) == len(own) + 1


@pytest.fixture
def openprompt(monkeypatch):
    """`import openprompt` is deltakit's, until the test ends."""
    before = set(sys.modules)
    deltakit.openprompt.install()
    yield
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == "openprompt":
            del sys.modules[name]


@pytest.mark.usefixtures("openprompt")
def test_install_serves_imports():
    names = {}
    exec(
        "from openprompt import PromptDataLoader, PromptForClassification, Template, Verbalizer\n"
        "from openprompt.data_utils import InputExample\n"
        "from openprompt.data_utils.utils import InputFeatures\n"
        "from openprompt.data_utils.data_sampler import FewShotSampler\n"
        "from openprompt.plms import load_plm, T5TokenizerWrapper\n"
        "from openprompt.plms.seq2seq import T5LMTokenizerWrapper\n"
        "from openprompt.prompts import ManualTemplate, ManualVerbalizer\n"
        "from openprompt.utils.reproduciblity import set_seed\n",
        names,
    )
    assert names["PromptForClassification"] is PromptForClassification
    assert names["ManualTemplate"] is ManualTemplate
    deltakit.openprompt.install()


def test_install_beside_openprompt_itself(monkeypatch):
    monkeypatch.setitem(sys.modules, "openprompt", sys)
    with pytest.raises(
        StateError, match="openprompt is imported already; call deltakit.openprompt.install\\(\\) before"
    ):
        deltakit.openprompt.install()


def test_names_that_are_not_served():
    with pytest.raises(
        OptionError, match="openprompt.PromptForGeneration is not served; call generate on the backbone"
    ):
        from deltakit.openprompt import PromptForGeneration  # noqa: F401
    with pytest.raises(OptionError, match="PTRVerbalizer is not served; use deltakit.prompting.RuleVerbalizer"):
        from deltakit.openprompt.prompts import PTRVerbalizer  # noqa: F401
    with pytest.raises(ImportError, match="cannot import name 'Nothing'"):
        from deltakit.openprompt import Nothing  # noqa: F401


def test_seeds():
    set_seed(5)
    first = torch.rand(3)
    set_seed(5)
    assert torch.equal(torch.rand(3), first)
    set_seed()
