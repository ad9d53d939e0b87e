"""Sequences longer than a chunk: the chunks of their pieces make a chain, and take turns that no chunk of whole sequences needs.

Forwards run from the first piece to the last, each handing on its keys and values; backwards from the last to the first, each
handing on the gradients of the keys and values before its own. What is handed on has names of its own, beside those of a
micro-batch's program: `kept.3` are the keys and values that attention 3 has seen so far, `d.kept.3` their gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from runtime.pack import Chunk
from runtime.program import Action, Kind, Program
from runtime.region import RegionSpec, TemplateSpec

POLICIES = ("keep", "recompute")


@dataclass(frozen=True, slots=True)
class Carried:
    """What one attention carries from piece to piece.

    `number`: its inputs are `carry:NUMBER`; `keys`, `values`: the values [T, *shape] that later pieces see; `shape`: G and D.
    """

    number: str
    keys: str
    values: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Turn:
    """A part of a program that runs over one chunk.

    Args:
        micro: the micro-batch, a pass of the chunk through the program; one of several turns is resumed by the next.
        steps: actions, each with the values nobody reads afterwards.
        before: the micro-batch that handed on the keys and values of earlier pieces; None: there are none.
        after: the micro-batch that handed on the gradients of this one's; None: nobody has seen its.
        keeps: this one's keys and values are handed on.
        pauses: another turn resumes this micro-batch.
    """

    micro: int
    chunk: Chunk
    steps: Sequence[Step]
    before: int | None = None
    after: int | None = None
    keeps: bool = False
    pauses: bool = False


Step = tuple[Action, tuple[str, ...]]


def steps(program: Program) -> list[Step]:
    return list(zip(program, program.last_reads(), strict=True))


def chains(chunks: Iterable[Chunk]) -> Iterator[list[Chunk]]:
    """Chunks that run one by one, and those of a cut sequence together.

    Raises:
        AssertionError: a sequence's pieces are not all there, or not one after another.
    """
    chain: list[Chunk] = []
    for chunk in chunks:
        piece, last = chunk.piece, chain[-1].piece if chain else None
        if last is not None:
            expected = (last.task, last.index, last.begin + last.rows, last.total)
            found = piece and (piece.task, piece.index, piece.begin, piece.total)
            assert found == expected, f"after {last} comes {piece}"
        else:
            assert piece is None or piece.begin == 0, f"a sequence begins with {piece}"
        chain.append(chunk)
        if piece is None or piece.begin + piece.rows == piece.total:
            yield chain
            chain = []
    assert not chain, f"nothing comes after {chain[-1].piece}"


def turns(chain: Sequence[Chunk], train: Sequence[Step], evaluate: Sequence[Step], *, policy: str, first: int) -> Iterator[Turn]:
    """The turns of a step over a chain; one chunk of whole sequences is a chain too.

    Args:
        chain: the chunks of a sequence's pieces, the first piece first.
        train, evaluate: the program that is to run, and the one without backward; the same one where there is none.
        policy: "keep": a chunk's forward is kept for its backward; "recompute": the first forward hands on keys and values alone,
            and a second one runs right before the backward.
        first: the number of the first micro-batch.
    """
    last = len(chain) - 1
    if train is evaluate:
        for place, chunk in enumerate(chain):
            micro = first + place
            yield Turn(micro, chunk, evaluate, before=micro - 1 if place else None, keeps=place < last)
        return
    kept = last + 1 if policy == "keep" else last
    forward = _forward(train if policy == "keep" else evaluate)
    for place, chunk in enumerate(chain[:kept]):
        micro = first + place
        yield Turn(micro, chunk, forward, before=micro - 1 if place else None, keeps=place < last, pauses=policy == "keep")
    for place in range(last, -1, -1):
        if policy == "keep":
            micro, rest, after = first + place, train[len(forward) :], first + place + 1
        else:
            micro, rest, after = first + 2 * last - place, train, first + 2 * last - place - 1
        yield Turn(micro, chain[place], rest, before=first + place - 1 if place else None, after=after if place < last else None)


def halves(program: Sequence[Step]) -> tuple[Sequence[Step], Sequence[Step]]:
    """A program up to its loss, or to its last forward and what is sent of it, and the rest."""
    last = max(index for index, (action, _) in enumerate(program) if action.kind in (Kind.LOAD, Kind.F, Kind.LOSS))
    while last + 1 < len(program) and program[last + 1][0].kind is Kind.SEND:
        last += 1
    return program[: last + 1], program[last + 1 :]


def _forward(program: Sequence[Step]) -> Sequence[Step]:
    return program[: next(index for index, (action, _) in enumerate(program) if action.kind is Kind.LOSS)]


# --- what actions take from other micro-batches and hand on ---


def carrying(action: Action, turn: Turn, region: RegionSpec, template: TemplateSpec) -> Action:
    """A region's action with what it takes from other micro-batches of its chain and hands on to them."""
    if turn.before is None and turn.after is None and not turn.keeps:
        return action
    numbers = {index: ref.removeprefix("carry:") for index, ref in enumerate(region.inputs) if ref.startswith("carry:")}
    kept = [f"kept.{number}" for number in numbers.values()]
    earlier = () if turn.before is None else tuple(f"{name}^{turn.before}" for name in kept)
    if action.kind is Kind.F:
        return replace(action, reads=(*action.reads, *earlier), writes=(*action.writes, *(kept if turn.keeps else ())))
    graded = [f"d.kept.{number}" for index, number in numbers.items() if index in template.input_grads]
    later = () if turn.after is None else tuple(f"{name}^{turn.after}" for name in graded)
    back = () if turn.before is None else graded
    return replace(action, reads=(*action.reads, *earlier, *later), writes=(*action.writes, *back))


