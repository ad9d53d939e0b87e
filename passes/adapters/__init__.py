"""The PEFT kinds, one file each and one row here. Nothing else in the compiler knows a kind by name."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from passes.adapters import bitfit, bottleneck, ia3, lora, lora_init, norm, prefix, prompt, ptuning, shira, tokens, vera
from passes.adapters.bitfit import BitFitConfig
from passes.adapters.bottleneck import BottleneckConfig
from passes.adapters.config import FILE, Config
from passes.adapters.sites import key as peft_key
from passes.bare import Values, lent
from passes.capture import is_peft_model, original_name, unwrap
from passes.split import Split
from passes.task import Task, is_folder
from runtime import adapterhub

ADAPTER_FILE = "adapter_model.safetensors"


def drawn(sites: Any, backbone: nn.Module) -> dict[str, Tensor]:
    """`Kind.start` of a kind whose tensors all begin as their `Param` says."""
    return {}


@dataclass(frozen=True, slots=True)
class Kind:
    """One PEFT kind.

    A site is any object with `name` and `tensors()`, the PEFT keys of its trainable tensors with their shapes. It may also say
    `dropout` (its elements are dropped with this probability), `virtual_tokens` (rows before each of the task's sequences) and
    `position_offset` (what the task's positions begin with), and `finished` (the key of PEFT's file for what was computed from the
    trainable tensors, where it holds that in their place: it cannot be resumed from), and `fault(weights)`, what is wrong with the
    tensors of a file beyond their shapes ("": nothing), and `unsplit(how)`, what of it does not run on a part of the model, and
    `reads`, the backbone's tensors that `start` reads (otherwise those of the module of its name): others may have no memory.

    Args:
        peft_type: its name in configs.
        family: "reparameterised", "additive" or "selective".
        dispatch, adapter, aggregate: what it reads, what it computes, how that rejoins the backbone.
        resolve: (task, config, skeleton) -> the sites it adapts; raises ValueError naming task and field.
        attach: (graph, task name, sites) -> writes the adapter's nodes; may return lines for the plan's notes.
        fuse: (graph, groups, reserve=, previous=) -> merges the nodes of all tasks: into multi-task nodes, or banks of the groups.
        start: (sites, backbone) -> tensors by key that a fresh adapter begins with; the others are drawn as their `Param` says.
        config: the class of its configs, where PEFT has none.
        adopt: (config of another library) -> the same as `config`, or None where it is none of this kind.
        layout: of its folders, "peft" or "adapterhub".
        loraplus: sites -> (the keys that LoRA+ trains at its higher rate, those of them without weight decay), where it applies.
        split: (site of the whole model, the same of the part that a tensor-parallel rank has) -> the part as it runs there; raises
            ValueError with "field=value at module". None: the kind runs on whole models alone.
        rewrites: config -> "field=value" that makes PEFT's injection write the backbone's weights, or "".
        places, parameters, cost: for docs/peft-kinds.md: what a site is, how many values it trains (a formula that the page's test
            figures for a tiny example), what it costs beside the backbone.
    """

    peft_type: str
    family: str
    dispatch: str
    adapter: str
    aggregate: str
    resolve: Callable[[Task, Any, nn.Module], list[Any]]
    attach: Callable[..., Sequence[str] | None]
    fuse: Callable[..., None]
    start: Callable[[Any, nn.Module], dict[str, Tensor]] = drawn
    config: type[Config] | None = None
    adopt: Callable[[Any], Config | None] = lambda given: None
    layout: str = "peft"
    split: Callable[[Any, Any], Any] | None = None
    rewrites: Callable[[Any], str] = lambda config: ""
    loraplus: Callable[[Any], tuple[tuple[str, ...], tuple[str, ...]]] | None = None
    places: str = ""
    parameters: str = ""
    cost: str = ""


def as_it_is(whole: Any, part: Any) -> Any:
    """`Kind.split` of a kind whose sites run at a part as they do at the whole."""
    return part


KINDS: dict[str, Kind] = {
    kind.peft_type: kind
    for kind in (
        Kind(
            "LORA", "reparameterised", "the input of a linear", "dropout, A, B, scaling", "added to the linear's output",
            lora.resolve, lora.attach, lora.fuse, lora.start, split=lora.split, rewrites=lora_init.rewrites, loraplus=lora.loraplus,
            places="linears, embeddings, the head", parameters="r * (K + N)",
            cost="2 r (K + N) FLOP a token, r (K + N) values; DoRA a pass over y, and W once a step",
        ),
        Kind(
            "VERA", "reparameterised", "the input of a linear", "dropout, A, a vector, B, a vector", "added to the linear's output",
            vera.resolve, vera.attach, vera.fuse,
            places="linears", parameters="r + N",
            cost="2 r (K + N) FLOP a token; a table of r (K + N) values is filled once a step",
        ),
        Kind(
            "IA3", "additive", "the output of a linear, or its input in feed-forward modules", "a vector", "in place, multiplied",
            ia3.resolve, ia3.attach, ia3.fuse, split=as_it_is,
            places="linears", parameters="K if feedforward else N",
            cost="a pass over x or y, N or K values; where others read the scaled x, 2 K N FLOP a token of every task",
        ),
        Kind(
            "LN_TUNING", "selective", "the normalised input of a norm", "its weight and bias", "in place of the norm's output",
            norm.resolve, norm.attach, norm.fuse, norm.start, split=as_it_is,
            places="norms", parameters="N * (1 + bias)", cost="the normalised x once more, a pass over it, N values or 2 N",
        ),
        Kind(
            "PROMPT_TUNING", "additive", "the embedded tokens", "virtual tokens", "rows before each sequence",
            prompt.resolve, prompt.attach, prompt.fuse, prompt.start, split=as_it_is,
            places="the embedding", parameters="P * E", cost="P rows more in every sequence, P E values",
        ),
        Kind(
            "P_TUNING", "additive", "the embedded tokens", "virtual tokens out of a network", "rows before each sequence",
            ptuning.resolve, prompt.attach, prompt.fuse, split=as_it_is,
            places="the embedding", parameters="P * E + 2 * E * H + H * H + 2 * H + E",
            cost="P rows more in every sequence; the network once a step",
        ),
        Kind(
            "PREFIX_TUNING", "additive", "attention", "keys and values", "one softmax with each sequence's own",
            prefix.resolve, prefix.attach, prefix.fuse,
            places="all layers", parameters="2 * L * P * G * D",
            cost="P keys and values more in every sequence's attention; a projection once a step",
        ),
        Kind(
            "BITFIT", "selective", "the output of a linear or a norm", "a bias", "in place of the backbone's bias",
            bitfit.resolve, bitfit.attach, bitfit.fuse, bitfit.start, BitFitConfig, split=as_it_is,
            places="linears and norms with a bias", parameters="N", cost="a pass over y, N values",
        ),
        Kind(
            "SHIRA", "selective", "the input of a linear", "a sparse matrix", "added to the linear's output",
            shira.resolve, shira.attach, shira.fuse, shira.start,
            places="linears", parameters="r * (K + N)",
            cost="2 K N FLOP a token; K N elements written and read for each slot, one after another, in y, dx and the gradient",
        ),
        Kind(
            "TRAINABLE_TOKENS", "selective", "the token ids", "rows", "in place of the embedding's rows",
            tokens.resolve, tokens.attach, tokens.fuse, tokens.start, split=as_it_is,
            places="the embedding", parameters="n * E", cost="a comparison with n ids and a row read for each token, n E values",
        ),
        Kind(
            "BOTTLENECK", "additive", "a sublayer's output, its residual, or their sum", "down, activation, up", "added",
            bottleneck.resolve, bottleneck.attach, bottleneck.fuse, split=as_it_is,
            config=BottleneckConfig, adopt=bottleneck.adopt, layout="adapterhub",
            places="the last linears of attention and feed-forward", parameters="2 * R * N + R + N",
            cost="4 R N FLOP a token, a few passes over y, 2 R N values",
        ),
    )
}  # fmt: skip


def register_kind(kind: Kind) -> None:
    """Make a kind of your own known to `compile`: docs/peft-kinds.md has one of forty lines.

    Raises:
        ValueError: there is a kind of this name.
    """
    if kind.peft_type in KINDS:
        raise ValueError(f"peft_type={kind.peft_type!r} is a kind already")
    KINDS[kind.peft_type] = kind


@dataclass(frozen=True, slots=True)
class Adapter:
    """A task's adapter, resolved against one backbone: which sites, with what, and the tensors it starts from.

    `given`: its config before PEFT filled it in. `shapes`: PEFT's by key, which the tensors of `weights` have, where `sites` are
    those of a part of the backbone; {}: the sites have them.
    """

    task: Task
    kind: Kind
    config: Any
    sites: tuple[Any, ...]
    weights: dict[str, Tensor]
    given: Any = None
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)


def resolve(task: Task, model: nn.Module, weights: dict[str, Tensor] | None = None, values: Values | None = None) -> Adapter:
    """Apply PEFT's own rules to a weightless copy of the backbone.

    Args:
        weights: tensors by PEFT key to start from; None: those of the task's folder, or fresh ones.
        values: the backbone's tensors, where `model` has none of its own (`passes.bare`).

    Raises:
        ValueError: naming the task and the field.
    """
    config = task.adapter
    if is_folder(config):
        config, weights = _load(task)
    config = copy.deepcopy(_adopted(task, config))
    peft_type = getattr(config, "peft_type", None)
    if peft_type is None:
        raise ValueError(f"task {task.name!r}: adapter={config!r} is neither a peft config nor the folder of a saved adapter")
    name = getattr(peft_type, "value", str(peft_type))
    kind = KINDS.get(name)
    if kind is None:
        raise ValueError(f"task {task.name!r}: peft_type={name} is not supported (supported: {', '.join(KINDS)})")
    if task.loraplus_lr_ratio is not None and kind.loraplus is None:
        ratio = f"loraplus_lr_ratio={task.loraplus_lr_ratio!r}"
        raise ValueError(f"task {task.name!r}: {ratio} is not supported by peft_type={name}: it has no lora_B")
    _refuse_rewritten(model)
    given = copy.deepcopy(config)
    sites = kind.resolve(task, config, skeleton(model))
    if weights is None:
        reads = _read(kind, sites, unwrap(model)) if values is not None else ()
        with lent(unwrap(model), reads, values) as backbone:
            return Adapter(task, kind, config, tuple(sites), kind.start(sites, backbone), given)
    adapter = Adapter(task, kind, config, tuple(sites), _without_backbone(task, sites, weights, unwrap(model), values), given)
    _check_weights(adapter)
    return adapter


def part_of(adapter: Adapter, model: nn.Module, how: Split) -> Adapter:
    """The adapter at the part of its backbone that a tensor-parallel rank has (`passes.split`).

    Raises:
        ValueError: naming the task, and the kind or the field that runs on whole models alone.
    """
    task, kind = adapter.task, adapter.kind
    if kind.split is None:
        raise ValueError(f"task {task.name!r}: peft_type={kind.peft_type} is not supported with tensor parallelism")
    for site in adapter.sites:
        if reason := site.unsplit(how) if hasattr(site, "unsplit") else "":
            raise ValueError(f"task {task.name!r}: {reason}, which is split, is not supported with tensor parallelism")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # once, of the whole model, was enough
        parts = kind.resolve(task, copy.deepcopy(adapter.given), skeleton(model))
    try:
        sites = tuple(kind.split(whole, part) for whole, part in zip(adapter.sites, parts, strict=True))
    except ValueError as error:
        raise ValueError(f"task {task.name!r}: {error} is not supported with tensor parallelism") from error
    shapes = {key: shape for site in adapter.sites for key, shape in site.tensors().items()}
    return replace(adapter, sites=sites, shapes=shapes)


def _refuse_rewritten(model: Any) -> None:
    """Every task's adapter belongs to the backbone as it was loaded; so does what a file computes again from its weights."""
    for name, config in model.peft_config.items() if is_peft_model(model) else ():
        kind = KINDS.get(getattr(config.peft_type, "value", str(config.peft_type)))
        if kind is not None and (field := kind.rewrites(config)):
            raise ValueError(
                f"backbone: adapter {name!r} of this PeftModel has {field}, with which PEFT has changed the backbone's weights: "
                f"save the adapter with PEFT, and give its folder as the task {name!r} of an untouched backbone"
            )


def _adopted(task: Task, config: Any) -> Any:
    """The config as one of ours, where a kind knows it from another library."""
    try:
        return next((own for kind in KINDS.values() if (own := kind.adopt(config)) is not None), config)
    except (ValueError, TypeError) as error:
        raise ValueError(f"task {task.name!r}: its config: {error}") from error


def skeleton(model: nn.Module) -> nn.Module:
    """The backbone's module tree with meta tensors in place of the weights: something PEFT may inject into."""
    wrapped = is_peft_model(model)
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        # Not like the parameter: that of a fake one (`passes.bare`) is fake as well.
        empty = torch.empty_strided(parameter.shape, parameter.stride(), dtype=parameter.dtype, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    bare = copy.deepcopy(model, memo)
    if not wrapped:
        return bare
    # Prompts lie beside the backbone, not in its layers.
    return bare.get_base_model() if bare.active_peft_config.is_prompt_learning else bare.unload()


def live(model: Any, name: str) -> dict[str, Tensor]:
    """The trainable tensors of an adapter of a PeftModel by PEFT's keys, also where PEFT's file holds what follows from them."""
    from peft import get_peft_model_state_dict

    if not model.peft_config[name].is_prompt_learning:
        found = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        return {key: value.detach() for key, value in found.items()}
    own = {f"{prompt.ENCODER}.{key}": value.detach() for key, value in model.prompt_encoder[name].named_parameters()}
    # An encoder that is an embedding alone is saved as the prompt it holds.
    return dict(zip([prompt.KEY], own.values(), strict=True)) if len(own) == 1 else own


def _load(task: Task) -> tuple[Any, dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(task.adapter)
    if not (folder / FILE).is_file():
        raise ValueError(f"task {task.name!r}: adapter={str(folder)!r} holds no {FILE}")
    try:
        found = adapterhub.read(folder)
    except ValueError as error:
        raise ValueError(f"task {task.name!r}: adapter={str(folder)!r}: {' '.join(str(error).split())}") from error
    if found is not None:
        return found
    if not (folder / ADAPTER_FILE).is_file():
        raise ValueError(f"task {task.name!r}: adapter={str(folder)!r} holds no {ADAPTER_FILE}")
    reading = FILE
    try:
        config = _read_config(folder)
        reading = ADAPTER_FILE
        return config, load_file(folder / ADAPTER_FILE)
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"task {task.name!r}: adapter={str(folder)!r}: {reading} cannot be read: {reason}") from error


def _read_config(folder: Path) -> Any:
    from peft import PeftConfig

    given = json.loads((folder / FILE).read_text())
    kind = KINDS.get(str(given.get("peft_type"))) if isinstance(given, dict) else None
    if kind is not None and kind.config is not None:
        return kind.config.from_dict(given)
    return PeftConfig.from_pretrained(str(folder))


def _read(kind: Kind, sites: Sequence[Any], backbone: nn.Module) -> list[str]:
    """The backbone's tensors that fresh adapters begin with."""

    def own(site: Any) -> Sequence[str]:
        module = backbone.get_submodule(site.name)
        return [f"{site.name}.{name}" for name, _ in module.named_parameters(recurse=False)]

    return [] if kind.start is drawn else [name for site in sites for name in (site.reads if hasattr(site, "reads") else own(site))]


def _without_backbone(
    task: Task, sites: list[Any], weights: dict[str, Tensor], backbone: nn.Module, values: Values | None
) -> dict[str, Tensor]:
    """Where an embedding or the head is adapted, PEFT's files hold the backbone's own tensor beside the adapter's."""
    own = {original_name(name): value for name, value in backbone.named_parameters(remove_duplicate=False)}
    expected = {name for site in sites for name in site.tensors()}
    found = dict(weights)
    for name in [name for name in weights if ".base_layer." in name and name not in expected]:
        known = original_name(name.removeprefix(peft_key("")))
        tensor = own.get(known) if values is None or known not in own else values(known)
        if tensor is None or not torch.equal(tensor.cpu(), weights[name].to(tensor.dtype)):
            raise ValueError(f"task {task.name!r}: its weights' {name!r} is not the backbone's own")
        del found[name]
    return found


def _check_weights(adapter: Adapter) -> None:
    expected = {key: shape for site in adapter.sites for key, shape in site.tensors().items()}
    name = adapter.task.name
    for site in adapter.sites:
        if getattr(site, "finished", "") in adapter.weights:
            raise ValueError(
                f"task {name!r}: its weights are {site.finished!r}, which its encoder has computed: {adapter.kind.peft_type} can "
                "serve from them, but not go on training without the encoder; start from a checkpoint or a live PeftModel"
            )
    for key in adapter.weights:
        if key not in expected:
            raise ValueError(f"task {name!r}: its weights have the unexpected tensor {key!r}")
    for key, shape in expected.items():
        if key not in adapter.weights:
            raise ValueError(f"task {name!r}: its weights lack the tensor {key!r}")
        if tuple(adapter.weights[key].shape) != shape:
            raise ValueError(f"task {name!r}: its weights' {key!r} has shape {tuple(adapter.weights[key].shape)}, expected {shape}")
        if not torch.isfinite(adapter.weights[key]).all():
            raise ValueError(f"task {name!r}: its weights' {key!r} holds values that are not finite")
    for site in adapter.sites:
        if hasattr(site, "fault") and (fault := site.fault(adapter.weights)):
            raise ValueError(f"task {name!r}: its weights' {fault}")
