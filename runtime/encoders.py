"""Encoders: functions from the tensors that a task trains to the rows that regions read, where the two are not the same.

An encoder is called as `encoder(inputs, reads, weights, **settings)` with an `Encoding`'s tensors by the encoder's names for them:
`inputs` are those that it trains, `reads` the others of the task (its own that are not trainable among them), float32 in PEFT's
shapes; `weights` are the backbone's own, in its dtype. It returns one float32 tensor [stop - start, F] for each place,
differentiable in `inputs`. It is a pure function: no dropout, no generator, the same bits for the same tensors.

A start computes one fresh tensor: `start(shape, generator, reads, weights, **settings)`, where `reads` has the encoding's earlier
inputs as well and the generator is seeded by (seed, task, key). Or it makes several of the encoding's inputs at once, by the
encoder's names for them, when it is called for the first.

Constants are what an encoder needs of the backbone's weights alone: computed once, from `(weights, **settings)`, and given with
these in every call of it and of its starts.

Files of PEFT hold a prompt method's outcome in place of what it is computed from: a file function has it, called as the encoder is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Tensors = Mapping[str, Tensor]
Encoder = Callable[..., list[Tensor]]
Start = Callable[..., Tensor | dict[str, Tensor]]
File = Callable[..., dict[str, Tensor]]
Constants = Callable[..., dict[str, Tensor]]

ENCODERS: dict[str, Encoder] = {}
STARTS: dict[str, Start] = {}
FILES: dict[str, File] = {}
CONSTANTS: dict[str, Constants] = {}


def register(name: str) -> Callable[[Encoder], Encoder]:
    """Decorate a function to make it the encoder `name`. A process that loads an artifact must have registered it as well."""

    def keep(function: Encoder) -> Encoder:
        assert name not in ENCODERS, f"there is an encoder {name!r} already"
        ENCODERS[name] = function
        return function

    return keep


def register_start(name: str) -> Callable[[Start], Start]:
    """Decorate a function to make it the start `name`."""

    def keep(function: Start) -> Start:
        assert name not in STARTS, f"there is a start {name!r} already"
        STARTS[name] = function
        return function

    return keep


def register_file(name: str) -> Callable[[File], File]:
    """Decorate a function to make it the file function of the encoder `name`: what PEFT's files hold for its inputs, by key."""

    def keep(function: File) -> File:
        assert name not in FILES, f"there is a file function {name!r} already"
        FILES[name] = function
        return function

    return keep


def register_constants(name: str) -> Callable[[Constants], Constants]:
    """Decorate a function to compute the constants of the encoder `name`, by their names among `weights`."""

    def keep(function: Constants) -> Constants:
        assert name not in CONSTANTS, f"there are constants of {name!r} already"
        CONSTANTS[name] = function
        return function

    return keep


# --- VeRA -------------------------------------------------------------------------------------------------------------


@register("vera")
def vera(inputs: Tensors, reads: Tensors, weights: Tensors, *, in_features: int) -> list[Tensor]:
    """VeRA (arXiv 2310.11454): y += lambda_b * (B (lambda_d * (A x))), as the two tables of a LoRA.

    Args:
        inputs: `lambda_d` [r], `lambda_b` [N].
        reads: `A` [r, at least K] and `B` [at least N, r], random and shared by the sites; PEFT cuts each site's part out.
        in_features: K.

    Returns:
        A' = lambda_d[:, None] * A [r, K] and B' = B^T * lambda_b [r, N].
    """
    lambda_d, lambda_b = inputs["lambda_d"], inputs["lambda_b"]
    a, b = reads["A"][:, :in_features], reads["B"][: lambda_b.numel()]
    return [lambda_d[:, None] * a, b.T * lambda_b]


@register_start("vera_A")
def vera_a(
    shape: tuple[int, ...], generator: torch.Generator, reads: Tensors, weights: Tensors, *, projection_prng_key: int
) -> Tensor:
    """VeRA's A [r, widest K] by PEFT's own numbers: Kaiming-uniform from the configuration's key, A before B."""
    return _kaiming(shape, torch.Generator().manual_seed(projection_prng_key))


