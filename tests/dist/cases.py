"""What each rank does in the tests of meshes; every function returns what it found wrong, by the rank's own eyes."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from peft import IA3Config, LNTuningConfig, LoraConfig, PrefixTuningConfig, VeraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

import muxcompile
from passes import replay
from runtime.trace import Trace, aligned, chrome
from tests.muxcompile.peft_reference import Example, equal, examples, llama

LENGTHS = ((7, 1, 19), (33, 2), (12, 5, 17), (40, 3, 3, 21), (3, 16, 9))
TOLERANCE = 1e-5
# Kinds whose tensors lie in all stages, in some, in the first, in the last, and that encoders compute.
ADAPTERS: dict[str, Any] = {
    "wide": LoraConfig(r=5, target_modules="all-linear"),
    "early": LoraConfig(r=3, target_modules=["q_proj"], layers_to_transform=[0]),
    "norms": LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm", "norm"]),
    "dora": LoraConfig(r=4, target_modules=["v_proj", "down_proj"], use_dora=True),
    "head": LoraConfig(r=2, target_modules=["lm_head", "o_proj"], lora_dropout=0.2),
    "ia3": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
}
# Kinds of which several stages, on a backbone whose head is its embedding, read what one tensor comes to.
SHARED: dict[str, Any] = {
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "tied": LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], trainable_token_indices=[3, 80, 1]),
    "projected": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6, prefix_projection=True, encoder_hidden_size=12),
    "vera": VeraConfig(r=5, target_modules=["q_proj", "down_proj"]),
}
KINDS = {"apart": ADAPTERS, "shared": SHARED}
# Tasks that are also trained alone, and two that are trained until a rank is gone.
OWN_BITS = {"apart": ("wide", "dora", "head"), "shared": ("tied", "projected")}
FIRST_TWO = {name: ADAPTERS[name] for name in ("wide", "early")}


def tasks(adapters: Mapping[str, Any], **fields: Any) -> list[muxcompile.Task]:
    found = []
    for number, (name, adapter) in enumerate(adapters.items()):
        own: dict[str, Any] = {"learning_rate": 0.02, "optimizer": ("adamw", "sgd")[number % 2]}
        own["max_grad_norm"] = (None, 0.3)[number // 2 % 2]
        found.append(muxcompile.Task(name, adapter, **{**own, **fields}))
    return found


def batches(adapters: Mapping[str, Any], step: int) -> dict[str, list[Example]]:
    """Of other lengths at each step."""
    return {
        name: examples(100 * step + number, LENGTHS[(number + step) % len(LENGTHS)]) for number, name in enumerate(adapters)
    }


def fill(model: Any, name: str) -> None:
    """Values in every tensor of a task, by its name and key alone: nothing then starts at 0 or 1."""
    for number, key in enumerate(sorted(model.state_dict(name))):
        if model.state.holds(name, key):
            generator = torch.Generator().manual_seed(1000 * len(name) + number)
            value = model.state.read(name, key)
            model.state.write(name, key, value + 0.1 * torch.randn(value.shape, generator=generator))


def compiled(adapters: Mapping[str, Any], mesh: str | None, *, groups: Any = None, timeout: float = 100.0, memory_cap: int | None = None, **fields: Any) -> Any:
    backbone = llama(5, num_hidden_layers=3, tie_word_embeddings=not adapters.keys().isdisjoint(SHARED))
    options = muxcompile.Options(chunk_tokens=64, mesh=mesh, groups=groups, timeout=timeout, memory_cap=memory_cap)
    model = muxcompile.compile(backbone, tasks(adapters, **fields), options)
    for name in adapters:
        fill(model, name)
    return model


def differ(what: str, got: Mapping[str, Any], want: Mapping[str, Any], scale: float = 1.0) -> list[str]:
    """Tensors that are not the same to rounding: against the largest of their kind, or of themselves."""
    if list(sorted(got)) != list(sorted(want)):
        return [f"{what}: {sorted(set(got) ^ set(want))} are not in both"]
    largest = max((float(torch.as_tensor(value).abs().max()) for value in want.values()), default=0.0)
    wrong = []
    for key, value in want.items():
        error = float((torch.as_tensor(got[key]) - torch.as_tensor(value)).abs().max())
        allowed = TOLERANCE * float(torch.as_tensor(value).abs().max()) + 1e-6 * scale * largest
        if not error <= allowed:
            wrong.append(f"{what} {key}: off by {error:.2e}, {allowed:.2e} allowed")
    return wrong


def numbers(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu() for name, value in found.items()}


def outcomes(model: Any, adapters: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What a model's tasks come to: gradients, norms, and some rounds, one of them without a task."""
    found: dict[str, dict[str, Any]] = {}
    for step in (0, 5):
        model.forward_backward(batches(adapters, step))
    for name in adapters:
        found[f"{name}: gradient"] = model.gradients(name)
    found["norm"] = numbers(model.optim_step(list(adapters)))
    rounds = [batches(adapters, step) for step in range(1, 5)]
    rounds[1].pop(next(iter(adapters)))
    for step, result in enumerate(model.step_rounds(rounds)):
        found[f"round {step}: loss"] = numbers(result.losses)
        found[f"round {step}: norm"] = numbers(result.grad_norms)
        found[f"round {step}: tokens"] = result.tokens
        assert not result.quarantined, result.quarantined
    for name in adapters:
        found[f"{name}: weights"] = model.state_dict(name)
    found["evaluation"] = numbers(model.evaluate(batches(adapters, 7)).losses)
    found["steps"] = model.steps
    return found


