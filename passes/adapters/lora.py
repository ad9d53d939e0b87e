"""LoRA (arXiv 2106.09685): y = W x + s B A x, with s = alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv 2312.03732); and DoRA.

Dispatch: the input of the linear. Adapter: two skinny products. Aggregate: add to the linear's output.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx, nn

from passes import dropped, low_rank, own, vectors
from passes.adapters import bitfit, lora_init, modules
from passes.adapters.sites import NAME, bucket_of, dropout_of, inject, key, linears, no_site, refuse_fields, refuse_unknown_targets
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
        "eva_config",
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
    `transposed`, `biased`: the linear stores [K, N]; it has a bias. `task`, `seed`: what a start of several tensors is drawn
    from. `fan_in`: features of the whole model's input, by which A is drawn; 0: `in_features`.
    """

    name: str
    r: int
    scaling: float
    in_features: int
    out_features: int
    init: Any
    dropout: float = 0.0
    dora: bool = False
    shifted: bool = False
    transposed: bool = False
    biased: bool = False
    task: str = ""
    seed: int = 0
    fan_in: int = 0

    @property
    def reads(self) -> tuple[str, ...]:
        """The backbone's tensors that `start` reads: a start out of the weight is computed by an encoder."""
        return ()

    @property
    def rank(self) -> int:
        """Rows of the tables: what B A started from has its own beside it."""
        return 2 * self.r if lora_init.residual(self.init) else self.r

    @property
    def bucket(self) -> int:
        """The rank that tables are padded to; a task's own, so that no neighbour changes its arithmetic."""
        return bucket_of(self.rank)

    @property
    def keys(self) -> tuple[str, str]:
        """PEFT's names of A and B."""
        return f"{key(self.name)}.lora_A.weight", f"{key(self.name)}.lora_B.weight"

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """PEFT's keys and shapes."""
        a, b = self.keys
        found: dict[str, tuple[int, ...]] = {a: (self.r, self.in_features), b: (self.out_features, self.r)}
        if self.dora:
            found[f"{key(self.name)}.lora_magnitude_vector"] = (self.out_features,)
        if self.shifted:
            found[f"{key(self.name)}.lora_B.bias"] = (self.out_features,)
        return found

    def bind(self, graph: MuxGraph, task: str, a: Place, b: Place) -> None:
        """PEFT's tensors are the rows themselves, unless they start as a part of W; fresh ones are as `init_lora_weights` says."""
        if lora_init.residual(self.init):
            graph.encodings[task, f"{self.name}.residual"] = self._residual(task, a, b)
            return
        if self.dropped:
            self._place(graph, task, 0, b)
        linear = 1 / math.sqrt(self.fan_in or self.in_features)  # kaiming_uniform_(a=sqrt(5)), torch's own for linear layers
        gaussian = self.init == "gaussian"
        key_a, key_b = self.keys
        graph.params[task, key_a] = Param(
            task, key_a, a.table, a.row, a.start, a.stop, False, bound=0.0 if gaussian else linear,
            std=1 / self.r if gaussian else 0.0,
        )  # fmt: skip
        if not self.dropped:
            graph.params[task, key_b] = Param(task, key_b, b.table, b.row, b.start, b.stop, True, bound=self._bound_b)

    @property
    def dropped(self) -> bool:
        """DoRA scales the product of W with the dropped x, and B of it, in place of the sum."""
        return self.dora and self.dropout > 0

    def bind_scale(self, graph: MuxGraph, task: str, scale: Place) -> None:
        """The scale of the frozen product of the dropped x, less 1: the linear's own product is there already."""
        self._place(graph, task, 1, scale)

    def _place(self, graph: MuxGraph, task: str, index: int, place: Place) -> None:
        """Output `index` of the encoding of B and its scale, which two places of the graph make room for, one after the other."""
        name, (key_a, key_b) = f"{self.name}.dora", self.keys
        known = graph.encodings.get((task, name))
        outputs = [*known.outputs] if known is not None else [place]
        outputs[index : index + 1] = [place]
        b = Input("lora_B", key_b, (self.out_features, self.r), bound=self._bound_b)
        graph.encodings[task, name] = Encoding(
            task, name, "dora_dropped", (b, self._magnitude), tuple(outputs), {"lora_A": key_a},
            {"weight": f"{self.name}.weight"}, {"scaling": self.scaling, "fan_in_fan_out": self.transposed},
        )  # fmt: skip

    @property
    def _magnitude(self) -> Input:
        return Input("magnitude", f"{key(self.name)}.lora_magnitude_vector", (self.out_features,), start="dora")

    @property
    def _bound_b(self) -> float:
        return 1 / math.sqrt(self.r) if self.init is False else 0.0

    @property
    def _start_keys(self) -> tuple[str, str]:
        """Ours of A0 and B0."""
        return f"{key(self.name)}.lora_A.start", f"{key(self.name)}.lora_B.start"

    def _residual(self, task: str, a: Place, b: Place) -> Encoding:
        """The rows of B A - B0 A0; the constants stand first, so that A and B may start as they do."""
        start, iterations = lora_init.residual(self.init), lora_init.niter(self.init)
        shapes = (self.r, self.in_features), (self.out_features, self.r)
        inputs = [
            Input(f"{name}{suffix}", own, shape, start=start, trainable=not suffix, filed=not suffix)
            for suffix, keys in (("0", self._start_keys), ("", self.keys))
            for name, own, shape in zip("AB", keys, shapes, strict=True)
        ]
        settings: dict[str, int | float | str] = {"scaling": self.scaling, "rank": self.r, "fan_in_fan_out": self.transposed}
        settings |= {} if iterations is None else {"niter": iterations, "stem": key(self.name)}
        return Encoding(
            task, f"{self.name}.residual", "residual" if iterations is None else "residual_joined", tuple(inputs), (a, b),
            weights={"weight": f"{self.name}.weight"}, settings=settings,
        )  # fmt: skip

    def vectors(self, task: str) -> list[Vector]:
        """What is done to the sum: DoRA's scale, or the bias of B."""
        if self.dora and not self.dropped:
            reads = dict(zip(("lora_A", "lora_B"), self.keys, strict=True))
            reads |= dict(zip(("start_A", "start_B"), self._start_keys, strict=True)) if lora_init.residual(self.init) else {}
            weights = {"weight": f"{self.name}.weight"} | ({"bias": f"{self.name}.bias"} if self.biased else {})
            settings: dict[str, int | float | str] = {"scaling": self.scaling, "fan_in_fan_out": self.transposed}
            encoding = Encoding(
                task, f"{self.name}.dora", "dora", (self._magnitude,), reads=reads, weights=weights,
                settings=settings,
            )  # fmt: skip
            return [Vector(task, f"{self.name}.dora", Filled(), Filled() if self.biased else None, encoding)]
        if self.shifted:
            value = Input("value", f"{key(self.name)}.lora_B.bias", (self.out_features,), bound=self._bound_b)
            encoding = Encoding(task, f"{self.name}.lora_B.bias", "scaled", (value,), settings={"scaling": self.scaling})
            return [Vector(task, f"{self.name}.lora_B.bias", shift=Filled(), encoding=encoding)]
        return []


