"""Bad input is one clear ValueError and changes nothing; a task that goes wrong is stopped and the others keep their bits."""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import LoraConfig
from torch import Tensor, nn

import muxcompile

from .peft_reference import VOCABULARY, Example, Tensors, build, equal, everything, examples, fill, llama, refused, seeded

CHUNK = muxcompile.Options(chunk_tokens=48)
QV = ["q_proj", "v_proj"]


@functools.cache
def small() -> Any:
    """A backbone for refusals that come before any capture."""
    return llama(61, num_hidden_layers=1)


def look(backbone: nn.Module) -> tuple[Any, ...]:
    """What a refused compilation must leave alone."""
    config = getattr(backbone, "config", None)
    return (
        {name: (tensor.data_ptr(), tensor._version, tensor.requires_grad) for name, tensor in backbone.named_parameters()},
        {name: (tensor.data_ptr(), tensor._version) for name, tensor in backbone.named_buffers()},
        {
            name: (type(module), module.training, len(module._forward_hooks), len(module._forward_pre_hooks))
            for name, module in backbone.named_modules()
        },
        config.to_dict() if config is not None else None,
        getattr(config, "_attn_implementation", None),
        torch.random.get_rng_state().tolist(),
    )


def refused_compile(backbone: nn.Module, tasks: Any, *words: str, options: muxcompile.Options = CHUNK) -> str:
    before = look(backbone)
    message = refused(lambda: muxcompile.compile(backbone, tasks, options), *words)
    assert look(backbone) == before
    return message


# --- tasks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (["q_porj"], ("'q_porj'", "'q_proj'")),
        (["q_proj", "dwon_proj"], ("'dwon_proj'", "'down_proj'")),
        (["layers.0.self_attn.q_prj"], ("q_prj", "'q_proj'")),
        (r".*\.nothing", ("nothing",)),
        (r"*(", (r"\*\(",)),
        (["norm"], ("norm",)),
        (["self_attn"], ("self_attn",)),
        ([], ()),
    ],
)
def test_an_unknown_or_unfit_target_is_refused_by_its_name(targets: Any, words: tuple[str, ...]) -> None:
    config = LoraConfig(r=4, target_modules=targets)
    before = copy.deepcopy(config.to_dict())
    refused_compile(small(), {"good": LoraConfig(r=4, target_modules=QV), "tom": config}, "'tom'", "[Tt]arget.modules", *words)
    assert config.to_dict() == before


@pytest.mark.parametrize("names", [("tom", "tom"), ("tom", "Tom")])
def test_two_tasks_of_one_name_are_refused(names: tuple[str, str]) -> None:
    refused_compile(
        small(), [muxcompile.Task(name, LoraConfig(r=4, target_modules=QV)) for name in names], f"'{names[1]}'", "name", "twice"
    )


@pytest.mark.parametrize("tasks", [{}, [], (), None])
def test_an_empty_set_of_tasks_is_refused(tasks: Any) -> None:
    refused_compile(small(), tasks, "tasks", "empty|at least one")


@pytest.mark.parametrize("adapter", [None, 7, {"r": 4}, "no/such/folder", Path("no/such/folder")])
def test_something_that_is_no_adapter_is_refused(adapter: Any) -> None:
    refused_compile(small(), {"tom": adapter}, "'tom'", "adapter")


FIELDS: dict[str, dict[str, Any]] = {
    "use_dora with bias": {"use_dora": True, "bias": "lora_only"},
    "modules_to_save": {"modules_to_save": ["mlp"]},
    "modules_to_save with bias": {"modules_to_save": ["norm"], "bias": "all"},
    "ensure_weight_tying": {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    "layer_replication": {"layer_replication": [(0, 1), (0, 1)]},
    "target_parameters": {"target_parameters": ["mlp.gate_proj.weight"]},
    "init_lora_weights": {"init_lora_weights": "pissa", "lora_dropout": 0.1},
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_lora_field_that_would_change_the_meaning_is_refused_by_its_name(field: str) -> None:
    refused_compile(small(), {"tom": LoraConfig(r=4, target_modules=QV, **FIELDS[field])}, "'tom'", field, "not supported")


def config_of(kind: str, **fields: Any) -> Any:
    """A config with these fields, whatever its class makes of them."""
    configs: dict[str, Any] = {
        "LORA": lambda: LoraConfig(r=4, target_modules=QV),
        "VERA": lambda: peft.VeraConfig(target_modules=QV),
        "IA3": lambda: peft.IA3Config(target_modules=QV, feedforward_modules=[]),
        "SHIRA": lambda: peft.ShiraConfig(target_modules=QV),
        "LN_TUNING": lambda: peft.LNTuningConfig(),
        "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(num_virtual_tokens=2),
        "TRAINABLE_TOKENS": lambda: peft.TrainableTokensConfig(token_indices=[1]),
        "BITFIT": lambda: muxcompile.BitFitConfig(),
        "BOTTLENECK": lambda: muxcompile.BottleneckConfig(),
    }
    config = configs[kind]()
    for field, value in fields.items():
        setattr(config, field, value)
    return config


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        *(("LORA", field, value) for field in ("use_dora", "use_rslora", "lora_bias", "fan_in_fan_out") for value in ("no", 1)),
        *(("LORA", "target_modules", value) for value in ({"q_proj": 1}, 5, [1])),
        ("LORA", "exclude_modules", [1]),
        ("LORA", "modules_to_save", "lm_head"),
        *(("LORA", "lora_alpha", value) for value in ("x", None)),
        ("LORA", "runtime_config", {}),
        ("LORA", "layers_to_transform", "0"),
        ("LORA", "layers_pattern", 5),
        *(("LORA", "trainable_token_indices", value) for value in (["a"], [True], {"embed_tokens": 1})),
        *(("LORA", field, value) for field in ("rank_pattern", "alpha_pattern") for value in ([1], {"q_proj": "x"}, {1: 1})),
        ("VERA", "init_weights", "false"),
        ("VERA", "save_projection", "false"),
        ("VERA", "d_initial", "x"),
        ("VERA", "projection_prng_key", 0.5),
        ("IA3", "init_ia3_weights", "false"),
        ("IA3", "feedforward_modules", 5),
        ("SHIRA", "init_weights", "false"),
        ("SHIRA", "random_seed", "x"),
        ("LN_TUNING", "target_modules", 5),
        ("PREFIX_TUNING", "prefix_projection", "false"),
        ("TRAINABLE_TOKENS", "token_indices", "1"),
        ("BITFIT", "target_modules", [1]),
        ("BOTTLENECK", "is_parallel", "false"),
    ],
)
def test_a_field_of_another_type_is_refused_by_its_own_name(kind: str, field: str, value: Any) -> None:
    message = refused_compile(small(), {"tom": config_of(kind, **{field: value})}, "'tom'", rf"\b{field}=")
    assert "must be" in message or "True or False" in message


