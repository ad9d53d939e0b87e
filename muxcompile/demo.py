"""`python -m muxcompile.demo`: four tenants on one real backbone, and the same steps with Hugging Face PEFT to compare."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from muxcompile.cli import run_command

if TYPE_CHECKING:
    from muxcompile.demo_peft import PeftRun
    from muxcompile.train import Compiled, Report

STEPS = 24  # optimizer steps of each tenant: under two minutes on two CPU cores
PEFT_STEPS = 10  # the most steps of each tenant that are repeated with PEFT
PEFT_SECONDS = 75.0  # and what they may take
WHOLE_SECONDS = 270.0  # the comparison is shortened further where the whole demo would take longer than this
LARGEST_DIFFERENCE = 1e-3  # of a first-step loss between ours and PEFT's, before the demo calls it an error

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def demo(
    output_dir: Annotated[Path, typer.Option(help="Where data, jobs file, metrics and adapters go.")] = Path("demo-out"),
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="On an error, print the traceback.")] = False,
) -> None:
    """Train four tenants at once on SmolLM2-135M-Instruct, then take the same steps with HF PEFT, one task after another."""
    from muxcompile.demo_peft import answers
    from muxcompile.jobs import load_jobs
    from muxcompile.progress import peak_memory, progress_for
    from muxcompile.train import compile_jobs, train

    console, began = Console(), time.perf_counter()
    progress = progress_for(console)
    path = prepare_folder(output_dir)
    progress.note(f"data and jobs file are in {output_dir}; the same training by hand: muxcompile train {path}")
    jobs = load_jobs(path)
    compiled = compile_jobs(jobs, progress=progress)
    initial = output_dir / "initial"
    compiled.model.save_pretrained(initial)
    ready = time.perf_counter()
    report = train(compiled.tenants, compiled.model, jobs.output_dir, progress=progress)
    memory = peak_memory()
    trained = time.perf_counter()
    steps = peft_steps(report, WHOLE_SECONDS - (trained - began))
    progress.note(f"the first {steps} steps of every tenant again, with HF PEFT, one task after another")
    peft = compare(compiled, initial, steps)
    show_losses(console, compiled, report)
    console.print(
        f"reading data, loading and compiling {ready - began:.0f} s, training {trained - ready:.0f} s, peak memory {memory}"
    )
    differ = show_comparison(console, compiled, report, peft, steps)
    questions = held_out_questions(output_dir / "capitals-eval.jsonl", 3)
    replies = answers(compiled.backbone, compiled.tokenizer, jobs.output_dir / "capitals", [prompt for prompt, _ in questions])
    show_answers(console, questions, replies)
    console.print(f"adapters and metrics.jsonl are in {jobs.output_dir}; the demo took {time.perf_counter() - began:.0f} s")
    faults = list(found_faults(compiled, report, differ))
    for fault in faults:
        print(f"muxcompile: {fault}", file=sys.stderr)
    if faults:
        raise typer.Exit(1)


def prepare_folder(folder: Path) -> Path:
    """Write data and jobs file; take away what an earlier demo trained in the same folder."""
    from muxcompile.demo_data import jobs_yaml, write_texts
    from muxcompile.metrics import FILE

    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "run" / FILE).is_file():
        shutil.rmtree(folder / "run")
    write_texts(folder)
    path = folder / "jobs.yaml"
    path.write_text(jobs_yaml(STEPS), encoding="utf-8")
    return path


def peft_steps(report: Report, seconds_left: float) -> int:
    """Steps to repeat with PEFT: as many as fit into the time if PEFT took a third longer than we did, but two at least."""
    ours = sum(report.step_seconds) / len(report.step_seconds)
    return max(2, min(PEFT_STEPS, int(min(PEFT_SECONDS, seconds_left) / (1.33 * ours))))


def compare(compiled: Compiled, initial: Path, steps: int) -> dict[str, PeftRun]:
    """The first steps of every tenant with PEFT, from the adapters that our run began with."""
    from muxcompile.demo_peft import run_with_peft

    pad = compiled.tokenizer.pad_token_id
    return {n: run_with_peft(compiled.backbone, tenant, initial / n, steps, pad) for n, tenant in compiled.tenants.items()}


def show_losses(console: Console, compiled: Compiled, report: Report) -> None:
    """Per tenant: what was trained, and its held-out loss before and after."""
    table = Table(title=f"{len(compiled.tenants)} tenants at once on one backbone, {report.steps} steps each")
    for heading in ("tenant", "rank", "lr", "examples", "tokens", "held-out before", "after"):
        table.add_column(heading, justify="left" if heading == "tenant" else "right", no_wrap=True)
    for name, tenant in compiled.tenants.items():
        before, *_, after = report.values(name, "eval_loss")
        examples = f"{tenant.job.step_examples} a step"
        cells = (str(tenant.task.adapter.r), f"{tenant.task.learning_rate:g}", examples, f"{report.tasks[name].tokens:,}")
        table.add_row(name, *cells, f"{before:.3f}", f"{after:.3f}")
    console.print(table)


def show_comparison(console: Console, compiled: Compiled, report: Report, peft: dict[str, PeftRun], steps: int) -> float:
    """Time of the same steps, ours and PEFT's, and how far the losses are apart; the largest first-step difference."""
    ours = sum(report.step_seconds[:steps])
    theirs = {name: sum(run.seconds) for name, run in peft.items()}
    tokens = sum(run.tokens for run in peft.values())
    padded_tokens = sum(run.padded_tokens for run in peft.values())
    table = Table(title=f"the first {steps} steps of every tenant: {tokens:,} tokens")
    for heading in ("", "seconds", "tokens/s"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, run in peft.items():
        table.add_row(f"HF PEFT, {name} alone", f"{theirs[name]:.1f}", f"{run.tokens / theirs[name]:.0f}")
    total = sum(theirs.values())
    table.add_row("HF PEFT, one task after another", f"{total:.1f}", f"{tokens / total:.0f}", end_section=True)
    table.add_row("muxcompile, all at once", f"{ours:.1f}", f"{tokens / ours:.0f}")
    console.print(table)
    differences = {name: abs(report.values(name, "loss")[0] - run.losses[0]) for name, run in peft.items()}
    last = max(abs(report.values(name, "loss")[steps - 1] - run.losses[-1]) for name, run in peft.items())
    norms = max(abs(report.values(name, "grad_norm")[0] / run.grad_norms[0] - 1) for name, run in peft.items())
    console.print(
        f"muxcompile took {ours / total:.2f} of PEFT's time ({total / ours:.2f}x as fast). Compared: optimizer steps alone"
        f" (forward, backward, clipping, AdamW) in {compiled.backbone.dtype} on {compiled.backbone.device}, the same batches and"
        f" initial adapters, PEFT with padded batches ({padded_tokens / tokens - 1:.0%} padding) and torch.optim.AdamW;"
        " no loading and no evaluation.",
        highlight=False,
    )
    console.print(
        f"Largest difference to PEFT: loss of step 1 {max(differences.values()):.1e}, its gradient norm {norms:.1e} (relative),"
        f" loss of step {steps} {last:.1e}.",
        highlight=False,
    )
    return max(differences.values())


def held_out_questions(path: Path, count: int) -> list[tuple[list[dict[str, str]], str]]:
    """The first held-out prompts and their right answers."""
    rows: list[dict[str, Any]] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:count]]
    return [(row["prompt"], row["completion"][0]["content"]) for row in rows]


