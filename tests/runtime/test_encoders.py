"""Encoders compute what PEFT's modules compute, and a task trains through them as torch trains the same function alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import runtime.encoders
from runtime.checkpoint import read_checkpoint, write_checkpoint
from runtime.encoders import CONSTANTS, ENCODERS, FILES, STARTS, register, register_file, register_start
from runtime.state import State, Training
from runtime.tables import Encoding, Input, Param, Place, Table

CPU = torch.device("cpu")
K, N, R, P, G, D, LAYERS = 6, 10, 3, 5, 2, 3, 2
HIDDEN = 4
# With the default eps AdamW shows the rounding of a gradient that is nearly zero at the scale of the learning rate.
ADAMW = Training(learning_rate=0.05, eps=1e-4, weight_decay=0.1, seed=3)
SGD = Training(optimizer="sgd", learning_rate=0.05, momentum=0.9)

# --- the encoders against PEFT ----------------------------------------------------------------------------------------


def injected(config: Any, *shapes: tuple[int, int]) -> nn.Module:
    """PEFT's layers around linears [in, out], every trainable tensor random."""
    from peft import get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(*(nn.Linear(*shape, bias=False) for shape in shapes)), config).base_model.model
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return model


def call(name: str, inputs: dict[str, Tensor], reads: Any = (), weights: Any = (), **settings: Any) -> list[Tensor]:
    given = dict(weights)
    if name in CONSTANTS:
        given |= CONSTANTS[name](given, **settings)
    return ENCODERS[name](inputs, dict(reads), given, **settings)


