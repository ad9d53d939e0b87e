"""HF PEFT as its users run it: one task after another, padded batches, torch.optim.AdamW."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

Examples = Sequence[Mapping[str, list[int]]]

# What a prompt without an encoder is called in training, and in PEFT's files.
_TRAINED, _SAVED = "prompt_encoder.embedding.weight", "prompt_embeddings"


class PeftEager:
    """Every task's adapter on one backbone's weights; `step` trains one task.

    PEFT mixes no kinds in one model, so each task has module objects of its own, around shared tensors.
    """

    def __init__(self, backbone: nn.Module, configs: Mapping[str, Any], weights: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.models: dict[str, PeftModel] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        for name, config in configs.items():
            tensors = [*backbone.parameters(), *backbone.buffers()]
            bare = copy.deepcopy(backbone, {id(tensor): tensor for tensor in tensors})
            # The adapters' dtype is the backbone's: what is compared is arithmetic, not PEFT's default of float32 adapters.
            model = get_peft_model(bare, config, autocast_adapter_dtype=False)
            if not config.is_prompt_learning:
                missing = set_peft_model_state_dict(model, dict(weights[name]))
                assert not missing.unexpected_keys, missing.unexpected_keys
            # Kinds that keep their tensors in float32 whatever is asked for.
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(next(backbone.parameters()).dtype)
            self.models[name] = model.train()
            if config.is_prompt_learning:
                # PEFT's loader takes finished prompts alone, not what they are computed from.
                own = self.parameters(name)
                assert own.keys() == weights[name].keys(), own.keys() ^ weights[name].keys()
                for key, parameter in own.items():
                    parameter.data.copy_(weights[name][key])

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """A task's parameters under the keys of PEFT's file."""
        model = self.models[name]
        trained = {full: own for full, own in model.named_parameters() if own.requires_grad}
        if model.peft_config["default"].is_prompt_learning:
            found = {re.sub(r"\.default(?=\.|$)", "", full): own for full, own in trained.items()}
            return {_SAVED: found[_TRAINED]} if list(found) == [_TRAINED] else found
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            keys = {tensor.data_ptr(): key for key, tensor in get_peft_model_state_dict(model).items()}
        return {keys[own.data_ptr()]: own for own in trained.values()}

    def loss(self, name: str, examples: Examples) -> Tensor:
        """Mean over the labelled tokens of one padded batch."""
        model = self.models[name]
        device = next(model.parameters()).device
        width = max(len(example["input_ids"]) for example in examples)
        ids = torch.zeros(len(examples), width, dtype=torch.long)
        labels = torch.full((len(examples), width), -100)
        mask = torch.zeros(len(examples), width, dtype=torch.long)
        for row, example in enumerate(examples):
            length = len(example["input_ids"])
            ids[row, :length] = torch.tensor(example["input_ids"])
            labels[row, :length] = torch.tensor(example["labels"])
            mask[row, :length] = 1
        return model(input_ids=ids.to(device), attention_mask=mask.to(device), labels=labels.to(device), use_cache=False).loss

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
