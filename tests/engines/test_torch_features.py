"""What torch, transformers and accelerate do around hooks: each a way in which hook libraries broke."""

import copy
import gc
import weakref

import accelerate
import pytest
import torch
import transformers as tf
from torch import nn

import deltakit as dk
from support.backbone_inputs import hidden, inputs
from support.models import Transformer, ids, randomize, same, snapshot
from support.tiny_transformers import build


def attached(model, *methods, **options):
    delta = dk.attach(model, *(methods or (dk.LoRA(r=3),)), **options)
    randomize(delta)
    return delta


def test_hidden_states_hold_a_delta_attached_after_they_were_first_asked_for():
    model = build("bert")
    batch = inputs("bert", model)
    model(**batch, output_hidden_states=True)
    attached(model, dk.BitFit(at="^encoder.layer.0.output.LayerNorm"))
    late = model(**batch, output_hidden_states=True).hidden_states[1]
    fresh = build("bert")
    dk.attach(fresh, dk.BitFit(at="^encoder.layer.0.output.LayerNorm")).load_state_dict(
        dk.deltas(model)[0].state_dict()
    )
    torch.testing.assert_close(late, fresh(**batch, output_hidden_states=True).hidden_states[1])


def test_a_reference_taken_before_attach_sees_the_delta():
    model = Transformer().eval()
    projection, x = model.layers[0].self_attn.q_proj, torch.randn(2, 20)
    before = projection(x)
    attached(model)
    assert not torch.equal(projection(x), before)


def hidden_read(model, x):
    return nn.functional.linear(x, model.read.weight)


class Reads(nn.Module):
    """Reads the weight of one of its layers where its own code does not show it, and never calls that layer."""

    def __init__(self):
        super().__init__()
        self.read, self.called = nn.Linear(7, 5), nn.Linear(7, 5)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(7, 5)) for _ in range(2))

    def forward(self, x, expert=None):
        y = hidden_read(self, x) + self.called(x)
        return y if expert is None else y + self.experts[expert](x)


def test_a_target_that_is_never_called_is_an_error_until_it_is_detached():
    model, x = Reads(), torch.ones(1, 7)
    bare = model(x)
    delta = dk.attach(model, dk.LoRA(r=2, at=["read", "called"]))
    for _ in range(2):
        with pytest.raises(
            dk.TargetError, match="read: delta 'delta' did nothing here: .* name the parameter 'read.weight'"
        ):
            model(x)
    delta.detach()
    assert torch.equal(model(x), bare)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    dk.attach(model, dk.Adapter(size=2, at="read"))
    with pytest.raises(dk.TargetError, match="for AdapterDelta has no form that works by the weight"):
        model(x)
    dk.deltas(model)[0].detach()
    delta = randomize(dk.attach(model, dk.LoRA(r=2, at=["read.weight", "called"])))
    update = delta.modules["read.weight"][0].update()
    assert not torch.equal(model(x), bare)
    delta.detach()
    delta = randomize(dk.attach(model, dk.LoRA(r=2, at="read.weight")))
    torch.testing.assert_close(model(x), bare + x @ delta.modules["read.weight"][0].update().T)
    assert update.shape == (5, 7)


def test_a_target_whose_surroundings_did_not_run_is_a_warning():
    model = Reads()
    delta = dk.attach(model, dk.LoRA(r=2, at=["called", "experts.{0,1}.0"]))
    with pytest.warns(
        dk.DeltaWarning, match="1 of its targets were not called in the first forward, such as experts.1.0"
    ):
        model(torch.ones(1, 7), expert=0)
    model(torch.ones(1, 7), expert=0)
    delta.detach().attach()
    model(torch.ones(1, 7))
    assert not model._forward_hooks


def test_data_parallel_replicas_use_their_own_delta():
    model = Transformer().eval()
    delta = attached(model)
    expected = model(ids())
    (replica,) = nn.parallel.replicate(model, [0]) if torch.cuda.is_available() else (copy.copy(model),)
    target = model.layers[0].self_attn.q_proj
    twin = target._replicate_for_data_parallel()
    other = copy.deepcopy(target.delta_lora)
    with torch.no_grad():
        other.B.zero_()
    twin._modules["delta_lora"] = other
    twin.weight, twin.bias = target.weight, target.bias
    x = torch.randn(2, 20)
    assert not torch.equal(twin(x), target(x))
    assert torch.equal(replica(ids()), expected)
    assert delta.attached


