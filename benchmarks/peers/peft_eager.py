"""HF PEFT as its users run it: one task after another, padded batches, torch.optim.AdamW."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

Examples = Sequence[Mapping[str, list[int]]]


class PeftEager:
    """Every task's adapter on one backbone; `step` trains one task."""

    def __init__(self, backbone: nn.Module, configs: Mapping[str, Any], weights: Mapping[str, Mapping[str, Tensor]]) -> None:
        names = list(configs)
        # The adapters' dtype is the backbone's: what is compared is arithmetic, not PEFT's default of float32 adapters.
        self.model: PeftModel = get_peft_model(backbone, configs[names[0]], adapter_name=names[0], autocast_adapter_dtype=False)
        for name in names[1:]:
            self.model.add_adapter(name, configs[name], autocast_adapter_dtype=False)
        for name in names:
            self._load(name, weights[name])
        self.model.train()
        self.optimizers: dict[str, torch.optim.Optimizer] = {}

    def _load(self, name: str, weights: Mapping[str, Tensor]) -> None:
        from peft import set_peft_model_state_dict

        missing = set_peft_model_state_dict(self.model, dict(weights), adapter_name=name)
        assert not missing.unexpected_keys, missing.unexpected_keys

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """A task's parameters under the keys of PEFT's file."""
        return {key.replace(f".{name}.", "."): value for key, value in self.model.named_parameters() if f".{name}." in key}

    def loss(self, name: str, examples: Examples) -> Tensor:
        """Mean over the labelled tokens of one padded batch."""
        self.model.set_adapter(name)
        device = next(self.model.parameters()).device
        width = max(len(example["input_ids"]) for example in examples)
        ids = torch.zeros(len(examples), width, dtype=torch.long)
        labels = torch.full((len(examples), width), -100)
        mask = torch.zeros(len(examples), width, dtype=torch.long)
        for row, example in enumerate(examples):
            length = len(example["input_ids"])
            ids[row, :length] = torch.tensor(example["input_ids"])
            labels[row, :length] = torch.tensor(example["labels"])
            mask[row, :length] = 1
        return self.model(input_ids=ids.to(device), attention_mask=mask.to(device), labels=labels.to(device), use_cache=False).loss

    def gradients(self, name: str, examples: Examples) -> tuple[float, dict[str, Tensor]]:
        loss = self.loss(name, examples)
        loss.backward()
        grads = {}
        for key, value in self.parameters(name).items():
            assert value.grad is not None, key
            grads[key] = value.grad.float().cpu()
            value.grad = None
        return loss.item(), grads

    def step(self, name: str, examples: Examples) -> Tensor:
        loss = self.loss(name, examples)
        loss.backward()
        parameters = list(self.parameters(name).values())
        if name not in self.optimizers:
            self.optimizers[name] = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)
        self.optimizers[name].step()
        self.optimizers[name].zero_grad(set_to_none=True)
        return loss.detach()

    def step_all(self, batches: Mapping[str, Examples]) -> None:
        """One step of each task, one task after another."""
        for name, examples in batches.items():
            self.step(name, examples)