def show_answers(console: Console, questions: list[tuple[list[dict[str, str]], str]], replies: list[tuple[str, str]]) -> None:
    """Held-out questions, answered before and after training."""
    table = Table(title="tenant capitals, loaded back with PeftModel.from_pretrained: held-out questions")
    for heading in ("question", "before", "after", "right answer"):
        table.add_column(heading)
    for (prompt, right), (before, after) in zip(questions, replies, strict=True):
        table.add_row(prompt[-1]["content"], before, after, right)
    console.print(table)


def found_faults(compiled: Compiled, report: Report, differ: float) -> list[str]:
    """What must not be: a loss that differs from PEFT's, a task lost, a held-out loss that did not fall."""
    faults = []
    if not differ < LARGEST_DIFFERENCE:
        faults.append(f"a first-step loss differs from HF PEFT's by {differ:.1e}, more than {LARGEST_DIFFERENCE:g}")
    for name in compiled.tenants:
        if (why := report.tasks[name].quarantined) is not None:
            faults.append(f"task {name!r} was quarantined: {why}")
            continue
        before, *_, after = report.values(name, "eval_loss")
        if not after < before:
            faults.append(f"the held-out loss of task {name!r} did not fall: {before:.4f} -> {after:.4f}")
    return faults


if __name__ == "__main__":
    sys.exit(run_command(app, "python -m muxcompile.demo", sys.argv[1:]))
