"""What tests compare against: tiny random backbones, ragged examples, and the same task trained alone by HF PEFT.

The reference runs one unpadded sequence at a time and takes the mean over the labelled tokens of the whole batch. The rules
of comparison come from measurement: PEFT against itself, unpadded one by one against a padded batch, agrees in
fp32 to 2-3e-7 per gradient tensor, and no better.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Example = dict[str, list[int]]
Tensors = dict[str, Tensor]

VOCABULARY = 89

# Losses are means of about 50 terms near 4.5, each a sum over 89 logits: a few fp32 roundings (6e-8) of each side.
LOSS_TOLERANCE = 1e-6


# --- backbones -------------------------------------------------------------------------------------------------------


def build(kind: str, seed: int = 0, **fields: Any) -> Any:
    """A random causal LM of `transformers.<kind>Config` in eval mode; the global generator is left as it was."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(vocab_size=VOCABULARY, **fields)
    return seeded(lambda: transformers.AutoModelForCausalLM.from_config(config), seed).eval()


def seeded(make: Any, seed: int) -> Any:
    """make() under a seed, with every vector (norms, biases) and position shaken, so that no term is trivially 0 or 1."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
                else:
                    parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def llama(seed: int = 0, **fields: Any) -> Any:
    """The smallest backbone: what tests use that are not about a family."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return build("Llama", seed, **{**sizes, "max_position_embeddings": 128, **fields})


# --- examples --------------------------------------------------------------------------------------------------------


def example(generator: torch.Generator, length: int, labelled: float = 0.7, vocabulary: int = VOCABULARY) -> Example:
    """Random ids; about `labelled` of the labels are ids of their own (not the shifted ids: a wrong shift must show)."""
    ids, labels = (torch.randint(vocabulary, (length,), generator=generator) for _ in range(2))
    kept = torch.rand(length, generator=generator) < labelled
    return {"input_ids": ids.tolist(), "labels": torch.where(kept, labels, -100).tolist()}


