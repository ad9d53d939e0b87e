"""Which lowering an adapted linear gets, and that the choice follows from its own shape alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codegen import costs, launches, lower
from codegen.layout import Bank, Layout
from codegen.lower import FORMS, Forms, Target, explain, forms_of

H200 = Target("NVIDIA H200", True)
UNKNOWN = Target("a GPU nobody measured", True)
OLD = Target("a GPU nobody measured", False)


def layout(
    features: int = 4096,
    outputs: tuple[int, ...] = (4096, 1024, 1024),
    banks: tuple[Bank, ...] = (Bank(16, (0, 1, 2), False),),
    tokens: int = 8192,
    dtype: str = "bfloat16",
) -> Layout:
    return Layout(tokens, 128, dtype, features, outputs, banks)


@given(st.lists(st.sampled_from(FORMS), min_size=1, max_size=4), st.sampled_from(FORMS))
def test_forms_print_as_text_that_parses_back(y: list[str], dx: str) -> None:
    forms = Forms(tuple(y), dx)
    assert Forms.parse(str(forms)) == forms


@pytest.mark.parametrize("text", ["fused", "y=fused", "y=fused dx=", "y=fused dx=quick", "y= dx=fused", "dx=fused y=fused z=fused"])
def test_a_text_that_is_no_form_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"linears: forms="):
        Forms.parse(text)


@pytest.mark.parametrize("target", [H200, UNKNOWN, OLD], ids=["measured", "roofline", "without TMA"])
def test_neighbours_and_ranks_do_not_change_a_choice(target: Target) -> None:
    alone = explain(layout(), (False,) * 3, target)
    crowd = (Bank(8, (0,), False), Bank(256, (0, 1, 2), True), Bank(64, (1,), False))
    assert explain(layout(banks=crowd), (False,) * 3, target) == alone
    assert explain(layout(banks=()), (False,) * 3, target) == alone


def test_the_cheapest_measured_lowering_is_taken_and_the_others_say_what_they_cost() -> None:
    for choice, (product, output) in zip(
        explain(layout(), (False,) * 3, H200), (("y", 4096), ("y", 1024), ("y", 1024), ("dx", 4096)), strict=True
    ):
        figures = costs.table("NVIDIA H200")[costs.key(product, 8192, 4096, output, "bfloat16")]
        assert choice.form == min(figures, key=lambda form: figures[form])
        assert choice.microseconds == figures[choice.form]
        assert choice.source == "measured"
        assert set(choice.others) == set(FORMS) - {choice.form} | {"augment", "sink"}
        assert f"not augment: {lower.AUGMENT_REASON}" in str(choice)


def test_without_a_table_the_roofline_decides() -> None:
    (y, dx) = explain(layout(outputs=(14336,)), (False,), UNKNOWN)
    assert y.source == dx.source == "by the roofline"
    assert y.form in FORMS


def test_what_cannot_be_is_not_chosen_and_says_why() -> None:
    (y, _) = explain(layout(outputs=(4096,)), (True,), OLD)
    assert y.form == "epilogue"
    assert y.others["accumulate"] == lower.BIAS_REASON
    assert "compute capability" in y.others["fused"]
    (y, _) = explain(layout(features=40, outputs=(24,)), (False,), UNKNOWN)
    assert y.others["fused"] == lower.TMA_REASON
    (y, _) = explain(layout(dtype="float32", outputs=(4096,)), (False,), UNKNOWN)
    assert "float32" in y.others["fused"]


def test_a_chunk_size_between_measured_ones_takes_the_nearest() -> None:
    table = costs.table("NVIDIA H200")
    assert costs.nearest(table, "y", 7000, 4096, 4096, "bfloat16") == table[costs.key("y", 8192, 4096, 4096, "bfloat16")]
    assert costs.nearest(table, "y", 512, 4096, 4096, "bfloat16") == table[costs.key("y", 1024, 4096, 4096, "bfloat16")]
    assert costs.nearest(table, "y", 256, 4096, 4096, "bfloat16") is None
    assert costs.nearest(table, "y", 8192, 4096, 4000, "bfloat16") is None


def test_a_users_own_table_goes_before_the_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own: dict[str, Any] = {"sites": {"y bfloat16 T8192 4096->4096": {"accumulate": 1.0, "epilogue": 2.0, "fused": 3.0}}}
    (tmp_path / costs.file_name("NVIDIA H200")).write_text(json.dumps(own))
    monkeypatch.setattr(costs, "OWN", tmp_path)
    costs.table.cache_clear()
    try:
        assert costs.table("NVIDIA H200") == own["sites"]
    finally:
        costs.table.cache_clear()


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"sites": {"a": {"fused": "fast"}}}'])
def test_a_damaged_table_is_named(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / costs.file_name("broken")
    path.write_text(text)
    monkeypatch.setattr(costs, "OWN", tmp_path)
    with pytest.raises(ValueError, match=str(path)):
        costs.table("broken")


def test_given_forms_are_checked_against_the_linears() -> None:
    assert forms_of("y=fused,epilogue,accumulate dx=fused", layout(), (False,) * 3).y == ("fused", "epilogue", "accumulate")
    with pytest.raises(ValueError, match="has 1 outputs, there are 3 linears"):
        forms_of("y=fused dx=fused", layout(), (False,) * 3)
    with pytest.raises(ValueError, match="bias cannot be accumulate"):
        forms_of("y=accumulate dx=fused", layout(outputs=(4096,)), (True,))
    with pytest.raises(ValueError, match="40 to 24 features cannot be fused"):
        forms_of("y=fused dx=epilogue", layout(features=40, outputs=(24,)), (False,))


def test_the_number_of_kernels_does_not_grow_with_adapters_or_banks() -> None:
    few = layout(banks=(Bank(16, (0, 1, 2), False),))
    many = layout(banks=tuple(Bank(rank, (0, 1, 2), False) for rank in (8, 16, 32, 64, 128, 256)))
    forms = Forms(("accumulate", "epilogue", "epilogue"), "epilogue")
    for own in (few, many):
        assert len(list(launches.forward(own, forms, (False,) * 3, (False,) * 3))) == 3
        assert len(list(launches.backward(own, forms, 99, False, True))) == 3
