"""Each task of a mixed step equals the same task alone with HF PEFT: losses, gradients, and weights after the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, ShiraConfig
from torch import Tensor, nn

import muxcompile

from .peft_reference import (
    VOCABULARY,
    Example,
    Tensors,
    build,
    examples,
    fill,
    llama,
    loss_and_gradients,
    peft_model,
    seeded,
    shifted,
    train_alone,
    trainable,
    wrong_after_adamw,
    wrong_after_sgd,
    wrong_gradients,
    wrong_loss,
)

pytestmark = pytest.mark.usefixtures("one_capture")
STEPS = 5
RATES = {"sgd": 0.5, "adamw": 1e-3}
WEIGHT_DECAY = 0.01


@dataclass(frozen=True)
class Case:
    """A backbone and three adapters that share no rank, scale or choice of layers."""

    name: str
    make: Callable[[], Any]
    adapters: dict[str, LoraConfig]
    # Ragged, with sequences of one token (nothing to predict) and longer than a block of 16 rows.
    lengths: tuple[tuple[int, ...], ...] = ((7, 1, 19), (33, 2), (12, 5, 17), (40,), (3, 16, 9))
    # Elements whose gradient is rounding alone, for AdamW: next to none, but a dead ReLU unit zeroes a whole column of A.
    most_left_out: float = 0.01


LLAMA_LIKE = (
    {
        "alice": LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", exclude_modules=["down_proj"], task_type="CAUSAL_LM"),
        "bob": LoraConfig(
            r=3, lora_alpha=16, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 9}, alpha_pattern={"q_proj": 5}
        ),
        "carol": LoraConfig(
            r=20, lora_alpha=30, use_rslora=True, target_modules=r".*layers\.1\.(self_attn\.(k|o)_proj|mlp\.down_proj)"
        ),
    },
    {
        "dave": LoraConfig(
            r=33,
            target_modules=["o_proj", "gate_proj", "layers.0.mlp.up_proj"],
            rank_pattern={r"layers\.0\.self_attn\.o_proj": 1},
        ),
        "erin": LoraConfig(
            r=1,
            lora_alpha=3,
            use_rslora=True,
            target_modules="all-linear",
            rank_pattern={"k_proj": 7, r".*\.1\.mlp\.up_proj": 12},
            alpha_pattern={r".*gate_proj": 1},
        ),
        "frank": LoraConfig(r=16, lora_alpha=5, target_modules=["down_proj", "k_proj"], layers_to_transform=[1]),
    },
)
GPT2_LIKE = (
    {
        "alice": LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM"),
        "bob": LoraConfig(r=3, target_modules="all-linear", rank_pattern={"c_fc": 11}, alpha_pattern={r".*attn\.c_proj": 2}),
        "carol": LoraConfig(r=17, use_rslora=True, target_modules=r".*h\.1\.mlp\.c_(fc|proj)", fan_in_fan_out=True),
    },
    {
        "dave": LoraConfig(r=9, target_modules=["c_proj"], exclude_modules=r".*attn\.c_proj", fan_in_fan_out=True),
        "erin": LoraConfig(r=2, lora_alpha=7, target_modules=["c_attn", "mlp.c_proj"], rank_pattern={r"h\.0\.attn\.c_attn": 31}),
        "frank": LoraConfig(r=8, lora_alpha=1, use_rslora=True, target_modules="all-linear", fan_in_fan_out=True),
    },
)
OPT_LIKE = (
    {
        "alice": LoraConfig(r=5, lora_alpha=8, target_modules="all-linear", exclude_modules=["out_proj"]),
        "bob": LoraConfig(r=2, target_modules=["k_proj", "v_proj"], rank_pattern={"k_proj": 6}, task_type="CAUSAL_LM"),
        "carol": LoraConfig(r=24, lora_alpha=48, use_rslora=True, target_modules=r".*layers\.1\.fc[12]"),
    },
    {
        "dave": LoraConfig(r=32, target_modules=["q_proj", "fc2"], alpha_pattern={"fc2": 3}),
        "erin": LoraConfig(r=1, target_modules=["out_proj", "fc1"], use_rslora=True, lora_alpha=4),
        "frank": LoraConfig(r=10, lora_alpha=2, target_modules="all-linear", rank_pattern={r".*layers\.0\..*": 3}),
    },
)

GPT2_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
OPT_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0}

CASES = [
    Case(
        "llama, grouped heads",
        lambda: build(
            "Llama", 11, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2
        ),
        LLAMA_LIKE[0],
    ),
    Case(
        "llama, tied, biases",
        lambda: llama(2, num_key_value_heads=1, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
        LLAMA_LIKE[1],
    ),
    Case(
        "qwen3, wide heads",
        lambda: build(
            "Qwen3",
            3,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
        ),
        LLAMA_LIKE[0],
    ),
    Case(
        "qwen3, tied, narrow heads",
        lambda: build(
            "Qwen3",
            4,
            hidden_size=40,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=8,
            tie_word_embeddings=True,
        ),
        LLAMA_LIKE[1],
    ),
    Case("gpt2", lambda: build("GPT2", 5, n_embd=32, n_head=4, n_layer=2, n_positions=64, **GPT2_DROPOUT), GPT2_LIKE[0]),
    Case(
        "gpt2, a scale for each layer, untied",
        lambda: build(
            "GPT2",
            6,
            n_embd=48,
            n_head=3,
            n_inner=40,
            n_layer=2,
            n_positions=64,
            activation_function="relu",
            scale_attn_by_inverse_layer_idx=True,
            tie_word_embeddings=False,
            **GPT2_DROPOUT,
        ),
        GPT2_LIKE[1],
        most_left_out=0.2,
    ),
    Case(
        "opt",
        lambda: build(
            "OPT",
            7,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            **OPT_DROPOUT,
        ),
        OPT_LIKE[0],
        most_left_out=0.2,
    ),
    Case(
        "opt, norms behind, projected embeddings",
        lambda: build(
            "OPT",
            8,
            hidden_size=48,
            word_embed_proj_dim=24,
            ffn_dim=40,
            num_hidden_layers=2,
            num_attention_heads=3,
            max_position_embeddings=64,
            do_layer_norm_before=False,
            **OPT_DROPOUT,
        ),
        OPT_LIKE[1],
        most_left_out=0.2,
    ),
]


@dataclass(frozen=True)
class Outcome:
    """One task: what came out here among the others, and alone with PEFT. `loss` and `gradients` are the first step's."""

    optimizer: str
    started: Tensors
    loss: tuple[float, float]
    gradients: tuple[Tensors, Tensors]
    weights: tuple[Tensors, Tensors]
    # PEFT's gradients of every step: they say which of AdamW's elements are rounding alone.
    history: list[Tensors]
    most_left_out: float


