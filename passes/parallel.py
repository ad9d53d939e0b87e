"""parallel: what a chunk costs each stage of a mesh, on paper.

The survey is of one shard's part of the model: it has the products and the attention of that shard, and all of what every shard
does itself (norms, residuals). Its regions are cut into stages. Shards sum what each layer's attention and its feed-forward part
make, forwards, and the gradients of what these read, backwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from codegen.links import Fabric, Link
from passes.cost import Cost, CostModel
from passes.loads import Shape
from passes.needs import Extras
from passes.partition import EMBED, FINAL
from passes.records import NOTHING, Amount
from passes.stages import Micro, cut
from passes.survey import Survey
from runtime.comm import Mesh

# All-reduces of a layer in one direction: of its attention, and of its feed-forward part.
SUMS = 2
# Of the bytes that a task's elements take, those of the gradient: 4 of the master, 4 of the gradient, 2 of the copy, 8 of moments.
GRADIENT = 4 / 18
# Of launches' seconds, those that another lane's layers fill: one H200 as a shard whose other one answers at once ran chunks of 896
# rows in two lanes in 0.81 of the time of one, of 4224 and 4608 in 0.97; sums were hidden in both.
FILLED = 0.5
# Of a rank's elements of a LoRA at every linear of a Llama in two shards, those that all shards have: 28,672 of 55,296 a rank.
WHOLE = 0.52


@dataclass(frozen=True, slots=True)
class Section:
    """A region in its place: its part of the survey, the bytes of its weights, and the values it makes that backwards read."""

    name: str
    part: int
    weights: int
    kept: Amount

    @property
    def layer(self) -> bool:
        return self.name not in (EMBED, FINAL)


def sections(survey: Survey, layers: int | None = None) -> tuple[Section, ...]:
    """The regions in running order.

    Args:
        layers: how many layers the model has, where the survey is of three that stand for them: the middle one is repeated.
    """
    count = len(survey.order)
    kept = [NOTHING] * count
    for own in survey.held:
        if own.born < count <= own.dies:
            kept[own.born] += own.nbytes
    parts = next(iter(survey.parts.values()))
    names = _names(survey)
    found = [Section(name, index, parts[index].weights, held) for name, index, held in zip(names, survey.order, kept, strict=True)]
    inner = [place for place, own in enumerate(found) if own.layer]
    if layers is None or layers == len(inner):
        return tuple(found)
    assert len(inner) == 3, f"{len(inner)} layers stand for {layers}"
    return (*found[: inner[1]], *[found[inner[1]]] * (layers - 2), *found[inner[2] :])


def _names(survey: Survey) -> list[str]:
    """Of the regions in running order: a part has its own in that order."""
    left = [list(part.regions) for part in next(iter(survey.parts.values()))]
    return [left[index].pop(0) for index in survey.order]


class Way(NamedTuple):
    """Seconds of a full chunk's forward or backward in one stage: of the rank, also where other lanes' layers fill what this one
    leaves idle, of the host, and of its all-reduces; and what each row of padding spares the rank."""

    busy: float
    filled: float
    issued: float
    sums: float
    spared: float

    def taken(self, padding: float, *, beside: bool) -> float:
        """Of the rank, with so many rows of padding; `beside` other lanes."""
        return max((self.filled if beside else self.busy) - padding * self.spared, self.issued)


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes of a stage's rank: weights, the tasks' tables, the workspace of what runs, and a micro-batch between its forward and
    its backward."""

    weights: int
    tables: int
    work: int
    held: int

    @property
    def least(self) -> int:
        """With one micro-batch in flight."""
        return self.weights + self.tables + self.work + self.held


