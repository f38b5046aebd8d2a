"""`save_pretrained` of a model with deltas: the backbone as it is without them, and the deltas beside it."""

import copy
import inspect
import pickle
import threading

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import nn

import deltakit as dk
from deltakit.core import without_deltas
from support.models import Transformer, ids, randomize, same, snapshot
from support.tiny_transformers import build

BATCH = torch.tensor([[5, 6, 7, 11]])


def bert():
    return build("bert", tf.AutoModelForSequenceClassification)


def attached(model, *methods, train=(), **options):
    return randomize(dk.attach(model, *(methods or (dk.LoRA(r=3),)), train=train, **options))


def values(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_the_folder_has_the_bare_backbone_and_the_delta(tmp_path):
    model = bert()
    before, state = snapshot(model), values(model)
    delta = attached(model, dk.LoRA(r=3), dk.BitFit(at="@ff.up"), train="@head")
    expected = model(BATCH).logits
    model.save_pretrained(tmp_path)
    again, info = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    dk.load(tmp_path, again)
    assert torch.equal(again.eval()(BATCH).logits, expected)
    assert "delta_lora" in " ".join(model.state_dict())
    delta.detach()
    same(before, snapshot(model))


@pytest.mark.parametrize("made", [dk.merged_state_dict, dk.base_state_dict])
def test_a_state_dict_without_the_delta(made, tmp_path):
    model = bert()
    delta = attached(model)
    with pytest.raises(
        dk.StateError, match=r"has no tensors of delta 'delta', .*; omit state_dict=, .*merge_and_unload"
    ):
        model.save_pretrained(tmp_path / "given", state_dict=made(model))
    assert not (tmp_path / "given").exists()
    expected = model(BATCH).logits
    delta.merge_and_unload().save_pretrained(tmp_path)
    again = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(BATCH).logits, expected)


@pytest.mark.parametrize("kind", ["gpt2", "mixtral", "t5"])
def test_tied_weights_and_converted_experts(kind, tmp_path):
    auto = tf.AutoModelForSeq2SeqLM if kind == "t5" else tf.AutoModelForCausalLM
    model = build(kind, auto)
    state = values(model)
    attached(model, dk.LoRA(r=2, at="mlp.experts.down_proj") if kind == "mixtral" else dk.LoRA(r=2))
    model.save_pretrained(tmp_path)
    again, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    dk.load(tmp_path, again)
    inputs = {"input_ids": BATCH} | ({"decoder_input_ids": BATCH} if kind == "t5" else {})
    assert torch.equal(again.eval()(**inputs).logits, model(**inputs).logits)


def test_several_deltas_have_a_folder_each(tmp_path):
    model = bert()
    attached(model, dk.LoRA(r=3), name="one")
    attached(model, dk.LoRA(r=2), name="two", train="@head")
    model.save_pretrained(tmp_path)
    again = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    for read in (lambda folder: dk.load(folder, again), dk.inspect):
        with pytest.raises(dk.CheckpointError, match="no delta here, but in folders below: one, two; pass one.*/one$"):
            read(tmp_path)
    for name in ("one", "two"):
        dk.load(tmp_path / name, again)
    assert torch.equal(again(BATCH).logits, model(BATCH).logits)
    dk.deltas(model)[0].detach()
    model.save_pretrained(tmp_path / "less")
    dk.attach(model, dk.BitFit(at="@ff.up"), name="three", train=())
    with pytest.raises(
        dk.CheckpointError, match="less: a delta of an earlier save is here.*remove it, or save to another"
    ):
        model.save_pretrained(tmp_path / "less")


def test_deltas_of_an_earlier_save_are_refused_before_anything_is_written(tmp_path):
    model = bert()
    one, two = (attached(model, dk.LoRA(r=r), name=name) for r, name in ((3, "one"), (2, "two")))
    one.save(tmp_path / "several" / "two", format="peft")
    with pytest.raises(dk.CheckpointError, match="'peft' is here already"):
        model.save_pretrained(tmp_path / "several")
    assert not (tmp_path / "several" / "config.json").exists()
    model.save_pretrained(tmp_path / "both")
    model.save_pretrained(tmp_path / "both")
    two.detach()
    one.save(tmp_path / "single", format="peft")
    with pytest.raises(dk.CheckpointError, match="'peft' is here already.*another folder"):
        model.save_pretrained(tmp_path / "single")
    assert not (tmp_path / "single" / "config.json").exists()
    with pytest.raises(
        dk.CheckpointError, match="both: a delta of an earlier save is here: one/, two/, and would stay"
    ):
        model.save_pretrained(tmp_path / "both")
    attached(model, dk.BitFit(at="@ff.up"), name="three")
    with pytest.raises(dk.CheckpointError, match="both: a delta of an earlier save is here: two/, and would stay"):
        model.save_pretrained(tmp_path / "both")
    # Folders that the user named otherwise stay.
    one.save(tmp_path / "mine" / "best")
    model.save_pretrained(tmp_path / "mine")


