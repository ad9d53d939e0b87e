"""Prompt tuning (arXiv 2104.08691): learned embeddings before each sequence of a task.

Dispatch: the embedded tokens. Adapter: P embeddings. Aggregate: P rows before every sequence of the task's, in place of the
embeddings of the placeholders that stand there in the chunk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from codegen.ops import TILE_MM
from passes.adapters.sites import BUCKETS, bucket_of, refuse_fields
from passes.graph import MuxGraph, Source, call, module_of, val
from passes.linears import Group, Inputs
from passes.slots import in_order, route_key, slots_of
from passes.task import Task
from runtime.tables import Input, Param, Table

KEY = "prompt_embeddings"
# What PEFT calls the module that computes a prompt.
ENCODER = "prompt_encoder"
_SUPPORTED = frozenset(
    {"num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers", "prompt_tuning_init",
     "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"}
)  # fmt: skip
aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Site:
    """P learned embeddings of K features; `tokens` are those whose embeddings a fresh prompt begins with, if any."""

    name: str
    count: int
    features: int
    tokens: tuple[int, ...] = ()

    @property
    def bucket(self) -> int:
        """The rows that tables are padded to."""
        return bucket_of(self.count)

    @property
    def reads(self) -> tuple[str, ...]:
        """The backbone's tensors that `start` reads."""
        return (f"{self.name}.weight",) if self.tokens else ()

    @property
    def virtual_tokens(self) -> int:
        """Placeholders before each of the task's sequences."""
        return self.count

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """PEFT's key and shape."""
        return {KEY: (self.count, self.features)}

    def place(self, graph: MuxGraph, task: str, table: str, row: int) -> None:
        """The embeddings are rows of the table; PEFT draws fresh ones as torch draws an embedding."""
        graph.params[task, KEY] = Param(task, KEY, table, row, 0, self.count, False, std=1.0)


def resolve(task: Task, config: Any, skeleton: nn.Module) -> list[Site]:
    """The prompt that the config asks for; `config` ends up as PEFT would save it.

    Raises:
        ValueError: naming the task and the field.
    """
    refuse_fields(task, config, _SUPPORTED)
    count = virtual_tokens(task, config)
    name, module = embeddings(task, config, skeleton)
    features = module.embedding_dim
    fill_sizes(task, config, skeleton, features)
    return [Site(name, count, features, _tokens(task, config, count, module.num_embeddings))]


def embeddings(task: Task, config: Any, skeleton: Any) -> tuple[str, nn.Embedding]:
    """The backbone's embedding module and its name."""
    found = skeleton.get_input_embeddings() if hasattr(skeleton, "get_input_embeddings") else None
    if not isinstance(found, nn.Embedding):
        raise ValueError(f"task {task.name!r}: peft_type={config.peft_type.value} needs a backbone with get_input_embeddings()")
    return next(name for name, module in skeleton.named_modules() if module is found), found


def virtual_tokens(task: Task, config: Any) -> int:
    """`num_virtual_tokens`, checked."""
    count = config.num_virtual_tokens
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= BUCKETS[-1]:
        raise ValueError(f"task {task.name!r}: num_virtual_tokens={count!r} must be an integer in 1..{BUCKETS[-1]}")
    if config.num_transformer_submodules not in (None, 1):
        raise ValueError(f"task {task.name!r}: num_transformer_submodules={config.num_transformer_submodules} is not supported (1)")
    return count


def positive(task: Task, config: Any, field: str) -> int:
    """A size of the config, checked."""
    given = getattr(config, field)
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise ValueError(f"task {task.name!r}: {field}={given!r} must be an integer of at least 1")
    return given


def embedding(count: int, features: int) -> Input:
    """What an encoder of prompts begins with, drawn as torch draws an embedding."""
    return Input("embedding.weight", f"{ENCODER}.embedding.weight", (count, features), std=1.0)


def linear(name: str, features: int, out: int, *, zero: bool = False) -> tuple[Input, Input]:
    """Weight and bias of a linear of an encoder, drawn as torch draws them, or zeros."""
    bound = 0.0 if zero else features**-0.5
    return (
        Input(f"{name}.weight", f"{ENCODER}.{name}.weight", (out, features), bound),
        Input(f"{name}.bias", f"{ENCODER}.{name}.bias", (out,), bound),
    )


def fill_sizes(task: Task, config: Any, skeleton: Any, features: int) -> None:
    """What PEFT reads off the backbone where the config leaves it open."""
    shape = getattr(skeleton, "config", None)
    for field, value in (
        ("token_dim", features),
        ("num_layers", getattr(shape, "num_hidden_layers", None)),
        ("num_attention_heads", getattr(shape, "num_attention_heads", None)),
        ("num_transformer_submodules", 1),
    ):
        given = getattr(config, field)
        if given is None:
            setattr(config, field, value)
        elif value is not None and given != value:
            raise ValueError(f"task {task.name!r}: {field}={given!r}, but the backbone has {value}")