def test_a_boolean_that_another_tool_left_open_is_false() -> None:
    model = muxcompile.compile(nano(), {"tom": LoraConfig(r=4, target_modules=["out"], fan_in_fan_out=None, use_dora=None)}, CHUNK)
    assert not any("magnitude" in key for key in model.state_dict("tom"))


@pytest.mark.parametrize("given", [[], [1, 1], [-1], [10**6], {"embed_tokens": [2], "q_proj": [1]}, {"nothing": [1]}], ids=str)
def test_tokens_that_cannot_be_trained_are_refused(given: Any) -> None:
    config = LoraConfig(r=4, target_modules=QV, trainable_token_indices=given)
    refused_compile(small(), {"tom": config}, "'tom'", "trainable_token_indices|nothing")


def test_more_tokens_than_tables_hold_are_refused() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    backbone = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=300, **sizes))
    config = LoraConfig(r=4, target_modules=QV, trainable_token_indices=list(range(257)))
    refused_compile(backbone, {"tom": config}, "'tom'", "trainable_token_indices", "257 tokens; up to 256")


@pytest.mark.parametrize("entry", ["nothing", "embed_token"])
def test_a_module_to_save_that_is_not_there_is_refused(entry: str) -> None:
    config = LoraConfig(r=4, target_modules=QV, modules_to_save=["norm", entry])
    refused_compile(small(), {"tom": config}, "'tom'", "modules_to_save", f"'{entry}'")


def test_tokens_of_a_kind_of_their_own_are_refused_where_the_head_is_tied() -> None:
    config = peft.TrainableTokensConfig(token_indices=[1])
    refused_compile(llama(tie_word_embeddings=True), {"tom": config}, "'tom'", "TRAINABLE_TOKENS", "tied")
    refused_compile(small(), {"tom": peft.TrainableTokensConfig(token_indices=[])}, "'tom'", "token_indices")
    refused_compile(small(), {"tom": peft.TrainableTokensConfig(token_indices=[1], init_weights=False)}, "'tom'", "init_weights")


def test_a_tied_head_with_tokens_and_an_adapter_is_refused() -> None:
    config = LoraConfig(r=4, target_modules=["lm_head"], trainable_token_indices=[1])
    refused_compile(llama(tie_word_embeddings=True), {"tom": config}, "'tom'", "trainable_token_indices", "lm_head")


@pytest.mark.parametrize("fields", [{"use_dora": True}, {"lora_bias": True}])
def test_what_lora_of_an_embedding_cannot_do_is_refused(fields: dict[str, Any]) -> None:
    config = LoraConfig(r=4, target_modules=["embed_tokens"], **fields)
    refused_compile(small(), {"tom": config}, "'tom'", next(iter(fields)))


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
def test_a_start_that_decomposes_weights_is_refused_for_an_embedding(init: str) -> None:
    config = LoraConfig(r=4, target_modules=["embed_tokens"], init_lora_weights=init)
    refused_compile(small(), {"tom": config}, "'tom'", "init_lora_weights", "embedding")


def test_loraplus_is_refused_for_what_peft_trains_at_a_rate_of_its_own() -> None:
    for fields in ({"target_modules": ["embed_tokens"]}, {"target_modules": QV, "modules_to_save": ["norm"]}):
        task = muxcompile.Task("tom", LoraConfig(r=4, **fields), loraplus_lr_ratio=4)
        refused_compile(small(), [task], "'tom'", "loraplus_lr_ratio")


