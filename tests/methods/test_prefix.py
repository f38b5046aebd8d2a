"""Prefix tuning against attention written out in float64, against PEFT, and in everything that models do with attention."""

import copy
import pickle

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import nn
from torch.overrides import _get_current_function_mode
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

import deltakit as dk
from support.backbone_inputs import hidden, inputs
from support.models import Transformer, ids, randomize
from support.tiny_transformers import CONFIGS, build

INTERFACE = [kind for kind in CONFIGS if kind not in ("deberta-v2", "gptj", "bloom", "falcon", "gemma2")]
GENERATE = ["gpt2", "gpt_neox", "opt", "bloom", "gptj", "llama", "qwen2", "gemma", "mixtral", "t5", "bart"]


def attached(model, **options):
    delta = dk.attach(model, dk.Prefix(tokens=3, **options))
    randomize(delta, 1.0)
    return delta


@pytest.mark.parametrize("kind", CONFIGS)
def test_everywhere_effect_gradients_and_exact_detach(kind):
    model = build(kind)
    batch = inputs(kind, model)
    before = hidden(model(**batch))
    delta = attached(model)
    output = hidden(model(**batch))
    assert (output - before).abs().max() > 1e-3
    output.float().square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in delta.parameters())
    delta.detach()
    assert torch.equal(hidden(model(**batch)), before)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("kind", INTERFACE)
def test_equals_attention_written_out(kind, padding, monkeypatch):
    # Mixtral's experts have no float64 kernel.
    model = build(kind).double() if kind != "mixtral" else build(kind)
    model.set_attn_implementation("sdpa")
    batch = inputs(kind, model, padding=padding)
    delta = attached(model)
    ours = hidden(model(**batch))
    prefixes = {id(model.get_submodule(path)): found[0].key_value() for path, found in delta.modules.items()}
    delta.detach()
    seen = []

    def written_out(module, query, key, value, mask, scaling=None, position_bias=None, **kwargs):
        seen.append(module)
        front_key, front_value = prefixes[id(module)]
        groups = query.shape[1] // key.shape[1]
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        own = query @ key.transpose(-1, -2) * scale
        if position_bias is not None:
            own = own + position_bias
        is_causal = kwargs.get("is_causal", getattr(module, "is_causal", True))
        if mask is None and is_causal and query.shape[2] > 1:
            mask = torch.ones(own.shape[-2:], dtype=torch.bool).tril()
        if mask is not None:
            own = own.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else own + mask
        front = query @ front_key.repeat_interleave(groups, 0).transpose(-1, -2) * scale
        weights = torch.cat([front, own], -1).softmax(-1)
        split = front.shape[-1]
        out = weights[..., :split] @ front_value.repeat_interleave(groups, 0) + weights[..., split:] @ value
        return out.transpose(1, 2).contiguous(), None

    monkeypatch.setitem(tf.AttentionInterface._global_mapping, "written_out", written_out)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "written_out", sdpa_mask)
    model.set_attn_implementation("written_out")
    tolerance = 1e-9 if kind != "mixtral" else 1e-4
    torch.testing.assert_close(ours, hidden(model(**batch)), rtol=tolerance, atol=tolerance)
    assert set(map(id, seen)) == set(prefixes)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("kind", ["gptj", "falcon"])
def test_models_outside_the_interface_attend_over_a_cache_of_the_same_values(kind, padding):
    """A prefix is a cache without positions; these models take theirs from `position_ids`."""
    model = build(kind).double()
    batch = inputs(kind, model, padding=padding)
    delta = attached(model)
    ours = model(**batch).last_hidden_state
    cache = tf.DynamicCache()
    for layer, (found,) in enumerate(delta.modules.values()):
        key, value = (part.detach().expand(2, -1, -1, -1) for part in found.key_value())
        cache.update(key, value, layer)
    delta.detach()
    mask = torch.cat([torch.ones(2, 3, dtype=torch.long), batch["attention_mask"]], 1)
    positions = torch.arange(7).expand(2, -1)
    theirs = model(batch["input_ids"], attention_mask=mask, past_key_values=cache, position_ids=positions)
    seen = batch["attention_mask"].bool()
    torch.testing.assert_close(ours[seen], theirs.last_hidden_state[seen], rtol=1e-9, atol=1e-9)


