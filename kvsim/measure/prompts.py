"""What a capture is asked to run: prompts from a text file, from JSON lines, or from a task generator."""

from __future__ import annotations

import json
import os
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import numpy as np

from kvsim.errors import ConfigError

Span = tuple[int, int, str]  # [start, end) in prompt tokens, name


@dataclass(frozen=True)
class Prompt:
    """One request to run.

    `tokens`: int32, the prompt and, where it is known, its continuation (which a forced run feeds).
    `need`: per token, positions of the tokens it follows from. `check`: given the generated tokens, which of
    the questions asked were answered rightly.
    """

    tokens: np.ndarray
    prompt_len: int
    need: Sequence[Sequence[int]] | None = None
    spans: tuple[Span, ...] = ()
    check: Callable[[np.ndarray], Sequence[bool]] | None = None


def prompt(
    tokens: Iterable[int],
    prompt_len: int | None = None,
    *,
    where: str | None = None,
    spans: Iterable = (),
    **facts: Any,
) -> Prompt:
    """A checked Prompt; `prompt_len` None means that all tokens are the prompt. Raises ConfigError."""
    ids = np.asarray(list(tokens), np.int32)
    length = len(ids) if prompt_len is None else int(prompt_len)
    if not 1 <= length <= len(ids):
        raise ConfigError(f"a prompt of {length} out of {len(ids)} tokens", where=where, hint="give 1 token or more")
    need = facts.get("need")
    if need is not None and len(need) != len(ids):
        what = f"{len(need)} entries of need for {len(ids)} tokens"
        raise ConfigError(what, where=where, hint="give one list per token")
    return Prompt(ids, length, spans=_spans(spans, length, where), **facts)


def read_prompts(path: str | os.PathLike, tokenizer: Any = None) -> list[Prompt]:
    """Prompts from a file: `.jsonl`, one object per line, or else text, one prompt per line.

    An object holds "prompt" (text; "completion" may follow) or "tokens" (ids, with "prompt_len" where a
    continuation follows, and "need"); "spans" as in `read_spans`. Text needs the model's tokenizer.
    Raises ConfigError with file and line.
    """
    lines = [(i, line) for i, line in enumerate(_text(path).splitlines(), 1) if line.strip()]
    if not lines:
        raise ConfigError("the prompt file is empty", where=Path(path).name, hint="write one prompt per line")
    read = _from_object if Path(path).suffix == ".jsonl" else _from_text
    return [read(line, tokenizer, f"{Path(path).name}, line {i}") for i, line in lines]


def read_spans(path: str | os.PathLike) -> tuple[Span, ...]:
    """Named stretches of the prompt: a JSON list of [start, end, name], in tokens, end excluded."""
    try:
        return _spans(json.loads(_text(path)), None, Path(path).name)
    except ValueError as e:
        hint = 'write [[0, 12, "system"], ...]'
        raise ConfigError(f"the spans cannot be read: {e}", where=Path(path).name, hint=hint) from e


def with_spans(prompts: Iterable[Prompt], spans: Sequence[Span]) -> list[Prompt]:
    """The prompts, with `spans` for those that bring none of their own, cut at the end of each prompt."""

    def cut(p: Prompt) -> tuple[Span, ...]:
        return tuple((start, min(end, p.prompt_len), name) for start, end, name in spans if start < p.prompt_len)

    return [p if p.spans else replace(p, spans=cut(p)) for p in prompts]


