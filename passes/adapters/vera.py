"""VeRA (arXiv 2310.11454): y = W x + lambda_b * (B (lambda_d * (A x))), with random A and B that all sites of a task share.

Dispatch: the input of the linear. Adapter: two vectors around two fixed products. Aggregate: add to the linear's output. What
regions read are the products with the vectors worked in, so VeRA and LoRA tasks share banks and kernels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from passes import low_rank
from passes.adapters.sites import BUCKETS, NAME, dropout_of, inject, key, linears, no_site, refuse_fields, refuse_unknown_targets
from passes.graph import MuxGraph
from passes.linears import Group
from passes.task import Task
from runtime.tables import Encoding, Input, Place, Table

_SUPPORTED = frozenset(
    {"r", "target_modules", "exclude_modules", "projection_prng_key", "save_projection", "vera_dropout", "d_initial",
     "fan_in_fan_out", "init_weights", "layers_to_transform", "layers_pattern"}
)  # fmt: skip
KEYS = "base_model.vera_A", "base_model.vera_B"


@dataclass(frozen=True, slots=True)
class Projection:
    """The random A [r, widest K] and B [widest N, r] of all sites: kept and saved, never trained."""

    name: str
    rank: int
    widest: tuple[int, int]
    seed: int

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """PEFT's keys and shapes."""
        features, outputs = self.widest
        return {KEYS[0]: (self.rank, features), KEYS[1]: (outputs, self.rank)}

    def encoding(self, task: str) -> Encoding:
        inputs = tuple(
            Input(name, own, shape, start=f"vera_{name}", trainable=False)
            for name, (own, shape) in zip("AB", self.tensors().items(), strict=True)
        )
        return Encoding(task, self.name, "", inputs, settings={"projection_prng_key": self.seed})


@dataclass(frozen=True, slots=True)
class Site:
    """VeRA of one task at one linear [K -> N]."""

    name: str
    rank: int
    in_features: int
    out_features: int
    dropout: float
    d_initial: float
    scaling: float = 1.0

    @property
    def bucket(self) -> int:
        """The rank that tables are padded to."""
        return next(size for size in BUCKETS if self.rank <= size)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """PEFT's keys and shapes."""
        stem = key(self.name)
        return {f"{stem}.vera_lambda_b": (self.out_features,), f"{stem}.vera_lambda_d": (self.rank,)}

    def bind(self, graph: MuxGraph, task: str, a: Place, b: Place) -> None:
        """The rows of A and B are computed from the vectors."""
        (key_b, shape_b), (key_d, shape_d) = self.tensors().items()
        vectors = Input("lambda_b", key_b, shape_b), Input("lambda_d", key_d, shape_d, fill=self.d_initial)
        graph.encodings[task, f"{self.name}.vera"] = Encoding(
            task, f"{self.name}.vera", "vera", vectors, (a, b), reads=dict(zip("AB", KEYS, strict=True)),
            settings={"in_features": self.in_features},
        )  # fmt: skip


def resolve(task: Task, config: Any, skeleton: nn.Module) -> list[Any]:
    """Let PEFT inject the adapter into the weightless copy, and read off what it did."""
    refuse_fields(task, config, _SUPPORTED)
    for field, wrong in (
        ("save_projection", not config.save_projection),
        ("init_weights", not config.init_weights),
    ):
        if wrong:
            raise ValueError(f"task {task.name!r}: {field}={getattr(config, field)!r} is not supported")
    if isinstance(config.r, bool) or not isinstance(config.r, int) or not 1 <= config.r <= BUCKETS[-1]:
        raise ValueError(f"task {task.name!r}: r={config.r!r} must be an integer in 1..{BUCKETS[-1]}")
    dropout = dropout_of(task, config, "vera_dropout")
    refuse_unknown_targets(task, config, skeleton)
    inject(task, config, skeleton)
    from peft.tuners.vera import VeraLayer

    sites = [
        Site(name, config.r, module.in_features, module.out_features, dropout, float(config.d_initial))
        for name, module in skeleton.named_modules()
        if isinstance(module, VeraLayer) and NAME in module.vera_lambda_d
    ]
    if not sites:
        raise no_site(task, config)
    widest = max(site.in_features for site in sites), max(site.out_features for site in sites)
    return [Projection("vera", config.r, widest, config.projection_prng_key), *sites]


def attach(graph: MuxGraph, task: str, sites: Sequence[Any]) -> None:
    """The shared matrices, then a low-rank adapter behind each linear."""
    projection, *own = sites
    graph.encodings[task, projection.name] = projection.encoding(task)
    views: dict[fx.Node, fx.Node] = {}
    for site in own:
        for node in linears(graph, task, site.name):
            low_rank.attach(graph, task, site, node, views)


def fuse(graph: MuxGraph, groups: Sequence[Group], *, reserve: int, previous: Mapping[str, Table]) -> None:
    """Low-rank adapters become banks of their groups of linears."""
    low_rank.fuse(graph, groups, reserve=reserve, previous=previous)
