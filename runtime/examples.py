"""Examples: what a user hands to a step, checked before anything is touched."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IGNORE = -100
_COLUMNS = ("input_ids", "labels", "attention_mask", "position_ids")
Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence: ids and labels [L]; labels are aligned with the ids, -100 where there is no loss.

    The first `virtual` ids are placeholders of rows that a task learns; position ids begin with `offset`. `labelled`: tokens in the
    loss, labels[1:] that are not -100 (the first token is predicted by nothing); counted here if it is not given.
    """

    input_ids: Ids
    labels: Ids
    virtual: int = 0
    offset: int = 0
    labelled: int = -1

    def __post_init__(self) -> None:
        if self.labelled < 0:
            object.__setattr__(self, "labelled", int(np.count_nonzero(self.labels[1:] != IGNORE)))

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def prompted(self, virtual: int, offset: int) -> Example:
        """The same behind `virtual` placeholders without loss. As in PEFT the first real token is then predicted as well."""
        if not virtual and not offset:
            return self
        ids, labels = np.pad(self.input_ids, (virtual, 0)), np.pad(self.labels, (virtual, 0), constant_values=IGNORE)
        return Example(ids, labels, virtual, offset)


@dataclass(frozen=True, slots=True)
class Limits:
    """What an example must keep to. `longest` and the field that sets it by task; `vocab` and `labels`: ids below these."""

    vocab: int
    labels: int
    longest: Mapping[str, tuple[int, str]]


def read_batches(batches: Any, limits: Limits) -> dict[str, list[Example]]:
    """Check every example of every task.

    Args:
        batches: {task: examples}; examples are dicts with `input_ids` and `labels` (lists or 1-D tensors, unpadded), or one HF
            batch (2-D `input_ids`, `labels` and optionally `attention_mask`, whose padding is removed here, and `position_ids`:
            where they begin again at 0, another example begins, as in padding-free batches).

    Raises:
        ValueError: naming the task, the example and the field.
    """
    if not isinstance(batches, Mapping) or not batches:
        raise ValueError("batches is empty: give {task name: examples} for at least one task")
    found: dict[str, list[Example]] = {}
    for task, given in batches.items():
        if task not in limits.longest:
            raise ValueError(f"task {task!r}: there is no such task (tasks: {', '.join(limits.longest) or 'none'})")
        if not isinstance(given, Mapping | Iterable) or isinstance(given, Tensor):
            raise ValueError(f"task {task!r}: its examples must be a list of dicts or one batch, got {type(given).__name__}")
        examples = _from_batch(task, given) if isinstance(given, Mapping) else list(given)
        if not examples:
            raise ValueError(f"task {task!r}: its list of examples is empty")
        columns = _columns(examples, limits.longest[task][0])
        if columns is None:
            read = (
                _read(f"task {task!r}: example {index}", example, *limits.longest[task]) for index, example in enumerate(examples)
            )
            ids, labels = map(list, zip(*read, strict=True))
            columns = np.concatenate(ids), np.concatenate(labels), [len(own) for own in ids]
        _check_ids(task, *columns, limits)
        found[task] = _examples(*columns)
    return found


def _from_batch(task: str, batch: Any) -> list[dict[str, Any]]:
    """Rows of a padded batch, without their padding; a row of several sequences is cut where its positions begin again."""
    columns = dict(batch)
    if unknown := sorted(str(name) for name in columns if name not in _COLUMNS):
        raise ValueError(f"task {task!r}: its batch has the unknown column {unknown[0]!r} (known: {', '.join(_COLUMNS)})")
    ids = _column(task, columns, "input_ids")
    labels = _column(task, columns, "labels") if "labels" in columns else None
    mask = (
        _column(task, columns, "attention_mask").bool() if "attention_mask" in columns else torch.ones_like(ids, dtype=torch.bool)
    )
    if labels is None:
        raise ValueError(f"task {task!r}: its batch has no labels")
    positions = _column(task, columns, "position_ids") if "position_ids" in columns else None
    for name, column in (("labels", labels), ("attention_mask", mask), ("position_ids", positions)):
        if column is not None and column.shape != ids.shape:
            raise ValueError(f"task {task!r}: {name} has shape {tuple(column.shape)}, input_ids {tuple(ids.shape)}")
    # Padding is cut off; a hole inside a row would silently join what it separates.
    rows: list[dict[str, Any]] = []
    for index in range(ids.shape[0]):
        kept = mask[index].nonzero().flatten()
        if len(kept) and int(kept[-1] - kept[0]) + 1 != len(kept):
            raise ValueError(f"task {task!r}: example {index}: attention_mask has a hole")
        starts = [] if positions is None else _starts(f"task {task!r}: example {index}", positions[index][mask[index]])
        parts = (own[index][mask[index]].tensor_split(starts) for own in (ids, labels))
        rows += [{"input_ids": own, "labels": targets} for own, targets in zip(*parts, strict=True)]
    return rows