def task_prompts(
    path: str | os.PathLike, count: int, *, seed: int = 0, settings: str | dict[str, Any] = ""
) -> list[Prompt]:
    """`count` samples of a task: a Python file with `sample(seed, index, **settings)`.

    A sample has `.tokens` and `.prompt_len`, and may have `.need`. Where the file also has
    `is_right(sample, generated)`, answers are checked with it. `settings`: "problems=5,steps=8" or a dict.
    """
    name = Path(path).name
    module = _module(path)
    if not callable(getattr(module, "sample", None)):
        raise ConfigError("the task has no function sample(seed, index, **settings)", where=name)
    settings = task_settings(settings) if isinstance(settings, str) else settings
    try:
        samples = [module.sample(seed, index, **settings) for index in range(count)]
        right = getattr(module, "is_right", None)
        return [
            prompt(
                s.tokens,
                s.prompt_len,
                where=f"{name}, sample {i}",
                need=getattr(s, "need", None),
                check=right and (lambda generated, s=s: right(s, generated)),
            )
            for i, s in enumerate(samples)
        ]
    except (TypeError, ValueError, AttributeError) as e:
        raise ConfigError(f"the task failed: {e}", where=name, hint="see its function sample for its settings") from e


def task_settings(text: str) -> dict[str, Any]:
    """ "problems=5,steps=8" as a dict; values are numbers where they look like numbers."""
    pairs = [item.partition("=") for item in text.split(",") if item.strip()]
    if any(not sign or not key.strip() for key, sign, _ in pairs):
        raise ConfigError(f'cannot read the task settings "{text}"', hint='write them like "problems=5,steps=8"')
    return {key.strip(): _value(value.strip()) for key, _, value in pairs}


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _module(path: str | os.PathLike) -> Any:
    if not Path(path).is_file():
        raise ConfigError("no such task file", where=str(path), hint="a task is a Python file with a function sample")
    name = f"kvsim_task_{Path(path).stem}"
    module = types.ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # dataclasses look their own module up by name
    try:
        SourceFileLoader(name, str(path)).exec_module(module)
    except Exception as e:
        raise ConfigError(f"the task file cannot be loaded: {e}", where=Path(path).name) from e
    return module


def _text(path: str | os.PathLike) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"the file cannot be read: {e}", where=Path(path).name) from e


def _from_text(line: str, tokenizer: Any, where: str) -> Prompt:
    return prompt(_encoded(line, tokenizer, where), where=where)


def _from_object(line: str, tokenizer: Any, where: str) -> Prompt:
    known = ("prompt", "completion", "tokens", "prompt_len", "need", "spans")
    try:
        item = json.loads(line)
        if not isinstance(item, dict) or (("prompt" in item) == ("tokens" in item)) or set(item) - set(known):
            raise ValueError(f"the keys are {', '.join(known)}; one of prompt and tokens is needed")
        if "tokens" in item:
            return prompt(item.pop("tokens"), item.pop("prompt_len", None), where=where, **item)
        head = _encoded(item["prompt"], tokenizer, where)
        tail = _encoded(item.get("completion", ""), tokenizer, where, add_special_tokens=False)
        return prompt([*head, *tail], len(head), where=where, spans=item.get("spans", ()))
    except (ValueError, TypeError) as e:
        hint = 'write {"prompt": "..."} or {"tokens": [...]}'
        raise ConfigError(f"cannot read this line: {e}", where=where, hint=hint) from e


def _encoded(text: str, tokenizer: Any, where: str, **how: Any) -> list[int]:
    if tokenizer is None:
        hint = 'use token ids: .jsonl lines like {"tokens": [5, 17, 3]}'
        raise ConfigError("the model has no tokenizer to read text with", where=where, hint=hint)
    return list(tokenizer(text, **how)["input_ids"])


def _spans(items: Iterable, length: int | None, where: str | None) -> tuple[Span, ...]:
    try:
        spans = tuple((int(start), int(end), str(name)) for start, end, name in items)
    except (TypeError, ValueError) as e:
        raise ConfigError(f"a span is not [start, end, name]: {e}", where=where) from e
    for start, end, name in spans:
        if not 0 <= start < end or (length is not None and end > length):
            hint = "spans lie in the prompt and are not empty"
            raise ConfigError(f'span "{name}" is [{start}, {end})', where=where, hint=hint)
    return spans
