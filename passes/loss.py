"""loss: the head -> cross entropy of a block of rows with its gradient, one graph; over ranks each has a part of the vocabulary."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensorMode

from codegen.spec import Body, Head
from passes.differentiate import Decompositions, accumulate, exported, in_place
from passes.graph import val
from passes.shard import GROUP
from runtime.tables import Shard


def differentiate_head(
    body: Body,
    *,
    rows: int,
    tile: int,
    decompositions: Decompositions = None,
    vocabulary: Shard | None = None,
    fused: bool | None = None,
) -> Head:
    """Cross entropy of `rows` positions at a time, its gradient in the same call: logits exist for one block only.

    Adapters of the head see these rows in blocks of `tile`; gradients of their tables are added in place, as in regions.

    Args:
        vocabulary: which part of it the logits are, the others being other ranks'; None: all of it.
        fused: whether logits are read by `mux::lse`, never written in float32; None: on CUDA, where torch's calls are run.

    Raises:
        ValueError: the head depends on the number of rows.
    """
    values = [index for index, reference in enumerate(body.spec.inputs) if reference.startswith("value:")]
    assert values == [0], "the head reads one hidden value, tables and weights"
    given = _fakes(body, rows, tile)
    if fused is None:
        fused = given[0].device.type == "cuda" and decompositions is None

    def loss(*args: torch.Tensor) -> tuple[torch.Tensor]:
        *rest, targets = args
        (logits,) = body.gm(*rest)
        logits = logits.reshape(rows, -1)
        if vocabulary is not None:
            return (parallel_cross_entropy(logits, targets, vocabulary, fused),)
        if fused:
            return (torch.ops.mux.lse(logits, targets)[1],)
        return (torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none"),)

    with given[0].fake_mode:
        targets = torch.empty(rows, dtype=torch.long, device=given[0].device)
    args = (*given, targets)
    try:
        joint = exported(loss, args, True, decompositions)
        forward = exported(loss, args, False, decompositions)
    except RuntimeError as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"backbone: its logits cannot be computed for {rows} rows of a chunk alone: {reason}") from error
    output = joint.graph.output_node()
    nll, *grads = output.args[0]
    output.args = ((nll, grads[0]),)
    tables: dict[fx.Node, fx.Node] = {}
    for index, trainable in enumerate(body.trainable):
        if trainable:
            accumulate(joint, index, grads[index], {}, tables)
    in_place(joint, tables)
    joint.graph.eliminate_dead_code()
    joint.recompile()
    return bind_head(Head(forward, joint, (), "", rows), body)


def parallel_cross_entropy(logits: torch.Tensor, targets: torch.Tensor, own: Shard, fused: bool) -> torch.Tensor:
    """[rows] negative log-likelihoods from each rank's part [rows, V / ranks] of the logits.

    Ranks tell each other the logarithms of their sums of exponentials, and whose part a target is in its logit: numbers that no
    rank has in common with another, so that one sum over ranks is as good as a gather.
    """
    index = targets - own.index * logits.shape[-1]
    if fused:
        found, nll = torch.ops.mux.lse(logits, index)
        picked = found - nll
    else:
        logits = logits.float()
        mine = (index >= 0) & (index < logits.shape[-1])
        found = logits.logsumexp(-1)
        picked = torch.where(mine, logits.gather(-1, index.clamp(0, logits.shape[-1] - 1)[:, None])[:, 0], torch.zeros_like(found))
    sums = [found if rank == own.index else torch.zeros_like(found) for rank in range(own.count)]
    told = torch.ops.mux.reduce(torch.stack([*sums, picked]), GROUP)
    return told[: own.count].logsumexp(0) - told[own.count]


def bind_head(head: Head, body: Body) -> Head:
    """A head as that of another body of the same template: its inputs have names of their own."""
    hidden, *inputs = body.spec.inputs
    trained = [name for name, trainable in zip(body.spec.inputs, body.trainable, strict=True) if trainable]
    names = tuple(name.removeprefix("table:") for name in trained)
    return replace(head, inputs=tuple(inputs), value=hidden.removeprefix("value:"), trained=names)


def _fakes(body: Body, rows: int, tile: int) -> list[Any]:
    """The head's inputs for `rows` rows of a chunk: everything that has a value for each row, or for each block, is that long."""
    with FakeTensorMode():
        fakes = []
        for node, reference, wanted in zip(
            body.gm.graph.find_nodes(op="placeholder"), body.spec.inputs, body.wants_grad, strict=True
        ):
            value, kind = val(node), reference.partition(":")[0]
            shape, stride = tuple(value.shape), value.stride()
            if kind == "value":
                shape, stride = (1, rows, shape[-1]), (rows * shape[-1], shape[-1], 1)
            elif kind == "chunk":
                shape = (rows,)
            elif kind == "route":
                shape = (rows // tile,)
            fake = torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)
            fakes.append(fake.requires_grad_(wanted or kind == "value"))
    return fakes
