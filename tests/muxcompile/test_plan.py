"""Plans as their readers see them."""

from __future__ import annotations

from typing import Any

import pytest
from peft import LoraConfig

import muxcompile

from .peft_reference import llama

pytestmark = pytest.mark.usefixtures("one_capture")


def compiled(backbone: Any, **options: Any) -> Any:
    tasks = {"ann": LoraConfig(r=4, target_modules=["q_proj"]), "ben": LoraConfig(r=4, target_modules=["v_proj"])}
    return muxcompile.compile(backbone, tasks, muxcompile.Options(**options)).plan


@pytest.fixture(scope="module")
def backbone() -> Any:
    return llama(3)


def test_a_plan_differs_in_nothing_from_that_of_the_same_compilation(backbone: Any) -> None:
    assert compiled(backbone, chunk_tokens=64).diff(compiled(backbone, chunk_tokens=64)) == ""


def test_a_difference_is_what_the_other_plan_decides_otherwise(backbone: Any) -> None:
    one, other = compiled(backbone, chunk_tokens=64), compiled(backbone, chunk_tokens=96, groups=(("ann",), ("ben",)))
    lines = one.diff(other).splitlines()
    headings = [line for line in lines if not line.startswith(" ")]
    assert headings == ["groups", "choices", "estimates", "passes", "regions", "program"]
    assert lines[1:4] == ["  -group 0: ann, ben", "  +group 0: ann", "  +group 1: ben"]
    assert "  -chunk tokens: 64" in lines
    assert "  +group 1: chunk tokens: 96" in lines
    assert one.diff(other) != other.diff(one)


@pytest.mark.parametrize(
    ("lengths", "reason"),
    [([], "one or more"), ([0], "at least 1"), ([3.0], "at least 1"), ([True], "at least 1"), ("12", "sequence"), (7, "sequence")],
)
def test_lengths_that_are_none_are_refused(lengths: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=f"task 'ann': lengths.*{reason}"):
        muxcompile.Task("ann", LoraConfig(), lengths=lengths)


def test_lengths_keep_to_the_longest_that_is_allowed() -> None:
    with pytest.raises(ValueError, match="lengths holds 9, more than max_length=8"):
        muxcompile.Task("ann", LoraConfig(), lengths=[3, 9], max_length=8)
    given = [5, 6]
    task = muxcompile.Task("ann", LoraConfig(), lengths=given)
    given.append(7)
    assert task.lengths == (5, 6)
