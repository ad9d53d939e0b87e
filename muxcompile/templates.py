"""Templates: region bodies -> differentiated, emitted callables, each compiled once in a compiler's life."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from codegen import emit
from codegen.kernels.build import Call
from codegen.ops import ROWWISE
from codegen.spec import Body, Head, Template, flops
from passes.differentiate import differentiate, saved_bytes
from passes.loss import bind_head, differentiate_head
from passes.lower import launched
from passes.partition import share
from runtime.pack import Geometry
from runtime.region import HeadSpec, RegionSpec, TemplateSpec
from runtime.tables import Shard


class Lowered(NamedTuple):
    """A template: its spec, its texts by callable, FLOPs and saved bytes of one run, and the kernels that its text alone has."""

    spec: TemplateSpec
    texts: dict[str, str]
    flops: int
    saved: int = 0
    launches: tuple[Call, ...] = ()


class Regions(NamedTuple):
    """The regions of one graph in running order, bound to templates; `costs` are the FLOPs of each, `saved` the bytes of all, and
    `launches` the kernels that the graph's own nodes do not say."""

    regions: list[RegionSpec]
    templates: dict[str, TemplateSpec]
    sources: dict[str, str]
    costs: dict[str, int]
    saved: int
    launches: tuple[Call, ...] = ()


@dataclass(slots=True)
class Templates:
    """Every template compiled so far, by the identity of its body: a region met again is not compiled again.

    `vocabulary`: which part of it the head has; None: all.
    """

    vocabulary: Shard | None = None
    lowered: dict[str, Lowered] = field(default_factory=dict)
    heads: dict[str, Head] = field(default_factory=dict)

    def lower(self, bodies: Sequence[Body], form: str, *, checkpoint: bool) -> Regions:
        """Differentiate and emit one template for each kind of body.

        Args:
            form: how regions are run, "eager" or "inductor".
            checkpoint: keep the inputs of a region alone and run its forward again in the backward.
        """
        templates: dict[str, TemplateSpec] = {}
        sources: dict[str, str] = {}
        costs: dict[str, int] = {}
        named: dict[str, str] = {}
        launches: dict[str, Call] = {}
        saved = 0
        for name, group in share(list(bodies)).items():
            identity = f"{form} checkpoint={checkpoint}\n{group[0].spec.template}"
            if identity not in self.lowered:
                decompositions = emit.decompositions(form)
                template = differentiate(self._fresh_name(name), group[0], decompositions=decompositions, checkpoint=checkpoint)
                self.lowered[identity] = Lowered(template.spec, *_emit(template, form), saved_bytes(template), _launched(template))
            spec, texts, cost, bytes_, calls = self.lowered[identity]
            launches.update({launch.name: (launch, tensors) for launch, tensors in calls})
            # A template met before keeps the name that its text was emitted under.
            templates[spec.name] = spec
            sources.update(texts)
            for body in group:
                named[body.spec.name] = spec.name
                costs[body.spec.name] = cost
                saved += bytes_
        regions = [RegionSpec(body.spec.name, named[body.spec.name], body.spec.inputs, body.spec.outputs) for body in bodies]
        return Regions(regions, templates, sources, costs, saved, tuple(launches.values()))

    def _fresh_name(self, name: str) -> str:
        """A template keeps its name for good: another of a later compilation that begins at the same region is numbered."""
        taken = {spec.name for spec, *_ in self.lowered.values()}
        return next(fresh for fresh in (name, *(f"{name}.{number}" for number in range(2, len(taken) + 3))) if fresh not in taken)

    def head_flops(self, body: Body, geometry: Geometry, form: str) -> int:
        """FLOPs of one block of a loss that is lowered."""
        return self.lowered[_head(body, geometry, form)].flops

    def lower_head(self, body: Body, geometry: Geometry, form: str) -> tuple[Head, dict[str, str]]:
        """The loss, and its texts."""
        identity = _head(body, geometry, form)
        if identity not in self.heads:
            decompositions = emit.decompositions(form)
            rows, tile = geometry.head_rows, geometry.head_tile
            head = differentiate_head(body, rows=rows, tile=tile, decompositions=decompositions, vocabulary=self.vocabulary)
            texts = {f"head.{phase}": _source(getattr(head, phase), f"head.{phase}", form) for phase in ("forward", "backward")}
            self.heads[identity] = head
            self.lowered[identity] = Lowered(TemplateSpec("head", 1, 0, None, ()), texts, flops(head.backward))
        return bind_head(self.heads[identity], body), self.lowered[identity].texts


def _head(body: Body, geometry: Geometry, form: str) -> str:
    return f"{form}\nhead {geometry.head_rows}\n{body.spec.template}"


def _source(gm: Any, title: str, form: str) -> str:
    return emit.inductor_source(gm, title) if form == "inductor" else emit.eager_source(gm, title)


def _launched(template: Template) -> tuple[Call, ...]:
    graphs = (template.forward, template.backward)
    return tuple(launched(node for gm in graphs if gm is not None for node in gm.graph.nodes if node.target is ROWWISE))


def _emit(template: Template, form: str) -> tuple[dict[str, str], int]:
    name = template.spec.name
    texts = {f"{name}.forward": _source(template.forward, f"{name}.forward", form)}
    cost = flops(template.forward)
    if template.backward is not None:
        texts[f"{name}.backward"] = _source(template.backward, f"{name}.backward", form)
        cost += flops(template.backward)
    return texts, cost


def head_spec(head: Head, body: Body, parts: int = 1, *, shared: bool) -> HeadSpec:
    """
    Args:
        parts: of the vocabulary, of which the head has one.
        shared: whether tasks may share blocks of rows, unless it has adapters, which want each block to be one task's.
    """
    hidden = body.gm.graph.find_nodes(op="placeholder")[0].meta["val"]
    logits = body.gm.graph.output_node().args[0][0].meta["val"]
    return HeadSpec(
        head.inputs,
        head.value,
        tuple(hidden.shape),
        str(hidden.dtype).removeprefix("torch."),
        parts * logits.shape[-1],
        head.trained,
        shared and all(reference.startswith("weight:") for reference in head.inputs),
    )
