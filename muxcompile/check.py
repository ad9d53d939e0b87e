"""check: a step's predictions held against a step that really runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from muxcompile.model import CompiledModel
from passes import measure
from passes.cost import CostModel, keys
from passes.measure import Check
from runtime.pack import pack


def check(model: CompiledModel, batches: Mapping[str, Any]) -> list[Check]:
    """Run one step's forwards and backwards, group by group, and hold seconds and peak bytes against the plan's figures.

    Gradients and counters are left as they were; adapters and optimizers are not touched.

    Raises:
        ValueError: the model was planned without a forecast (give every task its `lengths`), or its batches are wrong.
    """
    compiler: Any = model._compiler
    found = compiler.planned.forecast if compiler is not None else None
    if found is None:
        raise ValueError("check: there is no forecast to hold a step against: give every task its lengths")
    examples = model._read(batches)
    for name in examples:
        if model.state.tasks[name].pending is not None:
            raise ValueError(f"task {name!r}: check would add to its gradients: call optim_step first")
    answers = []
    for executor, group in zip(model._executors, compiler.planned.groups, strict=True):
        own = {name: given for name, given in examples.items() if name in executor.compiled.tasks}
        if own:
            chunks = list(pack(own, executor.compiled.geometry, shared=executor.compiled.head.shared))
            answers.append(_one(known_data(found.model, own), executor, chunks, list(own), checkpoint=group.checkpoint))
    for name in examples:
        model.state.clear_gradients(name)
    return answers


def known_data(model: CostModel, examples: Mapping[str, Sequence[Any]]) -> CostModel:
    """The model for sequences whose lengths and labels are known, not sampled."""
    lengths = [len(example) for given in examples.values() for example in given]
    labelled = sum(example.labelled for given in examples.values() for example in given)
    # A step is held against seconds, whatever the plan made least.
    return replace(model, keys=keys(lengths), labelled=labelled / sum(lengths), objective="time")


def _one(model: CostModel, executor: Any, chunks: Sequence[Any], tasks: Sequence[str], *, checkpoint: bool) -> Check:
    return measure.check(
        model,
        executor.compiled,
        executor.weights,
        executor.state,
        executor.callables,
        chunks,
        tasks,
        checkpoint=checkpoint,
        recorders=executor.recorders,
    )
