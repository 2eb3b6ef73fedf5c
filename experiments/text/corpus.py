"""Python source text from this machine alone: the standard library's, and what is installed beside it.

The standard library (its tests left out) and pydoc's topics are under the licence of Python itself (PSF-2.0); every
sixteenth of its files is held out, by a hash of its name, to measure on and to capture. Files of installed packages
are under many licences: they are learnt from, and neither measured on nor captured.
"""

from __future__ import annotations

import hashlib
import itertools
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from kvsim.errors import ConfigError

STDLIB = Path(sysconfig.get_path("stdlib"))
PACKAGES = ("site-packages", "dist-packages")
TESTS = ("test", "tests", "idle_test")
MADE = ("config-", "_sysconfigdata")  # how files begin that were made when this Python was built
TABLES = ("encodings", "pydoc_data")  # rows of characters; topics as one literal, whose text `topics` gives
ONE_IN = 16  # files held out
LONG, COPIED = 32, 0.1  # a package's file is left out if so many of its lines of so many characters are held-out ones
END = "<|end of file|>"  # token 0 stands before every file


class Document(NamedTuple):
    """A text; its name is a path below its root, the same wherever that is."""

    name: str
    text: str


def rank(name: str) -> bytes:
    """An order that depends on nothing but the name."""
    return hashlib.sha256(name.encode()).digest()


def is_held_out(name: str) -> bool:
    return rank(name)[0] % ONE_IN == 0


def files(root: Path, left_out: Sequence[str] = ()) -> Iterator[Document]:
    """Python files below a root, one at a time, ordered by `rank`; none in folders left out, none that is no UTF-8."""
    found = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    for name in sorted(found, key=rank):
        *folders, file = name.split("/")
        if set(folders) & set(left_out) or any(part.startswith(MADE) for part in (*folders, file)):
            continue
        try:
            yield Document(name, found[name].read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError):
            continue


def topics() -> Iterator[Document]:
    """What `help()` says of the language, where this Python brings it."""
    try:
        from pydoc_data.topics import topics as found
    except ImportError:
        return
    yield from sorted((Document(f"topics/{name}", text) for name, text in found.items()), key=lambda d: rank(d.name))


def standard_library(root: Path = STDLIB) -> list[Document]:
    """Files and topics. Raises ConfigError for a Python without its sources."""
    found = [*files(root, (*TESTS, *PACKAGES, *TABLES)), *(topics() if root == STDLIB else ())]
    if not found:
        raise ConfigError("this Python has no sources", where=str(root), hint="install its standard library as .py")
    return found


def packages(roots: Iterable[Path], known: Sequence[Document]) -> Iterator[Document]:
    """Files of installed packages, but those that repeat what is `known`: the held-out files have copies there."""
    lines = {line for document in known for line in _long_lines(document.text)}
    for root in roots:
        for document in files(root):
            own = _long_lines(document.text)
            if own and sum(line in lines for line in own) <= COPIED * len(own):
                yield document


def package_roots() -> list[Path]:
    """Where packages of this Python are installed."""
    return sorted({Path(p).resolve() for p in sys.path if Path(p).name in PACKAGES and Path(p).is_dir()})


def _long_lines(text: str) -> list[str]:
    return [line for line in map(str.strip, text.splitlines()) if len(line) >= LONG]


def first(documents: Iterable[Document], megabytes: float) -> Iterator[Document]:
    """Documents until so many million characters are reached."""
    left = megabytes * 1e6
    for document in documents:
        if left <= 0:
            return
        left -= len(document.text)
        yield document


def digest(documents: Iterable[Document]) -> str:
    """SHA-256 of names and texts."""
    found = hashlib.sha256()
    for document in documents:
        found.update(rank(document.name) + rank(document.text))
    return found.hexdigest()


# -- tokens ----------------------------------------------------------------------------------------------------------


def tokenizer(documents: Iterable[Document], size: int) -> Tokenizer:
    """Byte-level BPE of `size` symbols, trained here; every digit is a token of its own."""
    made = Tokenizer(models.BPE())
    single, by_bytes = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([single, by_bytes])
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator((document.text for document in documents), trainer)
    return made


@dataclass(frozen=True)
class Stream:
    """Tokens of documents, one after the other, and how many characters and documents they stand for."""

    ids: np.ndarray
    characters: int
    documents: int

    @property
    def facts(self) -> dict[str, int]:
        return {"files": self.documents, "characters": self.characters, "tokens": len(self.ids)}


def encode(tokens: Tokenizer, documents: Iterable[Document], until: float = np.inf) -> Stream:
    """The documents as tokens, as far as they are read when the clock says `until`."""
    parts: list[np.ndarray] = []
    characters, left = 0, iter(documents)
    while time.monotonic() < until and (batch := list(itertools.islice(left, 128))):
        characters += sum(len(document.text) for document in batch)
        for found in tokens.encode_batch_fast([document.text for document in batch], add_special_tokens=False):
            parts.append(np.array([tokens.token_to_id(END), *found.ids], np.int32))
    return Stream(np.concatenate([np.empty(0, np.int32), *parts]), characters, len(parts))


def to_capture(
    tokens: Tokenizer, documents: Iterable[Document], count: int, length: int
) -> Iterator[tuple[str, list[int]]]:
    """Name and first `length` tokens of `count` documents that are long enough and carry no notice of their own."""
    for document in documents:
        if count and "copyright" not in document.text.lower():
            ids = encode(tokens, [document]).ids[:length]
            if len(ids) == length:
                count -= 1
                yield document.name, ids.tolist()
    if count:
        what = f"{count} more held-out files of {length} tokens are wanted"
        raise ConfigError(what, hint="ask for fewer or shorter prompts")
