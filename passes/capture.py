"""capture: nn.Module -> MuxGraph. One forward of a whole chunk through torch.export, on fake tensors.

The backbone's weights become named inputs (the very tensors, never copies), attention becomes one `mux::attention` node
over packed sequences, and the graph is checked to mix tokens nowhere else.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import operator
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from codegen.ops import ATTENTION
from passes.graph import MuxGraph, Source, add_input, call, drop_dead, fake_like, graph_module, module_of, val
from passes.mixed import mixed
from passes.rows import check_rows
from runtime.region import WRAPPED

IMPLEMENTATION = "muxcompile"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SDPA = torch.ops.aten.scaled_dot_product_attention.default
_ALLOWED_KWARGS = frozenset(
    {"position_ids", "use_cache", "cache_position", "is_causal", "output_attentions", "layer_idx", "position_embeddings"}
)


@torch.library.custom_op("mux::attention_hole", mutates_args=())
def attention_hole(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> Tensor:
    """Stands for attention during export, where the sequences' borders are not an input yet. q: [1, T, H, D]."""
    raise AssertionError("attention_hole exists only inside capture")


@attention_hole.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> Tensor:
    return q.new_empty(q.shape)


def capture(wrapped: nn.Module, *, tokens: int, tile: int, max_sequences: int) -> MuxGraph:
    """Capture a causal language model.

    Args:
        wrapped: a transformers causal LM whose attention goes through AttentionInterface, or a module
            `forward(input_ids, position_ids)` -> logits (or an object with `.logits`) that uses
            `F.scaled_dot_product_attention(..., is_causal=True)`; or a PeftModel around either, captured without its adapters.
        tokens: T, rows of a chunk.
        tile: rows of a block; divides T.
        max_sequences: most sequences in a chunk (the static length of `cu_seqlens`, less one).

    Returns:
        A graph at level "captured". The model is left as it was.

    Raises:
        ValueError: the model is on the meta device or cannot be captured, with the module's name and the reason.
    """
    model = unwrap(wrapped)
    check_loaded(model)
    _refuse_injected(wrapped)
    notes = _dropout_note(model)
    with _without_adapters(wrapped), _prepared(model) as takes_positions:
        exported = _export(model, tokens, takes_positions)
    gm = exported.graph_module
    weights, sources = _name_inputs(model, exported)
    _name_modules(gm, model)
    gm = graph_module(gm.graph)
    inputs = {sources[node.name]: node for node in gm.graph.nodes if node.op == "placeholder"}
    graph = MuxGraph(gm=gm, inputs=inputs, tokens=tokens, tile=tile, weights=weights, mixed=mixed(gm), notes=notes)
    _single_output(gm)
    _fill_attention(graph, max_sequences)
    drop_dead(graph)
    for name in [name for name in weights if Source("weight", name) not in graph.inputs]:
        del weights[name]
    gm.recompile()
    if not takes_positions:
        _refuse_own_positions(graph)
    check_rows(graph)
    return graph


def unwrap(model: nn.Module) -> nn.Module:
    """The backbone inside a PeftModel, or the model itself."""
    return model.get_base_model() if is_peft_model(model) else model


def is_peft_model(model: nn.Module) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def _without_adapters(model: nn.Module) -> Any:
    return model.disable_adapter() if is_peft_model(model) else contextlib.nullcontext()


def _refuse_injected(model: nn.Module) -> None:
    """A layer that PEFT wrapped must be switched off by its PeftModel, and must not have its adapter added into its weight."""
    for name, module in model.named_modules():
        if getattr(module, "tied_adapter", None) is not None:
            raise ValueError(
                f"backbone: module {name!r} is tied to trainable tokens of an embedding, which cannot be captured: save the "
                "adapter and compile its folder with the model without it"
            )
        if hasattr(module, "base_layer") and hasattr(module, "merged"):
            if not is_peft_model(model):
                raise ValueError(f"backbone: module {name!r} carries a PEFT adapter: pass the PeftModel, or the model without it")
            if module.merged:
                raise ValueError(f"backbone: module {name!r} has its adapter merged into the weight: call unmerge_adapter() first")