def test_copying_a_part_does_not_drag_the_whole_along():
    model = Transformer().eval()
    attached(model)
    part = copy.deepcopy(model.layers[0])
    x = torch.randn(2, 5, 20)
    assert torch.equal(part(x), model.layers[0](x))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    part(x)


def test_jit_trace_and_export():
    model = Transformer().eval()
    attached(model, dk.LoRA(r=3), dk.Adapter(size=2))
    exported = torch.export.export(model, (ids(),)).module()
    torch.testing.assert_close(exported(ids()), model(ids()))


PLACES = {"embed": "cpu", "layers.0": "cpu", "layers.1": "disk", "norm": "cpu", "classifier": "disk"}
OFFLOADS = {
    "cpu": lambda model, folder: accelerate.cpu_offload(model, execution_device="cpu"),
    "disk": lambda model, folder: accelerate.disk_offload(model, folder, execution_device="cpu"),
    "device_map": lambda model, folder: accelerate.dispatch_model(
        model, PLACES, main_device="cpu", offload_dir=folder, force_hooks=True
    ),
}
METHODS = (dk.LoRA(r=3), dk.Adapter(size=2), dk.BitFit(), dk.Prefix(tokens=2))


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize(
    "methods", [*((method,) for method in METHODS), METHODS], ids=lambda m: "+".join(x.name for x in m)
)
def test_a_delta_on_what_is_offloaded_is_trained_and_saved_as_on_what_is_not(offload, methods, tmp_path):
    torch.manual_seed(0)
    here = Transformer().eval()
    there = OFFLOADS[offload](copy.deepcopy(here), tmp_path / "weights")
    assert there.layers[1].self_attn.q_proj.weight.is_meta
    both = [(model, dk.attach(model, *methods)) for model in (here, there)]
    both[1][1].load_state_dict(randomize(both[0][1]).state_dict())
    for _ in range(2):
        for model, delta in both:
            model(ids()).square().mean().backward()
            with torch.no_grad():
                for parameter in delta.parameters():
                    parameter.sub_(parameter.grad)
                    parameter.grad = None
    for name, value in both[0][1].state_dict().items():
        torch.testing.assert_close(both[1][1].state_dict()[name], value)
    torch.manual_seed(0)
    fresh = Transformer().eval()
    dk.load(both[1][1].save(tmp_path / "delta"), fresh)
    torch.testing.assert_close(fresh(ids()), there(ids()))
    both[1][1].detach()
    both[0][1].detach()
    assert torch.equal(there(ids()), here(ids()))


@pytest.mark.parametrize("offload", OFFLOADS)
def test_what_offloading_does_not_allow_is_an_error(offload, tmp_path):
    model = OFFLOADS[offload](Transformer().eval(), tmp_path / "weights")
    with pytest.raises(dk.StateError, match=r"train: classifier\.weight is offloaded by accelerate: expected values"):
        dk.attach(model, dk.LoRA(r=3), train="@head")
    delta = attached(model, dk.LoRA(r=3))
    trained = model(ids())
    with pytest.raises(
        dk.StateError, match=r"layers\.\d\.self_attn\.q_proj\.weight: expected a weight to merge .* the meta device"
    ):
        delta.merge()
    assert torch.equal(model(ids()), trained)


@pytest.mark.parametrize("offload", OFFLOADS)
def test_a_delta_that_is_offloaded_with_its_backbone_runs_and_is_not_saved(offload, tmp_path):
    model = Transformer().eval()
    delta = attached(model, *METHODS[:3])
    expected = copy.deepcopy(model)(ids())
    OFFLOADS[offload](model, tmp_path / "weights")
    torch.testing.assert_close(model(ids()), expected)
    model.train()
    with pytest.raises(
        dk.StateError, match=r"delta_\w+: delta .delta. was offloaded with its backbone, and would not be trained"
    ):
        model(ids())
    model.eval()
    with pytest.raises(
        dk.StateError, match=r"expected values to save, found a tensor on the meta device: .* attach aft"
    ):
        delta.save(tmp_path / "delta")