def same_as_alone(kinds: str, meshes: Sequence[str], groups: Any, folder: str) -> list[str]:
    """Losses, every gradient, norms and adapters of some rounds are those of one process, on each of some meshes.

    Args:
        kinds: which of `KINDS`.
        folder: a checkpoint of the first mesh goes there; the others, and one process, go on from it.
    """
    adapters = KINDS[kinds]
    wanted = outcomes(one := compiled(adapters, None, groups=groups), adapters)
    wrong = []
    for mesh in meshes:
        many = compiled(adapters, mesh, groups=groups)
        found = outcomes(many, adapters)
        for what, want in wanted.items():
            # What several steps have moved carries the rounding of all of them.
            wrong += [f"{mesh}: {text}" for text in differ(what, found[what], want, 10 if "weights" in what or "round" in what else 1)]
        if mesh == meshes[0]:
            many.save_checkpoint(folder)
        for model in (one, many):
            model.load_checkpoint(folder)
        given = batches(adapters, 9)
        both = [numbers(model.step(given).losses) for model in (one, many)]
        wrong += [f"{mesh}: resumed: {text}" for text in differ("loss", both[1], both[0])]
        for name in adapters:
            wrong += [
                f"{mesh}: resumed: {text}" for text in differ(f"{name}: weights", many.state_dict(name), one.state_dict(name), 10)
            ]
    return wrong


def taking_turns(mesh: str) -> list[str]:
    """Rounds in which not all tasks step, of so few sequences that a replica has no chunk of some, are those of one process."""
    counts = [{"wide": 1}, {"wide": 1, "early": 3}] * 3
    rounds = [
        {name: examples(10 * step + number, [60 - number] * given) for number, (name, given) in enumerate(own.items())}
        for step, own in enumerate(counts)
    ]
    outcomes = []
    for each in (None, mesh):
        model = compiled(FIRST_TWO, each, groups=(("wide",), ("early",)))
        results = model.step_rounds(rounds)
        losses = {f"{step} {name}": value for step, result in enumerate(results) for name, value in numbers(result.losses).items()}
        outcomes.append({"loss": losses} | {f"{name}: weights": model.state_dict(name) for name in FIRST_TWO})
    wanted, found = outcomes
    return [text for what, want in wanted.items() for text in differ(what, found[what], want, 10)]


def saved_by_all(mesh: str, folder: str) -> list[str]:
    """A folder of somebody's, or another config's checkpoint, is refused on every rank, and they can go on."""
    model, path, wrong = compiled(FIRST_TWO, mesh), Path(folder), []
    model.save_checkpoint(path / "ours")
    (path / "ours" / "wide").mkdir(exist_ok=True)
    (path / "theirs" / "early").mkdir(parents=True, exist_ok=True)
    (path / "theirs" / "early" / "notes.txt").touch()
    dist.barrier()
    other = compiled({**FIRST_TWO, "early": LoraConfig(r=3, lora_alpha=99, target_modules=["q_proj"], layers_to_transform=[0])}, mesh)
    for what, call in (
        ("holds 'early'", lambda: model.save_checkpoint(path / "theirs")),
        ("task 'early': save_pretrained: ", lambda: model.save_pretrained(path / "theirs")),
        ("task 'early' was trained with lora_alpha=8, not 99", lambda: other.load_checkpoint(path / "ours")),
    ):
        try:
            call()
        except ValueError as error:
            wrong += [f"refused: {error}"] * (what not in str(error))
        else:
            wrong.append(f"{what}: nothing was refused")
    model.load_checkpoint(path / "ours")
    return wrong + ["a refused folder was written to"] * (sorted(own.name for own in (path / "theirs").iterdir()) != ["early"])