# PEFT reads an attribute that transformers has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("way", ["add_adapter", "get_peft_model"])
def test_an_adapter_of_peft_is_saved_alone(way, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["key"], init_lora_weights=False)

    def with_adapter():
        model = bert()
        if way == "get_peft_model":
            return peft.get_peft_model(model, config)
        model.add_adapter(config)
        return model

    model = with_adapter()
    delta = attached(model, dk.LoRA(r=3, at="query"), freeze=False)
    for name in ("model", "checkpoint-1"):
        with pytest.raises(dk.StateError, match=r"adapter of PEFT is on this .*delta\.save.*detach\(\).*attach\(\)"):
            model.save_pretrained(tmp_path / name)
        assert not (tmp_path / name).exists()
    expected = model(BATCH).logits
    delta.save(tmp_path / "delta")
    delta.detach()
    model.save_pretrained(tmp_path / "peft")
    delta.attach()
    assert torch.equal(model(BATCH).logits, expected)
    again = with_adapter()
    peft.set_peft_model_state_dict(again, load_file(tmp_path / "peft" / "adapter_model.safetensors"))
    dk.load(tmp_path / "delta", again)
    assert torch.equal(again(BATCH).logits, expected)


def test_a_merged_delta_is_in_the_weights(tmp_path):
    model = bert()
    delta = attached(model, dk.LoRA(r=3), train="@head").merge()
    model.save_pretrained(tmp_path)
    again = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(again(BATCH).logits, model(BATCH).logits)
    assert not (tmp_path / "delta_model.safetensors").exists()
    with pytest.raises(dk.StateError, match=r"'delta' is merged.*not resume.*merge_and_unload\(\).*or unmerge\(\)"):
        model.save_pretrained(tmp_path / "checkpoint-1")
    assert not (tmp_path / "checkpoint-1").exists()
    delta.unmerge().detach()
    assert "save_pretrained" not in vars(model)


def test_a_part_is_saved_without_the_delta_of_the_whole(tmp_path):
    model = bert()
    state = values(model.bert)
    delta = attached(model, dk.LoRA(r=3), train=["pooler", "@head"])
    expected = model(BATCH).logits
    with pytest.raises(
        dk.StateError, match=r"BertModel is a part of .* 'delta' is attached to.*delta\.save.*detach\(\).*attach\(\)"
    ):
        model.bert.save_pretrained(tmp_path / "part")
    assert "save_pretrained" not in vars(model.bert.encoder)
    delta.save(tmp_path / "delta")
    delta.detach()
    model.bert.save_pretrained(tmp_path / "part")
    delta.attach()
    assert torch.equal(model(BATCH).logits, expected)
    inner = tf.AutoModel.from_pretrained(tmp_path / "part")
    assert all(torch.equal(value, state[name]) for name, value in inner.state_dict().items())
    other = bert()
    dk.load(tmp_path / "delta", other)
    assert torch.equal(other(BATCH).logits, expected)
    # A merged delta is in the weights of the part.
    delta.merge()
    model.bert.save_pretrained(tmp_path / "merged")
    merged = tf.AutoModel.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(merged(BATCH).last_hidden_state, model.bert(BATCH).last_hidden_state)


class Holder(nn.Module):
    """Saves itself by the method of a module inside, as SentenceTransformer does."""

    def __init__(self):
        super().__init__()
        self.inner = bert().bert

    def forward(self, input_ids):
        return self.inner(input_ids).last_hidden_state

    def save_pretrained(self, path, safe_serialization=True):
        self.inner.save_pretrained(path, safe_serialization=safe_serialization)

    def save(self, path):
        self.inner.save_pretrained(path)


