"""Adapted linears of a Llama-3-8B layer, forward and backward: every contender in one run, against the frozen GEMMs alone.

A case is a group of linears that read one input, tokens shared out among adapters, a rank and a dropout. Each contender's outputs
are checked before it gets a time: what is checked is the CUDA graph that is timed. Replays take turns (A B C A B C), and a ratio
is between two replays of one round, so that a drifting clock hits all alike.

A contender of the project's own lives in benchmarks/ours.py, which lists it in its `CONTENDERS`.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.linear_peers import BLOCK, PEERS, Case, Contender, Problem

WORST = 2e-2  # relative error that no output may pass, whatever plain bf16 loses
# Groups whose sum is a layer, and the single linears.
FUSED = {"qkv": (4096, (4096, 1024, 1024)), "o": (4096, (4096,)), "gate_up": (4096, (14336, 14336)), "down": (14336, (4096,))}
SINGLE = {"q_or_o": (4096, (4096,)), "k_or_v": (4096, (1024,)), "gate_or_up": (4096, (14336,)), "single_down": (14336, (4096,))}
TINY = {"qkv": (64, (64, 32, 32)), "o": (64, (64,)), "gate_up": (64, (128, 128)), "down": (128, (64,))}

CONTENDERS = dict(PEERS)


def contenders() -> dict[str, type[Contender]]:
    """The peers, the baseline first, and the project's own where benchmarks/ours.py is."""
    if importlib.util.find_spec("benchmarks.ours"):
        CONTENDERS.update(importlib.import_module("benchmarks.ours").CONTENDERS)
    return CONTENDERS


# --- Correctness -----------------------------------------------------------------------------------------------------------------


def named(case: Case, ys: list[Tensor], gradients: Any, adapted: bool) -> dict[str, Tensor]:
    """Outputs by name, y and dx cut into each adapter's rows: an error in one of many adapters must not average out."""
    dx, dA, dB = gradients
    if not adapted:
        return {f"{what}[{site}]": tensor for what, tensors in (("y", ys), ("dx", dx)) for site, tensor in enumerate(tensors)}
    found = {f"dx[{slot}]": dx[start:end] for slot, (start, end) in enumerate(case.ranges)}
    for site, y in enumerate(ys):
        found.update({f"y[{site}][{slot}]": y[start:end] for slot, (start, end) in enumerate(case.ranges)})
    for what, sites in (("dA", dA), ("dB", dB)):
        found.update({f"{what}[{site}][{slot}]": grad for site, slots in enumerate(sites) for slot, grad in enumerate(slots)})
    return found


