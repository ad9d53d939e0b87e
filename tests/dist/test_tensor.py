"""Tensor parallelism: ranks that each compute a part of every layer train what one process trains.

Everything that needs processes runs in one start for each size of group; the tests look at what came back.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    ShiraConfig,
    TrainableTokensConfig,
    VeraConfig,
)
from transformers import LlamaConfig, LlamaForCausalLM

import muxcompile
from passes import limits, split
from passes.capture import capture
from passes.graph import EMBEDDING
from passes.lookup import lookup
from runtime.comm import Mesh, Ranks
from tests.dist import processes
from tests.muxcompile.peft_reference import (
    Tensors,
    build,
    equal,
    examples,
    llama,
    refused,
    seeded,
    wrong_after_adamw,
    wrong_after_sgd,
    wrong_gradients,
)

RATE, VOCABULARY = 1e-3, 88
CPU = torch.device("cpu")
OPTIONS = muxcompile.Options(chunk_tokens=256)
LENGTHS = ((7, 1, 19), (33, 2), (12, 5, 17), (40,), (3, 16, 9), (6, 11), (21,), (4, 4, 4))
ROW = ["o_proj", "down_proj"]


def causal(config: type[Any], **fields: Any) -> Any:
    return config(task_type="CAUSAL_LM", **fields)


def bottleneck(**fields: Any) -> Any:
    return muxcompile.BottleneckConfig(**{"reduction_factor": 4, "init_weights": "mam_adapter", **fields})


ADAPTERS: dict[str, Any] = {
    "lora": causal(LoraConfig, r=4, target_modules="all-linear"),
    "lora of rank 9": causal(LoraConfig, r=9, target_modules=["q_proj", "o_proj", "down_proj"], use_rslora=True),
    "other rows": causal(LoraConfig, r=2, target_modules=ROW, init_lora_weights="gaussian", rank_pattern={"o_proj": 11}),
    "drawn B": causal(LoraConfig, r=3, target_modules=["v_proj", "down_proj"], init_lora_weights=False),
    "orthogonal": causal(LoraConfig, r=6, target_modules=["o_proj", "gate_proj"], init_lora_weights="orthogonal"),
    "dropped": causal(LoraConfig, r=4, target_modules="all-linear", lora_dropout=0.2),
    "b with bias": causal(LoraConfig, r=3, target_modules=["q_proj", "o_proj"], lora_bias=True),
    "dora": causal(LoraConfig, r=3, target_modules=["q_proj", "v_proj", "up_proj"], use_dora=True),
    "dropped dora": causal(LoraConfig, r=3, target_modules=["k_proj", "up_proj"], use_dora=True, lora_dropout=0.1),
    "all biases": causal(LoraConfig, r=2, target_modules=["up_proj", "o_proj"], bias="all"),
    "biases": muxcompile.BitFitConfig(),
    "ia3": causal(IA3Config, target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "ia3 behind rows": causal(IA3Config, target_modules=["q_proj", "o_proj", "down_proj"], feedforward_modules=[]),
    "ia3 on shared inputs": causal(
        IA3Config, target_modules=["q_proj", "gate_proj", "v_proj"], feedforward_modules=["q_proj", "gate_proj"]
    ),
    "norms": causal(LNTuningConfig, target_modules=["input_layernorm", "post_attention_layernorm", "norm"]),
    "prompt": causal(PromptTuningConfig, num_virtual_tokens=5),
    "p-tuning": causal(PromptEncoderConfig, num_virtual_tokens=5, encoder_hidden_size=24),
    "sequential": bottleneck(non_linearity="tanh"),
    "double": bottleneck(mh_adapter=True, original_ln_before=False, non_linearity="swish"),
    "parallel": bottleneck(is_parallel=True, original_ln_before=False, scaling=4.0, mh_adapter=True),
    "head": causal(LoraConfig, r=4, target_modules=["lm_head", "q_proj"]),
    "head alone": causal(LoraConfig, r=3, target_modules=["lm_head"], lora_bias=True),
    "dora head": causal(LoraConfig, r=9, target_modules=["lm_head"], use_dora=True),
    "ia3 head": causal(IA3Config, target_modules=["lm_head", "v_proj"], feedforward_modules=[]),
    "ia3 before the head": causal(IA3Config, target_modules=["lm_head"], feedforward_modules=["lm_head"]),
    "own linears": causal(LoraConfig, r=2, target_modules=["q_proj"], modules_to_save=["up_proj"]),
    "embedding": causal(LoraConfig, r=2, target_modules=["embed_tokens", "down_proj"]),
    "tokens": TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=[5, 2, 60, 33]),
    "own modules": causal(LoraConfig, r=2, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens", "model.norm"]),
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"max_grad_norm": 0.5},
    "dora": {"max_grad_norm": 0.1},
    "drawn B": {"loraplus_lr_ratio": 4.0},
    "ia3": {"optimizer": "sgd", "momentum": 0.9, "learning_rate": 0.1},
    "biases": {"weight_decay": 0.1},
}
FEW = ("lora", "other rows", "dora", "ia3", "ia3 on shared inputs", "biases", "double", "own modules")


def over(ranks: Ranks) -> muxcompile.Options:
    return replace(OPTIONS, mesh=ranks.mesh)


def backbone() -> Any:
    """Of a vocabulary that divides, with biases everywhere."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, attention_bias=True, mlp_bias=True,
    )  # fmt: skip
    return seeded(lambda: LlamaForCausalLM(config), 0).eval()