@register_start("vera_B")
def vera_b(
    shape: tuple[int, ...], generator: torch.Generator, reads: Tensors, weights: Tensors, *, projection_prng_key: int
) -> Tensor:
    """VeRA's B [widest N, r], drawn behind A, which it reads as `A` for its shape."""
    own = torch.Generator().manual_seed(projection_prng_key)
    _kaiming(tuple(reads["A"].shape), own)
    return _kaiming(shape, own)


def _kaiming(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    # std = sqrt(2 / fan_in), and a uniform's bound is sqrt(3) of its std; figured as PEFT does, for the same bits.
    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
    return torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)


# --- DoRA -------------------------------------------------------------------------------------------------------------

# Rows of a weight that are read as float32 at a time: 64 MB at 16384 columns, where all of W would be up to a gigabyte.
_BLOCK = 1024


@register("dora")
def dora(inputs: Tensors, reads: Tensors, weights: Tensors, *, scaling: float, fan_in_fan_out: bool = False) -> list[Tensor]:
    """DoRA (arXiv 2402.09353): the column scale m / ||W + s B A|| of y = scale * (W x + s B A x) + bias.

    The norm is over each output's weights and a constant for gradients (section 4.3 of the paper, and PEFT). It is taken in
    float32 whatever the backbone's dtype, where PEFT rounds to that of x.

    Args:
        inputs: `magnitude` [N].
        reads: `lora_A` [r, K], `lora_B` [N, r]; `start_A`, `start_B` alike where B A was taken out of W as it started: in place of
            W stands W - s B0 A0.
        weights: `weight` [N, K], or [K, N] if `fan_in_fan_out`; `squares` [N], of its constants; `bias` [N] where the linear has
            one.
        scaling: s.

    Returns:
        The scale [1, N]; with a bias also what is added once the whole output was scaled, (1 - scale) * bias [1, N].
    """
    scale = (inputs["magnitude"] / _norms(reads, weights, scaling, fan_in_fan_out))[None]
    return [scale, (1 - scale) * weights["bias"].float()] if "bias" in weights else [scale]


@register("dora_dropped")
def dora_dropped(
    inputs: Tensors, reads: Tensors, weights: Tensors, *, scaling: float, fan_in_fan_out: bool = False
) -> list[Tensor]:
    """DoRA with dropout, where PEFT drops the elements that the frozen product reads as well, outside the linear itself:
    y = W x + bias + (scale - 1) * W drop(x) + s (scale * B) A drop(x).

    Args:
        inputs: `lora_B` [N, r], `magnitude` [N].
        reads: `lora_A` [r, K].
        weights, scaling: as for `dora`, without the bias.

    Returns:
        (scale * B)^T [r, N] and scale - 1 [1, N].
    """
    norms = _norms({**reads, "lora_B": inputs["lora_B"]}, weights, scaling, fan_in_fan_out)
    scale = inputs["magnitude"] / norms
    return [(scale[:, None] * inputs["lora_B"]).T, (scale - 1)[None]]


@register_start("dora")
def dora_start(
    shape: tuple[int, ...],
    generator: torch.Generator,
    reads: Tensors,
    weights: Tensors,
    *,
    scaling: float,
    fan_in_fan_out: bool = False,
) -> Tensor:
    """The magnitude that changes nothing: ||W + s B A|| [N]."""
    return _norms(reads, weights, scaling, fan_in_fan_out)


@register_constants("dora")
@register_constants("dora_dropped")
def dora_constants(weights: Tensors, *, scaling: float, fan_in_fan_out: bool = False) -> dict[str, Tensor]:
    """`squares`: |W|^2 of each output's weights [N]."""
    weight = weights["weight"].T if fan_in_fan_out else weights["weight"]
    return {"squares": torch.cat([rows.float().square().sum(1) for rows in weight.split(_BLOCK)])}


@torch.no_grad()
def _norms(reads: Tensors, weights: Tensors, scaling: float, fan_in_fan_out: bool) -> Tensor:
    """||W + s B A|| by rows: |W|^2 + 2 s <W A^T, B> + s^2 <B A A^T, B>, so that no [N, K] is computed. W is read once."""
    a, b = reads["lora_A"], reads["lora_B"]
    if "start_A" in reads:
        a, b = torch.cat([a, reads["start_A"]]), torch.cat([b, -reads["start_B"]], dim=1)
    met = _products(weights["weight"].T if fan_in_fan_out else weights["weight"], a)
    squares = weights["squares"] + 2 * scaling * (met * b).sum(1) + scaling**2 * ((b @ (a @ a.T)) * b).sum(1)
    return squares.clamp(min=0).sqrt()


