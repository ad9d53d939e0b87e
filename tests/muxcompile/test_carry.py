"""A sequence longer than a chunk is cut: its losses, gradients and weights are those of the whole, alone and beside others."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LNTuningConfig, LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, VeraConfig

import muxcompile
from runtime.executor import Executor
from runtime.pack import pack
from runtime.program import Kind, Program
from runtime.simulate import ProgramError, simulate

from .kinds import Family, causal
from .peft_reference import (
    Example,
    Tensors,
    build,
    equal,
    everything,
    examples,
    fill,
    llama,
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
TOKENS, LONGEST = 32, 160
FAMILIES = {
    "llama": Family(
        lambda: llama(5, num_key_value_heads=2, max_position_embeddings=256),
        {
            "lora": causal(LoraConfig, r=4, target_modules="all-linear"),
            "dora": causal(LoraConfig, r=3, target_modules=["k_proj", "v_proj", "down_proj"], use_dora=True),
            "ia3": causal(IA3Config, target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
            "norms": causal(LNTuningConfig, target_modules=["input_layernorm", "norm"]),
            "vera": causal(VeraConfig, r=12, target_modules=["q_proj", "v_proj"]),
            "prompt": causal(PromptTuningConfig, num_virtual_tokens=5),
            "prompt of two pieces": causal(PromptTuningConfig, num_virtual_tokens=40),
            "p-tuning": causal(PromptEncoderConfig, num_virtual_tokens=5, encoder_hidden_size=24),
            "prefix": causal(PrefixTuningConfig, num_virtual_tokens=5),
            "long prefix": causal(PrefixTuningConfig, num_virtual_tokens=11),
            "bottleneck": muxcompile.BottleneckConfig(reduction_factor=4, non_linearity="tanh", mh_adapter=True),
            "head": causal(LoraConfig, r=2, target_modules=["lm_head", "embed_tokens", "v_proj"]),
            "values alone": causal(LoraConfig, r=2, target_modules=["v_proj"], layers_to_transform=[0]),
            "last queries": causal(LoraConfig, r=2, target_modules=["q_proj"], layers_to_transform=[1]),
        },
    ),
    "gpt2": Family(
        lambda: build("GPT2", 6, n_embd=32, n_layer=2, n_head=4, n_positions=256, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
        {
            "lora": causal(LoraConfig, r=4, target_modules="all-linear", fan_in_fan_out=True),
            "prefix": causal(PrefixTuningConfig, num_virtual_tokens=4),
            "biases": muxcompile.BitFitConfig(),
            "positions": causal(LoraConfig, r=2, target_modules=["wte", "wpe"]),
        },
        most_left_out=0.1,
    ),
    "opt": Family(
        lambda: build(
            "OPT", 7, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=256,
            word_embed_proj_dim=32, dropout=0.0, attention_dropout=0.0, layerdrop=0.0,
        ),
        {
            "lora": causal(LoraConfig, r=4, target_modules="all-linear"),
            "ia3": causal(IA3Config, target_modules=["k_proj", "v_proj", "fc2"], feedforward_modules=["fc2"]),
            "prompt": causal(PromptTuningConfig, num_virtual_tokens=3),
        },
        most_left_out=0.2,
    ),
}  # fmt: skip
# In chunks of 32 rows: five pieces, two, a whole number of chunks, one row more than a chunk, and whole ones beside.
LENGTHS = ((150, 7), (9, 33), (64, 40, 3), (31, 70))


def backbone(family: str = "llama") -> Any:
    return FAMILIES[family].backbone


def compiled(names: Any, family: str = "llama", tokens: int = TOKENS, kept: int = 0, **fields: Any) -> Any:
    options = {key: fields.pop(key) for key in ("gradient_checkpointing", "reserve_slots") if key in fields}
    adapters = FAMILIES[family].adapters
    tasks = [muxcompile.Task(name, adapters[name], max_length=LONGEST, **fields) for name in names]
    model = muxcompile.compile(backbone(family), tasks, muxcompile.Options(chunk_tokens=tokens, **options))
    assert bool(model._build.groups[0].carried) == (tokens < LONGEST)
    if kept:
        model._use(replace(model._build, groups=(replace(model._build.groups[0], kept=kept),)))
    for name in names:
        shake(model, name, seed=sum(map(ord, name)))
    return model


def batches(names: Any, step: int = 0) -> dict[str, list[Example]]:
    found = {}
    for name in names:
        key = sum(map(ord, name))
        found[name] = examples(key + step, LENGTHS[(key + step) % len(LENGTHS)])
    return found


def played(model: Any) -> Program:
    """What was executed, which the simulator must accept."""
    simulate(model.executed, seconds=lambda action: 1.0, nbytes={})
    return model.executed


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tasks_with_sequences_of_many_pieces_train_as_they_do_alone_with_peft(family: str, optimizer: str) -> None:
    rate = {"sgd": 0.05, "adamw": 1e-3}[optimizer]
    names = [
        name for name in FAMILIES[family].adapters if optimizer == "sgd" or name in ("lora", "dora", "prompt", "prefix", "ia3")
    ]
    model = compiled(names, family, optimizer=optimizer, learning_rate=rate)
    weights = {name: model.state_dict(name) for name in names}
    steps = [batches(names, step) for step in range(5)]
    seen: dict[str, list[tuple[float, Tensors]]] = {name: [] for name in names}
    for batch in steps:
        result = model.forward_backward(batch)
        for name in names:
            seen[name].append((float(result.losses[name]), model.gradients(name)))
        played(model)
        model.optim_step(names)
    for name in names:
        peer = peft_model(backbone(family), FAMILIES[family].adapters[name], weights[name])
        own = trainable(peer)
        kind: Any = torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW
        alone = train_alone(peer, kind(own.values(), lr=rate, weight_decay=0.0), [batch[name] for batch in steps])
        wrong = wrong_loss(seen[name][0][0], alone[0][0]) + wrong_gradients(seen[name][0][1], alone[0][1])
        after = {key: value.detach() for key, value in own.items()}
        if optimizer == "sgd":
            wrong += wrong_after_sgd(model.state_dict(name), after)
        else:
            found, left_out = wrong_after_adamw(model.state_dict(name), after, [gradients for _, gradients in alone], rate)
            wrong += found
            assert left_out <= FAMILIES[family].most_left_out, name
        assert not wrong, (name, wrong)


def test_a_gradient_that_stays_within_its_piece_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from runtime import carry

    monkeypatch.setattr(carry, "hand_back", lambda *given: None)
    monkeypatch.setattr(carry, "tangent", lambda own, *given: torch.zeros(TOKENS, *own.shape))
    model = compiled(["lora"])
    given = {"lora": examples(1, (150,))}
    model.forward_backward(given)
    _, gradients = loss_and_gradients(
        peft_model(backbone(), FAMILIES["llama"].adapters["lora"], model.state_dict("lora")), given["lora"]
    )
    assert wrong_gradients(model.gradients("lora"), gradients)


MIXED = ["lora", "dora", "ia3", "prefix", "prompt"]


def trained(model: Any, names: Any, steps: int = 2) -> dict[str, Any]:
    losses = []
    for step in range(steps):
        given = batches(names, step)
        # The five pieces of the first share the first one's chunk with others.
        given = {name: examples(sum(map(ord, name)) + step, (150, 3, 20)) if name == "lora" else given[name] for name in names}
        result = model.step(given)
        losses.append(result.losses)
        played(model)
    evaluated = model.evaluate(given).losses
    played(model)
    return {name: [loss[name] for loss in (*losses, evaluated)] + [everything(model)[name]] for name in names}


def test_a_task_has_the_bits_beside_others_that_it_has_alone() -> None:
    together = trained(compiled(MIXED), MIXED)
    for name in MIXED:
        assert equal(trained(compiled([name]), [name])[name], together[name]), name
    few = MIXED[:2][::-1]
    for name, found in trained(compiled(few), few).items():
        assert equal(found, together[name]), name


@pytest.mark.parametrize(
    "other", [{"kept": 9}, {"kept": 3}, {"gradient_checkpointing": True}], ids=["kept", "some kept", "checkpointing"]
)
def test_what_is_kept_or_computed_again_changes_no_bit(other: dict[str, Any]) -> None:
    assert equal(trained(compiled(MIXED), MIXED), trained(compiled(MIXED, **other), MIXED))


def test_a_neighbour_that_is_cut_changes_no_bit_of_a_task_that_is_not() -> None:
    short = {"dora": examples(3, (9, 30, 4))}
    plain = muxcompile.compile(
        backbone(), [muxcompile.Task("dora", FAMILIES["llama"].adapters["dora"])], muxcompile.Options(chunk_tokens=TOKENS)
    )
    shake(plain, "dora", seed=sum(map(ord, "dora")))
    assert not plain._build.groups[0].carried
    beside = compiled(["lora", "dora"])
    for _ in range(2):
        first, second = plain.step(short), beside.step(short | {"lora": examples(4, (150, 65))})
        assert torch.equal(first.losses["dora"], second.losses["dora"])
    assert equal(everything(plain)["dora"], everything(beside)["dora"])


def test_the_order_of_a_chain_is_first_to_last_and_back() -> None:
    for kept, forwards, backwards in (
        (4, [0, 1, 2, 3, 4, 5, 6, 7, 8], [4, 5, 6, 7, 8]),
        (5, [0, 1, 2, 3, 4], [4, 3, 2, 1, 0]),
    ):
        model = compiled(["lora"], kept=kept)
        model.forward_backward({"lora": examples(1, (150,))})
        last = "model.layers.1"
        program = played(model)
        for kind, micros in ((Kind.LOAD, forwards), (Kind.F, forwards), (Kind.LOSS, backwards), (Kind.B, backwards)):
            found = [action.micro for action in program if action.kind is kind and action.region in ("chunk", last, "head")]
            assert found == micros, (kept, kind)
        assert Program.parse(str(program)) == program


def test_the_simulator_refuses_a_chain_that_lacks_a_piece_or_runs_out_of_order() -> None:
    model = compiled(["lora"])
    model.forward_backward({"lora": examples(1, (100,))})
    program = played(model)
    for micro in range(6):
        lacking = Program(tuple(action for action in program if action.micro != micro))
        with pytest.raises(ProgramError, match=r"reads (d\.)?kept\.\d, which nobody has written"):
            simulate(lacking, seconds=lambda action: 1.0, nbytes={})
    turned = Program(tuple(sorted(program, key=lambda action: -action.micro)))
    with pytest.raises(ProgramError, match=r"reads d\.kept\.\d, which nobody has written"):
        simulate(turned, seconds=lambda action: 1.0, nbytes={})


def test_the_executor_refuses_a_chain_that_lacks_a_piece_or_runs_out_of_order() -> None:
    model = compiled(["lora"])
    executor: Executor = model._executors[0]
    chunks = list(pack(model._read({"lora": examples(1, (100,))}), model._build.groups[0].geometry))
    assert [chunk.piece.begin for chunk in chunks if chunk.piece] == [0, 4, 36, 68]
    for faulty in (chunks[1:], chunks[:-1], [chunks[0], *chunks[2:]], [chunks[0], chunks[2], chunks[1], chunks[3]], chunks[:1] * 2):
        with pytest.raises(AssertionError, match="Piece"):
            executor.run(faulty, ["lora"], train=True)
        assert not any(gradient.any() for gradient in executor.state.grads.values())
    whole = muxcompile.compile(backbone(), {"lora": FAMILIES["llama"].adapters["lora"]}, muxcompile.Options(chunk_tokens=TOKENS))
    with pytest.raises(AssertionError, match="compiled for whole sequences"):
        whole._executors[0].run(chunks, ["lora"], train=True)


def test_a_fault_of_one_cut_sequence_reaches_nobody_else() -> None:
    clean, faulty = compiled(MIXED), compiled(MIXED)
    key = next(key for key in faulty.state_dict("lora") if "v_proj.lora_A" in key)
    faulty.state.write("lora", key, torch.full_like(faulty.state_dict("lora")[key], float("nan")))
    given = batches(MIXED) | {"lora": examples(1, (150,)), "dora": examples(2, (20,))}  # dora beside lora's first piece
    for model in (clean, faulty):
        result = model.step(given)
    assert set(result.quarantined) == {"lora"}
    others = MIXED[1:]
    assert equal(everything(clean, others), everything(faulty, others))


def test_a_longer_example_than_was_announced_compiles_again_with_one_warning() -> None:
    model = muxcompile.compile(backbone(), {"lora": FAMILIES["llama"].adapters["lora"]}, muxcompile.Options(chunk_tokens=TOKENS))
    weights = fill(model, "lora")
    given = {"lora": examples(1, (50, 150))}
    with pytest.warns(UserWarning, match=r"'lora' has an example of 150 tokens and a chunk holds 32: compiling again to cut it"):
        model.forward_backward(given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.forward_backward({"lora": examples(1, (200,))})
        model.state.clear_gradients("lora")
        result = model.forward_backward(given)
        model.add_task(muxcompile.Task("ia3", FAMILIES["llama"].adapters["ia3"]))
        model.evaluate(given | {"ia3": examples(2, (60,))})
    loss, gradients = loss_and_gradients(peft_model(backbone(), FAMILIES["llama"].adapters["lora"], weights), given["lora"])
    assert not wrong_loss(float(result.losses["lora"]), loss) + wrong_gradients(model.gradients("lora"), gradients)
    assert model.chunk_tokens == TOKENS


def test_without_a_chosen_size_a_chunk_still_holds_the_longest_example() -> None:
    model = muxcompile.compile(backbone(), [muxcompile.Task("ia3", FAMILIES["llama"].adapters["ia3"], max_length=600)])
    assert model.chunk_tokens == 608
    assert not model._build.groups[0].carried


def test_an_artifact_cuts_as_the_compiled_model_does(tmp_path: Path) -> None:
    names = ["lora", "prefix"]
    model = compiled(names)
    model.save_artifact(tmp_path / "artifact")
    loaded = muxcompile.load_artifact(tmp_path / "artifact", backbone())
    assert equal(trained(model, names), trained(loaded, names))


def test_an_artifact_for_whole_sequences_refuses_a_longer_one(tmp_path: Path) -> None:
    model = muxcompile.compile(backbone(), {"lora": FAMILIES["llama"].adapters["lora"]}, muxcompile.Options(chunk_tokens=TOKENS))
    model.save_artifact(tmp_path / "artifact")
    loaded = muxcompile.load_artifact(tmp_path / "artifact", backbone())
    refused(lambda: loaded.step({"lora": examples(1, (33,))}), "'lora'", "33 tokens", "at most 32", "max_length")


def test_inductors_regions_are_refused_for_longer_sequences() -> None:
    options = muxcompile.Options(chunk_tokens=TOKENS, regions="inductor", invariant=False)
    tasks = [muxcompile.Task("lora", FAMILIES["llama"].adapters["lora"], max_length=LONGEST)]
    refused(lambda: muxcompile.compile(backbone(), tasks, options), "regions='inductor'", "chunk_tokens")


def test_a_window_slides_from_piece_to_piece() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = causal(LoraConfig, r=4, target_modules="all-linear")
    for window in (8, 50):
        mistral = build("Mistral", 9, **sizes, num_hidden_layers=2, max_position_embeddings=256, sliding_window=window)
        task = muxcompile.Task("lora", config, max_length=LONGEST)
        model = muxcompile.compile(mistral, [task], muxcompile.Options(chunk_tokens=TOKENS))
        weights, given = fill(model, "lora"), examples(3, (150, 40, 9))
        result = model.forward_backward({"lora": given})
        loss, gradients = loss_and_gradients(peft_model(mistral, config, weights), given)
        assert not wrong_loss(float(result.losses["lora"]), loss) + wrong_gradients(model.gradients("lora"), gradients)