def test_an_embedding_that_computes_more_than_a_lookup_is_refused() -> None:
    backbone = build("OPT", hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=16)
    for config in (
        LoraConfig(r=4, target_modules=["embed_positions"]),
        LoraConfig(r=4, target_modules=QV, modules_to_save=["embed_positions"]),
    ):
        refused_compile(backbone, {"tom": config}, "'tom'", "embed_positions", "OPTLearnedPositionalEmbedding")


@pytest.mark.parametrize(
    "config",
    [
        peft.OFTConfig(target_modules=QV),
        peft.AdaLoraConfig(r=4, target_modules=QV, total_step=10),
        peft.LoHaConfig(r=4, target_modules=QV),
        peft.LoKrConfig(r=4, target_modules=QV),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_another_peft_type_is_refused_by_its_name(config: Any) -> None:
    refused_compile(small(), {"tom": config}, "'tom'", f"peft_type={config.peft_type.value}", "LORA")


@pytest.mark.parametrize("rank", [0, -1, 257, 4.0, True, "8", None])
def test_a_rank_outside_1_to_256_is_refused(rank: Any) -> None:
    config = LoraConfig(r=4, target_modules=QV)
    config.r = rank
    refused_compile(small(), {"tom": config}, "'tom'", r"\br=", "256")


@pytest.mark.parametrize("rank", [0, 257])
def test_a_rank_of_a_pattern_outside_1_to_256_is_refused(rank: int) -> None:
    refused_compile(small(), {"tom": LoraConfig(r=4, target_modules=QV, rank_pattern={"v_proj": rank})}, "'tom'", str(rank))


@pytest.mark.parametrize("alpha", [math.nan, math.inf])
def test_an_alpha_that_is_not_finite_is_refused(alpha: float) -> None:
    refused_compile(small(), {"tom": LoraConfig(r=4, lora_alpha=alpha, target_modules=QV)}, "'tom'", "lora_alpha")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("learning_rate", value) for value in (-1e-9, math.nan, math.inf, "1e-4", True, None)),
        *(("batch_size", value) for value in (0, -1, 2.0, True)),
        *(("max_length", value) for value in (0, -5, 8.0)),
        *(("betas", value) for value in ((1.0, 0.9), (0.9, -0.1), (0.9,), (0.9, math.nan), 0.9)),
        *(("eps", value) for value in (-1e-8, math.nan)),
        *(("momentum", value) for value in (-0.1, math.inf)),
        *(("weight_decay", value) for value in (-0.1, math.nan)),
        *(("warmup_steps", value) for value in (-1, 1.5)),
        *(("total_steps", value) for value in (0, -1, 2.5)),
        *(("max_grad_norm", value) for value in (0, -1.0, math.nan)),
        *(("seed", value) for value in (-1, 0.5)),
        ("optimizer", "lion"),
        ("lr_schedule", "polynomial"),
        ("loss", "dpo"),
    ],
)
def test_a_bad_number_of_a_task_is_refused_by_task_and_field(field: str, value: Any) -> None:
    refused(lambda: muxcompile.Task("tom", LoraConfig(r=4), **{field: value}), "'tom'", field)


def test_schedules_that_need_an_end_are_refused_without_one() -> None:
    refused(lambda: muxcompile.Task("tom", LoraConfig(), lr_schedule="linear"), "'tom'", "total_steps", "linear")
    refused(
        lambda: muxcompile.Task("tom", LoraConfig(), lr_schedule="cosine", warmup_steps=5, total_steps=4), "'tom'", "warmup_steps"
    )


@pytest.mark.parametrize("name", ["", "a/b", "..", ".", " a", "a\n", "a\\b", "a:b", 3, None])
def test_a_name_that_no_folder_can_have_is_refused(name: Any) -> None:
    refused(lambda: muxcompile.Task(name, LoraConfig(r=4, target_modules=QV)), "name")


@pytest.mark.parametrize(
    "name", ["v1.2", "alice@example.com", "keys", "forward", "default", "weight", "base_layer", "été 東京 100%", "-"]
)
def test_any_other_name_is_a_good_name(name: str) -> None:
    # PEFT's own modules are looked up by adapter name: dots, "keys" and "forward" are not free there.
    model = muxcompile.compile(nano(), {name: LoraConfig(r=4, target_modules=["out"])}, CHUNK)
    result = model.step({name: [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}]})
    assert math.isfinite(float(result.losses[name]))
    assert str(type(model.executed).parse(str(model.executed))) == str(model.executed)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("chunk_tokens", value) for value in (0, -16, 1.5, True)),
        *(("reserve_slots", value) for value in (-1, 1.5, True)),
        *(("gradient_checkpointing", value) for value in (0, 1, "yes")),
        *((field, value) for field in ("invariant", "cuda_graphs") for value in (0, 1, "false", None)),
        ("regions", "fast"),
        *(("mesh", value) for value in (2, ("dp",), "xx=2")),
        *(("skip_passes", value) for value in (5, "fuse", (1,))),
    ],
)
def test_a_bad_option_is_refused_by_its_name(field: str, value: Any) -> None:
    refused(lambda: muxcompile.Options(**{field: value}), "Options", field)


