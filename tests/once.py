"""What tests that compile the same backbones again and again have done once in a process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest


@contextmanager
def differentiated_once() -> Iterator[Callable[..., Any]]:
    """Within, what compiles calls a `differentiate` that does a body once: all follows from its structural identity.

    Tests of `differentiate` itself take it from its own module.
    """
    import muxcompile.templates
    import passes.measure
    import passes.survey
    from passes.differentiate import differentiate, trace
    from passes.loss import bind_head, differentiate_head

    traces: dict[str, Any] = {}
    templates: dict[Any, Any] = {}
    heads: dict[Any, Any] = {}

    def traced_once(body: Any) -> Any:
        if body.spec.template not in traces:
            traces[body.spec.template] = trace(body)
        return traces[body.spec.template]

    def template(
        name: str,
        body: Any,
        *,
        decompositions: Any = None,
        checkpoint: bool = False,
        traced: Any = None,
        fused: bool | None = None,
    ) -> Any:
        if decompositions is not None:  # Inductor rewrites what it is given
            return differentiate(name, body, decompositions=decompositions, checkpoint=checkpoint, fused=fused)
        key = body.spec.template, checkpoint, fused
        if key not in templates:
            templates[key] = differentiate(name, body, checkpoint=checkpoint, traced=traced_once(body), fused=fused)
        found = templates[key]
        return replace(found, spec=replace(found.spec, name=name))

    def head(body: Any, *, decompositions: Any = None, **given: Any) -> Any:
        if decompositions is not None:
            return differentiate_head(body, decompositions=decompositions, **given)
        key = body.spec.template, *sorted(given.items())
        if key not in heads:
            heads[key] = differentiate_head(body, **given)
        return bind_head(heads[key], body)

    with pytest.MonkeyPatch.context() as patch:
        for module in (muxcompile.templates, passes.survey, passes.measure):
            patch.setattr(module, "differentiate", template)
        for module in (muxcompile.templates, passes.survey):
            patch.setattr(module, "differentiate_head", head)
        patch.setattr(passes.survey, "trace", traced_once)
        yield template


def capturing_once() -> Callable[..., Any]:
    """A `capture` that exports backbones of one structure once for each size of chunk; each has a graph with its own weights."""
    from passes.capture import capture, unwrap

    graphs: dict[Any, Any] = {}

    def bound(wrapped: Any, **sizes: int) -> Any:
        model = unwrap(wrapped)
        if wrapped is not model or not hasattr(model, "config"):  # PEFT's wrapping and modules of a test's own: as they are
            return capture(wrapped, **sizes)
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        own = dict(named)
        shared = {id(value): name for name, value in reversed(named)}  # tied tensors are one
        shapes = [(name, shared[id(value)], value.shape, value.stride(), value.dtype, value.device) for name, value in named]
        modules = [(name, type(module), module.training) for name, module in model.named_modules()]
        key = str((model.config, modules, shapes, sizes))
        if key not in graphs:
            graph = capture(model, **sizes)
            # Kept without the backbone, but for what the export lifted from its code.
            graphs[key] = replace(graph, weights={name: None if name in own else value for name, value in graph.weights.items()})
        found = graphs[key]
        return replace(found, weights={name: own.get(name, value) for name, value in found.weights.items()})

    return bound


@contextmanager
def captured_once(found: Callable[..., Any]) -> Iterator[None]:
    """Within, what compiles captures by `found`; passes work on copies of the graph."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("muxcompile.driver.capture", found)
        patch.setattr("passes.survey.capture", found)
        yield
