"""Predictions held against steps: seconds of every region, of the step, and peak bytes, for chunks of several sizes."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import torch

import muxcompile
from benchmarks import gate
from benchmarks.cases import WORKLOADS
from muxcompile.calibrate import calibrate
from muxcompile.check import check


def predictions(arguments: argparse.Namespace) -> dict[str, Any]:
    """A workload compiled for each size of `--chunks`, one step of each held against its forecast."""
    from benchmarks.run import versions

    workload = WORKLOADS[arguments.workload]
    backbone = workload.backbone(arguments.device, arguments.layers)
    report: dict[str, Any] = {
        "benchmark": "check",
        "workload": workload.name,
        "versions": versions(arguments.device, arguments.commit),
        "calibrated": arguments.calibrated,
        "sizes": {},
    }
    tasks = [dataclasses.replace(task, **_data(workload, task.name)) for task in workload.compiled_tasks()]
    names = tuple(task.name for task in tasks)
    for tokens in arguments.chunks:
        options = muxcompile.Options(
            chunk_tokens=tokens,
            groups=(names,),
            gradient_checkpointing=arguments.checkpoint,
            cuda_graphs=not arguments.called,
        )
        if arguments.calibrated:
            path, sizes = calibrate(backbone, tasks, options)
            print(f"timed chunks of {', '.join(map(str, sizes))}: {path}", flush=True)
        model: Any = muxcompile.compile(backbone, tasks, options)
        if "gate" not in report:
            report["gate"] = gate.against_peft(workload, model, backbone, scale=arguments.gate_scale)
            if not report["gate"]["passed"]:
                return report
        (found,) = check(model, workload.batches(0))
        print(f"{tokens} tokens a chunk\n{found}", flush=True)
        report["sizes"][tokens] = found.to_json()
        del model
        if arguments.device == "cuda":
            torch.cuda.empty_cache()
    return report


def _data(workload: Any, name: str) -> dict[str, Any]:
    lengths = [len(example["input_ids"]) for seed in range(8) for example in workload.batches(seed)[name]]
    return {"lengths": lengths, "batch_size": workload.tasks[name].batch}
