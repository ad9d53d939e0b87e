"""jobs.yaml: one backbone and the tenants to train on it, checked key by key before anything is loaded."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from muxcompile.base import DTYPES, BaseSpec
from muxcompile.data import TOO_LONG
from muxcompile.options import Options
from muxcompile.yamlfile import Entry, closest, override, read_yaml, shown
from passes.task import Task, check_name

DEFAULT_EPOCHS = 3.0  # transformers' own default

# Names of SFTConfig and TrainingArguments, and the Task field that each one means.
ALIASES = {
    "per_device_train_batch_size": "batch_size",
    "lr_scheduler_type": "lr_schedule",
    "optim": "optimizer",
    "adam_beta1": "betas",
    "adam_beta2": "betas",
    "adam_epsilon": "eps",
}
OPTIMS = {"adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw": "adamw", "sgd": "sgd"}
SCHEDULES = {"constant": "constant", "constant_with_warmup": "constant", "linear": "linear", "cosine": "cosine"}
_LOOP = (
    "max_steps",
    "num_train_epochs",
    "gradient_accumulation_steps",
    "logging_steps",
    "eval_steps",
    "save_steps",
    "save_total_limit",
    "too_long",
)
_DEFAULTS: dict[str, Any] = {one.name: one.default for one in dataclasses.fields(Task)}
TRAIN_KEYS = (*Task.field_names(), *ALIASES, *_LOOP)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """How long and how often: the part of `train:` that is not the optimizer's.

    Args:
        max_steps: optimizer steps; None: as many as `num_train_epochs` need.
        num_train_epochs: passes over the data.
        gradient_accumulation_steps: batches of `batch_size` that make one optimizer step, by the mean over all their labelled
            tokens; they go to the compiled model in one call, which cuts them into chunks of its own.
        logging_steps: steps between two rows of metrics.jsonl.
        eval_steps: steps between two evaluations; None: before the first step and after the last only.
        save_steps: steps between two checkpoints of the whole run; None: none on this task's account.
        save_total_limit: checkpoints to keep, the newest; older ones are deleted once a new one is whole. None: all. Of several
            tasks with save_steps the one that keeps most is heard.
        too_long: "error", or "drop" to leave out examples over max_length and say how many.
    """

    max_steps: int | None = None
    num_train_epochs: float = DEFAULT_EPOCHS
    gradient_accumulation_steps: int = 1
    logging_steps: int = 1
    eval_steps: int | None = None
    save_steps: int | None = None
    save_total_limit: int | None = None
    too_long: str = "error"


@dataclass(frozen=True, slots=True)
class Job:
    """One tenant of a jobs file: its Task's fields, its files and its loop; `places`: where fields of `train` and `peft` stand."""

    name: str
    adapter: Any
    settings: dict[str, Any]
    loop: Loop
    data: Path
    eval_data: Path | None
    eval_fraction: float | None
    where: str
    places: dict[str, str] = field(default_factory=dict)

    def task(self, total_steps: int | None = None) -> Task:
        """The Task; `total_steps` is what a falling learning rate is measured by, unless the file sets it."""
        settings = dict(self.settings)
        if settings.get("lr_schedule", "constant") != "constant":
            settings.setdefault("total_steps", total_steps)
        return Task(self.name, self.adapter, **settings)

    @property
    def step_examples(self) -> int:
        """Examples in one optimizer step."""
        return int(self.settings.get("batch_size", _DEFAULTS["batch_size"])) * self.loop.gradient_accumulation_steps


@dataclass(frozen=True, slots=True)
class Jobs:
    """A jobs file, read and checked; the data files are not read yet. `places`: where the options stand."""

    path: Path
    base: BaseSpec
    output_dir: Path
    options: Options
    seed: int
    jobs: dict[str, Job] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)


def load_jobs(path: Path | str, *, overrides: Iterable[str] = (), output_dir: Path | None = None) -> Jobs:
    """Read a jobs file. Relative paths inside it are relative to it; `output_dir`, if given, wins over the file's.

    Args:
        path: the YAML file.
        overrides: "tasks.alice.train.learning_rate=1e-3" and the like, applied in order before anything is checked.

    Raises:
        ValueError: beginning with `file:line:` and naming the key.
    """
    path = Path(path)
    root = read_yaml(path)
    for assignment in overrides:
        override(root, assignment)
    top = root.mapping(("base", "output_dir", "options", "seed", "tasks"))
    for needed in ("base", "tasks"):
        if needed not in top:
            raise root.error(f"{needed} is missing")
    seed = top["seed"].integer(0) if "seed" in top else 0
    folder = path.parent
    if output_dir is None:
        output_dir = folder / (top["output_dir"].text() if "output_dir" in top else "outputs")
    tasks = top["tasks"].mapping()
    if not tasks:
        raise top["tasks"].error("is empty: give at least one task")
    _check_names(tasks)
    base = _base(top["base"], folder)
    options = _options(top["options"], list(tasks)) if "options" in top else Options()
    jobs = {name: _job(name, entry, folder, seed) for name, entry in tasks.items()}
    return Jobs(path, base, output_dir, options, seed, jobs, _places(top["options"]) if "options" in top else {})