def _starts(where: str, positions: Tensor) -> list[int]:
    """Where another sequence begins in a row, behind its first."""
    found = positions.numpy()
    # Chunks count from 0 in each sequence: no other numbers would be computed with.
    follows = np.concatenate(([0], found[:-1] + 1))
    wrong = np.flatnonzero((found != 0) & (found != follows))
    if len(wrong):
        raise ValueError(
            f"{where}: position_ids holds {found[wrong[0]]} at its token {wrong[0]}: they must count from 0, one by one, and begin "
            "again at 0 where another sequence begins"
        )
    return [int(place) for place in np.flatnonzero(found == 0) if place]


def _column(task: str, columns: Mapping[str, Any], name: str) -> Tensor:
    if name not in columns:
        raise ValueError(f"task {task!r}: its batch has no {name}")
    try:
        column = torch.as_tensor(columns[name])
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"task {task!r}: {name} is not a rectangular batch of integers: {error}") from None
    if column.dim() == 1:
        column = column[None]
    if column.dim() != 2:
        raise ValueError(f"task {task!r}: {name} must be [batch, length], got {tuple(column.shape)}")
    return column.cpu()


def _columns(examples: Sequence[Any], longest: int) -> tuple[Ids, Ids, list[int]] | None:
    """Ids and labels of all examples, one behind another, and their lengths, read at once: a step may have hundreds, and each call
    takes microseconds. None where one is no plain lists and is to be looked at more closely.
    """
    for own in examples:
        if type(own) is not dict or own.keys() != {"input_ids", "labels"}:
            return None
        ids, labels = own["input_ids"], own["labels"]
        plain = type(ids) is list and type(labels) is list and 0 < len(ids) == len(labels) <= longest
        if not plain or type(ids[0]) is not int or type(labels[0]) is not int:
            return None
    found = []
    for name in ("input_ids", "labels"):
        whole = array("q")  # less than half the time that numpy takes for lists
        try:
            for own in examples:
                whole.fromlist(own[name])
        except (TypeError, OverflowError):
            return None
        found.append(np.frombuffer(whole, dtype=np.int64))
    return found[0], found[1], [len(own["input_ids"]) for own in examples]


def _examples(ids: Ids, labels: Ids, lengths: Sequence[int]) -> list[Example]:
    borders = [0, *itertools.accumulate(lengths)]
    counted = labels != IGNORE
    counted[borders[:-1]] = False
    labelled = np.add.reduceat(counted, borders[:-1], dtype=np.int64).tolist()
    return [
        Example(ids[start:stop], labels[start:stop], labelled=count)
        for start, stop, count in zip(borders, borders[1:], labelled, strict=False)
    ]


def _read(where: str, example: Any, longest: int, set_by: str) -> tuple[Ids, Ids]:
    if not isinstance(example, Mapping):
        raise ValueError(f"{where}: must be a dict with input_ids and labels, got {type(example).__name__}")
    unknown = set(example) - {"input_ids", "labels", "attention_mask"}
    if unknown:
        raise ValueError(f"{where}: has the unknown field {sorted(unknown)[0]!r}")
    ids, labels = _integers(where, "input_ids", example), _integers(where, "labels", example)
    if "attention_mask" in example:
        mask = _integers(where, "attention_mask", example)
        if len(mask) != len(ids) or not bool((mask == 1).all()):
            raise ValueError(f"{where}: attention_mask must be all ones in an unpadded example; give padded ones as one batch")
    if len(ids) == 0:
        raise ValueError(f"{where}: input_ids is empty")
    if len(labels) != len(ids):
        raise ValueError(f"{where}: labels has {len(labels)} entries, input_ids {len(ids)}")
    if len(ids) > longest:
        raise ValueError(f"{where}: input_ids has {len(ids)} tokens, more than {set_by}={longest}")
    return ids, labels


def _check_ids(task: str, ids: Ids, labels: Ids, lengths: Sequence[int], limits: Limits) -> None:
    wrong = (ids < 0) | (ids >= limits.vocab), ((labels < 0) & (labels != IGNORE)) | (labels >= limits.labels)
    if not wrong[0].any() and not wrong[1].any():
        return
    ends = np.cumsum(lengths)
    place = int(np.flatnonzero(wrong[0] | wrong[1])[0])
    where = f"task {task!r}: example {int(np.searchsorted(ends, place, side='right'))}"
    if wrong[0][place]:
        raise ValueError(f"{where}: input_ids holds {ids[place]}, outside the vocabulary 0..{limits.vocab - 1}")
    raise ValueError(f"{where}: labels holds {labels[place]}, neither -100 nor in the vocabulary 0..{limits.labels - 1}")


def _integers(where: str, field: str, example: Mapping[str, Any]) -> Ids:
    if field not in example:
        raise ValueError(f"{where}: has no {field}")
    value = example[field]
    if not isinstance(value, Tensor | Sequence) or isinstance(value, str | bytes):
        raise ValueError(f"{where}: {field} must be a list or tensor of integers, got {type(value).__name__}")
    try:
        array = value.cpu().numpy() if isinstance(value, Tensor) else np.array(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(f"{where}: {field} must be a flat list of integers") from None
    if array.size == 0:
        return np.zeros(0, dtype=np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"{where}: {field} must be a flat list of integers")
    return array.astype(np.int64, copy=False)