def equal_files(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def same_gradients(ours: Tensor, theirs: Tensor, leaves: list[Tensor]) -> None:
    """Two values, and what a random gradient of them is to the same leaves."""
    torch.testing.assert_close(ours, theirs)
    seed = torch.randn(ours.shape)
    for own, their in zip(torch.autograd.grad(ours, leaves, seed), torch.autograd.grad(theirs, leaves, seed), strict=True):
        torch.testing.assert_close(own, their)


def test_vera_is_pefts_layer_as_two_tables_of_a_lora() -> None:
    from peft import VeraConfig

    for layer in injected(VeraConfig(r=R, target_modules=["0", "1"], projection_prng_key=7), (K, N), (8, 4)):
        a, b = layer.vera_A["default"], layer.vera_B["default"]
        leaves = {"lambda_d": layer.vera_lambda_d["default"], "lambda_b": layer.vera_lambda_b["default"]}
        x = torch.randn(9, layer.in_features)
        down, up = call("vera", leaves, {"A": a, "B": b}, in_features=layer.in_features)
        same_gradients(layer.base_layer(x) + x @ down.T @ up, layer(x), list(leaves.values()))


def test_veras_random_matrices_are_pefts_bit_for_bit() -> None:
    from peft import VeraConfig
    from peft.tuners.vera import VeraModel

    model = VeraModel(nn.Sequential(nn.Linear(K, N)), VeraConfig(r=R, target_modules=["0"], projection_prng_key=7), "default")
    a = STARTS["vera_A"]((R, K), torch.Generator(), {}, {}, projection_prng_key=7)
    assert torch.equal(a, model.vera_A["default"])
    assert torch.equal(STARTS["vera_B"]((N, R), torch.Generator(), {"A": a}, {}, projection_prng_key=7), model.vera_B["default"])


def dora_layer() -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    from peft import LoraConfig

    (layer,) = injected(LoraConfig(r=R, lora_alpha=7, use_dora=True, target_modules=["0"]), (K, N))
    reads = {"lora_A": layer.lora_A["default"].weight, "lora_B": layer.lora_B["default"].weight}
    return layer, reads, {"weight": layer.base_layer.weight}


def test_dora_is_pefts_layer_as_a_scale_of_columns() -> None:
    layer, reads, weights = dora_layer()
    magnitude = layer.lora_magnitude_vector["default"].weight
    x = torch.randn(9, K)
    (scale,) = call("dora", {"magnitude": magnitude}, reads, weights, scaling=7 / R)
    ours = scale * (layer.base_layer(x) + 7 / R * x @ reads["lora_A"].T @ reads["lora_B"].T)
    same_gradients(ours, layer(x), [magnitude, *reads.values()])
    (turned,) = call("dora", {"magnitude": magnitude}, reads, {"weight": weights["weight"].T}, scaling=7 / R, fan_in_fan_out=True)
    torch.testing.assert_close(turned, scale)


def test_a_fresh_magnitude_changes_nothing() -> None:
    _, reads, weights = dora_layer()
    given = weights | CONSTANTS["dora"](weights, scaling=7 / R)
    magnitude = STARTS["dora"]((N,), torch.Generator(), reads, given, scaling=7 / R)
    merged = weights["weight"] + 7 / R * reads["lora_B"] @ reads["lora_A"]
    torch.testing.assert_close(magnitude, merged.norm(dim=1))
    torch.testing.assert_close(call("dora", {"magnitude": magnitude}, reads, weights, scaling=7 / R)[0], torch.ones(1, N))


def test_dora_reads_a_weight_in_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    _, reads, weights = dora_layer()
    (whole,) = call("dora", {"magnitude": torch.ones(N)}, reads, weights, scaling=0.5)
    monkeypatch.setattr("runtime.encoders._BLOCK", 4)
    (parts,) = call("dora", {"magnitude": torch.ones(N)}, reads, weights, scaling=0.5)
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize(("kind", "name", "layers"), [("MLP", "mlp", 2), ("LSTM", "lstm", 2), ("LSTM", "lstm", 3)])
def test_a_prompt_encoder_is_pefts(kind: str, name: str, layers: int) -> None:
    from peft import PromptEncoder, PromptEncoderConfig

    torch.manual_seed(0)
    module = PromptEncoder(
        PromptEncoderConfig(
            encoder_reparameterization_type=kind,
            encoder_hidden_size=HIDDEN,
            encoder_num_layers=layers,
            num_virtual_tokens=P,
            token_dim=K,
            num_transformer_submodules=1,
        )
    )
    leaves = dict(module.named_parameters())
    settings = {"layers": layers} if name == "lstm" else {}
    (tokens,) = call(name, leaves, **settings)
    same_gradients(tokens, module(torch.arange(P)), list(leaves.values()))
    assert equal_files(FILES[name](leaves, {}, {}, **settings), {"prompt_embeddings": tokens})


@pytest.mark.parametrize("projection", [True, False])
def test_a_prefix_is_laid_out_as_peft_hands_it_to_the_layers(projection: bool) -> None:
    from peft import PrefixTuningConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": G * 4, "num_attention_heads": G, "num_hidden_layers": LAYERS, "intermediate_size": 8}
    backbone = LlamaForCausalLM(LlamaConfig(vocab_size=9, **shape))
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=P, prefix_projection=projection, encoder_hidden_size=HIDDEN
    )
    model = get_peft_model(backbone, config)
    leaves = dict(model.prompt_encoder["default"].named_parameters())
    found = call("prefix_projection" if projection else "prefix", leaves, layers=LAYERS, heads=G)
    cache = model.get_prompt(batch_size=1)
    theirs = [torch.cat([layer.keys[0], layer.values[0]]).flatten(0, 1) for layer in cache.layers]  # [2 * G * P, D] each
    assert [tuple(part.shape) for part in found] == [(2 * G * P, 4)] * LAYERS
    same_gradients(torch.cat(found), torch.cat(theirs), list(leaves.values()))
    padded = call("prefix_projection" if projection else "prefix", leaves, layers=LAYERS, heads=G, bucket=8)
    for own, wide in zip(found, padded, strict=True):
        split = wide.unflatten(0, (2 * G, 8))
        assert torch.equal(split[:, :P].flatten(0, 1), own)
        assert not split[:, P:].any()
    if projection:
        saved = model.get_prompt_embedding_to_save("default")
        torch.testing.assert_close(
            FILES["prefix_projection"](leaves, {}, {}, layers=LAYERS, heads=G, bucket=8)["prompt_embeddings"].detach(), saved
        )


# --- tasks that train through them ------------------------------------------------------------------------------------

LSTM = {
    f"lstm_head.{name}_l{layer}{end}": shape
    for layer, width in enumerate((K, 2 * HIDDEN))
    for end in ("", "_reverse")
    for name, shape in {
        "weight_ih": (4 * HIDDEN, width),
        "weight_hh": (4 * HIDDEN, HIDDEN),
        "bias_ih": (4 * HIDDEN,),
        "bias_hh": (4 * HIDDEN,),
    }.items()
}