def _products(weight: Tensor, a: Tensor) -> Tensor:
    """W A^T [N, r] float32, W [N, K] in any dtype, A [r, K] float32."""
    if weight.is_cuda and weight.dtype == torch.bfloat16:
        # Three bfloat16 numbers hold a float32, and a product of two is exact: no float32 copy of W.
        high = a.bfloat16()
        middle = (a - high.float()).bfloat16()
        low = (a - high.float() - middle.float()).bfloat16()
        parts = torch.mm(weight, torch.cat([high, middle, low]).T, out_dtype=torch.float32)
        return parts.unflatten(1, (3, -1)).sum(1)
    return torch.cat([rows.to(a.dtype) @ a.T for rows in weight.split(_BLOCK)])


@register("scaled")
def scaled(inputs: Tensors, reads: Tensors, weights: Tensors, *, scaling: float) -> list[Tensor]:
    """A vector times a constant: `value` [N] -> [1, N]; LoRA's own bias, which PEFT scales as it does B A x."""
    return [scaling * inputs["value"][None]]


@register("offset")
def offset(inputs: Tensors, reads: Tensors, weights: Tensors, *, offset: float) -> list[Tensor]:
    """A vector plus a constant: `value` [1, N]; IA3's l - 1 where l * x is more than one linear's own."""
    return [inputs["value"] + offset]


# --- prompts ----------------------------------------------------------------------------------------------------------


@register("mlp")
def mlp(inputs: Tensors, reads: Tensors, weights: Tensors) -> list[Tensor]:
    """P-tuning's prompt encoder (arXiv 2103.10385; PEFT's PromptEncoder, type MLP): Linear, ReLU, Linear, ReLU, Linear.

    Args:
        inputs: `embedding.weight` [P, D], `mlp_head.{0,2,4}.weight` and `.bias`: D -> H -> H -> D. PEFT draws the embedding
            with std 1, a linear's weight and bias with bound 1 / sqrt(its fan-in).

    Returns:
        The virtual tokens [P, D].
    """
    hidden = inputs["embedding.weight"]
    hidden = _linear(inputs, "mlp_head.0", hidden).relu()
    hidden = _linear(inputs, "mlp_head.2", hidden).relu()
    return [_linear(inputs, "mlp_head.4", hidden)]


@register_file("mlp")
def mlp_file(inputs: Tensors, reads: Tensors, weights: Tensors) -> dict[str, Tensor]:
    """The virtual tokens [P, D]."""
    return {"prompt_embeddings": mlp(inputs, reads, weights)[0]}


@register("lstm")
def lstm(inputs: Tensors, reads: Tensors, weights: Tensors, *, layers: int = 2) -> list[Tensor]:
    """P-tuning's prompt encoder (arXiv 2103.10385; PEFT's PromptEncoder, type LSTM): bidirectional LSTM, Linear, ReLU, Linear.

    Without PEFT's `encoder_dropout` between the layers: an encoder draws nothing.

    Args:
        inputs: `embedding.weight` [P, D]; torch's names of an LSTM under `lstm_head`, e.g. `lstm_head.weight_ih_l0_reverse`
            [4 H, D]; `mlp_head.{0,2}.weight` and `.bias`: 2 H -> 2 H -> D. torch draws an LSTM's with bound 1 / sqrt(H).
        layers: how many the LSTM has.

    Returns:
        The virtual tokens [P, D].
    """
    hidden = inputs["embedding.weight"]
    for layer in range(layers):
        hidden = _bidirectional(inputs, f"l{layer}", hidden)
    hidden = _linear(inputs, "mlp_head.0", hidden).relu()
    return [_linear(inputs, "mlp_head.2", hidden)]


@register_file("lstm")
def lstm_file(inputs: Tensors, reads: Tensors, weights: Tensors, *, layers: int = 2) -> dict[str, Tensor]:
    """The virtual tokens [P, D]."""
    return {"prompt_embeddings": lstm(inputs, reads, weights, layers=layers)[0]}