def handed_on(values: Mapping[str, Any], micro: int) -> dict[str, Any]:
    """What a micro-batch has for others of its chain, by the names that these read."""
    return {f"{name}^{micro}": value for name, value in values.items() if name.startswith(("kept.", "d.kept.")) and "^" not in name}


def before(own: Carried, action: Action, values: Mapping[str, Any], chunk: Chunk, device: torch.device) -> Tensor:
    """[2, C, G, D]: keys and values of the earlier pieces of the chunk's first sequence."""
    name = _taken(action, f"kept.{own.number}")
    if name is None:
        return torch.empty(2, 0, *own.shape, dtype=getattr(torch, own.dtype), device=device)
    assert chunk.piece is not None
    return values[name][:, : chunk.piece.begin]


def keep(own: Carried, action: Action, values: MutableMapping[str, Any], chunk: Chunk, made: Mapping[str, Tensor]) -> None:
    """Hand on the piece's keys and values behind the earlier ones, in memory that holds those of all pieces but the last."""
    if f"kept.{own.number}" not in action.writes:
        return
    piece, name, keys = chunk.piece, _taken(action, f"kept.{own.number}"), made[own.keys]
    assert piece is not None
    # Later pieces fill their chunks: all but the last piece's rows are looked back at.
    buffer = values[name] if name else keys.new_empty(2, piece.total - keys.shape[0], *own.shape)
    for part, made_here in zip(buffer, (keys, made[own.values]), strict=True):
        part[piece.begin : piece.begin + piece.rows] = made_here[: piece.rows]
    values[f"kept.{own.number}"] = buffer


def tangent(
    own: Carried, value: str, action: Action, values: Mapping[str, Any], chunk: Chunk, tokens: int, device: torch.device
) -> Tensor:
    """[T, G, D]: the gradient of the chunk's keys or values as later pieces give it; 0 where rows are not the piece's."""
    found = torch.zeros(tokens, *own.shape, dtype=getattr(torch, own.dtype), device=device)
    name = _taken(action, f"d.kept.{own.number}")
    if name is not None:
        assert chunk.piece is not None
        begin, rows = chunk.piece.begin, chunk.piece.rows
        found[:rows] = values[name][(own.keys, own.values).index(value), begin : begin + rows]
    return found


def hand_back(own: Carried, action: Action, values: MutableMapping[str, Any], grad: Tensor) -> None:
    """Hand the gradients of the earlier pieces' keys and values back, with what still later pieces gave; float32."""
    if f"d.kept.{own.number}" not in action.writes:
        return
    name = _taken(action, f"d.kept.{own.number}")
    # Sums run from the last piece to the first, however many there are.
    values[f"d.kept.{own.number}"] = grad.float() if name is None else values[name][:, : grad.shape[1]].add_(grad)


def _taken(action: Action, name: str) -> str | None:
    return next((read for read in action.reads if read.startswith(f"{name}^")), None)
