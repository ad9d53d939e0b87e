"""A YAML file as a tree in which every value knows where it stands, so that every complaint can name file and line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_MERGE = "tag:yaml.org,2002:merge"


@dataclass(slots=True)
class Entry:
    """One value: a mapping of entries, a list of entries or a plain scalar.

    Args:
        value: what it holds.
        where: "file:line", or "override key=value".
        key: dotted path from the root ("tasks.alice.train"); "" for the root.
    """

    value: Any
    where: str
    key: str

    def error(self, why: str) -> ValueError:
        """The complaint about this value, ready to raise: `where: key why`."""
        return ValueError(f"{self.where}: {self.key + ' ' if self.key else ''}{why}")

    def mapping(self, known: Iterable[str] | None = None) -> dict[str, Entry]:
        """The entries of a mapping; with `known`, no other key is allowed.

        Raises:
            ValueError: not a mapping, or a key that is not known (naming the closest one that is).
        """
        if not isinstance(self.value, dict):
            raise self.error(f"must be a mapping, not {kind_of(self.value)}")
        if known is not None:
            choices = list(known)
            for name, entry in self.value.items():
                if name not in choices:
                    raise ValueError(f"{entry.where}: unknown key {name!r} in {self.key or 'the file'}{closest(name, choices)}")
        return self.value

    def plain(self) -> Any:
        """The value without its places: dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {name: entry.plain() for name, entry in self.value.items()}
        if isinstance(self.value, list):
            return [entry.plain() for entry in self.value]
        return self.value

    def text(self) -> str:
        """The value as a non-empty string."""
        if not isinstance(self.value, str) or not self.value.strip():
            raise self.error(f"must be a non-empty string, not {shown(self.value)}")
        return self.value

    def integer(self, low: int) -> int:
        """The value as an integer of at least `low`."""
        if isinstance(self.value, bool) or not isinstance(self.value, int) or self.value < low:
            raise self.error(f"must be an integer of at least {low}, not {shown(self.value)}")
        return self.value

    def number(self) -> float:
        """The value as a finite number."""
        if isinstance(self.value, bool) or not isinstance(self.value, int | float) or not abs(self.value) < float("inf"):
            raise self.error(f"must be a finite number, not {shown(self.value)}")
        return float(self.value)


def kind_of(value: Any) -> str:
    """A value's kind in the words of YAML and JSON."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "a mapping"}
    return names.get(type(value), type(value).__name__)


def shown(value: Any) -> str:
    """A scalar as itself, anything longer as its kind."""
    return repr(value) if isinstance(value, bool | int | float | str) and len(repr(value)) <= 60 else kind_of(value)


def closest(name: str, choices: Iterable[str]) -> str:
    """A tail for "unknown ..." complaints: the most similar choice, else all of them when they are few."""
    names = sorted(choices)
    match = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if match:
        return f"; did you mean {match[0]!r}?"
    return f"; known: {', '.join(names)}" if len(names) <= 24 else ""


# SafeLoader's own rules for plain scalars, except that `1e-4` is a number (YAML 1.2's rule) and a date stays text.
_FLOAT = re.compile(
    r"^(?:[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_REPLACED = ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:float")
_RESOLVERS = {
    first: [row for row in rows if row[0] not in _REPLACED]
    + ([("tag:yaml.org,2002:float", _FLOAT)] if first and first in "-+0123456789." else [])
    for first, rows in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(path: Path) -> Entry:
    """The file as a tree.

    Raises:
        ValueError: beginning with `file:line:` for malformed YAML, a repeated key, or a file that cannot be read or is empty.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: is not UTF-8 text") from None
    root = _parse(text, str(path))
    if root is None:
        raise ValueError(f"{path}:1: holds no YAML")
    return root


