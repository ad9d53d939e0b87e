"""A causal language model becomes one graph over packed sequences; what cannot follow packed sequences is refused by name."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from codegen.ops import ATTENTION
from passes.capture import capture
from passes.graph import Source, check, module_of
from passes.limits import positions, vocabulary
from passes.normalise import normalise
from tests.backbones import GEOMETRY, VOCABULARY, WIDTH, Plain, captured, chunk_of, llama, logits_of, lora, made

COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 96,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
# The output matrix is a parameter of its own in every one of these unless the configuration ties it.
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", COMMON),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", COMMON),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", COMMON | {"head_dim": 8}),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 96,
            "vocab_size": VOCABULARY,
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
    ),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {name: value for name, value in COMMON.items() if name not in ("intermediate_size", "num_key_value_heads")}
        | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    ),
    "mistral": ("MistralForCausalLM", "MistralConfig", COMMON | {"sliding_window": 8}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", COMMON | {"head_dim": 8}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", COMMON | {"head_dim": 8, "sliding_window": 8, "sliding_window_pattern": 2}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", COMMON),
    "gpt-neox": (
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {name: value for name, value in COMMON.items() if name != "num_key_value_heads"},
    ),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", COMMON),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", COMMON),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", COMMON),
}


def built(name: str, **changes: Any) -> Any:
    model, config, fields = ARCHITECTURES[name]
    return made(getattr(transformers, model), getattr(transformers, config)(**fields | changes))


def modes(model: nn.Module) -> dict[str, Any]:
    """All that capture touches: training flags, and the attention of every configuration."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        found[name] = (
            module.training,
            getattr(config, "_attn_implementation", None),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
        )
    return found


