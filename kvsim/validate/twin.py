"""`validate_trace`: the steps a captured run really took, against the simulation of the same request.

Every captured run has a twin without capture whose steps were timed. The twin kept its whole cache in a framework that
submits kernel by kernel, so that is what is simulated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvsim import __version__
from kvsim.errors import TraceError
from kvsim.machine import Hardware, ModelShape, Work, shape_from_config
from kvsim.measure.machine_info import slug
from kvsim.results import digest
from kvsim.trace.access import Source, Trace
from kvsim.validate.predict import eager, simulate
from kvsim.validate.rows import check_device, described

FEW = 8  # steps, below which quarters say nothing


@dataclass(frozen=True, eq=False)
class Batch:
    """Requests that were run together, padded on the left to one context. Arrays are float64 [steps]."""

    number: int
    requests: list[int]
    context: np.ndarray  # tokens that a step attends to, padding included
    measured_s: np.ndarray
    captured_s: np.ndarray  # of the run with capture; nan where it was not kept
    predicted_s: np.ndarray

    @property
    def title(self) -> str:
        ids = self.requests
        return f"request {ids[0]}" if len(ids) == 1 else f"requests {ids[0]} to {ids[-1]}"

    @property
    def error(self) -> np.ndarray:
        """Signed relative error of each step."""
        return self.predicted_s / self.measured_s - 1.0

    def lines(self) -> Iterator[dict[str, Any]]:
        """One mapping per step."""
        for i in range(len(self.context)):
            yield {
                "batch": self.number,
                "step": i + 1,
                "context": int(self.context[i]),
                "sequences": len(self.requests),
                "measured_s": float(self.measured_s[i]),
                "captured_s": float(self.captured_s[i]),
                "predicted_s": float(self.predicted_s[i]),
                "error": float(self.error[i]),
            }

    def summary(self) -> dict[str, Any]:
        """Medians, errors over the steps, the measurement's own noise, and drift in seconds per token of context."""
        low, middle, high = np.quantile(self.measured_s, [0.1, 0.5, 0.9]).tolist()
        predicted = float(np.median(self.predicted_s))
        return {
            "batch": self.number,
            "requests": ", ".join(map(str, self.requests)),
            "sequences": len(self.requests),
            "first_context": int(self.context[0]),
            "last_context": int(self.context[-1]),
            "steps": len(self.context),
            "measured_s": middle,
            "predicted_s": predicted,
            "signed": float(self.error.mean()),
            "mape": float(np.abs(self.error).mean()),
            "median_error": predicted / middle - 1.0,
            "noise": (high - low) / middle,
            "drift_measured": self._drift(self.measured_s),
            "drift_predicted": self._drift(self.predicted_s),
        }

    def _drift(self, seconds: np.ndarray) -> float:
        quarter = len(seconds) // 4
        if len(seconds) < FEW:
            return float("nan")
        first, last = (np.median([x[:quarter], x[-quarter:]], axis=1) for x in (seconds, self.context))
        return float((first[1] - first[0]) / (last[1] - last[0]))


@dataclass(frozen=True)
class TwinValidation:
    """A captured run's own steps beside their simulation."""

    batches: list[Batch]
    facts: dict[str, Any]
    warnings: list[str]

    @property
    def id(self) -> str:
        """A name made of everything that decides the result."""
        times = [[x.tolist() for x in (b.measured_s, b.captured_s)] for b in self.batches]  # of which no trace is made
        return digest({"times": times, **{name: self.facts[name] for name in ("trace", "hardware", "kvsim")}})[:16]

    def save(self, folder: str | Path) -> Path:
        """Write steps.parquet, batches.parquet, report.md, a figure and manifest.json, whole or not at all."""
        from kvsim.validate.files import save_twin

        return save_twin(self, Path(folder))


