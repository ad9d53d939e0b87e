"""JSONL files as examples: `{"input_ids": [...], "labels": [...]}`, labels aligned with input_ids, -100 where no loss is.

Four shapes, told apart by their keys: `messages`, `prompt` + `completion`, `text`, `input_ids` + `labels`. A file is read in three
steps, cheapest first, so that a typo in line 3 is found before a backbone is loaded: `read_rows` (JSON and shape),
`encode_rows` (the tokenizer), `fit` (the model's vocabulary and lengths).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muxcompile.chat import ChatRefused, chat_spans
from muxcompile.yamlfile import closest, kind_of, shown

NO_LOSS = -100
TOO_LONG = ("error", "drop")
SHAPES = {
    "messages": ("messages",),
    "prompt and completion": ("prompt", "completion"),
    "text": ("text",),
    "input_ids and labels": ("input_ids", "labels"),
}
_SURROGATE = re.compile("[\ud800-\udfff]")
_SHAPE_KEYS = tuple(key for keys in SHAPES.values() for key in keys)

Example = dict[str, list[int]]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a file, its shape checked, not yet tokenised. `where` is "file:line"."""

    where: str
    shape: str
    fields: dict[str, Any]

    def error(self, why: str) -> ValueError:
        return ValueError(f"{self.where}: {why}")


@dataclass(frozen=True, slots=True)
class Dataset:
    """A file's examples, and where each came from.

    Args:
        path: the file.
        examples: what `CompiledModel.step` takes.
        places: "file:line" of each example.
        dropped: examples left out because they were too long and the task asked for `too_long: drop`.
    """

    path: Path
    examples: list[Example]
    places: list[str]
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.examples)

    def only(self, indices: list[int]) -> Dataset:
        """The examples of these indices."""
        return Dataset(self.path, [self.examples[i] for i in indices], [self.places[i] for i in indices])


def load_examples(
    path: Path,
    tokenizer: Any,
    *,
    vocab_size: int,
    max_length: int | None = None,
    model_limit: int | None = None,
    too_long: str = "error",
) -> Dataset:
    """The three steps in one call.

    Args:
        path: a JSONL file, UTF-8; blank lines are skipped.
        tokenizer: a Hugging Face tokenizer, or None if the file holds `input_ids` and `labels` only.
        vocab_size: ids must be below it.
        max_length: the task's longest example, in tokens.
        model_limit: the backbone's longest sequence.
        too_long: "error", or "drop" to leave longer examples out and count them.

    Raises:
        ValueError: beginning with `file:line:` and naming the field.
    """
    dataset = encode_rows(path, read_rows(path), tokenizer)
    return fit(dataset, vocab_size=vocab_size, max_length=max_length, model_limit=model_limit, too_long=too_long)


