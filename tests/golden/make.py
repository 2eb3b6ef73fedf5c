"""Five small runs whose numbers are frozen. `make golden` rewrites them.

The difference is reviewed and goes into CHANGELOG.md.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from kvsim.simulate import run
from kvsim.trace.synthetic import synthetic_trace

FOLDER = Path(__file__).parent
SIZES = {"hidden": 256, "intermediate": 768, "vocab": 1000, "name": "golden"}
RUNS = {
    "lossy-h2o": {"policy": "h2o", "budget": "25%"},
    "lossy-lazy-eviction": {"policy": "lazy-eviction(window=8)", "budget": "40%", "page_size": 4},
    "offload-lru-dense": {
        "policy": "lru",
        "budget": "50%",
        "regime": "offload",
        "page_size": 8,
        "model": "llama-3.1-8b",
    },
    "offload-tova-topk": {
        "policy": "tova",
        "budget": "30",
        "regime": "offload",
        "demand": "topk(16)",
        "page_size": 2,
        "concurrency": 2,
        "model": "llama-3.1-8b",
        "hardware": "rtx4090-pcie4",
    },
    "offload-belady-ssd": {
        "policy": "belady",
        "budget": "20%",
        "regime": "offload",
        "demand": "theta",
        "page_size": 4,
        "host": "60kB",
        "ssd": "1MB",
    },
}


def results() -> dict[str, dict]:
    """Name -> summary and number of SimPy events of each frozen run."""
    trace = synthetic_trace(requests=2, prompt=48, steps=64, layers=2, kv_heads=2, seed=11)
    trace = replace(trace, geometry=replace(trace.geometry, **SIZES))
    out = {}
    for name, settings in RUNS.items():
        result = run(trace, **settings)
        out[name] = {"events": result.manifest["events"], **result.summary}
    return out


if __name__ == "__main__":
    for name, summary in results().items():
        (FOLDER / f"{name}.json").write_text(json.dumps(summary, indent=1, sort_keys=True) + "\n")
        print(name, summary["recall"], summary["tpot_p50_s"])
