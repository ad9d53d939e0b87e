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
# Lowerings that the choice knows and cannot take yet.
AUGMENT, AUGMENT_REASON = "augment", "[W | sB] in one buffer is a second copy of the frozen weight"
TMA_REASON = "its sizes must be multiples of 16: rows of a TMA descriptor begin at multiples of 16 bytes"
BIAS_REASON = "the bias is added by the frozen product"
SINK, SINK_REASON = "sink", "the kernels around the linear do not take up its adapters yet"


@dataclass(frozen=True, slots=True)
class Lowering:
    """The form of every region of a program, with the reason it was chosen."""

    form: str
    reason: str


def choose(regions: str, device: torch.device, *, invariant: bool, carried: bool = False) -> Lowering:
    """Pick the form of region bodies.

    Args:
        regions: "auto", "eager" or "inductor" (Options.regions).
        invariant: a task's bits must not depend on its neighbours (Options.invariant).
        carried: a sequence may be longer than a chunk.

    Raises:
        ValueError: Inductor was asked for where it cannot serve.
    """
    if carried and regions == "inductor":
        raise ValueError("Options: regions='inductor' has static shapes alone, and no chunk_tokens shorter than an example")
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
    if carried:
        return Lowering("eager", "the keys of a long sequence's earlier pieces have no static shape, as Inductor's regions need")
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


@dataclass(frozen=True, slots=True)
class Target:
    """What decides about lowerings besides shapes: the device's name, and whether it has TMA (compute capability 9 or more)."""

    name: str
    tma: bool

    @classmethod
    def of(cls, device: torch.device) -> Target | None:
        """None for the CPU, where there is nothing to choose."""
        if device.type != "cuda":
            return None
        return cls(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)[0] >= 9)


def explain(layout: Layout, biases: Sequence[bool], target: Target) -> list[Choice]:
    """Choose the lowering of every output and of dx.

    It follows from the shapes of the linears, the chunk and the dtype alone: neither from who has adapters nor from their ranks,
    so that a task's bits are those it has alone.
    """
    choices = []
    for output, bias in zip(layout.outputs, biases, strict=True):
        illegal = _illegal(layout, layout.features, output, target)
        if bias:
            # Where nobody adapts a linear with a bias, cuBLAS adds it itself; rounding it first would change a neighbour's bits.
            illegal["accumulate"] = BIAS_REASON
        choices.append(_cheapest("y", layout, output, illegal, target))
    illegal = _illegal(layout, layout.outputs[0], layout.features, target)
    choices.append(_cheapest("dx", layout, layout.outputs[0], illegal, target))
    return choices


def _illegal(layout: Layout, summed: int, size: int, target: Target) -> dict[str, str]:
    """Lowerings that cannot be, each with its reason."""
    if not target.tma:
        return {"fused": "needs TMA (compute capability 9 or more)"}
    if layout.dtype == "float32":
        return {"fused": "float32 has no matrix instruction of full precision"}
    if summed % 16 or size % 16:
        return {"fused": TMA_REASON}
    return {}


def _cheapest(product: str, layout: Layout, output: int, illegal: dict[str, str], target: Target) -> Choice:
    shape = f"{product} [{layout.tokens}, {layout.features} -> {output}]"
    others = {AUGMENT: AUGMENT_REASON, SINK: SINK_REASON}
    measured = costs.nearest(costs.table(target.name), product, layout.tokens, layout.features, output, layout.dtype)
    if measured:
        figures, source = {form: measured[form] for form in FORMS if form in measured}, "measured"
    else:
        # One pass over the result writes it, adding to it reads it as well; cuBLAS hides about half of its own read.
        size = layout.tokens * (output if product == "y" else layout.features) * 2 / costs.ROOFLINE.bandwidth * 1e6
        gemm = 2 * layout.tokens * layout.features * output / costs.ROOFLINE.flops * 1e6
        figures = {"accumulate": gemm + 1.5 * size, "epilogue": gemm + 2 * size, "fused": costs.FUSED_GEMM * gemm}
        source = "by the roofline"
    legal = {form: figure for form, figure in figures.items() if form not in illegal}
    best = min(legal, key=lambda form: (legal[form], FORMS.index(form)))
    others = {form: illegal.get(form, f"{figures[form]:.0f} us") for form in figures if form != best} | others
    return Choice(shape, best, figures[best], source, others)


@lru_cache(maxsize=4096)
def forms_of(text: str, layout: Layout, biases: tuple[bool, ...]) -> Forms:
    """The forms that the text says, or the cheapest on the current device."""
    if text:
        forms = Forms.parse(text)
        if len(forms.y) != len(layout.outputs):
            raise ValueError(f"linears: forms={text!r} has {len(forms.y)} outputs, there are {len(layout.outputs)} linears")
        for output, form, bias in zip(layout.outputs, forms.y, biases, strict=True):
            if form == "accumulate" and bias:
                raise ValueError(f"linears: forms={text!r}: a linear with a bias cannot be {form}: {BIAS_REASON}")
            _check_fused(text, form, layout, output)
        _check_fused(text, forms.dx, layout, layout.outputs[0])
        return forms
    target = Target.of(torch.device("cuda")) if torch.cuda.is_available() else Target("", False)
    assert target is not None
    *y, dx = explain(layout, biases, target)
    return Forms(tuple(choice.form for choice in y), dx.form)


def _check_fused(text: str, form: str, layout: Layout, output: int) -> None:
    if form == "fused" and (layout.features % 16 or output % 16):
        raise ValueError(
            f"linears: forms={text!r}: a linear of {layout.features} to {output} features cannot be fused: {TMA_REASON}"
        )