def _tokens(task: Task, config: Any, count: int, vocabulary: int) -> tuple[int, ...]:
    kind = getattr(config.prompt_tuning_init, "value", config.prompt_tuning_init)
    if kind == "RANDOM":
        return ()
    if kind == "SAMPLE_VOCAB":
        from runtime.training import generator

        return tuple(torch.randint(vocabulary, (count,), generator=generator(task.seed, task.name, KEY)).tolist())
    if kind != "TEXT":
        raise ValueError(f"task {task.name!r}: prompt_tuning_init={kind!r} is not supported (RANDOM, SAMPLE_VOCAB, TEXT)")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **(config.tokenizer_kwargs or {}))
    except (OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"task {task.name!r}: tokenizer_name_or_path={config.tokenizer_name_or_path!r}: {reason}") from error
    ids = tokenizer(config.prompt_tuning_init_text)["input_ids"]
    if not ids:
        raise ValueError(f"task {task.name!r}: prompt_tuning_init_text={config.prompt_tuning_init_text!r} has no token")
    return tuple((ids * -(-count // len(ids)))[:count])


def start(sites: Sequence[Site], model: nn.Module) -> dict[str, Tensor]:
    """The embeddings of the tokens that a prompt begins with."""
    (site,) = sites
    if not site.tokens:
        return {}
    with torch.no_grad():
        embedding: Any = model.get_input_embeddings()
        return {KEY: embedding(torch.tensor(site.tokens, device=embedding.weight.device)).float().cpu()}


# --- nodes, for all kinds with virtual tokens --------------------------------------------------------------------------


class Tokens(Protocol):
    """P virtual tokens of K features, wherever they come from: `place` says what fills a row of a table with them."""

    @property
    def name(self) -> str: ...
    @property
    def features(self) -> int: ...
    @property
    def bucket(self) -> int: ...
    def place(self, graph: MuxGraph, task: str, table: str, row: int) -> None: ...


def attach(graph: MuxGraph, task: str, sites: Sequence[Tokens]) -> None:
    """Behind the embedding: the task's own rows where its placeholders stand."""
    (site,) = sites
    node = embedded(graph, task, site.name)
    users = list(node.users)
    with graph.gm.graph.inserting_before(node.next):
        out = _write(graph, f"{site.name}.prompt{site.bucket}@{task}", {task: site}, (task,), node)
    for user in users:
        user.replace_input_with(node, out)
    # The record by which `fuse` finds the node again in its own copy of the graph.
    out.meta["mux_prompt"] = (task, site)


def embedded(graph: MuxGraph, task: str, name: str) -> fx.Node:
    """The embedding module's output."""
    ids = graph.inputs[Source("chunk", "input_ids")]
    found = [node for node in graph.gm.graph.find_nodes(op="call_function", target=aten.embedding.default) if node.args[1] is ids]
    if len(found) != 1 or module_of(found[0]) != name:
        raise ValueError(f"task {task!r}: the forward does not look its tokens up in {name!r} once, which a prompt needs")
    node = found[0]
    while len(node.users) == 1 and module_of(user := next(iter(node.users))) == name and "mux_prompt" not in user.meta:
        node = user
    return node


def fuse(graph: MuxGraph, groups: Sequence[Group], *, reserve: int, previous: Mapping[str, Table]) -> None:
    """The virtual tokens of one bucket are one table, of whatever kind they are."""
    found: dict[tuple[str, int], list[fx.Node]] = {}
    for node in graph.gm.graph.nodes:
        if "mux_prompt" in node.meta:
            _, site = node.meta["mux_prompt"]
            found.setdefault((site.name, site.bucket), []).append(node)
    for (name, bucket), nodes in found.items():
        sites = dict(node.meta["mux_prompt"] for node in nodes)
        first, *later = nodes
        for node in later:
            node.replace_all_uses_with(node.args[2])
            graph.gm.graph.erase_node(node)
        table = f"{name}.prompt{bucket}"
        slots = slots_of(in_order(graph, sites), reserve, previous.get(table))
        with graph.gm.graph.inserting_before(first):
            joint = _write(graph, table, sites, slots, first.args[2])
        first.replace_all_uses_with(joint)
        graph.gm.graph.erase_node(first)


def _write(graph: MuxGraph, name: str, sites: Mapping[str, Tokens], slots: tuple[str, ...], x: fx.Node) -> fx.Node:
    gm, inputs, value = graph.gm, Inputs(graph, x), val(x)
    some = next(iter(sites.values()))
    dtype = str(value.dtype).removeprefix("torch.")
    table = Table(name, (len(slots), some.bucket, some.features), slots, True, route_key(slots), dtype)
    graph.tables[name] = table
    for task, site in sites.items():
        site.place(graph, task, name, slots.index(task))
    virtual, route = inputs.counter("virtual"), inputs.route(table)
    places = call(gm, aten.arange.default, (some.bucket,), x, device=value.device)
    chosen = call(gm, aten.eq.Tensor, (call(gm, aten.unsqueeze.default, (virtual, 1), x), places), x)
    chosen = call(gm, aten.to.dtype, (chosen, value.dtype), x)
    rows = call(gm, TILE_MM, (chosen, inputs.table(table), route, None, False), x)
    rows = call(gm, aten.reshape.default, (rows, list(value.shape)), x)
    here = call(gm, aten.logical_and.default, (call(gm, aten.ge.Scalar, (virtual, 0), x), owned(graph, route, x)), x)
    here = call(gm, aten.reshape.default, (here, [*value.shape[:-1], 1]), x)
    return call(gm, aten.where.self, (here, rows, x), x)


def owned(graph: MuxGraph, route: fx.Node, like: fx.Node) -> fx.Node:
    """[T] whether a row's block has a slot."""
    blocks = call(graph.gm, aten.unsqueeze.default, (call(graph.gm, aten.ge.Scalar, (route, 0), like), 1), like)
    rows = call(graph.gm, aten.expand.default, (blocks, [graph.blocks, graph.tile]), like)
    return call(graph.gm, aten.reshape.default, (rows, [graph.tokens]), like)