# --- what is captured -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_sequences_get_the_logits_that_each_gets_alone(name: str) -> None:
    model = built(name)
    before, tensors = modes(model), {key: value.clone() for key, value in model.state_dict().items()}
    graph = captured(model)

    assert modes(model) == before
    assert all(torch.equal(value, tensors[key]) for key, value in model.state_dict().items())
    assert [node.target for node in graph.gm.graph.nodes].count(ATTENTION) == 2

    own = {tensor.data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    for key in set(graph.weights) - set(graph.constants(model)):
        assert graph.weights[key].data_ptr() in own, f"{key} is a copy"
    assert not any(isinstance(graph.weights[key], nn.Parameter) for key in graph.constants(model))

    chunk = chunk_of({"a": [13, 1, 7], "b": [30]})
    found = logits_of(graph, None, chunk)
    with torch.no_grad():
        for start, stop in ((0, 13), (13, 14), (14, 21), (32, 62)):
            alone = model(chunk.tensors["input_ids"][:, start:stop]).logits[0]
            torch.testing.assert_close(found[start:stop], alone, rtol=1e-5, atol=1e-5)
    assert vocabulary(graph) == VOCABULARY
    assert positions(graph, model) == 96

    rewritten = normalise(graph.copy())
    check(rewritten)
    assert torch.equal(logits_of(rewritten, None, chunk), found)


def test_weights_and_modules_keep_the_names_that_the_model_has() -> None:
    model = llama()
    graph = normalise(captured(model).copy())
    names = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    assert set(graph.weights) <= set(names)
    assert {key for key in names if key.endswith("_proj.weight")} <= set(graph.weights)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert set(graph.sites()) == linears
    assert module_of(graph.sites()["model.layers.1.mlp.up_proj"][0]) == "model.layers.1.mlp.up_proj"


def test_a_tied_output_matrix_is_the_embedding_itself() -> None:
    model = llama(tie_word_embeddings=True)
    graph = captured(model)
    embedding = model.get_input_embeddings().weight
    assert sum(tensor is embedding for tensor in graph.weights.values()) == 1


def test_a_chunk_is_read_through_four_inputs() -> None:
    graph = captured(llama(1))
    chunk = {source.key: node.meta["val"] for source, node in graph.inputs.items() if source.kind == "chunk"}
    assert {key: (tuple(value.shape), value.dtype) for key, value in chunk.items()} == {
        "input_ids": ((1, 64), torch.int64),
        "position_ids": ((1, 64), torch.int64),
        "cu_seqlens": ((GEOMETRY.sequences + 1,), torch.int32),
        "bounds": ((2,), torch.int32),
    }


def test_the_two_windows_of_gemma3_reach_its_attention() -> None:
    graph = captured(built("gemma3", layer_types=["sliding_attention", "full_attention"]))
    windows = [node.args[-1] for node in graph.gm.graph.nodes if node.target is ATTENTION]
    assert windows == [8, 0]


def test_a_plain_module_is_captured_by_its_scaled_dot_product_attention() -> None:
    model = made(Plain)
    graph = captured(model)
    chunk = chunk_of({"a": [13, 7], "b": [30]})
    found = logits_of(graph, None, chunk)
    ids, places = chunk.tensors["input_ids"], chunk.tensors["position_ids"]
    with torch.no_grad():
        for rows in (slice(0, 13), slice(13, 20), slice(32, 62)):
            torch.testing.assert_close(found[rows], model(ids[:, rows], places[:, rows])[0])
    assert positions(graph, model) == GEOMETRY.tokens  # the rows of its table of positions
    assert vocabulary(graph) == VOCABULARY


def test_a_plain_modules_own_scale_and_grouped_heads_are_kept() -> None:
    class Grouped(Plain):
        def body(self, x: Tensor) -> Tensor:
            q, k = x.view(1, -1, 4, 4).transpose(1, 2), x[..., :8].reshape(1, -1, 2, 4).transpose(1, 2)
            return x + F.scaled_dot_product_attention(q, k, k, is_causal=True, scale=0.7, enable_gqa=True).transpose(1, 2).flatten(
                2
            )

    model = made(Grouped)
    chunk = chunk_of({"a": [25]})
    graph = captured(model)
    with torch.no_grad():
        alone = model(chunk.tensors["input_ids"][:, :25], chunk.tensors["position_ids"][:, :25])[0]
    torch.testing.assert_close(logits_of(graph, None, chunk)[:25], alone)


def wrapped_llama() -> Any:
    import peft

    model = peft.get_peft_model(llama(1), lora("q_proj", init_lora_weights=False))
    return model.eval()


def test_a_peft_model_is_captured_without_its_adapters_and_keeps_them_on() -> None:
    wrapped, plain = wrapped_llama(), captured(llama(1))
    ids = torch.arange(10)[None]
    with torch.no_grad():
        before = wrapped(ids).logits
        graph = captured(wrapped)
        assert torch.equal(wrapped(ids).logits, before)
    assert list(graph.inputs) == list(plain.inputs)
    assert not any("lora" in name for name in graph.weights)
    chunk = chunk_of({"a": [20]})
    assert torch.equal(logits_of(graph, None, chunk), logits_of(plain, None, chunk))


def test_a_backbone_with_an_adapter_inside_but_no_peft_model_around_it_is_refused() -> None:
    assert "q_proj' carries a PEFT adapter" in refusal(wrapped_llama().get_base_model())


def test_a_peft_model_with_its_adapter_in_the_weights_is_refused() -> None:
    wrapped = wrapped_llama()
    wrapped.merge_adapter()
    assert "q_proj' has its adapter merged" in refusal(wrapped)


# --- the model is left as it was --------------------------------------------------------------------------------------


def test_a_model_in_training_mode_is_captured_without_dropout_and_left_in_training_mode() -> None:
    model = built("gpt2", resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1).train()
    model.transformer.h[1].eval()  # a mixture, as after freezing a part
    before = modes(model)
    with pytest.warns(UserWarning, match="training mode.*dropout"):
        graph = captured(model)
    assert modes(model) == before
    assert any("dropout" in note for note in graph.notes)
    chunk = chunk_of({"a": [20]})
    with torch.no_grad():
        expected = model.eval()(chunk.tensors["input_ids"][:, :20]).logits[0]
    torch.testing.assert_close(logits_of(graph, None, chunk)[:20], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (
            lambda: built("gpt2", resid_pdrop=0.1, embd_pdrop=0.0, attn_pdrop=0.2),
            r"modules, the first is transformer\.h\.0\.\S+; config: resid_pdrop=0.1, attn_pdrop=0.2",
        ),
        (
            lambda: llama(attention_dropout=0.3),
            r"attention_dropout of 2 modules, the first is model\.layers\.0\.self_attn; config: attention_dropout=0.3",
        ),
    ],
    ids=["gpt2", "llama"],
)
def test_the_plan_says_which_dropout_of_the_backbone_does_not_run(model: Callable[[], Any], found: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (note,) = captured(model()).notes
    assert re.fullmatch(rf"capture: the frozen backbone runs without its own dropout \(.*{found}\)", note)


def test_the_dropout_of_an_adapter_is_not_the_backbones() -> None:
    import peft

    wrapped = peft.get_peft_model(llama(1), lora("q_proj", lora_dropout=0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert captured(wrapped.train()).notes == ()


def test_a_model_without_dropout_is_captured_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graph = captured(llama(1).train())
    assert graph.notes == ()


def test_the_model_is_left_as_it_was_after_a_refusal_too() -> None:
    model = made(transformers.GptOssForCausalLM, gpt_oss()).train()
    before = modes(model)
    with pytest.raises(ValueError, match="backbone"):
        capture(model, tokens=64, tile=16, max_sequences=8)
    assert modes(model) == before


def test_the_global_generator_is_not_moved() -> None:
    model = llama(1)
    before = torch.get_rng_state()
    captured(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_captured_model_still_runs_and_generates() -> None:
    model = llama(1)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        before = model(ids).logits
        captured(model)
        assert torch.equal(model(ids).logits, before)
        assert model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 13)


# --- refusals ---------------------------------------------------------------------------------------------------------


def gpt_oss() -> Any:
    return transformers.GptOssConfig(**COMMON | {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1})


def refusal(model: nn.Module) -> str:
    before = modes(model)
    with pytest.raises(ValueError, match=r"^backbone") as caught:
        capture(model, tokens=64, tile=16, max_sequences=8)
    assert modes(model) == before
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "config", "fields", "module", "reason"),
    [
        ("Gemma2ForCausalLM", "Gemma2Config", {"head_dim": 8}, "model.layers.0.self_attn", "softcap"),
        (
            "GptOssForCausalLM",
            "GptOssConfig",
            {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
            "model.layers.0.self_attn",
            "s_aux",
        ),
        ("MixtralForCausalLM", "MixtralConfig", {"num_local_experts": 2}, "model.layers.0.mlp", ""),
        (
            "LlamaForCausalLM", "LlamaConfig", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "model.rotary_emb", "rope_type='dynamic' follows the longest sequence",
        ),
        (
            "LlamaForCausalLM", "LlamaConfig",
            {"rope_parameters": {"rope_type": "longrope", "factor": 2.0, "rope_theta": 1e4, "short_factor": [1.0] * 4,
                                 "long_factor": [2.0] * 4, "original_max_position_embeddings": 32}},
            "model.rotary_emb", "rope_type='longrope' follows the longest sequence",
        ),
        ("FalconForCausalLM", "FalconConfig", {}, "transformer.h.0.self_attention", "its attention is its own"),
        ("BloomForCausalLM", "BloomConfig", {"n_head": 4}, "", "no attention was found"),
    ],
    ids=["softcap", "sinks", "experts", "dynamic", "longrope", "own attention", "alibi"],
)  # fmt: skip
def test_an_architecture_that_attends_or_routes_otherwise_is_refused_in_one_line(
    kind: str, config: str, fields: dict[str, Any], module: str, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    model = made(getattr(transformers, kind), getattr(transformers, config)(**COMMON | fields))
    message = refusal(model)
    assert module in message
    assert reason in message
    assert capfd.readouterr() == ("", "")


def test_a_transformers_attention_that_looks_ahead_is_refused() -> None:
    model = llama()
    model.model.layers[1].self_attn.is_causal = False
    message = refusal(model)
    assert "'model.layers.1.self_attn'" in message
    assert message.endswith("its attention is not causal")


def test_mamba_is_refused() -> None:
    config = transformers.MambaConfig(
        hidden_size=8, num_hidden_layers=1, vocab_size=VOCABULARY, state_size=2, expand=1, time_step_rank=2
    )
    with pytest.raises(ValueError, match=r"^backbone"):
        capture(made(transformers.MambaForCausalLM, config), tokens=16, tile=16, max_sequences=2)


def test_a_model_on_the_meta_device_is_refused_by_the_tensors_name() -> None:
    with torch.device("meta"):
        model = Plain()
    assert "tokens.weight is on the meta device" in refusal(model)


def test_a_model_without_parameters_is_refused() -> None:
    class Empty(nn.Module):
        def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
            return input_ids[..., None].float()

    assert "no parameter" in refusal(Empty())


def test_a_model_without_attention_is_refused() -> None:
    class Pointwise(Plain):
        def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
            return self.head(self.tokens(input_ids))

    assert "no attention was found" in refusal(made(Pointwise))


def test_a_module_that_does_not_return_logits_is_refused() -> None:
    class Pooled(Plain):
        def logits(self, x: Tensor) -> Tensor:
            return self.head(x)[0]

    assert "logits [1, tokens, vocabulary]" in refusal(made(Pooled))


class Masked(Plain):
    def body(self, x: Tensor) -> Tensor:
        heads = x.view(1, -1, 2, WIDTH // 2).transpose(1, 2)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        return x + F.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask).transpose(1, 2).flatten(2)


class Bidirectional(Plain):
    def body(self, x: Tensor) -> Tensor:
        heads = x.view(1, -1, 2, WIDTH // 2).transpose(1, 2)
        return x + F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)


class DroppingAttention(Plain):
    def body(self, x: Tensor) -> Tensor:
        heads = x.view(1, -1, 2, WIDTH // 2).transpose(1, 2)
        return x + F.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.1, is_causal=True).transpose(1, 2).flatten(2)


class Convolved(Plain):
    def make(self) -> None:
        self.mix = nn.Conv1d(WIDTH, WIDTH, 3, padding=2)

    def body(self, x: Tensor) -> Tensor:
        return x + self.mix(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)


class Averaged(Plain):
    def body(self, x: Tensor) -> Tensor:
        return x + x.mean(1, keepdim=True)


class Branching(Plain):
    def body(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Masked, "explicit mask"),
        (Bidirectional, "not causal"),
        (DroppingAttention, "dropout_p=0.1"),
        (Convolved, "module 'mix': conv1d"),
        (Averaged, "mean works along the tokens"),
        (Branching, "the model itself"),
    ],
)
def test_a_plain_module_that_mixes_tokens_is_refused_with_the_reason(kind: type[Plain], reason: str) -> None:
    assert reason in refusal(made(kind))


def test_dropout_that_is_always_on_is_refused_by_module() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x, 0.5, training=True)

    class Dropping(Plain):
        def make(self) -> None:
            self.noisy = Noisy()

        def body(self, x: Tensor) -> Tensor:
            return self.noisy(x)

    message = refusal(made(Dropping))
    assert "'noisy'" in message
    assert "dropout" in message


@pytest.mark.parametrize("spelling", ["table", "slice", "cumsum", "of ids"])
def test_a_module_that_counts_its_own_positions_is_refused(spelling: str) -> None:
    class Counting(Plain):
        def forward(self, input_ids: Tensor) -> Tensor:  # type: ignore[override]
            length = input_ids.shape[1]
            if spelling == "table":
                places = self.positions(torch.arange(length))[None]
            elif spelling == "slice":
                places = self.positions.weight[:length][None]
            elif spelling == "cumsum":
                places = self.positions(torch.ones(1, length, dtype=torch.long).cumsum(1) - 1)
            else:
                places = self.positions(torch.ones_like(input_ids).cumsum(1) - 1)
            x = self.tokens(input_ids) + places
            return self.head(x + self.attention(x))

    message = refusal(made(Counting))
    assert "the model itself" in message
    assert "position" in message or "differs by row" in message or "cumsum" in message


def test_a_module_that_takes_positions_and_counts_all_the_same_is_refused() -> None:
    class Both(Plain):
        def body(self, x: Tensor) -> Tensor:
            return x + torch.arange(x.shape[1])[None, :, None]

    assert "differs by row" in refusal(made(Both))


@pytest.mark.parametrize("read", [False, True])
def test_a_buffer_that_forward_writes_is_refused_and_not_written(read: bool) -> None:
    class Stateful(Plain):
        def make(self) -> None:
            self.register_buffer("calls", torch.zeros(1))

        def body(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x * self.calls if read else x

    model = made(Stateful)
    message = refusal(model)
    assert "'calls'" in message
    assert "frozen" in message
    assert model.calls.item() == 0


def test_a_parameter_that_forward_writes_is_refused_and_not_written() -> None:
    class Rescaling(Plain):
        def body(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.head.weight.mul_(0.5)
            return x

    model = made(Rescaling)
    before = model.head.weight.clone()
    assert "'head.weight'" in refusal(model)
    assert torch.equal(model.head.weight, before)


def test_the_error_of_a_broken_forward_names_the_module_and_the_reason_on_one_line() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("out of cheese\nand more")

    class Holding(Plain):
        def make(self) -> None:
            self.deep = nn.Sequential(nn.Identity(), Broken())

        def body(self, x: Tensor) -> Tensor:
            return self.deep(x)

    message = refusal(made(Holding))
    assert "'deep.1'" in message
    assert message.endswith("out of cheese")


def test_a_source_reads_back_from_its_text() -> None:
    for source in captured(made(Plain)).inputs:
        assert Source.parse(str(source)) == source