def validate_trace(trace: Trace, hardware: Hardware, *, any_device: bool = False) -> TwinValidation:
    """Compare each step of the captured run's twin with its simulation on `hardware`.

    `any_device`: hardware of another device than the run's is a warning, not an error. Raises TraceError for a trace
    without step times or without what is needed to time its model, ConfigError for hardware of another device.
    """
    run = _run_facts(trace)
    device = run.pop("device")
    warnings = check_device(hardware, device, any_device)
    if run["attention"] not in (None, "sdpa"):
        warnings.append(f"the run used {run['attention']} attention; the simulation reads keys and values as sdpa does")
    shape = _shape(trace)
    machine = eager(hardware, run["in_line"])
    batches = [_batch(i, sources, shape, machine) for i, sources in enumerate(_together(trace.sources))]
    facts = {
        "device": device,
        "run": run,
        "trace": {"name": trace.name, "fingerprint": trace.fingerprint},
        "hardware": described(hardware),
        "kvsim": __version__,
    }
    if beyond := _outside(hardware, shape, batches):
        warnings.append(f"extrapolated: {'; '.join(beyond)}")
    for batch in batches:
        if (noise := batch.summary()["noise"]) > 1:
            warnings.append(
                f"{batch.title}: measured steps spread over {noise:.0%} of their median: they judge no model"
            )
    return TwinValidation(batches, facts, warnings)


def _run_facts(trace: Trace) -> dict[str, Any]:
    """What ran the twin on what, from the manifest. Raises TraceError where it does not say."""
    m = trace.manifest
    machine, model = m.get("hardware") or {}, m.get("model") or {}
    if not machine.get("device") or "transformers" not in machine:
        what = "the trace does not say which device and framework ran its model"
        raise TraceError(what, where=trace.path, hint="kvsim capture writes that")
    cpu = machine.get("device_type") == "cpu"
    return {
        "device": slug(f"cpu {machine['device']}" if cpu else machine["device"]),
        "in_line": cpu,
        "model": model.get("name", trace.name),
        "dtype": model.get("dtype"),
        "attention": (m.get("attention") or {}).get("timed_with"),
        "date": m.get("captured_at"),
        **{name: machine.get(name) for name in ("torch", "transformers", "threads", "cuda", "driver", "kvsim")},
    }


def _shape(trace: Trace) -> ModelShape:
    """The model that ran. Raises ConfigError where the trace does not say enough."""
    model = trace.manifest.get("model") or {}
    config = dict(model.get("config") or {})
    if model.get("dtype"):
        config["dtype"] = model["dtype"]
    return shape_from_config(config)


def _together(sources: Sequence[Source]) -> Iterator[list[Source]]:
    """Requests in the batches in which they ran: a batch begins where the slot is 0 again."""
    batch: list[Source] = []
    for source in sources:
        if "step_seconds" not in source.facts:
            hint = "capture it again: kvsim capture times every run without capture, too"
            raise TraceError(f"request {source.id} has no step times", hint=hint)
        if batch and not source.facts.get("batch_slot", 0):
            yield batch
            batch = []
        batch.append(source)
    if batch:
        yield batch


def _batch(number: int, sources: Sequence[Source], shape: ModelShape, machine: Hardware) -> Batch:
    longest = max(sources, key=lambda s: s.output_tokens)  # a finished request is fed on until the last one ends
    width = max(source.prompt_tokens for source in sources)
    context = width + np.arange(1, longest.output_tokens + 1)
    captured = longest.facts.get("captured_step_seconds", np.full(len(context), np.nan))
    works = [_work(shape, len(sources), int(tokens)) for tokens in context]
    records = simulate(machine, shape, works, machine.gpu.eager_kv_passes)
    predicted = np.array([record.end_s - record.start_s for record in records])
    measured = np.asarray(longest.facts["step_seconds"], float)
    return Batch(number, [s.id for s in sources], context, measured, np.asarray(captured, float), predicted)


def _work(shape: ModelShape, sequences: int, context: int) -> Work:
    read = sequences * context * shape.kv_token_bytes
    return Work.idle(shape.layers, queries=sequences, sequences=sequences, kv_read=read)


def _outside(hardware: Hardware, shape: ModelShape, batches: Sequence[Batch]) -> list[str]:
    """What lies outside of the range in which the hardware was measured."""
    found = []
    for b in batches:
        sequences = len(b.requests)
        for context in (b.context[0], b.context[-1]):
            kv_bytes = sequences * float(context) * shape.kv_token_bytes
            found += hardware.outside("attention", sequences=sequences, kv_bytes=kv_bytes)
        for parameters in shape.gemms:
            found += hardware.outside("gemm", parameters=parameters, rows=sequences)
    return list(dict.fromkeys(found))