def _parse(text: str, name: str, *, where: str | None = None, key: str = "") -> Entry | None:
    loader = yaml.SafeLoader(text)
    loader.yaml_implicit_resolvers = _RESOLVERS
    try:
        node = loader.get_single_node()
        return None if node is None else _entry(loader, node, key, name, where, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        begun = (
            f"{error.context} from line {error.context_mark.line + 1}" if error.context and error.context_mark else error.context
        )
        why = ": ".join(part for part in (begun, error.problem) if part)
        raise ValueError(f"{where or f'{name}:{mark.line + 1 if mark else 1}'}: malformed YAML: {why}") from None
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1 if isinstance(error.position, int) else 1
        raise ValueError(f"{where or f'{name}:{line}'}: malformed YAML: {error.reason}") from None
    finally:
        loader.dispose()


def _entry(loader: yaml.SafeLoader, node: yaml.Node, key: str, name: str, where: str | None, above: tuple[yaml.Node, ...]) -> Entry:
    at = where or f"{name}:{node.start_mark.line + 1}"
    if node in above:
        raise ValueError(f"{at}: malformed YAML: an alias refers to a value that contains it")
    above = (*above, node)
    if isinstance(node, yaml.MappingNode):
        return Entry(_mapping(loader, node, key, name, where, above), at, key)
    if isinstance(node, yaml.SequenceNode):
        items = [_entry(loader, item, f"{key}[{index}]", name, where, above) for index, item in enumerate(node.value)]
        return Entry(items, at, key)
    try:
        return Entry(loader.construct_object(node), at, key)
    except ValueError as error:
        raise ValueError(f"{at}: malformed YAML: {error}") from None


def _mapping(
    loader: yaml.SafeLoader, node: yaml.MappingNode, key: str, name: str, where: str | None, above: tuple[yaml.Node, ...]
) -> dict[str, Entry]:
    own: dict[str, Entry] = {}
    merged: dict[str, Entry] = {}
    for key_node, value_node in node.value:
        line = where or f"{name}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise ValueError(f"{line}: malformed YAML: a key must be plain text")
        if key_node.tag == _MERGE:
            sources = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
            for source in sources:
                if not isinstance(source, yaml.MappingNode):
                    raise ValueError(f"{line}: malformed YAML: '<<' takes a mapping or a list of mappings")
                for inner, entry in _mapping(loader, source, key, name, where, above).items():
                    merged.setdefault(inner, entry)
            continue
        # The key's own text, whatever YAML would make of it: a task may be called `no` or `1`.
        title = str(key_node.value)
        if title in own:
            raise ValueError(f"{line}: key {title!r} is repeated in {key or 'the file'} (first at {own[title].where})")
        own[title] = _entry(loader, value_node, f"{key}.{title}" if key else title, name, where, above)
        # A block value starts on the next line; a complaint about the key should point at the key.
        own[title].where = line
    return {**merged, **own}


def override(root: Entry, assignment: str) -> None:
    """Apply one `dotted.key=value` (the value in YAML) to the tree, in place. Existing keys that contain dots are found too.

    Raises:
        ValueError: no '=', an empty key, a value that is not YAML, or a path through something that is no mapping.
    """
    where = f"override {assignment}"
    path, equals, text = assignment.partition("=")
    if not equals or not path or any(not part for part in path.split(".")):
        raise ValueError(f"{where}: must look like tasks.NAME.train.learning_rate=1e-3")
    at, rest = root, path
    while True:
        if not isinstance(at.value, dict):
            raise ValueError(f"{where}: {at.key} is not a mapping")
        inside = [name for name in at.value if rest == name or rest.startswith(name + ".")]
        name = max(inside, key=len) if inside else rest.partition(".")[0]
        rest = rest[len(name) + 1 :]
        key = f"{at.key}.{name}" if at.key else name
        if not rest:
            at.value[name] = _parse(text, "override", where=where, key=key) or Entry(None, where, key)
            return
        if name not in at.value or at.value[name].value is None:
            if at.key == "tasks":
                raise ValueError(f"{where}: there is no task {name!r}{closest(name, at.value)}")
            at.value[name] = Entry({}, where, key)
        at = at.value[name]
