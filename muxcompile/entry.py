"""TaskEntry: what a compiled model keeps of a task besides its numbers, and what of it a checkpoint must agree with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runtime.adapterhub import CONFIG_FILE, PICKLE_FILE
from runtime.comm import Ranks
from runtime.folder import Form
from runtime.identity import Identity, sample

WEIGHTS = "adapter_model.safetensors"
# A saved adapter: PEFT's layout or AdapterHub's.
ADAPTER = Form(CONFIG_FILE, (CONFIG_FILE, WEIGHTS, PICKLE_FILE))

# Fields of configs that leave what an adapter's tensors compute as it is; of one that is not known, nobody can say so.
INDIFFERENT = frozenset(
    {
        # whose the adapter is
        "auto_mapping", "base_model_name_or_path", "hidden_size", "inference_mode", "model_class", "model_type", "peft_version",
        "revision", "task_type",
        # which tensors it has, and of what shape: their names and shapes are compared themselves
        "bias", "exclude_modules", "layers_pattern", "layers_to_transform", "modules_to_save", "r", "rank_pattern",
        "target_modules",
        # how they begin: what they began with and is needed later is in the checkpoint
        "corda_config", "d_initial", "eva_config", "init_ia3_weights", "init_lora_weights", "init_weights", "init_weights_seed",
        "loftq_config", "mask_type", "projection_prng_key", "prompt_tuning_init", "prompt_tuning_init_text", "random_seed",
        "tokenizer_kwargs", "tokenizer_name_or_path",
        # how the backbone stores its weights, how they are filed
        "fan_in_fan_out", "runtime_config", "save_projection",
        # of training alone, as a rate
        "dropout", "encoder_dropout", "lora_dropout", "vera_dropout",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class TaskEntry:
    """What the model keeps of a task: its own length limit, its adapter_config.json, and the layout of its folder."""

    max_length: int | None
    config: dict[str, Any]
    layout: str = "peft"

    @property
    def function(self) -> dict[str, Any]:
        """The fields that say what function the adapter's tensors are of, e.g. lora_alpha."""
        return {name: _in_order(value) for name, value in self.config.items() if name not in INDIFFERENT}


def _in_order(value: Any) -> Any:
    """Sets of names become lists in whatever order; lists of numbers are in the order that is meant."""
    return sorted(value) if isinstance(value, list) and all(isinstance(own, str) for own in value) else value


def identity(build: Any, entries: Mapping[str, TaskEntry], ranks: Ranks | None) -> Identity:
    """What the tensors of the tasks stand for. All ranks make this call."""
    own = {name: tensor for name, tensor in build.weights.items() if name not in build.constants}
    return Identity({name: entry.function for name, entry in entries.items()}, sample(own, ranks))