def _bidirectional(inputs: Tensors, layer: str, x: Tensor) -> Tensor:
    """One LSTM layer over x [P, D] forwards and backwards, both at once; returns [P, 2 H]. Formula: torch.nn.LSTM.

    Written out because cuDNN's own rounds to TF32 and promises no bits.
    """

    def both(name: str) -> Tensor:
        return torch.stack([inputs[f"lstm_head.{name}_{layer}"], inputs[f"lstm_head.{name}_{layer}_reverse"]])

    w_hh = both("weight_hh").transpose(1, 2)  # [2, H, 4 H]
    bias = both("bias_ih") + both("bias_hh")  # [2, 4 H]
    ahead = torch.stack([x, x.flip(0)]) @ both("weight_ih").transpose(1, 2) + bias[:, None]  # [2, P, 4 H]
    hidden = cell = ahead.new_zeros(2, 1, w_hh.shape[1])
    found = []
    for token in ahead.split(1, dim=1):
        enter, forget, candidate, leave = (token + hidden @ w_hh).chunk(4, dim=-1)
        cell = forget.sigmoid() * cell + enter.sigmoid() * candidate.tanh()
        hidden = leave.sigmoid() * cell.tanh()
        found.append(hidden)
    forwards, backwards = torch.cat(found, dim=1)
    return torch.cat([forwards, backwards.flip(0)], dim=1)


@register("prefix")
def prefix(inputs: Tensors, reads: Tensors, weights: Tensors, *, layers: int, heads: int, bucket: int = 0) -> list[Tensor]:
    """Prefix tuning (arXiv 2101.00190) without projection: keys and values laid out for the layers.

    Args:
        inputs: `embedding.weight` [P, layers * 2 * G * D], in PEFT's files `prompt_embeddings`. PEFT draws it with std 1.
        layers: how many layers the backbone has.
        heads: G, heads of a key.
        bucket: the rows that each head's P are padded to with zeros; 0: none are.

    Returns:
        For each layer its keys and behind them its values, [2 * G * P, D]: row g * P + p of either half; with `bucket` in P's place
        where that is given.
    """
    return _layered(inputs["embedding.weight"], layers, heads, bucket)


@register("prefix_projection")
def prefix_projection(
    inputs: Tensors, reads: Tensors, weights: Tensors, *, layers: int, heads: int, bucket: int = 0
) -> list[Tensor]:
    """Prefix tuning (arXiv 2101.00190; PEFT's PrefixEncoder with prefix_projection): Linear, tanh, Linear over an embedding.

    Args:
        inputs: `embedding.weight` [P, T], `transform.{0,2}.weight` and `.bias`: T -> H -> layers * 2 * T, with T = G * D. PEFT
            draws them as the MLP of P-tuning; init_weights="zero" fills `transform.2` with zeros.
        layers, heads, bucket: as for `prefix`.

    Returns:
        As `prefix`.
    """
    return _layered(_projected(inputs), layers, heads, bucket)


@register_file("prefix_projection")
def prefix_projection_file(
    inputs: Tensors, reads: Tensors, weights: Tensors, *, layers: int, heads: int, bucket: int = 0
) -> dict[str, Tensor]:
    """The keys and values as PEFT lays them out, [P, layers * 2 * G * D]."""
    return {"prompt_embeddings": _projected(inputs)}


def _projected(inputs: Tensors) -> Tensor:
    """[P, layers * 2 * G * D]."""
    hidden = _linear(inputs, "transform.0", inputs["embedding.weight"]).tanh()
    return _linear(inputs, "transform.2", hidden)


def _layered(flat: Tensor, layers: int, heads: int, bucket: int) -> list[Tensor]:
    """PEFT's reshape of [P, layers * 2 * G * D] into keys and values by layer: [2 * G * P, D] each."""
    split = flat.unflatten(1, (layers, 2, heads, -1)).permute(1, 2, 3, 0, 4)  # [layers, 2, G, P, D]
    if bucket:
        split = F.pad(split, (0, 0, 0, bucket - split.shape[3]))
    return [layer.flatten(0, 2) for layer in split]


def _linear(inputs: Tensors, name: str, x: Tensor) -> Tensor:
    return F.linear(x, inputs[f"{name}.weight"], inputs[f"{name}.bias"])


# --- copies ------------------------------------------------------------------------------------------------------------


@register("copies")
def copies(inputs: Tensors, reads: Tensors, weights: Tensors, *, places: int) -> list[Tensor]:
    """One tensor `value` [n, D] in several places, such as an embedding and the head that is tied to it; gradients add up."""
    return [inputs["value"]] * places
