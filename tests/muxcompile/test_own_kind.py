"""A kind from outside the package: the one of docs/peft-kinds.md, run as it stands there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

import muxcompile
from passes.adapters import KINDS, Kind

from .peft_reference import equal, examples, llama, loss_and_gradients, shake, wrong_gradients, wrong_loss

pytestmark = pytest.mark.usefixtures("one_capture")
PAGE = Path(__file__).parents[2] / "docs" / "peft-kinds.md"
TARGETS = ["q_proj", "down_proj"]


@pytest.fixture
def page() -> Iterator[dict[str, Any]]:
    """The names of the page's example; what it registers is taken back."""
    (source,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    # Its dataclasses look their module up.
    names: dict[str, Any] = {"__name__": __name__}
    before = dict(KINDS)
    exec(compile(source, str(PAGE), "exec"), names)
    yield names
    KINDS.clear()
    KINDS.update(before)


class Plain(nn.Module):
    """SSF in plain torch: hooks behind the linears of a copy of the backbone."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.model = llama()
        self.model.requires_grad_(False)
        self.own = {key: nn.Parameter(value.clone()) for key, value in weights.items()}
        for name, module in self.model.named_modules():
            stem = f"base_model.model.{name}"
            if f"{stem}.ssf_scale" in self.own:
                scale, shift = self.own[f"{stem}.ssf_scale"], self.own[f"{stem}.ssf_shift"]
                module.register_forward_hook(lambda _m, _a, out, scale=scale, shift=shift: out * scale + shift)
        # Registered under names that parameters may have.
        for index, (key, parameter) in enumerate(self.own.items()):
            self.register_parameter(f"own{index}", parameter)
            assert parameter.requires_grad, key

    def forward(self, **given: Any) -> Any:
        return self.model(**given)

    @property
    def config(self) -> Any:
        return self.model.config


def test_the_kind_of_the_page_trains_beside_another_and_is_its_plain_formula(page: dict[str, Any], tmp_path: Path) -> None:
    config = page["SSFConfig"](target_modules=TARGETS)
    model = muxcompile.compile(llama(), {"alice": config, "bob": LoraConfig(r=4, target_modules=["q_proj"])})
    fresh = model.state_dict("alice")
    assert all(torch.equal(value, torch.full_like(value, float("scale" in key))) for key, value in fresh.items())
    weights = shake(model, "alice")
    batch = {"alice": examples(1, (9, 4)), "bob": examples(2, (17,))}
    result = model.forward_backward(batch)
    plain = Plain(weights)
    loss, found = loss_and_gradients(plain, batch["alice"])
    gradients = {key: found[f"own{index}"] for index, key in enumerate(plain.own)}
    assert not wrong_loss(float(result.losses["alice"]), loss) + wrong_gradients(model.gradients("alice"), gradients)
    model.save_pretrained(tmp_path)
    again = muxcompile.compile(llama(), {"alice": str(tmp_path / "alice")})
    assert equal(again.state_dict("alice"), weights)


def test_a_kind_is_registered_once(page: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="peft_type='SSF' is a kind already"):
        muxcompile.register_kind(Kind("SSF", "additive", "", "", "", page["resolve"], page["attach"], page["fuse"]))
