"""What each rank does in the tests of meshes; every function returns what it found wrong, by the rank's own eyes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import IA3Config, LNTuningConfig, LoraConfig
from torch import Tensor

import muxcompile
from tests.muxcompile.peft_reference import Example, equal, examples, llama

LENGTHS = ((7, 1, 19), (33, 2), (12, 5, 17), (40, 3, 3, 21), (3, 16, 9))
TOLERANCE = 1e-5
# Kinds whose tensors lie in all stages, in some, in the first, in the last, and that encoders compute.
ADAPTERS: dict[str, Any] = {
    "wide": LoraConfig(r=5, target_modules="all-linear"),
    "early": LoraConfig(r=3, target_modules=["q_proj"], layers_to_transform=[0]),
    "norms": LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm", "norm"]),
    "dora": LoraConfig(r=4, target_modules=["v_proj", "down_proj"], use_dora=True),
    "head": LoraConfig(r=2, target_modules=["lm_head", "o_proj"], lora_dropout=0.2),
    "ia3": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
}
LORA = {name: ADAPTERS[name] for name in ("wide", "early")}


def tasks(adapters: Mapping[str, Any], **fields: Any) -> list[muxcompile.Task]:
    found = []
    for number, (name, adapter) in enumerate(adapters.items()):
        own = {"learning_rate": 0.02, "optimizer": ("adamw", "sgd")[number % 2], "max_grad_norm": (None, 0.3)[number // 2 % 2]}
        found.append(muxcompile.Task(name, adapter, **{**own, **fields}))
    return found


def batches(adapters: Mapping[str, Any], step: int) -> dict[str, list[Example]]:
    """Of other lengths at each step."""
    return {
        name: examples(100 * step + number, LENGTHS[(number + step) % len(LENGTHS)]) for number, name in enumerate(adapters)
    }


def fill(model: Any, name: str) -> None:
    """Values in every tensor of a task, by its name and key alone: nothing then starts at 0 or 1."""
    for number, key in enumerate(sorted(model.state_dict(name))):
        if model.state.holds(name, key):
            generator = torch.Generator().manual_seed(1000 * len(name) + number)
            value = model.state_dict_here(name)[key] if hasattr(model, "state_dict_here") else model.state.read(name, key)
            model.state.write(name, key, value + 0.1 * torch.randn(value.shape, generator=generator))


def compiled(adapters: Mapping[str, Any], mesh: str | None, *, layers: int = 3, **options: Any) -> Any:
    backbone = llama(5, num_hidden_layers=layers)
    settings = {"chunk_tokens": 64, "mesh": mesh, **options}
    model = muxcompile.compile(backbone, tasks(adapters), muxcompile.Options(**settings))
    for name in adapters:
        fill(model, name)
    return model


def differ(what: str, got: Mapping[str, Any], want: Mapping[str, Any], scale: float = 1.0) -> list[str]:
    """Tensors that are not the same to rounding: against the largest of their kind, or of themselves."""
    if list(sorted(got)) != list(sorted(want)):
        return [f"{what}: {sorted(set(got) ^ set(want))} are not in both"]
    largest = max((float(torch.as_tensor(value).abs().max()) for value in want.values()), default=0.0)
    wrong = []
    for key, value in want.items():
        error = float((torch.as_tensor(got[key]) - torch.as_tensor(value)).abs().max())
        allowed = TOLERANCE * float(torch.as_tensor(value).abs().max()) + 1e-6 * scale * largest
        if not error <= allowed:
            wrong.append(f"{what} {key}: off by {error:.2e}, {allowed:.2e} allowed")
    return wrong


def numbers(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu() for name, value in found.items()}


def same_as_alone(mesh: str, kinds: Sequence[str] = tuple(ADAPTERS), groups: Any = None) -> list[str]:
    """Losses, every gradient, norms and adapters of some steps are those of one process."""
    adapters = {name: ADAPTERS[name] for name in kinds}
    one, many = (compiled(adapters, given, groups=groups) for given in (None, mesh))
    wrong = []
    given = batches(adapters, 0)
    for model in (one, many):
        model.forward_backward(given)
    for name in adapters:
        wrong += differ(f"{name}: gradient", many.gradients(name), one.gradients(name))
    wrong += differ("norm", numbers(many.optim_step(list(adapters))), numbers(one.optim_step(list(adapters))))
    rounds = [batches(adapters, step) for step in range(1, 5)]
    rounds[1] = {name: given for name, given in rounds[1].items() if name != kinds[0]}
    wanted, found = [one.step(given) for given in rounds], many.step_rounds(rounds)
    for step, (want, got) in enumerate(zip(wanted, found, strict=True)):
        wrong += differ(f"step {step}: loss", numbers(got.losses), numbers(want.losses))
        wrong += differ(f"step {step}: norm", numbers(got.grad_norms), numbers(want.grad_norms), 10)
        wrong += [f"step {step}: tokens"] * (got.tokens != want.tokens)
        wrong += [f"step {step}: {got.quarantined}"] * bool(got.quarantined)
    for name in adapters:
        wrong += differ(f"{name}: weights", many.state_dict(name), one.state_dict(name), 10)
    given = batches(adapters, 7)
    wrong += differ("evaluation", numbers(many.evaluate(given).losses), numbers(one.evaluate(given).losses))
    wrong += [f"counters {many.steps} {one.steps}"] * (many.steps != one.steps)
    return wrong


def same_bits_alone(mesh: str) -> list[str]:
    """A task's losses and adapter do not depend on its neighbours, within a mesh."""
    together = compiled(ADAPTERS, mesh)
    rounds = [batches(ADAPTERS, step) for step in range(3)]
    found = together.step_rounds(rounds)
    wrong = []
    for name in ("wide", "dora", "head"):
        alone = compiled({name: ADAPTERS[name]}, mesh)
        alone_optimizer = alone.state.tasks[name].training.optimizer
        if alone_optimizer != together.state.tasks[name].training.optimizer:
            continue
        own = alone.step_rounds([{name: given[name]} for given in rounds])
        losses = [[float(result.losses[name]) for result in results] for results in (own, found)]
        wrong += [f"{name}: losses {losses}"] * (losses[0] != losses[1])
        wrong += [f"{name}: weights"] * (not equal(alone.state_dict(name), together.state_dict(name)))
    return wrong
