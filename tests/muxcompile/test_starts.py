"""LoRA's starts: PiSSA and OLoRA take a part out of the backbone's weight in PEFT; here it stays whole, for the same function."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

import muxcompile
from runtime.encoders import STARTS
from runtime.residual import orthogonal

from .peft_reference import (
    build,
    equal,
    everything,
    examples,
    llama,
    logits_of,
    loss_and_gradients,
    peft_model,
    refused,
    shake,
    train_alone,
    trainable,
    wrong_after_adamw,
    wrong_after_sgd,
    wrong_gradients,
    wrong_loss,
)

pytestmark = pytest.mark.usefixtures("one_capture")
CHUNK = muxcompile.Options(chunk_tokens=96)
TARGETS = ["q_proj", "v_proj", "down_proj"]
STEPS = 5


def lora(init: Any, **fields: Any) -> Any:
    return LoraConfig(
        **{"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **fields, "init_lora_weights": init}
    )


def compiled(backbone: nn.Module, init: Any, **fields: Any) -> Any:
    return muxcompile.compile(backbone, {"alice": lora(init, **fields)}, CHUNK)


def batch(step: int = 0) -> Any:
    return examples(step, (9, 21, 4))


def digest(backbone: nn.Module) -> Tensor:
    return torch.stack([parameter.detach().double().sum() for parameter in backbone.parameters()])


# --- fresh adapters ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["pissa", "olora", "OLoRA"])
@pytest.mark.parametrize("rslora", [False, True])
def test_a_fresh_adapter_is_pefts_own_to_the_bit(init: str, rslora: bool) -> None:
    backbone = llama(21)
    before = digest(backbone)
    own = trainable(peft_model(backbone, lora(init, use_rslora=rslora)))
    found = compiled(backbone, init, use_rslora=rslora).state_dict("alice")
    assert equal(found, {key: value.detach() for key, value in own.items()})
    assert torch.equal(digest(backbone), before)


def test_a_fresh_adapter_of_gpt2_is_pefts_own_to_the_bit() -> None:
    backbone = build("GPT2", 6, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    fields: dict[str, Any] = {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}
    own = trainable(peft_model(backbone, lora("pissa", **fields)))
    found = compiled(backbone, "pissa", **fields).state_dict("alice")
    assert equal(found, {key: value.detach() for key, value in own.items()})


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora", "orthogonal"])
def test_a_fresh_adapter_changes_nothing_and_draws_from_its_own_seed(init: str) -> None:
    backbone = llama(21)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    model = compiled(backbone, init)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(value.any() for value in model.state_dict("alice").values()), "B is not zero"
    plain = compiled(backbone, True)
    given = {"alice": batch()}
    want = float(plain.evaluate(given).losses["alice"])
    assert float(model.evaluate(given).losses["alice"]) == pytest.approx(want, rel=1e-6)
    torch.manual_seed(4)
    assert equal(compiled(backbone, init).state_dict("alice"), model.state_dict("alice"))
    other = muxcompile.compile(backbone, [muxcompile.Task("alice", lora(init), seed=1)], CHUNK)
    assert equal(other.state_dict("alice"), model.state_dict("alice")) == (init in ("pissa", "olora"))


@pytest.mark.parametrize("shape", [(7, 11), (11, 7)])
def test_the_randomised_start_is_torchs_svd_lowrank_from_the_generator_it_is_given(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.random.fork_rng():
        torch.manual_seed(5)
        u, s, v = torch.svd_lowrank(weight, 3, niter=2)
    generator = torch.Generator().manual_seed(5)
    found: Any = STARTS["pissa"]((), generator, {}, {"weight": weight}, scaling=2.0, rank=3, niter=2)
    root = (s / 2.0).sqrt()
    torch.testing.assert_close(found["A"], root[:, None] * v.T, rtol=0, atol=1e-6)
    torch.testing.assert_close(found["B0"], u * root, rtol=0, atol=1e-6)


def test_the_orthogonal_start_is_pefts_formula() -> None:
    wrapped: Any = get_peft_model(nn.Sequential(nn.Linear(10, 14)), LoraConfig(r=6, target_modules=["0"]))
    layer = wrapped.base_model.model[0]
    with torch.random.fork_rng():
        torch.manual_seed(8)
        layer.orthogonal_init("default")
    a, b = orthogonal((6, 10, 14), torch.Generator().manual_seed(8))
    torch.testing.assert_close(a, layer.lora_A["default"].weight.detach())
    torch.testing.assert_close(b, layer.lora_B["default"].weight.detach())
    assert float((b @ a).abs().max()) < 1e-6 < 0.1 < float(a.abs().max())


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_training_from_the_start_itself_equals_peft(init: str, optimizer: str) -> None:
    """Without any noise on A and B: what PEFT and we begin with is what is compared."""
    backbone, rate = llama(22), {"sgd": 0.05, "adamw": 1e-3}[optimizer]
    model = muxcompile.compile(backbone, [muxcompile.Task("alice", lora(init), optimizer=optimizer, learning_rate=rate)], CHUNK)
    given = [batch(step) for step in range(STEPS)]
    first = model.forward_backward({"alice": given[0]})
    gradients = model.gradients("alice")
    model.optim_step("alice")
    for one in given[1:]:
        model.step({"alice": one})
    reference = peft_model(backbone, lora(init))
    own = trainable(reference)
    kind: Any = torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW
    steps = train_alone(reference, kind(own.values(), lr=rate, weight_decay=0.0), given)
    assert not wrong_loss(float(first.losses["alice"]), steps[0][0]) + wrong_gradients(gradients, steps[0][1])
    after = {key: value.detach() for key, value in own.items()}
    if optimizer == "sgd":
        assert not wrong_after_sgd(model.state_dict("alice"), after)
    else:
        found, left_out = wrong_after_adamw(model.state_dict("alice"), after, [seen for _, seen in steps], rate)
        assert not found
        assert left_out < 0.01


def residual_model(backbone: nn.Module, model: Any, config: Any) -> Any:
    """PEFT's plain LoRA around W - s B0 A0, with the A0 and B0 that a randomised start has drawn."""
    changed = copy.deepcopy(backbone)
    held = model.state.encoded.tensors
    for encoding in model.state.encoded.of("alice"):
        if encoding.encoder != "residual_joined":
            continue
        weight = changed.get_parameter(encoding.weights["weight"])
        a, b = (held["alice", given.key] for given in encoding.inputs[:2])
        with torch.no_grad():
            weight -= encoding.settings["scaling"] * b @ a
    plain = copy.deepcopy(config)
    plain.init_lora_weights = True
    return peft_model(changed, plain, model.state_dict("alice"))


PATTERNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "patterns": {"rank_pattern": {"v_proj": 2, "down_proj": 7}, "alpha_pattern": {"q_proj": 3}},
    "rslora": {"use_rslora": True, "lora_alpha": 4},
    "dora": {"use_dora": True},
}


@pytest.mark.parametrize("fields", PATTERNS.values(), ids=PATTERNS)
def test_a_randomised_start_trains_as_peft_does_from_it_and_is_filed_as_a_plain_lora(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    backbone = llama(23)
    config = lora("pissa_niter_4", **fields)
    model = compiled(backbone, "pissa_niter_4", **fields)
    shake(model, "alice")
    reference = residual_model(backbone, model, config)
    loss, gradients = loss_and_gradients(reference, batch())
    result = model.forward_backward({"alice": batch()})
    assert not wrong_loss(float(result.losses["alice"]), loss) + wrong_gradients(model.gradients("alice"), gradients)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "alice" / "adapter_config.json").read_text())
    assert (saved["init_lora_weights"], saved["r"]) == (True, 8)
    ids = batch()[1]["input_ids"]
    loaded = PeftModel.from_pretrained(copy.deepcopy(backbone), tmp_path / "alice").eval()
    torch.testing.assert_close(logits_of(loaded, ids), logits_of(reference, ids), rtol=1e-5, atol=1e-5)
    again = muxcompile.compile(backbone, {"alice": tmp_path / "alice"}, CHUNK)
    assert equal(again.state_dict("alice"), load_file(tmp_path / "alice" / "adapter_model.safetensors"))
    assert not wrong_loss(float(again.evaluate({"alice": batch()}).losses["alice"]), loss)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_trained_adapter_goes_to_peft_and_comes_back(init: str, tmp_path: Path) -> None:
    backbone = llama(24)
    model = compiled(backbone, init)
    shake(model, "alice")
    loss = float(model.evaluate({"alice": batch()}).losses["alice"])
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "alice" / "adapter_model.safetensors")
    assert equal(saved, model.state_dict("alice")), "A and B, nothing else"
    loaded = PeftModel.from_pretrained(copy.deepcopy(backbone), tmp_path / "alice")
    assert not wrong_loss(loss, loss_and_gradients(peft_model(backbone, lora(init), saved), batch())[0])
    ids = batch()[1]["input_ids"]
    assert torch.equal(logits_of(loaded, ids), logits_of(peft_model(backbone, lora(init), saved), ids))
    back = muxcompile.compile(backbone, {"alice": tmp_path / "alice"}, CHUNK)
    assert float(back.evaluate({"alice": batch()}).losses["alice"]) == loss
    # A reader that ignores how it started would have another function.
    config = json.loads((tmp_path / "alice" / "adapter_config.json").read_text())
    (tmp_path / "alice" / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": True}))
    wrong = muxcompile.compile(backbone, {"alice": tmp_path / "alice"}, CHUNK)
    assert abs(float(wrong.evaluate({"alice": batch()}).losses["alice"]) - loss) > 1e-2


@pytest.mark.parametrize("init", ["pissa_niter_2", "olora", "orthogonal"])
def test_a_resumed_run_and_an_artifact_go_on_with_the_bits_of_an_uninterrupted_one(init: str, tmp_path: Path) -> None:
    backbone = llama(25)
    whole, resumed = compiled(backbone, init), compiled(backbone, init)
    whole.step({"alice": batch()})
    whole.save_checkpoint(tmp_path / "checkpoint")
    whole.save_artifact(tmp_path / "artifact")
    kept = load_file(tmp_path / "checkpoint" / "alice" / "state.safetensors")
    assert any(key.endswith("lora_A.start") for key in kept) == (init != "orthogonal")
    resumed.load_checkpoint(tmp_path / "checkpoint")
    loaded = muxcompile.load_artifact(tmp_path / "artifact", backbone)
    for model in (whole, resumed, loaded):
        model.step({"alice": batch(1)})
    assert equal(everything(resumed), everything(whole))
    assert equal(everything(loaded), everything(whole))


def test_a_task_moves_to_other_tables_with_its_start() -> None:
    backbone = llama(26)
    alone, moved = compiled(backbone, "pissa_niter_3"), compiled(backbone, "pissa_niter_3")
    for model in (alone, moved):
        model.step({"alice": batch()})
    moved.add_task(muxcompile.Task("bob", lora("olora", r=3)))
    moved.step({"alice": batch(1), "bob": batch(2)})
    alone.step({"alice": batch(1)})
    assert equal(everything(moved, ["alice"]), everything(alone))


# --- refusals ---------------------------------------------------------------------------------------------------------


def named(init: str) -> Any:
    """A config that PEFT itself would check for what it needs."""
    config = lora(True)
    config.init_lora_weights = init
    return config


def gpt2() -> Any:
    return build("GPT2", 6, n_embd=32, n_layer=1, n_head=4, n_positions=64)


REFUSED: dict[str, tuple[Any, str]] = {
    "eva": (lora("eva"), "init_lora_weights='eva' is computed from data"),
    "lora_ga": (lora("lora_ga"), "init_lora_weights='lora_ga' is not supported: it starts from gradients"),
    "corda": (lora("corda"), "init_lora_weights='corda' is not supported: it starts from statistics"),
    "loftq": (named("loftq"), "init_lora_weights='loftq' is not supported: it replaces"),
    "mica": (lora("mica"), "init_lora_weights='mica' is not supported: it is not known"),
    "pissa_niter_x": (lora("pissa_niter_x"), "init_lora_weights='pissa_niter_x' is not supported: it is not known"),
    "an odd rank": (lora("orthogonal", r=5), "init_lora_weights='orthogonal' at .*: r=5 must be even"),
    "a rank above the weight's": (lora("olora", rank_pattern={"v_proj": 17}), "v_proj': r=17 is more than the 16 ranks"),
    "no scaling": (lora("pissa", lora_alpha=0), "init_lora_weights='pissa' at .* lora_alpha must be above 0"),
    "dropout": (lora("olora", lora_dropout=0.1), "init_lora_weights='olora' with lora_dropout=0.1 is not supported"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_start_that_cannot_be_made_is_refused_by_name(what: str) -> None:
    config, pattern = REFUSED[what]
    refused(lambda: compiled_from(llama(), config), "'eve'", pattern)


def compiled_from(backbone: nn.Module, config: Any) -> Any:
    return muxcompile.compile(backbone, {"eve": config}, CHUNK)


def test_ranks_that_would_not_fit_a_table_and_what_peft_does_wrong_are_refused() -> None:
    wide = llama(1, hidden_size=160, num_hidden_layers=1)
    refused(lambda: compiled_from(wide, lora("olora", r=129, target_modules=["q_proj"])), "'eve'", r"r=129 is outside 1\.\.128")
    config = lora("olora", target_modules=["c_attn"], fan_in_fan_out=True)
    refused(lambda: compiled_from(gpt2(), config), "'eve'", "init_lora_weights='olora' at .*c_attn': a Conv1D is not supported")


def test_an_adapter_that_data_has_started_is_taken_from_a_live_model_and_a_folder(tmp_path: Path) -> None:
    wrapped: Any = get_peft_model(llama(27), lora("eva"), adapter_name="alice")
    model = muxcompile.compile(wrapped, options=CHUNK)
    loss, _ = loss_and_gradients(wrapped, batch())
    assert not wrong_loss(float(model.evaluate({"alice": batch()}).losses["alice"]), loss)
    wrapped.save_pretrained(tmp_path)
    back = muxcompile.compile(llama(27), {"alice": tmp_path / "alice"}, CHUNK)
    assert equal(back.state_dict("alice"), model.state_dict("alice"))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
def test_a_live_model_whose_weights_peft_has_changed_is_refused(init: str) -> None:
    wrapped: Any = get_peft_model(llama(28), lora(init), adapter_name="carol")
    wrapped.add_adapter("dave", lora(True))
    words = ("adapter 'carol'", f"init_lora_weights='{init}'", "untouched backbone")
    refused(lambda: muxcompile.compile(wrapped, options=CHUNK), *words)
    refused(lambda: muxcompile.compile(wrapped, {"eve": lora(True)}, CHUNK), *words)


def test_a_weight_that_is_not_finite_stops_the_task_alone() -> None:
    model = muxcompile.compile(llama(29), {"alice": lora("pissa"), "bob": lora("olora")}, CHUNK)
    alone = muxcompile.compile(llama(29), {"bob": lora("olora")}, CHUNK)
    key = next(iter(model.state_dict("alice")))
    model.state.write("alice", key, torch.full_like(model.state_dict("alice")[key], math.inf))
    result = model.step({"alice": batch(), "bob": batch(1)})
    alone.step({"bob": batch(1)})
    assert set(result.quarantined) == {"alice"}
    assert equal(everything(model, ["bob"]), everything(alone))


def test_the_head_is_a_place_like_any_other_but_pefts_file_of_it_holds_a_changed_backbone(tmp_path: Path) -> None:
    backbone, config = llama(5), lora("pissa", target_modules=["lm_head", "q_proj"])
    model = compiled(backbone, "pissa", target_modules=["lm_head", "q_proj"])
    weights = shake(model, "alice")
    result = model.forward_backward({"alice": batch()})
    theirs = peft_model(backbone, config, weights)
    loss, gradients = loss_and_gradients(theirs, batch())
    assert not wrong_loss(float(result.losses["alice"]), loss) + wrong_gradients(model.gradients("alice"), gradients)
    # Beside an adapter of the head PEFT saves the head, less B0 A0: not this backbone's.
    theirs.save_pretrained(tmp_path)
    refused(
        lambda: muxcompile.compile(backbone, {"alice": str(tmp_path)}), "'alice'", "lm_head.base_layer.weight", "the backbone's own"
    )
    model.save_pretrained(tmp_path / "ours")
    back = muxcompile.compile(backbone, {"alice": str(tmp_path / "ours" / "alice")}, CHUNK)
    assert equal(back.state_dict("alice"), weights)
