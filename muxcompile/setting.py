"""setting: what a simulation plays: a backbone without weights, and tasks with their lengths."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from muxcompile import shapes
from muxcompile.jobs import Jobs
from muxcompile.options import Options
from passes.task import Task

# Options that a simulation goes by; of others only the defaults are played.
OPTIONS = ("chunk_tokens", "groups", "memory_cap", "gradient_checkpointing")
# These change nothing that is predicted.
INDIFFERENT = ("invariant", "regions")


@dataclass(frozen=True, slots=True)
class Setting:
    """What is played.

    Args:
        name: of the backbone.
        config: its configuration (transformers'); no weights are read.
        tasks: with their lengths.
        options: of the compiler.
        alike: its layers are, and so are their adapters: three are surveyed.
    """

    name: str
    config: Any
    tasks: Sequence[Task]
    options: Options = field(default_factory=Options)
    alike: bool = False


def of_shape(shape: str, *, tasks: int = 8, load: str = "heavy", mix: str = "non-uniform") -> Setting:
    """A built-in setting.

    Raises:
        ValueError: naming the field that is wrong.
    """
    return Setting(shape, shapes.config(shape), shapes.tasks(tasks, load, mix), alike=True)


def of_jobs(jobs: Jobs) -> Setting:
    """A jobs file: the base's configuration and tokenizer, and the data; not its weights.

    Raises:
        ValueError: anything wrong with the files; an option that simulations do not play.
    """
    from muxcompile.base import load_config, load_tokenizer
    from muxcompile.tenants import prepare, read_all

    for own in dataclasses.fields(Options):
        value = getattr(jobs.options, own.name)
        if own.name not in (*OPTIONS, *INDIFFERENT) and value != own.default:
            raise ValueError(f"{jobs.path}: options.{own.name}={value!r} is not simulated; leave it out")
    rows, config = read_all(jobs), load_config(jobs.base)
    tenants = prepare(jobs, rows, fake(config), load_tokenizer(jobs.base))
    return Setting(jobs.base.path, config, [tenant.task for tenant in tenants.values()], jobs.options)


def fake(config: Any) -> Any:
    """A backbone of this configuration in bfloat16, whose tensors have no memory."""
    from torch._subclasses import FakeTensorMode
    from transformers import AutoModelForCausalLM

    with FakeTensorMode(allow_non_fake_inputs=True):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)


def sharded(config: Any, tp: int, layers: int | None = None) -> Any:
    """The configuration of one shard's part of the model: its heads, its features of the feed-forward part, its vocabulary.

    Raises:
        ValueError: the model cannot be sharded so, with the numbers.
    """
    found = copy.deepcopy(config)
    if layers is not None:
        found.num_hidden_layers = layers
    if tp == 1:
        return found
    if not getattr(config, "base_model_tp_plan", None):
        raise ValueError(f"tp={tp}: {config.model_type} has no plan for tensor parallelism in transformers")
    heads = config.num_attention_heads
    own = {
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
        "intermediate_size": config.intermediate_size,
    }
    for name, size in own.items():
        if size % tp:
            raise ValueError(f"tp={tp}: {name}={size} of {config.model_type} cannot be divided by it")
    found.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    for name, size in own.items():
        setattr(found, name, size // tp)
    found.vocab_size = -(-config.vocab_size // tp)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(found, name, None)  # ids of the whole vocabulary
    return found
