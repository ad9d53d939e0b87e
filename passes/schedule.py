"""schedule: regions and templates -> the programs of one micro-batch on one rank and one stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from passes.dag import check_order
from runtime.program import Action, Kind, Program
from runtime.region import RegionSpec, TemplateSpec, gradient_name, value_of

HEAD = "head"
CHUNK = ("chunk:input_ids", "chunk:position_ids", "chunk:cu_seqlens", "chunk:longest")
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
) -> Program:
    """All forwards in order, the loss, all backwards in reverse order.

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
    """
    check_order(regions)
    read = {
        reference for reads in (head_reads, *(r.inputs for r in regions)) for reference in reads if reference.startswith(LOADED)
    }
    actions = [Action(0, "compute", Kind.LOAD, "chunk", tasks, 0, (), tuple(dict.fromkeys((*CHUNK, *LOSS_READS, *sorted(read)))))]
    seen = {head_value, *(value_of(reference) for region in regions for reference in region.inputs)}
    for region in regions:
        saved = tuple(f"s.{region.name}/{index}" for index in range(templates[region.template].saved)) if train else ()
        outputs = tuple(name for name in region.outputs if name in seen or name not in kept)
        actions.append(Action(0, "compute", Kind.F, region.name, tasks, 0, _reads(region.inputs), (*outputs, *saved)))
    wanted = _readers(regions, templates, head_value)
    gradient = (gradient_name(head_value, HEAD),) if train and wanted.get(head_value) else ()
    trained = (f"grad.{HEAD}",) if train and head_trains else ()
    reads = tuple(dict.fromkeys((head_value, *LOSS_READS, *_reads(head_reads))))
    actions.append(Action(0, "compute", Kind.LOSS, HEAD, tasks, 0, reads, (*gradient, *trained, "loss")))
    if train:
        actions += [
            _backward(region, templates[region.template], wanted, tasks, kept)
            for region in reversed(regions)
            if templates[region.template].backward
        ]
    return Program(tuple(actions))


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
    region: RegionSpec, template: TemplateSpec, readers: Mapping[str, list[str]], tasks: tuple[str, ...], kept: Sequence[str]
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
    return Action(0, "compute", Kind.B, region.name, tasks, 0, tuple(dict.fromkeys(reads)), (*writes, f"grad.{region.name}"))
