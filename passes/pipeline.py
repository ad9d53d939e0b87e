"""The list of graph passes, and the runner that does their housekeeping."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from codegen.lower import Target
from passes.adapters import Adapter
from passes.attach import attach
from passes.carry import carry
from passes.fuse import fuse
from passes.graph import MuxGraph, check
from passes.lookup import lookup
from passes.lower import lower
from passes.normalise import normalise
from passes.shard import shard, share
from passes.split import Split
from runtime.tables import Table

Pass = Callable[[MuxGraph], MuxGraph]
OPTIONAL = ("fuse",)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One pass's work. `before` and `after` are the graphs themselves: print them, or run their `gm`."""

    name: str
    seconds: float
    before: MuxGraph
    after: MuxGraph

    def difference(self) -> str:
        """Which operators became more or fewer: "linear: 7 -> 15 (+8)"."""
        old, new = _count(self.before), _count(self.after)
        return "\n".join(
            f"{name}: {old[name]} -> {new[name]} ({new[name] - old[name]:+d})"
            for name in sorted(old | new)
            if old[name] != new[name]
        )


def _count(graph: MuxGraph) -> Counter[str]:
    return Counter(str(node.target) for node in graph.gm.graph.nodes if node.op == "call_function")


def passes(
    *,
    adapters: Sequence[Adapter],
    reserve: int,
    previous: Mapping[str, Table],
    target: Target | None = None,
    carried: bool = False,
    split: Split | None = None,
) -> list[tuple[str, Pass]]:
    """The passes in their order, with their knobs bound. A new pass is a file and a row here.

    Args:
        carried: a sequence may be longer than a chunk.
        split: the graph is of a part of a model, and so made; None: of all of it.
    """
    wholes = {adapter.task.name: adapter.shapes for adapter in adapters}
    return [
        ("normalise", normalise),
        *([("shard", partial(shard, how=split))] if split is not None else []),
        ("attach", partial(attach, adapters=adapters)),
        ("fuse", partial(fuse, reserve=reserve, previous=previous)),
        *(
            [("share", partial(share, how=split, wholes=wholes)), ("lookup", partial(lookup, how=split))]
            if split is not None
            else []
        ),
        *([("carry", carry)] if carried else []),
        ("lower", partial(lower, target=target)),
    ]


def run_passes(graph: MuxGraph, rows: Sequence[tuple[str, Pass]], *, skip: Sequence[str] = ()) -> tuple[MuxGraph, list[Snapshot]]:
    """Run each pass on its own copy of the graph, check the result and keep it.

    Raises:
        ValueError: `skip` names a pass that does not exist or cannot be left out.
    """
    names = [name for name, _ in rows]
    for name in skip:
        if name not in OPTIONAL:
            raise ValueError(
                f"Options: skip_passes names {name!r}, not an optional pass ({', '.join(OPTIONAL)}; all: {', '.join(names)})"
            )
    trail = []
    for name, run in rows:
        if name in skip:
            continue
        start = time.perf_counter()
        after = run(graph.copy())
        check(after)
        trail.append(Snapshot(name, time.perf_counter() - start, graph, after))
        graph = after
    return graph, trail
