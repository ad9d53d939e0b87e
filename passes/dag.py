"""dag: regions and actions as networkx graphs, where legality, cycles and critical paths are asked."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import networkx as nx

from runtime.program import Action, Kind, Program
from runtime.region import RegionSpec, value_of


def region_graph(regions: Sequence[RegionSpec]) -> nx.DiGraph:
    """Regions by name; an edge from who makes a value to who reads it, `values` on it."""
    graph = nx.DiGraph()
    graph.add_nodes_from(region.name for region in regions)
    maker = {value: region.name for region in regions for value in region.outputs}
    for region in regions:
        for value in filter(None, map(value_of, region.inputs)):
            if value in maker:
                graph.add_edge(maker[value], region.name)
                graph.edges[maker[value], region.name].setdefault("values", []).append(value)
    return graph


def check_order(regions: Sequence[RegionSpec]) -> None:
    """That a region runs behind those it reads.

    Raises:
        AssertionError: naming a cycle, or two regions in the wrong order.
    """
    graph = region_graph(regions)
    assert nx.is_directed_acyclic_graph(graph), f"regions wait for each other: {' -> '.join(a for a, _ in nx.find_cycle(graph))}"
    place = {region.name: index for index, region in enumerate(regions)}
    for made, read in graph.edges:
        assert place[made] < place[read], f"{read} runs before {made}, whose {graph.edges[made, read]['values']} it reads"


def action_graph(program: Program, *, lanes: bool = True) -> nx.DiGraph:
    """Actions by their place in the program (`action` on the node); an edge from what must have ended to what may then begin.

    Args:
        lanes: with the order within each (rank, stream); otherwise data alone: what any number of streams could not undercut.
    """
    graph = nx.DiGraph()
    writers: dict[tuple[int, str, int], list[int]] = defaultdict(list)
    last: dict[tuple[int, str], int] = {}
    for index, action in enumerate(program):
        graph.add_node(index, action=action)
        for name in action.reads:
            for writer in _writers(action, name, writers):
                graph.add_edge(writer, index)
        lane = action.rank, action.stream
        if lanes and lane in last:
            graph.add_edge(last[lane], index)
        last[lane] = index
        for name in action.writes:
            writers[_value(action, name)].append(index)
    return graph


def _value(action: Action, name: str) -> tuple[int, str, int]:
    # Gradients of tables add up over micro-batches; every other name means another value in each.
    return action.rank, name, -1 if name.startswith("grad.") else action.micro


def _writers(action: Action, name: str, writers: dict[tuple[int, str, int], list[int]]) -> list[int]:
    """Who wrote what an action reads; an optimizer step reads what any micro-batch wrote."""
    if action.kind is Kind.STEP:
        return [index for (rank, known, _), found in writers.items() if (rank, known) == (action.rank, name) for index in found]
    return writers[_value(action, name)]


def critical_path(graph: nx.DiGraph, seconds: Callable[[Action], float]) -> tuple[list[Action], float]:
    """The longest chain of actions that wait for each other, and how long it takes."""
    actions = dict(graph.nodes(data="action"))
    # networkx weighs edges: an edge costs what the action at its end takes, and the first action is added.
    weighed = nx.DiGraph()
    weighed.add_nodes_from(graph)
    weighed.add_weighted_edges_from((a, b, seconds(actions[b])) for a, b in graph.edges)
    weighed.add_weighted_edges_from(("start", node, seconds(actions[node])) for node, degree in graph.in_degree if not degree)
    if not actions:
        return [], 0.0
    path = [actions[node] for node in nx.dag_longest_path(weighed) if node != "start"]
    return path, sum(map(seconds, path))