def relative(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """|a - b| / |b| of every tensor, with one wait for the device."""
    norm = torch.linalg.vector_norm
    errors = torch.stack([norm(found[key].float() - b) / norm(b) for key, b in exact.items()])
    return dict(zip(exact, errors.tolist(), strict=True))


def mask_fault(case: Case, masks: list[Tensor] | None) -> str | None:
    """What is wrong with dropout masks: each site draws its own, and keeps 1 - p of the elements (to six standard deviations)."""
    if not case.dropout:
        return None if masks is None else "drew masks without dropout"
    if masks is None or [tuple(mask.shape) for mask in masks] != [(case.tokens, case.features) for _ in case.outs]:
        return "wants one dropout mask [T, K] for each site"
    keep = 1 - case.dropout
    allowed = 6 * math.sqrt(keep * case.dropout / (case.tokens * case.features))
    for site, mask in enumerate(masks):
        kept = mask.float().mean().item()
        if not abs(kept - keep) <= allowed:
            return f"the dropout mask of site {site} keeps {kept:.4f} of the elements instead of {keep:g}"
        if any(torch.equal(mask, other) for other in masks[:site]):
            return f"the dropout mask of site {site} is another site's"
    return None


class Reference:
    """The exact outputs (float32), adapter by adapter, and what plain bf16 eager math loses on each tensor."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.base: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for dtype in (torch.float32, torch.bfloat16):
            x = problem.x.to(dtype)
            pairs = [(dy.to(dtype), weight.to(dtype)) for dy, weight in zip(problem.dys, problem.weights, strict=True)]
            self.base[dtype] = [x @ weight.t() for _, weight in pairs], [dy @ weight for dy, weight in pairs]
        self.known: dict[bool, tuple[dict[str, Tensor], dict[str, float]]] = {}

    def outputs(self, masks: list[Tensor] | None, dtype: torch.dtype) -> dict[str, Tensor]:
        """PEFT's formula and its gradients in `dtype`, with the given dropout masks."""
        problem, case = self.problem, self.problem.case
        base_ys, base_dxs = self.base[dtype]
        found: dict[str, Tensor] = {}
        for slot, (start, end) in enumerate(case.ranges):
            for site, (base_y, base_dx) in enumerate(zip(base_ys, base_dxs, strict=True)):
                x, dy = problem.x[start:end].to(dtype), problem.dys[site][start:end].to(dtype) * case.scaling
                a, b = problem.A[site][slot].to(dtype), problem.B[site][slot].to(dtype)
                keep = None if masks is None else masks[site][start:end].to(dtype) / (1 - case.dropout)
                x = x if keep is None else x * keep
                narrow, dnarrow = x @ a.t(), dy @ b
                found[f"y[{site}][{slot}]"] = base_y[start:end] + narrow @ b.t() * case.scaling
                found[f"dA[{site}][{slot}]"] = dnarrow.t() @ x
                found[f"dB[{site}][{slot}]"] = dy.t() @ narrow
                back = dnarrow @ a
                dx = base_dx[start:end] + (back if keep is None else back * keep)
                found[f"dx[{slot}]"] = dx if site == 0 else found[f"dx[{slot}]"] + dx
        return found

    def expected(self, masks: list[Tensor] | None, adapted: bool) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Exact outputs, and the relative error that plain bf16 makes on each."""
        if masks is None and adapted in self.known:
            return self.known[adapted]
        if adapted:
            exact, plain = self.outputs(masks, torch.float32), self.outputs(masks, torch.bfloat16)
        else:
            bases = (self.base[dtype] for dtype in (torch.float32, torch.bfloat16))
            exact, plain = (named(self.problem.case, ys, (dxs, [], []), False) for ys, dxs in bases)
        answer = exact, relative(plain, exact)
        if masks is None:
            self.known[adapted] = answer
        return answer


# --- Replays ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Lane:
    """A contender on every set of buffers; `replay` runs forward and backward of all sets, `passes` times."""

    kind: type[Contender]
    instances: list[Contender]
    replay: Callable[[], None] = lambda: None
    outputs: tuple[list[Tensor], Any] = field(default_factory=lambda: ([], None))  # of the first set

    @property
    def adapted(self) -> bool:
        return getattr(self.kind, "adapted", True)

    def named_outputs(self, case: Case) -> dict[str, Tensor]:
        return named(case, *self.outputs, self.adapted)

    def check(self, case: Case, reference: Reference) -> tuple[float, str | None]:
        """The worst relative error of a replay over NaN-filled outputs, and what failed."""
        for tensor in self.named_outputs(case).values():
            tensor.fill_(math.nan)
        self.replay()
        found, masks = self.named_outputs(case), self.instances[0].masks
        if self.adapted and (wrong := mask_fault(case, masks)):
            return math.nan, wrong
        exact, plain = reference.expected(masks if self.adapted else None, self.adapted)
        shapes = {key: tuple(tensor.shape) for key, tensor in found.items()}
        wanted = {key: tuple(tensor.shape) for key, tensor in exact.items()}
        if shapes != wanted:
            return math.nan, f"wrong outputs or shapes: {sorted(set(shapes.items()) ^ set(wanted.items()))[:4]}"
        errors = relative(found, exact)
        allowed = {key: min(2 * plain[key], WORST) for key in exact}
        # A NaN compares as false: it must fail, and show as the worst.
        key = max(errors, key=lambda key: math.inf if math.isnan(errors[key]) else errors[key] / allowed[key])
        failed = None if errors[key] <= allowed[key] else f"{key}: relative error {errors[key]:.2e}, allowed {allowed[key]:.2e}"
        return max(errors.values()) if failed is None else errors[key], failed


def build(kind: type[Contender], problems: list[Problem], passes: int, device: str) -> Lane:
    """Make a lane, on a GPU with its graph."""
    lane = Lane(kind, [kind(problem) for problem in problems])

    def step(times: int) -> None:
        for _ in range(times):
            outputs = [(instance.forward(), instance.backward()) for instance in lane.instances]
        lane.outputs = outputs[0]

    if device == "cpu":
        lane.replay = lambda: step(passes)
        lane.replay()
        return lane
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    # The outer context gives the current stream back even where a failed capture does not.
    with torch.cuda.stream(side):
        step(1)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            step(passes)
    torch.cuda.current_stream().wait_stream(side)
    lane.replay = graph.replay
    return lane


def launch(lane: Lane, device: str) -> Callable[[], float]:
    """Start one replay; the answer tells its seconds once the device has been waited for."""
    if device == "cpu":
        start = time.perf_counter()
        lane.replay()
        passed = time.perf_counter() - start
        return lambda: passed
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    lane.replay()
    after.record()
    return lambda: before.elapsed_time(after) / 1e3


def timed(lanes: list[Lane], device: str, rounds: int, seconds: float) -> list[list[float]]:
    """Seconds of a replay for each round and lane; at least 3 rounds, at most `rounds`, and about `seconds` in all."""

    def play(count: int) -> list[list[float]]:
        # Nothing waits between replays: the host runs ahead, and the device goes from one graph straight to the next.
        started = [[launch(lane, device) for lane in lanes] for _ in range(count)]
        if device == "cuda":
            torch.cuda.synchronize()
        return [[read() for read in entry] for entry in started]

    first = sum(play(1)[0])
    return play(max(3, min(rounds, int(seconds / first))))


# --- A case ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Effort:
    """How long to measure: rounds at most, seconds of replays for a case, seconds for the whole grid, sets of buffers."""

    rounds: int
    seconds: float
    limit: float = math.inf
    # The smallest case moves 29 MB: two other sets push its inputs out of a 50 MB L2 before their turn comes again.
    sets: int = 3


# `full` has 576 cases, 396 of them distinct. One repetition of its six distinct groups at 8192 tokens takes 13 ms of frozen GEMMs
# on an H200; times 24 settings, 1.35 for the smaller token counts, six contenders and 1.5 for their overhead: 3.7 s. Warm-up, check
# and rounds over three sets are about 25 repetitions: 90 s, and 0.3 s a case for capture and references: 120 s (an estimate).
# `limit` cuts it where that is wrong.
GRIDS = {
    "tiny": Effort(rounds=3, seconds=0.1, sets=2),
    "quick": Effort(rounds=10, seconds=0.4),
    "bar": Effort(rounds=20, seconds=0.8),
    "full": Effort(rounds=5, seconds=0.15, limit=330),
}


def cases(grid: str) -> list[Case]:
    """The cases of a grid; of `full` the settings people ask for first come first, should the time run out."""

    def every(groups: dict[str, Any], tokens: Any, adapters: Any, ranks: Any, dropouts: Any) -> Iterator[Case]:
        for dropout in dropouts:
            for rank in ranks:
                for count in tokens:
                    for slots in adapters:
                        yield from (Case(name, k, outs, count, slots, rank, dropout) for name, (k, outs) in groups.items())

    axes: dict[str, tuple[Any, ...]] = {
        "tiny": (TINY, (256,), (1, 4), (16, 12), (0.0, 0.05)),
        "quick": (FUSED, (2048,), (4,), (16,), (0.0, 0.05)),
        "bar": (FUSED, (8192, 2048), (1, 4, 8, 32), (16,), (0.0,)),
        "full": (FUSED | SINGLE, (8192, 2048, 1024), (1, 4, 8, 32), (16, 8, 64), (0.0, 0.05)),
    }
    return list(every(*axes[grid]))


def measure(case: Case, kinds: dict[str, type[Contender]], device: str, effort: Effort) -> dict[str, Any]:
    """Check and time every contender on one case."""
    torch.manual_seed(0)
    problems = [Problem.draw(case, device, seed) for seed in range(effort.sets)]
    # About 1 ms of frozen GEMMs (at 700 TFLOP/s) in a replay, so that starting a graph does not count.
    flops = 4 * case.tokens * case.features * sum(case.outs) * effort.sets
    passes = 1 if device == "cpu" else max(1, min(8, round(1e-3 * 7e14 / flops)))
    reference = Reference(problems[0])
    found: dict[str, dict[str, Any]] = {}
    lanes: dict[str, Lane] = {}
    for name, kind in kinds.items():
        reason = getattr(kind, "unsupported", lambda case, device: None)(case, device)
        if reason:
            found[name] = {"skipped": reason}
            continue
        try:
            lane = build(kind, problems, passes, device)
            error, failed = lane.check(case, reference)
        except Exception as fault:  # one contender's fault must not end the run of the others
            error, failed = math.nan, _first_line(fault)
        found[name] = {"error": None if math.isnan(error) else error}
        if failed:
            found[name]["failed"] = failed
        else:
            lanes[name] = lane
    del reference
    times = timed(list(lanes.values()), device, effort.rounds, effort.seconds) if lanes else []
    repetitions = passes * effort.sets
    for index, name in enumerate(lanes):
        entry = found[name]
        entry["us"] = statistics.median(row[index] for row in times) / repetitions * 1e6
        if "frozen" in lanes:
            base = list(lanes).index("frozen")
            ratios = [row[index] / row[base] for row in times]
            entry |= {"ratio": statistics.median(ratios), "ratio_range": [min(ratios), max(ratios)]}
    measured = {"active": case.active, "rounds": len(times), "repetitions": repetitions}
    return {**dataclasses.asdict(case), **measured, "contenders": found}


def compile_beside(grid: list[Case], kinds: dict[str, type[Contender]]) -> None:
    """Compile every contender's kernels in processes side by side; the run then finds them in Triton's cache."""
    # Cases that differ by their adapters alone share nearly all kernels: they are one process's job.
    jobs: dict[Case, list[Case]] = {}
    for case in grid:
        jobs.setdefault(dataclasses.replace(case, group="", adapters=1), []).append(case)
    own = [kind for kind in kinds.values() if hasattr(kind, "compile")]
    start = time.perf_counter()
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        for future in [pool.submit(_compile, own, cases) for cases in jobs.values()]:
            future.result()
    print(f"compiled in {time.perf_counter() - start:.0f} s", flush=True)


def _compile(kinds: list[Any], cases: list[Case]) -> None:
    for case in cases:
        for kind in kinds:
            kind.compile(case)


# --- Report ----------------------------------------------------------------------------------------------------------------------


def layers(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sums over the four fused groups of a layer, for every setting in which all four were run."""
    settings: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for result in results:
        if result["group"] in FUSED:
            setting = tuple(result[key] for key in ("tokens", "adapters", "active", "rank", "dropout"))
            settings.setdefault(setting, {})[result["group"]] = result["contenders"]
    found = []
    for setting, groups in settings.items():
        if set(groups) != set(FUSED) or any("us" not in group["frozen"] for group in groups.values()):
            continue
        frozen = sum(group["frozen"]["us"] for group in groups.values())
        entry: dict[str, Any] = {}
        for name in groups["qkv"]:
            untimed = [group for group in FUSED if "us" not in groups[group][name]]
            if untimed:
                entry[name] = {"missing": f"no time in {', '.join(untimed)}"}
            else:
                total = sum(group[name]["us"] for group in groups.values())
                entry[name] = {"us": total, "overhead": total / frozen - 1}
        found.append({**dict(zip(("tokens", "adapters", "active", "rank", "dropout"), setting, strict=True)), "contenders": entry})
    return found


def line(result: dict[str, Any]) -> str:
    """The contenders of a case, or of a layer, in one line."""
    parts = []
    for name, entry in result["contenders"].items():
        if name == "frozen" and "us" in entry:
            parts.append(f"frozen {entry['us']:.0f} us")
        elif "overhead" in entry or "ratio" in entry:
            parts.append(f"{name} {entry.get('overhead', entry.get('ratio', 1) - 1):+.1%}")
        else:
            reason = next((f"{word} ({entry[word]})" for word in ("failed", "skipped", "missing") if word in entry), None)
            parts.append(f"{name} {reason or format(entry['us'], '.0f') + ' us'}")
    return " | ".join(parts)


def gate(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Passed if every contender that ran gave the right outputs in every case; and the worst relative error of each."""
    entries = [(str(_case(result)), name, entry) for result in results for name, entry in result["contenders"].items()]
    worst: dict[str, float] = {}
    for _, name, entry in entries:
        if entry.get("error") is not None:
            worst[name] = max(worst.get(name, 0.0), entry["error"])
    failed = [f"{case}: {name}: {entry['failed']}" for case, name, entry in entries if "failed" in entry]
    return {"passed": bool(results) and not failed, "failed": failed, "worst_relative_error": worst}


def _case(result: dict[str, Any]) -> Case:
    return Case(**{key.name: result[key.name] for key in dataclasses.fields(Case)})


def flags(parser: argparse.ArgumentParser) -> None:
    """What this benchmark reads of a command line, besides --device and --commit."""
    parser.add_argument("--grid", choices=("full", "bar", "quick"), default="bar", help="linear: the cases; a CPU runs a tiny grid")
    parser.add_argument("--rounds", type=int, help="linear: most rounds of replays for a case")
    parser.add_argument("--sets", type=int, help="linear: sets of buffers that replays rotate over")
    parser.add_argument("--limit", type=float, help="linear: seconds after which the remaining cases are left out")
    parser.add_argument("--contenders", help="linear: names, separated by commas; `frozen` is always among them")


@torch.no_grad()
def linear(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run a grid of cases and print one line for each."""
    from benchmarks.run import versions

    device = arguments.device
    grid = getattr(arguments, "grid", None) or "bar"
    grid = "tiny" if device == "cpu" else grid
    given = {key: getattr(arguments, key, None) for key in ("rounds", "sets", "limit")}
    effort = dataclasses.replace(GRIDS[grid], **{key: value for key, value in given.items() if value is not None})
    kinds = contenders()
    if getattr(arguments, "contenders", None):
        chosen = arguments.contenders.split(",")
        if unknown := set(chosen) - set(kinds):
            raise ValueError(f"contenders: {', '.join(sorted(unknown))} unknown; there are {', '.join(kinds)}")
        kinds = {name: kind for name, kind in kinds.items() if name == "frozen" or name in chosen}
    report: dict[str, Any] = {"benchmark": "linear", "grid": grid, "effort": _finite(effort), "notes": list(NOTES)}
    report["versions"] = versions(device, getattr(arguments, "commit", None))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # the reference is float32, not TF32
    try:
        report["cases"] = _run(cases(grid), kinds, device, effort, report["notes"])
    finally:
        torch.set_float32_matmul_precision(before)
    report["layers"] = layers(report["cases"])
    for layer in report["layers"]:
        print("layer " + " ".join(f"{key} {layer[key]}" for key in ("tokens", "adapters", "rank", "dropout")) + ": " + line(layer))
    report["gate"] = gate(report["cases"])
    return report


NOTES = (
    "frozen: one GEMM forward and one for dx of each linear into buffers of its own, no sum of dx, no adapter",
    "a ratio is contender / frozen in the same round of replays, median over rounds; a layer's overhead compares sums of medians",
    f"tokens are shared out in whole blocks of {BLOCK} rows; adapters beyond the blocks take turns, `active` are in a step",
    "grouped_mm: stacked adapters kept between steps, scale taken on [T, r], padding of the rank to a multiple of 8 included",
)


def _first_line(fault: Exception) -> str:
    return f"{type(fault).__name__}: {(str(fault).splitlines() or [''])[0]}"


def _finite(effort: Effort) -> dict[str, Any]:
    return {key: None if value == math.inf else value for key, value in dataclasses.asdict(effort).items()}


def _run(
    grid: list[Case], kinds: dict[str, type[Contender]], device: str, effort: Effort, notes: list[str]
) -> list[dict[str, Any]]:
    if device == "cuda":
        compile_beside(grid, kinds)
    start = time.perf_counter()
    results: list[dict[str, Any]] = []
    measured: dict[Case, dict[str, Any]] = {}
    for case in grid:
        # Some cases are one step under two names: 32 adapters that take turns are as many as there are blocks, and `o` is a single
        # linear too. Such a step is measured once.
        step = dataclasses.replace(case, group="", adapters=case.active)
        if step in measured:
            twin = measured[step]
            same = {"group": case.group, "adapters": case.adapters, "same_as": f"{twin['group']}, {twin['adapters']} adapters"}
            results.append({**twin, **same})
        elif time.perf_counter() - start > effort.limit:
            notes.append(f"{len(grid) - len(results)} cases were left out after {effort.limit:g} s, from this one on: {case}")
            print(notes[-1], flush=True)
            break
        else:
            results.append(_outlive(case, kinds, device, effort))
            measured[step] = results[-1]
        print(f"{case}: {line(results[-1])}", flush=True)
        if "ended" in results[-1]:
            break
    return results


def _outlive(case: Case, kinds: dict[str, type[Contender]], device: str, effort: Effort) -> dict[str, Any]:
    """Measure; a device that has met an illegal access answers nothing any more: keep what was measured before, and fail."""
    try:
        return measure(case, kinds, device, effort)
    except Exception as fault:
        found = {"frozen": {"failed": _first_line(fault)}}
        return {**dataclasses.asdict(case), "active": case.active, "ended": "the run ended here", "contenders": found}