@pytest.mark.parametrize("backbone", ["base", None, Path("base"), 5])
def test_something_that_is_no_backbone_is_refused(backbone: Any) -> None:
    refused(lambda: muxcompile.compile(backbone, {"tom": LoraConfig()}), "^backbone: must be a model .*open_parts", "got ")


def test_options_that_are_a_dict_are_refused() -> None:
    options: Any = {"chunk_tokens": 64}
    refused(lambda: muxcompile.compile(small(), {"tom": LoraConfig()}, options), "options: must be .*Options.*got dict")


# --- backbones -------------------------------------------------------------------------------------------------------


class Nano(nn.Module):
    """One layer without norms: the fastest thing to compile."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, 16)
        self.qkv, self.out, self.head = nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, VOCABULARY)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    def mix(self, x: Tensor) -> Tensor:
        return x

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.mix(self.tokens(input_ids))
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        x = x + torch.tanh(self.out(self.attend(q, k, v).transpose(1, 2).flatten(2)))
        return self.head(x)


@functools.cache
def nano() -> Nano:
    return seeded(Nano, 62).eval()


class Bidirectional(Nano):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v)


class Masked(Nano):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class HandWritten(Nano):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
        return (q @ k.mT).masked_fill(~mask, -math.inf).softmax(-1) @ v


class Averaging(Nano):
    def mix(self, x: Tensor) -> Tensor:
        return x - x.mean(dim=1, keepdim=True)


class Shifting(Nano):
    def mix(self, x: Tensor) -> Tensor:
        return x + torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)


class Summing(Nano):
    def mix(self, x: Tensor) -> Tensor:
        return x.cumsum(dim=1)


class Convolving(Nano):
    """What a Mamba layer has beside attention in hybrid models."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(16, 16, 4, groups=16, padding=3)

    def mix(self, x: Tensor) -> Tensor:
        return x + self.conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)


class OwnPositions(Nano):
    def mix(self, x: Tensor) -> Tensor:
        return x + torch.arange(x.shape[1])[None, :, None]


class Branching(Nano):
    def mix(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Bidirectional, "not causal"),
        (Masked, "mask"),
        (HandWritten, "no attention was found"),
        (Averaging, "module .* mean"),
        (Shifting, "module .* slice"),
        (Summing, "module .* cumsum"),
        (Convolving, "module 'conv'.* conv"),
        (OwnPositions, "module .* counts positions"),
        (Branching, "module .* data-dependent"),
    ],
)
def test_a_module_that_would_mix_packed_sequences_or_cannot_be_captured_is_refused(kind: type[Nano], reason: str) -> None:
    refused_compile(seeded(kind, 63).eval(), {"tom": LoraConfig(r=4, target_modules=["out"])}, "^backbone", reason)


TINY = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
MIXERS: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "softcap": (lambda: build("Gemma2", **TINY, head_dim=8), ("module 'model.layers.0.self_attn'", "softcap")),
    "sinks": (
        lambda: build("GptOss", **TINY, head_dim=8, num_local_experts=2, num_experts_per_tok=1),
        ("module 'model.layers.0.self_attn'", "s_aux|sink"),
    ),
    "experts": (lambda: build("Mixtral", **TINY, num_local_experts=2, num_experts_per_tok=1), (r"module 'model.layers.0\.",)),
    "more experts": (
        lambda: build("Qwen3Moe", **TINY, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1),
        ("module 'model.layers.0.mlp",),
    ),
    # These have no attention that could be named, or have written it by hand.
    "mamba": (lambda: build("Mamba", hidden_size=32, num_hidden_layers=1, state_size=4), ("no attention was found",)),
    "falcon-mamba": (lambda: build("FalconMamba", hidden_size=32, num_hidden_layers=1, state_size=4), ("no attention was found",)),
    "alibi": (lambda: build("Bloom", hidden_size=32, n_layer=1, n_head=4), ("no attention was found",)),
}


@pytest.mark.parametrize("kind", MIXERS)
def test_an_architecture_that_packing_would_change_is_refused_by_module_and_reason(kind: str) -> None:
    make, words = MIXERS[kind]
    # in_proj: PEFT refuses Mamba's other linear layers itself.
    targets = ["in_proj"] if "mamba" in kind else "all-linear"
    refused_compile(make(), {"tom": LoraConfig(r=4, target_modules=targets)}, "^backbone", *words)


def test_a_backbone_without_weights_is_refused() -> None:
    with torch.device("meta"):
        backbone = Nano()
    message = refused(
        lambda: muxcompile.compile(backbone, {"tom": LoraConfig(r=4, target_modules=["out"])}, CHUNK), "backbone", "meta device"
    )
    assert "tokens.weight" in message
    half = seeded(Nano, 1)
    half.head.to("meta")
    refused(lambda: muxcompile.compile(half, {"tom": LoraConfig(r=4, target_modules=["out"])}, CHUNK), "head.weight", "meta device")