@dataclass(slots=True)
class StageCosts:
    """Prices of micro-batches, stage by stage.

    Args:
        cost: of one shard's regions.
        mesh, fabric: the ranks, and how they are joined.
        sections: the regions of the whole model.
        stops: the place behind each stage's last region.
    """

    cost: CostModel
    mesh: Mesh
    fabric: Fabric
    sections: tuple[Section, ...]
    stops: tuple[int, ...] = ()
    _costs: dict[tuple[int, str, Extras, Shape], Cost] = field(default_factory=dict, init=False, repr=False)
    _seconds: dict[tuple[Extras, Shape], tuple[tuple[Way, ...], ...]] = field(default_factory=dict, init=False, repr=False)
    _rooms: dict[tuple[Extras, Shape], tuple[Room, ...]] = field(default_factory=dict, init=False, repr=False)

    def balance(self, extras: Extras, shape: Shape) -> None:
        """Cut the regions into stages that take about as long, with the loss in the last.

        Raises:
            ValueError: there are more stages than regions.
        """
        if self.mesh.pp > len(self.sections):
            raise ValueError(f"mesh {self.mesh}: pp={self.mesh.pp} stages, the model has {len(self.sections)} regions to cut into")
        seconds = [
            sum(self._phase(own, way, extras, shape).device + self._sums(own, way, shape) for way in ("forward", "backward"))
            for own in self.sections
        ]
        seconds[-1] += sum(self._loss(extras, shape))
        self.stops = cut(seconds, self.mesh.pp)

    @property
    def stages(self) -> list[tuple[Section, ...]]:
        return [self.sections[start:stop] for start, stop in zip((0, *self.stops[:-1]), self.stops, strict=True)]

    # --- seconds ---

    def micro(
        self,
        tasks: Sequence[str],
        extras: Extras,
        shape: Shape,
        *,
        rows: float | None = None,
        lanes: int = 1,
        beside: bool = True,
    ) -> Micro:
        """A chunk on its way.

        Args:
            extras: what the program of its group runs.
            rows: of the chunk's those that are some task's, in whole blocks; None: all.
            lanes: how many run at a time on one stage; the seconds are the device's own, of which it has as many times fewer.
            beside: transfers pass beside computation; otherwise the sender computes nothing meanwhile.
        """
        transfer, padding = self.transfer(shape), 0.0 if rows is None else shape.tokens - rows
        ways = []
        for way, found in enumerate(zip(*self.seconds(extras, shape), strict=True)):
            last = (self.mesh.pp - 1, 0)[way]  # who sends nothing
            ways.append(
                tuple(
                    each.taken(padding, beside=lanes > 1)
                    + (1 - self.fabric.hidden * (lanes > 1)) * each.sums
                    + (0.0 if beside or stage == last else transfer)
                    for stage, each in enumerate(found)
                )
            )
        return Micro(tuple(tasks), ways[0], ways[1], transfer if beside else 0.0)

    def seconds(self, extras: Extras, shape: Shape) -> tuple[tuple[Way, ...], ...]:
        """[stages] x (forward, backward); the loss is in the last backward."""
        known = self._seconds.get((extras, shape))
        if known is None:
            found = []
            # The host's seconds of a recorded chunk, shared out over the regions and ways.
            host = self.cost.machine.record / (2 * len(self.sections))
            for index, stage in enumerate(self.stages):
                ways = []
                for way in ("forward", "backward"):
                    costs = [self._phase(own, way, extras, shape) for own in stage]
                    busy, launches = sum(own.device for own in costs), sum(own.launches for own in costs)
                    issued, sums = host * len(stage), sum(self._sums(own, way, shape) for own in stage)
                    if way == "backward" and index == self.mesh.pp - 1:
                        loss, exchanged = self._loss(extras, shape)
                        busy, sums = busy + loss, sums + exchanged
                        head, blocks = self.cost.head(extras), self.cost.blocks(shape.tokens)
                        issued, launches = issued + head.host * blocks, launches + head.launches * blocks
                    spared = sum(own.spared for own in costs)
                    ways.append(Way(max(busy, issued), max(busy - FILLED * launches, issued), issued, sums, spared))
                found.append(tuple(ways))
            known = self._seconds[extras, shape] = tuple(found)
        return known

    def transfer(self, shape: Shape) -> float:
        """Seconds of a chunk's hidden values from stage to stage, over the slowest of the links."""
        return self.slowest.transfer(self._row * shape.tokens) if self.mesh.pp > 1 else 0.0

    @property
    def slowest(self) -> Link:
        """Of the links between neighbouring stages."""
        borders = [(self.mesh.rank(0, stage, 0), self.mesh.rank(0, stage + 1, 0)) for stage in range(self.mesh.pp - 1)]
        return min(map(self.fabric.among, borders), key=lambda own: own.sending)

    def step(self, task: str) -> tuple[float, ...]:
        """By stage, seconds of a task's optimizer step, behind the sums of its gradients over the replicas and, of what all shards
        have whole, over the shards.
        """
        layers = sum(own.layer for own in self.sections)
        nbytes, found = self.cost.survey.tasks[task].nbytes, []
        for stage in self.stages:
            share = sum(own.layer for own in stage) / layers
            gradient = share * nbytes * GRADIENT
            sums = self.link("dp").all_reduce(gradient, self.mesh.dp) + self.link("tp").all_reduce(gradient * WHOLE, self.mesh.tp)
            found.append(self.cost.step([task], share) + sums)
        return tuple(found)

    def link(self, name: str) -> Link:
        """The slowest link among the ranks of one of the mesh's "dp" or "tp" groups."""
        mesh = self.mesh
        if name == "dp":
            groups = [[mesh.rank(d, p, t) for d in range(mesh.dp)] for p in range(mesh.pp) for t in range(mesh.tp)]
        else:
            groups = [[mesh.rank(d, p, t) for t in range(mesh.tp)] for d in range(mesh.dp) for p in range(mesh.pp)]
        return max(map(self.fabric.among, groups), key=lambda own: own.all_reduce(1e6, 2))

    @property
    def _tied(self) -> int:
        """Bytes of weights that both a region and the loss read."""
        survey = self.cost.survey
        read = sum(part.weights * len(part.regions) for part in next(iter(survey.parts.values())))
        return max(0, read + survey.head_weights - survey.backbone)

    @property
    def _row(self) -> int:
        """Bytes of a row of the hidden values."""
        return self.cost.survey.head_row

    def _phase(self, own: Section, way: str, extras: Extras, shape: Shape) -> Cost:
        key = own.part, way, extras, shape
        known = self._costs.get(key)
        if known is None:
            known = self._costs[key] = self.cost.phase(own.part, way, extras, shape)
        return known

    def _sums(self, own: Section, way: str, shape: Shape) -> float:
        """Of a region's all-reduces. Who computes its forward again sums again."""
        times = SUMS * (1 + (way == "backward" and shape.checkpoint)) if own.layer else int(own.name == EMBED and way == "forward")
        return times * self.link("tp").all_reduce(self._row * shape.tokens, self.mesh.tp)

    def _loss(self, extras: Extras, shape: Shape) -> tuple[float, float]:
        """Of a chunk's loss: seconds, and those of the sum of its gradient over parts of the vocabulary."""
        rows = self.cost.blocks(shape.tokens) * self.cost.survey.geometry.head_rows
        sums = self.link("tp").all_reduce(self._row * rows, self.mesh.tp)
        return self.cost.head(extras).device * self.cost.blocks(shape.tokens), sums

    # --- bytes ---

    def rooms(self, extras: Extras, shape: Shape) -> tuple[Room, ...]:
        """By stage, what a rank holds while chunks of these run, beside the tables of all tasks."""
        known = self._rooms.get((extras, shape))
        if known is None:
            tables = sum(own.nbytes for own in self.cost.survey.tasks.values())
            layers = sum(own.layer for own in self.sections)
            found = []
            for index, stage in enumerate(self.stages):
                held = 0.0 if index == 0 else float(self._row * shape.tokens)
                peak = held
                for own in stage:
                    forward, backward = (self._phase(own, way, extras, shape) for way in ("forward", "backward"))
                    peak = max(peak, held + forward.peak, held + backward.peak)
                    held += forward.saved + own.kept.at(shape.tokens)
                weights = sum(own.weights for own in stage)
                if index == self.mesh.pp - 1:
                    weights += self.cost.survey.head_weights - (self._tied if self.mesh.pp == 1 else 0)
                    peak = max(peak, held + self._row * (shape.tokens + 1) + self.cost.head(extras).peak)
                # Two gradients of hidden values: the one that comes and the one that goes.
                work = max(0.0, peak - held) + 2 * self._row * shape.tokens
                share = sum(own.layer for own in stage) / layers
                found.append(Room(weights, round(tables * share), round(work), round(held)))
            known = self._rooms[extras, shape] = tuple(found)
        return known


def scaled(survey: Survey, layers: int) -> Survey:
    """A survey of three layers with the tasks' bytes and tensors of `layers`: all of them are in layers, and these are alike."""
    share = layers / 3
    return replace(
        survey,
        tasks={
            task: replace(
                own, nbytes=round(own.nbytes * share), tensors=round(own.tensors * share), tables=round(own.tables * share)
            )
            for task, own in survey.tasks.items()
        },
    )
