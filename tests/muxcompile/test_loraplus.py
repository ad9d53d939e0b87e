"""LoRA+: B at a multiple of the learning rate, in the groups that PEFT's own optimizer makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, VeraConfig
from peft.optimizers import create_loraplus_optimizer

import muxcompile
from muxcompile.jobs import load_jobs
from runtime.state import Training

from .peft_reference import (
    build,
    equal,
    everything,
    examples,
    llama,
    peft_model,
    refused,
    shake,
    train_alone,
    trainable,
    wrong_after_adamw,
    wrong_after_sgd,
)

pytestmark = pytest.mark.usefixtures("one_capture")
CHUNK = muxcompile.Options(chunk_tokens=128)
STEPS, RATIO, DECAY = 5, 8.0, 0.1
RATES = {"adamw": 1e-3, "sgd": 0.02}
ADAPTERS = {
    "plain": LoraConfig(r=4, target_modules=["q_proj", "fc1"]),
    "dora": LoraConfig(r=3, target_modules=["v_proj", "fc2"], use_dora=True),
    "biases": LoraConfig(r=2, target_modules=["q_proj", "fc1"], bias="all", lora_bias=True),
    "pissa": LoraConfig(r=4, target_modules=["k_proj", "fc1"], init_lora_weights="pissa"),
}


def opt() -> Any:
    fields = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    return build("OPT", 7, **fields, word_embed_proj_dim=32, dropout=0.0, attention_dropout=0.0, layerdrop=0.0)


def batches(step: int) -> dict[str, Any]:
    return {name: examples(10 * index + step, (9, 14)) for index, name in enumerate(ADAPTERS)}


def compiled(optimizer: str, **fields: Any) -> Any:
    fields = {"loraplus_lr_ratio": RATIO, "weight_decay": DECAY, **fields}
    tasks = [
        muxcompile.Task(name, adapter, optimizer=optimizer, learning_rate=RATES[optimizer], **fields)
        for name, adapter in ADAPTERS.items()
    ]
    model = muxcompile.compile(opt(), tasks, CHUNK)
    for seed, name in enumerate(ADAPTERS):
        shake(model, name, seed)
    return model


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_five_steps_equal_those_of_pefts_optimizer_under_its_schedule(optimizer: str) -> None:
    from transformers import get_linear_schedule_with_warmup

    model = compiled(optimizer, lr_schedule="linear", warmup_steps=1, total_steps=8)
    started = {name: model.state_dict(name) for name in ADAPTERS}
    for step in range(STEPS):
        model.step(batches(step))
    for name, adapter in ADAPTERS.items():
        alone = peft_model(opt(), adapter, started[name])
        kind: Any = torch.optim.AdamW if optimizer == "adamw" else torch.optim.SGD
        own = create_loraplus_optimizer(alone, kind, lr=RATES[optimizer], loraplus_lr_ratio=RATIO, loraplus_weight_decay=DECAY)
        schedule = get_linear_schedule_with_warmup(own, 1, 8)
        gradients = []
        for step in range(STEPS):
            gradients += [seen for _, seen in train_alone(alone, own, [batches(step)[name]])]
            schedule.step()
        after = {key: value.detach() for key, value in trainable(alone).items()}
        if optimizer == "sgd":
            assert wrong_after_sgd(model.state_dict(name), after) == [], name
            continue
        numbers = model.state.tasks[name].training
        rates = {key: RATES[optimizer] * numbers.ratio(key) for key in after}
        wrong, left_out = wrong_after_adamw(model.state_dict(name), after, gradients, rates)
        assert wrong == [], name
        assert left_out < 0.2, name


def test_the_groups_are_pefts() -> None:
    model = compiled("adamw")
    for name, adapter in ADAPTERS.items():
        alone = peft_model(opt(), adapter)
        own = create_loraplus_optimizer(alone, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=RATIO, loraplus_weight_decay=DECAY)
        keys = {id(parameter): key for key, parameter in trainable(alone).items()}
        theirs = {keys[id(p)]: (group["lr"], group["weight_decay"]) for group in own.param_groups for p in group["params"]}
        task = model.state.tasks[name]
        names = {id(view): key for key, view in zip(task.keys, task.views, strict=True)}
        ours = {
            names[id(v)]: (group["lr"], group["weight_decay"]) for group in task.optimizer.param_groups for v in group["params"]
        }
        assert ours == theirs, name
        assert len(set(ours.values())) >= (3 if name == "biases" else 2)


def test_the_ratio_is_seen_and_no_ratio_is_the_ratio_of_one() -> None:
    models = {ratio: compiled("adamw", loraplus_lr_ratio=ratio, weight_decay=0.0) for ratio in (None, 1, RATIO)}
    for model in models.values():
        model.step(batches(0))
    for name in ADAPTERS:
        assert equal(models[None].state_dict(name), models[1].state_dict(name))
        pairs = models[None].state_dict(name), models[RATIO].state_dict(name)
        moved = {key for key, value in pairs[0].items() if not torch.equal(value, pairs[1][key])}
        assert moved == set(models[RATIO].state.tasks[name].training.fast) & set(pairs[0])


def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, resumed = compiled("adamw"), compiled("adamw")
    whole.step(batches(0))
    whole.save_checkpoint(tmp_path / "at")
    whole.save_artifact(tmp_path / "artifact")
    resumed.load_checkpoint(tmp_path / "at")
    resumed.add_task(muxcompile.Task("guest", LoraConfig(r=20, target_modules=["q_proj", "fc1"]), loraplus_lr_ratio=2))
    loaded = muxcompile.load_artifact(tmp_path / "artifact", opt())
    for model in (whole, resumed, loaded):
        model.step(batches(1))
    assert equal(everything(resumed, ADAPTERS), everything(whole, ADAPTERS))
    assert equal(everything(loaded, ADAPTERS), everything(whole, ADAPTERS))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_bound_of_what_a_step_may_reach_holds_for_the_fastest(optimizer: str) -> None:
    model = compiled(optimizer, weight_decay=0.0, loraplus_lr_ratio=1e4)
    model.forward_backward(batches(0))
    own = model.state.tasks["plain"]
    own.prepare()
    bound = float(own.reach(torch.nn.utils.get_total_norm(own.gradients)))
    before = float(torch.nn.utils.get_total_norm(own.views))
    model.optim_step("plain")
    after = float(torch.nn.utils.get_total_norm(own.views))
    assert after > 1.5 * before, "B went far"
    assert after <= bound


@pytest.mark.parametrize(
    "adapter",
    [
        IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
        VeraConfig(target_modules=["q_proj"]),
        muxcompile.BitFitConfig(),
    ],
    ids=lambda adapter: str(adapter.peft_type),
)
def test_a_kind_without_lora_b_is_refused_by_the_field(adapter: Any) -> None:
    task = muxcompile.Task("eve", adapter, loraplus_lr_ratio=4)
    refused(lambda: muxcompile.compile(opt(), [task]), "'eve'", "loraplus_lr_ratio=4 is not supported", "lora_B")


def test_a_jobs_file_sets_it(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "hello"}\n')
    (tmp_path / "jobs.yaml").write_text(
        "base: base\ntasks:\n  alice:\n    peft: {r: 4}\n    data: a.jsonl\n    train: {loraplus_lr_ratio: 16}\n"
    )
    assert load_jobs(tmp_path / "jobs.yaml").jobs["alice"].task().loraplus_lr_ratio == 16
    refused(lambda: load_jobs(tmp_path / "jobs.yaml", overrides=["tasks.alice.train.loraplus_lr_ratio=-1"]), "loraplus_lr_ratio=-1")


def test_an_unknown_key_has_the_tasks_own_rate() -> None:
    assert Training(fast=("b",)).ratio("b") == 1.0
    assert [Training(loraplus_lr_ratio=3.0, fast=("b",)).ratio(key) for key in "ab"] == [1.0, 3.0]


def test_a_llama_without_ratio_has_one_group() -> None:
    model = muxcompile.compile(llama(), {"alice": LoraConfig(r=4, target_modules=["q_proj"])}, CHUNK)
    assert len(model.state.tasks["alice"].optimizer.param_groups) == 1