def read_rows(path: Path) -> list[Row]:
    """Parse the file and check every line's shape and types, without a tokenizer.

    Raises:
        ValueError: unreadable or empty file, malformed JSON, an unknown or mixed shape, a field of a wrong type.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from None
    rows = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        where = f"{path}:{number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError:
            raise ValueError(f"{where}: is not UTF-8 text") from None
        if text:
            rows.append(_row(text, where))
    if not rows:
        raise ValueError(f"{path}:1: holds no examples")
    return rows


def _row(text: str, where: str) -> Row:
    try:
        fields = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: malformed JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: malformed JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: a line must be a JSON object, not {kind_of(fields).replace('mapping', 'object')}")
    present = [shape for shape, keys in SHAPES.items() if any(key in fields for key in keys)]
    if not present:
        near = next((hint for hint in (closest(key, _SHAPE_KEYS) for key in fields) if "did you mean" in hint), "")
        raise ValueError(f"{where}: unknown shape: an example needs {', '.join(list(SHAPES)[:-1])} or {list(SHAPES)[-1]}{near}")
    if len(present) > 1:
        raise ValueError(f"{where}: mixed shapes: has keys of {' and of '.join(present)}; keep one")
    row = Row(where, present[0], fields)
    for key in SHAPES[row.shape]:
        if key not in fields:
            raise row.error(f"{key} is missing beside {' and '.join(k for k in SHAPES[row.shape] if k in fields)}")
    _CHECKS[row.shape](row)
    # JSON's escapes can spell half a character; UTF-8 cannot, so only a line with such an escape is looked at again.
    for key in (*SHAPES[row.shape], "tools") if "\\ud" in text.casefold() else ():
        if half := _SURROGATE.search(json.dumps(fields.get(key), ensure_ascii=False)):
            raise row.error(f"{key} holds a lone surrogate (\\u{ord(half[0]):04x}), which is no character")
    return row


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _check_messages(row: Row, field: str = "messages", *, needs_assistant: bool = True) -> None:
    messages = row.fields[field]
    if not isinstance(messages, list) or not messages:
        raise row.error(f"{field} must be a non-empty list, not {shown(messages) if messages != [] else 'an empty one'}")
    for index, message in enumerate(messages):
        name = f"{field}[{index}]"
        if not isinstance(message, dict):
            raise row.error(f"{name} must be an object, not {shown(message)}")
        role = message.get("role")
        if not isinstance(role, str) or not role:
            raise row.error(f"{name}.role must be a non-empty string, not {shown(role)}")
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise row.error(f"{name}.content must be a string, not {shown(content)}")
        if "weight" in message:
            if role != "assistant":
                raise row.error(f"{name}.weight is allowed on assistant messages only, not on role {role!r}")
            if isinstance(message["weight"], bool) or message["weight"] not in (0, 1):
                raise row.error(f"{name}.weight must be 0 or 1, not {shown(message['weight'])}")
    if needs_assistant and not any(message["role"] == "assistant" for message in messages):
        raise row.error(f"{field} has no message of role 'assistant', so there is nothing to learn")
    if not isinstance(row.fields.get("tools", []), list | None):
        raise row.error(f"tools must be a list, not {shown(row.fields['tools'])}")


def _check_completion(row: Row) -> None:
    prompt, completion = row.fields["prompt"], row.fields["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        _check_messages(row, "prompt", needs_assistant=False)
        _check_messages(row, "completion")
        return
    for key, value in (("prompt", prompt), ("completion", completion)):
        if not isinstance(value, str):
            both = ", or both must be lists of messages" if isinstance(value, list) else ""
            raise row.error(f"{key} must be a string, not {shown(value)}{both}")


def _check_text(row: Row) -> None:
    if not isinstance(row.fields["text"], str) or not row.fields["text"]:
        raise row.error(f"text must be a non-empty string, not {shown(row.fields['text'])}")


def _check_ids(row: Row) -> None:
    ids, labels, mask = row.fields["input_ids"], row.fields["labels"], row.fields.get("attention_mask")
    for key, values in (("input_ids", ids), ("labels", labels)) + ((("attention_mask", mask),) if mask is not None else ()):
        if not isinstance(values, list) or not values:
            raise row.error(f"{key} must be a non-empty list of integers, not {shown(values) if values != [] else 'an empty one'}")
        for index, value in enumerate(values):
            if isinstance(value, bool) or not isinstance(value, int):
                raise row.error(f"{key}[{index}] must be an integer, not {shown(value)}")
        if len(values) != len(ids):
            raise row.error(f"{key} has {len(values)} entries where input_ids has {len(ids)}")
    if mask is not None and any(bit not in (0, 1) for bit in mask):
        raise row.error("attention_mask must hold 0 and 1 only")
    # Padding is cut off; what a hole, or positions that begin again, set apart would silently become one sequence.
    if mask is not None and "0" in "".join(map(str, mask)).strip("0"):
        raise row.error("attention_mask has a hole")
    if row.fields.get("position_ids") is not None:
        raise row.error("position_ids is not read: give each sequence a line of its own")


_CHECKS: dict[str, Callable[[Row], None]] = {
    "messages": _check_messages,
    "prompt and completion": _check_completion,
    "text": _check_text,
    "input_ids and labels": _check_ids,
}


def encode_rows(path: Path, rows: list[Row], tokenizer: Any) -> Dataset:
    """Tokenise rows and mark what has a loss: assistant turns, completions, or all of a text, each with its end token.

    Raises:
        ValueError: no tokenizer or end token where one is needed, or a conversation whose assistant turns cannot be told apart.
    """
    return Dataset(path, [_encode(row, tokenizer) for row in rows], [row.where for row in rows])


def _encode(row: Row, tokenizer: Any) -> Example:
    fields = row.fields
    if row.shape == "input_ids and labels":
        keep = fields.get("attention_mask") or [1] * len(fields["input_ids"])
        pairs = [(i, label) for i, label, bit in zip(fields["input_ids"], fields["labels"], keep, strict=True) if bit]
        return {"input_ids": [i for i, _ in pairs], "labels": [label for _, label in pairs]}
    if tokenizer is None:
        raise row.error(f"{row.shape} needs a tokenizer, and the base has none: give input_ids and labels")
    if row.shape == "messages":
        return _encode_chat(row, tokenizer, fields["messages"])
    if row.shape == "prompt and completion" and isinstance(fields["prompt"], list):
        context = [{**message, "weight": 0} if message["role"] == "assistant" else message for message in fields["prompt"]]
        return _encode_chat(row, tokenizer, context + fields["completion"])
    if tokenizer.eos_token_id is None:
        raise row.error(f"{row.shape} needs an end-of-sequence token, and the tokenizer has no eos_token")
    if row.shape == "text":
        ids = _closed(_tokens(tokenizer, fields["text"]), tokenizer)
        return {"input_ids": ids, "labels": list(ids)}
    prompt = _tokens(tokenizer, fields["prompt"])
    ids = _tokens(tokenizer, fields["prompt"] + fields["completion"])
    if ids[: len(prompt)] != prompt:
        # A token would straddle the border: keep the prompt as it is tokenised when the adapter is asked.
        ids = prompt + tokenizer(fields["completion"], add_special_tokens=False, verbose=False)["input_ids"]
    ids = _closed(ids, tokenizer)
    return {"input_ids": ids, "labels": [NO_LOSS] * len(prompt) + ids[len(prompt) :]}


def _tokens(tokenizer: Any, text: str) -> list[int]:
    """Ids with the tokenizer's own beginning (BOS where it has one) and without an end."""
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    if ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token or "\0"):
        ids.pop()
    return ids