def test_bloom_equals_attention_written_out():
    attention = build("bloom").double().h[0].self_attention
    x, alibi = torch.randn(2, 5, 24, dtype=torch.float64), torch.randn(8, 1, 5, dtype=torch.float64)
    mask = torch.zeros(1, 1, 5, 5, dtype=torch.float64).masked_fill(torch.ones(5, 5).triu(1).bool(), -1e9)
    attached(nn.ModuleDict({"attention": attention}))
    out, _ = attention(x, torch.zeros_like(x), alibi=alibi, attention_mask=mask)
    key, value = attention.delta_prefix.key_value()
    q, k, v = attention.query_key_value(x).unflatten(-1, (4, 3, 6)).permute(3, 0, 2, 1, 4)
    own = q @ k.transpose(-1, -2) * 6**-0.5 + alibi.view(2, 4, 1, 5) + mask
    front = q @ key.transpose(-1, -2) * 6**-0.5
    mixed = torch.cat([front, own], -1).softmax(-1) @ torch.cat([value.expand(2, -1, -1, -1), v], -2)
    # BLOOM takes its softmax in float32.
    torch.testing.assert_close(out, attention.dense(mixed.transpose(1, 2).flatten(2)), rtol=1e-6, atol=1e-6)


# PEFT 0.21's own use of a name that transformers is about to rename.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_equals_peft_where_positions_are_shifted_as_peft_does(kind):
    model = build(kind, tf.AutoModelForCausalLM).double()
    batch = inputs(kind, model, padding="none")
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    other = peft.get_peft_model(copy.deepcopy(model), config).eval().double()
    delta = attached(model)
    rows = torch.stack([part.transpose(0, 1).flatten(1) for (m,) in delta.modules.values() for part in m.key_value()])
    with torch.no_grad():
        other.prompt_encoder["default"].embedding.weight.copy_(rows.transpose(0, 1).flatten(1))
    positions = torch.arange(7).expand(2, -1) + 3
    ours = model(**batch, position_ids=positions).logits
    torch.testing.assert_close(ours, other(**batch).logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", GENERATE)
def test_generates_with_a_cache_as_without(kind):
    encoder_decoder = kind in ("t5", "bart")
    model = build(kind, tf.AutoModelForSeq2SeqLM if encoder_decoder else tf.AutoModelForCausalLM)
    batch = {k: v for k, v in inputs(kind, model).items() if k != "decoder_input_ids"}
    attached(model)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "output_scores": True}
    runs = [
        model.generate(**batch, **settings, use_cache=cache, return_dict_in_generate=True) for cache in (True, False)
    ]
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    torch.testing.assert_close(torch.stack(runs[0].scores), torch.stack(runs[1].scores), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["bert", "llama", "bloom", "t5"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(kind, reentrant):
    model = build(kind)
    batch = inputs(kind, model)
    delta = attached(model)
    hidden(model(**batch)).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in delta.parameters()]
    model.zero_grad()
    for module in model.modules():
        module.p = 0.0 if isinstance(module, nn.Dropout) else getattr(module, "p", None)
    model.train()
    model.config.use_cache = False
    model._set_gradient_checkpointing(
        enable=True,
        gradient_checkpointing_func=__import__("functools").partial(
            torch.utils.checkpoint.checkpoint, use_reentrant=reentrant
        ),
    )
    for module in model.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    hidden(model(**batch)).square().sum().backward()
    for parameter, gradient in zip(delta.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5)


def reference(q, k, v, front_key, front_value, mask=None):
    scores = q @ torch.cat([front_key.expand(*k.shape[:-2], -1, -1), k], -2).transpose(-1, -2) / q.shape[-1] ** 0.5
    if mask is not None:
        scores[..., front_key.shape[-2] :].masked_fill_(~mask, -torch.inf)
    return scores.softmax(-1) @ torch.cat([front_value.expand(*v.shape[:-2], -1, -1), v], -2)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention(need_weights, batch_first):
    attention = nn.MultiheadAttention(12, 3, batch_first=batch_first).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    given = x if batch_first else x.transpose(0, 1)
    hidden_keys = torch.zeros(2, 5, dtype=torch.bool)
    hidden_keys[0, 3:] = True
    attached(attention)
    out, _ = attention(given, given, given, key_padding_mask=hidden_keys, need_weights=need_weights)
    key, value = attention.delta_prefix.key_value()
    q, k, v = (
        part.unflatten(-1, (3, 4)).transpose(1, 2)
        for part in F.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
    )
    wanted = attention.out_proj(reference(q, k, v, key, value, ~hidden_keys[:, None, None]).transpose(1, 2).flatten(2))
    torch.testing.assert_close(out if batch_first else out.transpose(0, 1), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("padded", [True, False])
def test_transformer_encoder_fast_path(padded):
    layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(2, 5, 12)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else None
    before = encoder(x, src_key_padding_mask=mask)
    delta = attached(encoder)
    with torch.no_grad():
        fast = encoder(x, src_key_padding_mask=mask)
    torch.testing.assert_close(fast, encoder(x, src_key_padding_mask=mask))
    assert not torch.allclose(fast, before)
    delta.detach()
    assert torch.equal(encoder(x, src_key_padding_mask=mask), before)


class Timm(nn.Module):
    """Attention as timm writes it: fused, or with a softmax and the `@` operator."""

    def __init__(self, fused):
        super().__init__()
        self.num_heads, self.head_dim, self.fused_attn = 3, 4, fused
        self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x):
        q, k, v = self.qkv(x).reshape(2, 5, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused_attn:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = ((q * 4**-0.5) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        return self.proj(out.transpose(1, 2).reshape(2, 5, 12))


class TimmAttention(Timm):
    pass


@pytest.mark.parametrize("fused", [True, False])
def test_timm_like_attention(fused):
    attention = TimmAttention(fused).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    attached(attention)
    key, value = attention.delta_prefix.key_value()
    q, k, v = attention.qkv(x).reshape(2, 5, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
    wanted = attention.proj(reference(q, k, v, key, value).transpose(1, 2).reshape(2, 5, 12))
    torch.testing.assert_close(attention(x), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["bert", "bloom"])
def test_two_prefixes_are_one_after_the_other(kind):
    model = build(kind).double()
    batch = inputs(kind, model)
    one = attached(model)
    two = dk.attach(model, dk.Prefix(tokens=2), name="two")
    randomize(two, 1.0)
    both = hidden(model(**batch))
    states = [delta.state_dict() for delta in (one, two)]
    one.detach()
    two.detach()
    whole = dk.attach(model, dk.Prefix(tokens=5))
    whole.load_state_dict({name: torch.cat([state[name] for state in states], 1) for name in states[0]})
    torch.testing.assert_close(hidden(model(**batch)), both, rtol=1e-12, atol=1e-12)


def test_reparam_is_the_paper_s_mlp_and_is_dropped_at_save(tmp_path):
    model = Transformer().double().eval()
    fresh = copy.deepcopy(model)
    delta = dk.attach(model, dk.Prefix(tokens=3, reparam=True, hidden=11))
    modules = [found[0] for found in delta.modules.values()]
    shared = modules[0].shared
    rows = torch.tanh(shared.embedding @ shared.inner.weight.T + shared.inner.bias)
    for module in modules:
        key, value = module.key_value()
        flat = rows @ module.out.weight.T + module.out.bias
        torch.testing.assert_close(torch.cat([key, value], -1).transpose(0, 1).flatten(1), flat)
    model(ids()).square().sum().backward()
    assert all(parameter.grad is not None for parameter in delta.parameters())
    assert len(set(map(id, delta.parameters()))) == len(list(delta.parameters())) == 3 + 2 * 2
    twin = copy.deepcopy(model)
    with torch.no_grad():
        shared.embedding.add_(1.0)
    assert not torch.allclose(twin(ids()), model(ids()))
    delta.save(tmp_path)
    loaded = dk.load(tmp_path, fresh)
    assert {name.rpartition(".")[2] for name in loaded.state_dict()} == {"key", "value"}
    torch.testing.assert_close(fresh(ids()), model(ids()))
    delta.load_state_dict(loaded.state_dict())
    assert "reparam" not in repr(delta)


def test_starts_small():
    """Large keys at the start would take over the softmax of every head."""
    (one, _) = dk.attach(Transformer(), dk.Prefix(tokens=211)).modules.values()
    assert [p.std().item() for p in one[0].state_dict().values()] == pytest.approx([0.02, 0.02], rel=0.05)


def test_a_selected_container_gets_prefixes_in_all_attention_below():
    model = build("t5")
    delta = dk.attach(model, dk.Prefix(at="decoder"))
    assert list(delta.modules) == [
        f"decoder.block.{i}.layer.{j}.{name}"
        for i in (0, 1)
        for j, name in ((0, "SelfAttention"), (1, "EncDecAttention"))
    ]


def test_copies_keep_their_prefix_when_the_original_is_gone():
    model = build("bert")
    batch = inputs("bert", model)
    attached(model)
    output = hidden(model(**batch))
    twin, thawed = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    dk.deltas(model)[0].detach()
    del model
    assert torch.equal(hidden(twin(**batch)), output)
    assert torch.equal(hidden(thawed(**batch)), output)


def test_attention_weights_have_the_caller_s_length():
    model = build("bert")
    model.set_attn_implementation("eager")
    batch = inputs("bert", model)
    attached(model)
    weights = model(**batch, output_attentions=True).attentions[0]
    assert weights.shape == (2, 4, 7, 7)
    assert (weights.sum(-1) < 0.999).all()


class NoAttention(nn.Module):
    """Says attention, uses the names, and attends in a way of its own."""

    def __init__(self):
        super().__init__()
        self.num_heads = 2
        self.k_proj, self.v_proj = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return (
            torch.einsum("bqd,bkd->bqk", x, self.k_proj(x)).softmax(-1) @ self.v_proj(x)
            if x.ndim
            else torch.matmul(x, x)
        )


class OddAttention(NoAttention):
    pass


def test_attention_that_was_not_entered_is_an_error():
    model = OddAttention()
    delta = attached(model)
    with pytest.raises(dk.StateError, match="OddAttention: no attention was found in its forward"):
        model(torch.randn(2, 3, 6))
    assert not torch.overrides._get_current_function_mode()
    delta.detach()
    model(torch.randn(2, 3, 6))


@pytest.mark.parametrize(
    ("extra", "found"),
    [
        ({"indices": torch.zeros(1)}, "indices"),
        ({"cu_seq_lens_q": torch.zeros(1)}, "cu_seq_lens_q"),
        ({"attention_mask": object()}, "a mask of type object"),
    ],
)
def test_what_leaves_no_room_for_a_prefix_is_an_error(unchecked, extra, found):
    from deltakit.ops.attention.interface import attend

    model = build("bert")
    attached(model)
    module = model.encoder.layer[0].attention.self
    q = torch.zeros(1, 4, 2, 6)
    with pytest.raises(dk.StateError, match=f"BertSelfAttention: a prefix cannot be added to attention with {found}"):
        attend(lambda *a, **k: None, "sdpa", module, q, q, q, **extra)
    with pytest.raises(dk.StateError, match="sliding_window with flash attention"):
        attend(lambda *a, **k: None, "flash_attention_2", module, q, q, q, sliding_window=3)


@pytest.mark.parametrize(
    ("kind", "path", "sizes", "message"),
    [
        (
            "bert",
            "encoder.layer.0.attention.self",
            (4, 3, 5),
            r"SelfAttention: .* for 4 heads of size 5 does not fit .* \(2, 4, 7, 6\)",
        ),
        (
            "bloom",
            "h.0.self_attention",
            (3, 3, 6),
            r"BloomAttention: .* for 3 heads of size 6 does not fit .* \(8, 7, 6\)",
        ),
    ],
)
def test_heads_that_do_not_fit_are_an_error(unchecked, kind, path, sizes, message):
    model = build(kind)
    delta = attached(model)
    (module,) = delta.modules[path]
    with torch.no_grad():
        module.key = nn.Parameter(torch.zeros(sizes))
    with pytest.raises(dk.StateError, match=message):
        model(**inputs(kind, model))


def test_another_deltas_exception_leaves_nothing_behind():
    layer = torch.nn.TransformerEncoderLayer(12, 2, 20, batch_first=True).eval()
    adapter = dk.attach(layer, dk.Adapter(size=3, at="self_attn"), name="adapter")
    dk.attach(layer, dk.Prefix(tokens=2, at="self_attn"), name="prefix")

    def fail(*_):
        raise RuntimeError("as asked")

    adapter.modules["self_attn"][0].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="as asked"):
        layer(torch.randn(2, 5, 12))
    assert _get_current_function_mode() is None


def test_loading_into_a_reparametrised_prefix_keeps_its_state():
    """The MLP is gone then, and with it what required gradients."""
    delta = dk.attach(Transformer(), dk.Prefix(tokens=3, reparam=True, hidden=11))
    delta.trainable = False
    delta.load_state_dict(delta.state_dict())
    assert not any(parameter.requires_grad for parameter in delta.parameters())
    assert all(module.shared is None for found in delta.modules.values() for module in found)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "roberta"])
def test_shifted_positions_and_mixed_batches(kind):
    model = build(kind, tf.AutoModel).double()
    ids = torch.randint(3, 90, (3, 7), generator=torch.Generator().manual_seed(4))
    for name, tokens in (("a", 2), ("b", 5)):
        randomize(dk.attach(model, dk.Prefix(tokens=tokens, shift=True), name=name, train=()), 0.3)
    alone = []
    for name in ("a", None, "b"):
        with dk.use(model, name):
            alone.append(model(ids).last_hidden_state)
    with dk.rows(model, ["a", None, "b"]):
        mixed = model(ids).last_hidden_state
    expected = torch.stack([one[number] for number, one in enumerate(alone)])
    torch.testing.assert_close(mixed, expected, rtol=1e-10, atol=1e-10)


def test_shifted_positions_equal_given_ones():
    model = build("gpt2", tf.AutoModel).double()
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(4))
    plain = randomize(dk.attach(model, dk.Prefix(tokens=3), name="a", train=()), 0.3)
    expected = model(ids, position_ids=torch.arange(3, 10)[None]).last_hidden_state
    state = plain.state_dict()
    plain.detach()
    delta = dk.attach(model, dk.Prefix(tokens=3, shift=True), train=())
    delta.load_state_dict(state)
    assert torch.equal(model(ids).last_hidden_state, expected)
    assert torch.equal(model(ids, position_ids=torch.arange(7)[None]).last_hidden_state, expected)
    assert torch.equal(model(inputs_embeds=model.wte(ids)).last_hidden_state, expected)
    # The rest of a text whose beginning is in the cache.
    cache = model(ids[:, :4], use_cache=True).past_key_values
    rest = model(ids[:, 4:], past_key_values=cache).last_hidden_state
    torch.testing.assert_close(rest, expected[:, 4:], rtol=1e-10, atol=1e-10)


def test_positions_that_cannot_be_shifted():
    with pytest.raises(
        dk.TargetError, match=r"encoder: Prefix\(shift=True\) expects one text stack .* another beside it"
    ):
        dk.attach(build("t5", tf.AutoModel), dk.Prefix(shift=True))
