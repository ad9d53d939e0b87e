"""Small backbones and graphs of them that run with plain torch: what the tests of passes and codegen share."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from codegen.spec import Body
from passes.adapters import Adapter, resolve
from passes.attach import attach
from passes.capture import capture
from passes.fuse import fuse
from passes.graph import MuxGraph, check
from passes.normalise import normalise
from passes.task import as_tasks
from runtime.examples import IGNORE, Example
from runtime.pack import Chunk, Geometry, pack
from runtime.region import value_of
from runtime.state import State, Training
from runtime.tables import Table

GEOMETRY = Geometry(tokens=64, tile=16, sequences=24, bundle_tokens=32, bundle_sequences=4, head_rows=8)
VOCABULARY = 50
WIDTH = 16
CPU = torch.device("cpu")


# --- backbones --------------------------------------------------------------------------------------------------------


def made(kind: type[nn.Module], *args: Any, seed: int = 0, **kwargs: Any) -> Any:
    """A model with repeatable weights, in evaluation mode; the global generator is put back."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(*args, **kwargs).eval()


def llama(layers: int = 2, *, seed: int = 0, **changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    return made(LlamaForCausalLM, LlamaConfig(**config | changes), seed=seed)


class Attention(nn.Module):
    """Causal attention of two heads without positions; q, k and v read the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).view(1, -1, 2, WIDTH // 2).transpose(1, 2) for part in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Plain(nn.Module):
    """No module list and no norm: embeddings, attention, what a subclass does in `body`, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(GEOMETRY.tokens, WIDTH)
        self.attention = Attention()
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.make()

    def make(self) -> None:
        """Further modules of a subclass."""

    def body(self, x: Tensor) -> Tensor:
        return x

    def logits(self, x: Tensor) -> Tensor:
        return self.head(x)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids) + self.positions(position_ids)
        return self.logits(self.body(x + self.attention(x)))


# --- graphs -----------------------------------------------------------------------------------------------------------


def captured(model: nn.Module) -> MuxGraph:
    graph = capture(model, tokens=GEOMETRY.tokens, tile=GEOMETRY.tile, max_sequences=GEOMETRY.sequences)
    check(graph)
    return graph


def normal(model: nn.Module) -> MuxGraph:
    graph = normalise(captured(model).copy())
    check(graph)
    return graph


def resolved(model: nn.Module, tasks: Any) -> list[Adapter]:
    return [resolve(task, model) for task in as_tasks(tasks)]


def attached(graph: MuxGraph, adapters: Sequence[Adapter]) -> MuxGraph:
    graph = attach(graph.copy(), adapters=adapters)
    check(graph)
    return graph


def fused(
    graph: MuxGraph, adapters: Sequence[Adapter], *, reserve: int = 0, previous: Mapping[str, Table] | None = None
) -> MuxGraph:
    graph = fuse(attached(graph, adapters), reserve=reserve, previous=previous)
    check(graph)
    return graph


def lora(*targets: str, **fields: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(target_modules=list(targets), **{"r": 4} | fields)


# --- running them -----------------------------------------------------------------------------------------------------


def state_of(graph: MuxGraph) -> State:
    """Tables in which every PEFT tensor, B included, is random by its task and key: equal in any layout of the tables."""
    tasks = dict.fromkeys(task for task, _ in [*graph.params, *graph.encodings])
    training = {task: Training() for task in tasks}
    state = State(graph.tables, graph.params.values(), training, CPU, graph.encodings.values(), graph.weights)
    for task, own in state.tasks.items():
        for key in own.keys:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{task}/{key}".encode()))
            state.write(task, key, 0.3 * torch.randn(state.shape(task, key), generator=generator))
    return state


def examples_of(task: str, lengths: Sequence[int]) -> list[Example]:
    """Random sequences, a third of each without labels."""
    generator = torch.Generator().manual_seed(zlib.crc32(task.encode()))
    examples = []
    for length in lengths:
        ids = torch.randint(VOCABULARY, (length,), generator=generator)
        labels = ids.clone()
        labels[: length // 3] = IGNORE
        examples.append(Example(ids.numpy(), labels.numpy()))
    return examples


def chunk_of(lengths: Mapping[str, Sequence[int]]) -> Chunk:
    (chunk,) = pack({task: examples_of(task, given) for task, given in lengths.items()}, GEOMETRY)
    return chunk


def feed(reference: str, weights: Mapping[str, Tensor], state: State | None, chunk: Chunk) -> Tensor:
    """What a graph input or a region input that is no value is fed with."""
    kind, _, key = reference.partition(":")
    if kind == "weight":
        return weights[key].detach()
    if kind == "chunk":
        return chunk.tensors[key]
    assert state is not None
    if kind == "table":
        return state.copies[key]
    rows = state.routes[key]
    return torch.tensor([rows.index(task) if task in rows and task else -1 for task in chunk.block_tasks], dtype=torch.int32)


def logits_of(graph: MuxGraph, state: State | None, chunk: Chunk) -> Tensor:
    """[T, vocabulary], by running the graph with torch."""
    (logits,) = graph.gm(*(feed(str(source), graph.weights, state, chunk) for source in graph.inputs))
    return logits[0]


def run_bodies(bodies: Sequence[Body], weights: Mapping[str, Tensor], state: State | None, chunk: Chunk) -> dict[str, Tensor]:
    """All values that the regions hand on, by name."""
    values: dict[str, Tensor] = {}
    for body in bodies:
        results = body.gm(*arguments(body, values, weights, state, chunk))
        values.update(zip(body.spec.outputs, results, strict=True))
    return values


def arguments(
    body: Body, values: Mapping[str, Tensor], weights: Mapping[str, Tensor], state: State | None, chunk: Chunk
) -> list[Tensor]:
    names = [value_of(reference) for reference in body.spec.inputs]
    return [
        feed(reference, weights, state, chunk) if name is None else values[name]
        for reference, name in zip(body.spec.inputs, names, strict=True)
    ]