@contextmanager
def placing(jobs: Jobs) -> Iterator[None]:
    """What the compiler refuses begins with file and line of what it names: a field of a task or of the options, or the base."""
    try:
        yield
    except ValueError as error:
        where = _place(jobs, str(error))
        if where is None:
            raise
        raise ValueError(f"{where}: {error}") from error


def _place(jobs: Jobs, message: str) -> str | None:
    """None: the message names nothing of a jobs file, or says where that is already."""
    if found := re.match(r"Options: (\w+)", message):
        return jobs.places.get(found[1], jobs.places.get("", str(jobs.path)))
    if message.startswith("memory: "):
        return jobs.places.get("memory_cap", str(jobs.path))
    if message.startswith("backbone"):
        return jobs.base.where
    for job in jobs.jobs.values():
        about = f"task {job.name!r}: "
        if message.startswith(about):
            rest = message.removeprefix(about)
            # Every task needs less than the cap, if there is one; else it is the task that is too large.
            if re.match(r"(needs|memory:) .*\bbytes\b", rest):
                return jobs.places.get("memory_cap", job.where)
            return _named(job.places, rest) or job.places.get("peft", job.where)
    return None


def _named(places: Mapping[str, str], message: str) -> str | None:
    """Where the first field stands that a complaint names: by its first word, or in front of a value."""
    words = [*re.findall(r"^\w+", message), *re.findall(r"\b(\w+)=", message)]
    return next((places[word] for word in words if word in places), None)


def _places(entry: Entry) -> dict[str, str]:
    """Where the fields of a section stand, by the names that complaints have for them; "": the section."""
    found = {"": entry.where}
    fields: dict[str, Entry] = entry.value if isinstance(entry.value, dict) else {}
    for name, own in fields.items():
        found.setdefault(ALIASES.get(name, name), own.where)
    return found


def _check_names(tasks: dict[str, Entry]) -> None:
    seen: dict[str, Entry] = {}
    for name, entry in tasks.items():
        try:
            check_name(name)
        except ValueError as error:
            raise ValueError(f"{entry.where}: {error}") from None
        twin = seen.setdefault(name.casefold(), entry)
        if twin is not entry:
            raise ValueError(f"{entry.where}: task {name!r} is named twice (first at {twin.where}; case does not tell names apart)")


def _base(entry: Entry, folder: Path) -> BaseSpec:
    if isinstance(entry.value, str):
        return BaseSpec(_model_path(entry, folder), where=entry.where)
    fields = entry.mapping(("path", "gguf_file", "dtype", "device"))
    if "path" not in fields:
        raise entry.error("needs a path")
    texts = {name: value.text() for name, value in fields.items() if value.value is not None}
    if texts.get("dtype", "auto") not in ("auto", *DTYPES):
        raise fields["dtype"].error(f"must be auto or one of {', '.join(DTYPES)}, not {texts['dtype']!r}")
    return BaseSpec(**{**texts, "path": _model_path(fields["path"], folder)}, where=entry.where)


def _model_path(entry: Entry, folder: Path) -> str:
    """A folder beside the jobs file; a name of the form owner/model that is no folder is left for the local cache."""
    given = entry.text()
    return given if not (folder / given).exists() and given.count("/") == 1 and given[0] not in "./~" else str(folder / given)


def _options(entry: Entry, tasks: list[str]) -> Options:
    given = entry.mapping(one.name for one in dataclasses.fields(Options))
    values = {name: _tuples(value.plain()) for name, value in given.items()}
    cap = values.get("memory_cap")
    if isinstance(cap, float) and cap.is_integer():
        values["memory_cap"] = int(cap)  # 80e9 is a float to YAML
    try:
        options = Options(**values)
        options.check_names(tasks)
    except (ValueError, TypeError) as error:
        named = re.match(r"Options: (\w+)", str(error))
        places = _places(entry)
        raise ValueError(f"{places.get(named[1] if named else '', entry.where)}: {error}") from None
    return options


