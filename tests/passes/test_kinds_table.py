"""docs/peft-kinds.md lists the kinds that there are, as the code's own table says; keys and numbers are those of real examples."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
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

from passes.adapters import KINDS, Adapter
from passes.adapters.bitfit import BitFitConfig
from passes.adapters.bottleneck import BottleneckConfig
from passes.graph import MuxGraph
from tests.backbones import attached, llama, normal, resolved

PAGE = Path(__file__).parents[2] / "docs" / "peft-kinds.md"
BEGIN, END = "<!-- table: written by tests/passes/test_kinds_table.py -->\n", "<!-- end -->"
HEAD = "kind", "sites", "Dispatch", "Adapter", "Aggregate", "parameters of a site", "PEFT keys", "cost of a site"

# By kind: a small task, the numbers of its formula that its sites do not say, and more tasks for their keys.
EXAMPLES: dict[str, tuple[Any, dict[str, int], list[Any]]] = {
    "LORA": (
        LoraConfig(r=3, target_modules=["k_proj", "down_proj"]),
        {"r": 3},
        [
            LoraConfig(r=3, target_modules=["k_proj"], use_dora=True),
            LoraConfig(r=3, target_modules=["q_proj"], lora_bias=True, bias="all"),
            LoraConfig(r=3, target_modules=["embed_tokens"], modules_to_save=["lm_head"]),
            LoraConfig(r=3, target_modules=["q_proj"], trainable_token_indices=[1, 2]),
        ],
    ),
    "VERA": (VeraConfig(r=5, target_modules=["k_proj", "down_proj"]), {"r": 5}, []),
    "IA3": (IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]), {}, []),
    "LN_TUNING": (LNTuningConfig(target_modules=["input_layernorm"]), {}, []),
    "PROMPT_TUNING": (PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), {"P": 3}, []),
    "P_TUNING": (PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=7, task_type="CAUSAL_LM"), {"P": 3, "H": 7}, []),
    "PREFIX_TUNING": (PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), {"P": 3}, []),
    "BITFIT": (BitFitConfig(target_modules=["q_proj"]), {}, []),
    "SHIRA": (ShiraConfig(r=2, target_modules=["k_proj", "down_proj"]), {"r": 2}, []),
    "TRAINABLE_TOKENS": (TrainableTokensConfig(token_indices=[4, 1, 7]), {"n": 3}, []),
    "BOTTLENECK": (BottleneckConfig(mh_adapter=True, reduction_factor=4), {}, []),
}


@pytest.fixture(scope="module")
def backbone() -> Any:
    """Biases everywhere that a linear may have one; K is not N, and a head has features of its own."""
    return llama(num_key_value_heads=2, attention_bias=True)


@pytest.fixture(scope="module")
def graph(backbone: Any) -> MuxGraph:
    return normal(backbone)


def trained(graph: MuxGraph, adapter: Adapter) -> set[str]:
    """The keys that the task's optimizer would have."""
    after = attached(graph, [adapter])
    rows = {key for (_, key), param in after.params.items() if after.tables[param.table].trainable}
    return rows | {given.key for encoding in after.encodings.values() for given in encoding.inputs if given.trainable}


def keys(graph: MuxGraph, backbone: Any, peft_type: str) -> list[str]:
    """What the file of a task of the kind holds, `<module>` for a site's name."""
    config, _, more = EXAMPLES[peft_type]
    found: dict[str, None] = {}
    for own in (config, *more):
        (adapter,) = resolved(backbone, {"one": own})
        free = trained(graph, adapter)
        for site in adapter.sites:
            if finished := getattr(site, "finished", ""):
                found[f"`{finished}`, which it computes"] = None
                continue
            for key in site.tensors():
                pattern = f"`{key.replace(f'{site.name}.', '<module>.')}`"
                found[pattern if key in free else f"{pattern}, fixed"] = None
    return list(found)


def numbers(site: Any, backbone: Any, config: Any) -> dict[str, int]:
    """The letters of the formulas, as far as the site's module or the backbone says them."""
    about = backbone.config
    found = {"E": about.hidden_size, "L": about.num_hidden_layers, "G": about.num_key_value_heads, "D": about.head_dim}
    module = dict(backbone.named_modules()).get(site.name)
    if isinstance(module, nn.Linear):
        found |= {"K": module.in_features, "N": module.out_features}
        found["feedforward"] = site.name.rpartition(".")[2] in (getattr(config, "feedforward_modules", None) or ())
    elif module is not None and hasattr(module, "weight"):
        found |= {"N": module.weight.numel(), "bias": int(getattr(module, "bias", None) is not None)}
    elif hasattr(config, "reduction_factor"):
        found |= {"N": about.hidden_size, "R": about.hidden_size // config.reduction_factor}
    return found


@pytest.mark.parametrize("peft_type", KINDS)
def test_the_formula_of_a_kind_counts_what_its_sites_train(peft_type: str, graph: MuxGraph, backbone: Any) -> None:
    config, given, _ = EXAMPLES[peft_type]
    (adapter,) = resolved(backbone, {"one": config})
    free, counted = trained(graph, adapter), 0
    for site in adapter.sites:
        shapes = [shape for key, shape in site.tensors().items() if key in free]
        if shapes:
            wanted = eval(KINDS[peft_type].parameters, {**numbers(site, backbone, config), **given})
            assert sum(math.prod(shape) for shape in shapes) == wanted, site
            counted += len(shapes)
    assert counted == len(free), "a tensor that no site has"


def table(graph: MuxGraph, backbone: Any) -> str:
    lines = ["| " + " | ".join(HEAD) + " |", "| --- " * len(HEAD) + "|"]
    for kind in KINDS.values():
        file = kind.resolve.__module__.rpartition(".")[2]
        cells = (
            f"{kind.peft_type}, {kind.family}, `{file}.py`", kind.places, kind.dispatch, kind.adapter, kind.aggregate,
            f"`{kind.parameters}`", "; ".join(keys(graph, backbone, kind.peft_type)), kind.cost,
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def test_the_page_has_the_table_of_the_code(graph: MuxGraph, backbone: Any) -> None:
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    wanted = f"{before}{BEGIN}{table(graph, backbone)}{END}{after}"
    if os.environ.get("MUXCOMPILE_ACCEPT") == "1":
        PAGE.write_text(wanted)
    assert wanted == text or PAGE.read_text() == wanted


def test_every_kind_says_what_it_is() -> None:
    for kind in KINDS.values():
        assert kind.family in ("reparameterised", "additive", "selective"), kind.peft_type
        assert all((kind.places, kind.dispatch, kind.adapter, kind.aggregate, kind.cost)), kind.peft_type