def task_names(case: Case) -> list[tuple[str, str, str]]:
    """(task, adapter, optimizer): every adapter trains twice in the same chunks, once with each optimizer."""
    return [(f"{adapter} {optimizer}", adapter, optimizer) for adapter in case.adapters for optimizer in RATES]


def tasks_of(case: Case, rates: dict[str, float]) -> list[muxcompile.Task]:
    return [
        muxcompile.Task(
            name, case.adapters[adapter], optimizer=optimizer, learning_rate=rates[optimizer], weight_decay=WEIGHT_DECAY
        )
        for name, adapter, optimizer in task_names(case)
    ]


def batches_of(case: Case, name: str) -> list[list[Example]]:
    """A task's own data, one batch a step. Two thirds of the labels are -100 in every second batch."""
    seed = sum(map(ord, name))
    return [
        examples(100 * seed + step, case.lengths[(seed + step) % len(case.lengths)], (0.9, 0.3)[step % 2]) for step in range(STEPS)
    ]


def optimizer_of(kind: str, model: Any) -> torch.optim.Optimizer:
    parameters = list(trainable(model).values())
    if kind == "sgd":
        return torch.optim.SGD(parameters, lr=RATES[kind], weight_decay=WEIGHT_DECAY)
    return torch.optim.AdamW(parameters, lr=RATES[kind], weight_decay=WEIGHT_DECAY)


def compile_case(case: Case, rates: dict[str, float]) -> tuple[Any, Any]:
    """The backbone, and the compiled model with random weights in every adapter."""
    backbone = case.make()
    model = muxcompile.compile(backbone, tasks_of(case, rates), muxcompile.Options(chunk_tokens=256))
    for index, name in enumerate(model.tasks):
        fill(model, name, seed=index)
    return backbone, model


