"""Run a benchmark: `python -m benchmarks.run spine --workload llama3-8b-four --out results.json`.

Every benchmark runs its correctness gate first and prints no time if that fails. Ratios within one run are what it measures;
single times depend on the machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import muxcompile
from benchmarks import gate, mirror, mux, planner, ranks
from benchmarks.cases import WORKLOADS
from benchmarks.check import predictions
from benchmarks.linear import flags, linear
from benchmarks.peers.peft_eager import PeftEager


def versions(device: str, commit: str | None) -> dict[str, Any]:
    """Commit, device and versions: what a figure means nothing without."""
    import peft
    import transformers

    found: dict[str, Any] = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    found["device"] = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    if device == "cuda":
        import triton

        found["triton"] = triton.__version__
    answer = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], capture_output=True, text=True, check=False)
    found["commit"] = commit or (answer.stdout.strip() if answer.returncode == 0 else "unknown")
    return found


def seconds(run: Callable[[], Any], device: str, *, warmup: int, repeats: int) -> list[float]:
    """Wall time of each call, the device's work included."""
    times = []
    for index in range(warmup + repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        if index >= warmup:
            times.append(time.perf_counter() - start)
    return times


def spine(arguments: argparse.Namespace) -> dict[str, Any]:
    """One mixed step of several LoRA tasks, against HF PEFT one task after another on the same backbone."""
    workload, device = WORKLOADS[arguments.workload], arguments.device
    backbone = workload.backbone(device, arguments.layers)
    start = time.perf_counter()
    options = muxcompile.Options(
        chunk_tokens=workload.chunk_tokens,
        invariant=not arguments.fast,
        gradient_checkpointing=arguments.checkpoint,
        cuda_graphs=not arguments.called,
    )
    model: Any = muxcompile.compile(backbone, workload.compiled_tasks(), options)
    report: dict[str, Any] = {
        "benchmark": "spine",
        "workload": workload.name,
        "layers": arguments.layers or workload.model["num_hidden_layers"],
        "regions": model.plan.choices["regions"],
        "gradient_checkpointing": arguments.checkpoint,
        "cuda_graphs": not arguments.called,
        "compile_seconds": time.perf_counter() - start,
        "versions": versions(device, arguments.commit),
    }
    report["gate"] = gate.against_peft(workload, model, backbone, scale=arguments.gate_scale)
    print(json.dumps(report, indent=1), flush=True)
    if not report["gate"]["passed"]:
        return report
    batches = [workload.batches(seed) for seed in range(4)]
    tokens = statistics.mean(sum(len(example["input_ids"]) for given in batch.values() for example in given) for batch in batches)
    report["tokens_per_step"] = tokens
    report["muxcompile"] = _measure(model.step, batches, device, tokens, arguments)
    if arguments.profile:
        _profile(model.step, batches[0], device, arguments.profile)
    report["chunks_per_step"] = sum(1 for action in model.executed if action.kind == "LOSS")
    weights = {name: model.state_dict(name) for name in model.tasks}
    # What is left of ours is the backbone, which both share.
    model = None
    peer = PeftEager(backbone, workload.configs(), weights)
    report["peft_one_task_after_another"] = _measure(peer.step_all, batches, device, tokens, arguments)
    report["speedup"] = report["peft_one_task_after_another"]["seconds_median"] / report["muxcompile"]["seconds_median"]
    return report


def _profile(step: Callable[[Any], Any], batch: Any, device: str, path: Path) -> None:
    """Write where the time of one step goes, by operator."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]) as found:
        step(batch)
    path.write_text(found.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=40, max_name_column_width=80))


def _measure(
    step: Callable[[Any], Any], batches: list[Any], device: str, tokens: float, arguments: argparse.Namespace
) -> dict[str, Any]:
    turn = itertools.cycle(batches)
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    times = seconds(lambda: step(next(turn)), device, warmup=arguments.warmup, repeats=arguments.repeats)
    median = statistics.median(times)
    found = {"seconds_median": median, "seconds_min": min(times), "seconds_max": max(times), "tokens_per_second": tokens / median}
    if device == "cuda":
        found["peak_gigabytes"] = torch.cuda.max_memory_allocated() / 1e9
    return found


def _rounded(report: dict[str, Any]) -> Any:
    """The report with five digits of each figure: what follows them is noise."""
    return json.loads(json.dumps(report), parse_float=lambda text: float(f"{float(text):.5g}"))


BENCHMARKS = {
    "spine": spine,
    "linear": linear,
    "check": predictions,
    "mux": mux.mux,
    "planner": planner.planner,
    "ranks": ranks.ranks,
    "mirror": mirror.mirror,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=sorted(BENCHMARKS))
    parser.add_argument("--workload", choices=sorted(WORKLOADS), default="tiny-four")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--fast", action="store_true", help="Options(invariant=False)")
    parser.add_argument("--checkpoint", action="store_true", help="Options(gradient_checkpointing=True)")
    parser.add_argument("--called", action="store_true", help="Options(cuda_graphs=False)")
    parser.add_argument("--counts", type=int, nargs="+", default=[2, 4, 8, 16, 32], help="mux: numbers of tasks")
    parser.add_argument("--fixed", type=int, nargs=3, default=[8192, 2048, 1024], help="mux: chunks of the fixed policies")
    parser.add_argument("--peft", type=int, nargs="*", default=[2, 8], help="mux: numbers of tasks for which PEFT is timed")
    parser.add_argument("--mixes", nargs="*", help="mux: these alone, as 'light uniform 2'")
    parser.add_argument("--laps", type=int, default=5, help="mux: steps of each policy, each of other examples")
    parser.add_argument("--longest", type=float, default=6.0, help="mux: seconds after which a policy is not repeated")
    parser.add_argument("--chunks", type=int, nargs="+", default=[8192], help="check: sizes of chunks")
    parser.add_argument("--calibrated", action="store_true", help="check: time the regions first, predict by these figures")
    parser.add_argument("--layers", type=int, help="fewer layers than the workload's shape has")
    parser.add_argument("--gate-scale", type=float, default=0.25, help="examples of the gate's step, as a part of a step's")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--profile", type=Path, help="write an operator profile of one step of ours")
    parser.add_argument("--commit", help="recorded where the checkout has no git history")
    parser.add_argument("--out", type=Path, help="write the report as JSON")
    flags(parser)
    planner.flags(parser)
    ranks.flags(parser)
    arguments = parser.parse_args()
    report = BENCHMARKS[arguments.benchmark](arguments)
    text = json.dumps(_rounded(report), indent=1)
    if int(os.environ.get("RANK", "0")):
        return 0 if report["gate"]["passed"] else 1
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    return 0 if report["gate"]["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
