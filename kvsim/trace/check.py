"""What a trace holds (`info`) and whether it is sound (`check`), as plain data for the command line."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from kvsim.errors import TraceError
from kvsim.trace.access import Trace
from kvsim.trace.files import fingerprint, read_manifest
from kvsim.trace.layout import file_hash
from kvsim.trace.reader import FileSource, located, open_trace

_OWN = ("files", "totals", "fingerprint", "format", "version", "encoding", "layers", "kv_heads", "heads", "requests")


def info(trace: Trace) -> dict[str, Any]:
    """Facts about a trace: model, requests, density and size of the rows, capture settings, facts present.

    Bytes are those of the attention files; "bytes_per_weight" is per (step, layer, head, visible position).
    A trace in memory answers with what it knows.
    """
    g, m = trace.geometry, trace.manifest
    facts = sorted({name for source in trace.sources[:1] for name in source.facts})
    out: dict[str, Any] = {
        "name": trace.name,
        "path": trace.path,
        "fingerprint": trace.fingerprint,
        "model": g.name,
        "geometry": {"layers": g.layers, "kv_heads": g.kv_heads, "group": g.group, "head_dim": g.head_dim},
        "requests": len(trace.sources),
        "steps": sum(s.output_tokens for s in trace.sources),
        "prompt_tokens": _span([s.prompt_tokens for s in trace.sources]),
        "output_tokens": _span([s.output_tokens for s in trace.sources]),
        "facts": facts,
        "gold_sources": "need" in facts,
    }
    return out | _stored(trace) if m else out


def _stored(trace: Trace) -> dict[str, Any]:
    m = trace.manifest
    totals, files = m["totals"], m["files"]
    attention = sum(entry["bytes"] for name, entry in files.items() if name.startswith("attn-"))
    return {
        "format": f"{m['format']} {m['version']}",
        "heads": m["heads"],
        "encoding": m["encoding"],
        "vectors": any(name.startswith("vectors-") for name in files),
        "rows": totals["rows"],
        "weights": totals["positions"],
        "kept": totals["entries"],
        "density": totals["entries"] / totals["positions"],
        "bytes": sum(entry["bytes"] for entry in files.values()),
        "attention_bytes": attention,
        "bytes_per_weight": attention / totals["positions"],
        "bytes_per_entry": attention / totals["entries"],
        "capture": {key: value for key, value in m.items() if key not in _OWN},
    }


def _span(values: list[int]) -> tuple[int, int]:
    """Smallest and largest."""
    return (min(values), max(values)) if values else (0, 0)


def check(path: str | os.PathLike) -> list[str]:
    """Everything that is wrong with a trace, one message each; empty if it is sound.

    Reads every row and hashes every file. Raises TraceError only where there is no trace to look at.
    """
    path = located(path)
    if not path.is_dir():
        read_manifest(path)
    problems: list[str] = []
    _attempt(problems, lambda: _hashes(path, problems))
    trace = _attempt(problems, lambda: open_trace(path))
    for source in trace.sources if trace else ():
        for part in (_prompt, _rows, _facts, _extra):
            _attempt(problems, partial(part, source))
    return list(dict.fromkeys(problems))


def _prompt(source: FileSource) -> None:
    for _ in source.prompt().rows:
        pass


def _rows(source: FileSource) -> None:
    for _ in source.token_rows():
        pass


def _facts(source: FileSource) -> None:
    tokens = source.prompt_tokens + source.output_tokens
    if len(source.facts["tokens"]) < tokens:
        raise TraceError(f"request {source.id}: {len(source.facts['tokens'])} token ids for {tokens} tokens")


def _extra(source: FileSource) -> None:
    """The optional parts of a request, where the manifest announces them."""
    encoding = source.manifest["encoding"]
    for rows in (source.max_rows() if encoding.get("max") else (), source.vectors() if encoding.get("vectors") else ()):
        for _ in rows:
            pass


def _attempt(problems: list[str], action: Callable[[], Any]) -> Any:
    try:
        return action()
    except TraceError as error:
        problems.append(str(error))
        return None


def _hashes(path: Path, problems: list[str]) -> None:
    manifest = read_manifest(path)
    hashes = {name: file_hash(path / name) for name in manifest["files"]}
    problems += [
        f"{name}: the content is not what was written\nin {path / name}"
        for name, entry in manifest["files"].items()
        if hashes[name] != entry["sha256"]
    ]
    strangers = sorted(p.name for p in path.iterdir() if p.name not in {*hashes, "manifest.json"})
    problems += [f"{name}: the manifest does not know this file\nin {path / name}" for name in strangers]
    if fingerprint(path, hashes) != manifest["fingerprint"]:
        problems.append(f"the fingerprint does not match the files\nin {path}")