def run_case(case: Case, backbone: Any, model: Any) -> dict[str, Outcome]:
    """Five mixed steps, and five of PEFT's alone for each task, from the same weights on the same data."""
    started = {name: model.state_dict(name) for name in model.tasks}
    data = {name: batches_of(case, name) for name in model.tasks}
    result = model.forward_backward({name: batches[0] for name, batches in data.items()})
    gradients = {name: model.gradients(name) for name in model.tasks}
    model.optim_step(model.tasks)
    for step in range(1, STEPS):
        model.step({name: batches[step] for name, batches in data.items()})
    found = {}
    for name, adapter, optimizer in task_names(case):
        alone = peft_model(backbone, case.adapters[adapter], started[name])
        seen = train_alone(alone, optimizer_of(optimizer, alone), data[name])
        found[name] = Outcome(
            optimizer,
            started[name],
            loss=(float(result.losses[name]), seen[0][0]),
            gradients=(gradients[name], seen[0][1]),
            weights=(model.state_dict(name), {key: value.detach().clone() for key, value in trainable(alone).items()}),
            history=[step_gradients for _, step_gradients in seen],
            most_left_out=case.most_left_out,
        )
    return found


def wrong_weights(outcome: Outcome) -> tuple[list[str], float]:
    """Complaints about the weights after five steps by the rule of `wrong_after_adamw`, and the fraction of elements left out."""
    if outcome.optimizer == "sgd":
        return wrong_after_sgd(*outcome.weights), 0.0
    return wrong_after_adamw(*outcome.weights, outcome.history, RATES["adamw"])


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def outcomes(request: pytest.FixtureRequest) -> dict[str, Outcome]:
    return run_case(request.param, *compile_case(request.param, RATES))


def test_every_loss_and_gradient_of_a_mixed_step_equals_peft_alone(outcomes: dict[str, Outcome]) -> None:
    for name, outcome in outcomes.items():
        wrong = wrong_loss(*outcome.loss) + wrong_gradients(*outcome.gradients)
        assert not wrong, (name, wrong)


def test_the_weights_after_five_mixed_steps_equal_peft_alone(outcomes: dict[str, Outcome]) -> None:
    for name, outcome in outcomes.items():
        wrong, left_out = wrong_weights(outcome)
        assert not wrong, (name, wrong)
        assert left_out <= outcome.most_left_out, (name, left_out)
        # Every tensor went a hundred times as far as the checks forgive (1e-5 after SGD and, at lr = 1e-3, after AdamW).
        travel = {key: float((outcome.weights[0][key] - start).abs().max()) for key, start in outcome.started.items()}
        assert min(travel.values()) > 1e-3, (name, travel)


@pytest.fixture(scope="module")
def still() -> tuple[Case, Any, Any]:
    """A case whose tasks all have lr = 0: whatever runs on it, its weights stay where they are."""
    return CASES[1], *compile_case(CASES[1], dict.fromkeys(RATES, 0.0))


def test_the_check_of_the_weights_fails_for_every_tensor_at_lr_0(still: tuple[Case, Any, Any]) -> None:
    for name, outcome in run_case(*still).items():
        wrong, _ = wrong_weights(outcome)
        assert len(wrong) == len(outcome.started), (name, wrong)
        assert all(torch.equal(outcome.weights[0][key], start) for key, start in outcome.started.items()), name


def test_the_check_fails_for_the_one_task_whose_labels_are_shifted(still: tuple[Case, Any, Any]) -> None:
    case, backbone, model = still
    data = {name: batches_of(case, name)[0] for name in model.tasks}
    victim = model.tasks[2]
    result = model.forward_backward({**data, victim: shifted(data[victim])})
    for name, adapter, _ in task_names(case):
        alone = peft_model(backbone, case.adapters[adapter], model.state_dict(name))
        loss, gradients = loss_and_gradients(alone, data[name])
        assert bool(wrong_loss(float(result.losses[name]), loss)) == (name == victim), name
        wrong = wrong_gradients(model.gradients(name), gradients)
        assert len(wrong) == (len(gradients) if name == victim else 0), (name, wrong)
    model.optim_step(model.tasks)


