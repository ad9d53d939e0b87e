"""weights: the backbone's tensors that one rank holds, whole or a piece of each, and where they come from."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from passes.split import Split
from runtime.tables import Shard


class Source(Protocol):
    """Whatever has the values of a backbone's tensors."""

    def read(self, name: str, shard: Shard | None, like: Tensor) -> Tensor:
        """A tensor, or a piece of it.

        Args:
            name: the backbone's, the first one of a tied tensor.
            like: says the dtype and the device.

        Raises:
            ValueError: it cannot be read any more.
        """


@dataclass(frozen=True, slots=True)
class Unloaded:
    """A backbone whose values are read when somebody asks for them; `compile` takes one in place of a model.

    Args:
        model: the whole backbone, without memory, on the device that it is for (`passes.bare`).
        owner: what the source reads, if that is a model: it lives as long as this.
    """

    model: nn.Module
    source: Source
    owner: nn.Module | None = None


class Given:
    """A loaded model. It is not kept: what no rank's part shares with it is gone when its owner lets go."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)

    def read(self, name: str, shard: Shard | None, like: Tensor) -> Tensor:
        """The model's own tensor, or a copy of a piece: a view would keep the whole."""
        model = self._model()
        if model is None:
            raise ValueError(
                f"backbone: {name} is needed again, which this rank has not kept: keep the model that was compiled as long as "
                "tasks may join that begin with its tensors"
            )
        whole = model.get_parameter(name).detach()
        if shard is not None:
            whole = shard.cut(whole).clone(memory_format=torch.contiguous_format)
        return whole.to(like.device)


@dataclass(slots=True)
class Weights:
    """What this rank has of a backbone whose own tensors are fake ones (`passes.bare`).

    Args:
        model: the whole backbone.
        source: of its values.
        split: how tensor-parallel ranks share it; None: they do not.
    """

    model: nn.Module
    source: Source
    split: Split | None = None
    _first: dict[str, str] = field(default_factory=dict)
    _held: dict[tuple[str, Shard | None], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names: dict[int, str] = {}
        for name, own in self.model.named_parameters(remove_duplicate=False):
            self._first[name] = names.setdefault(id(own), name)

    def whole(self, name: str) -> Tensor:
        """A tensor of the whole backbone, for a moment: it is not kept."""
        known = self._held.get((self._first[name], None))
        return self._read(name, None) if known is None else known

    def hold(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same tensors with memory, as this rank has them; what was held and is not among them is let go of.

        Args:
            named: parameters of the rank's part of the model, fake ones, and what has memory: buffers, constants.
        """
        wanted = {name: (self._first[name], self._shard(name)) for name, own in named.items() if isinstance(own, FakeTensor)}
        held: dict[tuple[str, Shard | None], Tensor] = {}
        # Whole ones first: a piece of one that is there anyway, as of an embedding that the head is tied to, is a view.
        for name, key in sorted(wanted.items(), key=lambda own: own[1][1] is not None):
            if key in held:
                continue
            known, whole = self._held.get(key), held.get((key[0], None))
            if known is None:
                known = self._read(name, key[1]) if whole is None or key[1] is None else key[1].cut(whole)
            held[key] = known
        self._held = held
        return {name: held[wanted[name]] if name in wanted else own for name, own in named.items()}

    def _read(self, name: str, shard: Shard | None) -> Tensor:
        return self.source.read(self._first[name], shard, self.model.get_parameter(name))

    def _shard(self, name: str) -> Shard | None:
        module, _, of = name.rpartition(".")
        return self.split.shard(module, of) if self.split is not None and module in self.split.ways else None
