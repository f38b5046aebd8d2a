"""Times compiled models beside PEFT's and the bare one, and counts the graphs that are compiled while deltas change.

    python benchmarks/compiled.py [--backend inductor] [--layers 4] [--out compiled.json]

Timed are a training step and decoding with a static cache, by inductor (which needs a C++ compiler), and how long compiling
takes. The graphs are counted on a small model, with shapes that are fixed and that are dynamic. It takes about fifteen
minutes.
"""

import argparse
import copy
import resource
import time
from collections.abc import Callable
from typing import Any

import harness
import peft
import rounds
import torch
import transformers as tf
from torch._dynamo.utils import counters

import deltakit as dk

LINEARS = harness.LINEARS["Llama 150 M"]
Event = tuple[str, str, str, int | str, bool]
"""Whose model, which shapes, what happened, the graphs compiled or why none could be, and whether the output is right."""

DECODED = 8
"""The tokens of a decoding call."""


def contestants(layers: int, width: int) -> dict[str, Any]:
    """Returns the bare backbone and its copies with LoRA r=8 on all linear layers, with the same weights in memory."""
    sizes = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
    }
    bare = harness.llama(tf.LlamaModel, **sizes, vocab_size=1000).requires_grad_(False)
    models = {"bare": bare, "deltakit": harness.twin(bare), "null": harness.twin(bare)}
    for own in ("deltakit", "null"):
        dk.attach(models[own], dk.LoRA(r=8, at=LINEARS))
        # The check of the first forward, which is not compiled.
        models[own](input_ids=torch.ones(1, 2, dtype=torch.int64))
    models["PEFT"] = peft.get_peft_model(harness.twin(bare), peft.LoraConfig(r=8, target_modules=LINEARS)).eval()
    return models