class _Late:
    """A device's event that the first rank alone sees passed."""

    def query(self) -> bool:
        return dist.get_rank() == 0


def learnt_late(mesh: str) -> list[str]:
    """Ranks whose devices are not equally far run the same tasks; any of them may ask who is in quarantine."""
    model = compiled(FIRST_TWO, mesh)
    key = next(key for key in model.state_dict("wide") if model.state.holds("wide", key))
    model.state.write("wide", key, torch.full_like(model.state.read("wide", key), math.nan))
    with mock.patch("runtime.state._event", lambda device: _Late()):
        first = model.step(batches(FIRST_TWO, 0))
        wrong = []
        if dist.get_rank() == 1:
            wrong += ["nobody is in quarantine"] * ("wide" not in first.quarantined)
        for step in range(1, 6):
            losses = numbers(model.step(batches(FIRST_TWO, step)).losses)
            wrong += [f"step {step}: {losses}"] * (not math.isfinite(losses["early"]) or not math.isnan(losses["wide"]))
    wrong += [f"{model.steps}"] * (model.steps != {"wide": 0, "early": 6})
    return wrong


def two_models() -> list[str]:
    """A model's shards sum with its own ranks, whatever was compiled behind it."""
    one, given = compiled(FIRST_TWO, "tp=2"), batches(FIRST_TWO, 0)
    before = numbers(one.evaluate(given).losses)
    compiled(FIRST_TWO, "dp=2")
    return differ("loss", numbers(one.evaluate(given).losses), before)


def refused_by_all() -> list[str]:
    """What does not fit the memory of one rank alone joins on none, and training goes on."""
    model = compiled({"wide": ADAPTERS["wide"]}, "dp=2", memory_cap=1 << 30)
    if dist.get_rank() == 1:
        model._compiler.cap = 1 << 10
    try:
        model.add_task(muxcompile.Task("early", ADAPTERS["early"]))
    except ValueError as error:
        wrong = [f"refused: {error}"] * ("task 'early'" not in str(error))
    else:
        wrong = ["a task was admitted"]
    losses = numbers(model.step(batches({"wide": None}, 0)).losses)
    return wrong + [f"{losses}"] * (not math.isfinite(losses["wide"]))


def checkpoint_refused_by_all(folder: str) -> list[str]:
    """What one stage lacks in a checkpoint keeps all from loading it; what they had is as it was."""
    model = compiled(FIRST_TWO, "pp=2", optimizer="adamw")
    model.step(batches(FIRST_TWO, 0))
    model.save_checkpoint(folder)
    model.step(batches(FIRST_TWO, 1))
    before, wrong = {name: model.state_dict(name) for name in FIRST_TWO}, []
    file = Path(folder, "wide", "state.safetensors")
    whole = load_file(file)
    dist.barrier()
    for begins, ends in (("weight/", "lora_A.weight"), ("optimizer/", "exp_avg")):
        gone = next(key for key in whole if key.startswith(begins) and "layers.2." in key and key.endswith(ends))
        if dist.get_rank() == 0:
            save_file({key: value for key, value in whole.items() if key != gone}, file)
        dist.barrier()
        try:
            model.load_checkpoint(folder)
        except ValueError as error:
            wrong += [f"refused: {error}"] * ("task 'wide'" not in str(error))
        else:
            wrong += [f"loaded without {gone}"]
        dist.barrier()
    wrong += [f"{name} changed" for name in FIRST_TWO if not equal(before[name], model.state_dict(name))]
    wrong += [f"{model.steps}"] * (model.steps != {"wide": 2, "early": 2})
    return wrong


def same_bits_alone(kinds: str, mesh: str) -> list[str]:
    """A task's losses and adapter do not depend on its neighbours, within a mesh."""
    wrong: list[str] = []
    adapters = KINDS[kinds]
    rounds = [batches(adapters, step) for step in range(3)]
    together = compiled(adapters, mesh, optimizer="adamw", max_grad_norm=0.3)
    found = together.step_rounds([{name: given[name] for name in adapters} for given in rounds])
    for name in OWN_BITS[kinds]:
        alone = compiled({name: adapters[name]}, mesh, optimizer="adamw", max_grad_norm=0.3)
        results = alone.step_rounds([{name: given[name]} for given in rounds])
        losses = [[float(result.losses[name]) for result in run] for run in (results, found)]
        wrong += [f"{name}: losses {losses}"] * (losses[0] != losses[1])
        wrong += [f"{name}: weights"] * (not equal(alone.state_dict(name), together.state_dict(name)))
    return wrong


