"""JSONL files become examples with the right labels, or one line that says where and why not."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from muxcompile.data import NO_LOSS, encode_rows, load_examples, read_rows

CHAT = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hello there"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "see you"},
]
GENERATION = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}ENDMARK{% endgeneration %}AFTER"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Qwen3's habit: an empty thought in front of the last answer, and thoughts taken out of the earlier ones.
LAST_TURN_THINKS = (
    "{% for message in messages %}{% set content = message['content'].split('</think>')[-1] %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

Write = Callable[[str, list[Any]], Path]


def examples_of(path: Path, tokenizer: Any) -> list[dict[str, list[int]]]:
    return load_examples(path, tokenizer, vocab_size=320, model_limit=200).examples


def learned(example: dict[str, list[int]], tokenizer: Any) -> str:
    assert all(label in (NO_LOSS, token) for token, label in zip(example["input_ids"], example["labels"], strict=True))
    return str(tokenizer.decode([label for label in example["labels"] if label != NO_LOSS]))


def with_template(tokenizer: Any, template: str | None) -> Any:
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


def test_messages_learn_the_assistants_words_and_their_end_of_turn(write_jsonl: Write, tokenizer: Any) -> None:
    (example,) = examples_of(write_jsonl("chat.jsonl", [{"messages": CHAT}]), tokenizer)
    assert learned(example, tokenizer) == "hello there<|im_end|>see you<|im_end|>"
    rendered = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert tokenizer.decode(example["input_ids"]) == rendered


def test_weight_zero_takes_an_answer_out_of_the_loss(write_jsonl: Write, tokenizer: Any) -> None:
    chat = [*CHAT[:2], {**CHAT[2], "weight": 0}, CHAT[3], {**CHAT[4], "weight": 1}]
    (example,) = examples_of(write_jsonl("chat.jsonl", [{"messages": chat}]), tokenizer)
    assert learned(example, tokenizer) == "see you<|im_end|>"


@pytest.mark.parametrize("inside", [True, False])
def test_a_template_with_generation_marks_is_taken_at_its_word_but_for_the_end_of_turn(
    write_jsonl: Write, tokenizer: Any, inside: bool
) -> None:
    ends = ("<|im_end|>", "") if inside else ("", "<|im_end|>")
    marked = with_template(tokenizer, GENERATION.replace("ENDMARK", ends[0]).replace("AFTER", ends[1]))
    path = write_jsonl("chat.jsonl", [{"messages": [*CHAT[:2], {**CHAT[2], "weight": 0}, *CHAT[3:]]}, {"messages": CHAT}])
    first, second = examples_of(path, marked)
    assert learned(first, tokenizer) == "see you<|im_end|>"
    assert learned(second, tokenizer) == "hello there<|im_end|>see you<|im_end|>"
    assert second == examples_of(path, tokenizer)[1]


def test_a_template_that_treats_the_last_turn_apart_still_gives_every_answer(write_jsonl: Write, tokenizer: Any) -> None:
    (example,) = examples_of(write_jsonl("chat.jsonl", [{"messages": CHAT}]), with_template(tokenizer, LAST_TURN_THINKS))
    assert learned(example, tokenizer) == "hello there<|im_end|><think>\n\n</think>\n\nsee you<|im_end|>"


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (None, "no chat template"),
        (
            "{{ messages|length }} turns{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}",
            "cannot be told apart",
        ),
        ("{{ raise_exception('roles must alternate') }}", "the chat template refuses the conversation: roles must alternate"),
        ("{% for m in messages %}[{{ m['role'] }}]{{ m['content']|upper }}{% endfor %}", None),
    ],
)
def test_a_template_whose_turns_cannot_be_found_is_refused(
    write_jsonl: Write, tokenizer: Any, template: str | None, why: str | None
) -> None:
    path = write_jsonl("chat.jsonl", [{"text": "ok"}, {"messages": CHAT}])
    if why is None:
        assert learned(examples_of(path, with_template(tokenizer, template))[1], tokenizer).startswith("[assistant]HELLO")
        return
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}:2: messages: .*{why}"):
        examples_of(path, with_template(tokenizer, template))


def test_a_completion_is_learned_with_its_end_and_the_prompt_is_not(write_jsonl: Write, tokenizer: Any) -> None:
    path = write_jsonl("pairs.jsonl", [{"prompt": "the capital of France is", "completion": " Paris"}])
    (example,) = examples_of(path, tokenizer)
    assert learned(example, tokenizer) == " Paris<|im_end|>"
    assert tokenizer.decode(example["input_ids"]) == "the capital of France is Paris<|im_end|>"


def test_the_prompts_tokens_are_those_the_prompt_has_alone(write_jsonl: Write, tokenizer: Any) -> None:
    prompt, completion = "the capi", "tal of France"
    (example,) = examples_of(write_jsonl("pairs.jsonl", [{"prompt": prompt, "completion": completion}]), tokenizer)
    alone = tokenizer(prompt)["input_ids"]
    assert example["input_ids"][: len(alone)] == alone != tokenizer(prompt + completion)["input_ids"][: len(alone)]
    assert learned(example, tokenizer) == completion + "<|im_end|>"


def test_prompt_and_completion_may_be_messages(write_jsonl: Write, tokenizer: Any) -> None:
    (example,) = examples_of(write_jsonl("pairs.jsonl", [{"prompt": CHAT[:4], "completion": CHAT[4:]}]), tokenizer)
    assert learned(example, tokenizer) == "see you<|im_end|>"


def test_text_is_learned_whole_and_closed_once(write_jsonl: Write, tokenizer: Any) -> None:
    open_ended, closed = examples_of(write_jsonl("text.jsonl", [{"text": "see you"}, {"text": "see you<|im_end|>"}]), tokenizer)
    assert learned(open_ended, tokenizer) == "see you<|im_end|>" == learned(closed, tokenizer)


def test_ids_and_labels_pass_through_and_padding_is_taken_out(write_jsonl: Write) -> None:
    rows = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
        {"input_ids": [0, 5, 6], "labels": [-100, -100, 6], "attention_mask": [0, 1, 1]},
        {"input_ids": [0, 5, 6, 0], "labels": [-100, -100, 6, -100], "attention_mask": [0, 1, 1, 0]},
    ]
    examples = examples_of(write_jsonl("ids.jsonl", rows), None)
    assert examples == [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, *[{"input_ids": [5, 6], "labels": [-100, 6]}] * 2]


def test_a_pair_of_surrogates_is_a_character(write_jsonl: Write, tokenizer: Any) -> None:
    (example,) = examples_of(write_jsonl("text.jsonl", [r'{"text": "\ud83d\ude00", "note": "\ud83d"}']), tokenizer)
    assert learned(example, tokenizer) == "\N{GRINNING FACE}<|im_end|>"


def test_blank_lines_and_a_byte_order_mark_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "ids.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"input_ids": [1, 2], "labels": [1, 2]}\r\n\r\n  \n{"input_ids": [3, 4], "labels": [3, 4]}')
    dataset = load_examples(path, None, vocab_size=8)
    assert len(dataset) == 2
    assert dataset.places == [f"{path}:1", f"{path}:4"]


def test_long_examples_are_dropped_only_on_request_and_counted(write_jsonl: Write) -> None:
    path = write_jsonl("ids.jsonl", [{"input_ids": [1] * n, "labels": [1] * n} for n in (4, 9, 5)])
    dataset = load_examples(path, None, vocab_size=8, max_length=5, model_limit=64, too_long="drop")
    assert [len(example["input_ids"]) for example in dataset.examples] == [4, 5]
    assert dataset.dropped == 1
    assert dataset.places == [f"{path}:1", f"{path}:3"]
    with pytest.raises(ValueError, match=r":2: input_ids is 9 tokens long, over the task's max_length of 5"):
        load_examples(path, None, vocab_size=8, max_length=5)
    with pytest.raises(ValueError, match=r":1: input_ids is 4 tokens long, over the model's limit of 3"):
        load_examples(path, None, vocab_size=8, max_length=5, model_limit=3)
    with pytest.raises(ValueError, match="holds no examples within"):
        load_examples(path, None, vocab_size=8, max_length=3, too_long="drop")


GOOD = {"text": "fine"}


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ('{"text": "a"', "malformed JSON: Expecting ',' delimiter at column 13"),
        ('{"text": NaN}', "malformed JSON: NaN is not JSON"),
        ("[1, 2]", "a line must be a JSON object, not a list"),
        ({"txt": "a"}, "unknown shape: .*; did you mean 'text'"),
        (
            {"question": "a", "answer": "b"},
            "unknown shape: an example needs messages, prompt and completion, text or input_ids and labels",
        ),
        ({"text": "a", "prompt": "b", "completion": "c"}, "mixed shapes: has keys of prompt and completion and of text"),
        ({"prompt": "a"}, "completion is missing beside prompt"),
        ({"input_ids": [1]}, "labels is missing beside input_ids"),
        ({"text": 3}, "text must be a non-empty string, not 3"),
        ({"text": ""}, "text must be a non-empty string, not ''"),
        ({"prompt": "a", "completion": ["b"]}, "completion must be a string, not a list, or both must be lists of messages"),
        ({"messages": "hi"}, "messages must be a non-empty list, not 'hi'"),
        ({"messages": []}, "messages must be a non-empty list, not an empty one"),
        ({"messages": ["hi"]}, r"messages\[0\] must be an object, not 'hi'"),
        ({"messages": [{"content": "hi"}]}, r"messages\[0\].role must be a non-empty string, not null"),
        ({"messages": [{"role": "assistant", "content": 5}]}, r"messages\[0\].content must be a string, not 5"),
        ({"messages": CHAT[:2]}, "messages has no message of role 'assistant'"),
        (
            {"messages": [{"role": "user", "content": "a", "weight": 1}]},
            r"messages\[0\].weight is allowed on assistant messages only",
        ),
        ({"messages": [{"role": "assistant", "content": "a", "weight": 2}]}, r"messages\[0\].weight must be 0 or 1, not 2"),
        ({"messages": CHAT, "tools": [{"name": "f"}]}, "messages: tools are given, and the chat template has no place for them"),
        (r'{"text": "\ud83d lone"}', r"text holds a lone surrogate \(\\ud83d\), which is no character"),
        (r'{"prompt": "a", "completion": "\uDE00"}', r"completion holds a lone surrogate \(\\ude00\)"),
        ({"messages": [*CHAT, {"role": "assistant", "content": "\udc00"}]}, r"messages holds a lone surrogate \(\\udc00\)"),
        ({"input_ids": [1, 2.5], "labels": [1, 2]}, r"input_ids\[1\] must be an integer, not 2.5"),
        ({"input_ids": [1, True], "labels": [1, 2]}, r"input_ids\[1\] must be an integer, not True"),
        ({"input_ids": [1, 2], "labels": [1]}, "labels has 1 entries where input_ids has 2"),
        ({"input_ids": [], "labels": []}, "input_ids must be a non-empty list of integers"),
        ({"input_ids": [1, 2, 3], "labels": [1, 2, 3], "attention_mask": [1, 0, 1]}, "attention_mask has a hole"),
        ({"input_ids": [1, 2], "labels": [1, 2], "attention_mask": [1, 2]}, "attention_mask must hold 0 and 1 only"),
        ({"input_ids": [1, 2], "labels": [1, 2], "position_ids": [0, 0]}, "position_ids is not read: give each sequence a line"),
        ({"input_ids": [1, 320], "labels": [1, 2]}, r"input_ids\[1\]=320 is outside the vocabulary of 320"),
        ({"input_ids": [1, -1], "labels": [1, 2]}, r"input_ids\[1\]=-1 is outside the vocabulary of 320"),
        ({"input_ids": [1, 2], "labels": [1, -1]}, r"labels\[1\]=-1 is outside the vocabulary of 320 and is not -100"),
        ({"text": "ab " * 200}, "input_ids is .* tokens long, over the model's limit of 200"),
    ],
)
def test_a_bad_line_is_one_message_with_file_line_and_field(write_jsonl: Write, tokenizer: Any, row: Any, why: str) -> None:
    path = write_jsonl("bad.jsonl", [GOOD, "", row])
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}:3: {why}") as caught:
        examples_of(path, tokenizer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_a_file_without_examples_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}:1: holds no examples"):
        read_rows(path)


def test_a_file_that_is_missing_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere.jsonl: cannot be read: No such file"):
        read_rows(tmp_path / "nowhere.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xe9"}\n')
    with pytest.raises(ValueError, match=r"latin.jsonl:2: is not UTF-8 text"):
        read_rows(tmp_path / "latin.jsonl")


def test_a_file_in_which_nothing_has_a_loss_is_refused(write_jsonl: Write) -> None:
    path = write_jsonl("ids.jsonl", [{"input_ids": [1, 2], "labels": [1, -100]}])
    with pytest.raises(ValueError, match="labels: no example has a token with a loss"):
        load_examples(path, None, vocab_size=8)


def test_text_needs_a_tokenizer_that_can_end_it(write_jsonl: Write, tokenizer: Any) -> None:
    path = write_jsonl("text.jsonl", [GOOD])
    with pytest.raises(ValueError, match=r":1: text needs a tokenizer, and the base has none"):
        encode_rows(path, read_rows(path), None)
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(ValueError, match=r":1: text needs an end-of-sequence token"):
        encode_rows(path, read_rows(path), endless)
