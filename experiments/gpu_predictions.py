"""Predict every row of the GPU campaign before it is measured, and write that down.

    python -m experiments.gpu_predictions          # writes experiments/gpu/predictions.json

The points are those of `experiments/gpu_campaign.py --list`. A point's row is made as the campaign makes it, but for
the times, and predicted as `kvsim validate --rows` predicts it, from the hardware file that is shipped for the device:
public numbers, no calibration. Points of the calibration are predicted by the forms their constants are fitted with.
The same files give the same bytes. A device with rows in experiments/gpu/results keeps what was registered for it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from experiments import gpu_campaign as campaign
from kvsim.errors import ConfigError, KvsimError
from kvsim.machine import Hardware
from kvsim.machine.fit import DECODE, GEMM, PREFILL
from kvsim.machine.fit_moves import host_form, link_form
from kvsim.measure import hf, overhead, probes
from kvsim.measure.bare import Shape
from kvsim.measure.executor import Executor
from kvsim.measure.machine_info import slug
from kvsim.measure.rows import device_of, read_rows
from kvsim.measure.schedule import DEFAULT, Schedule
from kvsim.plan import Moves
from kvsim.trace.layout import file_hash
from kvsim.validate import Split, read_split
from kvsim.validate.cases import case_of
from kvsim.validate.predict import predict
from kvsim.validate.registered import Registered, Registration, read_registration

HERE = Path(__file__).resolve().parent / "gpu"
SHIPPED = HERE.parent.parent / "kvsim" / "hardware"
DEVICES = ("nvidia-h100-80gb-hbm3", "nvidia-h200")  # as keys of rows begin: what may be lent
DIGITS = 5
STEPS = ("resident", "offload", "ssd", "capture-cost")  # phases whose rows are steps of a model

Row = dict[str, Any]


# -- rows that are not measured ------------------------------------------------------------------------------------


class Unmeasured(Executor):
    """An executor of nothing but sizes: its rows say what would be done, and have no times."""

    def __init__(self, device: object, shape: Shape, sequences: int, context: int, page: int = 16, **_: object):
        self.shape, self.page = shape, page
        self.model: Any = SimpleNamespace(sequences=sequences, context=context)
        self.pages, self.page_bytes = sequences * context // page, page * shape.token_bytes

    @property
    def _disk(self) -> Any:
        return SimpleNamespace(direct=True)

    def run(
        self,
        moves: Sequence[Sequence[Moves]],
        schedule: Schedule = DEFAULT,
        *,
        steps: int = 20,
        warm_up: int = 5,
        **facts: Any,
    ) -> Row:
        copies = [np.array([sum(map(len, self._spans_in(m, schedule))) for m in step]) for step in moves]
        turns = [i % len(moves) for i in range(warm_up, warm_up + steps)]
        params = self._params([moves[i] for i in turns], "layer", schedule, [copies[i] for i in turns])
        return {"params": {**params, **facts}, "ms": []}

    def run_whole(self, **_: Any) -> Row:
        return {"params": self._params([[campaign.loads([])] * self.shape.layers], "step"), "ms": []}


# What measures a step of transformers: the implementation, and what it calls the context.
FRAMEWORK: dict[Callable[..., Row], tuple[str, str]] = {
    hf.run_decode: ("hf-decode", "context"),
    hf.run_prefill: ("hf-prefill", "queries"),
    hf.run_offloaded: ("hf-offloaded", "context"),
    overhead.run_cost: ("hf-decode", "context"),
}


def row_of(point: campaign.Point) -> Row | None:
    """The row of a step as the campaign would write it, without times; None for what is no step the model knows."""
    measure: Any = point.measure
    if point.heavy.name.startswith("executor "):
        make: Any = point.heavy.make
        return measure(Unmeasured(*make.args, **make.keywords))
    impl, context = FRAMEWORK.get(getattr(measure, "func", None), (None, ""))
    given = getattr(measure, "keywords", {})
    if impl is None or given.get("mode", "plain") != "plain":
        return None
    return {"params": hf.params_of(impl, given["shape"], given["sequences"], given[context]), "ms": []}


# -- predictions, in seconds ---------------------------------------------------------------------------------------


def step_seconds(key: str, row: Row, hardware: Hardware) -> float:
    """A step, as `kvsim validate --rows` predicts it."""
    return predict(case_of({**row, "key": key}), hardware).seconds


def constant_seconds(kind: str, p: Row, hardware: Hardware) -> float | None:
    """A point of the calibration, by the form its constants are fitted with; None where no form gives its time."""
    gpu, host = hardware.gpu, hardware.host
    if kind in ("gemm", "attention", "prefill"):
        form = {"gemm": GEMM, "attention": DECODE, "prefill": PREFILL}[kind]
        counts = {**p, "context": p["queries"]} if kind == "prefill" else p
        return form.predict(gpu, {name: np.array([float(n)]) for name, n in counts.items()}).item()
    if kind in ("copy", "chunks", "duplex"):
        link = hardware.h2d if p["path"].startswith("h2d") else hardware.d2h
        pinned = p["path"].endswith("pinned")
        rates = {"latency": link.latency, "per_copy": link.per_copy}
        rates["bandwidth"] = link.bandwidth if pinned else link.pageable_bandwidth
        copies = p.get("n", 1)
        seconds = float(link_form(rates, copies, p["chunk"] * copies if kind == "chunks" else p["bytes"]))
        return seconds / link.duplex if kind == "duplex" else seconds
    if kind == "host_copy":
        rates = {"thread_bandwidth": host.thread_bandwidth, "bandwidth": host.bandwidth}
        return float(host_form(rates, np.array(p["threads"]), np.array(p["bytes"])))
    if kind == "small":
        return gpu.step_sync if p["kind"] == "sample" else gpu.kernel_time
    return None


REASONS = {
    "info/*": "a fact, or a test that something works",
    "sentinel/*": "shows whether the device keeps its speed",
    "error/*": "says what failed",
    "train/*": "takes the time that is left",
    "text/*": "takes the time that is left",
    "closed-loop/*": "counts right answers; its time is of no interest",
    "calibrate/memory/*": "a copy within the device; the model streams weights and keys, each at its own rate",
    "calibrate/launch/*": "constants are differences of these rows",
    "calibrate/contention/*": "the constant is the ratio of its two times",
    "calibrate/pin/*": "pinning is not modelled: it is done before anything runs",
    "calibrate/host_copy/*": "a number of threads that the lent machines were not known to have",
    "calibrate/ssd/*": "the drive of the hardware file is not the lent machine's, of which nothing is known",
    "capture-cost/*/comparison": "a check of content",
    "capture-cost/*/captured": "what capturing adds is not modelled",
    "capture-cost/*/weights": "eager attention that returns its weights is not modelled",
    "capture-cost/*/trace": "its steps are judged by kvsim validate TRACE",
}


# -- all of them ---------------------------------------------------------------------------------------------------


def registered(c: campaign.Campaign, hardware: Hardware, sha256: str, split: Split) -> Registered:
    """The predictions of every point of an opened campaign that measures nothing."""
    device, groups = c.bench.slug, {}
    for key, seconds in _predicted(c, hardware):
        ms = float(f"{1e3 * seconds:.{DIGITS}g}")
        groups.setdefault(group_of(key, split), {})[key.partition("/")[2]] = ms
    source = {"name": hardware.name, "sha256": sha256}
    return Registered(device, source, split.fingerprint, dict(sorted(groups.items())), REASONS)


def group_of(key: str, split: Split) -> str:
    """A held-out row's group is its split's; of the others phase and what was measured."""
    return split.groups_of(key)[0] if split.is_held_out(key) else "/".join(key.split("/")[1:3])


def _predicted(c: campaign.Campaign, hardware: Hardware) -> Iterator[tuple[str, float]]:
    for probe in probes.points(c.bench, c.grid):
        seconds = constant_seconds(probe.kind, probe.params, hardware)
        if seconds is not None:
            yield probe.key(c.bench.slug), seconds
    for phase in STEPS:
        for point in campaign.PHASES[phase](c):
            if row := row_of(point):
                yield c.key(point.key), step_seconds(c.key(point.key), row, hardware)


def hardware_of(device: str) -> Path:
    """The one shipped file of public numbers that describes the device."""
    found = []
    for path in sorted(SHIPPED.glob("*.toml")):
        hardware = Hardware.load(path)
        if hardware.fit is None and slug(hardware.description).startswith(device):
            found.append(path)
    if len(found) != 1:
        what = f"{len(found)} shipped hardware files describe {device}"
        raise ConfigError(what, where=str(SHIPPED), hint="their descriptions begin with the device's name")
    return found[0]


def predictions(devices: Sequence[str] = DEVICES, plans: Path = HERE / "plans") -> Registration:
    """What the shipped hardware files say of the campaign on each device."""
    split, found = read_split(HERE / "split.toml"), {}
    for device in devices:
        path = hardware_of(device)
        with ExitStack() as stack:
            c = campaign.Campaign(campaign.arguments(["--list", device, "--plans", str(plans), "--resume"]))
            c.open(stack)
            found[device] = registered(c, Hardware.load(path), file_hash(path), split)
    return Registration(found)


def measured_devices(results: Path) -> set[str]:
    """Devices with rows below a folder."""
    return {device_of(rows) for path in sorted(results.rglob("*.jsonl")) if (rows := read_rows([path]))}


def main(argv: Sequence[str] | None = None) -> int:
    """Register what is not measured yet; 0, or 2 for files that are not what they should be."""
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--out", type=Path, default=HERE / "predictions.json")
    ap.add_argument(
        "--results", type=Path, default=HERE / "results", help="devices with rows here are kept as they are"
    )
    args = ap.parse_args(argv)
    try:
        frozen = measured_devices(args.results)
        made = predictions([device for device in DEVICES if device not in frozen]).devices
        before = read_registration(args.out).devices if args.out.exists() else {}
        for device in sorted(frozen):
            print(
                f"{device} is measured: {'what was registered stays' if device in before else 'too late to register'}"
            )
        kept = {device: entry for device, entry in before.items() if device in frozen}
        Registration({**kept, **made}).save(args.out)
    except KvsimError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for device, entry in made.items():
        print(f"{device}: {len(entry.by_key)} rows predicted from {entry.hardware['name']}")
    print(f"{args.out}: SHA-256 {file_hash(args.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
