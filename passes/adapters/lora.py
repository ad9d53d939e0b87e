"""LoRA (arXiv 2106.09685): y = W x + s B A x, with s = alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv 2312.03732); and DoRA.

Dispatch: the input of the linear. Adapter: two skinny products. Aggregate: add to the linear's output.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from passes import low_rank, own, vectors
from passes.adapters import bitfit, modules
from passes.adapters.sites import BUCKETS, NAME, inject, key, linears, no_site, refuse_fields, refuse_unknown_targets
from passes.graph import MuxGraph
from passes.linears import Group
from passes.task import Task
from passes.vectors import Filled, Vector
from runtime.tables import Encoding, Input, Param, Place, Table

MAX_RANK = 256

# Fields that this file gives their PEFT meaning; any other field must keep its default.
_SUPPORTED = frozenset(
    {
        "r",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "target_modules",
        "exclude_modules",
        "rank_pattern",
        "alpha_pattern",
        "fan_in_fan_out",
        "init_lora_weights",
        "layers_to_transform",
        "layers_pattern",
        "use_dora",
        "bias",
        "lora_bias",
        "modules_to_save",
        "trainable_token_indices",
    }
)


@dataclass(frozen=True, slots=True)
class Site:
    """LoRA of one task at one linear: y[T, N] += scaling * (dropout(x)[T, K] A^T) B^T, A [r, K], B [N, r].

    `dora` (arXiv 2402.09353): the sum is scaled by columns, to the magnitude that the task learns. `shifted`: B has a bias [N].
    `transposed`, `biased`: the linear stores [K, N]; it has a bias.
    """

    name: str
    rank: int
    scaling: float
    in_features: int
    out_features: int
    init: Any
    dropout: float = 0.0
    dora: bool = False
    shifted: bool = False
    transposed: bool = False
    biased: bool = False

    @property
    def bucket(self) -> int:
        """The rank that tables are padded to; a task's own, so that no neighbour changes its arithmetic."""
        return next(size for size in BUCKETS if self.rank <= size)

    @property
    def keys(self) -> tuple[str, str]:
        """PEFT's names of A and B."""
        return f"{key(self.name)}.lora_A.weight", f"{key(self.name)}.lora_B.weight"

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """PEFT's keys and shapes."""
        a, b = self.keys
        found: dict[str, tuple[int, ...]] = {a: (self.rank, self.in_features), b: (self.out_features, self.rank)}
        if self.dora:
            found[f"{key(self.name)}.lora_magnitude_vector"] = (self.out_features,)
        if self.shifted:
            found[f"{key(self.name)}.lora_B.bias"] = (self.out_features,)
        return found

    def bind(self, graph: MuxGraph, task: str, a: Place, b: Place) -> None:
        """PEFT's tensors are the rows themselves; fresh ones are drawn as `init_lora_weights` says."""
        linear = 1 / math.sqrt(self.in_features)  # kaiming_uniform_(a=sqrt(5)), torch's own for linear layers
        gaussian = self.init == "gaussian"
        key_a, key_b = self.keys
        graph.params[task, key_a] = Param(
            task, key_a, a.table, a.row, a.start, a.stop, False, bound=0.0 if gaussian else linear,
            std=1 / self.rank if gaussian else 0.0,
        )  # fmt: skip
        graph.params[task, key_b] = Param(
            task, key_b, b.table, b.row, b.start, b.stop, True, bound=1 / math.sqrt(self.rank) if self.init is False else 0.0
        )

    def vectors(self, task: str) -> list[Vector]:
        """What is done to the sum: DoRA's scale, or the bias of B."""
        if self.dora:
            key_a, key_b = self.keys
            weights = {"weight": f"{self.name}.weight"} | ({"bias": f"{self.name}.bias"} if self.biased else {})
            magnitude = Input("magnitude", f"{key(self.name)}.lora_magnitude_vector", (self.out_features,), start="dora")
            settings: dict[str, int | float | str] = {"scaling": self.scaling, "fan_in_fan_out": self.transposed}
            encoding = Encoding(
                task, f"{self.name}.dora", "dora", (magnitude,), reads={"lora_A": key_a, "lora_B": key_b}, weights=weights,
                settings=settings,
            )  # fmt: skip
            return [Vector(task, f"{self.name}.dora", Filled(), Filled() if self.biased else None, encoding)]
        if self.shifted:
            value = Input("value", f"{key(self.name)}.lora_B.bias", (self.out_features,))
            encoding = Encoding(task, f"{self.name}.lora_B.bias", "scaled", (value,), settings={"scaling": self.scaling})
            return [Vector(task, f"{self.name}.lora_B.bias", shift=Filled(), encoding=encoding)]
        return []