def linear(name: str, into: int, out: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


TRAINED: dict[str, dict[str, tuple[int, ...]]] = {
    "vera": {"lambda_d": (R,), "lambda_b": (N,)},
    "dora": {"magnitude": (N,)},
    "mlp": {
        "embedding.weight": (P, K),
        **linear("mlp_head.0", K, HIDDEN),
        **linear("mlp_head.2", HIDDEN, HIDDEN),
        **linear("mlp_head.4", HIDDEN, K),
    },
    "lstm": {
        "embedding.weight": (P, K),
        **LSTM,
        **linear("mlp_head.0", 2 * HIDDEN, 2 * HIDDEN),
        **linear("mlp_head.2", 2 * HIDDEN, K),
    },
    "prefix": {"embedding.weight": (P, LAYERS * 2 * G * D)},
    "prefix_projection": {
        "embedding.weight": (P, G * D),
        **linear("transform.0", G * D, HIDDEN),
        **linear("transform.2", HIDDEN, LAYERS * 2 * G * D),
    },
}
KINDS = tuple(TRAINED)
PREFIX = {f"kv{layer}": (2 * G * P, D) for layer in range(LAYERS)}
# Rows and columns of the tables that a kind's encoder fills.
FILLED = {
    "vera": {"A": (R, K), "B": (R, N)},
    "dora": {"scale": (1, N)},
    "mlp": {"tokens": (P, K)},
    "lstm": {"tokens": (P, K)},
    "prefix": PREFIX,
    "prefix_projection": PREFIX,
}
WEIGHTS = {"layer.weight": torch.randn(N, K, generator=torch.Generator().manual_seed(8), dtype=torch.float32).bfloat16()}
LORA = ("lora_A", "lora_B")


@dataclass(frozen=True)
class Layout:
    tables: dict[str, Table]
    params: list[Param]
    encodings: list[Encoding]


def encoding_of(kind: str, task: str, row: int) -> list[Encoding]:
    """A kind's encoding, and that of the tensors which it reads but nobody trains."""
    inputs = tuple(Input(name, f"{kind}.{name}", shape, std=0.5) for name, shape in TRAINED[kind].items())
    places = tuple(Place(f"{kind}.{name}", row, 0, rows) for name, (rows, _) in FILLED[kind].items())
    one = Encoding(task, kind, kind, inputs, places)
    if kind == "vera":
        matrices = (
            Input("A", "vera_A", (R, K + 2), start="vera_A", trainable=False),
            Input("B", "vera_B", (N + 1, R), start="vera_B", trainable=False),
        )
        kept = Encoding(task, "vera projection", "", matrices, settings={"projection_prng_key": 4})
        return [kept, replace(one, reads={"A": "vera_A", "B": "vera_B"}, settings={"in_features": K})]
    if kind == "dora":
        start = (replace(inputs[0], std=0.0, start="dora"),)
        reads = {"lora_A": "dora.lora_A", "lora_B": "dora.lora_B"}
        return [replace(one, inputs=start, reads=reads, weights={"weight": "layer.weight"}, settings={"scaling": 1.5})]
    if kind == "lstm":
        return [replace(one, settings={"layers": 2})]
    return [replace(one, settings={"layers": LAYERS, "heads": G})] if kind.startswith("prefix") else [one]


def layout(tasks: Mapping[str, tuple[str, ...]], *, rows: tuple[str, ...] | None = None, dtype: str = "float32") -> Layout:
    """Tables of all kinds; a task of kind "dora" also has LoRA's plain tensors."""
    rows = rows or tuple(tasks)
    shapes = {f"{kind}.{name}": shape for kind in KINDS for name, shape in FILLED[kind].items()}
    shapes |= {"dora.A": (8, K), "dora.B": (8, N)}
    tables = {name: Table(name, (len(rows), *shape), rows, True, "r", dtype) for name, shape in shapes.items()}
    params, encodings = [], []
    for task, kinds in tasks.items():
        row = rows.index(task)
        for kind in kinds:
            encodings += encoding_of(kind, task, row)
            if kind == "dora":
                params.append(Param(task, "dora.lora_A", "dora.A", row, 0, R, False, bound=0.5))
                params.append(Param(task, "dora.lora_B", "dora.B", row, 0, R, True, bound=0.5))
    return Layout(tables, params, encodings)


def state_of(tasks: Mapping[str, tuple[str, ...]], training: Training = ADAMW, **kwargs: Any) -> State:
    made = layout(tasks, **kwargs)
    return State(made.tables, made.params, dict.fromkeys(tasks, training), CPU, made.encodings, WEIGHTS)


def accumulate(state: State, task: str, seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    """Random gradients where the executor would put them, by table."""
    found = {}
    for index, (name, grads) in enumerate(sorted(state.grads.items())):
        gradient = scale * torch.randn(grads.shape[1:], generator=torch.Generator().manual_seed(1000 * seed + index))
        grads[state.tables[name].rows.index(task)] += gradient
        found[name] = gradient
    state.tasks[task].pending = 4
    return found


def everything(state: State, task: str) -> dict[str, Tensor]:
    """All that makes a task: weights, gradients, moments, counters, and what regions read."""
    own = state.tasks[task]
    found = {key: state.read(task, key) for key in (*own.keys, *own.kept)}
    found |= {f"grad {key}": state.read(task, key, gradient=True) for key in own.keys}
    for key, view in zip(own.keys, own.views, strict=True):
        found |= {f"{name} {key}": value.clone() for name, value in own.optimizer.state.get(view, {}).items() if value is not None}
    for name, table in state.tables.items():
        for what, where in (("master", state.masters), ("copy", state.copies), ("table grad", state.grads)):
            found[f"{what} {name}"] = where[name][table.rows.index(task)].clone()
    return found | {"counters": torch.tensor((own.steps, own.examples, own.pending or -1, len(own.unread)))}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())


def reference(state: State, task: str, kind: str, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tables that a kind fills, as a differentiable function of the task's tensors by key: no state, no encodings."""
    encoding = state.encoded.encodings[task, kind]
    kept = {key: state.read(task, key) for key in state.tasks[task].kept}
    inputs = {given.name: leaves[given.key] for given in encoding.inputs}
    reads = {name: (leaves | kept)[key].detach() for name, key in encoding.reads.items()}
    outputs = call(kind, inputs, reads, {"weight": WEIGHTS["layer.weight"]}, **encoding.settings)
    found = {place.table: out for place, out in zip(encoding.outputs, outputs, strict=True)}
    if kind == "dora":
        for key, table in (("dora.lora_A", "dora.A"), ("dora.lora_B", "dora.B")):
            found[table] = leaves[key] if key.endswith("A") else leaves[key].T
    return found


def torch_optimizer(tensors: list[nn.Parameter], training: Training) -> torch.optim.Optimizer:
    if training.optimizer == "sgd":
        return torch.optim.SGD(tensors, lr=training.learning_rate, momentum=training.momentum, weight_decay=training.weight_decay)
    return torch.optim.AdamW(tensors, lr=training.learning_rate, eps=training.eps, weight_decay=training.weight_decay)


@pytest.mark.parametrize("training", [ADAMW, SGD, replace(ADAMW, max_grad_norm=0.5)], ids=["adamw", "sgd", "clipped"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_task_trains_as_torch_trains_the_same_function_alone(kind: str, training: Training) -> None:
    state = state_of({"other": (kind,), "alice": (kind,)}, training)
    leaves = {key: nn.Parameter(state.read("alice", key)) for key in state.tasks["alice"].keys}
    optimizer = torch_optimizer(list(leaves.values()), training)
    for step in range(5):
        gradients = accumulate(state, "alice", step)
        accumulate(state, "other", 50 + step)
        optimizer.zero_grad()
        loss = sum((out * gradients[table][: out.shape[0]]).sum() for table, out in reference(state, "alice", kind, leaves).items())
        torch.as_tensor(loss).backward()
        for key, leaf in leaves.items():
            torch.testing.assert_close(state.read("alice", key, gradient=True), leaf.grad)
            # An LSTM's two biases are added: autograd gives them one gradient in memory, which clipping would scale twice.
            leaf.grad = torch.as_tensor(leaf.grad).clone()
        norm = torch.nn.utils.clip_grad_norm_(leaves.values(), training.max_grad_norm or math.inf)
        optimizer.step()
        state.step("other")
        torch.testing.assert_close(state.step("alice"), norm)
        for key, leaf in leaves.items():
            torch.testing.assert_close(state.read("alice", key), leaf.detach(), rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            for table, out in reference(state, "alice", kind, leaves).items():
                torch.testing.assert_close(state.masters[table][1, : out.shape[0]], out, rtol=1e-4, atol=1e-5)
    assert state.poll(["alice"], wait=True) == {}
    assert state.tasks["alice"].steps == 5


def test_a_run_that_is_kept_trains_as_one_that_runs_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    for kept in (1 << 20, -1):
        monkeypatch.setattr("runtime.encoded._KEPT", kept)
        state = state_of({"alice": KINDS})
        for step in range(3):
            accumulate(state, "alice", step)
            state.step("alice")
        assert len(state.encoded._runs) == (len(KINDS) if kept > 0 else 0)
        ends.append(everything(state, "alice"))
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind: str) -> None:
    state = state_of({"alice": (kind,)})
    encoding = state.encoded.encodings["alice", kind]
    wide = {given.name: state.read("alice", given.key).double().requires_grad_() for given in encoding.inputs}
    reads = {name: state.read("alice", key).double() for name, key in encoding.reads.items()}
    weights = {"weight": WEIGHTS["layer.weight"].double()}

    def function(*values: Tensor) -> Any:
        return tuple(call(kind, dict(zip(wide, values, strict=True)), reads, weights, **encoding.settings))

    assert torch.autograd.gradcheck(function, tuple(wide.values()))


@pytest.mark.parametrize("kind", KINDS)
def test_encoding_draws_nothing_and_keeps_bits(kind: str) -> None:
    before = torch.get_rng_state()
    state = state_of({"alice": (kind,)})
    encoding = state.encoded.encodings["alice", kind]
    first = state.encoded.encode(encoding)
    accumulate(state, "alice", 1)
    state.step("alice")
    again = state_of({"bob": (kind,), "alice": (kind,)}).encoded
    for out, repeated in zip(first, again.encode(again.encodings["alice", kind]), strict=True):
        assert torch.equal(out, repeated)
    assert torch.equal(torch.get_rng_state(), before)


def test_fresh_inputs_follow_their_bound_deviation_and_constant() -> None:
    inputs = (
        Input("a", "a", (100, 200), bound=0.25),
        Input("b", "b", (100, 200), std=0.5),
        Input("c", "c", (4,), fill=0.1),
    )
    state = State({}, [], {"alice": Training()}, CPU, [Encoding("alice", "e", "", inputs)])
    bound, std, fill = (state.read("alice", key) for key in "abc")
    assert bound.abs().max() <= 0.25
    assert bound.std().item() == pytest.approx(0.25 / math.sqrt(3), rel=0.02)
    assert std.std().item() == pytest.approx(0.5, rel=0.02)
    assert torch.equal(fill, torch.full((4,), 0.1))


# --- tensors by key ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_written_is_read_and_reaches_the_regions(dtype: str) -> None:
    state = state_of({"bob": ("vera",), "alice": ("vera", "dora")}, dtype=dtype)
    bob = everything(state, "bob")
    for key in ("vera.lambda_d", "vera_A", "dora.magnitude", "dora.lora_A", "dora.lora_B"):
        before = {name: table[1].clone() for name, table in state.copies.items()}
        value = torch.randn(state.shape("alice", key))
        state.write("alice", key, value)
        assert torch.equal(state.read("alice", key), value)
        leaves = {name: state.read("alice", name) for name in state.tasks["alice"].keys}
        for table, out in (reference(state, "alice", "vera", leaves) | reference(state, "alice", "dora", leaves)).items():
            assert torch.equal(state.masters[table][1, : out.shape[0]], out), (key, table)
            assert torch.equal(state.copies[table][1, : out.shape[0]], out.to(getattr(torch, dtype))), (key, table)
        assert any(not torch.equal(table[1], before[name]) for name, table in state.copies.items()), key
    assert same(everything(state, "bob"), bob)


def test_keys_that_are_kept_are_no_gradients_and_never_move() -> None:
    state = state_of({"alice": ("vera", "dora")})
    assert state.tasks["alice"].keys == ("dora.lora_A", "dora.lora_B", "vera.lambda_d", "vera.lambda_b", "dora.magnitude")
    assert state.tasks["alice"].kept == ("vera_A", "vera_B")
    assert state.shape("alice", "vera_A") == (R, K + 2)
    before = state.read("alice", "vera_A")
    accumulate(state, "alice", 1)
    state.step("alice")
    assert torch.equal(state.read("alice", "vera_A"), before)


def test_pefts_file_holds_what_a_prompt_encoder_computes_and_of_the_others_what_is_trained() -> None:
    state = state_of({"bob": ("mlp",), "alice": ("mlp", "dora")}, dtype="bfloat16")
    held = state.file("alice")
    assert held.keys() == {"prompt_embeddings", "dora.magnitude", "dora.lora_A", "dora.lora_B"}
    assert torch.equal(held["prompt_embeddings"], state.masters["mlp.tokens"][1])
    assert all(torch.equal(value, state.read("alice", key)) for key, value in held.items() if key.startswith("dora"))
    for value in held.values():
        value.zero_()
    assert state.masters["mlp.tokens"][1].any()
    assert state.file("alice")["prompt_embeddings"].any()


def test_gradients_add_up_until_they_are_cleared_and_reading_them_changes_nothing() -> None:
    state = state_of({"alice": ("mlp", "dora")})
    accumulate(state, "alice", 1)
    once = state.read("alice", "mlp.mlp_head.2.weight", gradient=True)
    assert once.any()
    before = everything(state, "alice")
    assert same(everything(state, "alice"), before)
    accumulate(state, "alice", 1)
    torch.testing.assert_close(state.read("alice", "mlp.mlp_head.2.weight", gradient=True), 2 * once)
    state.clear_gradients("alice")
    assert not any(state.read("alice", key, gradient=True).any() for key in state.tasks["alice"].keys)
    assert not any(gradient.any() for gradient in state.tasks["alice"].gradients)


# --- containment ------------------------------------------------------------------------------------------------------


def refused(state: State, spoil: Callable[[], None], scale: float = 1.0) -> None:
    """A step that is refused leaves every bit, and so does a good one after it."""
    before = everything(state, "alice")
    accumulate(state, "alice", 7, scale)
    spoil()
    state.step("alice")
    accumulate(state, "alice", 8)
    state.step("alice")
    assert list(state.poll(["alice"], wait=True)) == ["alice"]
    assert same({name: value for name, value in everything(state, "alice").items() if name in before}, before)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("training", [ADAMW, replace(ADAMW, max_grad_norm=1.0), SGD], ids=["adamw", "clipped", "sgd"])
def test_a_step_whose_loss_or_gradient_is_not_finite_leaves_every_bit(training: Training, steps: int) -> None:
    for spoiled in ("loss", "gradient"):
        state = state_of({"alice": ("vera", "dora", "mlp")}, training)
        for step in range(steps):
            accumulate(state, "alice", step)
            state.step("alice")
        state.poll(["alice"], wait=True)

        def spoil(state: State = state, spoiled: str = spoiled) -> None:
            if spoiled == "loss":
                state.tasks["alice"].losses.append(torch.tensor(math.inf))
            else:
                state.grads["vera.B"][0, 0, 0] = math.nan

        refused(state, spoil)
        for view in state.tasks["alice"].views:
            assert all(value.isfinite().all() for value in state.tasks["alice"].optimizer.state[view].values())


@pytest.mark.parametrize("training", [replace(ADAMW, learning_rate=60.0), replace(SGD, learning_rate=60.0)], ids=["adamw", "sgd"])
def test_a_step_whose_encoded_rows_overflow_in_the_regions_dtype_leaves_every_bit(training: Training) -> None:
    # The weights after the step are in the thousands at most; the products of three layers are not.
    state = state_of({"alice": ("mlp",)}, training, dtype="float16")
    refused(state, lambda: None, scale=10.0)


def test_the_same_step_is_taken_where_the_dtype_can_hold_its_rows() -> None:
    state = state_of({"alice": ("mlp",)}, replace(ADAMW, learning_rate=60.0), dtype="bfloat16")
    accumulate(state, "alice", 7)
    state.step("alice")
    assert state.poll(["alice"], wait=True) == {}
    assert state.masters["mlp.tokens"].abs().max() > torch.finfo(torch.float16).max


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_an_encoder_makes_infinite_or_nan_is_not_committed(bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    # An encoder with a hole: where one step leads to, one number of one of its rows is bad.
    prefix = ENCODERS["prefix"]
    state = state_of({"alice": ("prefix",)}, Training(optimizer="sgd", learning_rate=1.0))
    before = everything(state, "alice")
    start = state.read("alice", "prefix.embedding.weight")

    def holed(inputs: Any, reads: Any, weights: Any, **settings: Any) -> list[Tensor]:
        outputs = prefix(inputs, reads, weights, **settings)
        if not torch.equal(inputs["embedding.weight"], start):
            outputs[1] = outputs[1].index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(bad))
        return outputs

    monkeypatch.setitem(ENCODERS, "prefix", holed)
    accumulate(state, "alice", 1)
    state.step("alice")
    assert list(state.poll(["alice"], wait=True)) == ["alice"]
    assert same(everything(state, "alice"), before)


def test_a_large_input_with_small_rows_is_no_reason_to_refuse() -> None:
    # A bound on the inputs by what float16 holds would refuse; the rows are a tanh's, and small.
    state = state_of({"alice": ("prefix_projection",)}, Training(optimizer="sgd", learning_rate=1e-3), dtype="float16")
    state.write("alice", "prefix_projection.embedding.weight", torch.full((P, G * D), 1e6))
    accumulate(state, "alice", 1)
    state.step("alice")
    assert state.poll(["alice"], wait=True) == {}


def test_a_refused_step_of_one_task_leaves_its_neighbours_bits() -> None:
    tasks = {"alice": ("mlp", "dora"), "bob": ("vera", "dora")}
    alone, among = state_of({"bob": tasks["bob"]}), state_of(tasks)
    for step in range(3):
        accumulate(among, "alice", step)
        if step == 1:
            among.tasks["alice"].losses.append(torch.tensor(math.nan))
        among.step("alice")
        for state in (alone, among):
            accumulate(state, "bob", 20 + step)
            state.step("bob")
    assert list(among.poll(["alice", "bob"], wait=True)) == ["alice"]
    assert alone.poll(["bob"], wait=True) == {}
    assert same(everything(alone, "bob"), everything(among, "bob"))


# --- tasks come and go ------------------------------------------------------------------------------------------------

ALL = {"alice": ("vera", "dora", "mlp"), "bob": ("prefix_projection", "lstm")}


def trained(tasks: dict[str, tuple[str, ...]], **kwargs: Any) -> State:
    """Two steps taken, gradients waiting for the third."""
    state = state_of(tasks, **kwargs)
    for task in tasks:
        for step in range(3):
            accumulate(state, task, step + len(task))
            if step < 2:
                state.step(task)
    return state


def test_an_expelled_task_leaves_zeros_and_nothing_of_its_own() -> None:
    state = trained(ALL)
    bob = everything(state, "bob")
    state.expel("alice")
    assert {task for task, _ in [*state.encoded.tensors, *state.encoded.grads, *state.encoded.encodings]} == {"bob"}
    assert not any(table[0].any() for where in (state.masters, state.copies, state.grads) for table in where.values())
    assert same(everything(state, "bob"), bob)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [("carol", "bob", "alice", ""), ("bob", "", "carol", "alice")])
def test_moving_to_other_tables_keeps_everything_of_every_task(rows: tuple[str, ...], dtype: str) -> None:
    state, stayed = trained(ALL, dtype=dtype), trained(ALL, dtype=dtype)
    before = {task: everything(state, task) for task in ALL}
    made = layout(ALL | {"carol": ("vera", "dora")}, rows=rows, dtype=dtype)
    state.relayout(made.tables, made.params, {"carol": ADAMW}, made.encodings, WEIGHTS)
    for task in ALL:
        assert same(everything(state, task), before[task])
    fresh = state_of({"carol": ("vera", "dora")}, dtype=dtype)
    assert same(everything(state, "carol"), everything(fresh, "carol"))
    for each in (state, stayed):
        for task in ALL:
            each.step(task)
    for task in ALL:
        assert same(everything(state, task), everything(stayed, task))


def test_an_encoding_may_move_to_a_table_of_another_name_or_to_other_rows_of_its_own() -> None:
    state = trained({"bob": ("mlp",), "alice": ("mlp",)})
    names = ("mlp.tokens", "wide")
    before = everything(state, "alice")
    made = layout({"bob": ("mlp",), "alice": ("mlp",)})
    wide = Table("wide", (3, P + 2, K), ("", "alice", ""), True, "other")
    moved = [replace(e, outputs=(Place("wide", 1, 2, P + 2),)) if e.task == "alice" else e for e in made.encodings]
    state.relayout(made.tables | {"wide": wide}, made.params, {}, moved)
    assert not any(where[names[0]][1].any() for where in (state.masters, state.copies, state.grads))
    assert torch.equal(state.masters["wide"][1, 2:], before["master mlp.tokens"])
    assert torch.equal(state.grads["wide"][1, 2:], before["table grad mlp.tokens"])
    kept = {name: value for name, value in everything(state, "alice").items() if "mlp.tokens" not in name and " wide" not in name}
    assert same(kept, {name: value for name, value in before.items() if name in kept})
    accumulate(state, "alice", 9)
    state.step("alice")
    (tokens,) = state.encoded.encode(state.encoded.encodings["alice", "mlp"])
    assert torch.equal(state.copies["wide"][1, 2:], tokens)
    assert not state.copies["wide"][1, :2].any()


def test_a_newcomer_in_a_free_slot_leaves_the_others_where_they_are() -> None:
    made = layout({"alice": ("dora", "vera")}, rows=("alice", ""))
    state = State(made.tables, made.params, {"alice": ADAMW}, CPU, made.encodings, WEIGHTS)
    accumulate(state, "alice", 1)
    before = everything(state, "alice")
    places = [view.data_ptr() for view in state.tasks["alice"].views]
    after = layout({"alice": ("dora", "vera"), "bob": ("mlp",)})
    state.relayout(after.tables, after.params, {"bob": SGD}, after.encodings)
    assert [view.data_ptr() for view in state.tasks["alice"].views] == places
    assert same(everything(state, "alice"), before)
    accumulate(state, "bob", 1)
    state.step("bob")
    assert state.poll(["bob"], wait=True) == {}


# --- files and text ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [ADAMW, SGD], ids=["adamw", "sgd"])
def test_training_goes_on_from_a_checkpoint_bit_for_bit(training: Training, tmp_path: Path) -> None:
    state = trained(ALL, training=training)
    for task in ALL:
        state.step(task)
    state.write("alice", "vera_A", torch.randn(R, K + 2))  # kept tensors are saved as they stand
    write_checkpoint(tmp_path / "at", state, dict.fromkeys(state.tasks, 64))
    fresh = state_of(ALL, training)
    read_checkpoint(tmp_path / "at", fresh).apply()
    for task in ALL:
        for each in (state, fresh):
            each.poll([task], wait=True)
            for step in (31, 32):
                accumulate(each, task, step)
                each.step(task)
        assert same(everything(fresh, task), everything(state, task))


def test_a_checkpoint_without_a_kept_tensor_is_refused_by_name(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    write_checkpoint(tmp_path / "at", state_of(ALL), dict.fromkeys(ALL, 64))
    path = tmp_path / "at" / "alice" / "state.safetensors"
    tensors = load_file(path)
    del tensors["weight/vera_B"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"task 'alice': vera_B needs shape \(11, 3\), found nothing"):
        read_checkpoint(tmp_path / "at", state_of(ALL))


@pytest.mark.parametrize("kind", KINDS)
def test_an_encoding_prints_as_text_that_can_be_pasted_back(kind: str) -> None:
    for encoding in encoding_of(kind, "alice", 1):
        assert eval(str(encoding)) == encoding
        assert Encoding.of(json.loads(json.dumps(asdict(encoding)))) == encoding


def test_an_encoder_that_nobody_registered_is_named() -> None:
    made = layout({"alice": ("mlp",)})
    strange = [replace(made.encodings[0], encoder="hypernet")]
    with pytest.raises(ValueError, match=r"task 'alice': mlp: encoder 'hypernet' is not registered"):
        State(made.tables, [], {"alice": ADAMW}, CPU, strange)
    started = replace(made.encodings[0].inputs[0], start="eva")
    with pytest.raises(ValueError, match=r"task 'alice': mlp: start 'eva' is not registered"):
        State(made.tables, [], {"alice": ADAMW}, CPU, [replace(made.encodings[0], inputs=(started,))])


def test_others_may_register_encoders_and_starts_under_names_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.encoders.ENCODERS", dict(ENCODERS))
    monkeypatch.setattr("runtime.encoders.STARTS", dict(STARTS))
    monkeypatch.setattr("runtime.encoders.FILES", dict(FILES))

    @register("doubled")
    def doubled(inputs: Any, reads: Any, weights: Any) -> list[Tensor]:
        return [2 * inputs["half"]]

    @register_start("sevens")
    def sevens(shape: Any, generator: Any, reads: Any, weights: Any) -> Tensor:
        return torch.full(shape, 7.0)

    @register_file("doubled")
    def doubled_file(inputs: Any, reads: Any, weights: Any) -> dict[str, Tensor]:
        return {"whole": 2 * inputs["half"]}

    for module in ("ENCODERS", "STARTS", "FILES"):
        monkeypatch.setattr(f"runtime.encoded.{module}", getattr(runtime.encoders, module))
    tables = {"t": Table("t", (1, 2, 3), ("alice",), True, "r")}
    encoding = Encoding("alice", "e", "doubled", (Input("half", "half", (2, 3), start="sevens"),), (Place("t", 0, 0, 2),))
    state = State(tables, [], {"alice": Training(optimizer="sgd", learning_rate=1.0)}, CPU, [encoding])
    assert torch.equal(state.copies["t"], torch.full((1, 2, 3), 14.0))
    state.grads["t"] += 1
    state.step("alice")
    assert torch.equal(state.read("alice", "half"), torch.full((2, 3), 5.0))
    assert equal_files(state.file("alice"), {"whole": torch.full((2, 3), 10.0)})
    adds: tuple[tuple[Any, str], ...] = ((register, "dora"), (register_start, "dora"), (register_file, "mlp"))
    for add, known in adds:
        with pytest.raises(AssertionError, match="already"):
            add(known)(lambda *args, **settings: [])
