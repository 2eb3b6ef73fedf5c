"""What capturing costs a decode step, and whether what it captures is what eager attention computes."""

from __future__ import annotations

import contextlib
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvsim.measure import require
from kvsim.measure.bare import Shape
from kvsim.measure.hf import Row, decode_steps, filled_cache, model_of, params_of

if TYPE_CHECKING:
    import torch

MODES = ("plain", "captured", "weights")  # SDPA; SDPA and the recorder; eager attention that returns its weights


def run_cost(
    model: Any, shape: Shape, sequences: int, context: int, mode: str, *, steps: int = 20, warm_up: int = 4
) -> Row:
    """A row of decode steps in one of MODES. Rows are taken from the recorder each step, and not encoded or written."""
    cache = filled_cache(model, shape, sequences, context)
    with _mode(model, mode) as asked:
        found = decode_steps(model, cache, sequences, warm_up + steps, **asked).after(warm_up)
    params = params_of("hf-decode", shape, sequences, context, mode=mode)
    return {"phase": "capture-cost", "kind": mode, "params": params, **found.times()}


def run_comparison(shape: Shape, device: torch.device | str, context: int, *, steps: int = 2) -> Row:
    """A row that says how far captured rows are from eager's weights, on two float32 layers of a shape.

    `worst_difference`: largest |captured - eager| of a weight averaged over its group; `ms`: the captured steps.
    """
    from kvsim.measure.hooks import watching
    from kvsim.measure.recorder import Recorder

    torch = require("torch")
    slim = replace(shape, layers=2, vocab=min(shape.vocab, 1024), value_bytes=4)
    model, recorder = model_of(slim, device), Recorder()
    rows: list[Any] = []
    with watching(model, recorder):
        cache = filled_cache(model, slim, 1, context)
        found = decode_steps(model, cache, 1, steps, after=lambda: rows.extend(recorder.take()))
    model.set_attn_implementation("eager")
    wanted: list[Any] = []
    cache, token = filled_cache(model, slim, 1, context), torch.zeros(1, 1, dtype=torch.long, device=device)
    with torch.no_grad():
        for _ in range(steps):
            out = model(input_ids=token, past_key_values=cache, use_cache=True, output_attentions=True)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            wanted.extend(w.unflatten(1, (slim.kv_heads, -1))[:, :, :, 0].mean(2) for w in out.attentions)
    worst = max(float((a.mean - b).abs().max()) for a, b in zip(rows, wanted, strict=True))
    params = params_of("hf-decode", slim, 1, context, mode="captured", worst_difference=worst)
    return {"phase": "capture-cost", "kind": "comparison", "params": params, **found.times()}


def run_trace(model: Any, shape: Shape, path: Path, *, prompt: int = 384, steps: int = 48, seed: int = 0) -> Row:
    """Capture a short forced run, with its twin without capture, into the tar file `path`.

    The row's `ms` are the twin's steps. Random weights attend nearly evenly, so nearly every weight is stored: the file
    takes about 2 bytes per step, layer, KV head and position.
    """
    from kvsim.measure.capture import capture
    from kvsim.measure.prompts import Prompt
    from kvsim.trace import open_trace

    tokens = np.random.default_rng(seed).integers(0, shape.vocab, prompt + steps + 1).astype(np.int32)
    with tempfile.TemporaryDirectory() as folder:
        trace = capture(
            model,
            [Prompt(tokens, prompt)],
            Path(folder) / f"{shape.name}.kvtrace",
            mode="forced",
            prompt_rows=1,
            name=f"{shape.name}, random weights",
            source="random tokens",
            seed=seed,
        )
        with tarfile.open(path, "w") as tar:
            tar.add(trace, arcname=trace.name)
        seconds = open_trace(trace).sources[0].facts["step_seconds"]
    params = params_of("hf-decode", shape, 1, prompt, mode="plain", file=path.name, bytes=path.stat().st_size)
    return {"phase": "capture-cost", "kind": "trace", "params": params, "ms": (seconds * 1e3).tolist()}


@contextlib.contextmanager
def _mode(model: Any, mode: str) -> Iterator[dict[str, Any]]:
    """While inside, the model runs in this mode; yields what to ask of `decode_steps`."""
    from kvsim.measure.hooks import watching
    from kvsim.measure.recorder import Recorder

    if mode == "captured":
        with watching(model, recorder := Recorder()):
            yield {"after": recorder.take}
        return
    before = model.config._attn_implementation
    model.set_attn_implementation("eager" if mode == "weights" else "sdpa")
    try:
        yield {"output_attentions": True} if mode == "weights" else {}
    finally:
        model.set_attn_implementation(before)
