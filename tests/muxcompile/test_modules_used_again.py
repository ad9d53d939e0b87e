"""Backbones in which a module is called again, has two names, or does more than PEFT's layer around it would know."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, VeraConfig
from torch import Tensor, nn
from torch.nn import functional

import muxcompile

from .peft_reference import (
    VOCABULARY,
    examples,
    loss_and_gradients,
    peft_model,
    seeded,
    shake,
    wrong_gradients,
    wrong_loss,
)

WIDTH = 16


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (own(x).view(1, -1, 2, WIDTH // 2).transpose(1, 2) for own in (self.q, self.k, self.v))
        mixed: Tensor = self.o(functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return mixed


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn, self.up, self.down = nn.LayerNorm(WIDTH), Attention(), nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        return x + self.down(functional.silu(self.up(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(256, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids) + self.places(position_ids)
        for layer in self.layers:
            x = self.again(layer, layer(x))
        logits: Tensor = self.head(x)
        return logits

    def again(self, layer: Any, x: Tensor) -> Tensor:
        return x


class OnAnother(Model):
    """Queries of other hidden values, which keys and values do not read."""

    def again(self, layer: Any, x: Tensor) -> Tensor:
        return x + torch.tanh(layer.attn.q(x))


class OnTheSame(Model):
    """One linear twice of the same hidden values."""

    def again(self, layer: Any, x: Tensor) -> Tensor:
        return x + torch.tanh(layer.attn.q(x)) * layer.attn.q(x)


class OneLayer(Model):
    def __init__(self) -> None:
        super().__init__()
        self.layers[1] = self.layers[0]


class OneAttention(Model):
    def __init__(self) -> None:
        super().__init__()
        self.layers[1].attn = self.layers[0].attn


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["q", "k", "v"], **fields})


@pytest.mark.parametrize(
    ("backbone", "config"),
    [
        (OnAnother, lora()),
        (OnAnother, lora(use_dora=True)),
        (OnAnother, lora(target_modules=["q", "up"])),
        (OnAnother, VeraConfig(r=4, target_modules=["q", "k"])),
        (OnAnother, IA3Config(target_modules=["q", "k", "v"], feedforward_modules=[])),
        (OnTheSame, lora()),
        (OneLayer, lora(target_modules=["q", "v", "down"])),
        (OneAttention, lora(target_modules=["q", "v"])),
    ],
    ids=lambda own: own.__name__ if isinstance(own, type) else own.peft_type.value,
)
def test_a_module_that_runs_again_is_adapted_wherever_it_runs(backbone: type[Model], config: Any) -> None:
    own = seeded(backbone, 7).eval()
    reference = copy.deepcopy(own)
    model = muxcompile.compile(own, [muxcompile.Task("a", copy.deepcopy(config))], muxcompile.Options(chunk_tokens=64))
    shake(model, "a", seed=1)
    data = examples(0, (7, 1, 19))
    loss, gradients = loss_and_gradients(peft_model(reference, config, model.state_dict("a")), data)
    result = model.forward_backward({"a": data})
    assert wrong_loss(float(result.losses["a"]), loss) == []
    assert wrong_gradients(model.gradients("a"), gradients) == []


def test_ia3_before_a_module_that_others_stand_beside_in_one_place_alone_is_refused() -> None:
    config = IA3Config(target_modules=["q", "k", "v"], feedforward_modules=["q"])
    with pytest.raises(
        ValueError, match=r"task 'a': feedforward_modules selects 'layers\.0\.attn\.q', which runs on several inputs"
    ):
        muxcompile.compile(seeded(OnAnother, 7).eval(), {"a": config}, muxcompile.Options(chunk_tokens=64))


class Half(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 0.5 * super().forward(input)


class Normed(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(functional.layer_norm(input, input.shape[-1:]))


class Rounded(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight.round(), self.bias)


def hooked(backbone: Model) -> None:
    backbone.layers[1].attn.q.register_forward_hook(lambda module, given, made: made * 2)


def hooked_before(backbone: Model) -> None:
    backbone.layers[1].attn.q.register_forward_pre_hook(lambda module, given: (given[0] * 2,))


def of(kind: type[nn.Linear]) -> Callable[[Model], None]:
    def exchange(backbone: Model) -> None:
        new = kind(WIDTH, WIDTH)
        new.load_state_dict(backbone.layers[1].attn.q.state_dict())
        backbone.layers[1].attn.q = new

    return exchange


@pytest.mark.parametrize("change", [hooked, hooked_before, of(Half), of(Normed), of(Rounded)])
def test_an_adapter_of_a_module_that_does_more_than_its_linear_is_refused_and_its_neighbours_are_not(change: Any) -> None:
    own = seeded(Model, 7).eval()
    change(own)
    with pytest.raises(
        ValueError, match=r"task 'a': target_modules selects 'layers\.1\.attn\.q', which computes more than a linear"
    ):
        muxcompile.compile(own, {"a": lora()}, muxcompile.Options(chunk_tokens=64))
    muxcompile.compile(own, {"a": lora(target_modules=["k", "v"])}, muxcompile.Options(chunk_tokens=64))