def training(model: Any, compiled: Any) -> rounds.Call:
    """Returns a training step. The embedded inputs require gradients, so all backward passes are equally long."""
    size = model.get_input_embeddings().weight.shape[1]
    x = torch.randn(4, 128, size, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def run() -> None:
        compiled(inputs_embeds=x, use_cache=False)[0].square().mean().backward()
        model.zero_grad()
        x.grad = None

    return run


def decoding(model: Any, compiled: Any) -> rounds.Call:
    """Returns a call that decodes some tokens, one at a time, with a static cache that is emptied before."""
    cache = tf.StaticCache(config=model.config, max_cache_len=64)
    ids = torch.full((1, 1), 7)
    with torch.no_grad():
        # Makes the cache's tensors, which is not to be compiled.
        model(input_ids=ids, past_key_values=cache)

    @torch.no_grad()
    def run() -> None:
        cache.reset()
        for _ in range(DECODED):
            compiled(input_ids=ids, past_key_values=cache)

    return run


def seconds() -> tuple[float, float]:
    """Returns the CPU seconds of this process and of the compilers that it has run, and wall seconds."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + used.ru_utime + used.ru_stime, time.perf_counter()


def timed(case: str, make: Any, models: dict[str, Any], backend: str, bound: rounds.Bound) -> dict[str, Any]:
    """Returns the row of a case: its times, and what compiling it took."""
    torch.compiler.reset()
    calls, compiling = {}, {}
    for who, model in models.items():
        # Isolated: otherwise the contestants, whose code is the same, would try each other's graphs, one after another.
        calls[who] = make(model, torch.compile(model, backend=backend, isolate_recompiles=True))
        counters.clear()
        cpu, wall = seconds()
        calls[who](), calls[who]()
        cpu_after, wall_after = seconds()
        graphs = counters["stats"]["unique_graphs"]
        compiling[who] = {"graphs": graphs, "cpu": cpu_after - cpu, "wall": wall_after - wall}
    times = rounds.interleaved(calls, bound, rounds.share_known("bare"))
    row = {"case": case, "compiling": compiling, **rounds.compared(times, "bare")}
    print(f"{case}\n    {rounds.said(row, 'bare')}")
    for who, found in compiling.items():
        print(
            f"    {who:<9} {found['graphs']} graphs; {found['cpu']:.1f} CPU seconds, {found['wall']:.1f} wall",
            flush=True,
        )
    return row


class Watched:
    """A compiled model and the number of graphs that were compiled for it.

    Args:
        whole: whether a graph break is an error; PEFT's models have some.
        shapes: "fixed"; or "dynamic" for the length and the number of examples.
    """

    def __init__(self, who: str, model: Any, shapes: str, *, whole: bool = True) -> None:
        torch.compiler.reset()
        counters.clear()
        self.who, self.model, self.shapes = who, model, shapes
        dynamic = {"fixed": False, "dynamic": True, "marked": None}[shapes]
        self.compiled = torch.compile(model, backend="eager", fullgraph=whole, dynamic=dynamic)
        self.events: list[Event] = []

    def note(self, what: str, change: Callable[[], Any] = lambda: None, shape: tuple[int, int] = (4, 7)) -> None:
        """Changes something, calls the model with ids of a shape, and notes what was compiled."""
        before = counters["stats"]["unique_graphs"]
        change()
        ids = torch.randint(5, 90, shape)
        if self.shapes == "marked":
            torch._dynamo.mark_dynamic(ids, 1)
        try:
            with torch.no_grad():
                found = self.compiled(input_ids=ids)[0]
                right = torch.allclose(found, self.model(input_ids=ids)[0], atol=1e-4)
            graphs = int(counters["stats"]["unique_graphs"] - before)
        except torch._dynamo.exc.TorchDynamoException as error:
            graphs, right = type(error).__name__, False
        self.events.append((self.who, self.shapes, what, graphs, right))
        print(f"{self.who:<9} {self.shapes:<8} {what:<44} {graphs} graphs, {'right' if right else 'WRONG'}", flush=True)


def small() -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return harness.llama(tf.LlamaModel, **sizes, vocab_size=97, use_cache=False).requires_grad_(False)


def randomized(delta: dk.Delta) -> dk.Delta:
    for parameter in delta.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return delta


def lengths(watched: Watched) -> None:
    """Notes other numbers of tokens and of examples."""
    for length in (9, 12, 30):
        watched.note(f"{length} tokens", shape=(4, length))
    for examples in (5, 6):
        watched.note(f"{examples} examples", shape=(examples, 9))


def bare(shapes: str) -> list[Event]:
    watched = Watched("bare", small(), shapes)
    watched.note("first call")
    lengths(watched)
    return watched.events


def changing(shapes: str) -> list[Event]:
    """Notes one delta that comes, goes and changes."""
    model = small()
    watched, deltas = Watched("deltakit", model, shapes), list[dk.Delta]()
    watched.note("first call")
    watched.note("attached after compiling", lambda: deltas.append(randomized(dk.attach(model, dk.LoRA(r=4)))))
    with deltas[0].detached():
        others = [randomized(dk.attach(model, dk.LoRA(r=4), name=name)).detach() for name in "abc"]
    watched.note("the same again")
    for other in others:
        watched.note("another delta of one shape swapped in", lambda o=other: deltas[0].swap(o))
    state = {name: torch.randn_like(value) for name, value in deltas[0].state_dict().items()}
    watched.note("another state loaded into it", lambda: deltas[0].load_state_dict(state))
    watched.note("active = False", lambda: setattr(deltas[0], "active", False))
    for on in (True, False, True):
        watched.note(f"active = {on}, again", lambda on=on: setattr(deltas[0], "active", on))
    watched.note("detached", deltas[0].detach)
    watched.note("attached again", deltas[0].attach)
    return watched.events


def serving(shapes: str) -> list[Event]:
    """Notes mixed batches of three deltas, one after another."""
    model = small()
    deltas = [randomized(dk.attach(model, dk.LoRA(r=4), name=name)) for name in "abc"]
    model(input_ids=torch.ones(1, 2, dtype=torch.int64))
    watched = Watched("deltakit", model, shapes)
    watched.note("three attached")
    if shapes != "fixed":
        lengths(watched)
    for names in (["a", "b", "c", None], ["c", "b", "a", None], ["a", "a", "b", None], ["c", None, None, "a"]):
        with dk.rows(model, names):
            watched.note(f"rows {names}")
    with dk.rows(model, ["a", "b", "c", None]):
        watched.note("rows of the first batch again")
        watched.note("rows of the first batch, 9 tokens", shape=(4, 9))
    watched.note("swapped beside others", lambda: deltas[0].swap(_waiting(model)))
    return watched.events


def _waiting(model: Any) -> dk.Delta:
    return randomized(dk.attach(model, dk.LoRA(r=4), name="waiting")).detach()


def theirs(shapes: str) -> list[Event]:
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(small()), config, adapter_name="a").eval()
    for name in "bc":
        model.add_adapter(name, config)
    watched = Watched("PEFT", model, shapes, whole=False)
    for name in ("a", "b", "c", "a"):
        watched.note(f"set_adapter({name!r})", lambda name=name: model.set_adapter(name))
    lengths(watched)
    return watched.events


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", default="inductor", help="of the timed cases")
    parser.add_argument("--layers", type=int, default=4, help="of the timed model")
    parser.add_argument("--width", type=int, default=512, help="of the timed model")
    parser.add_argument("--only", choices=["times", "graphs"])
    harness.add_options(parser, rounds.Bound(15, 121, 60))
    options = parser.parse_args()
    bound = harness.begin(options)
    # What an earlier run left on the disk would make compiling look cheap, and other processes' CPU time is not known.
    torch._inductor.config.force_disable_caches = True
    torch._inductor.config.compile_threads = 1
    if options.only != "graphs":
        # What a process does for its first compilation alone, such as preparing C++ headers.
        torch.compile(lambda x: x.sin() + 1, backend=options.backend)(
            torch.ones(64, requires_grad=True)
        ).sum().backward()
    rows: dict[str, Any] = {"times": [], "graphs": []}
    cases = {"training step, 4 x 128 tokens": training, f"decode {DECODED} tokens, static cache": decoding}
    for case, make in cases.items() if options.only != "graphs" else ():
        models = contestants(options.layers, options.width)
        rows["times"].append(timed(case, make, models, options.backend, bound))
        harness.write(options.out, "compiled", rows)
    if options.only != "times":
        for shapes in ("fixed", "dynamic", "marked"):
            rows["graphs"] += [*bare(shapes), *changing(shapes), *serving(shapes), *theirs(shapes)]
            harness.write(options.out, "compiled", rows)


if __name__ == "__main__":
    main()
