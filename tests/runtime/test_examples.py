"""Examples are taken in every shape that users have, and refused with the task, the example and the field."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.examples import IGNORE, Example, Limits, read_batches

LIMITS = Limits(vocab=100, labels=90, longest={"alice": (8, "max_length"), "bob": (20, "the backbone's limit")})


def read(given: Any, task: str = "alice") -> list[Example]:
    (found,) = read_batches({task: given}, LIMITS).values()
    return found


def plain(examples: list[Example]) -> list[tuple[list[int], list[int]]]:
    return [(example.input_ids.tolist(), example.labels.tolist()) for example in examples]


# --- what is taken ----------------------------------------------------------------------------------------------------

IDS, LABELS = [5, 6, 7], [-100, 6, 7]


@pytest.mark.parametrize(
    "example",
    [
        {"input_ids": IDS, "labels": LABELS},
        {"input_ids": tuple(IDS), "labels": tuple(LABELS)},
        {"input_ids": torch.tensor(IDS), "labels": torch.tensor(LABELS)},
        {"input_ids": torch.tensor(IDS, dtype=torch.int32), "labels": torch.tensor(LABELS, dtype=torch.int16)},
        {"input_ids": [np.int64(i) for i in IDS], "labels": LABELS},
        {"input_ids": IDS, "labels": LABELS, "attention_mask": [1, 1, 1]},
    ],
    ids=["lists", "tuples", "tensors", "narrow tensors", "numpy scalars", "with a mask of ones"],
)
def test_an_unpadded_example_is_read(example: Any) -> None:
    (found,) = read([example])
    assert plain([found]) == [(IDS, LABELS)]
    assert found.input_ids.dtype == found.labels.dtype == np.int64
    assert len(found) == 3


@given(st.lists(st.lists(st.one_of(st.integers(-101, 101), st.booleans(), st.floats(0, 1)), max_size=9), min_size=1, max_size=4))
def test_lists_are_read_together_as_one_by_one(rows: list[list[Any]]) -> None:
    """As tuples each is looked at by itself."""

    def outcome(kind: Any) -> Any:
        try:
            found = read([{"input_ids": kind(row), "labels": kind(row)} for row in rows])
        except ValueError as error:
            return str(error)
        return [(*pair, own.labelled) for pair, own in zip(plain(found), found, strict=True)]

    assert outcome(list) == outcome(tuple)


@pytest.mark.parametrize("container", [list, tuple, iter], ids=["list", "tuple", "iterator"])
def test_examples_come_in_any_iterable(container: Any) -> None:
    assert len(read(container([{"input_ids": IDS, "labels": LABELS}] * 3))) == 3


def test_the_last_token_counts_and_the_first_does_not() -> None:
    assert [example.labelled for example in read([
        {"input_ids": [1, 2, 3], "labels": [1, 2, 3]},
        {"input_ids": [1, 2, 3], "labels": [1, -100, 3]},
        {"input_ids": [1, 2, 3], "labels": [1, -100, -100]},
        {"input_ids": [1], "labels": [1]},
    ])] == [2, 1, 0, 0]  # fmt: skip


@st.composite
def padded(draw: st.DrawFn) -> tuple[list[tuple[list[int], list[int]]], dict[str, torch.Tensor]]:
    """Examples, and the batch that a collator makes of them, padded left or right."""
    token = st.integers(0, 89)
    examples = draw(
        st.lists(st.lists(st.tuples(token, st.one_of(st.just(IGNORE), token)), min_size=1, max_size=8), min_size=1, max_size=4)
    )
    width = max(len(example) for example in examples) + draw(st.integers(0, 3))
    left, pad = draw(st.booleans()), draw(token)
    columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "attention_mask": []}
    for example in examples:
        filler = width - len(example)
        for name, values, fill in (
            ("input_ids", [i for i, _ in example], pad),
            ("labels", [label for _, label in example], IGNORE),
            ("attention_mask", [1] * len(example), 0),
        ):  # fmt: skip
            columns[name].append([fill] * filler + values if left else values + [fill] * filler)
    return [([i for i, _ in example], [label for _, label in example]) for example in examples], {
        name: torch.tensor(rows) for name, rows in columns.items()
    }


@given(case=padded())
def test_the_padding_of_a_batch_is_removed_on_either_side(case: tuple[list[Any], dict[str, torch.Tensor]]) -> None:
    examples, batch = case
    assert plain(read(batch)) == examples


@given(case=padded())
def test_a_batch_of_lists_or_arrays_is_read_like_one_of_tensors(case: tuple[list[Any], dict[str, torch.Tensor]]) -> None:
    examples, batch = case
    assert plain(read({name: column.tolist() for name, column in batch.items()})) == examples
    assert plain(read({name: column.numpy() for name, column in batch.items()})) == examples


def test_a_batch_encoding_is_a_batch() -> None:
    from transformers import BatchEncoding

    batch = BatchEncoding({"input_ids": [[9, 5, 6]], "attention_mask": [[0, 1, 1]], "labels": [[-100, 5, 6]]}, tensor_type="pt")
    assert plain(read(batch)) == [([5, 6], [5, 6])]


def test_the_batch_of_a_collator_is_read() -> None:
    from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast

    class Padding(PreTrainedTokenizerFast):
        """A tokenizer that only pads."""

        def __init__(self) -> None:
            from tokenizers import Tokenizer, models

            super().__init__(tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>")), pad_token="<pad>")

    rows = [{"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [7, 8, 9], "labels": [-100, 8, 9]}]
    batch = DataCollatorForSeq2Seq(Padding())([dict(row) for row in rows])
    assert plain(read(batch)) == [([5, 6], [5, 6]), ([7, 8, 9], [-100, 8, 9])]


def test_a_batch_without_a_mask_is_unpadded() -> None:
    assert plain(read({"input_ids": [[5, 6], [7, 8]], "labels": [[5, 6], [7, 8]]})) == [([5, 6], [5, 6]), ([7, 8], [7, 8])]


def test_one_row_is_a_batch_of_one() -> None:
    assert plain(read({"input_ids": torch.tensor(IDS), "labels": torch.tensor(LABELS)})) == [(IDS, LABELS)]


@given(case=padded())
def test_a_row_is_cut_where_its_positions_begin_again(case: tuple[list[Any], dict[str, torch.Tensor]]) -> None:
    examples, padded_batch = case
    flat = {
        "input_ids": [[i for ids, _ in examples for i in ids]],
        "labels": [[label for _, labels in examples for label in labels]],
        "position_ids": [[place for ids, _ in examples for place in range(len(ids))]],
    }
    assert plain(read(flat)) == examples
    # As models count them themselves, behind padding on either side.
    counted = (padded_batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    assert plain(read(padded_batch | {"position_ids": counted})) == examples


def test_the_batch_of_a_collator_that_flattens_is_its_examples() -> None:
    from transformers import DataCollatorWithFlattening

    rows = [{"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [7, 8, 9], "labels": [-100, 8, 9]}]
    found = read(DataCollatorWithFlattening(return_tensors="pt")([dict(row) for row in rows]))
    assert [own.input_ids.tolist() for own in found] == [[5, 6], [7, 8, 9]]
    assert [own.labels[1:].tolist() for own in found] == [[6], [8, 9]], "the first token is predicted by nothing"


def test_each_task_has_its_own_limit() -> None:
    long = {"input_ids": list(range(20)), "labels": list(range(20))}
    assert len(read([long], "bob")[0]) == 20
    with pytest.raises(ValueError, match=r"^task 'alice': example 0: input_ids has 20 tokens, more than max_length=8$"):
        read([long], "alice")


def test_the_last_id_and_label_of_the_vocabulary_are_in_it() -> None:
    assert plain(read([{"input_ids": [0, 99], "labels": [0, 89]}])) == [([0, 99], [0, 89])]


# --- what is refused --------------------------------------------------------------------------------------------------

E0 = "task 'alice': example 0: "
OK = {"input_ids": IDS, "labels": LABELS}
MASK = E0 + "attention_mask must be all ones in an unpadded example; give padded ones as one batch"
RECTANGULAR = "task 'alice': input_ids is not a rectangular batch of integers: "


def batch(ids: Any, **others: Any) -> dict[str, Any]:
    return {"input_ids": ids, "labels": ids} | others


REFUSED: dict[str, tuple[Any, str]] = {
    "no examples": ([], "task 'alice': its list of examples is empty"),
    "an example that is no dict": ([IDS], E0 + "must be a dict with input_ids and labels, got list"),
    "a text": (["hello"], E0 + "must be a dict with input_ids and labels, got str"),
    "text for a list": ("hello", E0 + "must be a dict with input_ids and labels, got str"),
    "the second example": ([OK, {"input_ids": IDS}], "task 'alice': example 1: has no labels"),
    "no ids": ([{"labels": LABELS}], E0 + "has no input_ids"),
    "another field": ([OK | {"token_type_ids": [0, 0, 0]}], E0 + "has the unknown field 'token_type_ids'"),
    "a misspelt field": ([{"input_ids": IDS, "label": LABELS}], E0 + "has the unknown field 'label'"),
    "ids of text": ([OK | {"input_ids": "5 6 7"}], E0 + "input_ids must be a list or tensor of integers, got str"),
    "ids that are nothing": ([OK | {"input_ids": None}], E0 + "input_ids must be a list or tensor of integers, got NoneType"),
    "labels that are nothing": ([OK | {"labels": None}], E0 + "labels must be a list or tensor of integers, got NoneType"),
    "fractions": ([OK | {"input_ids": [5.0, 6.0, 7.0]}], E0 + "input_ids must be a flat list of integers"),
    "truth values": ([OK | {"labels": [True, False, True]}], E0 + "labels must be a flat list of integers"),
    "nested ids": ([OK | {"input_ids": [IDS]}], E0 + "input_ids must be a flat list of integers"),
    "ragged ids": ([OK | {"input_ids": [[5], [6, 7]]}], E0 + "input_ids must be a flat list of integers"),
    "words": ([OK | {"input_ids": ["a", "b", "c"]}], E0 + "input_ids must be a flat list of integers"),
    "a hole": ([OK | {"input_ids": [5, None, 7]}], E0 + "input_ids must be a flat list of integers"),
    "a number beyond 64 bits": ([OK | {"input_ids": [2**70, 6, 7]}], E0 + "input_ids must be a flat list of integers"),
    "a scalar": ([OK | {"input_ids": torch.tensor(5)}], E0 + "input_ids must be a flat list of integers"),
    "an empty example": ([{"input_ids": [], "labels": []}], E0 + "input_ids is empty"),
    "labels of another length": ([OK | {"labels": [6, 7]}], E0 + "labels has 2 entries, input_ids 3"),
    "padding without a batch": ([OK | {"attention_mask": [1, 1, 0]}], MASK),
    "a short mask": ([OK | {"attention_mask": [1, 1]}], MASK),
    "a long example": ([{"input_ids": [1] * 9, "labels": [1] * 9}], E0 + "input_ids has 9 tokens, more than max_length=8"),
    "an id past the vocabulary": ([OK | {"input_ids": [5, 100, 7]}], E0 + "input_ids holds 100, outside the vocabulary 0..99"),
    "a negative id": ([OK | {"input_ids": [5, -1, 7]}], E0 + "input_ids holds -1, outside the vocabulary 0..99"),
    "padding by -100": ([OK | {"input_ids": [5, -100, 7]}], E0 + "input_ids holds -100, outside the vocabulary 0..99"),
    "a label past the head": ([OK | {"labels": [5, 90, 7]}], E0 + "labels holds 90, neither -100 nor in the vocabulary 0..89"),
    "a negative label": ([OK | {"labels": [5, -1, 7]}], E0 + "labels holds -1, neither -100 nor in the vocabulary 0..89"),
    # One batch.
    "a batch without ids": ({"labels": [LABELS]}, "task 'alice': its batch has no input_ids"),
    "a batch without labels": ({"input_ids": [IDS]}, "task 'alice': its batch has no labels"),
    "an empty dict": ({}, "task 'alice': its batch has no input_ids"),
    "a ragged batch": (batch([[5], [6, 7]]), RECTANGULAR),
    "a batch of nothing": (batch(None), RECTANGULAR),
    "a batch in three dimensions": (batch([[[5]]]), "task 'alice': input_ids must be [batch, length], got (1, 1, 1)"),
    "labels of another shape": (batch([[5, 6]], labels=[[5]]), "task 'alice': labels has shape (1, 1), input_ids (1, 2)"),
    "a mask of another shape": (
        batch([[5, 6]], attention_mask=[[1]]), "task 'alice': attention_mask has shape (1, 1), input_ids (1, 2)",
    ),
    "a hole in the mask": (
        batch([[5, 6, 7]], attention_mask=[[1, 0, 1]]), "task 'alice': example 0: attention_mask has a hole",
    ),
    "a row of padding": (batch([[5, 6]], attention_mask=[[0, 0]]), E0 + "input_ids is empty"),
    "a batch of fractions": ({"input_ids": [[5.0]], "labels": [[5]]}, E0 + "input_ids must be a flat list of integers"),
    "a batch with a column that would change the loss": (
        batch([[5, 6]], token_type_ids=[[0, 0]]), "task 'alice': its batch has the unknown column 'token_type_ids'",
    ),
    "positions of another shape": (
        batch([[5, 6]], position_ids=[[0]]), "task 'alice': position_ids has shape (1, 1), input_ids (1, 2)",
    ),
    "positions that begin later": (
        batch([[5, 6]], position_ids=[[3, 4]]), E0 + "position_ids holds 3 at its token 0: they must count from 0",
    ),
    "positions with a gap": (
        batch([[5, 6], [5, 6]], position_ids=[[0, 1], [0, 2]]), "task 'alice': example 1: position_ids holds 2 at its token 1",
    ),
    "positions between two": (batch([[5, 6]], position_ids=[[0, 0.5]]), E0 + "position_ids holds 0.5 at its token 1"),
    "a batch with an id too large": (batch([[5], [100]]), "task 'alice': example 1: input_ids holds 100, outside"),
    # No examples at all.
    "nothing": (None, "task 'alice': "),
    "a number": (5, "task 'alice': "),
    "a tensor": (torch.zeros(2, 3, dtype=torch.long), "task 'alice': "),
    "an array": (np.zeros((2, 3), dtype=np.int64), "task 'alice': "),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_example_is_refused_by_task_example_and_field(name: str) -> None:
    given, message = REFUSED[name]
    with pytest.raises(ValueError, match=r"^task 'alice': ") as caught:
        read(given)
    assert str(caught.value).startswith(message)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("batches", [{}, None, [], [OK], "alice"])
def test_batches_are_a_dict_of_at_least_one_task(batches: Any) -> None:
    with pytest.raises(ValueError, match=r"^batches "):
        read_batches(batches, LIMITS)


def test_a_task_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(ValueError, match=r"^task 'carol': there is no such task \(tasks: alice, bob\)$"):
        read_batches({"carol": [OK]}, LIMITS)
    with pytest.raises(ValueError, match=r"^task 'carol': there is no such task \(tasks: none\)$"):
        read_batches({"carol": [OK]}, Limits(10, 10, {}))


def test_one_wrong_example_refuses_the_whole_call() -> None:
    with pytest.raises(ValueError, match=r"^task 'bob': example 1: "):
        read_batches({"alice": [OK], "bob": [OK, {}]}, LIMITS)
