"""Prefixes and prompts that an encoder computes: where they start from, what they resume from, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig

import muxcompile

from .peft_reference import (
    build,
    equal,
    everything,
    examples,
    llama,
    mean_loss,
    peft_model,
    refused,
    shake,
    train_alone,
    trainable,
    wrong_after_sgd,
    wrong_gradients,
    wrong_loss,
)

pytestmark = pytest.mark.usefixtures("one_capture")
CHUNK = muxcompile.Options(chunk_tokens=96, reserve_slots=1)


def prompted(kind: type[Any], tokens: int = 4, **fields: Any) -> Any:
    return kind(task_type="CAUSAL_LM", num_virtual_tokens=tokens, **fields)


KINDS: dict[str, Any] = {
    "prompt": lambda: prompted(PromptTuningConfig),
    "prefix": lambda: prompted(PrefixTuningConfig),
    "projected prefix": lambda: prompted(PrefixTuningConfig, prefix_projection=True, encoder_hidden_size=6),
    "p-tuning mlp": lambda: prompted(PromptEncoderConfig, encoder_hidden_size=6),
    "p-tuning lstm": lambda: prompted(PromptEncoderConfig, encoder_reparameterization_type="LSTM", encoder_hidden_size=6),
}


def data(step: int, names: Any) -> dict[str, Any]:
    return {name: examples(10 * step + len(name), (20, 7)) for name in names}


# --- where they start -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_live_peft_model_is_gone_on_from(kind: str) -> None:
    theirs = peft_model(llama(31), KINDS[kind]())
    model = muxcompile.compile(theirs, options=CHUNK)
    (name,) = model.tasks
    assert equal(model.state_dict(name), {key: value.detach() for key, value in trainable(theirs).items()})
    given = examples(1, (20, 7))
    assert not wrong_loss(float(model.evaluate({name: given}).losses[name]), float(mean_loss(theirs, given)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_one_is_drawn_as_peft_draws_it(kind: str) -> None:
    backbone = llama(31)
    model = muxcompile.compile(backbone, {"eve": KINDS[kind]()}, CHUNK)
    theirs = {key: value.detach() for key, value in trainable(peft_model(backbone, KINDS[kind]())).items()}
    ours = model.state_dict("eve")
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        # Of 12 uniform numbers and more the root mean square is within a factor of 2 but once in ten thousand draws.
        assert 0.5 < float(ours[key].square().mean().sqrt() / value.square().mean().sqrt()) < 2, key
        assert ours[key].unique().numel() == value.numel()


@pytest.mark.parametrize("projection", [False, True])
def test_a_prefix_can_begin_with_zeros(projection: bool) -> None:
    config = prompted(PrefixTuningConfig, init_weights="zero", prefix_projection=projection)
    backbone = llama(31)
    model = muxcompile.compile(backbone, {"eve": config}, CHUNK)
    given = examples(1, (20, 7))
    own = model.state_dict("eve")
    last = [key for key in own if key == "prompt_embeddings" or "transform.2" in key]
    assert len(last) == (2 if projection else 1)
    assert not any(own[key].any() for key in last)
    loss = float(mean_loss(peft_model(backbone, config, own), given))
    assert not wrong_loss(float(model.evaluate({"eve": given}).losses["eve"]), loss)


def test_heads_of_another_size_than_the_hidden_one_suggests_train_as_with_peft() -> None:
    backbone = llama(32, head_dim=16)
    config = prompted(PrefixTuningConfig)
    model = muxcompile.compile(
        backbone, [muxcompile.Task("eve", prompted(PrefixTuningConfig), optimizer="sgd", learning_rate=0.05)], CHUNK
    )
    start = shake(model, "eve")
    reference = peft_model(backbone, config, start)
    given = examples(2, (20, 7))
    result = model.forward_backward({"eve": given})
    gradients = model.gradients("eve")
    model.optim_step("eve")
    ((loss, expected),) = train_alone(reference, torch.optim.SGD(trainable(reference).values(), lr=0.05), [given])
    assert not wrong_loss(float(result.losses["eve"]), loss)
    assert not wrong_gradients(gradients, expected)
    assert not wrong_after_sgd(model.state_dict("eve"), {key: value.detach() for key, value in trainable(reference).items()})


# --- files, and tasks that come and go --------------------------------------------------------------------------------


def test_checkpoints_and_artifacts_resume_what_pefts_files_cannot(tmp_path: Path) -> None:
    backbone = llama(33)
    tasks = [muxcompile.Task(name, make(), learning_rate=1e-2) for name, make in KINDS.items()]
    model = muxcompile.compile(backbone, tasks, CHUNK)
    model.step(data(0, KINDS))
    model.save_checkpoint(tmp_path / "checkpoint")
    model.save_artifact(tmp_path / "artifact")
    model.save_pretrained(tmp_path / "adapters")
    loaded = muxcompile.load_artifact(tmp_path / "artifact", backbone)
    loaded.save_pretrained(tmp_path / "again")
    for file in sorted((tmp_path / "adapters").rglob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "again" / file.relative_to(tmp_path / "adapters")).read_bytes()
    model.step(data(1, KINDS))
    after = everything(model)
    loaded.step(data(1, KINDS))
    assert equal(everything(loaded), after)
    model.load_checkpoint(tmp_path / "checkpoint")
    model.step(data(1, KINDS))
    assert equal(everything(model), after)


def test_tasks_keep_their_bits_when_others_come_and_go() -> None:
    backbone = llama(34)
    tasks = {name: muxcompile.Task(name, make(), learning_rate=1e-2) for name, make in KINDS.items()}
    kept = ("prefix", "projected prefix", "p-tuning mlp")
    model = muxcompile.compile(backbone, [tasks[name] for name in kept], CHUNK)
    alone = {name: muxcompile.compile(backbone, [tasks[name]], CHUNK) for name in kept}
    newcomers = [
        muxcompile.Task("long", prompted(PrefixTuningConfig, 11)),
        muxcompile.Task("third", prompted(PrefixTuningConfig, 7)),
        tasks["p-tuning lstm"],
        muxcompile.Task("plain", LoraConfig(r=4, target_modules=["q_proj"])),
    ]
    for step, newcomer in enumerate(newcomers):
        batch = data(step, model.tasks)
        model.step(batch)
        for name, one in alone.items():
            one.step({name: batch[name]})
        model.add_task(newcomer)
    model.remove_task("third")
    model.remove_task("prefix")
    model.add_task(muxcompile.Task("fourth", prompted(PrefixTuningConfig, 3)))
    batch = data(9, model.tasks)
    model.step(batch)
    for name in kept[1:]:
        alone[name].step({name: batch[name]})
        assert equal(everything(model)[name], everything(alone[name])[name]), name


# --- refusals ---------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Any, str]] = {
    "no tokens": (prompted(PrefixTuningConfig, 0), r"num_virtual_tokens=0 must be an integer in 1\.\."),
    "other layers": (prompted(PrefixTuningConfig, num_layers=3), "num_layers=3, but the forward attends 2 times"),
    "a head size of its own": (
        prompted(PrefixTuningConfig, token_dim=24),
        "num_attention_heads=4 and token_dim=24 do not fit 'transformer.h.0.attn', which has 4 key/value heads of 8",
    ),
    "a size that heads do not divide": (prompted(PrefixTuningConfig, token_dim=30), "token_dim=30 is not a multiple"),
    "an encoder of no width": (
        prompted(PrefixTuningConfig, prefix_projection=True, encoder_hidden_size=0),
        "encoder_hidden_size=0 must be an integer of at least 1",
    ),
    "another start": (prompted(PrefixTuningConfig, init_weights="ones"), r"init_weights='ones' is not supported"),
    "dropout in the prompt encoder": (
        prompted(PromptEncoderConfig, encoder_reparameterization_type="LSTM", encoder_dropout=0.1),
        r"encoder_dropout=0.1 is not supported",
    ),
    "an unknown encoder": (
        prompted(PromptEncoderConfig, encoder_reparameterization_type="GRU"),
        r"encoder_reparameterization_type='GRU' is not supported \(MLP, LSTM\)",
    ),
    "no layers": (
        prompted(PromptEncoderConfig, encoder_reparameterization_type="LSTM", encoder_num_layers=0),
        "encoder_num_layers=0 must be",
    ),
    "tokens of another size": (prompted(PromptEncoderConfig, token_dim=31), "token_dim=31, but the backbone has 32"),
}


def gpt2() -> Any:
    return build("GPT2", 6, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_supported_is_refused_by_name(what: str) -> None:
    adapter, pattern = REFUSED[what]
    refused(lambda: muxcompile.compile(gpt2(), {"eve": adapter}), "task 'eve'", pattern)


def test_dropout_that_peft_does_not_apply_is_no_reason_to_refuse() -> None:
    single: dict[str, Any] = {"encoder_reparameterization_type": "LSTM", "encoder_num_layers": 1}
    tasks = {
        "mlp": prompted(PromptEncoderConfig, encoder_dropout=0.1),
        "one": prompted(PromptEncoderConfig, **single, encoder_dropout=0.1),
    }
    assert muxcompile.compile(gpt2(), tasks, CHUNK).tasks == ("mlp", "one")


def test_a_sliding_window_is_refused_by_module() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    backbone = build("Mistral", 5, **sizes, sliding_window=8)
    refused(
        lambda: muxcompile.compile(backbone, {"eve": prompted(PrefixTuningConfig)}, CHUNK),
        "task 'eve'",
        r"PREFIX_TUNING is not supported with the sliding window of 'model.layers.0.self_attn' \(8\)",
    )


@pytest.mark.parametrize("kind", ["prefix", "p-tuning mlp"])
def test_there_must_be_positions_for_prompt_and_sequence(kind: str) -> None:
    model = muxcompile.compile(gpt2(), {"eve": KINDS[kind]()}, CHUNK)
    model.evaluate({"eve": examples(1, (60,))})
    refused(lambda: model.evaluate({"eve": examples(1, (61,))}), "task 'eve'", "61 tokens, more than .*less 4 virtual tokens=60")


@pytest.mark.parametrize(("kind", "fields"), [("prompt", {"max_length": 61}), ("prefix", {"lengths": [3, 61]})])
def test_examples_that_are_announced_must_fit_beside_virtual_tokens(kind: str, fields: dict[str, Any]) -> None:
    backbone = llama(35, max_position_embeddings=64)
    task = muxcompile.Task("eve", KINDS[kind](), **fields)
    field = next(iter(fields))
    message = f"{field}=61 and 4 virtual tokens .* more than the backbone's limit of 64"
    refused(lambda: muxcompile.compile(backbone, [task], CHUNK), "task 'eve'", message)
    model = muxcompile.compile(backbone, {"ann": LoraConfig(r=4, target_modules=["q_proj"])}, CHUNK)
    refused(lambda: model.add_task(task), "task 'eve'", message)
    assert model.tasks == ("ann",)
