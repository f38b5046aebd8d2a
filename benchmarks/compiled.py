"""Counts the graphs that torch compiles while deltas are attached, changed and removed, and checks the outputs.

python benchmarks/compiled.py [--out compiled.json]
"""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import peft
import torch
import transformers as tf
from torch._dynamo.utils import counters

import deltakit as dk


def backbone() -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return harness.llama(tf.LlamaModel, **sizes, vocab_size=97, use_cache=False).requires_grad_(False)


class Watched:
    """A compiled model and the number of graphs that were compiled for it.

    `one_graph=False` allows graph breaks, which PEFT's models have.
    """

    def __init__(self, model: Any, *, one_graph: bool = True) -> None:
        torch.compiler.reset()
        counters.clear()
        self.model = model
        self.compiled = torch.compile(model, backend="eager", fullgraph=one_graph)
        self.ids = torch.randint(5, 90, (2, 7))

    def right(self) -> bool:
        """Returns whether the compiled model's output equals the model's own."""
        with torch.no_grad():
            return torch.allclose(self.compiled(input_ids=self.ids)[0], self.model(input_ids=self.ids)[0], atol=1e-5)

    def graphs(self) -> int:
        return int(counters["stats"]["unique_graphs"])


def randomized(delta: dk.Delta) -> dk.Delta:
    for parameter in delta.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return delta


def ours() -> list[tuple[str, int, bool]]:
    model = backbone()
    watched, steps = Watched(model), list[tuple[str, int, bool]]()

    def note(what: str, change: Callable[[], Any]) -> None:
        before = watched.graphs()
        change()
        right = watched.right()
        steps.append((what, watched.graphs() - before, right))

    note("bare", lambda: None)
    deltas: list[dk.Delta] = []
    note("attached after compiling", lambda: deltas.append(randomized(dk.attach(model, dk.LoRA(r=4)))))
    with deltas[0].detached():
        others = [randomized(dk.attach(model, dk.LoRA(r=4), name=name)).detach() for name in "abc"]
    for other in others:
        note("another delta of one shape swapped in", lambda o=other: deltas[0].swap(o))
    state = {name: torch.randn_like(value) for name, value in deltas[0].state_dict().items()}
    note("another state loaded into it", lambda: deltas[0].load_state_dict(state))
    note("switched off", lambda: setattr(deltas[0], "active", False))
    note("switched on", lambda: setattr(deltas[0], "active", True))
    note("detached", deltas[0].detach)
    note("attached again", deltas[0].attach)
    return steps


def theirs() -> list[tuple[str, int, bool]]:
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(backbone()), config, adapter_name="a").eval()
    for name in "bc":
        model.add_adapter(name, config)
    watched, steps = Watched(model, one_graph=False), list[tuple[str, int, bool]]()
    for name in ("a", "b", "c", "a"):
        before = watched.graphs()
        model.set_adapter(name)
        right = watched.right()
        steps.append((f"set_adapter({name!r})", watched.graphs() - before, right))
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    print(harness.machine())
    results = {"deltakit": ours(), "PEFT": theirs()}
    for who, steps in results.items():
        for what, graphs, right in steps:
            print(f"{who:<9} {what:<36} {graphs} graphs compiled, {'right' if right else 'WRONG'}")
    harness.write(options.out, "compiled", results)


if __name__ == "__main__":
    main()