def _closed(ids: list[int], tokenizer: Any) -> list[int]:
    return ids if ids and ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]


def _encode_chat(row: Row, tokenizer: Any, messages: list[dict[str, Any]]) -> Example:
    learn = [message["role"] == "assistant" and bool(message.get("weight", 1)) for message in messages]
    plain = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    try:
        ids, spans = chat_spans(tokenizer, plain, row.fields.get("tools") or None)
    except ChatRefused as error:
        raise row.error(f"messages: {error}") from None
    labels = [NO_LOSS] * len(ids)
    for index, (start, stop) in spans.items():
        if learn[index]:
            labels[start:stop] = ids[start:stop]
    return {"input_ids": ids, "labels": labels}


def fit(
    dataset: Dataset,
    *,
    vocab_size: int,
    max_length: int | None = None,
    model_limit: int | None = None,
    virtual: int = 0,
    too_long: str = "error",
) -> Dataset:
    """Hold every example against the model: ids inside the vocabulary, lengths inside the task's limit and the model's, of which
    the adapter's `virtual` tokens take some.

    Raises:
        ValueError: an id outside, an example too long (unless `too_long` is "drop"), nothing left, or no labelled token.
    """
    room = None if model_limit is None else max(0, model_limit - virtual)
    limits = [
        (max_length, "the task's max_length"),
        (room, f"the model's limit{f' less {virtual} virtual tokens' if virtual else ''}"),
    ]
    limit, name = min(((value, name) for value, name in limits if value is not None), default=(None, ""))
    examples, places = [], []
    for example, where in zip(dataset.examples, dataset.places, strict=True):
        _check_vocabulary(example, where, vocab_size)
        length = len(example["input_ids"])
        if limit is not None and length > limit:
            if too_long == "drop":
                continue
            raise ValueError(
                f"{where}: input_ids is {length} tokens long, over {name} of {limit} (too_long: drop leaves such examples out)"
            )
        examples.append(example)
        places.append(where)
    if not examples:
        raise ValueError(f"{dataset.path}:1: holds no examples within {name} of {limit}")
    if not any(label != NO_LOSS for example in examples for label in example["labels"][1:]):
        raise ValueError(f"{dataset.path}:1: labels: no example has a token with a loss")
    return Dataset(dataset.path, examples, places, len(dataset.examples) - len(examples))


def _check_vocabulary(example: Example, where: str, vocab_size: int) -> None:
    if not example["input_ids"]:
        raise ValueError(f"{where}: input_ids is empty")
    for key, free, exception in (("input_ids", None, ""), ("labels", NO_LOSS, " and is not -100")):
        for index, value in enumerate(example[key]):
            if not 0 <= value < vocab_size and value != free:
                raise ValueError(f"{where}: {key}[{index}]={value} is outside the vocabulary of {vocab_size}{exception}")
