"""split: a backbone -> the part of it that one rank of a tensor-parallel group computes, a module of local shapes.

Which linears are split is the model's own plan (transformers' `base_model_tp_plan`): a column-parallel linear has some of the
output features on each rank, a row-parallel one some of the input features. The head and the embedding of the input ids are split
by their vocabulary where that divides. Other embeddings and norms are whole everywhere.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from passes.capture import is_peft_model
from runtime.tables import Shard

COLUMN, ROW, VOCABULARY = "column", "row", "vocabulary"
_WAYS = {"colwise": COLUMN, "rowwise": ROW}
# What begins and ends with whole values on every rank may as well be computed by every rank.
_WHOLE = frozenset(
    {
        "colwise_gather_output",
        "colwise_rep",
        "embedding_rowwise",
        "replicated_with_grad_allreduce",
        "replicate",
        "rowwise_rep",
        "rowwise_split_input",
    }
)


@dataclass(frozen=True, slots=True)
class Split:
    """How one rank of `count` computes a model.

    Args:
        ways: COLUMN or ROW, or VOCABULARY (rows of an embedding), by the names of the modules that are split.
        index: which of the ranks.
        head: the module whose output features are the vocabulary; "": it is whole.
    """

    ways: dict[str, str]
    index: int
    count: int
    head: str = ""

    @classmethod
    def of(cls, model: nn.Module, *, index: int, count: int) -> Split:
        """By the model's plan.

        Raises:
            ValueError: as `plan`.
        """
        ways = plan(model, count)
        head = _head(model)
        return cls(ways, index, count, head if head in ways else "")

    def shard(self, name: str, of: str) -> Shard | None:
        """The rank's piece of a linear's "weight" [out, in] or "bias" [out]; None: all of it."""
        way = self.ways[name]
        if of == "bias" and way == ROW:
            return None
        return Shard(1 if way == ROW else 0, self.index, self.count)

    @property
    def adapted(self) -> Split:
        """As adapters see it: what tasks have of an embedding is theirs for all tokens, on every rank."""
        return replace(self, ways={name: way for name, way in self.ways.items() if way != VOCABULARY})


def plan(model: nn.Module, count: int) -> dict[str, str]:
    """Read off a model how `count` ranks split it: COLUMN, ROW or VOCABULARY, by the names of its modules.

    Raises:
        ValueError: it has no plan, or one that is not known here, or what does not divide; naming its type and the module.
    """
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    where = f"mesh tp={count}: backbone {kind!r}"
    if is_peft_model(model):
        raise ValueError(f"mesh tp={count}: backbone is a PeftModel: give the model without adapters, and their folders as tasks")
    styles: dict[str, str] = getattr(model, "_tp_plan", None) or {}
    if not styles:
        raise ValueError(f"{where} has no tensor-parallel plan in transformers (base_model_tp_plan)")
    ways: dict[str, str] = {}
    head = _head(model)
    for name, module in model.named_modules():
        style = styles.get(re.sub(r"\.\d+(?=\.|$)", ".*", name), "replicate")
        if style not in _WAYS and style not in _WHOLE:
            raise ValueError(f"{where}: module {name!r} has the style {style!r}, which is not supported")
        if name == head and type(module) is nn.Linear and module.out_features % count == 0:
            ways[name] = COLUMN
        elif style in _WAYS:
            if type(module) is not nn.Linear:
                raise ValueError(f"{where}: module {name!r} is a {type(module).__name__}, only Linear can be split")
            ways[name] = _WAYS[style]
            features = module.out_features if ways[name] == COLUMN else module.in_features
            if features % count:
                raise ValueError(f"{where}: module {name!r} has {features} features to split, which {count} does not divide")
    if not set(ways) - {head}:
        raise ValueError(f"{where}: its tensor-parallel plan splits no linear")
    _check_heads(model, ways, where, count)
    return ways | dict.fromkeys(_table(model, ways, count), VOCABULARY)


def _table(model: nn.Module, ways: dict[str, str], count: int) -> list[str]:
    """The names of the embedding of the input ids, if its rows are split: not where another module needs all of the tensor."""
    found: Any = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if not isinstance(found, nn.Embedding) or found.num_embeddings % count or found.max_norm is not None:
        return []
    readers = {
        name: module for name, module in model.named_modules() for own in module.parameters(recurse=False) if own is found.weight
    }
    whole = [name for name, module in readers.items() if module is not found and ways.get(name) != COLUMN]
    return [] if whole else [name for name, module in readers.items() if module is found]


def _head(model: nn.Module) -> str:
    """The name of the module that the logits come from, "" if it is not known."""
    found = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return next((name for name, module in model.named_modules() if module is found), "")


def _check_heads(model: nn.Module, ways: dict[str, str], where: str, count: int) -> None:
    """Attention is split by whole heads."""
    config: Any = getattr(model, "config", None)
    inside = [name for name in ways if hasattr(model.get_submodule(name.rpartition(".")[0]), "head_dim")]
    for field in ("num_attention_heads", "num_key_value_heads") if inside else ():
        heads = getattr(config, field, None)
        if heads is not None and heads % count:
            raise ValueError(f"{where}: {field}={heads}, which {count} does not divide")


def split(model: nn.Module, how: Split, device: torch.device | None = None) -> nn.Module:
    """The rank's part, a module of its own whose tensors are those of `model` or views of them.

    Columns of a weight are made contiguous, the one copy that there is. The model is left as it is.

    Args:
        device: where the tensors go; None: they stay. What is moved is copied, the rank's part alone.
    """
    shards: dict[int, Shard] = {}
    for name in how.ways:
        for of, tensor in model.get_submodule(name).named_parameters(recurse=False):
            shard = how.shard(name, of)
            if shard is not None:
                shards[id(tensor)] = shard
    # A weight may be split here and whole there: that of a head which is tied to the embedding.
    elsewhere = {
        id(own) for name, module in model.named_modules() if name not in how.ways for own in module.parameters(recurse=False)
    }
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        shard = None if id(parameter) in elsewhere else shards.get(id(parameter))
        memo[id(parameter)] = nn.Parameter(_part(parameter, shard, device), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer if device is None else buffer.to(device)
    part = copy.deepcopy(model, memo)
    for name, way in how.ways.items():
        module: Any = part.get_submodule(name)
        for of, tensor in model.get_submodule(name).named_parameters(recurse=False):
            if id(tensor) in elsewhere:
                setattr(module, of, nn.Parameter(_part(tensor, how.shard(name, of), device), requires_grad=False))
        size = {COLUMN: "out_features", ROW: "in_features", VOCABULARY: "num_embeddings"}[way]
        setattr(module, size, getattr(module, size) // how.count)
    return part


def _part(whole: Tensor, shard: Shard | None, device: torch.device | None) -> Tensor:
    own = whole.detach() if shard is None else shard.cut(whole.detach())
    if device is not None and device != own.device:
        own = own.to(device)
    return own.contiguous()
