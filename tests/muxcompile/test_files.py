"""Files: adapters in PEFT's layout both ways, checkpoints that resume bit for bit, artifacts that run without the compiler."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import muxcompile
import runtime.checkpoint

from .peft_reference import (
    VOCABULARY,
    Example,
    Tensors,
    build,
    equal,
    everything,
    examples,
    fill,
    llama,
    logits_of,
    loss_and_gradients,
    peft_model,
    refused,
    wrong_gradients,
    wrong_loss,
)

pytestmark = pytest.mark.usefixtures("one_capture")

CHUNK = muxcompile.Options(chunk_tokens=96)
ROOT = Path(__file__).parents[2]
ADAPTER = "adapter_model.safetensors"

ALICE = LoraConfig(r=4, lora_alpha=9, target_modules="all-linear", rank_pattern={r".*\.1\.mlp\.up_proj": 11})
BOB = LoraConfig(r=9, target_modules=["q_proj", "v_proj"], use_rslora=True, alpha_pattern={"v_proj": 3}, task_type="CAUSAL_LM")
CAROL = LoraConfig(r=20, target_modules=r".*layers\.1\.self_attn\.[ko]_proj")


def tasks() -> list[muxcompile.Task]:
    """Every optimizer, schedule and option whose state a file has to hold."""
    return [
        muxcompile.Task(
            "alice",
            ALICE,
            learning_rate=1e-2,
            weight_decay=0.02,
            lr_schedule="cosine",
            warmup_steps=2,
            total_steps=9,
            max_grad_norm=0.5,
        ),
        muxcompile.Task("bob b", BOB, learning_rate=0.1, optimizer="sgd", momentum=0.9, lr_schedule="linear", total_steps=7),
        muxcompile.Task("carol", CAROL, betas=(0.8, 0.95), eps=1e-6, max_length=60),
    ]


LENGTHS = {"alice": (30, 12), "bob b": (50, 40, 7), "carol": (16,)}


def data(step: int) -> dict[str, list[Example]]:
    return {name: examples(10 * step + index, lengths) for index, (name, lengths) in enumerate(LENGTHS.items())}


@pytest.fixture(scope="module")
def backbone() -> Any:
    return llama(51)


def compiled(backbone: Any, order: list[int] | None = None) -> Any:
    listed = tasks()
    model = muxcompile.compile(backbone, [listed[index] for index in order or range(3)], CHUNK)
    for name in LENGTHS:
        fill(model, name, seed=sum(map(ord, name)))
    return model


@pytest.fixture(scope="module")
def started(backbone: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model two steps into its training, and the checkpoint of that moment."""
    model = compiled(backbone)
    for step in range(2):
        model.step(data(step))
    folder = tmp_path_factory.mktemp("started") / "checkpoint"
    model.save_checkpoint(folder)
    return model, folder


@pytest.fixture
def model(started: tuple[Any, Path]) -> Any:
    """That model, put back to that moment."""
    found, folder = started
    found.load_checkpoint(folder)
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- adapters for PEFT -----------------------------------------------------------------------------------------------


