"""Region sources load as modules, and references say what they name."""

from __future__ import annotations

import traceback

import pytest

from runtime.region import RegionSpec, TemplateSpec, gradient_name, load_source, value_of

SOURCE = '''"""A region."""

import operator


def call(args):
    x, = args
    args.clear()
    return (operator.add(x, 1),)
'''


def test_a_source_loads_as_a_module_of_its_own() -> None:
    namespace = load_source(SOURCE, "<muxcompile embed.forward>")
    args = [41]
    assert namespace["call"](args) == (42,)
    assert args == []
    assert namespace["__doc__"] == "A region."
    assert namespace["__name__"] == namespace["__file__"] == "<muxcompile embed.forward>"


def test_two_sources_do_not_see_each_other() -> None:
    first, second = load_source("value = 1\n", "<one>"), load_source("value = 2\n", "<two>")
    assert (first["value"], second["value"]) == (1, 2)


def test_a_traceback_shows_the_line_of_the_source() -> None:
    call = load_source(SOURCE, "<muxcompile embed.forward>")["call"]
    with pytest.raises(TypeError) as caught:
        call(["text"])
    text = "".join(traceback.format_exception(caught.value))
    assert 'File "<muxcompile embed.forward>", line 9, in call' in text
    assert "return (operator.add(x, 1),)" in text


def test_a_source_that_is_loaded_again_shows_its_new_lines() -> None:
    load_source("def call(args):\n    return old\n", "<again>")
    call = load_source("def call(args):\n    return new\n", "<again>")["call"]
    with pytest.raises(NameError) as caught:
        call([])
    assert "return new" in "".join(traceback.format_exception(caught.value))


def test_a_source_that_is_no_python_is_an_error_that_names_it() -> None:
    with pytest.raises(SyntaxError) as caught:
        load_source("def call(args:\n", "<torn>")
    assert caught.value.filename == "<torn>"


@pytest.mark.parametrize(
    ("reference", "value"),
    [
        ("value:model.layers.0/0", "model.layers.0/0"),
        ("value:a:b", "a:b"),
        ("weight:lm_head.weight", None),
        ("table:q_proj.r8.A", None),
        ("route:alice+bob", None),
        ("route:", None),
        ("chunk:input_ids", None),
    ],
)
def test_a_reference_names_a_value_or_none(reference: str, value: str | None) -> None:
    assert value_of(reference) == value


def test_a_gradient_is_named_by_value_and_reader() -> None:
    assert gradient_name("embed/0", "model.layers.1") == "d.embed/0@model.layers.1"


def test_specs_are_values() -> None:
    first = RegionSpec("a", "t", ("value:x",), ("a/0",))
    assert first == RegionSpec("a", "t", ("value:x",), ("a/0",))
    assert hash(first) == hash(RegionSpec("a", "t", ("value:x",), ("a/0",)))
    with pytest.raises(AttributeError):
        first.name = "b"  # type: ignore[misc]
    assert TemplateSpec("t", 1, 0, None, ()) != TemplateSpec("t", 1, 0, (), ())
