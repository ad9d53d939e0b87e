"""Artifacts: a compiled model as a folder of text that runs without the compiler.

manifest.json     versions, device, tables, params, encodings, tasks; for each group its geometry, templates, regions, head
group<n>/         of each group: train.txt and evaluate.txt, the programs of one micro-batch; regions/*.py, the source of every
                  callable
kernels/*.py      the source of every kernel that operators launch
constants.safetensors      tensors of the backbone that are not among its parameters and buffers
state/            a checkpoint of every task
plan.txt          for readers
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import codegen.ops  # noqa: F401  (the regions call its operators)
from codegen.kernels.build import digest, give
from muxcompile.entry import TaskEntry, identity
from muxcompile.model import CompiledModel
from runtime.carry import Carried
from runtime.checkpoint import read_checkpoint, write_checkpoint
from runtime.executor import Compiled
from runtime.folder import Form, replace_folder
from runtime.pack import Geometry
from runtime.program import Program
from runtime.region import WRAPPED, HeadSpec, RegionSpec, TemplateSpec
from runtime.state import State, Training
from runtime.tables import Encoding, Param, Table

FORMAT = 4
FORM = Form(
    "manifest.json",
    (
        "manifest.json", "plan.txt", "constants.safetensors", "kernels/*.py", "group*/train.txt", "group*/evaluate.txt",
        "group*/regions/*.py", "state/checkpoint.json", "state/*/state.safetensors",
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class LoadedPlan:
    """The plan of a loaded artifact: its text, as the compiler wrote it."""

    written: str

    def text(self) -> str:
        return self.written

    def print(self) -> None:
        print(self.written, end="")


@dataclass(frozen=True, slots=True)
class LoadedBuild:
    """What `driver.Build` is, read back from a folder."""

    groups: tuple[Compiled, ...]
    tables: dict[str, Table]
    params: tuple[Param, ...]
    encodings: tuple[Encoding, ...]
    weights: dict[str, Tensor]
    constants: tuple[str, ...]
    plan: LoadedPlan
    vocabulary: int
    positions: int | None


def save(build: Any, state: State, entries: Mapping[str, TaskEntry], directory: Path) -> None:
    """Write everything a fresh process needs besides the backbone.

    Raises:
        ValueError: the folder holds what is no part of an artifact; nothing was changed then.
    """
    weights = {name: _description(tensor) for name, tensor in build.weights.items()}
    kernels = {key: source for own in build.groups for key, source in own.kernels.items()}
    manifest = {
        "format": FORMAT,
        "torch": torch.__version__,
        "device": state.device.type,
        "groups": [_group(own) for own in build.groups],
        "kernels": {key: f"{digest(source)}.py" for key, source in kernels.items()},
        "tables": [asdict(table) for table in state.tables.values()],
        "params": [asdict(param) for param in state.params.values()],
        "encodings": [asdict(encoding) for encoding in state.encoded.encodings.values()],
        "weights": weights,
        "vocabulary": build.vocabulary,
        "positions": build.positions,
        "tasks": {name: {"training": asdict(task.training), **asdict(entries[name])} for name, task in state.tasks.items()},
    }
    with replace_folder(directory, FORM) as folder:
        for number, own in enumerate(build.groups):
            place = folder / f"group{number}"
            (place / "regions").mkdir(parents=True)
            for name, source in own.sources.items():
                (place / "regions" / f"{name}.py").write_text(source)
            (place / "train.txt").write_text(str(own.train))
            (place / "evaluate.txt").write_text(str(own.evaluate))
        (folder / "kernels").mkdir()
        for source in kernels.values():
            (folder / "kernels" / f"{digest(source)}.py").write_text(source)
        (folder / "plan.txt").write_text(build.plan.text())
        save_file(
            {name: build.weights[name].detach().cpu().contiguous() for name in build.constants}, folder / "constants.safetensors"
        )
        chunks = {name: own.geometry.tokens for own in build.groups for name in own.tasks if name in state.tasks}
        write_checkpoint(folder / "state", state, chunks, identity(build, entries, None))
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def _group(compiled: Compiled) -> dict[str, Any]:
    """The part of a group that is plain data; its texts are files."""
    return {
        "tasks": list(compiled.tasks),
        "geometry": asdict(compiled.geometry),
        "templates": [asdict(template) for template in compiled.templates.values()],
        "regions": [asdict(region) for region in compiled.regions.values()],
        "head": asdict(compiled.head),
        "sources": sorted(compiled.sources),
        "carried": [asdict(own) for own in compiled.carried],
        "kept": compiled.kept,
        "recorded": compiled.recorded,
    }


def _read_group(row: Mapping[str, Any], folder: Path, kernels: Mapping[str, str]) -> Compiled:
    return Compiled(
        tasks=tuple(row["tasks"]),
        geometry=Geometry(**row["geometry"]),
        templates={own["name"]: TemplateSpec(**_tuples(own)) for own in row["templates"]},
        regions={own["name"]: RegionSpec(**_tuples(own)) for own in row["regions"]},
        head=HeadSpec(**_tuples(row["head"])),
        train=_program(folder / "train.txt"),
        evaluate=_program(folder / "evaluate.txt"),
        sources=_sources(folder / "regions", row.get("sources")),
        kernels=dict(kernels),
        carried=tuple(Carried(**_tuples(own)) for own in row["carried"]),
        kept=row.get("kept", 0),
        recorded=row.get("recorded", False),
    )


def _program(path: Path) -> Program:
    try:
        return Program.parse(_text(path))
    except ValueError as error:
        raise error if str(error).startswith(str(path)) else ValueError(f"{path}: {error}") from None


def _sources(folder: Path, names: list[str] | None) -> dict[str, str]:
    """The callables' texts by name; artifacts written before they were listed have those that are there."""
    found = {name: _text(folder / f"{name}.py") for name in names or sorted(path.stem for path in folder.glob("*.py"))}
    for name, text in found.items():
        path = folder / f"{name}.py"
        try:
            named = compile(text, str(path), "exec").co_names
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"{path}: is damaged: {error}") from None
        if "call" not in named:
            raise ValueError(f"{path}: is damaged: it defines no call")
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path}: is missing") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None


