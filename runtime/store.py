"""Store: adapter tables, their gradients and copies, and tensors of tasks by PEFT's keys."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from runtime.comm import Ranks
from runtime.cudagraph import Recorder
from runtime.encoded import Encoded, check_registered
from runtime.tables import Encoding, Param, Place, Shard, Table, routes_of
from runtime.training import TaskState, Training, draw, flags, generator, optimizer


class Store:
    """Slot tables with their gradients, and every task's optimizer over its own rows.

    Masters and gradients are float32; `copies` are what regions read, in the compute dtype (the masters themselves in float32).
    A key of a task is a `Param`, whose master is the table's row, or an `Input` of an `Encoding`, whose master is a tensor of its
    own (in `encoded`) and whose table rows follow from it.

    Args:
        encodings: what fills rows of tables from other tensors.
        weights: the backbone's tensors that encodings read, by name.
        ranks: who holds the other tensors of the tasks, and replicas of these; None: nobody. Then `step`, `exchange` and what reads
            all of a task are calls that all ranks make, in the same order.
    """

    def __init__(
        self,
        tables: Mapping[str, Table],
        params: Iterable[Param],
        training: Mapping[str, Training],
        device: torch.device,
        encodings: Iterable[Encoding] = (),
        weights: Mapping[str, Tensor] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.ranks = ranks
        self.tables = dict(tables)
        self.params = {(param.task, param.key): param for param in params}
        self.device = device
        self.encoded = Encoded(self._value, weights or {}, device)
        self.encoded.encodings = _by_name(encodings)
        self.taken_back = self._encoded_tasks()
        self.masters = {name: self._fresh(table) for name, table in self.tables.items()}
        self.copies = {name: self.masters[name].to(getattr(torch, table.dtype)) for name, table in self.tables.items()}
        self.grads = {name: torch.zeros_like(self.masters[name]) for name, table in self.tables.items() if table.trainable}
        self.tasks: dict[str, TaskState] = {}
        # What records the tasks' optimizer steps, of which those of several recorders run side by side; none: they are called.
        self.recorders: tuple[Recorder, ...] = ()
        for name, settings in training.items():
            self.admit(name, settings)

    def _fresh(self, table: Table) -> Tensor:
        if table.values:
            return torch.tensor(table.values, dtype=torch.float32, device=self.device)
        dtype = torch.float32 if table.trainable else getattr(torch, table.dtype)
        return torch.zeros(table.shape, dtype=dtype, device=self.device)

    @property
    def routes(self) -> dict[str, tuple[str, ...]]:
        return routes_of(self.tables)

    def drops(self, route: str, *, train: bool) -> list[list[int]]:
        """For each slot of a route its task's dropout key in two halves, and p * 2^32, as int32; zeros outside training."""
        found = []
        for name in self.routes[route]:
            task = self.tasks.get(name)
            if task is None or not train:
                found.append([0, 0, 0])
                continue
            numbers = task.training
            digest = hashlib.sha256(f"{numbers.seed}\0{name}\0dropout\0{task.draws}".encode()).digest()
            low, high = (int.from_bytes(digest[start : start + 4], "little", signed=True) for start in (0, 4))
            threshold = min(round(numbers.dropout * 2**32), 2**32 - 1)
            found.append([low, high, threshold - 2**32 if threshold >= 2**31 else threshold])
        return found

    # --- tasks ---

    def admit(self, name: str, training: Training) -> None:
        """Bind a task to its rows, with PEFT's fresh weights drawn from (seed, name, key) alone."""
        for param in self._params_of(name):
            own = generator(training.seed, name, param.key)
            self._set(name, param.key, draw(self.shape(name, param.key), own, bound=param.bound, std=param.std, fill=param.fill))
        self.encoded.admit(name, training.seed)
        for encoding in self.encoded.of(name):
            self._fill(encoding)
        self._bind(name, training)

    def _encoded_tasks(self) -> frozenset[str]:
        """Tasks whose steps are looked at once they are taken: those with encodings, on any rank."""
        own = {task for task, _ in self.encoded.encodings}
        return frozenset(own if self.ranks is None else own.union(*self.ranks.objects(own)))

    def _params_of(self, name: str) -> list[Param]:
        return [param for (task, _), param in self.params.items() if task == name]

    def _bind(self, name: str, training: Training) -> None:
        params = [param for param in self._params_of(name) if self.tables[param.table].trainable]
        fixed = [param for param in self._params_of(name) if not self.tables[param.table].trainable]
        inputs = [(name, given.key) for given in self.encoded.inputs(name, trainable=True)]
        keys = tuple(param.key for param in params) + tuple(key for _, key in inputs)
        kept = tuple(param.key for param in fixed)
        kept += tuple(given.key for given in self.encoded.inputs(name, trainable=False))
        assert keys or self.ranks is not None, f"task {name!r} has no parameters"
        assert len({*keys, *kept}) == len(keys) + len(kept), f"task {name!r}: two tensors have one key"
        views = [self._rows(self.masters, param) for param in params] + [self.encoded.tensors[key] for key in inputs]
        gradients = [self._rows(self.grads, param) for param in params] + [self.encoded.grads[key] for key in inputs]
        for view, gradient in zip(views, gradients, strict=True):
            view.grad = gradient
        own = optimizer(dict(zip(keys, views, strict=True)), training, self.device)
        self.tasks[name] = TaskState(training, keys, kept, len(params), views, gradients, own, **flags(self.device))

    def expel(self, name: str) -> None:
        """Forget a task; its slots become zeros, free for another."""
        for table in self._tables_of(name):
            row = self.tables[table].rows.index(name)
            self.masters[table][row] = 0
            self.copies[table][row] = 0
            if table in self.grads:
                self.grads[table][row] = 0
            self.tables[table] = self.tables[table].with_row(row, "")
        self.params = {key: param for key, param in self.params.items() if key[0] != name}
        self.encoded.expel(name)
        del self.tasks[name]

    def relayout(
        self,
        tables: Mapping[str, Table],
        params: Iterable[Param],
        newcomers: Mapping[str, Training],
        encodings: Iterable[Encoding] = (),
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Move to other tables: tensors of unchanged tables stay in place, rows of others are copied, newcomers are admitted.

        Every task keeps its weights, gradients, optimizer state and counters; inputs of encodings stay where they are.
        """
        after_move = _by_name(encodings)
        carried = self._carry(after_move)
        held = {name: (self.masters[name], self.grads.get(name), table) for name, table in self.tables.items()}
        moved: set[str] = set()
        fresh: set[str] = set()
        for name, table in tables.items():
            old = held.get(name)
            if old is not None and old[2].shape == table.shape:
                if table.values:
                    self.masters[name].copy_(self._fresh(table))
                    self.copies[name].copy_(self.masters[name])
                continue
            fresh.add(name)
            moved.update(task for task in table.rows if task)
            self.masters[name] = self._fresh(table)
            if table.trainable:
                self.grads[name] = torch.zeros_like(self.masters[name])
            if old is not None and not table.values:
                for where, source in ((self.masters, old[0]), (self.grads, old[1])):
                    for row, task in enumerate(table.rows):
                        if source is not None and task in old[2].rows:
                            where[name][row] = source[old[2].rows.index(task)]
            self.copies[name] = self.masters[name].to(getattr(torch, table.dtype))
        for name in set(held) - set(tables):
            for where in (self.masters, self.copies, self.grads):
                where.pop(name, None)
        self.tables, self.params = dict(tables), {(param.task, param.key): param for param in params}
        self._put_down(carried, after_move, fresh)
        self.encoded.encodings = after_move
        self.taken_back = self._encoded_tasks()
        self.encoded.weights = self.encoded.weights if weights is None else weights
        for name in [name for name in self.tasks if name in moved]:
            before = self.tasks[name]
            held_state = before.optimizer.state_dict()
            self._bind(name, before.training)
            after = self.tasks[name]
            after.optimizer.load_state_dict(held_state)
            for kept in ("alive", "steps", "examples", "draws", "quarantined", "pending", "losses", "unread"):
                setattr(after, kept, getattr(before, kept))
        for name, training in newcomers.items():
            self.admit(name, training)

    def _carry(self, after: Mapping[tuple[str, str], Encoding]) -> dict[tuple[str, str], list[tuple[Tensor, Tensor]]]:
        """Masters and gradients of the places that tasks' encodings leave."""
        for key, encoding in after.items():
            before = self.encoded.encodings.get(key)
            assert before is None or before.inputs == encoding.inputs, f"{key}: inputs change while the task trains"
        return {
            key: [(self._rows(self.masters, place).clone(), self._rows(self.grads, place).clone()) for place in encoding.outputs]
            for key, encoding in self.encoded.encodings.items()
            if key in after and after[key].outputs != encoding.outputs
        }

    def _put_down(
        self,
        carried: Mapping[tuple[str, str], list[tuple[Tensor, Tensor]]],
        after: Mapping[tuple[str, str], Encoding],
        fresh: set[str],
    ) -> None:
        """Clear the places that encodings left, then fill those they went to. Rows of `fresh` tables were copied by task."""
        for key in carried:
            for place in self.encoded.encodings[key].outputs:
                if place.table in fresh and key[0] in self.tables[place.table].rows:
                    place = replace(place, row=self.tables[place.table].rows.index(key[0]))
                if place.table in self.tables and place.row < self.tables[place.table].shape[0]:
                    for where in (self.masters, self.copies, self.grads):
                        self._rows(where, place).zero_()
        for key, held in carried.items():
            for place, (master, gradient) in zip(after[key].outputs, held, strict=True):
                self._rows(self.masters, place).copy_(master)
                self._rows(self.copies, place).copy_(master)
                self._rows(self.grads, place).copy_(gradient)

    def _tables_of(self, name: str) -> list[str]:
        return [key for key, table in self.tables.items() if name in table.rows]

    # --- tensors by PEFT key ---

    def _rows(self, where: Mapping[str, Tensor], place: Param | Place) -> Tensor:
        return where[place.table][place.row, place.start : place.stop]

    def _value(self, task: str, key: str) -> Tensor:
        """The live tensor in PEFT's shape."""
        param = self.params.get((task, key))
        if param is None:
            return self.encoded.tensors[task, key]
        return as_stored(param, self._rows(self.masters, param))

    def holds(self, task: str, key: str) -> bool:
        """Whether a tensor of a task lies on this rank."""
        return (task, key) in self.params or (task, key) in self.encoded.tensors

    def named(self, task: str) -> list[str]:
        """The keys that PEFT has tensors of."""
        own = self.tasks[task]
        inner = {given.key for given in self.encoded.inputs(task, trainable=False) if not given.filed}
        return [key for key in (*own.keys, *own.kept) if key not in inner]

    def shape(self, task: str, key: str) -> tuple[int, ...]:
        """PEFT's, of the whole tensor."""
        own, shard = tuple(self._value(task, key).shape), self._shard(task, key)
        return own if shard is None else shard.whole(own)

    def _shard(self, task: str, key: str) -> Shard | None:
        """Which piece of PEFT's tensor this rank has."""
        param = self.params.get((task, key))
        return self.encoded.input(task, key).shard if param is None else param.shard

    def read(self, task: str, key: str, *, gradient: bool = False) -> Tensor:
        """A float32 copy of one PEFT tensor (or of its gradient), in PEFT's shape, on the CPU."""
        assert not gradient, "a store has no gradients of its own"
        return self._copied(task, key, self._value(task, key))

    def _copied(self, task: str, key: str, value: Tensor) -> Tensor:
        return self._whole(value.detach(), self._shard(task, key)).to("cpu", copy=True).contiguous()

    def _whole(self, part: Tensor, shard: Shard | None) -> Tensor:
        """All shards' parts as one tensor."""
        if shard is None or self.ranks is None:
            return part
        return torch.cat(list(self.ranks.gather(part.contiguous(), "beside")), shard.dim)

    def moment(self, task: str, key: str, value: Tensor) -> Tensor:
        """What an optimizer keeps of a key, such as a moment, of the whole tensor; laid out as its rows in a table."""
        return self._whole(value, self._laid(task, key)) if value.dim() else value

    def moment_here(self, task: str, key: str, value: Tensor) -> Tensor:
        """The part of it that belongs to this rank."""
        shard = self._laid(task, key)
        return value if shard is None or not value.dim() else shard.cut(value)

    def moment_shape(self, task: str, key: str, view: Tensor) -> tuple[int, ...]:
        """Of the whole, where `view` is the rank's part."""
        shard = self._laid(task, key)
        return tuple(view.shape) if shard is None else shard.whole(tuple(view.shape))

    def _laid(self, task: str, key: str) -> Shard | None:
        param = self.params.get((task, key))
        return self._shard(task, key) if param is None else param.rows_shard

    def file(self, task: str) -> dict[str, Tensor]:
        """What PEFT's file holds of a task, by key: float32 copies on the CPU."""
        left, held = self.encoded.file(task)
        own = self.tasks[task]
        found = {key: self.read(task, key) for key in (*own.keys, *own.kept) if key not in left}
        return found | {key: value.to("cpu", copy=True).contiguous() for key, value in held.items()}

    def write(self, task: str, key: str, value: Tensor) -> None:
        """Set one PEFT tensor; what encodings compute from it follows."""
        self._set(task, key, value)
        for encoding in self.encoded.readers(task, key):
            self._fill(encoding)

    def _set(self, task: str, key: str, value: Tensor) -> None:
        if shard := self._shard(task, key):
            value = shard.cut(value)
        self._value(task, key).copy_(value)
        if param := self.params.get((task, key)):
            as_stored(param, self._rows(self.copies, param)).copy_(value)

    # --- encodings ---

    def _fill(self, encoding: Encoding) -> None:
        for place, rows in zip(encoding.outputs, self.encoded.encode(encoding), strict=True):
            self._rows(self.masters, place).copy_(rows)
            self._rows(self.copies, place).copy_(rows)

    def _pull(self, encodings: Iterable[Encoding]) -> None:
        """Gradients of the places as gradients of the inputs. They are set, not added to: the tables hold the sums."""
        self.encoded.pull(encodings, lambda place: self._rows(self.grads, place).clone())


def as_stored(param: Param, rows: Tensor) -> Tensor:
    """A table's rows in PEFT's shape, a view."""
    rows = rows.T if param.transposed else rows
    return rows[0] if param.flat else rows


def _by_name(encodings: Iterable[Encoding]) -> dict[tuple[str, str], Encoding]:
    listed = list(encodings)
    check_registered(listed)
    found = {(encoding.task, encoding.name): encoding for encoding in listed}
    assert len(found) == len(listed), "two encodings of a task have one name"
    return found