def _tuples(value: Any) -> Any:
    """Lists, and those in them, as the tuples that Options hold."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _job(name: str, entry: Entry, folder: Path, seed: int) -> Job:
    fields = entry.mapping(("peft", "data", "eval_data", "eval_fraction", "train"))
    for needed in ("peft", "data"):
        if needed not in fields:
            raise entry.error(f"{needed} is missing")
    if "eval_data" in fields and "eval_fraction" in fields:
        raise fields["eval_fraction"].error("and eval_data are both given; keep one")
    fraction = None
    if "eval_fraction" in fields:
        fraction = fields["eval_fraction"].number()
        if not 0 < fraction < 1:
            raise fields["eval_fraction"].error(f"must be above 0 and below 1, not {fraction:g}")
    data = _file(fields["data"], folder)
    held_out = _file(fields["eval_data"], folder) if "eval_data" in fields else None
    train = (
        fields["train"] if "train" in fields and fields["train"].value is not None else Entry({}, entry.where, f"{entry.key}.train")
    )
    settings, loop = _train(train, seed)
    places = _places(train) | _places(fields["peft"]) | {"peft": fields["peft"].where}
    job = Job(name, adapter_of(fields["peft"], folder), settings, loop, data, held_out, fraction, entry.where, places)
    warmup = settings.get("warmup_steps", 0)
    try:
        job.task(max(warmup if isinstance(warmup, int) else 0, loop.max_steps or 1))
    except (ValueError, TypeError) as error:
        complaint = str(error).removeprefix(f"task {name!r}: ")
        raise ValueError(f"{_named(_places(train), complaint) or train.where}: {error}") from None
    return job


def _file(entry: Entry, folder: Path) -> Path:
    path = folder / entry.text()
    if not path.is_file():
        raise entry.error(f"{str(path)!r} is not a file")
    return path


def _train(entry: Entry, seed: int) -> tuple[dict[str, Any], Loop]:
    """`train:` as (fields of Task, Loop)."""
    given = entry.mapping(TRAIN_KEYS)
    settings: dict[str, Any] = {"seed": seed}
    loop: dict[str, Any] = {}
    came_from: dict[str, str] = {}
    betas = list(_DEFAULTS["betas"])
    for name, value in given.items():
        if value.value is None:
            continue
        target = ALIASES.get(name, name)
        if target in came_from and {name, came_from[target]} != {"adam_beta1", "adam_beta2"}:
            raise value.error(f"and {came_from[target]} mean the same; keep one")
        came_from[target] = name
        if name in _LOOP:
            loop[name] = _loop_value(name, value)
        elif name in ("adam_beta1", "adam_beta2"):
            betas[int(name[-1]) - 1] = value.number()
            settings["betas"] = tuple(betas)
        elif target == "betas":
            if not isinstance(value.value, list) or len(value.value) != 2:
                raise value.error(f"must be a list of two numbers, not {shown(value.plain())}")
            settings["betas"] = tuple(value.plain())
        elif target in ("optimizer", "lr_schedule"):
            choices = OPTIMS if target == "optimizer" else SCHEDULES
            if not isinstance(value.value, str) or value.value not in choices:
                raise value.error(f"must be one of {', '.join(choices)}, not {shown(value.value)}")
            settings[target] = choices[value.value]
        else:
            settings[target] = value.plain()
    return settings, Loop(**loop)


def _loop_value(name: str, entry: Entry) -> Any:
    if name == "too_long":
        if entry.value not in TOO_LONG:
            raise entry.error(f"must be one of {', '.join(TOO_LONG)}, not {shown(entry.value)}")
        return entry.value
    if name == "num_train_epochs":
        if entry.number() <= 0:
            raise entry.error(f"must be above 0, not {shown(entry.value)}")
        return entry.number()
    if name == "max_steps" and entry.value == -1:
        return None  # transformers' spelling of "by epochs"
    return entry.integer(1)


def adapter_of(entry: Entry, folder: Path) -> Any:
    """`peft:` as a PEFT config object, or the folder of a saved adapter.

    Raises:
        ValueError: an unknown peft_type or field, a value that PEFT refuses, or a folder that holds no adapter.
    """
    if isinstance(entry.value, str):
        path = folder / entry.text()
        if not (path / "adapter_config.json").is_file():
            raise entry.error(f"{str(path)!r} holds no saved adapter (no adapter_config.json)")
        return str(path)
    given = entry.mapping()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import TaskType
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        from passes.adapters import KINDS

        own = {name: kind.config for name, kind in KINDS.items() if kind.config is not None}
        kinds: dict[str, Any] = {str(kind.value): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()} | own
        name = given["peft_type"].text().upper() if "peft_type" in given else "LORA"
        if name not in kinds:
            raise given["peft_type"].error(f"{name!r} is no peft_type that is known{closest(name, kinds)}")
        config = kinds[name]
        known = {one.name for one in dataclasses.fields(config) if one.init}
        values = {key: value.plain() for key, value in entry.mapping(known | {"peft_type"}).items() if key != "peft_type"}
        try:
            return config(**{"task_type": TaskType.CAUSAL_LM, **values})
        except Exception as error:  # every config checks itself in its own way
            raise entry.error(f"is refused by PEFT: {error}") from None