def test_a_backbone_in_a_dtype_that_no_kernel_computes_with_is_refused_by_tensor() -> None:
    backbone = seeded(Nano, 66).eval()
    backbone.head.double()
    refused_compile(backbone, {"tom": LoraConfig(r=4, target_modules=["out"])}, "^backbone: head.weight is float64", "bfloat16")


def test_a_pass_that_cannot_be_skipped_is_refused_by_its_name() -> None:
    options = muxcompile.Options(chunk_tokens=48, skip_passes=("attach",))
    refused_compile(nano(), {"tom": LoraConfig(r=4, target_modules=["out"])}, "skip_passes", "'attach'", options=options)


# --- data ------------------------------------------------------------------------------------------------------------

TASKS = [
    muxcompile.Task("alice", LoraConfig(r=4, target_modules="all-linear"), learning_rate=1e-2),
    muxcompile.Task(
        "bob", LoraConfig(r=7, target_modules="all-linear"), learning_rate=0.1, optimizer="sgd", momentum=0.9, max_grad_norm=0.3
    ),
    muxcompile.Task("carol", LoraConfig(r=20, target_modules=["q_proj", "down_proj"]), learning_rate=1e-2, max_length=20),
]
GOOD = {"alice": examples(1, (20, 9)), "bob": examples(2, (5, 30)), "carol": examples(3, (16,))}


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A compiled model with momenta in its optimizers, and a checkpoint of it."""
    model = muxcompile.compile(llama(64, max_position_embeddings=40), TASKS, CHUNK)
    for index, name in enumerate(model.tasks):
        fill(model, name, seed=index)
    model.step(GOOD)
    folder = tmp_path_factory.mktemp("started") / "checkpoint"
    model.save_checkpoint(folder)
    return model, folder


@pytest.fixture
def model(started: tuple[Any, Path]) -> Any:
    found, folder = started
    found.load_checkpoint(folder)
    return found


def one(ids: Any, labels: Any = None, **more: Any) -> dict[str, Any]:
    return {"input_ids": ids, "labels": ids if labels is None else labels, **more}


FINE = one([1, 2, 3])
BAD_DATA: dict[str, tuple[Any, tuple[str, ...]]] = {
    "no examples": ([], ("empty",)),
    "no tokens": ([FINE, one([])], ("example 1", "input_ids", "empty")),
    "no dict": ([FINE, [1, 2, 3]], ("example 1", "dict")),
    "no labels": ([{"input_ids": [1, 2]}], ("example 0", "labels")),
    "no ids": ([{"labels": [1, 2]}], ("example 0", "input_ids")),
    "more labels than ids": ([FINE, one([1, 2], [1, 2, 3])], ("example 1", "labels", "3", "2")),
    "an id above the vocabulary": ([FINE, FINE, one([1, VOCABULARY, 2], [1, 1, 1])], ("example 2", "input_ids", "89", "88")),
    "an id below 0": ([one([1, -1, 2], [1, 1, 1])], ("example 0", "input_ids", "-1")),
    "a label above the vocabulary": ([one([1, 2], [1, VOCABULARY])], ("example 0", "labels", "89", "88")),
    "a label below 0": ([one([1, 2], [1, -1])], ("example 0", "labels", "-1", "-100")),
    "a first label outside, which predicts nothing": ([one([1, 2], [5000, 1])], ("example 0", "labels", "5000")),
    "text for ids": ([one("hello")], ("example 0", "input_ids")),
    "floats for ids": ([one([0.5, 1.0])], ("example 0", "input_ids")),
    "truth values for ids": ([one(torch.tensor([True, False]))], ("example 0", "input_ids")),
    "nested ids": ([one([[1, 2], [3, 4]])], ("example 0", "input_ids")),
    "ragged ids": ([one([[1, 2], [3]])], ("example 0", "input_ids")),
    "an id that no integer holds": ([one([2**70, 1])], ("example 0", "input_ids")),
    "a field nobody knows": ([one([1, 2], weight=3)], ("example 0", "'weight'")),
    "a mask with a gap": ([one([1, 2], attention_mask=[1, 0])], ("example 0", "attention_mask")),
    "a batch without labels": ({"input_ids": [[1, 2], [3, 4]]}, ("labels",)),
    "a batch with ragged rows": ({"input_ids": [[1, 2], [3]], "labels": [[1, 2], [3]]}, ("input_ids",)),
    "a batch whose mask has a hole": (
        {"input_ids": [[1, 2, 3]], "labels": [[1, 2, 3]], "attention_mask": [[1, 0, 1]]},
        ("example 0", "attention_mask", "hole"),
    ),
    "a batch whose labels have another shape": ({"input_ids": [[1, 2, 3]], "labels": [[1, 2]]}, ("labels", r"\(1, 2\)")),
    "a batch with a row of padding alone": (
        {"input_ids": [[1, 2], [0, 0]], "labels": [[1, 2], [-100, -100]], "attention_mask": [[1, 1], [0, 0]]},
        ("example 1", "input_ids", "empty"),
    ),
    "longer than the model's positions": ([FINE, one([1] * 41)], ("example 1", "input_ids", "41", "limit", "40")),
}


@pytest.mark.parametrize("fault", BAD_DATA)
def test_bad_data_of_one_task_is_refused_by_task_example_and_field_and_no_task_moves(fault: str, model: Any) -> None:
    given, words = BAD_DATA[fault]
    before, program = everything(model), str(model.executed)
    for call in (model.step, model.forward_backward, model.evaluate):
        refused(partial(call, {"alice": GOOD["alice"], "bob": given}), "'bob'", *words)
    assert equal(everything(model), before)
    assert str(model.executed) == program


def test_an_example_longer_than_the_tasks_own_limit_is_refused_and_never_cut(model: Any) -> None:
    before = everything(model)
    refused(lambda: model.step({"alice": GOOD["alice"], "carol": [one([1] * 21)]}), "'carol'", "21", "max_length=20")
    assert equal(everything(model), before)
    assert math.isfinite(float(model.step({"carol": [one([1] * 20)]}).losses["carol"]))


def test_an_example_longer_than_the_chunk_that_the_user_chose_compiles_again_with_a_warning_and_keeps_the_size() -> None:
    model = muxcompile.compile(nano(), {"tom": LoraConfig(r=4, target_modules=["out"])}, muxcompile.Options(chunk_tokens=32))
    before = everything(model)
    with pytest.warns(UserWarning, match=r"'tom' has an example of 33 tokens.*compiling again to cut it"):
        loss = model.evaluate({"tom": [one([1] * 33)]}).losses["tom"]
    assert equal(everything(model), before)
    assert model.chunk_tokens == 32
    assert torch.equal(model.step({"tom": [one([1] * 33)]}).losses["tom"], loss)


def test_an_example_longer_than_a_chunk_compiles_again_with_a_warning_where_the_size_was_left_open() -> None:
    tasks = {"tom": LoraConfig(r=4, target_modules=["out"])}
    model = muxcompile.compile(nano(), tasks)
    fill(model, "tom")
    model.step({"tom": examples(1, (30,))})
    long = {"tom": examples(2, (model.chunk_tokens + 1, 9))}
    model.forward_backward({"tom": examples(1, (30,))})  # gradients that wait for their step
    before = everything(model)
    with pytest.warns(UserWarning, match=r"'tom'.*compiling again"):
        loss = model.evaluate(long).losses["tom"]
    assert equal(everything(model), before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = model.step(long)
    assert torch.equal(result.losses["tom"], loss)
    assert any(gradient.any() for gradient in before["tom"]["gradients"].values())
    assert (model.steps, model.examples_seen) == ({"tom": 2}, {"tom": 1 + 1 + 2})


def test_a_padded_batch_is_read_as_its_rows_without_their_padding(model: Any) -> None:
    rows = examples(5, (12, 4, 9), labelled=1.0)
    padded = {
        name: torch.full((3, 15), fill_value) for name, fill_value in (("input_ids", 7), ("labels", 7), ("attention_mask", 0))
    }
    for index, row in enumerate(rows):
        # Padding on either side; what stands there is never read.
        place = slice(0, len(row["labels"])) if index != 1 else slice(15 - len(row["labels"]), 15)
        padded["input_ids"][index, place] = torch.tensor(row["input_ids"])
        padded["labels"][index, place] = torch.tensor(row["labels"])
        padded["attention_mask"][index, place] = 1
    unpadded, read = model.evaluate({"alice": rows}), model.evaluate({"alice": padded})
    assert read.tokens == unpadded.tokens == {"alice": 22}
    assert torch.equal(read.losses["alice"], unpadded.losses["alice"])


# --- calls -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["step", "forward_backward", "evaluate"])
def test_a_call_for_an_unknown_task_or_for_none_is_refused(call: str, model: Any) -> None:
    before = everything(model)
    refused(lambda: getattr(model, call)({"alice": GOOD["alice"], "zoe": GOOD["bob"]}), "'zoe'", "alice, bob, carol")
    nothings: tuple[Any, ...] = ({}, None, [])
    for nothing in nothings:
        refused(partial(getattr(model, call), nothing), "batches")
    assert equal(everything(model), before)


@pytest.mark.parametrize("call", ["optim_step", "gradients", "state_dict", "learning_rate", "remove_task"])
def test_a_question_about_an_unknown_task_is_refused(call: str, model: Any) -> None:
    refused(lambda: getattr(model, call)("zoe"), "'zoe'", "no such task")


def test_an_unknown_loss_is_refused(model: Any) -> None:
    refused(lambda: model.forward_backward(GOOD, loss="mse"), "loss='mse'", "cross_entropy")


def test_optim_step_without_gradients_is_refused_and_no_other_task_steps(model: Any) -> None:
    model.forward_backward({"alice": GOOD["alice"]})
    before = everything(model)
    refused(lambda: model.optim_step(["alice", "bob"]), "'bob'", "forward_backward")
    refused(lambda: model.optim_step(["alice", "zoe"]), "'zoe'")
    assert equal(everything(model), before)
    assert set(model.optim_step(["alice"])) == {"alice"}
    refused(lambda: model.optim_step("alice"), "'alice'", "forward_backward")
    assert model.optim_step([]) == {}


def test_a_task_named_twice_in_one_optim_step_does_not_step_twice(model: Any) -> None:
    model.forward_backward({"alice": GOOD["alice"]})
    steps = model.steps["alice"]
    assert set(model.optim_step(["alice", "alice"])) == {"alice"}
    assert model.steps["alice"] == steps + 1


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (muxcompile.Task("alice", LoraConfig(r=4, target_modules=QV)), ("'alice'", "name")),
        (muxcompile.Task("ALICE", LoraConfig(r=4, target_modules=QV)), ("'ALICE'", "name")),
        (muxcompile.Task("dan", LoraConfig(r=4, target_modules=["qproj"])), ("'dan'", "'qproj'", "'q_proj'")),
        (muxcompile.Task("dan", LoraConfig(r=4, target_modules=["lm_hed"])), ("'dan'", "lm_head")),
        (muxcompile.Task("dan", LoraConfig(r=300, target_modules=QV)), ("'dan'", "r=300")),
        (muxcompile.Task("dan", "no/such/folder"), ("'dan'", "adapter")),
    ],
)
def test_a_task_that_cannot_be_added_leaves_the_model_as_it_was(task: muxcompile.Task, words: tuple[str, ...], model: Any) -> None:
    model.forward_backward(GOOD)
    before = everything(model)
    refused(lambda: model.add_task(task), *words)
    assert model.tasks == ("alice", "bob", "carol")
    assert equal(everything(model), before)
    model.optim_step(model.tasks)
    assert model.step(GOOD).quarantined == {}


# --- quarantine ------------------------------------------------------------------------------------------------------


def poison_with(value: float, part: str) -> Callable[[Any, str], None]:
    """One element of the task's own adapter."""

    def poison(model: Any, name: str) -> None:
        key = next(key for key in model.state_dict(name) if "layers.0" in key and part in key)
        tensor = model.state_dict(name)[key]
        tensor[0, 0] = value
        model.state.write(name, key, tensor)

    return poison


