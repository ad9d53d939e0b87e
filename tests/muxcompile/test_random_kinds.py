"""Any mix of kinds, of data and of neighbours: a task gets what it would have got alone, whether layers run again or are kept."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from .kinds import FAMILIES, compiled
from .peft_reference import Example, Tensors, equal, example, loss_and_gradients, peft_model, shake, wrong_gradients, wrong_loss

pytestmark = pytest.mark.usefixtures("one_capture")


@dataclass(frozen=True)
class Pool:
    """Every task of a family in one model, and what each starts from."""

    model: Any
    weights: dict[str, Tensors]


@functools.cache
def pool(name: str, gradient_checkpointing: bool) -> Pool:
    family = FAMILIES[name]
    model = compiled(family, FAMILIES[name].backbone, gradient_checkpointing=gradient_checkpointing)
    return Pool(model, {own: shake(model, own, seed) for seed, own in enumerate(family.adapters)})


@functools.cache
def alone(name: str, own: str) -> Any:
    return peft_model(FAMILIES[name].backbone, FAMILIES[name].adapters[own], pool(name, False).weights[own])


@dataclass(frozen=True)
class Sequence:
    length: int
    labelled: float
    seed: int

    def example(self) -> Example:
        return example(torch.Generator().manual_seed(self.seed), self.length, self.labelled)


# One labelled token at least in each: what a task without any does is test_random_mixes.py's.
sequences = st.builds(Sequence, st.integers(3, 40), st.sampled_from([0.3, 1.0]), st.integers(0, 10**6)).map(Sequence.example)
data = st.lists(sequences.filter(lambda one: any(label != -100 for label in one["labels"][1:])), min_size=1, max_size=3)


def mixes(name: str, most: int) -> st.SearchStrategy[dict[str, list[Example]]]:
    return st.dictionaries(st.sampled_from(sorted(FAMILIES[name].adapters)), data, min_size=2, max_size=most)


def gradients(model: Any, batch: dict[str, list[Example]]) -> tuple[dict[str, float], dict[str, Tensors]]:
    losses = model.forward_backward(batch).losses
    found = {own: model.gradients(own) for own in batch}
    for own in batch:
        model.state.clear_gradients(own)
    return {own: float(losses[own]) for own in batch}, found


# By module: one family's tests stand together, so that a worker compiles few pools.
of_each_family = pytest.mark.parametrize("name", FAMILIES, scope="module")


@settings(max_examples=6)
@of_each_family
@given(drawn=st.data())
def test_every_kind_of_a_random_mix_has_pefts_loss_and_gradients(name: str, drawn: st.DataObject) -> None:
    batch = drawn.draw(mixes(name, 8))
    kept = gradients(pool(name, False).model, batch)
    for own, given_examples in batch.items():
        loss, wanted = loss_and_gradients(alone(name, own), given_examples)
        assert not wrong_loss(kept[0][own], loss) + wrong_gradients(kept[1][own], wanted), own


@settings(max_examples=6)
@of_each_family
@given(drawn=st.data())
def test_layers_that_run_again_give_every_kind_the_same_bits(name: str, drawn: st.DataObject) -> None:
    batch = drawn.draw(mixes(name, 12))
    kept, again = (gradients(pool(name, checkpointed).model, batch) for checkpointed in (False, True))
    assert kept[0] == again[0]
    for own in batch:
        assert equal(kept[1][own], again[1][own]), own


@of_each_family
def test_a_layer_that_runs_again_keeps_its_input_alone(name: str) -> None:
    saved = [
        pool(name, checkpointed).model.plan.estimates["bytes that a chunk's layers save for the backward"]
        for checkpointed in (False, True)
    ]
    assert saved[1] == 0 < saved[0]


@settings(max_examples=3)
@of_each_family
@given(drawn=st.data())
def test_a_mix_compiled_by_itself_has_the_bits_of_all_together(name: str, drawn: st.DataObject) -> None:
    batch = drawn.draw(mixes(name, 4))
    whole = pool(name, False)
    few = compiled(FAMILIES[name], FAMILIES[name].backbone, batch.keys())
    for own in batch:
        for key, value in whole.weights[own].items():
            few.state.write(own, key, value)
    ours, theirs = gradients(few, batch), gradients(whole.model, batch)
    assert ours[0] == theirs[0]
    for own in batch:
        assert equal(ours[1][own], theirs[1][own]), own