@pytest.mark.parametrize("method", ["save_pretrained", "save"])
def test_a_holder_saves_the_delta_once_by_its_own_paths(method, tmp_path):
    model = Holder()
    state = values(model.inner)
    attached(model, dk.LoRA(r=3), train="inner.pooler")
    getattr(model, method)(str(tmp_path))
    again = Holder()
    assert torch.equal(load_file(tmp_path / "model.safetensors")["pooler.dense.weight"], state["pooler.dense.weight"])
    dk.load(tmp_path, again)
    assert torch.equal(again(BATCH), model(BATCH))
    assert "safe_serialization" in inspect.signature(model.save_pretrained).parameters


def test_a_pipeline_saves_it(tmp_path):
    model = bert()
    attached(model, dk.LoRA(r=3))
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=_tokenizer(), unk_token="[UNK]", pad_token="[PAD]")
    tf.TextClassificationPipeline(model=model, tokenizer=tokenizer).save_pretrained(tmp_path)
    again = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    dk.load(tmp_path, again)
    assert torch.equal(again(BATCH).logits, model(BATCH).logits)


def _tokenizer():
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1}, unk_token="[UNK]"))


def test_an_attribute_of_the_user_comes_back(tmp_path):
    model, called = bert(), []

    def own(folder, **options):
        called.append((folder, options))
        return type(model).save_pretrained(model, folder, **options)

    model.save_pretrained = own
    delta = attached(model)
    model.save_pretrained(tmp_path, max_shard_size="1GB")
    assert called == [(tmp_path, {"max_shard_size": "1GB"})]
    assert not [key for key in load_file(tmp_path / "model.safetensors") if "delta" in key]
    assert (tmp_path / "delta_model.safetensors").exists()
    delta.detach()
    assert model.save_pretrained is own
    delta.attach()
    model.save_pretrained = own
    delta.detach()
    assert model.save_pretrained is own


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_save_themselves(copied, tmp_path):
    model = bert()
    attached(model, train="@head")
    other = copied(model)
    with torch.no_grad():
        for parameter in dk.deltas(other)[0].parameters():
            parameter.add_(0.5)
    for folder, saved in (("model", model), ("other", other)):
        saved.save_pretrained(tmp_path / folder)
        again = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / folder).eval()
        dk.load(tmp_path / folder, again)
        assert torch.equal(again(BATCH).logits, saved(BATCH).logits)
    alone = copied(model.bert)
    with pytest.raises(dk.StateError, match="classifier.*it is no longer in the backbone; saving is not possible then"):
        alone.save_pretrained(tmp_path / "alone")
    dk.deltas(other)[0].detach()
    assert "save_pretrained" not in {**vars(other), **vars(other.bert)}
    assert "save_pretrained" in vars(model)


def test_a_module_that_was_taken_out_loses_it_too():
    model = bert()
    delta = attached(model)
    old, model.bert = model.bert, copy.deepcopy(model.bert)
    delta.detach()
    assert "save_pretrained" not in vars(old)


def test_the_state_dict_of_an_engine(tmp_path):
    model = bert()
    state = values(model)
    attached(model, dk.LoRA(r=3), train="@head")
    given = dict(model.state_dict())
    model.save_pretrained(tmp_path, True, given)
    model.save_pretrained(tmp_path / "other", is_main_process=False, state_dict=given)
    again = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    dk.load(tmp_path, again)
    assert torch.equal(again.eval()(BATCH).logits, model(BATCH).logits)
    assert not list((tmp_path / "other").glob("*delta*"))
    assert "classifier.weight" in given


def test_another_thread_still_sees_everything():
    model = bert()
    attached(model, train="@head")
    found = {}
    with without_deltas():
        thread = threading.Thread(target=lambda: found.update(model.state_dict()))
        thread.start()
        thread.join()
        here = model.state_dict()
    assert found.keys() == model.state_dict().keys() != here.keys()


def test_uploading_while_saving_is_refused(tmp_path):
    model = bert()
    attached(model)
    with pytest.raises(
        dk.StateError, match=r"would upload the model without its deltas; call model.push_to_hub\(repository\)"
    ):
        model.save_pretrained(tmp_path, push_to_hub=True)
    with pytest.raises(dk.OptionError, match="no folder was given"):
        model.save_pretrained(None)
    assert not list(tmp_path.iterdir())


def test_what_delta_save_refuses_is_refused_before_anything_is_written(tmp_path):
    model = bert()
    attached(model).scale = 0.5
    with pytest.raises(dk.StateError, match="scale"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_plain_modules_get_nothing():
    model = Transformer()
    attached(model)
    model(ids())
    assert "save_pretrained" not in vars(model)