def overflow_in_the_gradient_alone(model: Any, name: str) -> None:
    """B near the largest float and A near the smallest: the forward is finite, the norm of dA = x^T (dy B) is not.

    The scale of 2 times B is finite too: which operand a BLAS multiplies by the factor of a product differs between CPUs.
    """
    for key, tensor in model.state_dict(name).items():
        if "layers.1.self_attn.q_proj" in key:
            model.state.write(name, key, torch.full_like(tensor, 1e38 if "lora_B" in key else 1e-39))


POISONS = {
    "inf in A": poison_with(math.inf, "lora_A"),
    "nan in B": poison_with(math.nan, "lora_B"),
    "overflow in the forward": poison_with(3e38, "lora_B"),
    "overflow in the gradient alone": overflow_in_the_gradient_alone,
}


def others_of(victim: str) -> dict[str, list[Example]]:
    return {name: given for name, given in GOOD.items() if name != victim}


@pytest.mark.parametrize("victim", ["alice", "bob"])  # AdamW, and SGD with momentum and clipping
@pytest.mark.parametrize("poison", POISONS)
def test_a_task_that_is_not_finite_is_stopped_and_the_others_keep_their_bits(
    poison: str, victim: str, model: Any, started: tuple[Any, Path]
) -> None:
    others = others_of(victim)
    without = [model.forward_backward(others)]
    gradients = {name: model.gradients(name) for name in others}
    norms = model.optim_step(list(others))
    without += [model.step(others) for _ in range(2)]
    expected = everything(model, others)

    model.load_checkpoint(started[1])
    POISONS[poison](model, victim)
    before = everything(model, [victim])
    result = model.forward_backward(GOOD)
    assert math.isfinite(float(result.losses[victim])) == (poison == "overflow in the gradient alone")
    assert all(equal(model.gradients(name), gradients[name]) for name in others)
    found = model.optim_step(list(GOOD))
    assert all(torch.equal(found[name], norms[name]) for name in others)
    assert not math.isfinite(float(found[victim]))
    results = [result, model.step(GOOD), model.step({victim: GOOD[victim], **others})]
    for number, (with_it, without_it) in enumerate(zip(results, without, strict=True)):
        assert all(torch.equal(with_it.losses[name], without_it.losses[name]) for name in others)
        assert set(with_it.quarantined) == {victim}
        assert "not finite" in with_it.quarantined[victim]
        if number:
            assert math.isnan(float(with_it.losses[victim]))
            assert set(with_it.grad_norms) == set(others)
            assert all(torch.equal(with_it.grad_norms[name], without_it.grad_norms[name]) for name in others)
    assert equal(everything(model, others), expected)
    # Nothing of it was committed: weights, moments and counters are those before the bad step, gradients are gone.
    after = everything(model, [victim])[victim]
    assert same_with_nan(after["weights"], before[victim]["weights"])
    assert equal([after["optimizer"], after["counters"]], [before[victim]["optimizer"], before[victim]["counters"]])
    assert not any(gradient.any() for gradient in after["gradients"].values())


