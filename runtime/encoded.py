"""Encoded: the tensors that tasks train outside of the tables, and the encodings that fill tables from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

import runtime.residual  # noqa: F401  (its encoders and starts are registered)
from runtime.encoders import CONSTANTS, ENCODERS, FILES, STARTS
from runtime.tables import Encoding, Input, Place
from runtime.training import draw, generator
from runtime.unmixed import unmixed

# Elements of an encoding's inputs, and of its results, up to which its last run is kept: a copy of these, and the graph. Larger
# ones run again, so that what a task holds stays what it trains.
_KEPT = 1 << 17


class Encoded:
    """Every task's encodings, with the tensors that belong to them.

    Args:
        value: (task, key) -> the live tensor of one of the task's keys, in PEFT's shape; the state answers, which has the tables.
        weights: the backbone's tensors by name; read, never written.
        device: where the tensors lie.
    """

    def __init__(self, value: Callable[[str, str], Tensor], weights: Mapping[str, Tensor], device: torch.device) -> None:
        self.encodings: dict[tuple[str, str], Encoding] = {}
        self.weights = weights
        # By (task, key), float32, contiguous: all inputs; gradients of the trainable ones.
        self.tensors: dict[tuple[str, str], Tensor] = {}
        self.grads: dict[tuple[str, str], Tensor] = {}
        self._value = value
        self._device = device
        self._constants: dict[tuple[str, str], dict[str, Tensor]] = {}
        # Of an encoding's last run its leaves and results, with the graph that `pull` goes back through.
        self._runs: dict[tuple[str, str], tuple[list[Tensor], list[Tensor]]] = {}

    def of(self, task: str) -> list[Encoding]:
        return [encoding for encoding in self.encodings.values() if encoding.task == task]

    def inputs(self, task: str, *, trainable: bool) -> list[Input]:
        return [given for encoding in self.of(task) for given in encoding.inputs if given.trainable == trainable]

    def input(self, task: str, key: str) -> Input:
        return next(given for given in self.owner(task, key).inputs if given.key == key)

    def owner(self, task: str, key: str) -> Encoding:
        return next(encoding for encoding in self.of(task) if any(given.key == key for given in encoding.inputs))

    def readers(self, task: str, key: str) -> list[Encoding]:
        """The encodings whose outputs depend on a key."""
        return [
            encoding
            for encoding in self.of(task)
            if key in encoding.reads.values() or any(given.key == key for given in encoding.inputs)
        ]

    @unmixed()
    def admit(self, task: str, seed: int) -> None:
        """Fresh tensors of a task, drawn from (seed, task, key); its starts may read keys that stand before their own."""
        for encoding in self.of(task):
            made: dict[str, Tensor] = {}
            for given in encoding.inputs:
                own = generator(seed, task, given.key)
                if given.start and given.name not in made:
                    inputs, reads, weights = self._given(encoding)
                    found = STARTS[given.start](given.shape, own, inputs | reads, weights, **encoding.settings)
                    made |= {given.name: found} if isinstance(found, Tensor) else found
                if given.start:
                    value = made[given.name]
                else:
                    shape = given.shape if given.shard is None else given.shard.whole(given.shape)
                    value = draw(shape, own, bound=given.bound, std=given.std, fill=given.fill)
                    value = value if given.shard is None else given.shard.cut(value)
                assert tuple(value.shape) == given.shape, f"{given.key}: start {given.start!r} made {tuple(value.shape)}"
                # Dense rows: moments that come out of a checkpoint have them, and a fused optimizer walks all in step.
                dense = torch.contiguous_format
                self.tensors[task, given.key] = value.to(self._device, torch.float32, copy=True, memory_format=dense)
                if given.trainable:
                    self.grads[task, given.key] = torch.zeros_like(self.tensors[task, given.key])

    def expel(self, task: str) -> None:
        self.encodings = {key: encoding for key, encoding in self.encodings.items() if key[0] != task}
        self.tensors = {key: tensor for key, tensor in self.tensors.items() if key[0] != task}
        self.grads = {key: tensor for key, tensor in self.grads.items() if key[0] != task}
        self._constants = {key: tensors for key, tensors in self._constants.items() if key[0] != task}
        self.forget(task)

    def forget(self, task: str) -> None:
        """Its inputs are not those that its encodings last ran with."""
        self._runs = {key: run for key, run in self._runs.items() if key[0] != task}

    @unmixed()
    def encode(self, encoding: Encoding) -> list[Tensor]:
        """The rows of its places, float32."""
        if not encoding.outputs:
            return []
        inputs = [self.tensors[encoding.task, given.key] for given in encoding.inputs if given.trainable]
        if sum(tensor.numel() for tensor in inputs) > _KEPT:
            with torch.no_grad():
                return self._run(encoding, *self._given(encoding))
        # The optimizer writes into the inputs, and a graph may hold its leaves: copies.
        return [out.detach() for out in self._traced(encoding, keep=True)[1]]

    def _traced(self, encoding: Encoding, *, keep: bool) -> tuple[list[Tensor], list[Tensor]]:
        """The leaves of a run, in the order of its trainable inputs, and its results."""
        inputs, reads, weights = self._given(encoding)
        leaves = {name: (tensor.clone() if keep else tensor.detach()).requires_grad_() for name, tensor in inputs.items()}
        with torch.enable_grad():
            run = list(leaves.values()), self._run(encoding, leaves, reads, weights)
        if keep and sum(out.numel() for out in run[1]) <= _KEPT:
            self._runs[encoding.task, encoding.name] = run
        return run

    @unmixed()
    def file(self, task: str) -> tuple[set[str], dict[str, Tensor]]:
        """The keys that PEFT's file leaves out, and what it holds in their place, float32."""
        left = {given.key for encoding in self.of(task) for given in encoding.inputs if not given.filed}
        held: dict[str, Tensor] = {}
        with torch.no_grad():
            for encoding in [encoding for encoding in self.of(task) if encoding.encoder in FILES]:
                left |= {given.key for given in encoding.inputs}
                held |= FILES[encoding.encoder](*self._given(encoding), **encoding.settings)
        return left, held

    @unmixed()
    def pull(self, encodings: Iterable[Encoding], gradients: Callable[[Place], Tensor]) -> None:
        """Set the inputs' gradients to J^T g, with g those of the places and J the encoder's Jacobian where the inputs stand.

        One walk of the autograd engine for all encodings: there may be hundreds.
        """
        leaves, held, ends, seeds = [], [], [], []
        for encoding in encodings:
            own = [self.grads[encoding.task, given.key] for given in encoding.inputs if given.trainable]
            if not encoding.outputs or not own:
                continue
            run = self._runs.get((encoding.task, encoding.name)) or self._traced(encoding, keep=False)
            leaves += run[0]
            held += own
            # An output that no input reaches has no graph.
            reached = [(out, place) for out, place in zip(run[1], encoding.outputs, strict=True) if out.requires_grad]
            ends += [out for out, _ in reached]
            seeds += [gradients(place) for _, place in reached]
        if not held:
            return
        found = torch.autograd.grad(ends, leaves, seeds, allow_unused=True, retain_graph=True)
        # An input that reaches no output has no gradient.
        torch._foreach_copy_(held, [torch.zeros_like(own) if grad is None else grad for own, grad in zip(held, found, strict=True)])

    def _given(self, encoding: Encoding) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """What the encoder is called with: inputs, reads, weights. Tensors that a start has yet to make are left out."""
        known = [(given, self.tensors.get((encoding.task, given.key))) for given in encoding.inputs]
        inputs = {given.name: tensor for given, tensor in known if tensor is not None and given.trainable}
        reads = {given.name: tensor for given, tensor in known if tensor is not None and not given.trainable}
        # Copies, since where a row lies in its table, which neighbours decide, must not reach a matmul's choice of loops.
        copied = torch.contiguous_format
        reads |= {name: self._value(encoding.task, key).clone(memory_format=copied) for name, key in encoding.reads.items()}
        weights = {name: self.weights[full].detach() for name, full in encoding.weights.items()}
        if encoding.encoder in CONSTANTS:
            key = encoding.task, encoding.name
            if key not in self._constants:
                self._constants[key] = CONSTANTS[encoding.encoder](weights, **encoding.settings)
            weights |= self._constants[key]
        return inputs, reads, weights

    def _run(
        self, encoding: Encoding, inputs: Mapping[str, Tensor], reads: Mapping[str, Tensor], weights: Mapping[str, Tensor]
    ) -> list[Tensor]:
        outputs = ENCODERS[encoding.encoder](inputs, reads, weights, **encoding.settings)
        for place, out in zip(encoding.outputs, outputs, strict=True):
            assert out.dtype == torch.float32, f"{encoding.encoder}: {out.dtype} for {place}"
            assert out.shape[0] == place.stop - place.start, f"{encoding.encoder}: {tuple(out.shape)} for {place}"
        return outputs


def check_registered(encodings: Iterable[Encoding]) -> None:
    """Every function that the encodings name is there.

    Raises:
        ValueError: naming the task and the function; an outsider's must be registered by the process that runs it.
    """
    for encoding in encodings:
        named: list[tuple[str, str, Mapping[str, Any]]] = [
            ("encoder", encoding.encoder if encoding.outputs else "", ENCODERS),
            *(("start", given.start, STARTS) for given in encoding.inputs),
        ]
        for what, name, known in named:
            if name and name not in known:
                raise ValueError(
                    f"task {encoding.task!r}: {encoding.name}: {what} {name!r} is not registered in runtime.encoders "
                    f"(there are: {', '.join(known)})"
                )
