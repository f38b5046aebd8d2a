"""Random sequences of everything that a user may do with deltas, checked after each step against plain torch.

The oracle knows no hooks of deltakit. It holds a copy of the bare backbone that deltakit never sees, and what each delta's
state dict held when it was last trained. The expected output comes from the formulas of the papers, in plain hooks.
"""

import collections
import copy
import pickle
import random
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

import deltakit as dk
from support.backbone_inputs import inputs
from support.models import Transformer, ids, same, snapshot
from support.tiny_transformers import build

PACKAGE = str(Path(dk.__file__).parent)


class Encoder(nn.Module):
    """torch's own encoder, which reads the weights of its attention directly."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(20, 4, 28, dropout=0, batch_first=True)
        self.embed, self.encoder, self.head = nn.Embedding(31, 20), nn.TransformerEncoder(layer, 2), nn.Linear(20, 3)

    def forward(self, input_ids):
        return self.head(self.encoder(self.embed(input_ids)))


class Residual(nn.Module):
    """A convolutional network with batch norms and activations in place."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 11, 3, padding=1), nn.BatchNorm2d(11)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(11, 11, 3, padding=1), nn.BatchNorm2d(11), nn.ReLU(inplace=True)) for _ in range(2)
        )
        self.head = nn.Linear(11, 5)

    def forward(self, pixels):
        x = self.norm(self.stem(pixels)).relu_()
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3)))


def _transformer(kind):
    model = build(kind, use_cache=False)
    return model, inputs(kind, model, padding=None)


def _own(model, key, value):
    return model.eval(), {key: value}


# The names of layers that are called, of layers whose weight is read directly, and of the module that is trained fully.
BACKBONES = {
    "toy": (lambda: _own(Transformer(), "input_ids", ids(2, 7)), ["q_proj", "v_proj", "down_proj"], [], "classifier"),
    "bert": (lambda: _transformer("bert"), ["query", "value", "intermediate.dense"], [], "pooler"),
    "gpt2": (lambda: _transformer("gpt2"), ["c_proj", "c_fc"], [], "ln_f"),
    "llama": (lambda: _transformer("llama"), ["q_proj", "o_proj", "down_proj"], [], "model.norm,norm"),
    "t5": (lambda: _transformer("t5"), ["q", "wo"], [], "encoder.final_layer_norm"),
    "bloom": (lambda: _transformer("bloom"), ["dense_h_to_4h", "query_key_value"], [], "ln_f"),
    "encoder": (lambda: _own(Encoder(), "input_ids", ids(2, 7)), ["linear1"], ["self_attn.out_proj"], "head"),
    "residual": (lambda: _own(Residual(), "pixels", torch.randn(2, 3, 6, 6)), ["stem"], [], "head"),
}


def paths_of(model, names):
    """The paths that end in one of these names, found without deltakit."""
    return [path for path, _ in model.named_modules() if any(f".{path}".endswith(f".{name}") for name in names)]


def split(name):
    """The path, the method and the tensor of a name in a delta's file."""
    path, method, key = name.rsplit(".", 2)
    if key in ("weight", "bias") and method in ("down", "up"):
        path, _, outer = path.rpartition(".")
        return path, outer, f"{method}.{key}"
    return path, method, key


class Interrupter:
    """Raises KeyboardInterrupt at the n-th line of deltakit's code that runs."""

    def __init__(self, line):
        self.left = line

    def __enter__(self):
        sys.settrace(self._trace)

    def __exit__(self, *_):
        sys.settrace(None)

    def _trace(self, frame, event, _arg):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._trace


@dataclass(eq=False)
class Known:
    """What the oracle knows of a delta: its handle and options, and the values that it must have."""

    delta: dk.Delta
    scaling: float
    freeze: bool
    train: str
    values: dict = field(default_factory=dict)
    attached: bool = True
    active: bool = True
    trainable: bool = True
    scale: float = 1.0
    order: int = 0

    def learn(self):
        self.values = {name: value.clone() for name, value in self.delta.state_dict().items()}


