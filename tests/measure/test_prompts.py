"""Prompt files, spans and task generators, and what they say when they are wrong."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kvsim.errors import ConfigError
from kvsim.measure import require
from kvsim.measure.prompts import prompt, read_prompts, read_spans, task_prompts, task_settings, with_spans


def words(text, add_special_tokens=True):
    return {"input_ids": ([1] if add_special_tokens else []) + [len(w) for w in text.split()]}


def test_text_has_one_prompt_per_line(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("one three\n\nfive\n")
    first, second = read_prompts(file, words)
    assert first.tokens.tolist() == [1, 3, 5] and first.prompt_len == 3
    assert second.tokens.tolist() == [1, 4]


def test_json_lines_hold_text_or_tokens(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '{"prompt": "a bb", "completion": "ccc", "spans": [[0, 2, "head"]]}\n'
        '{"tokens": [4, 5, 6], "prompt_len": 2, "need": [[], [], [0, 1]]}\n{"tokens": [7]}\n'
    )
    text, ids, bare = read_prompts(file, words)
    assert (text.tokens.tolist(), text.prompt_len, text.spans) == ([1, 1, 2, 3], 3, ((0, 2, "head"),))
    assert (ids.tokens.tolist(), ids.prompt_len, ids.need[2]) == ([4, 5, 6], 2, [0, 1])
    assert bare.prompt_len == 1


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("p.txt", "", "empty"),
        ("p.txt", "words", "no tokenizer"),
        ("p.jsonl", "{", "line 1"),
        ("p.jsonl", '{"text": "a"}', "one of prompt and tokens"),
        ("p.jsonl", '{"tokens": [1, 2], "prompt_len": 3}', "3 out of 2 tokens"),
        ("p.jsonl", '{"tokens": []}', "0 out of 0 tokens"),
        ("p.jsonl", '{"tokens": [1, 2], "need": [[]]}', "1 entries of need for 2 tokens"),
        ("p.jsonl", '{"tokens": [1, 2], "spans": [[0, 3, "x"]]}', r'span "x" is \[0, 3\)'),
        ("p.jsonl", '{"tokens": [1, 2], "spans": [[0]]}', "not .start, end, name."),
    ],
)
def test_wrong_files_name_the_line(tmp_path, name, text, match):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=match):
        read_prompts(tmp_path / name)


def test_missing_file_and_bad_spans(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_prompts(tmp_path / "absent.txt")
    (tmp_path / "s.json").write_text("[[3, 3, 'x']]")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_spans(tmp_path / "s.json")
    (tmp_path / "s.json").write_text('[[3, 3, "x"]]')
    with pytest.raises(ConfigError, match="not empty"):
        read_spans(tmp_path / "s.json")


def test_common_spans_are_cut_at_the_end_of_a_prompt(tmp_path):
    (tmp_path / "s.json").write_text('[[0, 2, "system"], [2, 9, "question"], [9, 12, "rest"]]')
    spans = read_spans(tmp_path / "s.json")
    asked = [prompt(range(12)), prompt(range(5)), prompt(range(5), spans=[(1, 2, "mine")])]
    long, short, own = with_spans(asked, spans)
    assert long.spans == spans
    assert short.spans == ((0, 2, "system"), (2, 5, "question"))
    assert own.spans == ((1, 2, "mine"),)


TASK = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Sample:
    tokens: list
    prompt_len: int
    need: list

def sample(seed, index, *, size):
    tokens = [3 + (seed + index + i) % 7 for i in range(size)]
    return Sample(tokens, 4, [() if i < 4 else (i - 4,) for i in range(size)])

def is_right(sample, generated):
    return [list(generated) == sample.tokens[sample.prompt_len:]]
"""


def test_a_task_is_a_python_file_with_sample(tmp_path):
    (tmp_path / "task.py").write_text(TASK)
    first, second = task_prompts(tmp_path / "task.py", 2, seed=5, settings="size=6")
    assert first.tokens.tolist() == [8, 9, 3, 4, 5, 6] and first.prompt_len == 4 and list(first.need[5]) == [1]
    assert second.tokens.tolist() == [9, 3, 4, 5, 6, 7]
    assert first.check([5, 6]) == [True] and second.check([5, 6]) == [False]
    with pytest.raises(ConfigError, match="task failed"):
        task_prompts(tmp_path / "task.py", 1, settings="length=6")
    with pytest.raises(ConfigError, match="no such task file"):
        task_prompts(tmp_path / "other.py", 1)
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ConfigError, match="no function sample"):
        task_prompts(tmp_path / "empty.py", 1)


def test_task_settings():
    assert task_settings("problems=5, rate=0.5,kind=chain") == {"problems": 5, "rate": 0.5, "kind": "chain"}
    assert task_settings("") == {}
    with pytest.raises(ConfigError, match="task settings"):
        task_settings("problems")


def test_a_missing_package_names_the_extra():
    with pytest.raises(ConfigError, match=r'pip install "kvsim\[capture\]"'):
        require("no_such_package")


def test_importing_is_light():
    code = (
        "import sys, kvsim.measure, kvsim.measure.capture, kvsim.measure.prompts\n"
        "heavy = {'torch', 'transformers', 'pyarrow', 'pydantic', 'simpy', 'typer', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
