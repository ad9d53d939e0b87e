"""Which tasks share chunks: exact for few tasks, and for many a set of good partitions that local search improves.

A partition is a list of lists of task indices. Two things make the problem easier than it looks. Splitting a group whose halves
have the same extras and shape never pays (ceil(a) + ceil(b) >= ceil(a + b)); and tasks of one class differ by rows only. So good
groups are runs of some order of the tasks in which classes that go well together are neighbours: `runs` finds the best ones
of one order exactly. What an order cannot say is left to `improve`. Every step is deterministic and bounded by counted work.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np

from passes.group_costs import Costs, Floats, Ints, Stack
from passes.group_fill import refit

Partition = list[list[int]]
# Gains below this part of a cost are rounding.
_LEAST = 1e-12
# More items than this are lumped before `runs`, which prices every pair of borders.
_ITEMS = 96
# Items of which local search finds the best partition exactly; each one more takes three times as long.
_LUMPS = 8
# Part of the whole cost below which filling chunks is not tried: what fits the sampled steps that closely fits no other step.
_WORTH = 3e-3
# Up to this many groups, triples of them are tried too.
_TRIPLES = 6
# More groups than this are no start for local search.
_GROUPS = 48
# Possible groups that local search may price from one start: about 0.1 s on one core at 16 shapes and 8 samples. Twice as many
# gain nothing in most mixes, and at most 0.8%.
_WORK = 20_000


@cache
def _subsets(count: int) -> list[tuple[Ints, Ints]]:
    """For each size k: the sets of k items [M], and of each set the subsets that hold its first item [M, 2^(k-1)], as bits."""
    tables = []
    for size in range(1, count + 1):
        bits = 1 << np.array(list(itertools.combinations(range(count), size)), dtype=np.int64)  # [M, k]
        others = np.arange(1 << (size - 1))[:, None] >> np.arange(size - 1) & 1  # [2^(k-1), k-1]
        tables.append((bits.sum(axis=1), bits[:, :1] + bits[:, 1:] @ others.T))
    return tables


def exactly(costs: Costs, items: Sequence[Sequence[int]]) -> Partition:
    """The best partition of items (tasks that stay together), by dynamic programming over subsets, small ones first: 3^n steps."""
    single, count = costs.join(items), len(items)
    stack = Stack(*(np.zeros_like(part[:1]) for part in (single.rows, single.own, single.held, single.sets)))
    for item in range(count):  # doubled by each item: an index is the bits of its items
        stack = Stack.over([stack, stack | single[item : item + 1]])
    alone = costs.best(stack)
    value = np.zeros(1 << count)
    choice = np.zeros(1 << count, dtype=np.int64)
    for chosen, parts in _subsets(count):
        found = alone[parts] + value[chosen[:, None] ^ parts]
        best = found.argmin(axis=1)
        every = np.arange(len(chosen))
        value[chosen], choice[chosen] = found[every, best], parts[every, best]
    groups, left = [], (1 << count) - 1
    while left:
        groups.append([task for item in range(count) if int(choice[left]) >> item & 1 for task in items[item]])
        left ^= int(choice[left])
    return groups


def runs(costs: Costs, items: Sequence[Sequence[int]]) -> Partition:
    """The best partition into runs of `items` (each a list of tasks that stay together), by dynamic programming over borders."""
    stack, count = costs.join(items), len(items)
    rows = np.concatenate([np.zeros((1, costs.samples)), stack.rows.cumsum(axis=0)])
    own = np.concatenate([np.zeros((1, len(costs.tokens))), stack.own.cumsum(axis=0)])
    begin, end = np.triu_indices(count)  # the run of items begin..end, both included
    held = np.concatenate([np.maximum.accumulate(stack.held[index:], axis=0) for index in range(count)])
    sets = np.concatenate([np.bitwise_or.accumulate(stack.sets[index:]) for index in range(count)])
    found = np.full((count, count), np.inf)
    found[begin, end] = costs.best(Stack(rows[end + 1] - rows[begin], own[end + 1] - own[begin], held, sets))
    value = np.zeros(count + 1)
    first = np.zeros(count, dtype=np.int64)
    for last in range(count):
        through = value[: last + 1] + found[: last + 1, last]
        first[last] = through.argmin()
        value[last + 1] = through[first[last]]
    groups, last = [], count - 1
    while last >= 0:
        groups.append([task for item in items[first[last] : last + 1] for task in item])
        last = int(first[last]) - 1
    return groups[::-1]


def orders(costs: Costs, tasks: Sequence[int]) -> Iterator[list[int]]:
    """Orders of tasks in which good groups are runs: by class, dear ones first or like ones side by side; within one by rows."""
    kinds = sorted({int(costs.kind[task]) for task in tasks})
    weight = costs.tasks.rows.mean(axis=1)
    rate = {kind: costs.rate(1 << kind) for kind in kinds}
    by_rate = sorted(kinds, key=lambda kind: (-rate[kind], kind))
    yield _ordered(costs, tasks, by_rate, -weight)
    yield _ordered(costs, tasks, by_rate, weight)
    if len(kinds) > _GROUPS:
        return
    chain, left = by_rate[:1], by_rate[1:]
    while left:
        # The next class is the one whose union with the last is cheapest beyond its own price.
        chain.append(min(left, key=lambda kind: (costs.rate(1 << kind | 1 << chain[-1]) - rate[kind], kind)))
        left.remove(chain[-1])
    yield _ordered(costs, tasks, chain, -weight)


def _ordered(costs: Costs, tasks: Sequence[int], kinds: Sequence[int], weight: Floats) -> list[int]:
    place = {kind: index for index, kind in enumerate(kinds)}
    return sorted(tasks, key=lambda task: (place[int(costs.kind[task])], weight[task], task))


def lumps(costs: Costs, order: Sequence[int]) -> Partition:
    """An order cut into at most about `_ITEMS` items; an item is of one class unless there are too many classes."""
    size = -(-len(order) // _ITEMS)
    border = size > 1 and len(costs.classes) > _ITEMS
    items: Partition = []
    for task in order:
        if items and len(items[-1]) < size and (border or costs.kind[items[-1][0]] == costs.kind[task]):
            items[-1].append(task)
        else:
            items.append([task])
    return items


def merged(costs: Costs, groups: Partition) -> Partition:
    """Join the pair that gains most (or loses least) until one group is left; the best partition on the way."""
    stack = costs.join(groups)
    parts = {index: [index] for index in range(len(groups))}
    value = dict(enumerate(costs.best(stack).tolist()))
    pairs: dict[tuple[int, int], float] = {}

    def price(new: list[tuple[int, int]]) -> None:
        if new:
            joint = costs.best(costs.join([parts[left] + parts[right] for left, right in new], stack))
            pairs.update((pair, joint[index] - value[pair[0]] - value[pair[1]]) for index, pair in enumerate(new))

    price(list(itertools.combinations(parts, 2)))
    total = sum(value.values())
    best, answer = total, [list(part) for part in parts.values()]
    while pairs:
        left, right = min(pairs, key=lambda pair: (pairs[pair], pair))
        if not np.isfinite(pairs[left, right]):
            break
        total += pairs[left, right]
        value[left] += value.pop(right) + pairs[left, right]
        parts[left] += parts.pop(right)
        pairs = {pair: gain for pair, gain in pairs.items() if left not in pair and right not in pair}
        price([(min(left, other), max(left, other)) for other in parts if other != left])
        if total < best:
            best, answer = total, [list(part) for part in parts.values()]
    return [[task for index in part for task in groups[index]] for part in answer]


class _Search:
    """A partition under local search, with each group's sums and cost."""

    def __init__(self, costs: Costs, groups: Partition) -> None:
        self.costs = costs
        self.until = costs.evaluated + _WORK
        self.groups = [sorted(group) for group in groups]
        self.stack = costs.join(self.groups)
        self.cost = costs.best(self.stack)
        # Sets of groups in which a step found nothing; a group that changed is another one.
        self.tried: set[tuple[str, tuple[tuple[int, ...], ...]]] = set()

    @property
    def spent(self) -> bool:
        return self.costs.evaluated >= self.until

    def gains(self, change: float) -> bool:
        return bool(change < -_LEAST * self.cost.sum())

    def replace(self, gone: Sequence[int], new: Partition) -> None:
        """Put `new` behind the others, in place of the groups `gone`."""
        kept = [index for index in range(len(self.groups)) if index not in gone]
        new = [sorted(group) for group in new if group]
        self.groups = [self.groups[index] for index in kept] + new
        stack = self.costs.join(new)
        self.stack = Stack.over([self.stack[kept], stack])
        self.cost = np.concatenate([self.cost[kept], self.costs.best(stack)])

    # --- One task at a time ------------------------------------------------------------------------------------------------------

    def moves(self) -> bool:
        """Move single tasks, the best move first, until none gains."""
        costs, alone, every = self.costs, self.costs.best(self.costs.tasks), np.arange(len(self.costs))
        gains = [self._joining(index) for index in range(len(self.groups))]
        leaving = [self._leaving(index) for index in range(len(self.groups))]
        moved = False
        while not self.spent:
            here = np.empty(len(costs), dtype=np.int64)
            without = np.empty(len(costs))
            for index, group in enumerate(self.groups):
                here[group], without[group] = index, leaving[index]
            table = np.stack([*gains, alone])
            table[here, every] = np.inf
            there = table.argmin(axis=0)
            gain = table[there, every] + without
            task = int(gain.argmin())
            if not self.gains(gain[task]):
                break
            source, target = int(here[task]), int(there[task])
            joined = self.groups[target] if target < len(self.groups) else []
            gone = [source, target]
            kept = [index for index in range(len(self.groups)) if index not in gone]
            self.replace(gone, [[other for other in self.groups[source] if other != task], [*joined, task]])
            fresh = range(len(kept), len(self.groups))
            gains = [gains[index] for index in kept] + [self._joining(index) for index in fresh]
            leaving = [leaving[index] for index in kept] + [self._leaving(index) for index in fresh]
            moved = True
        return moved

    def _joining(self, index: int) -> Floats:
        """[N] what a group's cost changes by with each task."""
        return self.costs.best(self.stack[index : index + 1] | self.costs.tasks) - self.cost[index]

    def _leaving(self, index: int) -> Floats:
        """[members] what a group's cost changes by without each member."""
        if len(self.groups[index]) == 1:
            return -self.cost[index : index + 1]
        return self.costs.best(self._without(index)) - self.cost[index]

    def _without(self, index: int) -> Stack:
        """[members] a group of several without each of its members."""
        group = self.stack[index]
        members = self.costs.tasks[self.groups[index]]
        # What the others hold at most: the second largest where the largest leaves.
        top = np.sort(members.held, axis=0)[-2:]
        held = np.where(members.held == top[1], top[0], top[1])
        # A member's set is the bit of its class, which leaves with the last of it.
        kinds = self.costs.kind[self.groups[index]]
        last = np.bincount(kinds)[kinds] == 1
        sets = np.where(last, group.sets ^ members.sets, group.sets)
        return Stack(group.rows - members.rows, group.own - members.own, held, sets)

    # --- Larger steps: each says whether it gained -------------------------------------------------------------------------------

    def joins(self) -> bool:
        """The two groups that gain most by it become one."""
        right, left = np.tril_indices(len(self.groups), -1)
        if not len(left):
            return False
        gain = self.costs.best(self.stack[left] | self.stack[right]) - self.cost[left] - self.cost[right]
        best = int(gain.argmin())
        if not self.gains(gain[best]):
            return False
        self.replace([left[best], right[best]], [self.groups[left[best]] + self.groups[right[best]]])
        return True

    def classes(self) -> bool:
        """All tasks of one class leave a group, for another or for one of their own: where that gains most."""
        cells: list[tuple[int, list[int], list[int]]] = []  # a group, its tasks of one class, its other tasks
        for index, group in enumerate(self.groups):
            kinds = self.costs.kind[group]
            if kinds.min() != kinds.max():
                members = np.array(group)
                cells += [(index, members[kinds == kind].tolist(), members[kinds != kind].tolist()) for kind in np.unique(kinds)]
        if not cells:
            return False
        home = np.array([index for index, _, _ in cells])
        part = self.costs.join([inside for _, inside, _ in cells])
        rest = self.costs.best(self.costs.join([outside for _, _, outside in cells])) - self.cost[home]
        there = [self.costs.best(self.stack[index : index + 1] | part) - self.cost[index] for index in range(len(self.groups))]
        table = np.stack([*there, self.costs.best(part)]) + rest
        table[home, np.arange(len(cells))] = np.inf
        target, cell = (int(place) for place in np.unravel_index(table.argmin(), table.shape))
        if not self.gains(table[target, cell]):
            return False
        index, inside, outside = cells[cell]
        joined = self.groups[target] if target < len(self.groups) else []
        self.replace([index, target], [outside, [*joined, *inside]])
        return True

    def swaps(self) -> bool:
        """Two tasks change places, for the first pair of groups where that gains."""
        for left, right in self._untried("swaps", (2,)):
            first, second = self.groups[left], self.groups[right]
            if min(len(first), len(second)) < 2 or len(first) * len(second) > 4096:
                continue
            out, back = np.divmod(np.arange(len(first) * len(second)), len(second))
            joined = self.costs.tasks
            one = self._without(left)[out] | joined[np.array(second)[back]]
            two = self._without(right)[back] | joined[np.array(first)[out]]
            gain = self.costs.best(one) + self.costs.best(two) - self.cost[left] - self.cost[right]
            best = int(gain.argmin())
            if self.gains(gain[best]):
                leaves, comes = first[out[best]], second[back[best]]
                stay = [task for task in first if task != leaves]
                self.replace([left, right], [[*stay, comes], [*(task for task in second if task != comes), leaves]])
                return True
        return False

    def recuts(self) -> bool:
        """One group or two are cut anew, where that gains: by `runs`, and exactly in a few lumps."""
        for chosen in self._untried("recuts", (2, 1)):
            tasks = sorted(task for index in chosen for task in self.groups[index])
            if len(tasks) > _ITEMS:
                continue
            now = self.cost[list(chosen)].sum()
            for new in self._cuts(tasks):
                if self.gains(self.costs.total(new) - now):
                    self.replace(chosen, new)
                    return True
        return False

    def refits(self) -> bool:
        """One group, two or three of few become two whose chunks are full, where that gains more than a little."""
        for chosen in self._untried("refits", (2, 1, 3) if len(self.groups) <= _TRIPLES else (2, 1)):
            tasks = sorted(task for index in chosen for task in self.groups[index])
            now = self.cost[list(chosen)].sum()
            for new in refit(self.costs, tasks, now - _WORTH * self.cost.sum()):
                if self.gains(self.costs.total(new) - now):
                    self.replace(chosen, new)
                    return True
        return False

    def _cuts(self, tasks: list[int]) -> Iterator[Partition]:
        for order in orders(self.costs, tasks):
            yield runs(self.costs, [[task] for task in order])
        weight = self.costs.tasks.rows.sum(axis=1)
        kinds = self.costs.kind[tasks]
        items = [
            sorted((task for task in tasks if self.costs.kind[task] == kind), key=lambda task: weight[task])
            for kind in np.unique(kinds)
        ]
        # By class; then the heaviest item of several tasks in two like halves, until there are enough.
        while len(items) < _LUMPS and (several := [item for item in items if len(item) > 1]):
            heaviest = max(several, key=lambda item: weight[item].sum())
            items.remove(heaviest)
            items += [heaviest[::2], heaviest[1::2]]
        if len(items) <= _LUMPS:
            yield exactly(self.costs, items)

    def _untried(self, step: str, sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
        """Sets of so many groups that this step has not seen as they are now."""
        for chosen in itertools.chain(*(itertools.combinations(range(len(self.groups)), size) for size in sizes)):
            if self.spent:
                return
            key = step, tuple(tuple(self.groups[index]) for index in chosen)
            if key not in self.tried:
                self.tried.add(key)
                yield chosen


def improve(costs: Costs, groups: Partition, *, fill: bool) -> Partition:
    """Local search: single moves while they gain, then the larger steps, until none gains or the work is spent."""
    search = _Search(costs, groups)
    steps = [search.moves, search.joins, search.classes, search.swaps, search.recuts]
    if fill:
        steps.append(search.refits)
    while not search.spent and any(step() for step in steps):
        pass
    return search.groups


def searched(costs: Costs) -> Partition:
    """The best of many starts, each improved; never worse than all fused or all alone."""
    everyone = list(range(len(costs)))
    alone = [[task] for task in everyone]
    by_class = [[task for task in everyone if costs.kind[task] == kind] for kind in range(len(costs.classes))]
    starts = [[everyone], alone]
    for order in orders(costs, everyone):
        starts.append(runs(costs, lumps(costs, order)))
    if len(by_class) <= _GROUPS:
        starts.append(by_class)
        if np.isfinite(costs.total(by_class)):
            starts.append(merged(costs, by_class))
    starts.sort(key=costs.total)  # stable: equal ones in the order above
    found = [start for start in starts if len(start) <= _GROUPS and np.isfinite(costs.total(start))][:2]
    best = min([*(improve(costs, start, fill=False) for start in found), *starts], key=costs.total)
    # The dearest step is for the best alone.
    return improve(costs, best, fill=True) if len(best) <= _GROUPS else best
