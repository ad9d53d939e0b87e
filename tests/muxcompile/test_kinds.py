"""Every PEFT kind, mixed in one step: equal to HF PEFT alone, to the bit the same whoever else trains, and PEFT's files."""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LNTuningConfig, LoraConfig, PeftConfig
from safetensors.torch import load_file

import muxcompile

from .kinds import FAMILIES, batches, causal, compiled
from .peft_reference import (
    Tensors,
    equal,
    everything,
    examples,
    llama,
    logits_of,
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
STEPS = 5
RATES = {"sgd": 0.05, "adamw": 1e-3}
WEIGHT_DECAY = 0.01
# A ReLU unit of a prompt encoder that no virtual token opens zeroes a row and a column of weights.
# How many depends on the draw: 0.08 to 0.26 measured; where it was 0.26, PEFT's own gradient was exactly 0 in each of them.
DEAD_UNITS = 0.3
# By module: one family's tests stand together, so that a worker compiles few of their models.
of_each_family = pytest.mark.parametrize("name", FAMILIES, scope="module")


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@of_each_family
def test_a_task_of_any_kind_trains_as_it_does_alone_with_peft(name: str, optimizer: str) -> None:
    family = FAMILIES[name]
    backbone = family.backbone
    rate = RATES[optimizer]
    model = compiled(family, backbone, optimizer=optimizer, learning_rate=rate, weight_decay=WEIGHT_DECAY)
    weights = {own: shake(model, own, seed) for seed, own in enumerate(family.adapters)}
    given = [batches(family, step) for step in range(STEPS)]
    seen: dict[str, list[tuple[float, Tensors]]] = {own: [] for own in family.adapters}
    for batch in given:
        result = model.forward_backward(batch)
        for own in family.adapters:
            seen[own].append((float(result.losses[own]), model.gradients(own)))
        model.optim_step(list(family.adapters))
    for own, adapter in family.adapters.items():
        reference = peft_model(backbone, adapter, weights[own])
        parameters = trainable(reference)
        kind: Any = torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW
        steps = train_alone(
            reference, kind(parameters.values(), lr=rate, weight_decay=WEIGHT_DECAY), [batch[own] for batch in given]
        )
        wrong = wrong_loss(seen[own][0][0], steps[0][0]) + wrong_gradients(seen[own][0][1], steps[0][1])
        after = {key: value.detach() for key, value in parameters.items()}
        if optimizer == "sgd":
            wrong += wrong_after_sgd(model.state_dict(own), after)
        else:
            found, left_out = wrong_after_adamw(model.state_dict(own), after, [gradients for _, gradients in steps], rate)
            wrong += found
            assert left_out <= (DEAD_UNITS if own.startswith("p-tuning") else family.most_left_out), own
        assert not wrong, (own, wrong)
        assert any(float((after[key] - weights[own][key]).abs().max()) > 1e-3 for key in after), f"{own} went nowhere"


@of_each_family
def test_no_neighbour_changes_a_bit(name: str) -> None:
    family = FAMILIES[name]
    backbone = family.backbone
    together = compiled(family, backbone)
    runs = {own: compiled(family, backbone, [own]) for own in family.adapters}
    for seed, (own, alone) in enumerate(runs.items()):
        assert equal(shake(together, own, seed), shake(alone, own, seed))
    for step in range(2):
        batch = batches(family, step)
        losses = together.step(batch).losses
        for own, alone in runs.items():
            assert torch.equal(alone.step({own: batch[own]}).losses[own], losses[own]), own
    for own, alone in runs.items():
        assert equal(everything(alone)[own], everything(together)[own]), own


@of_each_family
def test_peft_reads_our_files_and_we_read_its(name: str, tmp_path: Path) -> None:
    from peft import PeftModel

    family = FAMILIES[name]
    backbone = family.backbone
    model = compiled(family, backbone)
    ids = examples(3, (9,))[0]["input_ids"]
    start = {own: shake(model, own, seed) for seed, own in enumerate(family.adapters)}
    model.save_pretrained(tmp_path / "ours")
    # Of what an encoder computes PEFT's files hold the outcome: there is nothing to go on from.
    served = {own for own, adapter in family.adapters.items() if own.startswith(("projected", "p-tuning"))}
    back = muxcompile.compile(backbone, {own: str(tmp_path / "ours" / own) for own in family.adapters if own not in served})
    assert all(equal(back.state_dict(own), start[own]) for own in back.tasks)
    for own in served:
        folder = str(tmp_path / "ours" / own)
        refused(lambda: muxcompile.compile(backbone, {own: folder}), re.escape(own), "'prompt_embeddings'", "without the encoder")  # noqa: B023
    known = {own: adapter for own, adapter in family.adapters.items() if isinstance(adapter, PeftConfig)}
    for own, adapter in known.items():
        theirs = peft_model(backbone, adapter, start[own])
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*keys.*")  # tensors that are missing, or that nobody asked for
            read = PeftModel.from_pretrained(copy.deepcopy(backbone), str(tmp_path / "ours" / own))
        bound = 1e-5 if own in served else 0.0
        torch.testing.assert_close(logits_of(read, ids), logits_of(theirs, ids), rtol=bound, atol=bound)
        theirs.save_pretrained(tmp_path / "theirs" / own)
        ours, written = (load_file(tmp_path / whose / own / "adapter_model.safetensors") for whose in ("ours", "theirs"))
        # Where an embedding or the head is a target, PEFT's file repeats the backbone's own tensor.
        assert ours.keys() == {key for key in written if not key.endswith(".base_layer.weight")}
        for key, value in ((key, written[key]) for key in ours):
            torch.testing.assert_close(ours[key], value, rtol=bound, atol=bound)
    back = muxcompile.compile(backbone, {own: str(tmp_path / "theirs" / own) for own in known if own not in served})
    for own in back.tasks:
        assert equal(back.state_dict(own), start[own]), own


def test_a_fresh_adapter_changes_nothing_yet() -> None:
    family = FAMILIES["llama"]
    backbone = family.backbone
    model = compiled(family, backbone)
    plain = muxcompile.compile(backbone, {"plain": causal(LoraConfig, r=1, target_modules=["q_proj"])})
    batch = batches(family, 0)
    losses = model.evaluate(batch).losses
    for own in [name for name in family.adapters if not any(word in name for word in ("prompt", "prefix", "p-tuning"))]:
        assert float(losses[own]) == pytest.approx(float(plain.evaluate({"plain": batch[own]}).losses["plain"]), rel=1e-6), own


def test_the_plan_notes_the_products_of_inputs_that_are_scaled_for_some() -> None:
    config = causal(IA3Config, target_modules=["gate_proj", "down_proj"], feedforward_modules=["gate_proj", "down_proj"])
    text = muxcompile.compile(llama(), {"eve": config}).plan.text()
    assert (
        "task 'eve': IA3 scales the input of 'model.layers.0.mlp.gate_proj', which others read: a frozen product more (2 places)"
        in text
    )


REFUSED: dict[str, tuple[Any, str]] = {
    "a misspelt module": (
        causal(IA3Config, target_modules=["k_proj", "down_porj"], feedforward_modules=["down_porj"]),
        "target_modules names 'down_porj', .* the closest is 'down_proj'",
    ),
    "a linear as a norm": (causal(LNTuningConfig, target_modules=["q_proj"]), r"LN_TUNING runs on norms"),
    "a module beside": (
        causal(IA3Config, target_modules=["k_proj"], feedforward_modules=[], modules_to_save=["norm"]),
        "modules_to_save",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_supported_is_refused_by_name(what: str) -> None:
    adapter, pattern = REFUSED[what]
    refused(lambda: muxcompile.compile(llama(), {"eve": adapter}), "'eve'", pattern)