def check_loaded(model: nn.Module) -> None:
    """Refuse a model on the meta device, on several, or in a dtype that no kernel computes with.

    Raises:
        ValueError: naming the tensor, or the devices.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise ValueError(f"backbone: {name} is on the meta device: load the weights before compiling")
    for name, tensor in model.named_parameters():
        if tensor.is_floating_point() and tensor.dtype not in _DTYPES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
            raise ValueError(f"backbone: {name} is {str(tensor.dtype).removeprefix('torch.')}; load the model in one of {known}")
    devices = {str(tensor.device) for tensor in model.parameters()}
    if len(devices) != 1:
        raise ValueError(f"backbone: its parameters must lie on one device, found {', '.join(sorted(devices)) or 'no parameter'}")


def _dropout_note(model: nn.Module) -> tuple[str, ...]:
    """What the backbone would drop in training, which it does not do here: by module, or by what its configuration says."""
    wrapped = [f"{name}." for name, module in model.named_modules() if hasattr(module, "base_layer")]
    # A PEFT layer's own dropout is an adapter's.
    own = [
        (name, module)
        for name, module in model.named_modules()
        if not any(name.startswith(outer) and not name.startswith(f"{outer}base_layer") for outer in wrapped)
    ]
    active = [name for name, module in own if isinstance(module, nn.Dropout) and module.p > 0]
    attention = [name for name, module in own if _drops(getattr(module, "attention_dropout", None))]
    config: Any = getattr(model, "config", None)
    fields = {
        name: value
        for name, value in (config.to_dict() if hasattr(config, "to_dict") else {}).items()
        # Of heads that no language model has.
        if name.endswith(("dropout", "_pdrop")) and not name.startswith(("classifier", "summary")) and _drops(value)
    }
    found = [
        *([f"{len(active)} modules, the first is {active[0]}"] if active else []),
        *([f"attention_dropout of {len(attention)} modules, the first is {attention[0]}"] if attention else []),
        *([f"config: {', '.join(f'{name}={value}' for name, value in fields.items())}"] if fields else []),
    ]
    if not found:
        return ()
    note = f"the frozen backbone runs without its own dropout ({'; '.join(found)})"
    if model.training:
        warnings.warn(f"backbone is in training mode: {note}", stacklevel=3)
    return (f"capture: {note}",)


def _drops(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


@contextlib.contextmanager
def _prepared(model: nn.Module) -> Iterator[bool]:
    """Evaluation mode and our attention for the time of the export; yields whether forward takes position_ids."""
    training = {module: module.training for module in model.modules()}
    configs: dict[int, Any] = {
        id(config): config
        for module in model.modules()
        if hasattr(config := getattr(module, "config", None), "_attn_implementation_internal")
    }
    saved = {key: config._attn_implementation_internal for key, config in configs.items()}
    try:
        model.eval()
        if configs:
            _register_attention()
            for config in configs.values():
                config._attn_implementation_internal = IMPLEMENTATION
        parameters = inspect.signature(model.forward).parameters
        # A forward that swallows **kwargs would swallow position_ids without a word: only a named argument counts.
        yield "position_ids" in parameters
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = saved[key]
        for module, mode in training.items():
            module.training = mode


def _register_attention() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, _attention_function)
    AttentionMaskInterface.register(IMPLEMENTATION, lambda *args, **kwargs: None)


def _attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What a transformers attention module calls; query [1, H, T, D], key and value [1, G, T, D]."""
    for name, given in kwargs.items():
        if given is not None and given is not False and name not in _ALLOWED_KWARGS:
            raise ValueError(f"its attention uses {name}={_brief(given)}, which muxcompile's attention does not compute")
    if attention_mask is not None:
        raise ValueError("its attention adds an explicit mask, which would not follow packed sequences")
    if kwargs.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise ValueError("its attention is not causal")
    if value.shape != key.shape:
        raise ValueError(f"its attention has values of shape {tuple(value.shape)} beside keys of {tuple(key.shape)}")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    out = torch.ops.mux.attention_hole(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), scale, sliding_window or 0
    )
    return out, None


def _brief(value: Any) -> str:
    return f"a {type(value).__name__}" if isinstance(value, Tensor | nn.Module) else repr(value)


