"""What is to be computed: region bodies as FX graphs, before a lowering is chosen for them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from runtime.region import RegionSpec, TemplateSpec


@dataclass(frozen=True, slots=True)
class Body:
    """A region's forward as a graph of its own.

    Args:
        spec: which place of the model it is (its `template` names the body it shares).
        gm: placeholders in the order of `spec.inputs`; returns the tuple of `spec.outputs`.
        trainable: for every input whether it is a table with gradients.
        wants_grad: for every input whether a gradient is wanted (a trainable table, or a value that depends on one).
        has_grad: for every output whether it depends on a trainable table.
    """

    spec: RegionSpec
    gm: fx.GraphModule
    trainable: tuple[bool, ...]
    wants_grad: tuple[bool, ...]
    has_grad: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Template:
    """A body with its backward. `forward` returns outputs, then saved tensors; `backward` follows `spec.backward`."""

    spec: TemplateSpec
    forward: fx.GraphModule
    backward: fx.GraphModule | None


@dataclass(frozen=True, slots=True)
class Head:
    """Logits and cross entropy of a block of rows, with the gradient of the rows in the same call.

    Args:
        forward: (rows [1, R, H], *inputs, targets [R]) -> nll [R] float32.
        backward: (rows, *inputs, targets, seed [R] float32, *gradient tables) -> nll [R], d(sum of seed * nll) / d(rows)
            [1, R, H]; gradients of tables are added in place.
        inputs: references of weights, and of the tables, routes and counters of the head's adapters.
        value: the hidden value that rows are taken from.
        rows: R.
        trained: the tables whose gradients are added to.
    """

    forward: fx.GraphModule
    backward: fx.GraphModule
    inputs: tuple[str, ...]
    value: str
    rows: int
    trained: tuple[str, ...] = ()


def flops(gm: fx.GraphModule) -> int:
    """Floating-point operations of one call, by torch's FLOP formulas."""
    from torch.utils.flop_counter import flop_registry

    total = 0
    for node in gm.graph.nodes:
        packet = getattr(node.target, "overloadpacket", None)
        if node.op == "call_function" and packet in flop_registry:
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda arg: arg.meta["val"])
            total += flop_registry[packet](*args, **kwargs, out_val=node.meta["val"])
    return total