def resolve(task: Task, config: Any, skeleton: nn.Module) -> list[Any]:
    """Let PEFT inject the adapter into the weightless copy, and read off what it did; `config` ends up as PEFT would save it."""
    lora_init.refuse(task, config)
    refuse_fields(task, config, _SUPPORTED)
    _refuse_values(task, config)
    refuse_unknown_targets(task, config, skeleton)
    # A copy without weights cannot be decomposed.
    init, config.init_lora_weights = config.init_lora_weights, True
    inject(task, config, skeleton)
    config.init_lora_weights = init
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
            features, base = module.lora_A[NAME].weight.shape[1], module.get_base_layer()
            sites.append(
                Site(
                    name, rank, scaling, features, b.shape[0], init, float(config.lora_dropout), bool(config.use_dora),
                    bool(config.lora_bias), type(base).__name__ == "Conv1D", getattr(base, "bias", None) is not None,
                    task.name, task.seed,
                )
            )  # fmt: skip
            lora_init.refuse_site(task, init, sites[-1])
    if not sites:
        raise no_site(task, config)
    _warn_unmatched_patterns(task, config, sites)
    lora_init.as_filed(config)
    found = [*sites, *_biases(config, skeleton, {site.name for site in sites}), *modules.resolve(task, config, skeleton)]
    if task.loraplus_lr_ratio is not None and any(isinstance(site, modules.Site | modules.Norm) for site in found):
        raise ValueError(
            f"task {task.name!r}: loraplus_lr_ratio={task.loraplus_lr_ratio!r} with adapters of embeddings, modules_to_save or "
            "trainable_token_indices is not supported: PEFT trains embeddings at a rate of their own"
        )
    return found


