"""schedule: regions and templates -> the programs of one micro-batch on one rank and one stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from passes.dag import check_order
from runtime.program import Action, Kind, Program
from runtime.region import RegionSpec, TemplateSpec, gradient_name, value_of

HEAD = "head"
CHUNK = ("chunk:input_ids", "chunk:position_ids", "chunk:cu_seqlens", "chunk:bounds")
# Inputs of regions that a chunk brings along.
LOADED = ("chunk:", "route:", "drop:")
LOSS_READS = ("chunk:rows", "chunk:targets", "chunk:weights", "route:")


def schedule(
    regions: Sequence[RegionSpec],
    templates: Mapping[str, TemplateSpec],
    head_value: str,
    *,
    tasks: tuple[str, ...],
    train: bool,
    head_reads: Sequence[str] = (),
    head_trains: bool = False,
    kept: Sequence[str] = (),
    ends: Sequence[int] = (),
) -> Program:
    """All forwards in order, the loss, all backwards in reverse order; stage after stage, each on a rank of its own.

    Args:
        regions: in running order.
        templates: by name.
        head_value: the value the loss reads.
        tasks: all tasks (a chunk's own are filled in when it runs).
        train: with backward; otherwise forward and loss alone, and nothing is saved.
        head_reads: references of what the loss reads besides the value.
        head_trains: the loss adds to gradients of tables.
        kept: keys and values that later pieces of a cut sequence see. They are written, and their gradients are read, where
            there is one (`runtime.carry`): of a chunk of whole sequences nobody does.
        ends: the place behind the last region of each stage (`passes.stages.cut`); none: there is one stage. The loss is the last
            stage's.
    """
    check_order(regions)
    ends = tuple(ends) or (len(regions),)
    crossing = _Crossing(regions, templates, head_value, ends)
    actions: list[Action] = []
    for rank in range(len(ends)):
        own, last = crossing.regions(rank), rank == len(ends) - 1
        read = {ref for reads in (head_reads if last else (), *(r.inputs for r in own)) for ref in reads if ref.startswith(LOADED)}
        loaded = tuple(dict.fromkeys((*CHUNK, *(LOSS_READS if last else ()), *sorted(read))))
        actions.append(Action(rank, "compute", Kind.LOAD, "chunk", tasks, 0, (), loaded))
        if values := crossing.values(rank - 1):
            actions.append(Action(rank, "recv_down", Kind.RECV, str(rank - 1), tasks, 0, (), values))
        for region in own:
            saved = tuple(f"s.{region.name}/{index}" for index in range(templates[region.template].saved)) if train else ()
            outputs = tuple(name for name in region.outputs if name in crossing.read or name not in kept)
            actions.append(Action(rank, "compute", Kind.F, region.name, tasks, 0, _reads(region.inputs), (*outputs, *saved)))
        if values := crossing.values(rank):
            actions.append(Action(rank, "send_down", Kind.SEND, str(rank + 1), tasks, 0, values, ()))
    gradient = (gradient_name(head_value, HEAD),) if train and crossing.readers.get(head_value) else ()
    trained = (f"grad.{HEAD}",) if train and head_trains else ()
    reads = tuple(dict.fromkeys((head_value, *LOSS_READS, *_reads(head_reads))))
    actions.append(Action(len(ends) - 1, "compute", Kind.LOSS, HEAD, tasks, 0, reads, (*gradient, *trained, "loss")))
    for rank in reversed(range(len(ends) if train else 0)):
        if grads := crossing.gradients(rank):
            actions.append(Action(rank, "recv_up", Kind.RECV, str(rank + 1), tasks, 0, (), grads))
        actions += [
            _backward(region, templates[region.template], crossing.readers, tasks, kept, rank)
            for region in reversed(crossing.regions(rank))
            if templates[region.template].backward
        ]
        if grads := crossing.gradients(rank - 1):
            actions.append(Action(rank, "send_up", Kind.SEND, str(rank - 1), tasks, 0, grads, ()))
    return Program(tuple(actions))


class _Crossing:
    """What goes from stage to stage: values that later stages read, and the gradients that these compute of them."""

    def __init__(
        self, regions: Sequence[RegionSpec], templates: Mapping[str, TemplateSpec], head_value: str, ends: Sequence[int]
    ) -> None:
        self._regions, self._ends = regions, ends
        self.readers = _readers(regions, templates, head_value)
        self.read = {head_value, *(value_of(reference) for region in regions for reference in region.inputs)}
        self._made = {value: self.stage(place) for place, region in enumerate(regions) for value in region.outputs}
        self._graded = {value for region in regions if templates[region.template].backward for value in region.outputs}
        self._place = {region.name: self.stage(place) for place, region in enumerate(regions)} | {HEAD: len(ends) - 1}
        self._last = {head_value: len(ends) - 1}
        for place, region in enumerate(regions):
            for value in filter(None, map(value_of, region.inputs)):
                self._last[value] = max(self._last.get(value, 0), self.stage(place))

    def stage(self, place: int) -> int:
        return next(rank for rank, end in enumerate(self._ends) if place < end)

    def regions(self, rank: int) -> Sequence[RegionSpec]:
        return self._regions[self._ends[rank - 1] if rank else 0 : self._ends[rank]]

    def values(self, rank: int) -> tuple[str, ...]:
        """What a stage sends to the next: what it or one before it made and a later one reads."""
        return tuple(value for value, made in self._made.items() if made <= rank < self._last.get(value, -1))

    def gradients(self, rank: int) -> tuple[str, ...]:
        """What a stage is sent by the next: of each value that it sends there, every later reader's part of the gradient."""
        return tuple(
            gradient_name(value, reader)
            for value in self.values(rank)
            if value in self._graded
            for reader in self.readers.get(value, ())
            if self._place[reader] > rank
        )


def step_action(
    task: str, regions: Sequence[RegionSpec], templates: Mapping[str, TemplateSpec], *, head_trains: bool = False
) -> Action:
    """The optimizer step of one task: it reads what every backward accumulated."""
    grads = tuple(f"grad.{region.name}" for region in regions if templates[region.template].backward)
    grads += (f"grad.{HEAD}",) if head_trains else ()
    return Action(0, "compute", Kind.STEP, "optimizer", (task,), 0, grads, ())


def _reads(references: Sequence[str]) -> tuple[str, ...]:
    """What an action reads besides weights and tables, which are always there, and earlier pieces, of which there may be none."""
    names = (value_of(ref) or ref for ref in references if not ref.startswith(("weight:", "table:", "carry:")))
    return tuple(dict.fromkeys(names))


def _readers(regions: Sequence[RegionSpec], templates: Mapping[str, TemplateSpec], head_value: str) -> dict[str, list[str]]:
    """For every value that has a gradient, who computes a part of it."""
    made = {output for region in regions if templates[region.template].backward for output in region.outputs}
    readers: dict[str, list[str]] = {head_value: [HEAD]} if head_value in made else {}
    for region in regions:
        for index in templates[region.template].input_grads:
            readers.setdefault(region.inputs[index].removeprefix("value:"), []).append(region.name)
    return readers


def _backward(
    region: RegionSpec,
    template: TemplateSpec,
    readers: Mapping[str, list[str]],
    tasks: tuple[str, ...],
    kept: Sequence[str],
    rank: int,
) -> Action:
    assert template.backward is not None
    reads: list[str] = []
    for reference in template.backward:
        kind, _, index = reference.partition(":")
        if kind == "saved":
            reads.append(f"s.{region.name}/{index}")
        elif kind == "input":
            reads += _reads([region.inputs[int(index)]])
        elif kind == "tangent":
            value = region.outputs[int(index)]
            assert readers.get(value) or value in kept, f"{region.name}: nobody computes the gradient of {value}"
            reads += [gradient_name(value, reader) for reader in readers.get(value, ())]
    values = (value_of(region.inputs[index]) for index in template.input_grads)
    writes = [gradient_name(value, region.name) for value in values if value is not None]
    return Action(rank, "compute", Kind.B, region.name, tasks, 0, tuple(dict.fromkeys(reads)), (*writes, f"grad.{region.name}"))
