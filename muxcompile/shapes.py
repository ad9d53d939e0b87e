"""shapes: backbones and loads after MuxTune's workloads (arXiv 2603.02885), for simulations without a jobs file."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

from passes.task import Task

# LLaMA's published sizes.
SHAPES: dict[str, dict[str, int]] = {
    "llama-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama-13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "llama-30b": {"hidden_size": 6656, "intermediate_size": 17920, "num_hidden_layers": 60, "num_attention_heads": 52},
}
# Sequences of a step of one task: few leave a device waiting, many fill it.
LOADS = {"light": 4, "heavy": 16}
RANKS = (8, 16, 32)


@dataclass(frozen=True, slots=True)
class Profile:
    """Sequence lengths like a data set's: log-normal, rounded, between 4 and `longest`, drawn by their own seed."""

    longest: int
    median: int
    sigma: float
    seed: int
    count: int = 512

    def lengths(self) -> list[int]:
        draw = random.Random(self.seed)
        drawn = (round(draw.lognormvariate(math.log(self.median), self.sigma)) for _ in range(self.count))
        return [min(self.longest, max(4, length)) for length in drawn]


# benchmarks/lengths holds the same numbers, written down.
PROFILES = {"sst2": Profile(64, 24, 0.45, 1), "openbookqa": Profile(128, 62, 0.35, 2), "rte": Profile(256, 88, 0.5, 3)}
MIXES = {"uniform": ("openbookqa",), "non-uniform": ("sst2", "openbookqa", "rte")}


def config(shape: str) -> Any:
    """The configuration of a backbone by its name in `SHAPES`.

    Raises:
        ValueError: there is no such shape.
    """
    from transformers import LlamaConfig

    if shape not in SHAPES:
        raise ValueError(f"shape {shape!r} must be one of {', '.join(SHAPES)}")
    return LlamaConfig(vocab_size=32000, max_position_embeddings=4096, **SHAPES[shape])


def tasks(count: int, load: str, mix: str) -> list[Task]:
    """LoRA tasks on all linears, of ranks 8, 16 and 32 in turn.

    Raises:
        ValueError: naming the field that is wrong.
    """
    from peft import LoraConfig

    if count < 1:
        raise ValueError(f"tasks={count} must be at least 1")
    for field, value, known in (("load", load, LOADS), ("mix", mix, MIXES)):
        if value not in known:
            raise ValueError(f"{field} {value!r} must be one of {', '.join(known)}")
    profiles = [PROFILES[name] for name in MIXES[mix]]
    return [
        Task(
            f"task{index}",
            LoraConfig(r=RANKS[index % len(RANKS)], target_modules="all-linear", task_type="CAUSAL_LM"),
            batch_size=LOADS[load],
            lengths=profiles[index % len(profiles)].lengths(),
        )
        for index in range(count)
    ]