class Fuzz:
    """One backbone with its deltas, and the oracle beside it."""

    def __init__(self, name, seed):
        torch.manual_seed(seed)
        self.name, self.random, self.counts = name, random.Random(seed), collections.Counter()
        self.start()

    def start(self):
        make, self.called, self.read, self.head = BACKBONES[self.name]
        model, call = make()
        self.model = model.double().eval()
        self.call = {k: v.double() if v.is_floating_point() else v for k, v in call.items()}
        for parameter in self.model.parameters():
            parameter.requires_grad_(self.random.random() < 0.8)
        self.bare = copy.deepcopy(self.model)
        self.before = snapshot(self.model)
        with torch.no_grad():
            self.output = self.run(self.model)
        self.known, self.made = [], 0

    def run(self, model, call=None):
        output = model(**(call or self.call))
        return output if isinstance(output, torch.Tensor) else output[0]

    # The oracle.

    def live(self):
        found = [k for k in self.known if k.attached and k.active]
        return sorted(found, key=lambda k: k.order)

    def expected(self, live=None, call=None):
        """The output by the formulas, on a copy of the bare backbone."""
        model = copy.deepcopy(self.bare)
        for known in self.live() if live is None else live:
            tensors, parts = model.state_dict(), {}
            for name, value in known.values.items():
                if name in tensors:
                    tensors[name].copy_(value)
                else:
                    path, method, key = split(name)
                    parts.setdefault((path, method), {})[key] = value
            for (path, method), own in parts.items():
                if method != "prefix":
                    self.by_hand(model, path, method, own, known)
            if any(method == "prefix" for _, method in parts):
                # A prefix acts inside the attention, where no plain hook reaches. A fresh copy shows what it does alone.
                own = {name: value for name, value in known.values.items() if ".prefix." in name}
                dk.attach(model, dk.Prefix(tokens=3), name=f"x{known.order}").load_state_dict(own)
        with torch.no_grad():
            return self.run(model, call)

    def by_hand(self, model, path, method, own, known):
        kept = dict(model.named_modules())
        if path.removesuffix(".weight") != path or paths_of(model, self.read).count(path):
            layer = kept[path.removesuffix(".weight")]
            layer.weight.data += known.scale * known.scaling * own["B"] @ own["A"]
            return
        layer, scale = kept[path], known.scale

        def after(_module, args, kwargs, y):
            x = args[0] if args else next(iter(kwargs.values()))
            if method == "lora" and isinstance(layer, nn.Conv2d):
                low = own["A"].unflatten(1, (layer.in_channels, *layer.kernel_size))
                h = nn.functional.conv2d(x, low, None, layer.stride, layer.padding)
                return y + scale * known.scaling * nn.functional.conv2d(h, own["B"][..., None, None])
            if method == "lora":
                return y + scale * known.scaling * x @ own["A"].mT @ own["B"].mT
            if method == "bitfit":
                return y + scale * (own["bias"] if y.ndim != 4 else own["bias"][:, None, None])
            if method == "ia3":
                factor = own["scale"] if y.ndim != 4 else own["scale"][:, None, None]
                return y + scale * (y * factor - y)
            last = y.movedim(1, -1) if y.ndim == 4 else y
            low = nn.functional.gelu(last @ own["down.weight"].mT + own["down.bias"])
            new = last + scale * (low @ own["up.weight"].mT + own["up.bias"])
            return new.movedim(-1, 1) if y.ndim == 4 else new

        layer.register_forward_hook(after, with_kwargs=True)

    def check(self):
        """Compares the model with the oracle: output, base weights, and who requires gradients."""
        with torch.no_grad():
            found = self.run(self.model)
        wanted = self.expected()
        assert torch.allclose(found, wanted, atol=1e-9, rtol=1e-9), (found - wanted).abs().max()
        base, bare = dk.base_state_dict(self.model), self.bare.state_dict()
        assert base.keys() == bare.keys()
        assert all(torch.equal(value, bare[name]) for name, value in base.items())
        for known in self.known:
            found = known.delta.state_dict()
            assert found.keys() == known.values.keys()
            assert all(torch.equal(found[name], value) for name, value in known.values.items())
            mine = [k for k in ("attached", "active", "trainable") if getattr(known.delta, k) != getattr(known, k)]
            assert not mine, mine
            trained = [p.requires_grad for site in known.delta.modules.values() for m in site for p in m.parameters()]
            assert set(trained) <= {known.trainable}
        self.counts["comparisons"] += 1

    # What a user may do. Each returns nothing; an error of deltakit must leave everything as it was.

    def step(self):
        actions = ["attach", "attach", "detach", "again", "active", "trainable", "scale", "merge", "unmerge", "train"]
        actions += ["train", "rows", "save", "copy", "pickle", "detached", "base", "in_forward", "in_call", "threads"]
        actions += ["failed_forward", "swap", "replace"]
        weights = [1] * (len(actions) - 1) + [0.2]
        (action,) = self.random.choices(actions, weights)
        self.counts["steps"] += 1
        self.counts[action] += 1
        before = self.cheap()
        try:
            getattr(self, action)()
        except dk.DeltaError:
            self.counts["refused"] += 1
            self.unchanged(before)
        self.check()
        return action

    def cheap(self):
        state = {name: value.clone() for name, value in self.model.state_dict().items()}
        grads = {name: p.requires_grad for name, p in self.model.named_parameters()}
        return state, grads

    def unchanged(self, before):
        state, grads = self.cheap()
        assert state.keys() == before[0].keys(), state.keys() ^ before[0].keys()
        assert all(torch.equal(value, before[0][name]) for name, value in state.items())
        assert grads == before[1]

    def pick(self, **wanted):
        found = [k for k in self.known if all(getattr(k, name) == value for name, value in wanted.items())]
        return self.random.choice(found) if found else None

    def method(self):
        at = self.random.sample(self.called, self.random.randint(1, len(self.called)))
        at = ["^" + path for path in paths_of(self.bare, at)]
        r, alpha = self.random.randint(1, 4), self.random.randint(1, 9)
        read = ["^" + path for path in paths_of(self.bare, self.read)]
        kinds = [dk.LoRA(r=r, alpha=alpha, at=at + read), dk.BitFit(at=at), dk.IA3(at=at, side="output")]
        kinds.append(dk.Adapter(size=3, at=at))
        if self.name != "residual":
            kinds.append(dk.Prefix(tokens=3))
        return self.random.choice(kinds), alpha / r

    def attach(self):
        if len(self.known) > 4:
            self.forget()
            return
        method, scaling = self.method()
        train, freeze = self.random.choice(["", "", self.head.split(",")[0]]), self.random.random() < 0.8
        if train and train not in dict(self.bare.named_modules()):
            train = self.head.split(",")[-1]
        name = f"d{self.made}"
        train_option = {"train": "^" + train} if train else {}
        delta = dk.attach(self.model, method, name=name, freeze=freeze, **train_option)
        self.made += 1
        with torch.no_grad():
            for site in delta.modules.values():
                for module in site:
                    for parameter in module.parameters():
                        parameter.add_(torch.randn_like(parameter) * 0.1)
        known = Known(delta, scaling, freeze, train, order=self.made)
        known.learn()
        self.known.append(known)

    def forget(self):
        known = self.random.choice(self.known)
        if known.attached:
            known.delta.detach()
        self.known.remove(known)

    def detach(self):
        known = self.pick(attached=True)
        if known:
            known.delta.detach()
            known.attached = False

    def again(self):
        known = self.pick(attached=False)
        if known:
            known.delta.attach()
            known.attached = True

    def active(self):
        known = self.pick()
        if known:
            wanted = not known.active
            known.delta.active = wanted
            known.active = wanted

    def trainable(self):
        known = self.pick()
        if known:
            wanted = not known.trainable
            known.delta.trainable = wanted
            known.trainable = wanted

    def scale(self):
        known = self.pick()
        if known:
            wanted = self.random.choice([0.5, 1.0, -1.0, 2.0])
            known.delta.scale = wanted
            known.scale = wanted

    def merge(self):
        known = self.pick(attached=True)
        if known:
            known.delta.merge()

    def unmerge(self):
        known = next((k for k in self.known if k.delta.merged), None)
        if known:
            known.delta.unmerge()

    def train(self):
        trained = [p for p in self.model.parameters() if p.requires_grad]
        ours = [p for k in self.known if k.attached and k.trainable for p in k.delta.parameters()]
        if not ours or len(trained) > len({id(p) for p in ours}):
            return
        optimizer = torch.optim.SGD(trained, lr=1e-2)
        # Statistics that move while no delta is active are the user's own change of the backbone.
        self.model.train(self.name == "residual" and bool(self.live()) and self.random.random() < 0.5)
        try:
            loss = self.run(self.model).square().mean()
            if loss.requires_grad:
                loss.backward()
                optimizer.step()
        finally:
            self.model.eval()
            self.model.zero_grad()
        for known in self.known:
            if known.attached and (known.trainable or self.name == "residual"):
                known.learn()

    def names(self):
        usable = [k.delta.name for k in self.known if k.attached and k.active and not k.delta.merged]
        return [self.random.choice([None, *usable]) for _ in range(2)]

    def mixed(self, names):
        """The expected output of a mixed batch: each example alone, with its own delta only."""
        each = []
        for row, name in enumerate(names):
            live = [k for k in self.known if k.delta.name == name]
            each.append(self.expected(live, {key: value[row : row + 1] for key, value in self.call.items()}))
        return torch.cat(each)

    def rows(self):
        names = self.names()
        with torch.no_grad(), dk.rows(self.model, names):
            found = self.run(self.model)
        assert torch.allclose(found, self.mixed(names), atol=1e-9)

    def threads(self):
        """Threads with different mixed batches, and one without, at the same time."""
        each = [self.names(), self.names(), None]
        found, errors, ready = {}, [], threading.Barrier(len(each))

        def work(number):
            ready.wait()
            try:
                with torch.no_grad():
                    if each[number] is None:
                        found[number] = self.run(self.model)
                    else:
                        with dk.rows(self.model, each[number]):
                            found[number] = self.run(self.model)
            except dk.DeltaError:
                self.counts["refused in a thread"] += 1
            except BaseException as error:
                errors.append(error)

        workers = [threading.Thread(target=work, args=(number,)) for number in range(len(each))]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert not errors, errors
        for number, output in found.items():
            wanted = self.expected() if each[number] is None else self.mixed(each[number])
            assert torch.allclose(output, wanted, atol=1e-9), number

    def save(self):
        """A delta in a file, loaded onto a fresh copy of the backbone."""
        known = self.pick(scale=1.0)
        if known:
            with tempfile.TemporaryDirectory() as folder:
                known.delta.save(folder)
                other = copy.deepcopy(self.bare)
                dk.load(folder, other)
                with torch.no_grad():
                    assert torch.allclose(self.run(other), self.expected([known]), atol=1e-9)

    def copy(self):
        with torch.no_grad():
            assert torch.allclose(self.run(copy.deepcopy(self.model)), self.expected(), atol=1e-9)

    def pickle(self):
        with torch.no_grad():
            assert torch.allclose(self.run(pickle.loads(pickle.dumps(self.model))), self.expected(), atol=1e-9)

    def detached(self):
        known = self.pick(attached=True)
        if known:
            with known.delta.detached(), torch.no_grad():
                found = self.run(self.model)
            live = [k for k in self.live() if k is not known]
            assert torch.allclose(found, self.expected(live), atol=1e-9)

    def base(self):
        """The backbone's own checkpoint loads with strict=True beside deltas."""
        self.model.load_state_dict(self.bare.state_dict())

    def swap(self):
        one, other = self.pick(attached=True), self.pick()
        if one and other and one is not other:
            one.delta.swap(other.delta)
            one.learn()
            other.learn()

    def in_forward(self):
        """Ctrl-C while a module of the backbone computes."""
        module = self.random.choice(list(self.bare.named_modules()))[0]
        module = self.model.get_submodule(module)

        def interrupted(*_args, **_kwargs):
            raise KeyboardInterrupt

        module.forward = interrupted
        try:
            self.run(self.model)
        except KeyboardInterrupt:
            self.counts["forwards interrupted"] += 1
        finally:
            del module.forward

    def failed_forward(self):
        """An error while a module of the backbone computes."""
        module = self.model.get_submodule(self.random.choice([path for path, _ in self.bare.named_modules()]))

        def failing(*_args, **_kwargs):
            raise ZeroDivisionError

        module.forward = failing
        try:
            self.run(self.model)
        except ZeroDivisionError:
            self.counts["forwards failed"] += 1
        finally:
            del module.forward

    def in_call(self):
        """Ctrl-C at any line of deltakit's code. Detaching and attaching again makes all right."""
        known = self.pick()
        method, _ = self.method()
        calls = [lambda: dk.attach(self.model, method, name=f"d{self.made}"), lambda: self.run(self.model)]
        if known:
            delta = known.delta
            calls += [delta.detach, delta.merge, lambda: setattr(delta, "active", not delta.active)]
            calls += [lambda: setattr(delta, "trainable", not delta.trainable), delta.attach]
            calls += [delta.unmerge] if delta.merged else []
        call = self.random.choice(calls)
        try:
            with Interrupter(self.random.randint(1, 600)):
                call()
        except KeyboardInterrupt:
            self.counts["calls interrupted"] += 1
        except dk.DeltaError:
            self.counts["refused"] += 1
        for delta in [*dk.deltas(self.model), *(k.delta for k in self.known)]:
            delta.detach()
        for known in self.known:
            known.attached = False
            known.active, known.trainable = known.delta.active, known.delta.trainable
        self.restored()
        for known in sorted(self.known, key=lambda k: k.order):
            known.delta.trainable = known.trainable

    def restored(self):
        """Without deltas the backbone is what it was, bit-exact."""
        same(self.before, snapshot(self.model))
        with torch.no_grad():
            assert torch.equal(self.run(self.model), self.output)
        self.counts["exact detaches"] += 1

    def replace(self):
        """A module of the backbone is replaced by the user. All deltas detach, and what is still there is restored."""
        path = self.random.choice(paths_of(self.bare, [*self.called, self.head.split(",")[-1]]) or [self.head])
        parent, _, name = path.rpartition(".")
        setattr(self.model.get_submodule(parent), name, copy.deepcopy(self.bare.get_submodule(path)))
        self.end()
        self.start()

    def end(self):
        """Detaches everything in random order."""
        self.random.shuffle(self.known)
        for known in self.known:
            known.delta.detach()
        self.known = []
        self.restored()