def same_with_nan(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key].view(torch.int32), other[key].view(torch.int32)) for key in one)


@pytest.mark.filterwarnings("error")
def test_calls_for_a_quarantined_task_do_not_raise(model: Any) -> None:
    POISONS["inf in A"](model, "alice")
    first = model.step(GOOD)
    reason = first.quarantined["alice"]
    assert "step 1" in reason
    assert model.step({"alice": GOOD["alice"]}).quarantined == {"alice": reason}
    assert math.isnan(float(model.evaluate(GOOD).losses["alice"]))
    result = model.forward_backward(GOOD)
    assert result.quarantined == {"alice": reason}
    assert set(model.optim_step(["alice", "bob", "carol"])) == {"bob", "carol"}
    assert model.optim_step("alice") == {}
    assert model.steps == {"alice": 1, "bob": 3, "carol": 3}


def test_a_bad_call_before_a_good_one_still_stops_the_step(model: Any) -> None:
    good = model.state_dict("alice")
    POISONS["inf in A"](model, "alice")
    model.forward_backward(GOOD)
    for key, tensor in good.items():
        model.state.write("alice", key, tensor)
    result = model.forward_backward(GOOD)
    assert math.isfinite(float(result.losses["alice"]))
    model.optim_step(list(GOOD))
    assert set(result.quarantined) == {"alice"}
    assert equal(model.state_dict("alice"), good)