def resolve(task: Task, config: Any, skeleton: nn.Module) -> list[Any]:
    """Let PEFT inject the adapter into the weightless copy, and read off what it did; `config` ends up as PEFT would save it."""
    refuse_fields(task, config, _SUPPORTED)
    _refuse_values(task, config)
    refuse_unknown_targets(task, config, skeleton)
    inject(task, config, skeleton)
    from peft.tuners.lora import LoraLayer

    sites: list[Any] = []
    for name, module in skeleton.named_modules():
        if isinstance(module, LoraLayer) and NAME in module.r:
            rank = module.r[NAME]
            if not 1 <= rank <= MAX_RANK:
                raise ValueError(f"task {task.name!r}: r={rank} at {name!r} is outside 1..{MAX_RANK}")
            scaling = float(module.scaling[NAME])
            if not math.isfinite(scaling):
                raise ValueError(f"task {task.name!r}: lora_alpha={module.lora_alpha[NAME]} at {name!r} is not finite")
            if NAME not in module.lora_A:
                sites.append(_embedding(task, config, name, module.get_base_layer(), rank, scaling))
                continue
            b = module.lora_B[NAME].weight
            features, init, base = module.lora_A[NAME].weight.shape[1], config.init_lora_weights, module.get_base_layer()
            sites.append(
                Site(
                    name, rank, scaling, features, b.shape[0], init, float(config.lora_dropout), bool(config.use_dora),
                    bool(config.lora_bias), type(base).__name__ == "Conv1D", getattr(base, "bias", None) is not None,
                )
            )  # fmt: skip
    if not sites:
        raise no_site(task, config)
    _warn_unmatched_patterns(task, config, sites)
    return [*sites, *_biases(config, skeleton, {site.name for site in sites}), *modules.resolve(task, config, skeleton)]


def _embedding(task: Task, config: Any, name: str, base: Any, rank: int, scaling: float) -> modules.Site:
    """LoRA of a lookup: A [r, V], of which a token has a column, and B [D, r]."""
    if not modules.is_plain(base):
        raise ValueError(
            f"task {task.name!r}: target_modules selects {name!r}, a {type(base).__name__}; LoRA runs on linear layers and plain "
            "embeddings here"
        )
    if config.use_dora:
        raise ValueError(f"task {task.name!r}: use_dora at {name!r}, an embedding, is not supported")
    (rows, features), keys = base.weight.shape, (f"{key(name)}.lora_embedding_A", f"{key(name)}.lora_embedding_B")
    part = own.LowRankRows(name, rows, features, rank, scaling, base.padding_idx, keys, config.init_lora_weights is not False)
    return modules.Site(name, (("embedding", part),), ((keys[0], (rank, rows)), (keys[1], (features, rank))))


def _biases(config: Any, skeleton: nn.Module, adapted: set[str]) -> list[bitfit.Site]:
    """The backbone's biases that are trained as well: all, or those of the adapted linears."""
    found = []
    for name, value in skeleton.named_parameters() if config.bias != "none" else ():
        if name.endswith(".bias") and "lora_" not in name:
            module = name.removesuffix(".bias").removesuffix(".base_layer")
            if config.bias == "all" or module in adapted:
                found.append(bitfit.Site(module, value.numel(), key(name)))
    return found


def start(sites: Sequence[Any], model: nn.Module) -> dict[str, Tensor]:
    """What is the task's own copy begins with what the backbone's holds."""
    return bitfit.start([site for site in sites if isinstance(site, bitfit.Site)], model) | modules.start(
        [site for site in sites if isinstance(site, modules.Site | modules.Norm)], model
    )


def _refuse_values(task: Task, config: Any) -> None:
    if config.bias not in ("none", "all", "lora_only"):
        raise ValueError(f"task {task.name!r}: bias={config.bias!r} is not known (none, all or lora_only)")
    if config.use_dora and config.lora_dropout:
        raise ValueError(
            f"task {task.name!r}: use_dora with lora_dropout={config.lora_dropout!r} is not supported: it would drop elements of "
            "the frozen product as well"
        )
    for field in ("modules_to_save", "trainable_token_indices"):
        if getattr(config, field) and config.bias != "none":
            raise ValueError(f"task {task.name!r}: {field} with bias={config.bias!r} is not supported")
    if config.use_dora and config.bias != "none":
        raise ValueError(f"task {task.name!r}: use_dora with bias={config.bias!r} is not supported")
    if config.init_lora_weights not in (True, False, "gaussian"):
        raise ValueError(
            f"task {task.name!r}: init_lora_weights={config.init_lora_weights!r} is not supported (True, False or 'gaussian')"
        )
    dropout = config.lora_dropout
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ValueError(f"task {task.name!r}: lora_dropout={dropout!r} must be at least 0 and below 1")
    if isinstance(config.r, bool) or not isinstance(config.r, int) or not 1 <= config.r <= MAX_RANK:
        raise ValueError(f"task {task.name!r}: r={config.r!r} must be an integer in 1..{MAX_RANK}")


def _warn_unmatched_patterns(task: Task, config: Any, sites: list[Site]) -> None:
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, field) or {}:
            if not any(re.match(rf"(.*\.)?({pattern})$", site.name) for site in sites):
                warnings.warn(
                    f"task {task.name!r}: {field} has {pattern!r}, which matches none of its {len(sites)} sites", stacklevel=2
                )


def attach(graph: MuxGraph, task: str, sites: Sequence[Any]) -> None:
    """The low-rank adapter behind each linear, then what is done to the sum; and the biases."""
    views: dict[fx.Node, fx.Node] = {}
    for site in sites:
        for node in linears(graph, task, site.name) if isinstance(site, Site) else ():
            out = low_rank.attach(graph, task, site, node, views)
            for vector in site.vectors(task):
                out = vectors.attach(graph, vector, out, behind=out)
    bitfit.attach(graph, task, [site for site in sites if isinstance(site, bitfit.Site)])
    modules.attach(graph, task, [site for site in sites if isinstance(site, modules.Site | modules.Norm)])


def fuse(graph: MuxGraph, groups: Sequence[Group], *, reserve: int, previous: Mapping[str, Table]) -> None:
    """Low-rank adapters become banks of their groups of linears, vectors of one place are joined."""
    low_rank.fuse(graph, groups, reserve=reserve, previous=previous)
    vectors.fuse(graph, reserve=reserve, previous=previous)
    modules.fuse(graph, reserve=reserve, previous=previous)