def tasks(names: Any) -> list[Any]:
    return [
        muxcompile.Task(name, copy.deepcopy(ADAPTERS[name]), **{"learning_rate": RATE} | SETTINGS.get(name, {})) for name in names
    ]


def batches(names: Any, step: int) -> dict[str, Any]:
    found = {}
    for name in names:
        number = list(ADAPTERS).index(name)
        found[name] = examples(100 * number + step, LENGTHS[(number + step) % len(LENGTHS)], vocabulary=VOCABULARY)
    return found


@dataclass
class Run:
    """Three steps of some tasks: what they began with and what came of it, whole."""

    fresh: dict[str, Tensors]
    begin: dict[str, Tensors]
    losses: list[dict[str, float]]
    gradients: list[dict[str, Tensors]]
    norms: list[dict[str, float]]
    weights: dict[str, Tensors]
    quarantined: dict[str, str]


def shaken(model: Any, name: str) -> Tensors:
    """Noise on what each tensor begins with (`shake`), where a rank may have some of them alone."""
    generator = torch.Generator().manual_seed(3)
    for key, value in sorted(model.state_dict(name).items()):
        noise = 0.1 * torch.randn(value.shape, generator=generator)
        if model.state.holds(name, key):
            model.state.write(name, key, value + noise)
    return model.state_dict(name)


def trained(model: Any, names: tuple[str, ...]) -> Run:
    fresh = {name: model.state_dict(name) for name in names}
    begin = {name: shaken(model, name) for name in names}
    losses, gradients, norms = [], [], []
    for step in range(3):
        result = model.forward_backward(batches(names, step))
        losses.append({name: float(result.losses[name]) for name in names})
        gradients.append({name: model.gradients(name) for name in names})
        norms.append({name: float(norm) for name, norm in model.optim_step(names).items()})
    weights = {name: model.state_dict(name) for name in names}
    return Run(fresh, begin, losses, gradients, norms, weights, model.state.poll(names, wait=True))


def wrong_weights(name: str, got: Run, want: Run) -> list[str]:
    settings = SETTINGS.get(name, {})
    if settings.get("optimizer") == "sgd":
        return wrong_after_sgd(got.weights[name], want.weights[name])
    faster = settings.get("loraplus_lr_ratio", 1.0)
    rates = {key: RATE * (faster if ".lora_B." in key else 1.0) for key in want.weights[name]}
    faults, left_out = wrong_after_adamw(got.weights[name], want.weights[name], [own[name] for own in want.gradients], rates)
    return faults + ([f"{left_out:.2%} left out"] if left_out > 0.2 else [])