def test_a_saved_folder_loads_in_peft_with_the_logits_that_were_trained(model: Any, backbone: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(model.tasks)
    plain = logits_of(backbone, range(14))
    for name, config in {"alice": ALICE, "bob b": BOB, "carol": CAROL}.items():
        loaded = PeftModel.from_pretrained(llama(51), tmp_path / name).eval()
        ids = [one % VOCABULARY for one in range(3, 43, 3)]
        with torch.no_grad():
            logits = logits_of(loaded, ids)
            # Through PEFT's own model with the very weights: no bit was lost on the way through the files.
            assert torch.equal(logits, logits_of(peft_model(backbone, config, model.state_dict(name)).eval(), ids)), name
            assert (logits - plain).abs().max() > 0.05, name
            # Through our forward: the log-probability of any token at any place, as the loss of that one label.
            for place, token in ((1, 5), (4, 88), (9, 0), (13, 40)):
                labels = [-100] * place + [token] + [-100] * (len(ids) - place - 1)
                ours = -float(model.evaluate({name: [{"input_ids": ids, "labels": labels}]}).losses[name])
                # fp32: logits near 1, sums of 32 to 89 terms
                assert ours == pytest.approx(float(logits[place - 1].log_softmax(-1)[token]), abs=1e-5), (name, place)


def test_the_saved_tensors_and_config_equal_those_of_pefts_own_save_one_by_one(model: Any, backbone: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "ours")
    for name, config in {"alice": ALICE, "bob b": BOB, "carol": CAROL}.items():
        peft_model(backbone, config, model.state_dict(name)).save_pretrained(tmp_path / "peft" / name)
        ours, theirs = (load_file(tmp_path / side / name / ADAPTER) for side in ("ours", "peft"))
        assert list(ours) == list(theirs), name
        assert equal(ours, theirs), name
        assert {tensor.dtype for tensor in ours.values()} == {torch.float32}
        ours, theirs = (json.loads((tmp_path / side / name / "adapter_config.json").read_text()) for side in ("ours", "peft"))
        # inference_mode is set by whoever loads; auto_mapping says which Python class PEFT was wrapped around.
        for about_the_moment in ("inference_mode", "auto_mapping"):
            ours.pop(about_the_moment), theirs.pop(about_the_moment)
        for row in (ours, theirs):
            row["target_modules"] = sorted(row["target_modules"])
        assert ours == theirs, name


def test_only_the_named_tasks_are_saved_and_an_unknown_one_is_refused(model: Any, tmp_path: Path) -> None:
    for folder, named in (("some", ["carol"]), ("one", "carol")):
        model.save_pretrained(tmp_path / folder, tasks=named)
        assert [path.name for path in (tmp_path / folder).iterdir()] == ["carol"]
    with pytest.raises(ValueError, match="nobody"):
        model.save_pretrained(tmp_path / "none", tasks=["nobody"])


def test_nothing_is_saved_over_files_that_are_not_ours(model: Any, tmp_path: Path) -> None:
    saves = {"adapters": model.save_pretrained, "checkpoint": model.save_checkpoint, "artifact": model.save_artifact}
    for name, save in saves.items():
        for _ in range(2):
            save(tmp_path / name)  # our own is replaced
    # Not of the first task: nothing is to be written before all have been looked at.
    strange = [tmp_path / "adapters/carol/train.jsonl", tmp_path / "checkpoint/notes.txt", tmp_path / "artifact/kernels/own.cu"]
    for path in strange:
        path.parent.mkdir(exist_ok=True)
        path.write_text("precious")
    before = files(tmp_path)
    model.step(data(3))
    for (name, save), path in zip(saves.items(), strange, strict=True):
        words = ("'carol'", "save_pretrained") if name == "adapters" else ()
        refused(partial(save, tmp_path / name), *words, re.escape(path.name), "has not written")
    assert files(tmp_path) == before


def test_an_interrupted_save_leaves_the_old_adapter_whole(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model.save_pretrained(tmp_path)
    before = files(tmp_path)
    model.step(data(5))
    monkeypatch.setattr("safetensors.torch.save_file", torn_write)
    with pytest.raises(OSError, match="disk is full"):
        model.save_pretrained(tmp_path)
    assert files(tmp_path) == before


def torn_write(tensors: Tensors, path: Path, **kwargs: Any) -> None:
    Path(path).write_bytes(b"half of a fi")
    raise OSError("disk is full")


@pytest.fixture(scope="module")
def made_by_peft(backbone: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders that PEFT wrote, with small weights, none of them zero. PEFT's own draws would follow from what ran before."""
    configs = {
        "patterned": LoraConfig(r=4, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 12}),
        "all-linear": LoraConfig(r=3, target_modules="all-linear", use_rslora=True, task_type="CAUSAL_LM"),
    }
    found, generator = {}, torch.Generator().manual_seed(51)
    for name, config in configs.items():
        found[name] = tmp_path_factory.mktemp("peft") / name
        model = peft_model(backbone, config)
        for own in (own for key, own in model.named_parameters() if "lora_" in key):
            own.data.normal_(0, 0.1, generator=generator)
        model.save_pretrained(found[name])
    return found


def test_an_adapter_made_by_peft_loads_here_and_evaluates_and_trains_equal(
    backbone: Any, made_by_peft: dict[str, Path], tmp_path: Path
) -> None:
    # One is there from the start, given as a Path, the other is added later, given as text.
    model = muxcompile.compile(backbone, [muxcompile.Task("patterned", made_by_peft["patterned"])], CHUNK)
    model.add_task(muxcompile.Task("all-linear", str(made_by_peft["all-linear"])))
    batches = {name: examples(7, (22, 5)) for name in made_by_peft}
    evaluated, trained = model.evaluate(batches), model.forward_backward(batches)
    for name, folder in made_by_peft.items():
        assert equal(model.state_dict(name), load_file(folder / ADAPTER)), name
        loaded = PeftModel.from_pretrained(llama(51), folder, is_trainable=True)
        loss, gradients = loss_and_gradients(loaded, batches[name])
        assert wrong_loss(float(evaluated.losses[name]), loss) == []
        assert wrong_loss(float(trained.losses[name]), loss) + wrong_gradients(model.gradients(name), gradients) == []
    model.save_pretrained(tmp_path)
    for name, folder in made_by_peft.items():
        assert equal(load_file(tmp_path / name / ADAPTER), load_file(folder / ADAPTER)), name


def test_the_adapters_of_a_peft_model_are_the_tasks_where_none_are_given(backbone: Any) -> None:
    wrapped = get_peft_model(llama(51), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False), adapter_name="alice")
    wrapped.add_adapter("bob", LoraConfig(r=6, target_modules="all-linear", init_lora_weights=False))
    model = muxcompile.compile(wrapped, options=CHUNK)
    assert model.tasks == ("alice", "bob")
    batch = examples(8, (19, 4))
    for name in model.tasks:
        wrapped.set_adapter(name)
        loss, _ = loss_and_gradients(wrapped, batch)
        assert wrong_loss(float(model.evaluate({name: batch}).losses[name]), loss) == [], name


def test_the_adapter_of_a_wrapped_backbone_is_no_part_of_the_backbone(backbone: Any) -> None:
    wrapped = get_peft_model(llama(51), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    model = muxcompile.compile(wrapped, {"carol": CAROL}, CHUNK)
    weights, batch = fill(model, "carol"), examples(8, (19, 4))
    loss, _ = loss_and_gradients(peft_model(backbone, CAROL, weights), batch)
    assert wrong_loss(float(model.evaluate({"carol": batch}).losses["carol"]), loss) == []


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def without(tensors: Tensors) -> Tensors:
    return {key: value for key, value in tensors.items() if key != KEY}


BROKEN: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "missing": (without, KEY),
    "unexpected": (
        lambda tensors: {**tensors, "base_model.model.lm_head.lora_A.weight": torch.ones(4, 32)},
        "lm_head.lora_A.weight",
    ),
    "misnamed": (lambda tensors: {**without(tensors), KEY.replace("q_proj", "k_proj"): tensors[KEY]}, "k_proj.lora_A.weight"),
    "transposed": (lambda tensors: {**tensors, KEY: tensors[KEY].T.contiguous()}, KEY),
    "another rank": (lambda tensors: {**tensors, KEY: tensors[KEY][:3].clone()}, KEY),
    "nan": (lambda tensors: {**tensors, KEY: tensors[KEY] / 0 * 0}, KEY),
    "inf": (lambda tensors: {**tensors, KEY: tensors[KEY] / 0}, KEY),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_file_with_a_wrong_tensor_is_refused_by_task_and_key(
    fault: str, backbone: Any, made_by_peft: dict[str, Path], tmp_path: Path
) -> None:
    change, key = BROKEN[fault]
    folder = shutil.copytree(made_by_peft["patterned"], tmp_path / "adapter")
    save_file(change(load_file(folder / ADAPTER)), folder / ADAPTER)
    refused(lambda: muxcompile.compile(backbone, [muxcompile.Task("tom", folder)], CHUNK), "'tom'", re.escape(key))


def test_a_folder_that_is_no_whole_adapter_is_refused_by_task_and_file(
    backbone: Any, made_by_peft: dict[str, Path], tmp_path: Path
) -> None:
    def attempt(*words: str) -> None:
        refused(lambda: muxcompile.compile(backbone, [muxcompile.Task("tom", tmp_path / "adapter")], CHUNK), "'tom'", *words)

    attempt("adapter_config.json")
    shutil.copytree(made_by_peft["patterned"], tmp_path / "adapter")
    whole = (tmp_path / "adapter" / ADAPTER).read_bytes()
    (tmp_path / "adapter" / ADAPTER).write_bytes(whole[: len(whole) // 2])
    attempt(str(tmp_path / "adapter"))
    (tmp_path / "adapter" / ADAPTER).unlink()
    attempt(ADAPTER)
    (tmp_path / "adapter" / ADAPTER).write_bytes(whole)
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4,')
    attempt(str(tmp_path / "adapter"))


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(backbone: Any, started: tuple[Any, Path], tmp_path: Path) -> None:
    whole, resumed = compiled(backbone), compiled(backbone, order=[2, 0, 1])
    resumed.step(data(77))  # whatever it did before is forgotten
    for step in range(2):
        whole.step(data(step))
    resumed.load_checkpoint(started[1])
    assert equal(everything(resumed), everything(whole))
    for step in range(2, 5):
        results = [model.step(data(step)) for model in (whole, resumed)]
        assert equal(results[1].losses, results[0].losses)
        assert equal(results[1].grad_norms, results[0].grad_norms)
    assert equal(everything(resumed), everything(whole))
    assert any(float(norm) > 0.5 for norm in [results[0].grad_norms["alice"]]), "nothing was clipped"
    evaluated = [model.evaluate(data(9)).losses for model in (whole, resumed)]
    assert equal(*evaluated)
    for side, model in (("whole", whole), ("resumed", resumed)):
        model.save_checkpoint(tmp_path / side)
    assert (
        load_file(tmp_path / "whole/alice/state.safetensors").keys()
        == load_file(tmp_path / "resumed/alice/state.safetensors").keys()
    )
    for name in LENGTHS:
        assert equal(*(load_file(tmp_path / side / name / "state.safetensors") for side in ("whole", "resumed")))


def test_the_same_model_can_go_back_to_a_checkpoint_and_repeat_itself(model: Any, started: tuple[Any, Path]) -> None:
    ends = []
    for _ in range(2):
        model.load_checkpoint(started[1])
        for step in range(2, 4):
            model.step(data(step))
        ends.append(everything(model))
    assert equal(*ends)


def test_loading_forgets_gradients_that_waited(model: Any, started: tuple[Any, Path]) -> None:
    model.forward_backward(data(3))
    model.load_checkpoint(started[1])
    assert not any(gradient.any() for name in model.tasks for gradient in model.gradients(name).values())
    with pytest.raises(ValueError, match=r"'alice'.*optim_step"):
        model.optim_step("alice")


def test_saving_while_gradients_wait_is_refused_and_writes_nothing(model: Any, tmp_path: Path) -> None:
    model.forward_backward({"carol": data(0)["carol"]})
    refused(lambda: model.save_checkpoint(tmp_path / "checkpoint"), "'carol'", "save_checkpoint")
    refused(lambda: model.save_artifact(tmp_path / "artifact"), "'carol'", "save_artifact")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("at", ["a tensor file", "the manifest", "the exchange of the folders"])
def test_an_interrupted_write_leaves_the_old_checkpoint_whole(
    at: str, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "checkpoint"
    model.save_checkpoint(target)
    before, then = files(tmp_path), everything(model)
    model.step(data(4))
    with monkeypatch.context() as patch:
        if at == "a tensor file":
            calls = []
            real = runtime.checkpoint.save_file

            def second_is_torn(tensors: Tensors, path: Path, **kwargs: Any) -> None:
                calls.append(path)
                (torn_write if len(calls) == 2 else real)(tensors, path, **kwargs)

            patch.setattr(runtime.checkpoint, "save_file", second_is_torn)
        elif at == "the manifest":
            patch.setattr(Path, "write_text", lambda path, *args, **kwargs: torn_write({}, path))
        else:
            real_rename, attempts = os.rename, []

            def first_one_fails(source: Any, to: Any, **kwargs: Any) -> None:
                if Path(to) == target:
                    attempts.append(source)
                    if len(attempts) == 1:
                        raise OSError("disk is full")
                real_rename(source, to, **kwargs)

            patch.setattr(os, "rename", first_one_fails)
        with pytest.raises(OSError, match="disk is full"):
            model.save_checkpoint(target)
    assert files(tmp_path) == before
    model.load_checkpoint(target)
    assert equal(everything(model), then)


def test_a_second_checkpoint_replaces_the_first_and_leaves_nothing_else(model: Any, tmp_path: Path) -> None:
    model.save_checkpoint(tmp_path / "deep/er/checkpoint")
    first = files(tmp_path)
    model.step(data(4))
    model.save_checkpoint(tmp_path / "deep/er/checkpoint")
    second = files(tmp_path)
    assert first.keys() == second.keys()
    assert first != second
    assert sorted(path.name for path in (tmp_path / "deep/er").iterdir()) == ["checkpoint"]


def edit_manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        manifest = json.loads((folder / "checkpoint.json").read_text())
        change(manifest)
        (folder / "checkpoint.json").write_text(json.dumps(manifest))

    return edit


def edit_tensors(task: str, change: Callable[[Tensors], Tensors]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / task / "state.safetensors"
        save_file(change(load_file(path)), path)

    return edit


def rename_task(folder: Path) -> None:
    edit_manifest(lambda manifest: manifest["tasks"].update({"zoe": manifest["tasks"].pop("carol")}))(folder)
    (folder / "carol").rename(folder / "zoe")


CAROLS = "base_model.model.model.layers.1.self_attn.k_proj.lora_A.weight"

# Each breaks only the last task, so that a reader that writes as it goes would have changed the others already.
DAMAGE: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "another task": (rename_task, ("'carol'",)),
    "one task more": (edit_manifest(lambda m: m["tasks"].update({"zoe": m["tasks"]["carol"]})), ("'zoe'",)),
    "no manifest": (lambda folder: (folder / "checkpoint.json").unlink(), ("checkpoint.json",)),
    "a torn manifest": (lambda folder: (folder / "checkpoint.json").write_text('{"format": 1,'), ("checkpoint.json",)),
    "another format": (edit_manifest(lambda m: m.update(format=99)), ("format", "99")),
    "another optimizer": (
        edit_manifest(lambda m: m["tasks"]["carol"]["training"].update(optimizer="sgd")),
        ("'carol'", "optimizer"),
    ),
    "another alpha": (
        edit_manifest(lambda m: m["tasks"]["carol"]["adapter"].update(lora_alpha=99)),
        ("'carol'", "lora_alpha=99, not 8"),
    ),
    "another backbone": (
        edit_manifest(lambda m: m["backbone"].update({"lm_head.weight": ["float32", 7.5]})),
        ("another backbone", "'lm_head.weight'", "7.5"),
    ),
    "no tensors": (lambda folder: (folder / "carol/state.safetensors").unlink(), ("carol", "state.safetensors")),
    "torn tensors": (lambda folder: (folder / "carol/state.safetensors").write_bytes(b"\x10torn"), ("carol", "state.safetensors")),
    "a weight missing": (
        edit_tensors("carol", lambda tensors: {key: value for key, value in tensors.items() if key != f"weight/{CAROLS}"}),
        ("'carol'", CAROLS),
    ),
    "a weight of another rank": (
        edit_tensors("carol", lambda tensors: {**tensors, f"weight/{CAROLS}": tensors[f"weight/{CAROLS}"][:7].clone()}),
        ("'carol'", CAROLS),
    ),
    "a weight that is not finite": (
        edit_tensors("carol", lambda tensors: {**tensors, f"weight/{CAROLS}": tensors[f"weight/{CAROLS}"] / 0}),
        ("'carol'", CAROLS),
    ),
    "a tensor too many": (
        edit_tensors("carol", lambda tensors: {**tensors, "weight/other": torch.ones(2)}),
        ("'carol'", "weight/other"),
    ),
    "an optimizer tensor missing": (
        edit_tensors(
            "carol", lambda tensors: {key: value for key, value in tensors.items() if key != f"optimizer/{CAROLS}/exp_avg"}
        ),
        ("'carol'", CAROLS),
    ),
    "an optimizer tensor of another shape": (
        edit_tensors("carol", lambda tensors: {**tensors, f"optimizer/{CAROLS}/exp_avg": torch.ones(3)}),
        ("'carol'", CAROLS),
    ),
}


@pytest.mark.parametrize("fault", DAMAGE)
def test_a_checkpoint_that_does_not_fit_is_refused_and_nothing_is_changed(
    fault: str, model: Any, started: tuple[Any, Path], tmp_path: Path
) -> None:
    damage, words = DAMAGE[fault]
    folder = shutil.copytree(started[1], tmp_path / "checkpoint")
    damage(folder)
    model.step(data(6))
    before, program = everything(model), str(model.executed)
    refused(lambda: model.load_checkpoint(folder), *map(re.escape, words))
    assert equal(everything(model), before)
    assert str(model.executed) == program


KEPT = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], alpha_pattern={"v_proj": 3})


@pytest.fixture(scope="module")
def kept(backbone: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, folder = muxcompile.compile(backbone, {"kim": KEPT}, CHUNK), tmp_path_factory.mktemp("kept") / "checkpoint"
    model.step({"kim": data(0)["carol"]})
    model.save_checkpoint(folder)
    return folder


@pytest.mark.parametrize(("field", "value"), [("lora_alpha", 800), ("use_rslora", True), ("alpha_pattern", {}), ("use_dora", True)])
def test_a_config_by_which_the_tensors_would_do_something_else_is_refused(
    field: str, value: Any, backbone: Any, kept: Path
) -> None:
    model = muxcompile.compile(backbone, {"kim": replace(KEPT, **{field: value})}, CHUNK)
    before = everything(model)
    refused(lambda: model.load_checkpoint(kept), "'kim'", f"was trained with {field}=")
    assert equal(everything(model), before)


def test_rates_may_change_and_the_same_tensors_be_spelled_otherwise(backbone: Any, kept: Path) -> None:
    config = replace(KEPT, target_modules=r".*(q|v)_proj", lora_dropout=0.5, init_lora_weights="gaussian")
    task = muxcompile.Task("kim", config, learning_rate=0.5, betas=(0.5, 0.5), lr_schedule="linear", total_steps=4, seed=9)
    model = muxcompile.compile(backbone, [task], CHUNK)
    model.load_checkpoint(kept)
    assert model.steps == {"kim": 1}
    assert model.learning_rate("kim") == pytest.approx(0.375), "its own schedule, at the checkpoint's step"


def test_another_backbone_of_the_same_shapes_is_refused_unless_its_dtype_is_another(kept: Path) -> None:
    refused(lambda: muxcompile.compile(llama(52), {"kim": KEPT}, CHUNK).load_checkpoint(kept), "another backbone", r"\.weight'")
    muxcompile.compile(llama(51).bfloat16(), {"kim": KEPT}, CHUNK).load_checkpoint(kept)


def test_a_checkpoint_of_before_they_said_what_they_stand_for_is_loaded(backbone: Any, kept: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(kept, tmp_path / "checkpoint")
    edit_manifest(lambda manifest: (manifest.pop("backbone"), manifest["tasks"]["kim"].pop("adapter")))(folder)
    muxcompile.compile(backbone, {"kim": replace(KEPT, lora_alpha=800)}, CHUNK).load_checkpoint(folder)


# --- artifacts -------------------------------------------------------------------------------------------------------

# Modules of the compiler: muxcompile's own, and torch's that it captures and differentiates with. (torch.fx and torch.export
# themselves come with every `import torch`.)
COMPILER = (
    "passes",
    "passes.capture",
    "muxcompile.driver",
    "torch._functorch.aot_autograd",
    "torch._functorch.partitioners",
    "torch.export._trace",
)

FRESH_PROCESS = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from torch import nn
import muxcompile

folder = Path(sys.argv[1])


class Bag(nn.Module):  # the backbone's tensors under their names, and no forward to capture
    def put(self, name, tensor):
        first, _, rest = name.partition(".")
        if rest:
            if first not in self._modules:
                self.add_module(first, Bag())
            self._modules[first].put(rest, tensor)
        else:
            self.register_parameter(first, nn.Parameter(tensor, requires_grad=False))


backbone = Bag()
for name, tensor in load_file(folder / "backbone.safetensors").items():
    backbone.put(name, tensor)
model = muxcompile.load_artifact(folder / "artifact", backbone)
found = {}
for step, batches in enumerate(json.loads((folder / "data.json").read_text())):
    result = model.step(batches)
    for name in batches:
        found[f"{step}/loss/{name}"] = result.losses[name]
        found[f"{step}/norm/{name}"] = result.grad_norms[name]
for name in model.tasks:
    found |= {f"weight/{name}/{key}": value for key, value in model.state_dict(name).items()}
save_file(found, folder / "found.safetensors")
(folder / "modules.json").write_text(json.dumps(sorted(sys.modules)))
"""


@pytest.fixture(scope="module")
def artifact(started: tuple[Any, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, checkpoint = started
    model.load_checkpoint(checkpoint)
    folder = tmp_path_factory.mktemp("artifact") / "artifact"
    model.save_artifact(folder)
    return folder


def test_a_fresh_process_runs_the_artifact_without_the_compiler_and_with_the_same_bits(
    model: Any, backbone: Any, artifact: Path, tmp_path: Path
) -> None:
    shutil.copytree(artifact, tmp_path / "artifact")
    tensors = dict([*backbone.named_parameters(remove_duplicate=False), *backbone.named_buffers(remove_duplicate=False)])
    save_file({name: tensor.detach().clone() for name, tensor in tensors.items()}, tmp_path / "backbone.safetensors")
    steps = [data(step) for step in range(2, 5)]
    (tmp_path / "data.json").write_text(json.dumps(steps))
    threads = str(torch.get_num_threads())
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    run = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, str(tmp_path)], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    expected = {}
    for step, batches in enumerate(steps):
        result = model.step(batches)
        for name in batches:
            expected[f"{step}/loss/{name}"], expected[f"{step}/norm/{name}"] = result.losses[name], result.grad_norms[name]
    for name in model.tasks:
        expected |= {f"weight/{name}/{key}": value for key, value in model.state_dict(name).items()}
    found = load_file(tmp_path / "found.safetensors")
    assert found.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
    modules = set(json.loads((tmp_path / "modules.json").read_text()))
    assert modules & {*COMPILER, "peft", "transformers"} == set()
    assert set(COMPILER) <= set(sys.modules), "the compiler uses other modules now: name them here"


def test_a_loaded_artifact_does_what_a_compiled_model_does_but_compile(
    model: Any, backbone: Any, artifact: Path, tmp_path: Path
) -> None:
    loaded = muxcompile.load_artifact(artifact, backbone)
    assert equal(everything(loaded), everything(model))
    assert equal(loaded.evaluate(data(9)).losses, model.evaluate(data(9)).losses)
    for side, one in (("model", model), ("loaded", loaded)):
        one.step(data(2))
        one.save_pretrained(tmp_path / side / "adapters")
        one.save_checkpoint(tmp_path / side / "checkpoint")
        one.save_artifact(tmp_path / side / "artifact")
    assert files(tmp_path / "loaded") == files(tmp_path / "model")
    refused(lambda: loaded.add_task(muxcompile.Task("dan", BOB)), "add_task", "artifact")
    too_long = {"carol": examples(1, (61,)), "bob b": examples(1, (97,))}
    refused(lambda: loaded.step({"carol": too_long["carol"]}), "'carol'", "max_length=60")
    refused(lambda: loaded.step({"bob b": too_long["bob b"]}), "'bob b'", "at most 96", "max_length")


def edit_artifact(**fields: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps(manifest | fields))

    return edit


def put(name: str, text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(text)


def drop(name: str) -> Callable[[Path], Any]:
    return lambda folder: shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


STALE: dict[str, tuple[Callable[[Path], Any], Callable[[], Any], tuple[str, ...]]] = {
    "torch version": (edit_artifact(torch="2.11.0"), lambda: llama(51), ("torch version", "2.11.0", torch.__version__)),
    "format": (edit_artifact(format=99), lambda: llama(51), ("format", "99")),
    "device": (edit_artifact(device="cuda"), lambda: llama(51), ("device", "cuda", "cpu")),
    "weight shape": (lambda folder: None, lambda: llama(51, intermediate_size=40), ("mlp.gate_proj.weight", "40", "48")),
    "weight dtype": (lambda folder: None, lambda: llama(51).bfloat16(), (".weight", "bfloat16", "float32")),
    "weight values": (lambda folder: None, lambda: llama(52), ("another backbone", ".weight")),
    "weight name": (lambda folder: None, lambda: build("GPT2", n_embd=32, n_head=2, n_layer=2), ("no weight", "model.")),
    "fewer layers": (lambda folder: None, lambda: llama(51, num_hidden_layers=1), ("no weight", "model.layers.1.")),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), lambda: llama(51), ("manifest.json",)),
    "torn manifest": (lambda folder: (folder / "manifest.json").write_text('{"format"'), lambda: llama(51), ("manifest.json",)),
    "a manifest that is none": (put("manifest.json", "[1]"), lambda: llama(51), ("manifest.json",)),
    "an empty manifest": (put("manifest.json", "{}"), lambda: llama(51), ("manifest.json", "format")),
    "a table's field": (edit_artifact(tables=[{"name": "a"}]), lambda: llama(51), ("manifest.json", "shape")),
    "groups of nothing": (edit_artifact(groups=[[]]), lambda: llama(51), ("manifest.json",)),
    "no group": (drop("group0"), lambda: llama(51), ("group0/train.txt: is missing",)),
    "no program": (drop("group0/evaluate.txt"), lambda: llama(51), ("group0/evaluate.txt: is missing",)),
    "torn program": (put("group0/train.txt", "r0 F"), lambda: llama(51), ("group0/train.txt: line 1",)),
    "no region": (drop("group0/regions/head.forward.py"), lambda: llama(51), ("group0/regions/head.forward.py: is missing",)),
    "torn region": (put("group0/regions/head.forward.py", "def call(a"), lambda: llama(51), ("head.forward.py: is damaged",)),
    "empty region": (put("group0/regions/head.forward.py", ""), lambda: llama(51), ("head.forward.py: is damaged", "no call")),
    "no plan": (drop("plan.txt"), lambda: llama(51), ("plan.txt: is missing",)),
    "no constants": (drop("constants.safetensors"), lambda: llama(51), ("constants.safetensors: is missing",)),
    "torn constants": (put("constants.safetensors", "torn"), lambda: llama(51), ("constants.safetensors: cannot be read",)),
    "no state": (drop("state"), lambda: llama(51), ("state", "checkpoint.json")),
    "meta weights": (lambda folder: None, lambda: llama(51).to("meta"), ("meta",)),
}


@pytest.mark.parametrize("what", STALE)
def test_a_stale_artifact_is_refused_by_what_differs(what: str, artifact: Path, tmp_path: Path) -> None:
    damage, make, words = STALE[what]
    folder = shutil.copytree(artifact, tmp_path / "artifact")
    damage(folder)
    refused(lambda: muxcompile.load_artifact(folder, make()), *map(re.escape, words))


def test_a_loaded_artifact_reads_the_memory_of_the_backbone_it_is_given(artifact: Path, backbone: Any) -> None:
    loaded = muxcompile.load_artifact(artifact, backbone)
    own = {tensor.data_ptr() for tensor in [*backbone.parameters(), *backbone.buffers()]}
    assert all(tensor.data_ptr() in own for tensor in loaded._executors[0].weights.values())
    assert isinstance(backbone, nn.Module)