def _constants(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"{path}: is missing")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What does not fit together in here is the file's fault."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path}: is damaged: {type(error).__name__}: {error}") from error


def _description(tensor: Tensor) -> list[Any]:
    return [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]


def load_artifact(directory: str | Path, backbone: nn.Module) -> CompiledModel:
    """Run a saved artifact over its backbone; neither capture nor passes are imported.

    Args:
        directory: what `CompiledModel.save_artifact` wrote.
        backbone: a model with the same weights by name, on a device of the same type.

    Raises:
        ValueError: naming the file and what is damaged or missing, or what differs (format, torch version, device, a weight's name,
            shape, dtype or values).
    """
    folder = Path(directory)
    manifest = _manifest(folder)
    with _reading(folder / "manifest.json"):
        build, entries, state = _read(folder, manifest, backbone)
    read_checkpoint(folder / "state", state, identity(build, entries, None)).apply()
    return CompiledModel(build, state, entries, None)


def _read(folder: Path, manifest: Mapping[str, Any], backbone: nn.Module) -> tuple[LoadedBuild, dict[str, TaskEntry], State]:
    device = next(backbone.parameters()).device
    for what, expected, found in (
        ("format", FORMAT, manifest["format"]),
        ("torch version", torch.__version__, manifest["torch"]),
        ("device type", device.type, manifest["device"]),
    ):
        if expected != found:
            raise ValueError(f"{folder}: the artifact's {what} is {found!r}, here it is {expected!r}: compile again")
    constants = _constants(folder / "constants.safetensors")
    weights = _bind(folder, manifest["weights"], backbone, constants)
    tables = {row["name"]: Table(**_tuples(row)) for row in manifest["tables"]}
    params = tuple(Param(**row) for row in manifest["params"])
    # Artifacts written before there were encodings have none.
    encodings = tuple(Encoding.of(row) for row in manifest.get("encodings", ()))
    kernels = {key: _text(folder / "kernels" / name) for key, name in manifest["kernels"].items()}
    groups = tuple(_read_group(row, folder / f"group{number}", kernels) for number, row in enumerate(manifest["groups"]))
    plan, sizes = LoadedPlan(_text(folder / "plan.txt")), (manifest["vocabulary"], manifest["positions"])
    build = LoadedBuild(groups, tables, params, encodings, weights, tuple(constants), plan, *sizes)
    rows = manifest["tasks"]
    trainings = {name: Training(**_tuples(row["training"])) for name, row in rows.items()}
    entries = {name: TaskEntry(row["max_length"], row["config"], row.get("layout", "peft")) for name, row in rows.items()}
    state = State(tables, params, trainings, device, encodings, weights)
    give(kernels)
    return build, entries, state


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    if not path.is_file():
        raise ValueError(f"{folder}: holds no manifest.json; is it a saved artifact?")
    try:
        manifest = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: {error.msg}") from None
    if not isinstance(manifest, dict):
        raise ValueError(f"{path}: is damaged: it holds no object but a {type(manifest).__name__}")
    return manifest


def _bind(
    folder: Path, expected: Mapping[str, list[Any]], backbone: nn.Module, constants: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The backbone's tensors by the names the regions use; constants come from the artifact."""
    device = next(backbone.parameters()).device
    known = {
        ".".join(part for part in name.split(".") if part not in WRAPPED): tensor
        for name, tensor in [*backbone.named_parameters(remove_duplicate=False), *backbone.named_buffers(remove_duplicate=False)]
    }
    weights = {}
    for name, description in expected.items():
        tensor = constants[name].to(device) if name in constants else known.get(name)
        if tensor is None:
            raise ValueError(f"{folder}: the backbone has no weight {name!r}")
        if tensor.is_meta:
            raise ValueError(f"{folder}: the backbone's weight {name!r} is on the meta device")
        if _description(tensor) != description:
            raise ValueError(
                f"{folder}: the backbone's weight {name!r} is {_description(tensor)}, the artifact needs {description}"
            )
        weights[name] = tensor
    return weights


def _tuples(row: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has lists where our dataclasses have tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