def faults_of_a_mesh(names: tuple[str, ...], ranks: Ranks) -> dict[str, Any]:
    """The same tasks by one process (the first rank) and by the mesh: what differs more than rounding, by what was looked at."""
    net = backbone()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    got = trained(muxcompile.compile(net, tasks(names), over(ranks)), names)
    # What every rank has, all have with the same bits.
    states = ranks.objects(got.weights)
    if ranks.rank:
        return {}
    want = trained(muxcompile.compile(net, tasks(names), OPTIONS), names)
    found: dict[str, list[str]] = {
        "fresh": [name for name in names if not equal(got.fresh[name], want.fresh[name])],
        "losses": [],
        "gradients": [
            f"{name}: {line}" for name in names for line in wrong_gradients(got.gradients[0][name], want.gradients[0][name])
        ],
        "norms": [],
        "weights": [f"{name}: {line}" for name in names for line in wrong_weights(name, got, want)],
        "far": [],
        "quarantined": list(got.quarantined),
        "backbone": [key for key, value in net.state_dict().items() if not torch.equal(value, before[key])],
        "ranks": [] if all(equal(states[0], other) for other in states) else ["ranks differ"],
    }
    for what in ("losses", "norms"):
        for ours, theirs in zip(getattr(got, what), getattr(want, what), strict=True):
            found[what] += [
                f"{name}: {ours[name]}, not {theirs[name]}"
                for name in names
                if not abs(ours[name] - theirs[name]) <= 1e-5 * theirs[name]
            ]
    for name in names:
        moved = max(float((value - want.begin[name][key]).abs().max()) for key, value in want.weights[name].items())
        found["far"] += [] if moved > 1e-3 else [f"{name} has moved by {moved}"]
    return found


def changed_bits(ranks: Ranks, names: tuple[str, ...], neighbours: tuple[str, ...]) -> list[str]:
    """Tasks alone and beside others on one mesh."""
    net, seen = backbone(), []
    for together in ((*names, *neighbours), *((name,) for name in names)):
        model = muxcompile.compile(net, tasks(together), over(ranks))
        for name in together:
            shaken(model, name)
        losses = [model.step(batches(together, step)).losses for step in range(2)]
        seen.append({name: ([float(own[name]) for own in losses], model.state_dict(name)) for name in together if name in names})
    return [name for alone in seen[1:] for name in alone if not equal(alone[name], seen[0][name])]


def who_comes_and_goes(ranks: Ranks) -> list[str]:
    """Tasks join and leave a mesh; the others' tensors stay, in whole and by piece."""
    net, left = backbone(), ("lora", "other rows", "dora")
    found = []
    # The first rank is the one process that all are held against.
    for options in (over(ranks), OPTIONS)[: 1 if ranks.rank else 2]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = muxcompile.compile(net, tasks(("lora", "ia3")), options)
            model.step(batches(("lora", "ia3"), 0))
            model.remove_task("ia3")
            model.add_task(tasks(("other rows",))[0])
            model.add_task(tasks(("dora",))[0])
            model.step(batches(left, 1))
            model.forward_backward(batches(left, 2))
        found.append({name: model.gradients(name) for name in left})
    if ranks.rank:
        return []
    return [f"{name}: {line}" for name in left for line in wrong_gradients(found[0][name], found[1][name])]


