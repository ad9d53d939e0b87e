"""What a captured model can read: ids and positions that its tables hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from passes.graph import MuxGraph, Source, module_of, val
from passes.split import VOCABULARY, Split

_EMBEDDING = torch.ops.aten.embedding.default
_INDEX_KEPT = (torch.ops.aten.view.default, torch.ops.aten.reshape.default, torch.ops.aten.to.dtype, torch.ops.aten.add.Tensor)


def vocabulary(graph: MuxGraph, how: Split | None = None) -> int:
    """Ids below this can be looked up.

    Args:
        graph: as captured; its lookups are of ids of the whole vocabulary.
        how: of which part of a model it is.
    """
    rows = _rows_read(graph, "input_ids", how)
    return (
        rows if rows is not None else val(next(n for n in reversed(graph.gm.graph.nodes) if n.op == "output").args[0][0]).shape[-1]
    )


def positions(graph: MuxGraph, model: nn.Module) -> int | None:
    """Longest sequence the model can see, by its configuration or its table of positions; None: no limit known."""
    known = [limit for limit in (stated(model), _rows_read(graph, "position_ids")) if limit is not None and limit > 0]
    return min(known, default=None)


def stated(model: nn.Module) -> int | None:
    """Longest sequence that the model's configuration says it is for; None: it says nothing."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = [
        getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len")
    ]
    return min((limit for limit in found if isinstance(limit, int) and limit > 0), default=None)


def _rows_read(graph: MuxGraph, name: str, how: Split | None = None) -> int | None:
    """Rows of the embedding, on all ranks, that is indexed by a chunk input (plus a constant, as OPT's positions are)."""
    source = graph.inputs.get(Source("chunk", name))
    if source is None:
        return None
    found = []
    waiting: list[tuple[fx.Node, Any]] = [(source, 0)]
    while waiting:
        node, offset = waiting.pop()
        for user in node.users:
            if user.target is _EMBEDDING and user.args[1] is node:
                ranks = how.count if how is not None and how.ways.get(module_of(user)) == VOCABULARY else 1
                found.append(ranks * val(user.args[0]).shape[0] - offset)
            elif user.target in _INDEX_KEPT and user.args[0] is node:
                added = user.args[1] if user.target is torch.ops.aten.add.Tensor else 0
                if isinstance(added, int):
                    waiting.append((user, offset + added))
    return min(found) if found else None
