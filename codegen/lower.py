"""lower: which form a region and an adapted linear run in, and why not another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from codegen import costs
from codegen.layout import Layout

# Lowerings of an adapted linear. `accumulate`: the adapters' product is written first and the frozen product added to it by cuBLAS
# (beta = 1). `epilogue`: cuBLAS first, the adapters' product is added to its rows. `fused`: one Triton GEMM with both in its
# accumulator. Of dx = sum dY_i W_i + dS A likewise, the first linear's product being the one that is fused.
FORMS = ("accumulate", "epilogue", "fused")


@dataclass(frozen=True, slots=True)
class Lowering:
    """The form of every region of a program, with the reason it was chosen."""

    form: str
    reason: str


def choose(regions: str, device: torch.device, *, invariant: bool) -> Lowering:
    """Pick the form of region bodies.

    Args:
        regions: "auto", "eager" or "inductor" (Options.regions).
        invariant: a task's bits must not depend on its neighbours (Options.invariant).
    """
    if regions != "auto":
        return Lowering(regions, f"Options.regions={regions!r}")
    if device.type != "cuda":
        return Lowering(
            "eager", "on CPU compiling a layer costs about 20 s and a C++ compiler; its products run at the same speed either way"
        )
    if invariant:
        # Seen on an H200 with torch 2.11: another task's adapter nodes change what Inductor fuses, and with it last bits.
        return Lowering(
            "eager", "Inductor's fusions follow the neighbours' adapters, so Options.invariant=True needs eager regions"
        )
    return Lowering("inductor", "on CUDA Inductor fuses what lies between the products")


@dataclass(frozen=True, slots=True)
class Forms:
    """The lowering of each output of `mux::linears` and of its input's gradient; `str` and `parse` are inverse."""

    y: tuple[str, ...]
    dx: str

    def __str__(self) -> str:
        return f"y={','.join(self.y)} dx={self.dx}"

    @classmethod
    def parse(cls, text: str) -> Forms:
        """Raises ValueError: a text of another form, or a lowering that does not exist."""
        parts = dict(part.partition("=")[::2] for part in text.split(" "))
        if set(parts) != {"y", "dx"}:
            raise ValueError(f"linears: forms={text!r} is not of the form 'y=FORM,FORM dx=FORM'")
        forms = cls(tuple(parts["y"].split(",")), parts["dx"])
        for form in (*forms.y, forms.dx):
            if form not in FORMS:
                raise ValueError(f"linears: forms={text!r}: no lowering {form!r} (there are {', '.join(FORMS)})")
        return forms


@dataclass(frozen=True, slots=True)
class Choice:
    """One product of an adapted linear: the lowering taken, its cost, and why not the others.

    Args:
        product: "y" with the shape of the linear, or "dx".
        form: the lowering.
        microseconds: the product's whole cost by the table, or the adapters' part by the roofline.
        source: where the figure comes from.
        others: the other lowerings, each with its reason.
    """

    product: str
    form: str
    microseconds: float
    source: str
    others: dict[str, str]

    def __str__(self) -> str:
        others = "; ".join(f"not {form}: {reason}" for form, reason in self.others.items())
        return f"{self.product}: {self.form}, {self.microseconds:.0f} us {self.source}; {others}"


def explain(layout: Layout, biases: Sequence[bool], device: str) -> list[Choice]:
    """Choose the lowering of every output and of dx.

    It follows from the shapes of the linears, the chunk and the dtype alone: neither from who has adapters nor from their ranks,
    so that a task's bits are those it has alone.
    """
    choices = []
    for output, bias in zip(layout.outputs, biases, strict=True):
        # Where nobody adapts a linear with a bias, cuBLAS adds the bias itself; rounding it first would change a neighbour's bits.
        illegal = {"accumulate": "the bias is added by the frozen product"} if bias else {}
        choices.append(_cheapest("y", layout, layout.features, output, illegal, device))
    choices.append(_cheapest("dx", layout, layout.features, layout.outputs[0], {}, device))
    return choices


def _cheapest(product: str, layout: Layout, features: int, outputs: int, illegal: dict[str, str], device: str) -> Choice:
    measured = costs.table(device).get(costs.key(product, layout.tokens, features, outputs, layout.dtype))
    if measured:
        figures, source = {form: measured[form] for form in FORMS if form in measured}, "measured"
    else:
        # One pass over the result writes it, adding reads it as well; cuBLAS hides about half of its own read.
        size = layout.tokens * (outputs if product == "y" else features) * 2 / costs.ROOFLINE.bandwidth * 1e6
        figures, source = {"accumulate": 1.5 * size, "epilogue": 2 * size}, "by the roofline, adapters' part"
    legal = {form: figure for form, figure in figures.items() if form not in illegal}
    best = min(legal, key=lambda form: (legal[form], FORMS.index(form)))
    others = {form: illegal.get(form, f"{figures[form]:.0f} us") for form in figures if form != best}
    return Choice(f"{product} [{layout.tokens}, {features} -> {outputs}]", best, figures[best], source, others)


@lru_cache(maxsize=4096)
def forms_of(text: str, layout: Layout, biases: tuple[bool, ...]) -> Forms:
    """The forms that the text says, or the cheapest on the current device."""
    if text:
        forms = Forms.parse(text)
        if len(forms.y) != len(layout.outputs):
            raise ValueError(f"linears: forms={text!r} has {len(forms.y)} outputs, there are {len(layout.outputs)} linears")
        return forms
    *y, dx = explain(layout, biases, torch.cuda.get_device_name() if torch.cuda.is_available() else "")
    return Forms(tuple(choice.form for choice in y), dx.form)
