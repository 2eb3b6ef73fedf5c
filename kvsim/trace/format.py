"""Writing a trace: rows as a capture yields them, into a directory that appears once it is complete."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kvsim.errors import TraceError
from kvsim.trace import kernels
from kvsim.trace.files import fingerprint
from kvsim.trace.layout import (
    FORMAT,
    GROUP_BYTES,
    PARQUET,
    VERSION,
    attention_name,
    attention_schema,
    file_hash,
    planes,
    vectors_name,
    writing,
)
from kvsim.trace.pack import Pending, RequestFile, VectorFile
from kvsim.trace.tables import request_table, step_tables


class TraceWriter:
    """Writes a `.kvtrace` directory: rows as they come, each request closed by `finish_request`.

    `manifest` holds what the caller knows about model and run; the writer adds format, encoding, files and
    fingerprint. `keep`: 1 keeps every weight, in a byte each. Less keeps of a row its largest weights until they hold
    that share of the mass, are at least `min_keep`, and include every weight of at least `floor`; the rest is spread
    evenly, so who evicts by the order of small weights (TOVA) is told less. `lossless` keeps every weight as float32.
    `with_max` expects the largest query head of the group beside the mean. `heads` in the manifest says what a row is:
    "kv" (mean over the group, the default) or "query".

    Use it as a context manager: the trace appears under `path` at the end, or not at all.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        layers: int,
        kv_heads: int,
        manifest: Mapping[str, Any],
        keep: float = 1.0,
        min_keep: int = 64,
        floor: float = 1e-4,
        lossless: bool = False,
        with_max: bool = False,
        vectors: bool = False,
    ):
        self.path = Path(path)
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.layers, self.kv_heads = layers, kv_heads
        self.keep, self.min_keep, self.lossless, self.with_max = keep, min_keep, lossless, with_max
        self._floor = int(kernels.codes(np.array([floor], np.float32))[0])
        self.manifest = {
            **manifest,
            "heads": manifest.get("heads", "kv"),
            "format": FORMAT,
            "version": VERSION,
            "layers": layers,
            "kv_heads": kv_heads,
            "encoding": {
                "keep": "all" if lossless else keep,
                "min_keep": min_keep,
                "floor": floor,
                "code": {
                    "per_octave": kernels.PER_OCTAVE,
                    "octaves": kernels.FINE_OCTAVES,
                    "growth": kernels.GROWTH,
                },
                "max": with_max,
                "vectors": vectors,
            },
        }
        own = ("format", "version", "layers", "kv_heads", "heads", "encoding")
        meta = {key: self.manifest[key] for key in own}
        self._schema = attention_schema(kv_heads, lossless, with_max, meta)
        self._meta = {"kvsim": self._schema.metadata[b"kvsim"].decode()}
        self._open: dict[int, RequestFile] = {}
        self._prompts: dict[int, dict[int, tuple]] = {}
        self._vectors: dict[int, VectorFile] = {}
        self._with_vectors = vectors
        self._requests: list[dict[str, Any]] = []
        self._steps: dict[int, dict[str, Any]] = {}
        self._prefill: pq.ParquetWriter | None = None
        self._totals = {"rows": 0, "entries": 0, "positions": 0}
        self._begin()

    def _begin(self) -> None:
        if self.path.exists():
            raise TraceError("the output exists already", where=str(self.path), hint="remove it or choose another name")
        with writing(self.path):
            shutil.rmtree(self.partial, ignore_errors=True)  # of a run that was killed
            self.partial.mkdir(parents=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        done = False
        try:
            if kind is None:
                self._finish()
                done = True
        finally:
            if not done:
                self._abandon()

    # -- what a capture hands over ---------------------------------------------------------------------

    def prompt(
        self,
        request: int,
        layer: int,
        colsum: np.ndarray,
        colsq: np.ndarray | None = None,
        colmax: np.ndarray | None = None,
    ) -> None:
        """Statistics of every prompt column: float32 [kv_heads, prompt] each."""
        stats = [None if a is None else np.ascontiguousarray(a, np.float32) for a in (colsum, colsq, colmax)]
        self._prompts.setdefault(request, {})[layer] = tuple(stats)

    def row(
        self,
        request: int,
        step: int,
        layer: int,
        kv_lo: int,
        mean: np.ndarray,
        peak: np.ndarray | None = None,
        sink: np.ndarray | None = None,
    ) -> None:
        """One query's weights over positions kv_lo .. kv_lo + S - 1: float32 [kv_heads, S].

        `sink`: float32 [kv_heads], the mass of learned sinks. Prompt rows (step < 0) may come in any order
        but before the first decode row; decode rows come in (step, layer) order.
        """
        file = self._file(request)
        mean = np.ascontiguousarray(mean, np.float32)
        self._expect(file, step, layer, mean)
        lost = np.zeros(self.kv_heads, np.float32) if sink is None else np.ascontiguousarray(sink, np.float32)
        largest = self._largest(peak, mean)
        pending = file.pending
        if step > 0 and step != file.last[0] and (file.last[0] == 0 or pending.bytes >= GROUP_BYTES):
            with writing(self.path):
                file.flush()
        self._encode(pending, mean, largest, lost, f"request {request}, step {step}, layer {layer}")
        pending.sink.append(None if sink is None else lost.tobytes())
        kv_hi = kv_lo + mean.shape[1]
        pending.keys.append((step, layer, kv_lo, kv_hi))
        file.prompts.add(kv_hi - step - (step < 0))
        if step > 0:
            file.last = (step, layer)
        self._totals["rows"] += 1
        self._totals["entries"] += pending.ends[-1] - pending.ends[-2]
        self._totals["positions"] += mean.size

    def _largest(self, peak: np.ndarray | None, mean: np.ndarray) -> np.ndarray:
        """The group's largest weights, or no rows where the trace does not store them."""
        if not self.with_max:
            return mean[:0]
        if peak is None or np.shape(peak) != mean.shape:
            raise TraceError("with_max needs the group's largest weights beside the mean", where=str(self.path))
        return np.ascontiguousarray(peak, np.float32)

    def _file(self, request: int) -> RequestFile:
        if request not in self._open:
            if any(done["request"] == request for done in self._requests):
                raise TraceError(f"request {request} is finished and takes no more rows", where=str(self.path))
            pending = Pending(self.kv_heads, planes(self.lossless, self.with_max))
            with writing(self.path):
                path = self.partial / attention_name(request)
                self._open[request] = RequestFile(path, request, self._schema, pending)
        return self._open[request]

    def _expect(self, file: RequestFile, step: int, layer: int, mean: np.ndarray) -> None:
        """Refuse rows out of order or of the wrong shape: they are a fault of the capture."""
        place = f"request {file.request}, step {step}, layer {layer}"
        if mean.ndim != 2 or mean.shape[0] != self.kv_heads or not 0 <= layer < self.layers:
            raise TraceError(
                f"{place}: a row of shape {mean.shape}", hint=f"expected [{self.kv_heads}, positions] per layer"
            )
        if step < 0 and file.last[0] == 0 and (step, layer) not in file.seen:
            file.seen.add((step, layer))
            return
        after = (
            (file.last[0], file.last[1] + 1)
            if file.last[0] and file.last[1] + 1 < self.layers
            else (file.last[0] + 1, 0)
        )
        if (step, layer) != after:
            raise TraceError(f"{place}: out of order", hint=f"the next row is step {after[0]}, layer {after[1]}")

    def _encode(self, pending: Pending, mean: np.ndarray, peak: np.ndarray, sink: np.ndarray, place: str) -> None:
        heads, size = mean.shape
        pending.room(heads * (size + size // kernels.GAP_LIMIT + 1))
        at = pending.ends[-1]
        if self.lossless:
            status, head = kernels.check_row(mean, sink)
            end = at + mean.size
            pending.planes["w32"][at:end] = mean.ravel()
            if self.with_max:
                pending.planes["max32"][at:end] = peak.ravel()
        else:
            kept, mass = np.empty(heads, np.uint32), np.empty(heads, np.float32)
            p = pending.planes
            end, status, head = kernels.encode_row(
                mean, peak, sink, self.keep, self.min_keep, self._floor,
                p["gap_lo"], p["gap_hi"], p["w"], p.get("dmax", p["w"]), at, kept, mass,
            )  # fmt: skip
            pending.kept.append(kept)
            pending.mass.append(mass)
        if status != kernels.OK:
            raise TraceError(
                f"{place}, head {head}: {kernels.MEANING[status]}", where=str(self.path), hint="no softmax gives this"
            )
        pending.ends.append(int(end))

    def steps(self, request: int, columns: Mapping[str, Any]) -> None:
        """Columns per decode step (token, logprob, step_us, need, ...), each as long as the request's steps."""
        self._steps.setdefault(request, {}).update(columns)

    def vectors(
        self, request: int, step: int, layer: int, positions: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray
    ) -> None:
        """q, k (after rotation) and v of the tokens of one forward pass: [heads, tokens, head_dim].

        `step` is 0 for the prompt; `positions`: the position ids of the tokens.
        """
        if not self._with_vectors:
            raise TraceError("vectors were not announced", hint="open the writer with vectors=True")
        with writing(self.path):
            if request not in self._vectors:
                self._vectors[request] = VectorFile(self.partial / vectors_name(request), request, self._meta)
            self._vectors[request].add(step, layer, positions, q, k, v)

    def finish_request(
        self, request: int, *, tokens: Sequence[int], prompt_len: int, n_steps: int, **columns: Any
    ) -> None:
        """Close a request: all its rows are in. `columns` become columns of requests.parquet (None = unknown)."""
        file, prompt = self._file(request), self._prompts.pop(request, {})
        self._complete(file, prompt, prompt_len, n_steps)
        ids = np.asarray(tokens, np.int32)
        if ids.size < prompt_len + n_steps:
            raise TraceError(
                f"request {request}: {ids.size} token ids for {prompt_len} + {n_steps} tokens", where=str(self.path)
            )
        with writing(self.path):
            file.flush()
            file.parquet.close()
            self._write_prompt(request, prompt)
            if request in self._vectors:
                self._vectors.pop(request).close()
        del self._open[request]
        plain = {key: value.item() if isinstance(value, np.generic) else value for key, value in columns.items()}
        row = {"request": request, "prompt_len": int(prompt_len), "n_steps": int(n_steps), "tokens": ids}
        self._requests.append(row | plain)

    def _complete(self, file: RequestFile, prompt: Mapping[int, tuple], prompt_len: int, n_steps: int) -> None:
        """Every row and statistic that a reader will ask for is there."""
        place = f"request {file.request}"
        done = file.last[0] if file.last[1] in (-1, self.layers - 1) else f"{file.last[0] - 1} and a part"
        if done != n_steps:
            raise TraceError(f"{place}: {n_steps} decode steps announced, rows of {done} written", where=str(self.path))
        rows = max(len(file.seen) // self.layers, 1)
        if file.seen != {(-1 - i, layer) for i in range(rows) for layer in range(self.layers)}:
            raise TraceError(
                f"{place}: the last prompt rows are not complete",
                where=str(self.path),
                hint="write steps -1, -2, ... of every layer",
            )
        if file.prompts != {prompt_len}:
            raise TraceError(
                f"{place}: rows end where a prompt of {sorted(file.prompts)} tokens would put them, not {prompt_len}",
                where=str(self.path),
                hint="the row of decode step t covers positions up to prompt + t - 1",
            )
        shapes = {a.shape for stats in prompt.values() for a in stats if a is not None}
        if sorted(prompt) != list(range(self.layers)) or shapes != {(self.kv_heads, prompt_len)}:
            raise TraceError(
                f"{place}: prompt statistics are missing or of the wrong shape",
                where=str(self.path),
                hint=f"call prompt() for each of the {self.layers} layers with [{self.kv_heads}, {prompt_len}]",
            )

    def _write_prompt(self, request: int, prompt: Mapping[int, tuple]) -> None:
        names = ("colsum", "colsq", "colmax")
        keys = [("request", pa.int32()), ("layer", pa.int16()), ("head", pa.int16())]
        schema = pa.schema([*keys, *((name, pa.binary()) for name in names)], metadata=self._meta)
        lanes = [(layer, head) for layer in range(self.layers) for head in range(self.kv_heads)]
        columns: list[list] = [[request] * len(lanes), [lane[0] for lane in lanes], [lane[1] for lane in lanes]]
        for i in range(len(names)):
            columns.append([None if (a := prompt[layer][i]) is None else a[head].tobytes() for layer, head in lanes])
        if self._prefill is None:
            self._prefill = pq.ParquetWriter(self.partial / "prefill.parquet", schema, use_dictionary=False, **PARQUET)
        table = pa.table([pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema=schema)
        self._prefill.write_table(table, row_group_size=len(lanes))  # one row group per request

    # -- the end -----------------------------------------------------------------------------------------

    def _finish(self) -> None:
        if self._open or self._prefill is None:
            left = f"requests {sorted(self._open)} are not finished" if self._open else "no request was captured"
            raise TraceError(f"the trace is not complete: {left}", where=str(self.path))
        with writing(self.path):
            self._prefill.close()
            self._write_tables()
            files = sorted(self.partial.iterdir())
            hashes = {file.name: file_hash(file) for file in files}
            self.manifest |= {
                "requests": len(self._requests),
                "totals": self._totals,
                "files": {f.name: {"bytes": f.stat().st_size, "sha256": hashes[f.name]} for f in files},
                "fingerprint": fingerprint(self.partial, hashes),
            }
            text = json.dumps(self.manifest, indent=1, sort_keys=True, ensure_ascii=False)
            (self.partial / "manifest.json").write_text(text + "\n", encoding="utf-8")
            os.rename(self.partial, self.path)

    def _write_tables(self) -> None:
        self._write_table("requests.parquet", [request_table(self._requests)])
        known = {row["request"]: row["n_steps"] for row in self._requests}
        if self._steps:
            self._write_table("steps.parquet", step_tables(self._steps, known))

    def _write_table(self, name: str, tables: list[pa.Table]) -> None:
        schema = tables[0].schema.with_metadata(self._meta)
        with pq.ParquetWriter(self.partial / name, schema, **PARQUET) as file:
            for table in tables:
                file.write_table(table.replace_schema_metadata(self._meta), row_group_size=max(table.num_rows, 1))

    def _abandon(self) -> None:
        open_files = [f.parquet for f in self._open.values()] + [f.parquet for f in self._vectors.values()]
        for parquet in [*open_files, self._prefill]:
            with contextlib.suppress(OSError, pa.ArrowException):
                if parquet is not None:
                    parquet.close()
        shutil.rmtree(self.partial, ignore_errors=True)