PLANNED = {name: ADAPTERS[name] for name in ("wide", "early", "norms", "ia3")}


def planned(mesh: str | None) -> Any:
    """A model of tasks whose lengths the planner knows."""
    lengths = [length for own in LENGTHS for length in own]
    model = muxcompile.compile(
        llama(5, num_hidden_layers=3), tasks(PLANNED, lengths=lengths, batch_size=3), muxcompile.Options(mesh=mesh)
    )
    for name in PLANNED:
        fill(model, name)
    return model


def planned_groups(mesh: str) -> list[str]:
    """With the lengths known, the planner gives a pipeline groups that interleave, and they train as one process does."""
    one, many = planned(None), planned(mesh)
    rounds = [batches(PLANNED, step) for step in range(3)]
    wrong = []
    for step, (want, got) in enumerate(zip(one.step_rounds(rounds), many.step_rounds(rounds), strict=True)):
        wrong += differ(f"round {step}: loss", numbers(got.losses), numbers(want.losses), 10)
    for name in PLANNED:
        wrong += differ(f"{name}: weights", many.state_dict(name), one.state_dict(name), 10)
    plan = many.plan
    wrong += [str(plan.choices)] * ("2 stages (0: embed to" not in str(plan.choices))
    wrong += ["no SEND in the program"] * ("send_down SEND 1" not in str(plan.program))
    wrong += [f"no stages in {plan.choices}"] * ("over 2 stages" not in plan.choices[next(k for k in plan.choices if "tasks" in k)])
    wrong += [f"{len(plan.groups)} groups"] * (len(plan.groups) < 2)
    return wrong


def traced() -> tuple[dict[str, Any], dict[str, float]]:
    """Some rounds of two groups over two stages as a trace of both ranks, measured and played again; and seconds of the parts."""
    kinds = {name: ADAPTERS[name] for name in ("wide", "norms", "early")}
    model = compiled(kinds, "pp=2", groups=(("wide", "norms"), ("early",)))
    trace = Trace(torch.device("cpu"))
    for executor in model._executors:
        executor.trace = trace
    model.step_rounds([batches(kinds, step) for step in range(3)])
    model.step(batches(kinds, 3))
    ranks = model.state.ranks
    spans = ranks.objects(trace.actions(ranks.stage))
    seconds = replay.measured(trace.runs, spans)
    runs = [[own for each in spans for own in each[index]] for index in range(len(trace.runs))]
    expected = aligned(replay.play(trace.runs, seconds, lambda rows: 1e-6 * rows), runs)
    found = chrome({"predicted": expected, "measured": [own for run in runs for own in run]})
    return found, {f"{part.kind} {part.stage} {'+'.join(part.tasks)} {part.rows}": own for part, own in seconds.items()}


def left_alone(how: str, seconds: float, over: str) -> str:
    """What a rank says when another one is gone, or hangs, in the middle of training.

    Args:
        seconds: that it may wait for another, anywhere; longer than ranks that share a host are apart when they compile.
        over: a file that is there when it has said so; until then the other one hangs.
    """
    model = compiled(FIRST_TWO, "pp=2", timeout=seconds)
    given = batches(FIRST_TWO, 1)
    model.step(given)
    if model.state.ranks.rank == 1:
        while how == "hangs" and not os.path.exists(over):
            time.sleep(0.1)
        os._exit(0)
    start = time.monotonic()
    try:
        model.step_rounds([given] * 3)
    except RuntimeError as error:
        took = time.monotonic() - start
        # Who is gone is noticed, who hangs is waited for.
        early, late = (0.0, 0.9 * seconds) if how == "dies" else (0.9 * seconds, 3 * seconds)
        return f"{'in time' if early <= took <= late else f'after {took:.1f} s'}: {error}"
    finally:
        open(over, "w").close()
    return "nothing was noticed"


def get_ready() -> None:
    """Compile what ranks compile above, as one process does: templates are the same on a pipeline, with replicas and alone."""
    for kinds, adapters in KINDS.items():
        outcomes(compiled(adapters, None), adapters)
        for name in OWN_BITS[kinds]:
            compiled({name: adapters[name]}, None)
    compiled(FIRST_TWO, None)
    planned(None)