def _embedding(task: Task, config: Any, name: str, base: Any, rank: int, scaling: float) -> modules.Site:
    """LoRA of a lookup: A [r, V], of which a token has a column, and B [D, r]."""
    if not modules.is_plain(base):
        raise ValueError(
            f"task {task.name!r}: target_modules selects {name!r}, a {type(base).__name__}; LoRA runs on linear layers and plain "
            "embeddings here"
        )
    if config.use_dora:
        raise ValueError(f"task {task.name!r}: use_dora at {name!r}, an embedding, is not supported")
    if config.init_lora_weights not in (True, False, "gaussian"):
        raise ValueError(
            f"task {task.name!r}: init_lora_weights={config.init_lora_weights!r} at {name!r}, an embedding, is not supported"
        )
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
    """The biases begin with what the backbone's hold; A and B as `init_lora_weights` says, where
    `bind` does not; what is the task's own copy with what the backbone's holds."""
    own = [site for site in sites if isinstance(site, Site)]
    found = lora_init.fresh(own[0].task, own[0].seed, own[0].init, [(site, site.keys) for site in own]) if own else {}
    copied = modules.start([site for site in sites if isinstance(site, modules.Site | modules.Norm)], model)
    return found | copied | bitfit.start([site for site in sites if isinstance(site, bitfit.Site)], model)


def split(whole: Any, part: Any) -> Any:
    """The site of a rank's part: of a row-parallel linear it has columns of A, of a column-parallel one rows of B.

    Raises:
        ValueError: what needs the whole weight, or the whole input.
    """
    if whole.tensors() == part.tensors():
        return part
    if not isinstance(whole, Site):
        return part
    if lora_init.residual(whole.init):
        raise ValueError(f"init_lora_weights={whole.init!r} at {whole.name!r}, which is split,")
    row = whole.in_features != part.in_features
    if row and whole.dora:
        raise ValueError(f"use_dora=True at {whole.name!r}, a row-parallel linear,")
    return replace(part, fan_in=whole.in_features)


def loraplus(sites: Sequence[Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """LoRA+'s groups as PEFT makes them: B and whatever has one dimension is trained faster, biases without weight decay."""
    shapes = {key: shape for site in sites for key, shape in site.tensors().items()}
    fast = tuple(key for key, shape in shapes.items() if ".lora_B." in key or len(shape) == 1)
    return fast, tuple(key for key in fast if "bias" in key)


def _refuse_values(task: Task, config: Any) -> None:
    if config.bias not in ("none", "all", "lora_only"):
        raise ValueError(f"task {task.name!r}: bias={config.bias!r} is not known (none, all or lora_only)")
    for field in ("modules_to_save", "trainable_token_indices"):
        if getattr(config, field) and config.bias != "none":
            raise ValueError(f"task {task.name!r}: {field} with bias={config.bias!r} is not supported")
    if config.use_dora and config.bias != "none":
        raise ValueError(f"task {task.name!r}: use_dora with bias={config.bias!r} is not supported")
    dropout_of(task, config, "lora_dropout")
    if isinstance(config.r, bool) or not isinstance(config.r, int) or not 1 <= config.r <= MAX_RANK:
        raise ValueError(f"task {task.name!r}: r={config.r!r} must be an integer in 1..{MAX_RANK}")


def _warn_unmatched_patterns(task: Task, config: Any, sites: list[Site]) -> None:
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, field) or {}:
            if not any(re.match(rf"(.*\.)?({pattern})$", site.name) for site in sites):
                warnings.warn(
                    f"task {task.name!r}: {field} has {pattern!r}, which matches none of its {len(sites)} sites", stacklevel=2
                )


def attach(graph: MuxGraph, task: str, sites: Sequence[Any]) -> Sequence[str]:
    """The low-rank adapter behind each linear, then what is done to the sum; and the biases."""
    views: dict[fx.Node, fx.Node] = {}
    for site in sites:
        for node in linears(graph, task, site.name) if isinstance(site, Site) else ():
            out = low_rank.attach(graph, task, site, node, views)
            if site.dropped:
                out = dropped.attach(graph, task, site, node, out)
            for vector in site.vectors(task):
                out = vectors.attach(graph, vector, out, behind=out)
    bitfit.attach(graph, task, [site for site in sites if isinstance(site, bitfit.Site)])
    modules.attach(graph, task, [site for site in sites if isinstance(site, modules.Site | modules.Norm)])
    return dropped.notes(graph, task)


def fuse(graph: MuxGraph, groups: Sequence[Group], *, reserve: int, previous: Mapping[str, Table]) -> None:
    """Low-rank adapters become banks of their groups of linears, vectors of one place are joined."""
    low_rank.fuse(graph, groups, reserve=reserve, previous=previous)
    dropped.fuse(graph, reserve=reserve, previous=previous)
    vectors.fuse(graph, reserve=reserve, previous=previous)
    modules.fuse(graph, reserve=reserve, previous=previous)
