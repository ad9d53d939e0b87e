"""Bottleneck adapters: h + dropout(s (W_up act(W_down x + b_down) + b_up)), as AdapterHub's `adapters` library computes them.

Houlsby et al. (arXiv 1902.00751: behind attention and feed-forward), Pfeiffer et al. (arXiv 2005.00247: behind the feed-forward),
He et al. (arXiv 2110.04366: beside it). PEFT has no such kind: the config is here, and files are AdapterHub's.

Dispatch: a sublayer's output, that plus its residual, or the residual alone. Adapter: down, activation, up. Aggregate: added.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from passes.adapters.bottleneck_nodes import ACTIVATIONS, Layout, Site, attach, fuse
from passes.adapters.config import Config
from passes.adapters.sites import dropout_of, refuse_fields
from passes.task import Task
from runtime.adapterhub import BESIDE

__all__ = ["BottleneckConfig", "adopt", "attach", "fuse", "resolve"]

# The last linears of attention and of the feed-forward, by the ends of their names: Llama and its like; GPT-2; OPT.
PLACES = (("self_attn.o_proj", "mlp.down_proj"), ("attn.c_proj", "mlp.c_proj"), ("self_attn.out_proj", "fc2"))
# AdapterHub's names of the modules that hold the adapters of a layer.
_HOLDERS = ("attention_adapters", "output_adapters")
_INITS = ("bert", "mam_adapter")
_SUPPORTED = frozenset(
    {"mh_adapter", "output_adapter", "reduction_factor", "non_linearity", "original_ln_before", "original_ln_after", "init_weights",
     "is_parallel", "scaling", "residual_before_ln", "leave_out", "dropout", *BESIDE}
)  # fmt: skip


@dataclass(kw_only=True)
class BottleneckConfig(Config):
    """AdapterHub's `BnConfig`, field by field; the defaults are its `seq_bn`. Its own objects and dicts are taken as well.

    `double_seq_bn` is `mh_adapter=True, original_ln_before=False, non_linearity="swish"`; `par_bn` is `is_parallel=True,
    original_ln_before=False, reduction_factor=2, scaling=4.0, init_weights="mam_adapter"`.

    Args:
        mh_adapter, output_adapter: an adapter after attention, after the feed-forward.
        reduction_factor: hidden size over bottleneck; or one for each layer, `{"1": 8, "default": 16}`.
        non_linearity: a name of `ACTIVATIONS`.
        original_ln_before: the adapter reads the sublayer's output plus the residual, not the output alone. These models have no
            norm there.
        is_parallel: it reads the residual that the sublayer's norm reads.
        scaling: what its output is multiplied by.
        dropout: the probability that an element of what is added is dropped, in training.
        leave_out: layers without an adapter.
        init_weights: "bert" (normal, 0.02) or "mam_adapter" (torch's own for a linear, and zero: nothing changes at first).
        model_type, model_class, hidden_size: filled in from the backbone; the file says them.

    The other fields must keep their defaults.
    """

    mh_adapter: bool = False
    output_adapter: bool = True
    reduction_factor: float | Mapping[str, float] = 16
    non_linearity: str = "relu"
    original_ln_before: bool = True
    original_ln_after: bool = True
    ln_before: bool = False
    ln_after: bool = False
    init_weights: str = "bert"
    init_weights_seed: int | None = None
    is_parallel: bool = False
    scaling: float | str = 1.0
    use_gating: bool = False
    residual_before_ln: bool | str = True
    adapter_residual_before_ln: bool = False
    inv_adapter: str | None = None
    inv_adapter_reduction_factor: float | None = None
    cross_adapter: bool = False
    leave_out: Sequence[int] = field(default_factory=list)
    dropout: float = 0.0
    phm_layer: bool = False
    phm_dim: int = 4
    factorized_phm_W: bool | None = True
    shared_W_phm: bool | None = False
    shared_phm_rule: bool | None = True
    factorized_phm_rule: bool | None = False
    phm_c_init: str | None = "normal"
    phm_init_range: float | None = 0.0001
    learn_phm: bool | None = True
    hypercomplex_nonlinearity: str | None = "glorot-uniform"
    phm_rank: int | None = 1
    phm_bias: bool | None = True
    stochastic_depth: float | None = 0.0
    model_type: str | None = None
    model_class: str | None = None
    hidden_size: int | None = None
    peft_type: str = "BOTTLENECK"


def adopt(given: Any) -> BottleneckConfig | None:
    """An object or dict with the fields of AdapterHub's `BnConfig` as our config; None: it is something else.

    Raises:
        ValueError: naming a field that the library does not have.
    """
    fields = given if isinstance(given, Mapping) else getattr(given, "__dict__", {})
    if isinstance(given, Config) or not {"mh_adapter", "output_adapter"} <= fields.keys() or fields.get("architecture"):
        return None
    return BottleneckConfig.from_dict({name: value for name, value in fields.items() if name != "architecture"})


def resolve(task: Task, config: Any, skeleton: nn.Module) -> list[Site]:
    """The adapters that the library would add; `config` ends up as it would save it.

    Raises:
        ValueError: naming the task and the field.
    """
    refuse_fields(task, config, _SUPPORTED)
    _refuse_values(task, config)
    layers = _layers(task, skeleton)
    for layer in config.leave_out:
        if layer not in layers:
            raise ValueError(f"task {task.name!r}: leave_out has {layer!r}, but the backbone's layers are 0..{len(layers) - 1}")
    about = getattr(skeleton, "config", None)
    config.model_type, config.model_class = getattr(about, "model_type", None), type(skeleton).__name__
    layout = Layout.RESIDUAL if config.is_parallel else Layout.SUM if config.original_ln_before else Layout.OUTPUT
    sites = []
    for layer, (prefix, linears) in layers.items():
        for wanted, holder, linear in zip((config.mh_adapter, config.output_adapter), _HOLDERS, linears, strict=True):
            if wanted and layer not in config.leave_out:
                features = _features(skeleton.get_submodule(linear))
                size = _size(task, config.reduction_factor, layer, features)
                act, scaling, fresh = config.non_linearity.lower(), float(config.scaling), config.init_weights == "mam_adapter"
                dropout = float(config.dropout)
                sites.append(Site(f"{prefix}.{holder}", linear, layout, size, features, act, scaling, fresh, dropout))
    if not sites:
        raise ValueError(f"task {task.name!r}: mh_adapter, output_adapter and leave_out leave no adapter")
    config.hidden_size = sites[0].features
    return sites


def _refuse_values(task: Task, config: Any) -> None:
    def refuse(name: str, supported: str) -> ValueError:
        return ValueError(f"task {task.name!r}: {name}={getattr(config, name)!r} is not supported ({supported})")

    for name in ("mh_adapter", "output_adapter", "original_ln_before", "is_parallel"):
        if not isinstance(getattr(config, name), bool):
            raise refuse(name, "True or False")
    if config.original_ln_after is not True:
        raise refuse("original_ln_after", "True: without it the layer loses its residual")
    # Elsewhere the library reads the field not at all, or adds the sublayer's output either way.
    if config.residual_before_ln not in (True, False) or (
        config.residual_before_ln is not True and config.original_ln_before and not config.is_parallel
    ):
        raise refuse("residual_before_ln", "True: the library adds the residual twice, or fails, in these models")
    if not isinstance(config.non_linearity, str) or config.non_linearity.lower() not in ACTIVATIONS:
        raise refuse("non_linearity", ", ".join(ACTIVATIONS))
    scaling = config.scaling
    if isinstance(scaling, bool) or not isinstance(scaling, int | float) or not math.isfinite(scaling):
        raise refuse("scaling", "a finite number")
    config.scaling = float(scaling)  # The library refuses integers.
    dropout_of(task, config, "dropout")
    if config.init_weights not in _INITS:
        raise refuse("init_weights", ", ".join(_INITS))
    if config.init_weights_seed is not None:
        raise refuse("init_weights_seed", "None: the task's own seed decides")
    if config.leave_out is None:
        config.leave_out = []
    if not isinstance(config.leave_out, list | tuple) or not all(type(layer) is int for layer in config.leave_out):
        raise refuse("leave_out", "a list of layers")
    factor = config.reduction_factor
    if isinstance(factor, Mapping):
        config.reduction_factor = {str(layer): value for layer, value in factor.items()}
    for value in config.reduction_factor.values() if isinstance(factor, Mapping) else [factor]:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise refuse("reduction_factor", "a number above 0, or one for each layer")


def _layers(task: Task, skeleton: nn.Module) -> dict[int, tuple[str, tuple[str, str]]]:
    """By layer: its name, and those of the last linears of attention and feed-forward."""
    modules = dict(skeleton.named_modules())
    if getattr(getattr(skeleton, "config", None), "do_layer_norm_before", True) is False:
        raise ValueError(f"task {task.name!r}: peft_type=BOTTLENECK is not supported behind norms (do_layer_norm_before=False)")
    for attention, feed_forward in PLACES:
        found = {}
        for name in modules:
            layer = re.fullmatch(rf"(?P<prefix>.*?\.?(?P<layer>\d+))\.{re.escape(feed_forward)}", name)
            if layer is not None and f"{layer['prefix']}.{attention}" in modules:
                found[int(layer["layer"])] = (layer["prefix"], (f"{layer['prefix']}.{attention}", name))
        if found:
            return found
    known = "; ".join(" and ".join(pair) for pair in PLACES)
    raise ValueError(
        f"task {task.name!r}: peft_type=BOTTLENECK does not know the layers of {type(skeleton).__name__} (it looks for {known})"
    )


def _features(module: nn.Module) -> int:
    """What a linear, or GPT-2's Conv1D, gives out."""
    features = getattr(module, "out_features", None) or getattr(module, "nf", None)
    assert isinstance(features, int), f"{type(module).__name__} has no number of outputs"
    return features


def _size(task: Task, factor: Any, layer: int, features: int) -> int:
    """The bottleneck, as the library rounds it."""
    if isinstance(factor, Mapping):
        given = factor.get(str(layer), factor.get("default"))
        if given is None:
            raise ValueError(f"task {task.name!r}: reduction_factor={factor!r} has neither layer {layer} nor 'default'")
        factor = given
    return max(1, int(features // factor))