def torch_optimizer(task: muxcompile.Task, model: Any) -> torch.optim.Optimizer:
    parameters = list(trainable(model).values())
    if task.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=task.learning_rate, momentum=task.momentum, weight_decay=task.weight_decay)
    return torch.optim.AdamW(parameters, lr=task.learning_rate, betas=task.betas, eps=task.eps, weight_decay=task.weight_decay)


def test_schedules_clipping_and_momentum_equal_those_of_transformers_and_torch() -> None:
    from transformers import get_scheduler

    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "o_proj", "down_proj"])
    tasks = [
        muxcompile.Task("clipped", config, optimizer="sgd", learning_rate=2.0, max_grad_norm=0.05),
        muxcompile.Task("warm", config, optimizer="sgd", learning_rate=0.5, momentum=0.9, warmup_steps=2),
        muxcompile.Task("linear", config, optimizer="sgd", learning_rate=0.5, lr_schedule="linear", warmup_steps=1, total_steps=6),
        muxcompile.Task(
            "cosine", config, optimizer="sgd", learning_rate=0.5, lr_schedule="cosine", total_steps=7, weight_decay=0.1
        ),
        muxcompile.Task("adamw", config, learning_rate=1e-3, betas=(0.7, 0.9), eps=1e-3, weight_decay=0.3, max_grad_norm=0.05),
    ]
    backbone = llama(12, num_hidden_layers=1)
    model = muxcompile.compile(backbone, tasks, muxcompile.Options(chunk_tokens=256))
    started = {name: fill(model, name, seed=index) for index, name in enumerate(model.tasks)}
    data = {name: [examples(7 * index + step, (14, 20)) for step in range(STEPS)] for index, name in enumerate(model.tasks)}
    norms = [model.step({name: data[name][step] for name in model.tasks}).grad_norms for step in range(STEPS)]
    for task in tasks:
        alone = peft_model(backbone, config, started[task.name])
        optimizer = torch_optimizer(task, alone)
        kind = "constant_with_warmup" if task.lr_schedule == "constant" else task.lr_schedule
        scheduler = get_scheduler(kind, optimizer, num_warmup_steps=task.warmup_steps, num_training_steps=task.total_steps)
        for step in range(STEPS):
            loss_and_gradients(alone, data[task.name][step])
            norm = torch.nn.utils.clip_grad_norm_(trainable(alone).values(), task.max_grad_norm or float("inf"))
            # fp32 sums of squares in two orders, of gradients that themselves agree to 1e-5
            assert float(norms[step][task.name]) == pytest.approx(float(norm), rel=2e-5), (task.name, step)
            optimizer.step()
            scheduler.step()
        weights = {key: value.detach() for key, value in trainable(alone).items()}
        assert wrong_after_sgd(model.state_dict(task.name), weights) == [], task.name
        assert model.learning_rate(task.name) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12, abs=1e-15), task.name
        travel = {key: float((weights[key] - start).abs().max()) for key, start in started[task.name].items()}
        assert min(travel.values()) > 1e-3, (task.name, travel)
    assert min(float(norm["clipped"]) for norm in norms) > 0.05, "nothing was clipped"


# --- other families --------------------------------------------------------------------------------------------------

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
WINDOW = 7
LONGER_THAN_THE_WINDOW = (31, 6, 18)
TWO = {
    "alice": LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
    "bob": LoraConfig(r=10, target_modules=["q_proj", "k_proj", "down_proj"], use_rslora=True),
}


