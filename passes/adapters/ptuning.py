"""P-tuning (arXiv 2103.10385): virtual tokens before each sequence of a task, computed by a small network that is trained.

Dispatch: the embedded tokens. Adapter: P embeddings through an MLP or an LSTM. Aggregate: as in prompt tuning, and in its tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from passes.adapters import prompt
from passes.adapters.sites import bucket_of, refuse_fields
from passes.graph import MuxGraph
from passes.task import Task
from runtime.tables import Encoding, Input, Place

NAME = "prompt"
_SUPPORTED = frozenset(
    {"num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers",
     "encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout"}
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Site:
    """P virtual tokens of K features out of a network of width `hidden`: an LSTM of `layers`, an MLP if that is 0."""

    name: str
    count: int
    features: int
    hidden: int
    layers: int

    @property
    def bucket(self) -> int:
        """The rows that tables are padded to."""
        return bucket_of(self.count)

    @property
    def virtual_tokens(self) -> int:
        """Placeholders before each of the task's sequences."""
        return self.count

    @property
    def finished(self) -> str:
        """PEFT's file holds the virtual tokens themselves, which the network cannot be had back from."""
        return prompt.KEY

    @property
    def inputs(self) -> tuple[Input, ...]:
        """What is trained, drawn as PEFT's PromptEncoder draws it."""
        first = prompt.embedding(self.count, self.features)
        if not self.layers:
            sizes = ((self.features, self.hidden), (self.hidden, self.hidden), (self.hidden, self.features))
            linears = [given for place, size in enumerate(sizes) for given in prompt.linear(f"mlp_head.{2 * place}", *size)]
            return (first, *linears)
        wide = 2 * self.hidden
        ends = (*prompt.linear("mlp_head.0", wide, wide), *prompt.linear("mlp_head.2", wide, self.features))
        return (first, *self._lstm(), *ends)

    def _lstm(self) -> list[Input]:
        found = []
        for layer in range(self.layers):
            features = 2 * self.hidden if layer else self.features
            for way in ("", "_reverse"):
                for name, rest in (("weight_ih", (features,)), ("weight_hh", (self.hidden,)), ("bias_ih", ()), ("bias_hh", ())):
                    own = f"lstm_head.{name}_l{layer}{way}"
                    shape = (4 * self.hidden, *rest)
                    found.append(Input(own, f"{prompt.ENCODER}.{own}", shape, bound=self.hidden**-0.5))
        return found

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """PEFT's parameters without the adapter's name, and their shapes."""
        return {given.key: given.shape for given in self.inputs}

    def place(self, graph: MuxGraph, task: str, table: str, row: int) -> None:
        """The tokens are rows of the table."""
        places = (Place(table, row, 0, self.count),)
        encoder, settings = ("lstm", {"layers": self.layers}) if self.layers else ("mlp", {})
        graph.encodings[task, NAME] = Encoding(task, NAME, encoder, self.inputs, places, settings={**settings})


def resolve(task: Task, config: Any, skeleton: nn.Module) -> list[Site]:
    """The prompt encoder that the config asks for; `config` ends up as PEFT would save it.

    Raises:
        ValueError: naming the task and the field.
    """
    refuse_fields(task, config, _SUPPORTED)
    count = prompt.virtual_tokens(task, config)
    name, module = prompt.embeddings(task, config, skeleton)
    prompt.fill_sizes(task, config, skeleton, module.embedding_dim)
    if config.encoder_hidden_size is None:
        config.encoder_hidden_size = config.token_dim
    hidden = prompt.positive(task, config, "encoder_hidden_size")
    return [Site(name, count, module.embedding_dim, hidden, _layers(task, config))]


def _layers(task: Task, config: Any) -> int:
    """Of the LSTM; an MLP, of which PEFT ignores depth and dropout as well, has none."""
    kind = getattr(config.encoder_reparameterization_type, "value", config.encoder_reparameterization_type)
    if kind == "MLP":
        return 0
    if kind != "LSTM":
        raise ValueError(f"task {task.name!r}: encoder_reparameterization_type={kind!r} is not supported (MLP, LSTM)")
    layers = prompt.positive(task, config, "encoder_num_layers")
    # torch's LSTM drops between its layers only.
    if config.encoder_dropout and layers > 1:
        raise ValueError(f"task {task.name!r}: encoder_dropout={config.encoder_dropout!r} is not supported (0)")
    return layers