class _Logits(nn.Module):
    """One signature for every model: a chunk's ids and positions, both [1, T], to its logits."""

    def __init__(self, model: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self._forward = forward

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        out = self._forward(input_ids, position_ids)
        return getattr(out, "logits", out)


def _export(model: nn.Module, tokens: int, takes_positions: bool) -> Any:
    extra = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}

    def forward(input_ids: Tensor, position_ids: Tensor) -> Any:
        return model(input_ids=input_ids, position_ids=position_ids, **extra) if takes_positions else model(input_ids, **extra)

    device = next(model.parameters()).device
    ids = torch.zeros(1, tokens, dtype=torch.long, device=device)
    positions = torch.arange(tokens, device=device)[None]
    where = _Where(model)
    try:
        # Frozen: without gradients no `with torch.no_grad()` of the model leaves a wrapper node in the graph.
        with torch.no_grad(), where, _quiet():
            return torch.export.export(_Logits(model, forward), (ids, positions), strict=False)
    except Exception as error:
        reason = _known_reason(model, error) or str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(
            f"backbone {type(model).__name__}: cannot capture module {where.name or '(the model itself)'!r}: {reason}"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No advice to whoever would export the model otherwise: where it fails, torch prints the graph so far. We raise one line."""
    log, said = logging.getLogger("torch.fx.experimental.symbolic_shapes"), io.StringIO()
    before, log.disabled = log.disabled, True
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(said):
            warnings.simplefilter("ignore")
            yield
        sys.stderr.write(said.getvalue())
    finally:
        log.disabled = before


def _known_reason(model: nn.Module, error: Exception | None = None) -> str:
    """Why a kind of model that is known cannot be captured; "": it is none."""
    config: Any = getattr(model, "config", None)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    # One, or one for each kind of layers.
    for own in [rope, *rope.values()] if isinstance(rope, dict) else []:
        kind = own.get("rope_type") if isinstance(own, dict) else None
        if kind in ("dynamic", "longrope"):
            return f"rope_type={kind!r} follows the longest sequence of a call, so that packed sequences would change one another"
    # Its attention was given no mask, which it counts on.
    if isinstance(error, TypeError | AttributeError) and getattr(model, "_supports_attention_backend", None) is False:
        return f"its attention is its own, not transformers' AttentionInterface, and reads a mask ({str(error).splitlines()[0]})"
    return ""


class _Where:
    """Remembers the innermost module that was running when an error came up."""

    def __init__(self, model: nn.Module) -> None:
        self.name = ""
        self._model = model

    def __enter__(self) -> None:
        self._handles = []
        self._stack: list[str] = []
        for name, module in self._model.named_modules():
            self._handles.append(module.register_forward_pre_hook(lambda _m, _a, name=name: self._stack.append(name)))
            self._handles.append(module.register_forward_hook(lambda _m, _a, _o: (self._stack.pop(), None)[1]))

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        for handle in self._handles:
            handle.remove()
        if error is not None and self._stack:
            self.name = self._stack[-1]


def original_name(name: str) -> str:
    """The backbone's own name of a module or tensor that PEFT may have wrapped."""
    return ".".join(part for part in name.split(".") if part not in WRAPPED)


def _name_inputs(model: nn.Module, exported: Any) -> tuple[dict[str, Tensor], dict[str, Source]]:
    tensors = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    weights: dict[str, Tensor] = {}
    sources: dict[str, Source] = {}
    for spec, node in zip(exported.graph_signature.input_specs, exported.graph.nodes, strict=False):
        kind = spec.kind.name
        if kind == "USER_INPUT":
            sources[node.name] = Source("chunk", node.name)
        elif kind in ("PARAMETER", "BUFFER"):
            name = original_name(spec.target.removeprefix("model."))
            sources[node.name] = Source("weight", name)
            weights[name] = tensors[spec.target.removeprefix("model.")]
        elif kind == "CONSTANT_TENSOR":
            sources[node.name] = Source("weight", spec.target)
            weights[spec.target] = exported.constants[spec.target]
        else:
            raise ValueError(f"backbone {type(model).__name__}: cannot capture input {spec.target!r} of kind {kind}")
    for node in exported.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable:
            for arg in node.all_input_nodes:
                if arg.op == "placeholder":
                    reason = _known_reason(model) or "the backbone is frozen"
                    raise ValueError(f"backbone {type(model).__name__}: its forward writes {sources[arg.name].key!r}; {reason}")
    return weights, sources


def _name_modules(gm: fx.GraphModule, model: nn.Module) -> None:
    """Say of each node which module it is of, by the name that PEFT knows it by: of one that two names lead to, the first of its
    parent's. PEFT puts an adapter into the parent, where all who use that find it.
    """
    there, first = dict[str, nn.Module](), dict[int, str]()
    for name, module in model.named_modules(remove_duplicate=False):
        there[original_name(name)] = module
        first.setdefault(id(module), original_name(name))
    for node in gm.graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        path = next(reversed([entry[0] for entry in stack.values()]), "")
        above, dot, leaf = (original_name(path.removeprefix("model.")) if path != "model" else "").rpartition(".")
        parent = first[id(there[above])] if dot and above in there else above
        node.meta = {"val": node.meta.get("val"), "mux_module": f"{parent}{dot if parent else ''}{leaf}"}


def _single_output(gm: fx.GraphModule) -> None:
    output = next(node for node in reversed(gm.graph.nodes) if node.op == "output")
    logits = output.args[0][0]
    if len(val(logits).shape) != 3:
        raise ValueError(f"backbone: its forward must return logits [1, tokens, vocabulary], got {tuple(val(logits).shape)}")
    output.args = ((logits,),)


def _fill_attention(graph: MuxGraph, max_sequences: int) -> None:
    """Rewrite every attention node, of either spelling, to `mux::attention` over the chunk's sequences."""
    gm = graph.gm
    nodes = [node for node in gm.graph.nodes if node.target in (torch.ops.mux.attention_hole.default, _SDPA)]
    if not nodes:
        raise ValueError(
            "backbone: no attention was found; it goes through transformers' AttentionInterface or F.scaled_dot_product_attention"
        )
    borders = add_input(graph, Source("chunk", "cu_seqlens"), fake_like(nodes[0], (max_sequences + 1,), torch.int32))
    bounds = add_input(graph, Source("chunk", "bounds"), fake_like(nodes[0], (2,), torch.int32, "cpu"))
    for node in nodes:
        q, k, v, scale, window, heads_first = _attention_arguments(node)
        with gm.graph.inserting_before(node):
            flat = [_rows_first(gm, x, heads_first) for x in (q, k, v)]
            pair = call(gm, ATTENTION, (*flat, borders, bounds, scale, window), node)
            out = gm.graph.call_function(operator.getitem, (pair, 0))
            out.meta = {"val": val(pair)[0], "mux_module": module_of(node)}
            out = call(gm, torch.ops.aten.unsqueeze.default, (out, 0), node)
            if heads_first:
                out = call(gm, torch.ops.aten.transpose.int, (out, 1, 2), node)
        node.replace_all_uses_with(out)
        gm.graph.erase_node(node)


def _rows_first(gm: fx.GraphModule, x: fx.Node, heads_first: bool) -> fx.Node:
    """[1, T, H, D], or [1, H, T, D] if `heads_first`, to [T, H, D]."""
    if heads_first:
        x = call(gm, torch.ops.aten.transpose.int, (x, 1, 2), x)
    return call(gm, torch.ops.aten.squeeze.dim, (x, 0), x)


def _attention_arguments(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node, float, int, bool]:
    if node.target is not _SDPA:
        q, k, v, scale, window = node.args
        return q, k, v, scale, window, False
    given = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), node.args, strict=False)) | dict(node.kwargs)
    q, k, v = given["query"], given["key"], given["value"]
    where = f"backbone: attention at module {module_of(node) or '(the model itself)'!r}"
    if given.get("attn_mask") is not None:
        raise ValueError(f"{where} adds an explicit mask, which would not follow packed sequences: use is_causal=True")
    if not given.get("is_causal"):
        raise ValueError(f"{where} is not causal")
    if given.get("dropout_p"):
        raise ValueError(f"{where} has dropout_p={given['dropout_p']}")
    if val(q).dim() != 4 or val(q).shape[0] != 1 or val(q).shape[1] % val(k).shape[1] or val(k).shape != val(v).shape:
        raise ValueError(
            f"{where} has shapes {tuple(val(q).shape)}, {tuple(val(k).shape)}, {tuple(val(v).shape)}; expected [1, heads, T, size]"
        )
    scale = given.get("scale")
    return q, k, v, val(q).shape[-1] ** -0.5 if scale is None else scale, 0, True


def _refuse_own_positions(graph: MuxGraph) -> None:
    for node in graph.gm.graph.nodes:
        if node.target in (torch.ops.aten.arange.default, torch.ops.aten.arange.start, torch.ops.aten.arange.start_step):
            raise ValueError(
                f"backbone: module {module_of(node) or '(the model itself)'!r} counts positions itself; packed sequences need "
                "forward(input_ids, position_ids)"
            )
