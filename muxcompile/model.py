"""CompiledModel: what a user trains with. The compiler is called again only when the tasks change."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from muxcompile.entry import ADAPTER, WEIGHTS, TaskEntry, identity
from muxcompile.result import StepResult
from muxcompile.rounds import Rounds
from runtime import adapterhub
from runtime.checkpoint import read_checkpoint, write_checkpoint
from runtime.cudagraph import STEPS, CudaGraphs
from runtime.examples import Example, Limits, read_batches
from runtime.executor import Executor
from runtime.folder import check_replaceable, replace_folder
from runtime.pack import Chunk, pack
from runtime.pipeline import Pipeline
from runtime.program import Action, Kind, Program
from runtime.region import load_source
from runtime.state import State
from runtime.unmixed import unmixed

LOSSES = ("cross_entropy",)


class CompiledModel:
    """A backbone compiled together with its tasks. Made by `muxcompile.compile` or `muxcompile.load_artifact`."""

    def __init__(self, build: Any, state: State, entries: Mapping[str, TaskEntry], compiler: Any) -> None:
        self.state = state
        self._entries = dict(entries)
        self._compiler = compiler
        recorded = any(own.recorded for own in build.groups)
        self._ranks = state.ranks
        self._pipeline = None if self._ranks is None else Pipeline(self._ranks, build.flight)
        self._rounds: Rounds | None = None
        slots = 1 if self._ranks is None else build.flight[self._ranks.stage]
        lanes = 1 if self._pipeline is None else self._pipeline.lanes
        self._recorders = tuple(CudaGraphs(state.device, slot % lanes) for slot in range(slots if recorded else 0))
        # Of their own: a step's record is none of those whose memory the chunks of the next call write over.
        state.recorders = tuple(CudaGraphs(state.device, -1 - index) for index in range(STEPS if recorded else 0))
        self._use(build)

    def _use(self, build: Any) -> None:
        self._run_with(
            build,
            [
                Executor(own, build.weights, self.state, _callables(own.sources), self._recorders, self._ranks)
                for own in build.groups
            ],
        )

    def _run_with(self, build: Any, executors: list[Executor]) -> None:
        self._build, self._executors = build, executors
        self._steps_taken: list[Action] = []
        if self._pipeline is not None:
            self._pipeline.reserve(build.groups)
            self._rounds = Rounds(self._pipeline, self.state, build.groups, executors)

    # --- what it is ---

    @property
    def plan(self) -> Any:
        """What the compiler did and why."""
        return self._build.plan

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.state.tasks)

    @property
    def chunk_tokens(self) -> int:
        """Rows of a chunk; of the largest, where groups of tasks have their own."""
        return max(self.chunks.values(), default=0)

    @property
    def chunks(self) -> dict[str, int]:
        """Rows of the chunks that carry each task: with its data, what its bits depend on."""
        return {name: own.geometry.tokens for own in self._build.groups for name in own.tasks if name in self.state.tasks}

    @property
    def turns(self) -> tuple[tuple[str, ...], ...]:
        """Tasks that step in each round of a period, by `Options.fairness`; all in every round where nothing was forecast. Who came
        later steps in every round."""
        return (self.tasks,) if self._compiler is None else self._compiler.turns(self.tasks)

    @property
    def executed(self) -> Program:
        """The program that the last call really ran: every action with the tasks that its chunk carried."""
        return Program((*(action for executor in self._executors for action in executor.executed), *self._steps_taken))

    @property
    def steps(self) -> dict[str, int]:
        """Optimizer steps taken, by task."""
        return {name: task.steps for name, task in self.state.tasks.items()}

    @property
    def examples_seen(self) -> dict[str, int]:
        """Examples of the optimizer steps taken, by task: where a task's data stands."""
        return {name: task.examples for name, task in self.state.tasks.items()}

    def learning_rate(self, task: str, ahead: int = 0) -> float:
        """The learning rate of the task's next step, or of the one that comes so many behind it."""
        state = self._task(task)
        return state.training.rate(state.steps + ahead)

    @property
    def overlaps(self) -> bool:
        """Whether rounds that are given together (`step_rounds`) take less time than one by one."""
        return self._ranks is not None and self._ranks.mesh.pp > 1

    def state_dict(self, task: str) -> dict[str, Tensor]:
        """A task's adapter under PEFT's keys, float32, on the CPU."""
        self._task(task)
        return self._whole({key: self.state.read(task, key) for key in self.state.named(task)})

    def gradients(self, task: str) -> dict[str, Tensor]:
        """A task's accumulated gradients under PEFT's keys, float32, on the CPU; zeros right after its step."""
        return self._whole({key: self.state.read(task, key, gradient=True) for key in self._task(task).keys})

    def _whole(self, own: dict[str, Tensor]) -> dict[str, Tensor]:
        """What this rank has of a task's tensors, with those of the other stages."""
        if self._ranks is None:
            return own
        parts = self._ranks.objects(own)
        return {key: value for part in parts[: self._ranks.mesh.pp * self._ranks.mesh.tp] for key, value in part.items()}

    def _task(self, name: str) -> Any:
        if name not in self.state.tasks:
            raise ValueError(f"task {name!r}: there is no such task (tasks: {', '.join(self.state.tasks) or 'none'})")
        return self.state.tasks[name]

    @property
    def _writes(self) -> bool:
        """Whether this process writes files for all."""
        return self._ranks is None or self._ranks.rank == 0

    def _meet(self) -> None:
        """What the first rank wrote is there for all."""
        if self._ranks is not None:
            self._ranks.barrier()

    # --- training ---

    def step(self, batches: Mapping[str, Any]) -> StepResult:
        """One optimizer step of every task in `batches`: all its examples, however many chunks they take.

        Raises:
            ValueError: naming the task, example and field; nothing was changed then.
        """
        if self._rounds is not None:
            (found,) = self.step_rounds([batches])
            return found
        result = self.forward_backward(batches)
        ready = [name for name in batches if self.state.tasks[name].pending is not None]
        norms = self.optim_step(ready)
        return StepResult(result.losses, result.tokens, norms, self._poller(batches))

    def step_rounds(self, rounds: Sequence[Mapping[str, Any]]) -> list[StepResult]:
        """`step` for each of some rounds. In a pipeline the next round's micro-batches begin while the last one's are on their way.

        Raises:
            ValueError: as `step`, for any of the rounds; nothing was changed then.
        """
        if self._rounds is None:
            return [self.step(batches) for batches in rounds]
        read = [self._read(batches) for batches in rounds]
        found = self._rounds.train([(examples, self._active(examples)) for examples in read])
        # As they ran, beside the micro-batches: step by step in their order.
        self._steps_taken = [_stepped(name) for own in found for name in own.norms]
        return [
            StepResult(own.losses, own.tokens, own.norms, self._poller(batches)) for own, batches in zip(found, rounds, strict=True)
        ]

    def forward_backward(self, batches: Mapping[str, Any], loss: str = "cross_entropy") -> StepResult:
        """Losses and gradients of every task in `batches`; gradients add up until the task's own `optim_step`.

        Each call's gradient is that of its mean over labelled tokens, so two calls add two means, as two `backward()` calls do.
        """
        if loss not in LOSSES:
            raise ValueError(f"loss={loss!r} must be one of {', '.join(LOSSES)}")
        examples = self._read(batches)
        active = self._active(examples)
        losses, tokens = self._run(examples, active, train=True)
        for name in active:
            task = self.state.tasks[name]
            task.pending = (task.pending or 0) + len(examples[name])
            task.losses.append(losses[name])
            task.draws += 1
        return StepResult(losses, tokens, {}, self._poller(batches))

    def optim_step(self, tasks: str | Iterable[str]) -> dict[str, Tensor]:
        """Each named task's optimizer takes one step over its accumulated gradients, which are then zero; no other task changes.

        Returns:
            The 2-norm of each task's gradients before clipping. A task in quarantine is passed over.

        Raises:
            ValueError: an unknown task, or one without accumulated gradients.
        """
        names = [tasks] if isinstance(tasks, str) else list(dict.fromkeys(tasks))
        stopped = self.state.poll([name for name in names if self._task(name)], wait=False)
        for name in names:
            if name not in stopped and self.state.tasks[name].pending is None:
                raise ValueError(f"task {name!r}: optim_step needs a forward_backward first: it has no accumulated gradients")
        ready = [name for name in names if name not in stopped]
        self._steps_taken = [_stepped(name) for name in ready]
        return dict(zip(ready, self.state.step_all(ready), strict=True)) if ready else {}

    def evaluate(self, batches: Mapping[str, Any]) -> StepResult:
        """Losses without gradients; nothing is changed."""
        examples = self._read(batches)
        losses, tokens = self._run(examples, self._active(examples), train=False)
        return StepResult(losses, tokens, {}, self._poller(batches))

    def _poller(self, names: Iterable[str]) -> Callable[[], dict[str, str]]:
        known = list(names)
        return lambda: self.state.outcomes([name for name in known if name in self.state.tasks])

    def _read(self, batches: Mapping[str, Any]) -> dict[str, list[Example]]:
        build = self._build
        limit = build.positions if build.positions is not None else 2**31
        longest = {}
        for name, entry in self._entries.items():
            own, taken = entry.max_length, sum(self._prompt(name))
            room = f"the backbone's limit{f' less {taken} virtual tokens' if taken else ''}"
            longest[name] = (own, "max_length") if own is not None and own <= limit - taken else (limit - taken, room)
        read = read_batches(batches, Limits(build.vocabulary, build.groups[0].head.vocab, longest))
        examples = {name: [example.prompted(*self._prompt(name)) for example in given] for name, given in read.items()}
        self._hold(examples)
        return examples

    def _prompt(self, name: str) -> tuple[int, int]:
        """A task's virtual tokens before each sequence, and what its positions begin with."""
        training = self.state.tasks[name].training
        return training.virtual_tokens, training.position_offset

    def _hold(self, examples: Mapping[str, Sequence[Example]]) -> None:
        """Compile again for an example longer than any before, unless a chunk holds it or longer ones are cut."""
        held = {name: own for own in self._build.groups for name in own.tasks if not own.carried}
        longest = {name: max(len(example) for example in given) for name, given in examples.items()}
        over = {name: tokens for name, tokens in longest.items() if name in held and tokens > held[name].geometry.tokens}
        if not over:
            return
        name, tokens = max(over.items(), key=lambda item: item[1])
        if self._compiler is None:
            raise ValueError(
                f"task {name!r}: input_ids has {tokens} tokens, the artifact was compiled for at most {self.chunks[name]}: give "
                "Task.max_length when compiling it"
            )
        warnings.warn(
            f"task {name!r} has an example of {tokens} tokens and a chunk holds {self.chunks[name]}: compiling again "
            f"{'to cut it' if self._compiler.cuts(name) else 'for more'} (set Task.max_length to have that from the start)",
            stacklevel=4,
        )
        self._rebuild(self._adapters(), longest=over)

    def _active(self, examples: Mapping[str, Sequence[Example]]) -> list[str]:
        """Tasks that run: in good standing and with something to learn from."""
        stopped = self.state.poll(list(examples), wait=False)
        active = []
        for name, given in examples.items():
            if name in stopped:
                continue
            if sum(example.labelled for example in given) == 0:
                warnings.warn(f"task {name!r}: no labelled token in this batch; the task is skipped", stacklevel=4)
                continue
            active.append(name)
        return active

    def _run(
        self, examples: Mapping[str, list[Example]], active: list[str], *, train: bool
    ) -> tuple[dict[str, Tensor], dict[str, int]]:
        if self._rounds is not None:
            self._steps_taken = []
            found = self._rounds.run(examples, active, train=train)
            return found.losses, found.tokens
        tokens = {name: sum(example.labelled for example in given) for name, given in examples.items()}
        nan = torch.full((), math.nan, dtype=torch.float32, device=self.state.device)
        losses = dict.fromkeys(examples, nan)
        self._steps_taken = []
        groups = zip(self._build.groups, self._executors, strict=True)
        # The largest chunks first: what runs later then finds room in the memory that they were recorded in.
        for group, executor in sorted(groups, key=lambda pair: -pair[0].geometry.tokens):
            own = [name for name in active if name in group.tasks]
            mine = {name: examples[name] for name in own}
            chunks: Iterable[Chunk] = pack(mine, group.geometry, shared=group.head.shared) if own else []
            total = executor.run(chunks, own, train=train)
            for index, name in enumerate(own):
                losses[name] = total.sums[index, 0, 0] / tokens[name]
        return losses, tokens

    # --- tasks come and go ---

    @unmixed()
    @torch.enable_grad()
    def add_task(self, task: Any) -> None:
        """Admit one more task. Regions are compiled again only where its kind, rank bucket or sites are new.

        Raises:
            ValueError: naming the task and the field, or the memory that it lacks; nothing was changed then.
        """
        from muxcompile.driver import load_weights, training  # the compiler: who only runs an artifact never imports it

        self._require_compiler("add_task")
        adapter = self._compiler.resolve_new(task, self.tasks)
        self._compiler.admit([*self._adapters(), adapter])
        self._rebuild([*self._adapters(), adapter], newcomers={adapter.task.name: training(adapter)})
        self._entries[adapter.task.name] = self._compiler.entry(adapter)
        self._compiler.adapters[adapter.task.name] = replace(adapter, weights={})
        load_weights(self.state, adapter)
        self._compiler.warn_of_turns(adapter.task.name)

    def remove_task(self, name: str) -> None:
        """Forget a task; its slots are free for another. Save it first if it is wanted."""
        self._task(name)
        self.state.expel(name)
        del self._entries[name]
        if self._compiler is not None:
            self._compiler.forget(name)

    def _require_compiler(self, what: str) -> None:
        if self._compiler is None:
            raise ValueError(f"{what}: a model loaded from an artifact cannot be compiled again; start from muxcompile.compile")

    def _adapters(self) -> list[Any]:
        return [self._compiler.adapters[name] for name in self.tasks]

    def _rebuild(
        self,
        adapters: list[Any],
        *,
        newcomers: Mapping[str, Any] | None = None,
        longest: Mapping[str, int] | None = None,
        sizes: Mapping[str, int] | None = None,
    ) -> None:
        """Compile again for these tasks; `longest`: examples that some of them have now; `sizes`: of their chunks, at least."""
        build = self._compiler.rebuild(adapters, self._compiler.layout, longest=longest or {}, sizes=sizes or {})
        self.state.relayout(build.tables, build.params, newcomers or {}, build.encodings, build.weights)
        self._use(build)

    # --- files ---

    def save_pretrained(self, directory: str | Path, tasks: str | Iterable[str] | None = None) -> None:
        """Write every task's adapter to `directory/<task>/` in PEFT's layout (AdapterHub's for kinds that PEFT lacks and it has).

        `tasks`: a name, or several; None: all. Each folder is replaced whole. Of prompts that an encoder computes PEFT's file holds
        the outcome alone: it serves, but only a checkpoint goes on training. So with a start of LoRA that is drawn at random out of
        the weight (pissa_niter_N): the file is a plain LoRA of twice the rank.

        Raises:
            ValueError: an unknown task, or a folder that holds more than a saved adapter; nothing was written then.
        """
        from safetensors.torch import save_file

        names = list(self.tasks if tasks is None else [tasks] if isinstance(tasks, str) else tasks)
        for name in names:
            self._task(name)
            check_replaceable(Path(directory) / name, ADAPTER, self._ranks, f"task {name!r}: save_pretrained: ")
        for name in names:
            tensors, entry = self._whole(self.state.file(name)), self._entries[name]
            if not self._writes:
                continue
            with replace_folder(Path(directory) / name, ADAPTER) as folder:
                if entry.layout == "adapterhub":
                    adapterhub.write(folder, name, entry.config, tensors)
                    continue
                save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
                (folder / adapterhub.CONFIG_FILE).write_text(json.dumps(entry.config, indent=2, sort_keys=True) + "\n")
        self._meet()

    def save_checkpoint(self, directory: str | Path) -> None:
        """Write what training needs to go on: per task weights, optimizer, counters. The folder appears whole or not at all.

        Raises:
            ValueError: gradients wait for an `optim_step`, or the folder holds more than a checkpoint; nothing was written then.
        """
        self._require_no_gradients("save_checkpoint")
        write_checkpoint(Path(directory), self.state, self.chunks, identity(self._build, self._entries, self._ranks))
        self._meet()

    def load_checkpoint(self, directory: str | Path) -> None:
        """Go on from a checkpoint of the same tasks, with the numbers that they are trained by now.

        Weights, optimizer state and counters are the checkpoint's. Learning rate, schedule, betas, decay, clipping, dropout and
        seed are the tasks' own and may differ from those of the run that was saved; its bits go on only where they do not.

        Raises:
            ValueError: a file is missing or damaged; tasks, an optimizer, a tensor's shape, a config's field that changes what the
                tensors do (lora_alpha) or, in the same dtype, the backbone differs. Nothing was changed then.
        """
        restore = read_checkpoint(Path(directory), self.state, identity(self._build, self._entries, self._ranks))
        if self._compiler is not None:
            # The bits of the run that is gone on with are those of its chunk sizes; larger ones that the user asked for win.
            asked, now = self._compiler.options.chunk_tokens is not None, self.chunks
            wanted = {name: max(size, now[name]) if asked else size for name, size in restore.chunk_tokens.items()}
            if wanted != {name: now[name] for name in wanted}:
                self._rebuild(self._adapters(), sizes=wanted)
        restore.apply()

    def save_artifact(self, directory: str | Path) -> None:
        """Write the compiled model as a folder that `muxcompile.load_artifact` runs without compiling.

        Raises:
            ValueError: this is one rank's part of a model, gradients wait for an `optim_step`, or the folder holds more than an
                artifact; nothing was written then.
        """
        if self._ranks is not None:
            raise ValueError(f"save_artifact: mesh {self._ranks.mesh}: a rank has a part of the model, which no artifact holds")
        self._require_no_gradients("save_artifact")
        from muxcompile.artifact import save

        save(self._build, self.state, self._entries, Path(directory))

    def _require_no_gradients(self, what: str) -> None:
        if waiting := [name for name, task in self.state.tasks.items() if task.pending is not None]:
            raise ValueError(f"task {waiting[0]!r}: {what} between forward_backward and optim_step would lose its gradients")


def _stepped(name: str) -> Action:
    return Action(0, "compute", Kind.STEP, "optimizer", (name,), 0, (), ())


def _callables(sources: Mapping[str, str]) -> dict[str, Any]:
    return {name: load_source(source, f"<muxcompile {name}>")["call"] for name, source in sources.items()}