def disagreements(
    backbone: Any,
    adapters: dict[str, Any],
    lengths: Mapping[str, tuple[int, ...]],
    reference: Any = None,
    skip: tuple[str, ...] = (),
) -> list[str]:
    """What is wrong with one mixed step against PEFT on `reference` (the backbone itself if None)."""
    model = muxcompile.compile(backbone, adapters, muxcompile.Options(chunk_tokens=128, skip_passes=skip))
    data = {}
    for index, name in enumerate(adapters):
        fill(model, name, seed=index)
        data[name] = examples(index, lengths[name])
    result = model.forward_backward(data)
    found = []
    for name, config in adapters.items():
        loss, gradients = loss_and_gradients(peft_model(reference or backbone, config, model.state_dict(name)), data[name])
        wrong = wrong_loss(float(result.losses[name]), loss) + wrong_gradients(model.gradients(name), gradients)
        found += [f"{name}: {complaint}" for complaint in wrong]
    return found


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("Mistral", {"sliding_window": WINDOW}),
        ("Gemma", {"head_dim": 16}),
        (
            "Gemma3Text",
            {
                "head_dim": 16,
                "sliding_window": WINDOW,
                "layer_types": ["sliding_attention", "full_attention"],
                "query_pre_attn_scalar": 20,
                "max_position_embeddings": 128,
            },
        ),
    ],
)
def test_losses_and_gradients_equal_peft_for_other_families_and_sliding_windows(kind: str, fields: dict[str, Any]) -> None:
    lengths = {"alice": LONGER_THAN_THE_WINDOW, "bob": (WINDOW, WINDOW + 1, 40)}
    assert not disagreements(build(kind, 9, **SMALL, **fields), TWO, lengths)


def test_a_sliding_window_that_is_ignored_would_be_seen() -> None:
    windowed, unbounded = (build("Mistral", 9, **SMALL, sliding_window=window) for window in (WINDOW, None))
    found = disagreements(windowed, {"alice": TWO["alice"]}, {"alice": LONGER_THAN_THE_WINDOW}, unbounded)
    assert len(found) > 10, found


def test_leaving_out_the_fuse_pass_changes_nothing_but_rounding() -> None:
    lengths = {"alice": (20, 3), "bob": (9, 30)}
    assert not disagreements(llama(13, num_hidden_layers=1), TWO, lengths, skip=("fuse",))


class PlainLayer(nn.Module):
    """Attention and a two-layer MLP, norms in front; 4 query heads of 8, `groups` key/value heads."""

    def __init__(self, groups: int = 4) -> None:
        super().__init__()
        self.sizes = [32, 8 * groups, 8 * groups]
        self.norm1, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.qkv, self.out = nn.Linear(32, sum(self.sizes)), nn.Linear(32, 32)
        self.up, self.down = nn.Linear(32, 64, bias=False), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norm1(x)).split(self.sizes, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, 8)).transpose(1, 2) for part in parts)
        grouped = {} if len(set(self.sizes)) == 1 else {"enable_gqa": True, "scale": 0.5}
        seen = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, **grouped)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class PlainModel(nn.Module):
    """A causal language model that owes nothing to transformers: learned positions, logits returned as they are."""

    def __init__(self, groups: int = 4) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, 32), nn.Embedding(48, 32)
        self.blocks = nn.ModuleList(PlainLayer(groups) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, VOCABULARY)

    def layers(self) -> list[nn.Module]:
        return list(self.blocks)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids) + self.positions(position_ids)
        for block in self.layers():
            x = block(x)
        return self.head(self.norm(x))


class RepeatedModel(PlainModel):
    """Its first layer runs twice: one adapter, two sites, a gradient from each."""

    def __init__(self) -> None:
        super().__init__(groups=2)

    def layers(self) -> list[nn.Module]:
        return [self.blocks[0], self.blocks[1], self.blocks[0]]


@pytest.mark.parametrize("kind", [PlainModel, RepeatedModel])
def test_losses_and_gradients_equal_peft_for_a_plain_module_with_learned_positions(kind: type[PlainModel]) -> None:
    backbone = seeded(kind, 10).eval()
    adapters = {
        "alice": LoraConfig(r=4, lora_alpha=8, target_modules=["qkv", "out", "up", "down"]),
        "bob": LoraConfig(r=12, target_modules=r"blocks\.1\.(qkv|down)", use_rslora=True),
        "carol": IA3Config(target_modules=["qkv", "down"], feedforward_modules=["down"]),
        "dave": LoraConfig(r=4, target_modules=["qkv", "up"], use_dora=True),
        "erin": LoraConfig(r=4, target_modules=["qkv", "up"], init_lora_weights="pissa"),
        "fay": ShiraConfig(r=1, target_modules=["qkv", "down"]),
    }
    # 48 is as long as the table of positions.
    lengths = {"alice": (20, 1, 33), "bob": (48, 5), "carol": (9, 14), "dave": (17,), "erin": (4, 11), "fay": (17, 6)}
    assert not disagreements(backbone, adapters, lengths)