def a_poisoned_task(ranks: Ranks) -> list[str]:
    """What is not finite on one rank alone stops the task on all, and nobody else."""
    net = backbone()
    model = muxcompile.compile(net, tasks(("lora", "ia3")), over(ranks))
    model.forward_backward(batches(("lora", "ia3"), 0))
    if ranks.shard == 1:
        task = model.state.tasks["lora"]
        table = next(own for key, own in zip(task.keys, task.gradients, strict=True) if key.endswith("v_proj.lora_B.weight"))
        table[0, 0] = float("nan")
    model.optim_step(["lora", "ia3"])
    stopped = sorted(model.state.poll(["lora", "ia3"], wait=True))
    return [] if ranks.objects(stopped) == [["lora"]] * ranks.mesh.size else [f"stopped: {stopped}"]


REFUSED: dict[str, tuple[Any, str]] = {
    "dora of a row-parallel linear": (
        causal(LoraConfig, target_modules=["down_proj"], use_dora=True), "use_dora=True at '.*down_proj'",
    ),
    "a start out of the weight": (
        causal(LoraConfig, r=4, target_modules=["q_proj"], init_lora_weights="pissa"), "init_lora_weights='pissa' at '.*q_proj'",
    ),
    "a whole row-parallel linear": (
        causal(LoraConfig, target_modules=["q_proj"], modules_to_save=["down_proj"]), "modules_to_save at '.*down_proj'",
    ),
    "tokens of the head": (
        causal(LoraConfig, target_modules=["q_proj"], trainable_token_indices={"lm_head": [3]}), "trainable tokens at 'lm_head'",
    ),
    "vera": (causal(VeraConfig, r=4, target_modules=["q_proj"]), "peft_type=VERA"),
    "shira": (causal(ShiraConfig, r=1, target_modules=["q_proj"]), "peft_type=SHIRA"),
    "prefix": (causal(PrefixTuningConfig, num_virtual_tokens=4), "peft_type=PREFIX_TUNING"),
}  # fmt: skip


def refusals(ranks: Ranks) -> list[str]:
    found = []
    for what, (adapter, pattern) in REFUSED.items():
        try:
            call = partial(muxcompile.compile, backbone(), {"eve": adapter}, over(ranks))
            refused(call, "'eve'", pattern, "tensor parallelism")
        except AssertionError as error:
            found.append(f"{what}: {error}")
    return found


def wrong_moments(ranks: Ranks) -> list[str]:
    """What optimizers keep, put together and taken apart again."""
    net, names, found = backbone(), ("lora", "ia3", "dora", "biases"), []
    seen: list[dict[str, Any]] = []
    for options in (over(ranks), OPTIONS)[: 1 if ranks.rank else 2]:
        model = muxcompile.compile(net, tasks(names), options)
        for name in names:
            shaken(model, name)
        model.step(batches(names, 0))
        seen.append({})
        for name in names:
            task = model.state.tasks[name]
            for key, view in zip(task.keys, task.views, strict=True):
                if not (own := task.optimizer.state[view]):
                    continue
                whole = {field: model.state.moment(name, key, value) for field, value in own.items()}
                seen[-1][f"{name}: {key}"] = whole
                here = {field: model.state.moment_here(name, key, value) for field, value in whole.items()}
                found += [] if equal(here, dict(own)) else [f"{name}: {key} is not this rank's"]
    for key, alone in seen[-1].items():
        found += [f"{key} {field}" for field in alone if not torch.allclose(alone[field], seen[0][key][field], 1e-4, 1e-7)]
    return found


def gone_on(ranks: Ranks) -> list[str]:
    """A mesh writes whole tensors: one process goes on from its checkpoint, and a mesh from that of one process."""
    net, names, found = backbone(), ("lora", "ia3", "dora", "biases"), []
    with tempfile.TemporaryDirectory() as folder:
        # A mesh has one checkpoint, which the first rank writes.
        shared = ranks.objects(folder)[0]
        for writer, reader in ((over(ranks), OPTIONS), (OPTIONS, over(ranks))):
            path = Path(shared if writer.mesh is not None else folder) / f"{writer.mesh}"
            first, second = (muxcompile.compile(net, tasks(names), options) for options in (writer, reader))
            first.step(batches(names, 0))
            first.save_checkpoint(path)
            second.load_checkpoint(path)
            for model in (first, second):
                model.step(batches(names, 1))
            for name in names:
                want = second.state_dict(name)
                off = {key: float((value - want[key]).abs().max()) for key, value in first.state_dict(name).items()}
                found += [f"{name}: {key} off by {value}" for key, value in off.items() if value > 1e-5]
        ranks.barrier()
    return found


