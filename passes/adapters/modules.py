"""What a config trains beside its adapters: whole modules (`modules_to_save`), rows of an embedding (`trainable_token_indices`).

Dispatch: a module's input. Adapter: the task's own copy of the module. Aggregate: in place of the backbone's output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from passes import own
from passes.adapters import norm
from passes.adapters.sites import BUCKETS, NAME, bucket_of, key, linears
from passes.capture import original_name
from passes.graph import EMBEDDING, MuxGraph, module_of
from passes.split import ROW, Split
from passes.task import Task
from runtime.tables import Table


@dataclass(frozen=True, slots=True)
class Site:
    """Parts of one module that a task has its own of, and its tensors by PEFT's keys.

    `begins` says which of the backbone's tensors each begins with, and which rows of it (none: all).
    """

    name: str
    parts: tuple[tuple[str, own.Part], ...]
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    begins: tuple[tuple[str, str, tuple[int, ...]], ...] = ()

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """PEFT's keys and shapes."""
        return dict(self.shapes)

    @property
    def reads(self) -> tuple[str, ...]:
        """The backbone's tensors that `start` reads."""
        return tuple(name for _, name, _ in self.begins)

    def unsplit(self, how: Split) -> str:
        """Tokens are counted in the whole vocabulary, and the task's own bias is added on every rank."""
        for _, part in self.parts:
            if isinstance(part, own.Tokens) and part.name in how.ways:
                return f"trainable tokens at {part.name!r}"
            if isinstance(part, own.Linear) and part.bias is not None and how.ways.get(part.name) == ROW:
                return f"modules_to_save at {part.name!r}"
        return ""


@dataclass(frozen=True, slots=True)
class Norm(norm.Site):
    """A whole norm: the same as a tuned one, under other keys."""

    def key(self, name: str) -> str:
        """PEFT's key of "weight" or "bias"."""
        return f"{key(self.name)}.{name}"


def resolve(task: Task, config: Any, skeleton: nn.Module) -> list[Any]:
    """Read off what PEFT wrapped in the weightless copy, after its injection.

    Raises:
        ValueError: naming the task, the field and the module.
    """
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    named = dict(skeleton.named_modules())
    saved = {name: module.modules_to_save[NAME] for name, module in named.items() if isinstance(module, ModulesToSaveWrapper)}
    for entry in config.modules_to_save or ():
        if not any(name.endswith(entry) for name in saved):
            raise ValueError(f"task {task.name!r}: modules_to_save names {entry!r}, which the backbone does not have")
    sites = [_saved(task, name, module) for name, module in saved.items()]
    wrappers = {name: module.token_adapter for name, module in named.items() if isinstance(module, TrainableTokensWrapper)}
    if wrappers:
        sites += tokens(task, "trainable_token_indices", wrappers, "token_adapter.trainable_tokens_delta")
    return sites


def _saved(task: Task, name: str, module: nn.Module) -> Any:
    shapes = tuple((f"{key(name)}.{own_name}", tuple(value.shape)) for own_name, value in module.named_parameters())
    begins = tuple((f"{key(name)}.{own_name}", f"{name}.{own_name}", ()) for own_name, _ in module.named_parameters())
    tensors = dict(module.named_parameters())
    if is_plain(module):
        rows, features = module.weight.shape
        return Site(name, (("embedding", own.Rows(name, rows, features, module.padding_idx, shapes[0][0])),), shapes, begins)
    if type(module) is nn.Linear or type(module).__name__ == "Conv1D":
        transposed = type(module) is not nn.Linear
        out, into = reversed(tensors["weight"].shape) if transposed else tensors["weight"].shape
        bias = f"{key(name)}.bias" if tensors.get("bias") is not None else None
        part = own.Linear(name, into, out, transposed, f"{key(name)}.weight", bias)
        return Site(name, (("linear", part),), shapes, begins)
    if tensors and set(tensors) <= {"weight", "bias"} and all(value.dim() == 1 for value in tensors.values()):
        return Norm(name, tuple(tensors), next(iter(tensors.values())).numel())
    raise ValueError(
        f"task {task.name!r}: modules_to_save selects {name!r}, a {type(module).__name__}, which is not supported (Linear, "
        "Conv1D, Embedding and norms)"
    )