def examples(seed: int, lengths: Sequence[int], labelled: float = 0.7, vocabulary: int = VOCABULARY) -> list[Example]:
    """One example for each length; the last label of the first is always kept, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    found = [example(generator, length, labelled, vocabulary) for length in lengths]
    found[0]["labels"][-1] = found[0]["input_ids"][0]
    return found


def shifted(given: Iterable[Example]) -> list[Example]:
    """The same examples with their labels one place too late: the classic mistake."""
    return [{"input_ids": one["input_ids"], "labels": [-100, *one["labels"][:-1]]} for one in given]


def count_labelled(given: Iterable[Example], virtual: int = 0) -> int:
    """Labels that something predicts: behind virtual tokens the first one is predicted as well."""
    return sum(label != -100 for one in given for label in one["labels"][0 if virtual else 1 :])


# --- our side --------------------------------------------------------------------------------------------------------


def fill(model: Any, task: str, seed: int = 0, scale: float = 0.1) -> Tensors:
    """Random values in every tensor of a task (PEFT's fresh B is zero, and dA with it); returns them by PEFT's keys.

    At this scale B A x is smaller than W x. At twice the scale a rank-1 adapter drowns a q_proj that feeds a norm, its true
    gradient almost vanishes, and PEFT itself is 8e-6 away from float64.
    """
    generator = torch.Generator().manual_seed(seed)
    for key, value in model.state_dict(task).items():
        if value.is_floating_point():  # not the places of a sparse matrix
            model.state.write(task, key, scale * torch.randn(value.shape, generator=generator))
    return model.state_dict(task)


def shake(model: Any, task: str, seed: int = 0, scale: float = 0.1) -> Tensors:
    """Noise on what each tensor of a task begins with, so that no scale is 1 and no B is 0; returns them by PEFT's keys."""
    generator = torch.Generator().manual_seed(seed)
    for key, value in model.state_dict(task).items():
        if value.is_floating_point():
            model.state.write(task, key, value + scale * torch.randn(value.shape, generator=generator))
    return model.state_dict(task)


# --- the same with HF PEFT -------------------------------------------------------------------------------------------


class Chosen(nn.Module):
    """What PEFT lacks: a copy of the backbone of which some tensors are trained, named as PEFT names them."""

    def __init__(self, backbone: nn.Module, keys: Iterable[str]) -> None:
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = copy.deepcopy(backbone).requires_grad_(False)
        parameters = dict(self.named_parameters())
        for key in keys:
            parameters[key].requires_grad_()

    def get_base_model(self) -> Any:
        return self.base_model.model

    def forward(self, **given: Any) -> Any:
        return self.base_model.model(**given)


def with_bottlenecks(backbone: nn.Module, config: Any, weights: Mapping[str, Tensor]) -> Any:
    """A copy of the backbone with AdapterHub's modules: down, activation, up, hooked behind the last linear of a sublayer.

    What the sublayer is added to is what its norm read.
    """
    from transformers.activations import get_activation

    model: Any = copy.deepcopy(backbone).requires_grad_(False)
    for name in sorted({key.partition(".adapter_")[0] for key in weights}):
        layer_name, _, holder = name.rpartition(".")
        layer, size = model.get_submodule(layer_name), weights[f"{name}.adapter_up.bias"].shape[0]
        down = nn.Linear(size, weights[f"{name}.adapter_down.0.bias"].shape[0])
        adapter: Any = nn.Module()
        adapter.adapter_down = nn.Sequential(down, get_activation(config.non_linearity))
        adapter.adapter_up = nn.Linear(down.out_features, size)
        adapter.dropout = nn.Dropout(config.dropout)
        layer.register_module(holder, adapter)
        attention = holder == "attention_adapters"
        norms = ("input_layernorm", "ln_1", "self_attn_layer_norm") if attention else _OUTPUT_NORMS
        lasts = ("self_attn.o_proj", "attn.c_proj", "self_attn.out_proj") if attention else ("mlp.down_proj", "mlp.c_proj", "fc2")
        _hook(adapter, _first(layer, norms), _first(layer, lasts), config)
    return model


_OUTPUT_NORMS = ("post_attention_layernorm", "ln_2", "final_layer_norm")


def _first(layer: nn.Module, names: Iterable[str]) -> nn.Module:
    modules = dict(layer.named_modules())
    return next(modules[name] for name in names if name in modules)


def _hook(adapter: Any, norm: nn.Module, last: nn.Module, config: Any) -> None:
    residual: list[Tensor] = []

    def keep(module: nn.Module, given: Any) -> None:
        residual[:] = given

    def add(module: nn.Module, given: Any, output: Tensor) -> Tensor:
        (beside,) = residual
        x = beside if config.is_parallel else output + beside if config.original_ln_before else output
        return output + adapter.dropout(config.scaling * adapter.adapter_up(adapter.adapter_down(x)))

    norm.register_forward_pre_hook(keep)
    last.register_forward_hook(add)


def peft_model(backbone: nn.Module, config: Any, weights: Mapping[str, Tensor] | None = None) -> Any:
    """A copy of the backbone with one adapter, in PEFT's hands, starting from `weights` (by PEFT's keys, all of them)."""
    from peft import PeftConfig, get_peft_model

    if not isinstance(config, PeftConfig):
        assert weights is not None, "a kind that PEFT lacks starts from given tensors"
        bottlenecks = config.peft_type == "BOTTLENECK"
        model: Any = with_bottlenecks(backbone, config, weights) if bottlenecks else Chosen(backbone, weights)
    else:
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(copy.deepcopy(backbone), copy.deepcopy(config))
    if weights is not None:
        kept = {re.sub(r"\.default$", "", name): value for name, value in model.named_buffers(remove_duplicate=False)}
        kept |= {
            f"{name}.shira_indices": module.shira_indices["default"]
            for name, module in model.named_modules()
            if hasattr(module, "shira_indices")
        }
        own = {**trainable(model), **{key: kept[key] for key in weights if key in kept}}
        assert own.keys() == weights.keys(), f"PEFT has other tensors: {sorted(own.keys() ^ weights.keys())}"
        with torch.no_grad():
            for key, parameter in own.items():
                assert parameter.shape == weights[key].shape, f"{key}: PEFT's shape is {tuple(parameter.shape)}"
                parameter.copy_(weights[key])
    return model


def trainable(model: Any) -> dict[str, nn.Parameter]:
    """The adapter's parameters under the keys of PEFT's file."""
    names = {
        name: re.sub(r"(\.modules_to_save)?\.default(?=\.|$)", "", name)
        for name, value in model.named_parameters()
        if value.requires_grad
    }
    parameters = dict(model.named_parameters())
    # A prompt that is trained itself, without an encoder, is saved under another name.
    saved = _SAVED if len(names) == 1 else {}
    return {
        saved.get(short, re.sub(r"(magnitude_vector)\.weight$", r"\1", short)): parameters[name] for name, short in names.items()
    }


_SAVED = {"prompt_encoder.embedding.weight": "prompt_embeddings"}


def logits_of(model: Any, ids: Sequence[int]) -> Tensor:
    """[L, vocabulary] of one sequence alone. A module that asks for positions is given them; HF models count from 0."""
    given = torch.tensor(ids)[None]
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    extra = {} if hasattr(base, "config") else {"position_ids": torch.arange(len(ids))[None]}
    out = model(input_ids=given, **extra)
    return getattr(out, "logits", out)[0]


def mean_loss(model: Any, given: Sequence[Example]) -> Tensor:
    """The mean over the labelled tokens of the whole batch, one unpadded sequence at a time."""
    virtual = virtual_tokens(model)
    total = torch.zeros(())
    for one in given:
        labels = [-100] * virtual + one["labels"]
        if any(label != -100 for label in labels[1:]):
            logits = logits_of(model, one["input_ids"])
            total = total + nn.functional.cross_entropy(logits[:-1], torch.tensor(labels[1:]), ignore_index=-100, reduction="sum")
    return total / count_labelled(given, virtual)


def virtual_tokens(model: Any) -> int:
    """Rows that PEFT puts before a sequence, whose logits come out as well (a prefix of keys and values has none)."""
    config = model.active_peft_config if hasattr(model, "active_peft_config") else None
    return config.num_virtual_tokens if config is not None and config.peft_type in ("PROMPT_TUNING", "P_TUNING") else 0


def loss_and_gradients(model: Any, given: Sequence[Example]) -> tuple[float, Tensors]:
    """One backward of PEFT from the weights it has."""
    model.zero_grad(set_to_none=True)
    loss = mean_loss(model, given)
    loss.backward()
    return float(loss.detach()), {key: value.grad.clone() for key, value in trainable(model).items() if value.grad is not None}


def train_alone(model: Any, optimizer: torch.optim.Optimizer, batches: Sequence[Sequence[Example]]) -> list[tuple[float, Tensors]]:
    """One step for each batch; returns loss and gradients of every step, before its update."""
    seen = []
    for batch in batches:
        seen.append(loss_and_gradients(model, batch))
        optimizer.step()
    return seen


# --- the comparison rules --------------------------------------------------------------------------------------------


def wrong_loss(got: float, want: float) -> list[str]:
    return [] if abs(got - want) <= LOSS_TOLERANCE * abs(want) else [f"loss {got!r} is not {want!r}"]


def wrong_gradients(got: Tensors, want: Tensors) -> list[str]:
    """Tensors that break |d| <= 1e-5 |g| + 1e-7 x (the task's largest gradient norm)."""
    if got.keys() != want.keys():
        return [f"gradients are for other tensors: {sorted(got.keys() ^ want.keys())}"]
    largest = max(float(gradient.norm()) for gradient in want.values())
    found = []
    for key, gradient in want.items():
        off, allowed = float((got[key] - gradient).norm()), 1e-5 * float(gradient.norm()) + 1e-7 * largest
        if not off <= allowed:
            found.append(f"{key}: gradient is off by {off:.3g}, allowed {allowed:.3g}")
    return found


def wrong_after_sgd(got: Tensors, want: Tensors) -> list[str]:
    """Tensors that are not equal to 1e-5, element by element."""
    off = {key: float((got[key] - weight).abs().max()) for key, weight in want.items()}
    return [f"{key}: weight is off by {value:.3g}, allowed 1e-5" for key, value in off.items() if not value <= 1e-5]


def wrong_after_adamw(
    got: Tensors, want: Tensors, gradients: Sequence[Tensors], rate: float | Mapping[str, float]
) -> tuple[list[str], float]:
    """Tensors with max |dw| > 2e-3 x lr x steps, and the fraction of elements that were left out.

    AdamW divides a gradient by its own size, so an element whose gradient vanishes is rounding alone: elements with |g| under
    1e-6 of the task's largest, in any step, are left out and counted. (Exactly 0 is no rounding: an embedding's row nobody read.)
    `rate` may be a rate for each key.
    """
    kept = {key: torch.ones_like(weight, dtype=torch.bool) for key, weight in want.items()}
    for step in gradients:
        largest = max(float(gradient.abs().max()) for gradient in step.values())
        for key, gradient in step.items():
            kept[key] &= (gradient.abs() >= 1e-6 * largest) | (gradient == 0)
    found = []
    for key, weight in want.items():
        allowed = 2e-3 * (rate if isinstance(rate, float) else rate[key]) * len(gradients)
        off = torch.where(kept[key], (got[key] - weight).abs(), 0).max()
        if not float(off) <= allowed:
            found.append(f"{key}: weight is off by {float(off):.3g}, allowed {allowed:.3g}")
    total = sum(mask.numel() for mask in kept.values())
    return found, 1 - sum(int(mask.sum()) for mask in kept.values()) / total


# --- bits, and refusals ----------------------------------------------------------------------------------------------


def equal(one: Any, other: Any) -> bool:
    """Bit for bit the same, tensors anywhere inside dicts, lists and tuples included (a NaN is never equal)."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def everything(model: Any, tasks: Iterable[str] | None = None) -> dict[str, dict[str, Any]]:
    """A copy of all that the tasks' training goes on from."""
    return {
        name: {
            "weights": model.state_dict(name),
            "gradients": model.gradients(name),
            "optimizer": [
                copy.deepcopy(dict(model.state.tasks[name].optimizer.state[view])) for view in model.state.tasks[name].views
            ],
            "counters": (model.steps[name], model.examples_seen[name], model.learning_rate(name)),
            "quarantined": model.state.tasks[name].quarantined,
        }
        for name in tasks or model.tasks
    }


def refused(call: Callable[[], Any], *patterns: str) -> str:
    """The message of the ValueError that a call must end in: one line in which every pattern is found."""
    message = _message_of(call)
    assert "\n" not in message.strip(), message
    missing = [pattern for pattern in patterns if not re.search(pattern, message)]
    assert not missing, f"{missing} not in: {message}"
    return message


def _message_of(call: Callable[[], Any]) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            call()
        except ValueError as error:
            return str(error)
    raise AssertionError("nothing was refused")