def wrong_collectives(ranks: Ranks) -> list[str]:
    """Two sums in a layer's forward and two in its backward, if something is trained before it; one for the embedded tokens, and one
    for a block of losses."""
    model = muxcompile.compile(backbone(), tasks(("lora",)), over(ranks))
    (group,) = model._build.groups
    found = {name: text.count("mux.reduce") for name, text in group.sources.items()}
    spreads = sum(text.count("mux.spread") for text in group.sources.values())
    want = dict.fromkeys(found, 0) | {
        "embed.forward": 1,
        "model.layers.0.forward": 2,
        "model.layers.0.backward": 1,
        "model.layers.1.forward": 2,
        "model.layers.1.backward": 2,
        "final.backward": 1,
        "head.forward": 1,
        "head.backward": 1,
    }
    return [] if found == want and spreads == 0 else [f"{found}, {spreads} spreads"]


def run_two() -> dict[str, Any]:
    return faults_of_a_mesh(tuple(ADAPTERS), Ranks(Mesh(tp=2), CPU))


def run_two_more() -> dict[str, Any]:
    ranks, found = Ranks(Mesh(tp=2), CPU), {}
    found["bits"] = changed_bits(ranks, ("other rows", "dora", "biases"), ("lora of rank 9", "ia3", "norms"))
    found["coming and going"] = who_comes_and_goes(ranks)
    found["moments"] = wrong_moments(ranks)
    found["gone on"] = gone_on(ranks)
    found["collectives"] = wrong_collectives(ranks)
    found["poison"] = a_poisoned_task(ranks)
    found["refusals"] = refusals(ranks)
    return found


def run_four() -> dict[str, Any]:
    return {mesh: faults_of_a_mesh(FEW, Ranks(Mesh.parse(mesh), CPU)) for mesh in MESHES}


@pytest.fixture(scope="module")
def two() -> dict[str, Any]:
    return processes.run("tests.dist.test_tensor:run_two", 2)[0]


@pytest.fixture(scope="module")
def more() -> dict[str, Any]:
    found = processes.run("tests.dist.test_tensor:run_two_more", 2)
    return {what: [(rank, fault) for rank, own in enumerate(found) for fault in own[what]] for what in found[0]}


@pytest.fixture(scope="module")
def four() -> dict[str, Any]:
    return processes.run("tests.dist.test_tensor:run_four", 4)[0]


LOOKED_AT = ("fresh", "losses", "gradients", "norms", "weights", "far", "quarantined", "backbone", "ranks")
MESHES = ("tp=4", "pp=2,tp=2", "dp=2,tp=2")


@pytest.mark.parametrize("what", LOOKED_AT)
def test_two_ranks_train_what_one_process_trains(two: dict[str, Any], what: str) -> None:
    assert two[what] == []


@pytest.mark.parametrize("what", ["bits", "coming and going", "poison", "refusals", "moments", "gone on", "collectives"])
def test_two_ranks_keep_the_promises_of_one_process(more: dict[str, Any], what: str) -> None:
    assert more[what] == []


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("what", LOOKED_AT)
def test_four_ranks_train_what_one_process_trains(four: dict[str, Any], mesh: str, what: str) -> None:
    assert four[mesh][what] == []


# --- what cannot be split ---------------------------------------------------------------------------------------------


def test_a_model_without_a_plan_is_refused_by_its_type() -> None:
    net = build("GPT2", n_embd=32, n_layer=1, n_head=4, n_positions=64)
    refused(lambda: split.plan(net, 2), "tp=2", "'gpt2'", "base_model_tp_plan")