def is_plain(module: Any) -> bool:
    """An embedding whose output is its rows: subclasses scale them, or look other places up."""
    plain = type(module) is nn.Embedding and module.max_norm is None
    return plain and not module.scale_grad_by_freq and not module.sparse


def tokens(task: Task, field: str, wrappers: Mapping[str, Any], suffix: str) -> list[Site]:
    """PEFT's layers of tokens, by the modules they wrap, as a site for each tensor; the modules that share it are its parts.

    Args:
        field: of the config, for refusals.
        suffix: what a tensor is called in PEFT's file, behind its module.

    Raises:
        ValueError: naming the task, the field and the module.
    """
    field = f"task {task.name!r}: {field}"
    shared = [name for name, adapter in wrappers.items() if adapter.tied_adapter is not None]
    owners = {name: adapter for name, adapter in wrappers.items() if adapter.tied_adapter is None}
    sites = []
    for name in wrappers:
        if "base_layer" in name or "token_adapter" in name:
            raise ValueError(f"{field} at {name!r}, which the task adapts otherwise as well, is not supported")
    for name, adapter in owners.items():
        base, ids = adapter.get_base_layer(), tuple(adapter.token_indices[NAME])
        linear = type(base) is nn.Linear and base.bias is None
        if not linear and not is_plain(base):
            raise ValueError(f"{field} selects {name!r}, a {type(base).__name__}, which is not supported (Embedding, Linear)")
        rows, features = base.weight.shape
        if not ids or len(set(ids)) < len(ids) or any(not 0 <= token < rows for token in ids):
            raise ValueError(f"{field}={list(ids)[:8]!r} at {name!r} must be different numbers of 0 to {rows - 1}")
        if len(ids) > BUCKETS[-1]:
            raise ValueError(f"{field} at {name!r} has {len(ids)} tokens; up to {BUCKETS[-1]} are supported")
        tied = [other for other in shared if wrappers[other].tied_adapter is adapter]
        file_key, bucket = f"{key(name)}.{suffix}", bucket_of(len(ids))
        padding = None if linear else base.padding_idx
        parts: list[tuple[str, own.Part]] = [
            ("linear" if linear else "embedding", own.Tokens(name, ids, bucket, features, padding, file_key, linear, bool(tied)))
        ]
        parts += [("linear", own.Tokens(other, ids, bucket, features, None, file_key, True, True)) for other in tied]
        sites.append(Site(name, tuple(parts), ((file_key, (len(ids), features)),), ((file_key, f"{name}.weight", ids),)))
    return sites


def start(sites: Sequence[Any], model: nn.Module) -> dict[str, Tensor]:
    """A fresh copy holds what the backbone's module, or its rows, hold."""
    weights = {original_name(name): value for name, value in model.named_parameters(remove_duplicate=False)}
    found = {}
    for site in sites:
        begins = site.begins if isinstance(site, Site) else [(at, at.removeprefix(key("")), ()) for at in site.tensors()]
        for at, name, rows in begins:
            value = weights[name].detach()
            found[at] = (value[torch.tensor(rows, device=value.device)] if rows else value).float().cpu()
    return found


def attach(graph: MuxGraph, task: str, sites: Sequence[Any]) -> None:
    """Behind each module the task's own part of it, for the task's rows."""
    norm.attach(graph, task, [site for site in sites if isinstance(site, Norm)])
    for site in sites:
        for what, part in site.parts if isinstance(site, Site) else ():
            for node in linears(graph, task, part.name) if what != "embedding" else embeddings(graph, task, part.name):  # type: ignore[attr-defined]
                own.attach(graph, task, part, node)


def embeddings(graph: MuxGraph, task: str, name: str) -> list[fx.Node]:
    """The lookups of an embedding module.

    Raises:
        ValueError: the forward runs none there.
    """
    found = graph.gm.graph.find_nodes(op="call_function", target=EMBEDDING)
    nodes = [node for node in found if module_of(node) == name]
    if not nodes:
        raise ValueError(f"task {task!r}: its config selects {name!r}, which the forward does not run as a lookup of embeddings")
    return nodes


def fuse(graph: MuxGraph, *, reserve: int, previous: Mapping[str, Table]) -> None:
    """Parts of one place are joined."""
    own.fuse(graph, reserve=reserve, previous=previous)
