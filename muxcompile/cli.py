"""The command line: exit code 0 is success, 2 a fault in the input and 130 an interrupt (one line on stderr), 1 anything else."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import traceback
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="muxcompile",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Train many PEFT adapters at once on one frozen backbone.",
)

_INTERRUPTED = 130  # as shells have it: 128 and the signal's number

_Jobs = Annotated[Path, typer.Argument(metavar="JOBS.YAML", help="What to train: base, tasks and their data.")]
_Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="e.g. tasks.alice.train.learning_rate=1e-3")]
_Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="On an error, print the traceback.")]


@app.callback()
def _root() -> None:
    """Train many PEFT adapters at once on one frozen backbone."""


@app.command()
def train(
    jobs: _Jobs,
    overrides: _Overrides = None,
    output_dir: Annotated[Path | None, typer.Option(help="Where adapters, metrics.jsonl and checkpoints go.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest whole checkpoint in the output folder.")] = False,
    mesh: Annotated[
        str | None,
        typer.Option(
            "--mesh", metavar="MESH", help="Replicas, stages and shards, e.g. dp=2,pp=2; one process for each, by torchrun."
        ),
    ] = None,
    verbose: _Verbose = False,
) -> None:
    """Train every task of a jobs file, all at once."""
    from rich.console import Console

    from muxcompile.jobs import load_jobs
    from muxcompile.progress import clock, peak_memory, progress_for, report_table
    from muxcompile.train import run_jobs

    loaded = load_jobs(jobs, overrides=overrides or (), output_dir=output_dir)
    if mesh is not None:
        loaded = replace(loaded, options=replace(loaded.options, mesh=mesh))
    # One process speaks for all.
    console = Console(quiet=os.environ.get("RANK", "0") != "0")
    report = run_jobs(loaded, resume=resume, progress=progress_for(console))
    console.print(report_table(report))
    most = max(standing.steps for standing in report.tasks.values())
    console.print(
        f"{most} steps in {clock(report.seconds)}, peak memory {peak_memory()}; adapters in {loaded.output_dir}",
        soft_wrap=True,
        highlight=False,
    )
    lost = [name for name, standing in report.tasks.items() if standing.quarantined is not None]
    if lost:
        print(f"muxcompile: quarantined: {', '.join(lost)}", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
def plan(
    jobs: _Jobs,
    overrides: _Overrides = None,
    save: Annotated[Path | None, typer.Option(metavar="DIR", help="Write pass texts, regions and the program there.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print plan.json instead of text.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Run each task's first batch, forward and backward: seconds predicted and measured.")
    ] = False,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Time the regions on this device first, keep the table and plan by it.")
    ] = False,
    exact: Annotated[
        bool, typer.Option("--exact", help="Hold the grouping against the optimum that scipy's HiGHS finds (muxcompile[exact]).")
    ] = False,
    verbose: _Verbose = False,
) -> None:
    """Compile a jobs file and print what would run, without training."""
    from importlib.util import find_spec

    from muxcompile.jobs import load_jobs

    if exact and find_spec("scipy") is None:
        raise ValueError("plan: --exact needs scipy: pip install 'muxcompile[exact]'")
    if save is not None and save.exists() and not save.is_dir():
        raise ValueError(f"plan: --save {save} is no folder")
    loaded = load_jobs(jobs, overrides=overrides or ())
    from muxcompile.check import check as check_step
    from muxcompile.optimum import optimum
    from muxcompile.train import compile_jobs

    compiled = compile_jobs(loaded, calibrated=calibrate)
    found = compiled.model.plan
    # Asked before a step runs: one that compiles again for a longer example has no forecast any more.
    solved = optimum(compiled.model._compiler.planned, loaded.options.objective) if exact else None
    batches = {name: tenant.feed().take() for name, tenant in compiled.tenants.items()}
    checks = check_step(compiled.model, batches) if check else []
    if save is not None:
        found.save(save)
    if as_json:
        further = {"check": [own.to_json() for own in checks]} if check else {}
        print(json.dumps(found.to_json() | further | ({"exact": solved.to_json()} if solved else {}), indent=1))
        return
    found.print()
    if solved is not None:
        print(f"\nexact\n  {solved}", end="")
    for own in checks:
        print(f"\n{own}", end="")


@app.command()
def simulate(
    mesh: Annotated[str, typer.Option(metavar="dp=N,pp=N,tp=N", help="Replicas, pipeline stages, shards; what is not named is 1.")],
    jobs: Annotated[Path | None, typer.Argument(metavar="JOBS.YAML", help="What would train; its weights are not read.")] = None,
    overrides: _Overrides = None,
    shape: Annotated[str | None, typer.Option(help="Instead of a jobs file: llama-7b, llama-13b or llama-30b.")] = None,
    tasks: Annotated[
        int | None, typer.Option(help="With --shape: LoRA tasks, of ranks 8, 16 and 32 in turn; 8 if left out.")
    ] = None,
    load: Annotated[
        str | None, typer.Option(help="With --shape: light (4 sequences a step and task), or heavy (16) if left out.")
    ] = None,
    mix: Annotated[
        str | None, typer.Option(help="With --shape: lengths, uniform (to 128), or non-uniform (to 64, 128, 256) if left out.")
    ] = None,
    device: Annotated[str, typer.Option(help="A40, H100 or H200.")] = "H100",
    gpus: Annotated[int | None, typer.Option(help="How many there are: refused unless the mesh takes them all.")] = None,
    rounds: Annotated[int, typer.Option(help="Optimizer steps of every task that are played.")] = 8,
    trace: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the predicted lanes there, for Perfetto.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
    verbose: _Verbose = False,
) -> None:
    """Predict throughput, bubbles and memory on a cluster, without running anything."""
    from runtime.comm import Mesh

    grid = Mesh.parse(mesh)
    if gpus is not None and gpus != grid.size:
        raise ValueError(f"simulate: mesh {grid} takes {grid.size} GPUs, --gpus says {gpus}")
    if (jobs is None) == (shape is None):
        raise ValueError("simulate: give a jobs file or --shape, one of the two")
    asked: dict[str, Any] = {name: value for name, value in (("tasks", tasks), ("load", load), ("mix", mix)) if value is not None}
    if jobs is not None and asked:
        raise ValueError(f"simulate: --{next(iter(asked))} goes with --shape, a jobs file has its own tasks")
    if trace is not None and not (trace.parent.is_dir() and os.access(trace.parent, os.W_OK)):
        raise ValueError(f"simulate: --trace {str(trace)!r}: {str(trace.parent)!r} is not a folder that can be written to")
    if trace is not None and trace.is_dir():
        raise ValueError(f"simulate: --trace {str(trace)!r} is a folder; name a file")
    from muxcompile import setting, simulation
    from muxcompile.jobs import load_jobs, placing
    from runtime.trace import chrome

    if jobs is not None:
        loaded = load_jobs(jobs, overrides=overrides or ())
        with placing(loaded):
            found = simulation.simulate(setting.of_jobs(loaded), grid, device, rounds)
    else:
        found = simulation.simulate(setting.of_shape(str(shape), **asked), grid, device, rounds)
    if trace is not None:
        trace.write_text(json.dumps(chrome({"predicted": found.ours.timeline.spans})) + "\n")
    print(json.dumps(found.to_json(), indent=1) if as_json else found.text(), end="\n" if as_json else "")


@app.command()
def bench(
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Measure them on this GPU and keep the tables.")] = False,
    shape: Annotated[
        list[str] | None, typer.Option(metavar="INxOUT", help="A frozen linear, e.g. 4096x14336; those of Llama-3-8B if none.")
    ] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Chunk sizes; 1024, 2048, 4096 and 8192 if none.")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16.")] = "bfloat16",
    verbose: _Verbose = False,
) -> None:
    """What is known of linears on this GPU, or --calibrate to measure: costs of the lowerings, and rates of the frozen products."""
    import torch

    from codegen import costs, products, tiling

    if not torch.cuda.is_available():
        raise ValueError("bench: there is no CUDA device; on a CPU there are no lowerings to choose among")
    if calibrate:
        from codegen import calibrate as measure

        shapes = [_shape(text) for text in shape or ("4096x4096", "4096x1024", "4096x14336", "14336x4096")]
        sizes = tokens or [1024, 2048, 4096, 8192]
        if dtype not in ("bfloat16", "float16"):
            raise ValueError(f"bench: dtype={dtype!r} must be bfloat16 or float16")
        if wrong := [count for count in sizes if count < measure.BLOCK or count % measure.BLOCK]:
            raise ValueError(f"bench: tokens={wrong[0]} must be a multiple of {measure.BLOCK}")
        print(f"written: {measure.write(measure.calibrate(shapes, sizes, getattr(torch, dtype)))}")
        every = sorted({*sizes, *tiling.chunk_sizes(torch.device("cuda"))})
        print(f"written: {products.write(products.measure(dict.fromkeys(products.of_linears(shapes), every)))}")
    for site, figures in costs.table(torch.cuda.get_device_name()).items():
        print(f"{site}: " + ", ".join(f"{form} {us:.0f} us" for form, us in figures.items()))
    for (inputs, outputs), curve in products.table(torch.cuda.get_device_name()).items():
        shown = [f"{rate / 1e12:.0f} at {rows}" for rows, rate in curve if rows & (rows - 1) == 0]
        print(f"product {inputs}x{outputs}: TFLOP/s by rows: {', '.join(shown)}")


def _shape(text: str) -> tuple[int, int]:
    """ "4096x14336" -> features in, features out."""
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) >= 16 and int(part) % 16 == 0 for part in parts):
        raise ValueError(f"bench: shape={text!r} must be INxOUT, two multiples of 16")
    return int(parts[0]), int(parts[1])


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run's output folder, or one saved adapter.")],
    server: Annotated[str, typer.Option("--check", help="The server that is to load them: vllm.")] = "vllm",
    to: Annotated[Path | None, typer.Option(metavar="DIR", help="Copy the adapters that pass there, a folder each.")] = None,
    max_lora_rank: Annotated[int, typer.Option(help="What the server is started with.")] = 16,
    verbose: _Verbose = False,
) -> None:
    """Say which adapters a server takes, and why not the others; exit code 1 if there are any."""
    from muxcompile import export as exporting

    found = exporting.check(folder, server, max_lora_rank)
    for task, reasons in found.items():
        print(f"{task}: {'; '.join(reasons) if reasons else 'ok'}")
    passed = [task for task, reasons in found.items() if not reasons]
    if to is not None and passed:
        exporting.copy(folder, to, passed)
    if len(passed) < len(found):
        raise typer.Exit(1)


@app.command()
def env(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False, verbose: _Verbose = False) -> None:
    """Versions, devices and compilers that a bug report needs."""
    facts = environment()
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")


def environment() -> dict[str, str]:
    """What `muxcompile env` prints."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from muxcompile import __version__

    facts = {"muxcompile": __version__, "python": platform.python_version(), "platform": platform.platform()}
    for name in ("torch", "triton", "transformers", "peft"):
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = "not installed"
    facts["torch"] = torch.__version__
    facts["cuda"] = torch.version.cuda or "none"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    facts["device"] = ", ".join(names) or f"cpu ({torch.get_num_threads()} threads)"
    # The search Inductor makes: CXX first, then the usual names.
    compiler = next(
        (found for name in (os.environ.get("CXX"), "g++", "clang++", "c++") if name and (found := shutil.which(name))), None
    )
    facts["c++ compiler"] = compiler or "none (regions run eagerly on CPU)"
    return facts


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    sys.exit(run_command(app, "muxcompile", sys.argv[1:] if arguments is None else arguments))