def test_heads_that_do_not_divide_are_refused_with_the_numbers() -> None:
    refused(lambda: split.plan(llama(), 4), "num_key_value_heads=2, which 4 does not divide")


def test_features_that_do_not_divide_are_refused_by_module() -> None:
    net = llama(num_key_value_heads=4, intermediate_size=46)
    refused(lambda: split.plan(net, 4), r"'model\.layers\.0\.mlp\.gate_proj' has 46 features")


def test_a_part_shares_the_memory_of_what_it_has_whole() -> None:
    net = backbone()
    how = split.Split.of(net, index=1, count=2)
    part: Any = split.split(net, how)
    theirs, ours = net.model.layers[0], part.model.layers[0]
    assert ours.mlp.up_proj.weight.data_ptr() == theirs.mlp.up_proj.weight[24:].data_ptr()
    assert part.model.norm.weight.data_ptr() == net.model.norm.weight.data_ptr()
    assert part.lm_head.weight.data_ptr() == net.lm_head.weight[44:].data_ptr()
    assert torch.equal(ours.mlp.down_proj.weight, theirs.mlp.down_proj.weight[:, 24:])
    assert ours.mlp.down_proj.bias.data_ptr() == theirs.mlp.down_proj.bias.data_ptr()
    assert theirs.mlp.up_proj.out_features == 48
    assert ours.mlp.up_proj.out_features == 24


def test_a_head_whose_vocabulary_does_not_divide_stays_whole() -> None:
    assert split.Split.of(backbone(), index=0, count=2).head == "lm_head"
    how = split.Split.of(llama(), index=0, count=2)
    assert how.head == ""
    assert "lm_head" not in how.ways
    assert "model.embed_tokens" not in how.ways


def tied() -> Any:
    config = LlamaConfig(
        vocab_size=88, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=True
    )
    return seeded(lambda: LlamaForCausalLM(config), 0)


def test_a_head_and_the_embedding_that_it_is_tied_to_share_one_piece() -> None:
    net = tied()
    part: Any = split.split(net, split.Split.of(net, index=1, count=2))
    assert part.lm_head.weight is part.model.embed_tokens.weight
    assert torch.equal(part.lm_head.weight, net.model.embed_tokens.weight[44:])
    assert part.model.embed_tokens.num_embeddings == 44
    assert net.lm_head.weight is net.model.embed_tokens.weight
    assert net.model.embed_tokens.num_embeddings == 88


def test_adapters_see_a_whole_embedding_and_its_head_split() -> None:
    net = tied()
    part: Any = split.split(net, split.Split.of(net, index=1, count=2).adapted)
    assert part.model.embed_tokens.weight.shape == (88, 16)
    assert torch.equal(part.lm_head.weight, net.model.embed_tokens.weight[44:])


def test_an_embedding_stays_whole_where_a_module_needs_all_of_it() -> None:
    net = backbone()
    net.model.again = torch.nn.Embedding(VOCABULARY, 32)
    net.model.again.weight = net.model.embed_tokens.weight
    ways = split.plan(net, 2)
    assert "model.embed_tokens" not in ways
    assert ways["lm_head"] == split.COLUMN


def test_a_split_table_that_another_module_reads_is_refused() -> None:
    net = backbone()
    how = split.Split.of(net, index=0, count=2)
    graph = capture(split.split(net, how), tokens=64, tile=16, max_sequences=4)
    assert limits.vocabulary(graph, how) == VOCABULARY
    (node,) = graph.gm.graph.find_nodes(op="call_function", target=EMBEDDING)
    with graph.gm.graph.inserting_before(node):
        other = graph.gm.graph.call_function(torch.ops.aten.sum.default, (node.args[0],))
    other.meta = {**node.meta, "mux_module": "model.norm"}
    refused(lambda: lookup(graph, how=how), "tp=2", r"'model\.norm' reads model\.embed_tokens\.weight")
