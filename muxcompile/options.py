"""Options: every knob of the compiler, in one frozen place that the driver alone reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh

from passes.loads import Objective
from passes.turns import Shares
from runtime.comm import Mesh

OBJECTIVES = ("time", "energy", "memory")
FAIRNESS = ("equal", "proportional")
REGION_LOWERINGS = ("auto", "eager", "inductor")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to compile. Every default is the safe one.

    Args:
        chunk_tokens: tokens in one chunk, the static row count of every kernel; rounded up to whole tiles. A longer example is cut
            into pieces, with the losses and gradients of the whole. None: 512 on CPU and 8192 on CUDA, raised to hold the longest
            `Task.max_length`, and raised again (with one warning and a new compilation) when a longer example arrives.
        invariant: a task's losses, gradients and saved adapter do not depend on its neighbours, bit for bit, at one chunk size.
            False may take faster forms that give up that (but no more than rounding); the plan says which.
        regions: how region graphs are run: "eager" (torch's calls, on CUDA joined where rows are worked on alone), "inductor"
            (needs `invariant=False`), or "auto": Inductor on CUDA with `invariant=False`, eager otherwise.
        gradient_checkpointing: True keeps the inputs of each layer alone and runs its forward again in the backward: about a third
            more time for much less memory. False keeps what costs more than a pointwise operation. None: False where that fits.
            Bits do not depend on it.
        cuda_graphs: on a GPU the regions of a chunk are launched as CUDA graphs, recorded when they are first needed: small chunks
            then do not wait for the host; so are optimizer steps. Not pieces of cut sequences, nor models in float32. Bits do not
            depend on it.
        memory_cap: bytes that the compiled model may hold, the backbone among them; what is predicted to need more is refused
            before it is compiled. None: what the GPU has left; no limit on the CPU.
        objective: what the planner makes least: "time", "energy", or "memory" (the peak, then the time).
        fairness: how often tasks step in `muxcompile train`: "equal", every task in every round; "proportional", device time is
            shared equally, so light tasks step more often; or weights by task, device time in proportion to them.
        groups: names of tasks that share chunks, group by group, instead of the planner's choice; tasks in none of them are one
            more. Groups take turns; a task's bits do not depend on its group, only on the chunk size.
        mesh: replicas, pipeline stages and tensor shards, e.g. "dp=2,pp=2", or torch's DeviceMesh with dimensions of these names.
            The script then runs in a process for each, by torchrun, and every call on the model is made by all of them, with the
            same arguments. None: this process alone.
        timeout: seconds that a rank waits for another before the job ends on both.
        reserve_slots: free rows in every adapter table beyond today's tasks, so that `add_task` need not compile again.
        skip_passes: names of optional passes to leave out ("fuse"), for bisection.
    """

    chunk_tokens: int | None = None
    invariant: bool = True
    regions: str = "auto"
    gradient_checkpointing: bool | None = None
    cuda_graphs: bool = True
    memory_cap: int | None = None
    objective: Objective = "time"
    fairness: Shares = "equal"
    groups: tuple[tuple[str, ...], ...] | None = None
    mesh: Mesh | str | Mapping[str, int] | DeviceMesh | None = None
    timeout: float = 600.0
    reserve_slots: int = 0
    skip_passes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.chunk_tokens is not None and (
            isinstance(self.chunk_tokens, bool) or not isinstance(self.chunk_tokens, int) or self.chunk_tokens < 1
        ):
            raise ValueError(f"Options: chunk_tokens={self.chunk_tokens!r} must be a positive integer or None")
        if self.regions not in REGION_LOWERINGS:
            raise ValueError(f"Options: regions={self.regions!r} must be one of {', '.join(REGION_LOWERINGS)}")
        if not isinstance(self.gradient_checkpointing, bool | None):
            raise ValueError(f"Options: gradient_checkpointing={self.gradient_checkpointing!r} must be True, False or None")
        for field in ("invariant", "cuda_graphs"):
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f"Options: {field}={getattr(self, field)!r} must be True or False")
        if self.memory_cap is not None and (
            isinstance(self.memory_cap, bool) or not isinstance(self.memory_cap, int) or self.memory_cap < 1
        ):
            raise ValueError(f"Options: memory_cap={self.memory_cap!r} must be a positive number of bytes or None")
        if self.objective not in OBJECTIVES:
            raise ValueError(f"Options: objective={self.objective!r} must be one of {', '.join(OBJECTIVES)}")
        if not isinstance(self.fairness, Mapping) and self.fairness not in FAIRNESS:
            raise ValueError(f"Options: fairness={self.fairness!r} must be one of {', '.join(FAIRNESS)}, or weights by task")
        for task, weight in self.fairness.items() if isinstance(self.fairness, Mapping) else ():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
                raise ValueError(f"Options: fairness={weight!r} for task {task!r} must be a number above 0")
        if self.groups is not None and not (
            isinstance(self.groups, tuple | list)
            and all(isinstance(group, tuple | list) and all(isinstance(name, str) for name in group) for group in self.groups)
        ):
            raise ValueError(f"Options: groups={self.groups!r} must be a tuple of tuples of task names, or None")
        if not isinstance(self.mesh, Mesh | str | Mapping | DeviceMesh | None):
            raise ValueError(f"Options: mesh={self.mesh!r} must be text as 'dp=2,pp=2', a mapping, a DeviceMesh or None")
        if self.mesh is not None:
            try:
                Mesh.of(self.mesh)
            except ValueError as error:
                raise ValueError(f"Options: {error}") from None
        if isinstance(self.timeout, bool) or not isinstance(self.timeout, int | float) or not 0 < self.timeout < float("inf"):
            raise ValueError(f"Options: timeout={self.timeout!r} must be a number of seconds above 0")
        if isinstance(self.reserve_slots, bool) or not isinstance(self.reserve_slots, int) or self.reserve_slots < 0:
            raise ValueError(f"Options: reserve_slots={self.reserve_slots!r} must be an integer of at least 0")
        if not isinstance(self.skip_passes, tuple | list) or not all(isinstance(name, str) for name in self.skip_passes):
            raise ValueError(f"Options: skip_passes={self.skip_passes!r} must be a tuple of names of passes")
        if self.invariant and self.regions == "inductor":
            raise ValueError(
                "Options: regions='inductor' needs invariant=False: its fusions, and so last bits, follow the neighbours' adapters"
            )

    def check_names(self, tasks: Sequence[str]) -> None:
        """Hold the tasks that options name against those there are.

        Raises:
            ValueError: `groups` or `fairness` name a task that does not exist; one is in two groups, or has no weight.
        """
        grouped = [name for group in self.groups or () for name in group]
        weighted = list(self.fairness) if isinstance(self.fairness, Mapping) else []
        for field, named in (("groups", grouped), ("fairness", weighted)):
            for name in named:
                if name not in tasks:
                    raise ValueError(f"Options: {field} names {name!r}, which is no task (tasks: {', '.join(tasks)})")
        if twice := next((name for name, count in Counter(grouped).items() if count > 1), None):
            raise ValueError(f"Options: groups names {twice!r} twice")
        if isinstance(self.fairness, Mapping) and (missing := next((name for name in tasks if name not in weighted), None)):
            raise ValueError(f"Options: fairness has no weight for task {missing!r}: give every task one")