class Unbounded(Nano):
    """Logits that follow the adapter's output without a bound."""

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids)
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        return self.head(x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2)))


def test_a_loss_that_overflows_while_its_gradient_is_finite_stops_the_task_too() -> None:
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["out"])
    model = muxcompile.compile(seeded(Unbounded, 65).eval(), {"ann": config, "ben": config}, CHUNK)
    # Each of 117 losses is above 3e36 and their sum overflows; softmax, and with it the gradient (near 1e18), does not mind.
    before = {key: torch.full_like(value, 1e18) for key, value in model.state_dict("ann").items()}
    for key, value in before.items():
        model.state.write("ann", key, value)
    result = model.step({"ann": examples(1, (40, 40, 40), labelled=1.0), "ben": examples(2, (9,))})
    assert math.isinf(float(result.losses["ann"]))
    assert math.isfinite(float(result.grad_norms["ann"]))
    assert set(result.quarantined) == {"ann"}
    assert equal(model.state_dict("ann"), before)
    assert model.steps == {"ann": 0, "ben": 1}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_an_update_that_would_overflow_is_not_taken(optimizer: str) -> None:
    config = LoraConfig(r=4, target_modules=["out"])
    tasks = [muxcompile.Task("ann", config, optimizer=optimizer, learning_rate=3e38), muxcompile.Task("ben", config)]
    model = muxcompile.compile(seeded(Unbounded, 65).eval(), tasks, CHUNK)
    before = fill(model, "ann", scale=100.0)
    result = model.step({"ann": examples(1, (20,)), "ben": examples(2, (9,))})
    # A finite gradient that a rate of 3e38 carries past the largest float, 3.4e38.
    assert 3 < float(result.grad_norms["ann"]) < math.inf
    after = model.state_dict("ann")
    assert all(value.isfinite().all() for value in after.values())
    assert set(result.quarantined) == {"ann"}
    assert equal(after, before)
    assert model.steps == {"ann": 0, "ben": 1}


def test_evaluating_a_task_that_is_not_finite_stops_nobody(model: Any) -> None:
    others = others_of("alice")
    expected = model.evaluate(others).losses
    before = everything(model, others)
    POISONS["overflow in the forward"](model, "alice")
    result = model.evaluate(GOOD)
    assert not math.isfinite(float(result.losses["alice"]))
    assert all(torch.equal(result.losses[name], expected[name]) for name in others)
    assert result.quarantined == {}
    assert equal(everything(model, others), before)


def test_a_quarantine_survives_a_checkpoint_and_ends_with_an_older_one(
    model: Any, started: tuple[Any, Path], tmp_path: Path
) -> None:
    POISONS["overflow in the forward"](model, "bob")
    reason = model.step(GOOD).quarantined["bob"]
    model.save_checkpoint(tmp_path / "stopped")
    model.load_checkpoint(started[1])
    assert model.step(GOOD).quarantined == {}
    model.load_checkpoint(tmp_path / "stopped")
    result = model.step(GOOD)
    assert result.quarantined == {"bob": reason}
    assert math.isnan(float(result.losses["bob"]))
    model.load_checkpoint(started[1])
    assert model.step(GOOD).quarantined == {}


def test_a_task_that_was_stopped_can_be_removed_and_start_again() -> None:
    model = muxcompile.compile(nano(), {name: LoraConfig(r=4, target_modules=["out"]) for name in ("ann", "ben")}, CHUNK)
    fresh = model.state_dict("ann")
    key = next(iter(fresh))
    model.state.write("ann", key, torch.full_like(fresh[key], math.inf))
    batch = {"ann": examples(1, (9,)), "ben": examples(2, (9,))}
    assert set(model.step(batch).quarantined) == {"ann"}
    model.remove_task("ann")
    assert model.step({"ben": batch["ben"]}).quarantined == {}
    model.add_task(muxcompile.Task("ann", LoraConfig(r=4, target_modules=["out"])))
    assert equal(model.state_dict("ann"), fresh)
    assert model.step(batch).quarantined == {}
    assert model.steps == {"ann": 1, "ben": 3}
