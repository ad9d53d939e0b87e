"""The families that kinds are tested on: a backbone of one shape, and tasks of every kind that train on it together."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

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
from torch import nn

import muxcompile

from .peft_reference import Example, build, examples, llama

LENGTHS = ((7, 1, 19), (33, 2), (12, 5, 17), (40,), (3, 16, 9), (6, 11), (21,), (4, 4, 4))


@dataclass(frozen=True)
class Family:
    make: Callable[[], Any]
    adapters: dict[str, Any]
    # Elements whose gradient is rounding alone, for AdamW: a dead ReLU unit zeroes a whole column of A, and a bias of the keys
    # moves all scores of a row alike, which changes nothing.
    most_left_out: float = 0.01

    @functools.cached_property
    def backbone(self) -> Any:
        """One for all tests that never change it."""
        return self.make()


def causal(config: type[Any], **fields: Any) -> Any:
    return config(task_type="CAUSAL_LM", **fields)


def bottleneck(layout: str, **fields: Any) -> Any:
    """AdapterHub's `double_seq_bn` and `par_bn`; `seq_bn` is the config's own default."""
    fixed: dict[str, dict[str, Any]] = {
        "double": {"mh_adapter": True, "original_ln_before": False, "non_linearity": "swish"},
        "parallel": {
            "is_parallel": True, "original_ln_before": False, "reduction_factor": 2, "scaling": 4.0, "init_weights": "mam_adapter",
        },
    }  # fmt: skip
    return muxcompile.BottleneckConfig(**{**fixed[layout], **fields})


FAMILIES = {
    "llama": Family(
        lambda: llama(5, num_key_value_heads=2),
        {
            "lora": causal(LoraConfig, r=4, target_modules="all-linear"),
            "ia3": causal(IA3Config, target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
            "dora": causal(LoraConfig, r=3, target_modules=["q_proj", "v_proj", "down_proj"], use_dora=True),
            "b with bias": causal(LoraConfig, r=3, target_modules=["q_proj", "up_proj"], lora_bias=True),
            "vera": causal(VeraConfig, r=12, target_modules=["q_proj", "v_proj", "down_proj"]),
            "ia3 all": causal(
                IA3Config, target_modules=["q_proj", "v_proj", "up_proj", "o_proj"], feedforward_modules=["o_proj"]
            ),
            "norms": causal(LNTuningConfig, target_modules=["input_layernorm", "post_attention_layernorm", "norm"]),
            "prompt": causal(PromptTuningConfig, num_virtual_tokens=5),
            "long prompt": causal(PromptTuningConfig, num_virtual_tokens=19),
            "prefix": causal(PrefixTuningConfig, num_virtual_tokens=5),
            "long prefix": causal(PrefixTuningConfig, num_virtual_tokens=11),
            "projected prefix": causal(PrefixTuningConfig, num_virtual_tokens=6, prefix_projection=True, encoder_hidden_size=12),
            "p-tuning mlp": causal(PromptEncoderConfig, num_virtual_tokens=5, encoder_hidden_size=24),
            "p-tuning lstm": causal(
                PromptEncoderConfig, num_virtual_tokens=4, encoder_reparameterization_type="LSTM", encoder_hidden_size=8
            ),
            "some norms": causal(LNTuningConfig, target_modules=r".*layers\.1\.input_layernorm"),
            "sequential": muxcompile.BottleneckConfig(reduction_factor=4, non_linearity="tanh", init_weights="mam_adapter"),
            "double": bottleneck("double", reduction_factor={"1": 2, "default": 16}, init_weights="mam_adapter"),
            "parallel": bottleneck("parallel", non_linearity="gelu"),
            "wide": bottleneck("parallel", reduction_factor=0.1, non_linearity="sigmoid", scaling=0.3, leave_out=[0]),
            "ia3 on shared inputs": causal(
                IA3Config, target_modules=["q_proj", "gate_proj", "v_proj"], feedforward_modules=["q_proj", "gate_proj"]
            ),
            "ia3 on them too": causal(
                IA3Config, target_modules=["q_proj", "k_proj", "gate_proj", "up_proj"],
                feedforward_modules=["q_proj", "gate_proj", "up_proj"],
            ),
            "shira": causal(ShiraConfig, r=2, target_modules="all-linear"),
            "shira elsewhere": causal(ShiraConfig, r=2, target_modules=["q_proj", "down_proj"], random_seed=3),
            "shira of other size": causal(ShiraConfig, r=5, target_modules=["q_proj", "k_proj", "up_proj"], random_seed=4),
            "pissa": causal(LoraConfig, r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights="pissa"),
            "olora with dora": causal(
                LoraConfig, r=6, lora_alpha=3, target_modules=["k_proj", "up_proj"], init_lora_weights="olora", use_dora=True
            ),
            "orthogonal": causal(LoraConfig, r=6, target_modules=["o_proj", "gate_proj"], init_lora_weights="orthogonal"),
            "head": causal(LoraConfig, r=4, target_modules=["lm_head", "q_proj"]),
            "head alone": causal(LoraConfig, r=3, target_modules=["lm_head"], lora_bias=True),
            "dora head": causal(LoraConfig, r=9, target_modules=["lm_head"], use_dora=True),
            "ia3 head": causal(IA3Config, target_modules=["lm_head", "v_proj"], feedforward_modules=[]),
            "ia3 before the head": causal(IA3Config, target_modules=["lm_head"], feedforward_modules=["lm_head"]),
            "vera head": causal(VeraConfig, r=5, target_modules=["lm_head", "q_proj"]),
            "tokens": causal(LoraConfig, r=2, target_modules=["q_proj"], trainable_token_indices=[3, 80, 1]),
            "tokens of the head": causal(
                LoraConfig, r=2, target_modules=["q_proj"],
                trainable_token_indices={"embed_tokens": [*range(0, 80, 5)], "lm_head": [7, 3]},
            ),
            "embedding": causal(LoraConfig, r=2, target_modules=["embed_tokens", "q_proj"]),
            "tokens alone": TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=[5, 2, 60, 33]),
            "embedding alone": causal(LoraConfig, r=5, target_modules=["embed_tokens"], lora_alpha=3),
            "own modules": causal(
                LoraConfig, r=2, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens", "model.norm"]
            ),
            "own linears": causal(LoraConfig, r=2, target_modules=["q_proj"], modules_to_save=["up_proj"]),
            "shira head": causal(ShiraConfig, r=1, target_modules=["lm_head", "v_proj"], random_seed=5),
        },
    ),
    "gpt2": Family(
        lambda: build("GPT2", 6, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
        {
            "lora": causal(LoraConfig, r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
            "ia3": causal(
                IA3Config, target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True
            ),
            "norms": causal(LNTuningConfig, target_modules=["ln_1", "ln_2", "ln_f"]),
            "prompt": causal(PromptTuningConfig, num_virtual_tokens=3),
            "vera": causal(VeraConfig, r=5, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
            "dora": causal(LoraConfig, r=6, target_modules=["c_attn", "c_fc"], use_dora=True, fan_in_fan_out=True),
            "lora, all biases": causal(LoraConfig, r=2, target_modules=["c_fc"], bias="all", fan_in_fan_out=True),
            "prefix": causal(PrefixTuningConfig, num_virtual_tokens=4),
            "projected prefix": causal(PrefixTuningConfig, num_virtual_tokens=3, prefix_projection=True),
            "biases": muxcompile.BitFitConfig(),
            "sequential": muxcompile.BottleneckConfig(reduction_factor=4, non_linearity="swish"),
            "double": bottleneck("double", reduction_factor=3, scaling=0.5, non_linearity="gelu"),
            "double too": bottleneck("double", reduction_factor=4, scaling=2, non_linearity="gelu"),
            "parallel": bottleneck("parallel", mh_adapter=True, non_linearity="gelu_new"),
            "pissa": causal(
                LoraConfig, r=5, target_modules=["c_attn", "mlp.c_proj"], init_lora_weights="pissa", use_rslora=True,
                fan_in_fan_out=True,
            ),
            "p-tuning mlp": causal(PromptEncoderConfig, num_virtual_tokens=5, encoder_hidden_size=24),
            "tied head": causal(LoraConfig, r=4, target_modules=["lm_head"]),
            "tied tokens": causal(
                LoraConfig, r=2, target_modules=["c_attn"], trainable_token_indices=[3, 80, 1], fan_in_fan_out=True
            ),
            "both embeddings": causal(LoraConfig, r=2, target_modules=["wte", "wpe"]),
            "own modules": causal(
                LoraConfig, r=2, target_modules=["c_attn"], modules_to_save=["lm_head", "ln_f", "wpe", "h.0.mlp.c_fc"],
                fan_in_fan_out=True,
            ),
        },
        most_left_out=0.1,
    ),
    "opt": Family(
        lambda: build(
            "OPT", 7, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
            word_embed_proj_dim=32, dropout=0.0, attention_dropout=0.0, layerdrop=0.0,
        ),
        {
            "lora": causal(LoraConfig, r=4, target_modules=["q_proj", "fc2"]),
            "ia3": causal(IA3Config, target_modules=["q_proj", "v_proj", "fc2"], feedforward_modules=["fc2"]),
            "norms": causal(LNTuningConfig, target_modules=["self_attn_layer_norm", "final_layer_norm"]),
            "prompt": causal(PromptTuningConfig, num_virtual_tokens=3),
            "dora": causal(LoraConfig, r=2, target_modules=["q_proj", "fc1"], use_dora=True),
            "lora, its biases": causal(LoraConfig, r=2, target_modules=["v_proj", "fc1"], bias="lora_only", lora_bias=True),
            "prefix": causal(PrefixTuningConfig, num_virtual_tokens=4),
            "p-tuning mlp": causal(PromptEncoderConfig, num_virtual_tokens=5),
            "sequential": muxcompile.BottleneckConfig(reduction_factor=4, non_linearity="tanh", mh_adapter=True),
            "double": bottleneck("double"),
            "parallel": bottleneck("parallel", non_linearity="leaky_relu"),
            "some biases": muxcompile.BitFitConfig(target_modules=["v_proj", "fc1", "self_attn_layer_norm"]),
            "ia3 on shared inputs": causal(IA3Config, target_modules=["k_proj", "v_proj"], feedforward_modules=["v_proj"]),
            "shira": causal(ShiraConfig, r=1, target_modules=["k_proj", "v_proj", "fc1", "fc2"], random_seed=1),
            "shira too": causal(ShiraConfig, r=1, target_modules=["v_proj", "out_proj", "fc2"], random_seed=2),
            "olora": causal(LoraConfig, r=4, target_modules=["q_proj", "fc2"], init_lora_weights="olora", bias="lora_only"),
            "vera": causal(VeraConfig, r=6, target_modules=["q_proj", "fc1", "fc2"]),
            "tied head": causal(LoraConfig, r=4, target_modules=["lm_head", "fc1"]),
            # 1 is the padding token: its row of an embedding has no gradient.
            "tied tokens": causal(LoraConfig, r=2, target_modules=["v_proj"], trainable_token_indices=[1, 5, 70]),
            "embedding": causal(LoraConfig, r=3, target_modules=["embed_tokens", "fc2"]),
            "own modules": causal(
                LoraConfig, r=2, target_modules=["v_proj"], modules_to_save=["embed_tokens", "fc1", "layers.1.fc2"]
            ),
        },
        most_left_out=0.2,
    ),
}  # fmt: skip


def task(name: str, adapter: Any, **fields: Any) -> muxcompile.Task:
    return muxcompile.Task(name, copy.deepcopy(adapter), **fields)


def compiled(
    family: Family,
    backbone: nn.Module,
    names: Collection[str] | None = None,
    *,
    gradient_checkpointing: bool = False,
    **fields: Any,
) -> Any:
    tasks = [task(name, adapter, **fields) for name, adapter in family.adapters.items() if names is None or name in names]
    options = muxcompile.Options(chunk_tokens=256, gradient_checkpointing=gradient_checkpointing)
    return muxcompile.compile(backbone, tasks, options)


def batches(family: Family, step: int) -> dict[str, list[Example]]:
    """Examples that follow from the task's place in its family: a new task goes to the end, where it changes nobody's."""
    names = list(family.adapters)
    return {name: examples(100 * names.index(name) + step, LENGTHS[(names.index(name) + step) % len(LENGTHS)]) for name in names}
