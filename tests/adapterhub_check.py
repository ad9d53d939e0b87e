"""Bottleneck adapters against AdapterHub's own library, in both directions. Not run by the suite.

The library (`adapters`) pins a transformers that this package does not run with: the two sides are two Python environments that
exchange folders. In the repository's root:

    python3 -m venv /tmp/adapterhub && /tmp/adapterhub/bin/pip install torch==2.13.0 adapters==1.3.0
    .venv/bin/python tests/adapterhub_check.py ours DIR             # backbones, our adapters, our logits, losses and gradients
    /tmp/adapterhub/bin/python tests/adapterhub_check.py theirs DIR  # loads and compares; saves adapters of its own
    .venv/bin/python tests/adapterhub_check.py again DIR            # loads those and compares

A difference, or a tensor that one side does not know, is an exit status that is not 0.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

IDS = [[5, 17, 3, 80, 41, 41, 8, 2, 66], [12, 9, 55, 31]]
_LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
BACKBONES: dict[str, dict[str, Any]] = {
    "Llama": _LLAMA,
    "Mistral": _LLAMA,
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "OPT": {
        "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
        "word_embed_proj_dim": 32, "dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0,
    },
}  # fmt: skip
# The library's own three configs by name, and what differs from them.
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "seq": ("seq_bn", {"reduction_factor": 4}),
    "double": ("double_seq_bn", {"reduction_factor": {"1": 2.0, "default": 8.0}}),
    "par": ("par_bn", {}),
    "par.both": ("par_bn", {"mh_adapter": True, "non_linearity": "gelu_new", "leave_out": [0], "scaling": 0.3}),
    "seq both": ("seq_bn", {"mh_adapter": True, "non_linearity": "gelu", "scaling": 2.0}),
    "wide": ("double_seq_bn", {"reduction_factor": 0.1, "non_linearity": "tanh"}),
}
# The three as our config has them.
FIXED: dict[str, dict[str, Any]] = {
    "seq_bn": {},
    "double_seq_bn": {"mh_adapter": True, "original_ln_before": False, "non_linearity": "swish"},
    "par_bn": {
        "is_parallel": True, "original_ln_before": False, "reduction_factor": 2, "scaling": 4.0, "init_weights": "mam_adapter",
    },
}  # fmt: skip
# Float32 sums of 32 to 320 terms in another order.
TOLERANCE = 2e-5


def ours(root: Path) -> None:
    """Random backbones, fresh adapters with noise on them, what we compute with them."""
    import transformers

    import muxcompile

    for seed, (kind, fields) in enumerate(BACKBONES.items()):
        torch.manual_seed(seed)
        config = getattr(transformers, f"{kind}Config")(vocab_size=89, bos_token_id=1, eos_token_id=2, **fields)
        backbone: Any = transformers.AutoModelForCausalLM.from_config(config).eval()
        backbone.save_pretrained(root / kind / "backbone")
        tasks = {name: muxcompile.BottleneckConfig(**{**FIXED[base], **own}) for name, (base, own) in LAYOUTS.items()}
        model = muxcompile.compile(backbone, tasks, muxcompile.Options(chunk_tokens=256))
        for name in tasks:
            for key, value in model.state_dict(name).items():
                model.state.write(name, key, value + 0.1 * torch.randn(value.shape))
        model.save_pretrained(root / kind / "ours")
        torch.save(_ours(model), root / kind / "ours.pt")


def again(root: Path) -> None:
    """Read the library's folders and compare with what it computed."""
    import transformers

    import muxcompile

    wrong = []
    for kind in BACKBONES:
        backbone: Any = transformers.AutoModelForCausalLM.from_pretrained(root / kind / "backbone").eval()
        folders = {name: str(root / kind / "theirs" / name) for name in LAYOUTS}
        model = muxcompile.compile(backbone, folders, muxcompile.Options(chunk_tokens=256))
        wrong += list(_differences(kind, _ours(model), torch.load(root / kind / "theirs.pt")))
    _finish(wrong)


def _ours(model: Any) -> dict[str, dict[str, Tensor]]:
    batch = [{"input_ids": ids, "labels": ids} for ids in IDS]
    result = model.forward_backward(dict.fromkeys(LAYOUTS, batch))
    return {name: {"loss": result.losses[name].detach(), **model.gradients(name)} for name in LAYOUTS}


