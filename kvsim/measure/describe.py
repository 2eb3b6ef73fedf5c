"""The manifest of a capture: which model, run how, on what. Names are those the user gave, never machine paths."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from kvsim.trace.layout import file_hash

if TYPE_CHECKING:
    from kvsim.measure.run import Run


def shown(name: str | os.PathLike) -> str:
    """A name fit for a file that travels: as typed, but of an absolute path only the last part."""
    path = Path(name)
    return path.name if path.is_absolute() else str(name)


def manifest(
    run: Run,
    name: str,
    folder: Path | None,
    tokenizer: Any,
    *,
    source: str | None,
    licence: str | None,
    seed: int,
    captured_at: str | None,
) -> dict[str, Any]:
    """Everything about a run that its rows do not say. A date is only in it if the caller gave one."""
    s = run.settings
    facts: dict[str, Any] = {
        "name": name,
        "heads": "query" if s.heads == "query" else "kv",
        "reduction": {"mean": ["mean"], "max": ["mean", "max"], "query": []}[s.heads],
        "model": model_facts(run.model, name, run.features, folder, tokenizer),
        "attention": {"seen_through": run.via, "weights": "softmax in float32", "timed_with": run.plain},
        "sampling": {
            "mode": s.mode,
            "method": "greedy" if s.mode == "free" else "forced",
            "seed": seed,
            "max_new_tokens": s.max_new_tokens,
            "stop_tokens": sorted(run.eos),
        },
        "batch": {"size": s.batch_size, "padding": "left"},
        "prompt_rows": "all" if s.prompt_rows is None else s.prompt_rows,
        "prompts": {"source": source, "licence": licence, "count": len(run.prompts)},
        "hardware": machine_facts(run.device),
    }
    if s.vectors:
        facts["rotary"] = rotary(run.model)
    return facts | ({"captured_at": captured_at} if captured_at else {})


def model_facts(model: Any, name: str, features: dict[int, dict], folder: Path | None, tokenizer: Any) -> dict:
    """The model: configuration, sizes, hashes, and per layer what attention turned out to use."""
    config = json.loads(model.config.to_json_string(use_diff=False))
    config["_name_or_path"] = name
    text = model.config.get_text_config()
    first = features[min(features)]
    weight = next(p for p in model.parameters() if p.is_floating_point())
    return {
        "name": name,
        "architecture": type(model).__name__,
        "config": config,
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights_sha256": weights_hash(model, folder),
        "tokenizer": tokenizer and {"kind": type(tokenizer).__name__, "sha256": tokenizer_hash(tokenizer)},
        "dtype": str(weight.dtype).removeprefix("torch."),
        "cache_dtype": str(weight.dtype).removeprefix("torch."),
        "kv_bytes": weight.element_size(),
        "group": first["query_heads"] // first["kv_heads"],
        "head_dim": first["head_dim"],
        "hidden": getattr(text, "hidden_size", 0),
        "intermediate": getattr(text, "intermediate_size", None) or 0,
        "vocab": text.vocab_size,
        "layer_kinds": [
            {"layer": layer, "kind": "sliding" if f["window"] else "full", "window": f["window"]}
            for layer, f in sorted(features.items())
        ],
        "softcap": first["softcap"],
        "sinks": any(f["sinks"] for f in features.values()),
    }


def rotary(model: Any) -> list[dict[str, Any]]:
    """Inverse frequencies of the rotary embeddings, with which stored keys and queries can be unrotated."""
    found = []
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq") and not name.endswith("original_inv_freq"):
            owner = model.get_submodule(name.rpartition(".")[0])
            scaling = float(getattr(owner, "attention_scaling", 1.0))
            found.append({"name": name, "inv_freq": buffer.float().tolist(), "attention_scaling": scaling})
    return found


def weights_hash(model: Any, folder: Path | None) -> str:
    """SHA-256 of the one safetensors file, of "name hash" lines for several, of the state dict where there is none."""
    files = sorted(folder.glob("*.safetensors")) if folder else []
    if len(files) == 1:
        return file_hash(files[0])
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {file_hash(file)}\n".encode())
    for name, tensor in sorted(model.state_dict().items()) if not files else ():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of the tokenizer's whole definition, or of its vocabulary where it cannot be written as text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def machine_facts(device: torch.device) -> dict[str, Any]:
    """Device and library versions; no host name, no date."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
        "device_type": device.type,
        "threads": None if cuda else torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "transformers": transformers.__version__,
        "kvsim": _kvsim_version(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _kvsim_version() -> str:
    try:
        return importlib.metadata.version("kvsim")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
