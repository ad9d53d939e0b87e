"""Which tokens of a rendered conversation the assistant said, for any chat template."""

from __future__ import annotations

from itertools import pairwise
from typing import Any


class ChatRefused(Exception):
    """A conversation that the template refuses, or whose assistant turns it does not let us find. The text says why."""


Spans = dict[int, tuple[int, int]]


def chat_spans(tokenizer: Any, messages: list[dict[str, Any]], tools: list[Any] | None = None) -> tuple[list[int], Spans]:
    """Token ids of the whole conversation, and for each assistant message (by its index) the ids it consists of.

    A span begins after the header that `add_generation_prompt` writes and ends with the end-of-turn token, so that a model
    trained on it learns to stop; line breaks that a template puts after that token are left out. Templates with
    `{% generation %}` say themselves what the assistant wrote; for all others the spans are found by rendering the
    conversation up to each turn.

    Returns:
        (ids, {message index: (first, past the last)}).

    Raises:
        ChatRefused: no template, an error inside it, or a render whose beginning changes with what follows.
    """
    template = _template(tokenizer, tools)
    assistants = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not tokenizer.is_fast:
        raise ChatRefused("finding the assistant's turns needs a fast tokenizer (one with offsets)")
    full = _render(tokenizer, messages, tools)
    encoding = tokenizer(full, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = list(encoding["input_ids"]), encoding["offset_mapping"]
    if "generation" in template and "endgeneration" in template:
        spans = _marked(tokenizer, messages, tools, ids, assistants)
        if spans is not None:
            return ids, spans
    found = {}
    for index in assistants:
        start, stop = _turn(tokenizer, messages, tools, index, full)
        inside = [at for at, (left, right) in enumerate(offsets) if start <= left < stop and right > left]
        if not inside:
            raise ChatRefused(f"messages[{index}] leaves no token in the rendered conversation")
        found[index] = _without_tail(tokenizer, full, ids, offsets, inside[0], inside[-1] + 1)
    return ids, found


def _template(tokenizer: Any, tools: list[Any] | None) -> str:
    try:
        template = str(tokenizer.get_chat_template(tools=tools))
    except ValueError:
        raise ChatRefused("the tokenizer has no chat template") from None
    if tools and "tools" not in template:
        raise ChatRefused("tools are given, and the chat template has no place for them")
    return template


def _render(tokenizer: Any, messages: list[dict[str, Any]], tools: list[Any] | None, *, prompt: bool = False) -> str:
    import jinja2

    try:
        return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt))
    except (jinja2.TemplateError, ValueError, TypeError) as error:
        raise ChatRefused(f"the chat template refuses the conversation: {error}") from None


def _marked(
    tokenizer: Any, messages: list[dict[str, Any]], tools: list[Any] | None, ids: list[int], assistants: list[int]
) -> Spans | None:
    """Spans by the template's own `{% generation %}` marks; None where they cannot be matched to the messages one by one."""
    marked = tokenizer.apply_chat_template(
        messages, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    mask = [0, *marked["assistant_masks"], 0]
    if list(marked["input_ids"]) != ids:
        return None
    edges = [at for at, (left, right) in enumerate(pairwise(mask)) if left != right]
    runs = list(zip(edges[::2], edges[1::2], strict=True))
    if len(runs) != len(assistants):
        return None
    # A template that closes its mark before the end of turn would train a model that never stops.
    ends = {tokenizer.eos_token_id}
    return {
        index: (a, b + 1 if b < len(ids) and ids[b] in ends and ids[b - 1] not in ends else b)
        for index, (a, b) in zip(assistants, runs, strict=True)
    }


def _turn(tokenizer: Any, messages: list[dict[str, Any]], tools: list[Any] | None, index: int, full: str) -> tuple[int, int]:
    """Characters [start, stop) of assistant message `index` in the full render."""
    refusal = ChatRefused(
        f"the chat template renders the conversation before messages[{index}] differently once more follows,"
        " so the assistant's tokens cannot be told apart; give prompt and completion, or input_ids and labels"
    )
    try:
        before = _render(tokenizer, messages[:index], tools, prompt=True)
    except ChatRefused:
        raise refusal from None
    through = _render(tokenizer, messages[: index + 1], tools)
    if not full.startswith(before) or not through.startswith(before):
        raise refusal
    if full.startswith(through):
        return len(before), len(through)
    # Some templates (Qwen3's) write an extra, empty thought into the last turn alone: then the words decide. They must
    # follow the header at once and be followed by what closed the turn when it was the last.
    content = (messages[index].get("content") or "").strip()
    at = through.rfind(content)
    closed = through[at:] if content and at >= len(before) else None
    if closed is None or not full.startswith(before + closed):
        raise refusal
    return len(before), len(before) + len(closed)


def _without_tail(
    tokenizer: Any, full: str, ids: list[int], offsets: list[tuple[int, int]], start: int, stop: int
) -> tuple[int, int]:
    """Cut white space off the end of a span when a special token (the end of turn) stands before it."""
    special = set(tokenizer.all_special_ids) | {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    last = stop
    while last > start and ids[last - 1] not in special and full[slice(*offsets[last - 1])].isspace():
        last -= 1
    return (start, last) if last > start and ids[last - 1] in special else (start, stop)