def run_command(commands: typer.Typer, name: str, arguments: list[str]) -> int:
    """Run a typer app; the exit code, after at most one line on stderr (and the traceback, where -v asks for it)."""
    # Bases are files on this machine: nothing is looked up on a hub, not even by a library in passing.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars of other libraries among our own lines
    # Threads that wait for one another spin for a moment, then sleep. SmolLM2 on two cores trains 170 to 190 tokens/s so, 80 beside
    # a busy process; where they sleep at once 120 to 140 and 105; by libgomp's default, which spins on, 165 to 180 and 53.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    with warnings.catch_warnings():
        warnings.showwarning = _warn
        return _run(commands, name, arguments, verbose="-v" in arguments or "--verbose" in arguments)


def _run(commands: typer.Typer, name: str, arguments: list[str], *, verbose: bool) -> int:
    try:
        code: Any = typer.main.get_command(commands).main(args=arguments, prog_name=name, standalone_mode=False)
        # Typer's releases make one of these three of an interrupt.
        return _fail("interrupted", code, verbose=False) if code == _INTERRUPTED else code if isinstance(code, int) else 0
    except (typer.Abort, KeyboardInterrupt):
        return _fail("interrupted", _INTERRUPTED, verbose=False)
    except (ValueError, FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as error:
        return _fail(str(error), 2, verbose)
    except Exception as error:
        if hasattr(error, "format_message"):  # how the parser of the command line reports a wrong argument
            return _fail(error.format_message() or "wrong arguments", 2, verbose=False)
        hint = "" if verbose else " (-v prints the traceback)"
        return _fail(f"{type(error).__name__}: {error}{hint}", 1, verbose)


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    """A warning as a line of ours; where in the code it was raised is no news to who runs a command."""
    print(f"muxcompile: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _fail(text: str, code: int, verbose: bool) -> int:
    if verbose:
        traceback.print_exc()
    print(f"muxcompile: {' '.join(text.split())}", file=sys.stderr)
    return code
