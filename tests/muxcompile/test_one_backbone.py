"""One frozen backbone carries all tasks: it runs once per chunk, is held once, is never written, and keeps what is whose apart."""

from __future__ import annotations

import gc
import hashlib
import importlib
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import muxcompile
from runtime.program import Kind

from .peft_reference import Example, Tensors, build, equal, examples, fill, llama, wrong_gradients

ADAPTERS = {
    "alice": LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
    "bob": LoraConfig(r=9, target_modules=["q_proj", "v_proj"]),
    "carol": LoraConfig(r=20, target_modules=["down_proj"], use_rslora=True),
    "dan": LoraConfig(r=6, target_modules="all-linear"),
}
DATA = {
    "alice": examples(1, (20, 9)),
    "bob": examples(2, (5, 30, 3)),
    "carol": examples(3, (16,)),
    "dan": examples(4, (40, 2)),
}
CHUNK = muxcompile.Options(chunk_tokens=128)


def digest(backbone: nn.Module) -> str:
    """Every bit of every parameter and buffer, with its name."""
    found = hashlib.sha256()
    for name, tensor in sorted(backbone.state_dict(keep_vars=True).items()):
        found.update(name.encode() + tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    for name, buffer in sorted(backbone.named_buffers()):
        found.update(name.encode() + buffer.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@pytest.fixture(scope="module")
def backbone() -> Any:
    return llama(777)


@pytest.fixture(scope="module")
def started(backbone: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The compiled model and a checkpoint of its beginning."""
    model = muxcompile.compile(backbone, ADAPTERS, CHUNK)
    for index, name in enumerate(ADAPTERS):
        fill(model, name, seed=index)
    folder = tmp_path_factory.mktemp("started") / "checkpoint"
    model.save_checkpoint(folder)
    return model, folder


@pytest.fixture
def model(started: tuple[Any, Path]) -> Any:
    """The compiled model, put back to its beginning: weights, optimizers, counters, no gradients."""
    compiled, folder = started
    compiled.load_checkpoint(folder)
    return compiled


# --- it runs once ----------------------------------------------------------------------------------------------------


def test_every_region_runs_once_per_chunk_and_carries_the_tokens_of_several_tasks(model: Any) -> None:
    model.step(DATA)
    actions = list(model.executed)
    chunks = [action.micro for action in actions if action.kind is Kind.LOAD]
    assert chunks == list(range(len(chunks)))
    assert len(chunks) >= 2
    regions = set(model._build.groups[0].regions)
    assert {"embed", "model.layers.0", "model.layers.1", "final"} == regions
    forwards = Counter((action.region, action.micro) for action in actions if action.kind is Kind.F)
    assert forwards == Counter({(region, micro): 1 for region in regions for micro in chunks})
    backwards = Counter((action.region, action.micro) for action in actions if action.kind is Kind.B)
    assert backwards == Counter({(region, micro): 1 for region in regions - {"embed"} for micro in chunks})
    carried = {action.micro: action.tasks for action in actions if action.kind is Kind.LOAD}
    assert all(action.tasks == carried[action.micro] for action in actions if action.kind in (Kind.F, Kind.B, Kind.LOSS))
    assert max(len(tasks) for tasks in carried.values()) >= 3, carried
    assert [action.tasks for action in actions if action.kind is Kind.STEP] == [(name,) for name in DATA]


class Reads(TorchDispatchMode):
    """Counts the operators that read each of the given tensors' memory, whatever the program says it ran."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.names = {storage(tensor): name for name, tensor in tensors.items()}
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # An operator of ours hides its products from a dispatch mode; its list of frozen weights is what it multiplies with.
        ours = func in (torch.ops.mux.linears.default, torch.ops.mux.linears_backward_.default)
        if ours or func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default):
            for arg in tree_leaves(args):
                if isinstance(arg, Tensor) and (name := self.names.get(storage(arg))):
                    self.count[name] += 1
        return func(*args, **(kwargs or {}))


def test_four_tasks_multiply_with_each_frozen_weight_as_often_as_one_task_does(model: Any, backbone: Any) -> None:
    weights = {name: value for name, value in backbone.named_parameters() if value.dim() == 2 and "embed" not in name}
    short = {name: given[:1] for name, given in DATA.items()}
    counts = []
    for batches in (short, {"alice": short["alice"]}):
        with Reads(weights) as reads:
            model.step(batches)
        assert len([action for action in model.executed if action.kind is Kind.LOAD]) == 1
        counts.append(reads.count)
    # The loss goes task by task in blocks of labelled rows, so the head is read once for each block.
    layers = [{name: times for name, times in count.items() if name != "lm_head.weight"} for count in counts]
    assert layers[0] == layers[1]
    # Once forward, once backward; layer 0's q, k and v have no gradient to hand on, all others do.
    assert set(layers[0].values()) <= {1, 2}
    assert layers[0].keys() == weights.keys() - {"lm_head.weight"}


def classes_below(top: type[Any]) -> Iterator[type[Any]]:
    for child in top.__subclasses__():
        yield child
        yield from classes_below(child)


def raiser(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("a forward of PEFT or of the backbone was run")


def test_training_works_with_every_forward_of_peft_patched_to_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    for layer in [PeftModel, *classes_below(PeftModel), *classes_below(BaseTunerLayer)]:
        if "forward" in vars(layer):
            monkeypatch.setattr(layer, "forward", raiser)
    backbone = llama(5, num_hidden_layers=4)
    model = muxcompile.compile(backbone, {name: ADAPTERS[name] for name in ("alice", "bob")}, CHUNK)
    # Layers that are alike share one template (the first differs: nothing below it wants a gradient), so that a deep model
    # compiles in the time of a shallow one.
    assert [region.template for region in model._build.groups[0].regions.values()] == [
        "embed",
        "model.layers.0",
        *["model.layers.1"] * 3,
        "final",
    ]
    # Once compiled, the backbone's own forward is not run either: only its tensors are read.
    for module in backbone.modules():
        monkeypatch.setattr(module, "forward", raiser)
    before = {name: model.state_dict(name) for name in ("alice", "bob")}
    for _ in range(2):
        model.step({name: DATA[name] for name in before})
    for name, weights in before.items():
        after = model.state_dict(name)
        assert all(not torch.equal(after[key], weight) for key, weight in weights.items()), name


def test_the_backbone_is_captured_and_its_head_differentiated_once_whoever_comes_and_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    count: Counter[str] = Counter()
    for place in ("muxcompile.driver.capture", "muxcompile.templates.differentiate_head"):
        module, _, name = place.rpartition(".")
        function = getattr(importlib.import_module(module), name)

        def counted(*args: Any, function: Any = function, name: str = name, **kwargs: Any) -> Any:
            count[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(place, counted)
    model = muxcompile.compile(llama(5), {"alice": ADAPTERS["alice"]}, CHUNK)
    model.add_task(muxcompile.Task("carol", ADAPTERS["carol"]))
    model.remove_task("alice")
    model.step({"carol": DATA["carol"]})
    assert count == {"capture": 1, "differentiate_head": 1}


# --- it is held once, and never written ------------------------------------------------------------------------------


def test_every_weight_that_the_executor_reads_is_the_memory_of_the_backbone_itself(model: Any, backbone: Any) -> None:
    own = {tensor.data_ptr() for tensor in [*backbone.parameters(), *backbone.buffers()]}
    used = model._executors[0].weights
    assert {name for name, tensor in used.items() if tensor.data_ptr() not in own} == set()
    # and nothing of the backbone is missing from what is read: it is the model that runs
    assert {tensor.data_ptr() for tensor in backbone.parameters()} <= {tensor.data_ptr() for tensor in used.values()}


def test_transposed_and_tied_weights_are_not_copied_either() -> None:
    gpt2 = build("GPT2", 6, n_embd=32, n_head=4, n_layer=2, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    own = {tensor.data_ptr() for tensor in [*gpt2.parameters(), *gpt2.buffers()]}
    model = muxcompile.compile(gpt2, {"alice": LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)}, CHUNK)
    assert {name for name, tensor in model._executors[0].weights.items() if tensor.data_ptr() not in own} == set()


def test_no_copy_of_a_backbone_weight_is_alive_after_training(model: Any, backbone: Any) -> None:
    model.step(DATA)
    gc.collect()
    big = {tuple(parameter.shape): parameter for parameter in backbone.parameters() if parameter.dim() == 2}
    copies = []
    for thing in gc.get_objects():
        if type(thing) in (Tensor, nn.Parameter) and not thing.is_meta and tuple(thing.shape) in big:
            for parameter in backbone.parameters():
                if parameter.shape == thing.shape and storage(parameter) != storage(thing) and torch.equal(parameter, thing):
                    copies.append(tuple(thing.shape))
    assert not copies


def test_training_changes_no_bit_of_the_backbone_and_leaves_it_as_it_was_given(model: Any, backbone: Any) -> None:
    ids = torch.arange(12)[None]
    before, logits = digest(backbone), backbone(input_ids=ids).logits
    for _ in range(3):
        model.step(DATA)
    model.evaluate(DATA)
    assert digest(backbone) == before == digest(llama(777))
    assert torch.equal(backbone(input_ids=ids).logits, logits)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in backbone.parameters())
    assert backbone.config._attn_implementation == llama(777).config._attn_implementation
    assert not backbone.training


def test_a_backbone_in_training_mode_stays_in_training_mode() -> None:
    backbone = llama(8, num_hidden_layers=1).train()
    muxcompile.compile(backbone, {"alice": LoraConfig(r=4, target_modules=["q_proj"])}, CHUNK)
    assert all(module.training for module in backbone.modules())


# --- random numbers --------------------------------------------------------------------------------------------------


def test_the_global_random_numbers_are_neither_read_nor_moved(backbone: Any) -> None:
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        numpy.random.seed(seed)
        before = torch.random.get_rng_state(), random.getstate(), numpy.random.get_state(legacy=False)["state"]["key"].tolist()
        model = muxcompile.compile(backbone, {name: ADAPTERS[name] for name in ("alice", "carol")}, CHUNK)
        fresh = {name: model.state_dict(name) for name in model.tasks}
        losses = [model.step({name: DATA[name] for name in model.tasks}).losses for _ in range(2)]
        after = torch.random.get_rng_state(), random.getstate(), numpy.random.get_state(legacy=False)["state"]["key"].tolist()
        assert torch.equal(after[0], before[0])
        assert after[1:] == before[1:]
        runs.append((fresh, losses, {name: model.state_dict(name) for name in model.tasks}))
    (fresh, losses, trained), (fresh_again, losses_again, trained_again) = runs
    for name in fresh:
        assert equal(fresh[name], fresh_again[name])
        assert equal(trained[name], trained_again[name])
        assert not equal(fresh[name], trained[name])
        assert all(torch.equal(one[name], other[name]) for one, other in zip(losses, losses_again, strict=True))


# --- packed sequences ------------------------------------------------------------------------------------------------


def other_ids(given: Example) -> Example:
    """The same length and labels; every id another one."""
    return {"input_ids": [(one + 13) % 89 for one in given["input_ids"]], "labels": given["labels"]}


def only(data: dict[str, list[Example]], task: str, index: int) -> dict[str, list[Example]]:
    """Of this task's sequences only one keeps its labels: the task's loss is then that sequence's. Others keep theirs."""
    blank = [{**one, "labels": [-100] * len(one["labels"])} for one in data[task]]
    return {**data, task: [*blank[:index], data[task][index], *blank[index + 1 :]]}


def test_packed_sequences_do_not_see_each_other(model: Any) -> None:
    # All in one chunk: alice's second sequence stands right behind the first, in one block of rows.
    data = {"alice": [*examples(21, (11, 9, 6)), *examples(22, (20,))], "bob": examples(23, (13, 7))}
    places = [(task, index) for task, given in data.items() for index in range(len(given))]
    alone = {(task, index): model.evaluate(only(data, task, index)).losses[task] for task, index in places}
    for changed_task, changed in places:
        given = data[changed_task]
        disturbed = {**data, changed_task: [*given[:changed], other_ids(given[changed]), *given[changed + 1 :]]}
        for task, index in places:
            loss = model.evaluate(only(disturbed, task, index)).losses[task]
            assert len([action for action in model.executed if action.kind is Kind.LOAD]) == 1
            unchanged = (task, index) != (changed_task, changed)
            assert torch.equal(loss, alone[task, index]) == unchanged, (task, index, changed_task, changed)


def test_a_neighbours_ids_change_no_bit_of_a_sequences_gradients(model: Any) -> None:
    first, second = examples(24, (11, 9))
    blank = {**first, "labels": [-100] * 11}
    gradients = []
    for neighbour in (blank, other_ids(blank)):
        model.forward_backward({"alice": [neighbour, second], "bob": DATA["bob"]})
        gradients.append(model.gradients("alice"))
        model.optim_step("bob")
        model.state.clear_gradients("alice")
    assert equal(*gradients)
    assert all(gradient.any() for gradient in gradients[0].values())


# --- bound by name ---------------------------------------------------------------------------------------------------


def test_optim_step_touches_the_named_task_alone_and_leaves_the_gradients_of_others(model: Any) -> None:
    before = {name: model.state_dict(name) for name in model.tasks}
    model.forward_backward({"alice": DATA["alice"]})
    model.forward_backward({"bob": DATA["bob"]})
    gradients = {name: model.gradients(name) for name in model.tasks}
    model.optim_step("alice")
    assert all(not torch.equal(model.state_dict("alice")[key], weight) for key, weight in before["alice"].items())
    assert not any(gradient.any() for gradient in model.gradients("alice").values())
    for name in ("bob", "carol", "dan"):
        assert equal(model.state_dict(name), before[name])
        assert equal(model.gradients(name), gradients[name])
    assert all(gradient.any() for gradient in gradients["bob"].values())
    assert model.steps == {"alice": 1, "bob": 0, "carol": 0, "dan": 0}
    assert model.examples_seen == {"alice": len(DATA["alice"]), "bob": 0, "carol": 0, "dan": 0}
    model.optim_step(["bob"])
    assert all(not torch.equal(model.state_dict("bob")[key], weight) for key, weight in before["bob"].items())
    for name in ("carol", "dan"):
        assert equal(model.state_dict(name), before[name])


def test_a_step_of_the_neighbour_between_forward_and_step_changes_no_bit(model: Any, started: tuple[Any, Path]) -> None:
    model.forward_backward({"alice": DATA["alice"]})
    model.optim_step("alice")
    expected = model.state_dict("alice")
    model.load_checkpoint(started[1])
    model.forward_backward({"alice": DATA["alice"], "dan": DATA["dan"]})
    model.optim_step("dan")
    model.step({"bob": DATA["bob"], "dan": DATA["dan"]})
    model.optim_step("alice")
    assert equal(model.state_dict("alice"), expected)


def test_two_forward_backward_calls_add_the_gradients_of_two_means(model: Any) -> None:
    halves = [{"alice": DATA["alice"][:1], "bob": DATA["bob"][:2]}, {"alice": DATA["alice"][1:], "bob": DATA["bob"][2:]}]
    parts: list[dict[str, Tensors]] = []
    for half in halves:
        model.forward_backward(half)
        parts.append({name: model.gradients(name) for name in half})
        for name in half:
            model.state.clear_gradients(name)
    for half in halves:
        model.forward_backward(half)
    for name in halves[0]:
        added = {key: parts[0][name][key] + parts[1][name][key] for key in parts[0][name]}
        # Block after block into one sum, against the sum of two sums: rounding, by the rule for gradients.
        assert not wrong_gradients(model.gradients(name), added)
        assert wrong_gradients(model.gradients(name), {key: value / 2 for key, value in added.items()})
    norms = model.optim_step(["alice", "bob"])
    for name in halves[0]:
        added = torch.cat([(parts[0][name][key] + parts[1][name][key]).flatten() for key in parts[0][name]])
        assert float(norms[name]) == pytest.approx(float(added.norm()), rel=1e-5)  # fp32 sums in two orders
    assert model.steps["alice"] == 1
    assert model.examples_seen["bob"] == len(DATA["bob"])