@pytest.mark.parametrize("kind", ["bert", "llama", "t5", "vit"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_of_transformers(kind, reentrant):
    model = build(kind)
    batch = inputs(kind, model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train()
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    model.config.use_cache = False
    delta = attached(model, dk.LoRA(r=3), dk.Adapter(size=2))
    first = hidden(model(**batch))
    # A fixed direction: the squares of normalised states add up to a constant, whose gradient is rounding alone.
    direction = torch.randn(first.shape, generator=torch.Generator().manual_seed(5))
    (first * direction).sum().backward()
    gradients = [parameter.grad.clone() for parameter in delta.parameters()]
    for parameter in delta.parameters():
        parameter.grad = None
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    (hidden(model(**batch)) * direction).sum().backward()
    for parameter, gradient in zip(delta.parameters(), gradients, strict=True):
        assert (parameter.grad - gradient).abs().max() <= 1e-4 * max(g.abs().max() for g in gradients)


def test_gradients_stop_at_the_lowest_delta():
    model = build("bert")
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    model.train()
    dk.attach(model, dk.LoRA(r=3, at="encoder.layer.1/@attn.q"))
    hooks = [len(layer._forward_pre_hooks) for layer in model.encoder.layer]
    assert hooks == [0, 1]


def test_autocast():
    model = Transformer().eval()
    attached(model, dk.LoRA(r=3), dk.Adapter(size=2), dk.BitFit())
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids())
    torch.testing.assert_close(out.float(), model(ids()), rtol=0.1, atol=0.1)


def test_to_a_device_and_back():
    model = Transformer().eval()
    delta = attached(model, dk.LoRA(r=3), train="@head")
    output, before = model(ids()), copy.deepcopy(delta.state_dict())
    model.to("meta")
    assert all(parameter.is_meta for parameter in delta.parameters())
    assert output.shape == model.to_empty(device="cpu")(ids()).shape
    assert before.keys() == delta.state_dict().keys()


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: type("FSDPModule", (nn.Module,), {})()])
def test_attaching_to_what_is_wrapped_is_an_error(wrap):
    wrapped = wrap(Transformer())
    before = snapshot(wrapped)
    with pytest.raises(
        dk.StateError, match=r"the backbone is wrapped in \w+ already: .* attach to the plain model first"
    ):
        dk.attach(wrapped, dk.LoRA(r=3, at="**"))
    same(before, snapshot(wrapped))


@pytest.mark.parametrize(
    ("train", "part", "message"),
    [
        ((), "layers.0.self_attn.q_proj.delta_lora.A", r"q_proj\.lora\.A: expected shape \(3, 20\) .* found \(0,\): an engine"),
        ("norm", "norm.weight", r"norm\.weight: expected shape \(20,\) as it was attached, found \(0,\): an engine"),
    ],
)  # fmt: skip
def test_a_part_of_a_delta_is_not_saved_as_the_whole(train, part, message, tmp_path):
    model = Transformer()
    delta = attached(model, train=train)
    whole = model.get_parameter(part).data
    # ZeRO-3 and FSDP1 leave a process its part under the same parameter.
    model.get_parameter(part).data = torch.empty(0)
    with pytest.raises(dk.StateError, match=message):
        delta.save(tmp_path / "delta")
    assert not (tmp_path / "delta").exists()
    model.get_parameter(part).data = whole
    delta.save(tmp_path / "delta")


def test_attaching_to_a_compiled_model_is_attaching_to_the_model():
    torch.compiler.reset()
    model = Transformer().eval()
    delta = dk.attach(torch.compile(model, backend="eager"), dk.LoRA(r=3))
    assert delta.backbone is model
    assert not any("_orig_mod" in path for path in delta.modules)


def test_trainer_loop_saves_what_was_trained(tmp_path):
    model = build("bert", tf.AutoModelForSequenceClassification)
    delta = attached(model, dk.LoRA(r=3), train="@head")
    model.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "model.safetensors")
    assert sum("delta_lora" in name for name in saved) == len(list(delta.modules)) * 2


def _worker(rank, port, results):
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model, delta = _to_train()
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(delta.parameters(), lr=0.1)
    for step in range(3):
        half = _batch(step).chunk(2)[rank]
        parallel(half).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    results[rank] = {name: value.clone() for name, value in delta.state_dict().items()}
    dist.destroy_process_group()


def _to_train():
    torch.manual_seed(3)
    model = Transformer()
    return model, dk.attach(model, dk.LoRA(r=3), dk.Adapter(size=2), dk.Prefix(tokens=2), train="@head")


def _batch(step):
    return torch.randint(2, 31, (4, 5), generator=torch.Generator().manual_seed(step))


def test_two_processes_train_in_step_with_one():
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = torch.multiprocessing.Manager().dict()
    torch.multiprocessing.spawn(_worker, (port, results), nprocs=2)
    model, delta = _to_train()
    optimizer = torch.optim.SGD(delta.parameters(), lr=0.1)
    for step in range(3):
        model(_batch(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in delta.state_dict().items():
        assert torch.equal(results[0][name], results[1][name])
        torch.testing.assert_close(results[0][name], value, rtol=1e-4, atol=1e-6)
