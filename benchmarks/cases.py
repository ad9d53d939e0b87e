"""Named workloads. A workload is a backbone shape, tasks with their adapters, and the lengths of their examples."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import muxcompile

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]

LLAMA3_8B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
TINY: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 2048,
}


@dataclass(frozen=True)
class TaskCase:
    """One task: an adapter by PEFT's name and fields; a step takes `batch` examples of about `length` tokens (3/4 to 5/4)."""

    batch: int
    length: int
    kind: str = "LORA"
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> Any:
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        kinds = {kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
        return kinds[self.kind](task_type="CAUSAL_LM", **self.fields)


@dataclass(frozen=True)
class Workload:
    """A Llama of the given shape in `dtype`, and tasks by name."""

    name: str
    model: dict[str, Any]
    dtype: torch.dtype
    tasks: dict[str, TaskCase] = field(default_factory=dict)
    chunk_tokens: int = 8192

    def backbone(self, device: str, layers: int | None = None, seed: int = 0) -> nn.Module:
        """Random weights, drawn on the device."""
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(**{**self.model, **({"num_hidden_layers": layers} if layers else {})})
        torch.manual_seed(seed)
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with torch.device(device):
                return LlamaForCausalLM(config).eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(before)

    def configs(self) -> dict[str, Any]:
        return {name: case.config for name, case in self.tasks.items()}

    def compiled_tasks(self, optimizer: str = "adamw") -> list[muxcompile.Task]:
        return [muxcompile.Task(name, config, learning_rate=1e-4, optimizer=optimizer) for name, config in self.configs().items()]

    def batches(self, seed: int, scale: float = 1.0) -> dict[str, list[dict[str, list[int]]]]:
        """One step's examples of every task; the first quarter of each is a prompt without loss."""
        generator = torch.Generator().manual_seed(seed)

        def draw(low: int, high: int, count: int) -> torch.Tensor:
            return torch.randint(low, high, (count,), generator=generator)

        found = {}
        for name, case in self.tasks.items():
            lengths = draw(3 * case.length // 4, 5 * case.length // 4 + 1, max(1, round(case.batch * scale))).tolist()
            examples = []
            for length in lengths:
                ids = draw(0, self.model["vocab_size"], length).tolist()
                examples.append({"input_ids": ids, "labels": [-100] * (length // 4) + ids[length // 4 :]})
            found[name] = examples
        return found


def _lora(batch: int, length: int, rank: int, targets: list[str], **fields: Any) -> TaskCase:
    return TaskCase(batch, length, "LORA", {"r": rank, "lora_alpha": 16, "target_modules": targets, **fields})


_FOUR = {
    "short": _lora(8, 64, 8, ["q_proj", "v_proj"]),
    "medium": _lora(8, 128, 16, ALL),
    "wide": _lora(8, 256, 32, ALL, lora_alpha=32),
    "long": _lora(8, 448, 16, ATTENTION),
}
# One task of each kind that PEFT has as well.
_KINDS = {
    "lora": _lora(8, 192, 16, ALL),
    "dora": _lora(4, 192, 8, ["q_proj", "v_proj", "down_proj"], use_dora=True),
    "vera": TaskCase(8, 96, "VERA", {"r": 64, "target_modules": ["q_proj", "v_proj"]}),
    "ia3": TaskCase(8, 128, "IA3", {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "norms": TaskCase(8, 96, "LN_TUNING", {"target_modules": ["input_layernorm", "post_attention_layernorm", "norm"]}),
    "prompt": TaskCase(4, 96, "PROMPT_TUNING", {"num_virtual_tokens": 16}),
    "p-tuning": TaskCase(4, 96, "P_TUNING", {"num_virtual_tokens": 16, "encoder_hidden_size": 256}),
    "prefix": TaskCase(8, 128, "PREFIX_TUNING", {"num_virtual_tokens": 16}),
}

# Kinds and places that cost a vocabulary's rows or a whole matrix; small sizes only.
_MORE = {
    "head": _lora(4, 96, 8, ["lm_head", "q_proj"]),
    "embedding": _lora(4, 96, 4, ["embed_tokens", "v_proj"]),
    "tokens": _lora(4, 96, 4, ["q_proj"], trainable_token_indices=list(range(0, 1000, 10))),
    "modules": _lora(4, 96, 4, ["q_proj"], modules_to_save=["lm_head", "embed_tokens", "norm"]),
    "shira": TaskCase(4, 96, "SHIRA", {"r": 4, "target_modules": ["k_proj", "down_proj"], "random_seed": 3}),
    "shared": TaskCase(4, 96, "IA3", {"target_modules": ["q_proj", "gate_proj"], "feedforward_modules": ["q_proj", "gate_proj"]}),
}

# Mixes after MuxTune's workloads: 32 LoRA tasks of three ranks; `benchmarks/mux.py` gives them lengths and batch sizes.
_MUX = {f"task{index:02d}": _lora(4, 64, (8, 16, 32)[index % 3], ALL) for index in range(32)}

WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("llama3-8b-four", LLAMA3_8B, torch.bfloat16, _FOUR),
        Workload("llama3-8b-kinds", LLAMA3_8B, torch.bfloat16, _KINDS),
        Workload("llama3-8b-mux", LLAMA3_8B, torch.bfloat16, _MUX),
        Workload("tiny-mux", TINY, torch.float32, dict(list(_MUX.items())[:8]), chunk_tokens=512),
        Workload("tiny-kinds", TINY, torch.float32, {**_KINDS, **_MORE}, chunk_tokens=1024),
        Workload("tiny-four", TINY, torch.float32, _FOUR, chunk_tokens=1024),
    )
}
