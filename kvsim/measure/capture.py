"""`capture`: run a model over prompts and write the attention it computed as a trace.

Every batch runs twice: once with the recorder in place, and once more, fed the same tokens, without it; the
step times of the second run are the ones to believe.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvsim.measure import CaptureError, require
from kvsim.measure.prompts import Prompt, read_prompts, read_spans, with_spans

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def capture(
    model: Any,
    prompts: str | os.PathLike | Sequence[Prompt],
    out: str | os.PathLike,
    *,
    tokenizer: Any = None,
    mode: str = "free",
    max_new_tokens: int | None = None,
    batch_size: int = 1,
    device: str | None = None,
    dtype: str | None = None,
    heads: str = "mean",
    prompt_rows: int | str = 64,
    vectors: bool = False,
    spans: str | os.PathLike | None = None,
    keep: float = 1.0,
    lossless: bool = False,
    seed: int = 0,
    name: str | None = None,
    source: str | None = None,
    licence: str | None = None,
    captured_at: str | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Path:
    """Capture `prompts` on `model` into the new trace directory `out`; returns its path.

    `model`: a Hugging Face causal language model: local folder, name, or loaded.
    `prompts`: a file for `read_prompts`, or Prompts (`task_prompts` makes some).
    `mode`: "free" generates greedily until a stop token or `max_new_tokens` (None: as many as the known
    continuation has, else 256); "forced" feeds the tokens that follow each prompt, at most `max_new_tokens`.
    `heads`: "mean" over the query heads of a KV head; "max" adds the group's largest weight; "query" reduces nothing.
    `prompt_rows`: how many of the last prompt rows are stored, or "all". `vectors`: store q, k and v too.
    `spans`: a file for `read_spans`. `keep`, `lossless`: as in `TraceWriter`.
    `name`, `source`, `licence`, `captured_at`, `seed`: noted in the manifest.
    `progress(done, total, what)` is told about decode steps.

    Raises ConfigError (CaptureError for what cannot be captured) and TraceError; nothing is left under `out` then.
    """
    torch = require("torch")
    require("transformers")
    from kvsim.measure.describe import manifest, shown
    from kvsim.measure.run import Run, Settings

    if prompt_rows != "all" and not str(prompt_rows).isdigit():
        raise CaptureError(f'prompt rows of "{prompt_rows}"', hint='write a number, or "all"')
    rows = None if prompt_rows == "all" else int(prompt_rows)
    settings = Settings(mode, max_new_tokens, batch_size, heads, rows, vectors)
    named = isinstance(model, (str, os.PathLike))
    label = shown(name or (model if named else type(model).__name__))
    folder = None
    if named:
        model, tokenizer, folder = load_model(model, device=device, dtype=dtype, tokenizer=tokenizer)
    else:
        model = model.to(**_place(device, dtype))
    if isinstance(prompts, (str, os.PathLike)):
        source = source or str(prompts)
        prompts = read_prompts(prompts, tokenizer)
    if spans is not None:
        prompts = with_spans(prompts, read_spans(spans))

    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            run = Run(model, prompts, settings, progress)
            facts = manifest(
                run,
                label,
                folder,
                tokenizer,
                source=source and shown(source),
                licence=licence,
                seed=seed,
                captured_at=captured_at,
            )
            run.write(Path(out), facts, keep, lossless)
    finally:
        model.train(training)
    return Path(out)


def load_model(
    name: str | os.PathLike, *, device: str | None = None, dtype: str | None = None, tokenizer: Any = None
) -> tuple[Any, Any, Path | None]:
    """(model, tokenizer or None, folder of the weights or None) from a local folder or a Hugging Face name."""
    transformers = require("transformers")
    local = Path(name).is_dir()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(name, **{"dtype": "auto"} | _place(None, dtype))
        folder = Path(name) if local else _cached(model)
        if tokenizer is None and (folder is None or any((folder / f).is_file() for f in _TOKENIZER_FILES)):
            tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as e:
        first = str(e).strip().split("\n")[0]
        hint = "give a folder with config.json and weights, or the name of a causal language model"
        raise CaptureError(f"the model cannot be loaded: {first}", where=str(name), hint=hint) from e
    return model.to(**_place(device, None)), tokenizer, folder


def _cached(model: Any) -> Path | None:
    """Where the files of a named model lie after loading."""
    hub = require("huggingface_hub")
    try:
        revision = getattr(model.config, "_commit_hash", None)
        return Path(hub.snapshot_download(model.config._name_or_path, revision=revision, local_files_only=True))
    except (OSError, ValueError):
        return None


def _place(device: str | None, dtype: str | None) -> dict[str, Any]:
    """Arguments of `Module.to` for what was asked."""
    torch = require("torch")
    kind = dtype and getattr(torch, dtype, None)
    if dtype and not (isinstance(kind, torch.dtype) and kind.is_floating_point):
        raise CaptureError(f'unknown number type "{dtype}"', hint='use "float32", "bfloat16" or "float16"')
    if device and device.startswith("cuda") and not torch.cuda.is_available():
        raise CaptureError(f'no device "{device}": torch sees no CUDA GPU', hint='use device "cpu"')
    return {key: value for key, value in (("device", device), ("dtype", kind)) if value}