def theirs(root: Path) -> None:
    """In the library's environment: load our folders, compare; save adapters drawn by the library, with what it computes."""
    import adapters
    import transformers

    wrong = []
    for kind in BACKBONES:
        results: dict[str, dict[str, Tensor]] = {}
        expected = torch.load(root / kind / "ours.pt")
        for seed, (name, (base, own)) in enumerate(LAYOUTS.items()):
            known: dict[str, Any] = {}
            model = _adapted(transformers, adapters, root / kind / "backbone")
            loaded = model.load_adapter(str(root / kind / "ours" / name), loading_info=known, set_active=True)
            wrong += [f"{kind} {name}: {what}: {keys}" for what, keys in known.items() if keys]
            model.train_adapter(loaded)
            wrong += list(_differences(kind, {name: _theirs(model, loaded)}, {name: expected[name]}))
            fresh = _adapted(transformers, adapters, root / kind / "backbone")
            torch.manual_seed(seed)
            fresh.add_adapter("anew", config=adapters.AdapterConfig.load(base, **own), set_active=True)
            fresh.train_adapter("anew")
            with torch.no_grad():
                for parameter in fresh.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.1 * torch.randn_like(parameter))
            (root / kind / "theirs").mkdir(exist_ok=True)
            fresh.save_adapter(str(root / kind / "theirs" / name), "anew", use_safetensors=seed % 2 == 1)
            results[name] = _theirs(fresh, "anew")
        torch.save(results, root / kind / "theirs.pt")
    _finish(wrong)


def _adapted(transformers: Any, adapters: Any, folder: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    interface = None
    if json.loads((folder / "config.json").read_text())["model_type"] == "opt":
        # The library has no OPT of its own: this is how a user tells it where things are.
        interface = adapters.AdapterModelInterface(
            adapter_methods=["bottleneck"], model_embeddings="decoder.embed_tokens", model_layers="decoder.layers",
            layer_self_attn="self_attn", layer_cross_attn=None, attn_q_proj="q_proj", attn_k_proj="k_proj", attn_v_proj="v_proj",
            attn_o_proj="out_proj", layer_intermediate_proj="fc1", layer_output_proj="fc2",
            layer_pre_self_attn="self_attn_layer_norm", layer_pre_ffn="final_layer_norm",
        )  # fmt: skip
    adapters.init(model, interface=interface)
    return model


def _theirs(model: Any, name: str) -> dict[str, Tensor]:
    """The mean loss over all labelled tokens, and gradients by our keys."""
    model.eval()
    model.zero_grad()
    total, count = torch.zeros(()), sum(len(ids) - 1 for ids in IDS)
    for ids in IDS:
        logits = model(input_ids=torch.tensor([ids])).logits[0]
        total = total + torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="sum")
    loss = total / count
    loss.backward()
    own = {key: value for key, value in model.named_parameters() if value.requires_grad}
    return {"loss": loss.detach(), **{key.replace(f".adapters.{name}.", "."): value.grad for key, value in own.items()}}


def _differences(kind: str, got: dict[str, dict[str, Tensor]], want: dict[str, dict[str, Tensor]]) -> Iterator[str]:
    for name, tensors in want.items():
        if got[name].keys() != tensors.keys():
            yield f"{kind} {name}: tensors differ: {sorted(got[name].keys() ^ tensors.keys())}"
            continue
        off = {key: float((got[name][key] - value).norm() / (value.norm() + 1e-6)) for key, value in tensors.items()}
        worst = max(off, key=lambda key: off[key])
        print(f"{kind:8} {name:9} loss {float(tensors['loss']):.6f}, worst of {len(off)} tensors: {off[worst]:.1e} {worst}")
        if not off[worst] <= TOLERANCE:
            yield f"{kind} {name}: {worst} is off by {off[worst]:.2g}"


def _finish(wrong: list[str]) -> None:
    print("\n".join(wrong) or "equal")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(Path(__file__).parents[1]))
    {"ours": ours, "theirs": theirs, "again": again}[sys.argv[1]](Path(sys.argv[2]))
