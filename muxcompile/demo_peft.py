"""The demo's yardstick: the same steps as a user of Hugging Face PEFT would run them, one task after another."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from muxcompile.data import NO_LOSS, Example
from muxcompile.feed import Feed
from muxcompile.tenants import Tenant


@dataclass(slots=True)
class PeftRun:
    """One task's steps with PEFT: loss and gradient norm of each, seconds of each, tokens with and without padding."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    padded_tokens: int = 0


def run_with_peft(backbone: Any, tenant: Tenant, adapter: Path, steps: int, pad: int) -> PeftRun:
    """Take the first steps of one task with PEFT's own layers, torch's autograd and torch.optim.AdamW.

    Args:
        backbone: the plain Hugging Face model; it is given back as it was.
        tenant: whose data, batches and optimizer settings; its optimizer must be AdamW.
        adapter: folder with the adapter that the compiled run began with.
        steps: how many optimizer steps.
        pad: token id for padding.
    """
    from transformers import get_scheduler

    task, run = tenant.task, PeftRun()
    model = _wrapped(backbone, adapter, train=True)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=task.learning_rate, betas=task.betas, eps=task.eps, weight_decay=task.weight_decay)
    kind = "constant_with_warmup" if task.lr_schedule == "constant" else task.lr_schedule
    schedule = get_scheduler(kind, optimizer, num_warmup_steps=task.warmup_steps, num_training_steps=task.total_steps)
    feed = Feed(task.name, task.seed, tenant.data.examples, tenant.job.step_examples)
    for _ in range(steps):
        batch = padded(feed.take(), pad, backbone.device)
        began = time.perf_counter()
        loss: Any = model(**batch).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, task.max_grad_norm or float("inf"))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        run.losses.append(float(loss.detach()))
        run.grad_norms.append(float(norm))
        run.seconds.append(time.perf_counter() - began)
        run.tokens += int(batch["attention_mask"].sum())
        run.padded_tokens += batch["input_ids"].numel()
    model.eval().unload()
    backbone.requires_grad_(False)
    return run


def padded(examples: list[Example], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """A batch as a Hugging Face collator makes it: padded on the right, padding masked out of attention and loss."""
    longest = max(len(example["input_ids"]) for example in examples)

    def column(key: str, fill: int) -> torch.Tensor:
        return torch.tensor([example[key] + [fill] * (longest - len(example[key])) for example in examples], device=device)

    mask = [[1] * len(example["input_ids"]) + [0] * (longest - len(example["input_ids"])) for example in examples]
    return {
        "input_ids": column("input_ids", pad),
        "labels": column("labels", NO_LOSS),
        "attention_mask": torch.tensor(mask, device=device),
    }


def answers(backbone: Any, tokenizer: Any, adapter: Path, questions: list[list[dict[str, str]]]) -> list[tuple[str, str]]:
    """What the base and the adapter, loaded back by PEFT, answer: greedy, at most 12 tokens."""
    model = _wrapped(backbone, adapter, train=False)
    found = []
    for question in questions:
        inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        inputs = inputs.to(backbone.device)
        with model.disable_adapter():
            before = _generate(model, tokenizer, inputs)
        found.append((before, _generate(model, tokenizer, inputs)))
    model.unload()
    return found


def _wrapped(backbone: Any, adapter: Path, *, train: bool) -> Any:
    """The backbone with PEFT's own layers and a saved adapter in them, without what PEFT and transformers warn each other of."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(backbone, str(adapter), is_trainable=train).train(train)


def _generate(model: Any, tokenizer: Any, inputs: Any) -> str:
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return str(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()
