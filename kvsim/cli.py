"""The command line: each command is a few lines over the public API; everything heavy loads on first use."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvsim.errors import ConfigError, KvsimError

if TYPE_CHECKING:
    from kvsim.report import Comparison
    from kvsim.results import Result
    from kvsim.trace.access import Trace

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Replay real attention through a simulated memory hierarchy, against published cache policies.\n\n"
    "Example: kvsim run demo --policy h2o --budget 20%",
)
trace_app = typer.Typer(no_args_is_help=True, help="Look at, export and check traces.", rich_markup_mode=None)
app.add_typer(trace_app, name="trace")

TraceArg = Annotated[
    str, typer.Argument(metavar="TRACE", help='A .kvtrace folder, or "demo" for the one that comes with kvsim.')
]
Out = Annotated[Path | None, typer.Option("-o", "--output", help="Where to write.")]


def main() -> None:
    """Entry point: errors of input end in three lines and exit code 2, an interrupt in 130."""
    debug = "--debug" in sys.argv
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    try:
        code = app(args=arguments, standalone_mode=False)
    except KvsimError as error:
        if debug:
            raise
        code = 2
        _fail(error)
    except KeyboardInterrupt:
        code = 130
        typer.echo("interrupted; nothing is left half-written", err=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except typer.Exit as stop:
        code = stop.exit_code
    except Exception as error:  # usage errors are click's, which typer may carry with it
        if hasattr(error, "show") and hasattr(error, "exit_code"):
            error.show()
            code = 2
        elif type(error).__name__ == "Abort":
            code = 130
        else:
            raise
    sys.exit(code or 0)


def _fail(error: KvsimError) -> None:
    typer.echo(f"error: {error.what}", err=True)
    for line in (error.where and f"in {error.where}", error.hint):
        if line:
            typer.echo(f"  {line}", err=True)


@app.command()
def run(
    trace: Annotated[str | None, typer.Argument(metavar="TRACE", help='A .kvtrace folder, or "demo".')] = None,
    policy: Annotated[
        str | None, typer.Option(help="A policy, a file.py, or either with parameters: 'h2o(recent=64)'.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="20% of the final length, 512 pages per lane, or 4GiB for each request.")
    ] = None,
    regime: Annotated[
        str | None, typer.Option(help="lossy: evicted pages are gone. offload: they move one tier down.")
    ] = None,
    offload: Annotated[str | None, typer.Option(help="Where victims go: drop, spill, or your own.")] = None,
    demand: Annotated[str | None, typer.Option(help="Offload: dense, theta, theta(0.01), topk(64) or select.")] = None,
    use: Annotated[
        str | None, typer.Option(help="A page is used from this share of an equal weight, or weight(1e-4).")
    ] = None,
    page_size: Annotated[int | None, typer.Option(help="Tokens per page; 1 in lossy, 16 in offload.")] = None,
    granularity: Annotated[str | None, typer.Option(help="One decision per head, layer or token.")] = None,
    hardware: Annotated[
        str | None, typer.Option(help="A shipped machine or a TOML file; see `kvsim list hardware`.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Time it as this model: a name or a Hugging Face config.json.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Host memory for pages, such as 64GiB.")] = None,
    ssd: Annotated[str | None, typer.Option(help="SSD space for pages, such as 1TB.")] = None,
    overlap: Annotated[str | None, typer.Option(help="Copies beside compute: layer, step or none.")] = None,
    concurrency: Annotated[int | None, typer.Option(help="Requests replayed together on one GPU.")] = None,
    request: Annotated[list[int] | None, typer.Option(help="Only these requests (repeatable).")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of random policies.")] = None,
    config: Annotated[Path | None, typer.Option(help="A TOML file with the same keys; flags win.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE, also hardware.link.h2d.bandwidth=50GB/s.")
    ] = None,
    references: Annotated[
        bool, typer.Option(help="Also replay LRU, random and the oracles, and give a verdict.")
    ] = True,
    export_plan: Annotated[
        Path | None, typer.Option(help="Also write which pages move when, as a Parquet file that can be performed.")
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Print the resolved configuration and stop.")] = False,
    output: Out = None,
) -> None:
    """Replay a trace against one policy on one machine.

    Example: kvsim run demo --policy h2o --budget 20% --hardware a100-pcie4
    """
    from kvsim.config import parse_settings, read_toml, run_config

    flags = {
        "policy": policy, "budget": budget, "regime": regime, "offload": offload, "demand": demand, "use": use,
        "page_size": page_size,
        "granularity": granularity, "hardware": hardware, "model": model, "host": host, "ssd": ssd, "overlap": overlap,
        "concurrency": concurrency, "requests": request, "seed": seed,
    }  # fmt: skip
    values: dict[str, Any] = read_toml(config) if config else {}
    name = trace or values.pop("trace", None)
    values.pop("trace", None), values.pop("name", None)
    if name is None:
        raise ConfigError("no trace was given", hint='give a .kvtrace folder, or "demo"')
    values |= parse_settings(settings or [])
    values |= {k: v for k, v in flags.items() if v is not None}
    chosen = run_config(values, where=str(config) if config else None)
    if dry_run:
        import tomli_w

        keys = {k: v for k, v in chosen.resolved().model_dump().items() if v is not None}
        typer.echo(tomli_w.dumps({"trace": name, **keys}))
        return
    from kvsim.replay import prepare
    from kvsim.report import compare
    from kvsim.results import check_free, run_id
    from kvsim.simulate import identify
    from kvsim.simulate import run as simulate

    opened = _open(name)
    if output:
        check_free(output, run_id(identify(prepare(opened, chosen))))
    with _Wait(f"replaying {opened.name}") as wait:
        result = simulate(opened, chosen, progress=wait.update, export_plan=export_plan)
        comparison = compare(opened, result, wait.then("replaying the references")) if references else None
    result.timing = {"wall_s": wait.seconds}
    folder = result.save(output or Path("runs") / result.id)
    _print_run(result, comparison, wait.seconds)
    typer.echo(f"written to {folder}: manifest.json, steps.parquet, requests.parquet, lanes.parquet, links.parquet")
    if export_plan:
        typer.echo(f"written to {export_plan}: the movement plan")


def _open(name: str) -> Trace:
    from kvsim.trace import open_trace

    return open_trace(name)


def _print_run(result: Result, comparison: Comparison | None, seconds: float) -> None:
    from kvsim.report import VERDICTS, summary_rows, title

    m, console = result.manifest, _console()
    console.print(title(result), style="bold", highlight=False, soft_wrap=True)
    for warning in m["warnings"]:
        console.print(f"warning: {warning}", style="bold yellow", highlight=False, soft_wrap=True)
    console.print(_grid([("", "left"), ("value", "right"), ("meaning", "left")], summary_rows(result)))
    if comparison:
        console.print(f"\n{comparison.metric} at the same budget", style="bold", highlight=False)
        console.print(_beside(comparison))
        console.print(f"verdict: {VERDICTS[comparison.verdict]}", highlight=False)
    for note in m["notes"]:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    console.print(m["evidence"], style="dim", highlight=False, soft_wrap=True)
    console.print(f"{seconds:.1f} s of wall time, {m['events']} simulated events", style="dim", highlight=False)


def _beside(comparison: Comparison) -> Any:
    """The policy between its baselines, the oracles, the bound and the full cache."""
    from kvsim.units import format_seconds

    heads = [
        ("", "left"),
        (comparison.metric, "right"),
        ("lost", "right"),
        ("regret", "right"),
        ("TPOT p99", "right"),
        ("", "left"),
    ]
    lines = []
    for line in comparison.lines:
        known = line.tpot_p99_s == line.tpot_p99_s
        regret = "" if line.kind == "full" else f"{comparison.bound - line.value:+.4f}"
        time = format_seconds(line.tpot_p99_s) if known else ""
        lines.append((line.name, f"{line.value:.4f}", f"{max(0.0, 1 - line.value):.4f}", regret, time, line.kind))
    return _grid(heads, lines, bold="policy")


def _grid(heads: list[tuple[str, str]], lines: list[Any], bold: str | None = None) -> Any:
    """A plain table; the line whose last cell is `bold` stands out."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for head, side in heads:
        table.add_column(head, justify=side)  # type: ignore[arg-type]
    for line in lines:
        table.add_row(*line, style="bold" if bold and line[-1] == bold else None)
    return table


@app.command("list")
def list_(what: Annotated[str, typer.Argument(help="policies, offload or hardware")]) -> None:
    """Show what comes with kvsim.

    Example: kvsim list policies
    """
    from rich.table import Table

    rows = {"policies": _policies, "offload": _offloads, "hardware": _hardware}
    if what not in rows:
        raise ConfigError(f'cannot list "{what}"', hint=f"list one of {', '.join(rows)}")
    head, lines = rows[what]()
    table = Table(*head, box=None, pad_edge=False)
    for line in lines:
        table.add_row(*line)
    _console().print(table)


def _policies() -> tuple[list[str], list[list[str]]]:
    from dataclasses import fields

    from kvsim import registry

    lines = []
    for name in registry.names():
        cls: Any = registry.find(name)
        defaults = ", ".join(f"{f.name}={f.default}" for f in fields(cls) if not f.name.startswith("protect"))
        kind = "oracle" if hasattr(cls, "foresee") else "read set" if hasattr(cls, "select") else "online"
        lines.append(
            [
                name,
                getattr(cls, "family", ""),
                kind,
                cls.granularity,
                ", ".join(sorted(cls.needs)),
                cls.evidence,
                defaults,
            ]
        )
    return ["policy", "family", "kind", "decides per", "needs", "evidence", "parameters"], lines


def _offloads() -> tuple[list[str], list[list[str]]]:
    from kvsim import registry

    return ["offload", "what"], [
        [n, (registry.find(n, "offload").__doc__ or "").split("\n")[0]] for n in registry.names("offload")
    ]


def _hardware() -> tuple[list[str], list[list[str]]]:
    from kvsim.machine.hardware import Hardware, shipped
    from kvsim.units import format_bandwidth, format_bytes

    lines = []
    for name in shipped():
        h = Hardware.load(name)
        kinds = [c.evidence for c in h.constants.values()]
        shares = ", ".join(f"{kinds.count(k)} {k}" for k in dict.fromkeys(kinds))
        lines.append(
            [
                name,
                format_bytes(h.gpu.memory),
                format_bandwidth(h.gpu.kv_bandwidth),
                format_bandwidth(h.h2d.bandwidth),
                shares,
            ]
        )
    return ["hardware", "GPU memory", "KV bandwidth", "host to GPU", "constants"], lines


@app.command()
def check(spec: Annotated[str, typer.Argument(help="A policy or a file.py, optionally with parameters.")]) -> None:
    """Say in words which clause of the policy contract is broken, if any.

    Example: kvsim check my_policy.py
    """
    from kvsim.testing import check_policy

    problems = check_policy(spec)
    for problem in problems:
        typer.echo(f"broken: {problem}")
    if problems:
        raise typer.Exit(2)
    typer.echo(f"{spec} keeps the contract")


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(help="A run's TOML with a [sweep] table of axes.")],
    jobs: Annotated[int, typer.Option(help="Worker processes.")] = 1,
    settings: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE, also sweep.policy=[...].")] = None,
    dry_run: Annotated[bool, typer.Option(help="List the points and stop.")] = False,
    plots: Annotated[bool, typer.Option(help="Draw the figures that [plot] asks for.")] = True,
    output: Out = None,
) -> None:
    """Run every point of a TOML's axes; points that are there already are not run again.

    Example: kvsim sweep experiments/demo.toml --jobs 2 -o runs/demo
    """
    from kvsim.sweeps import read_sweep, run_sweep

    plan = read_sweep(file, settings or [])
    if dry_run:
        for config in plan.points:
            typer.echo(" ".join(f"{axis}={config.get(axis)}" for axis in plan.axes))
        typer.echo(f"{len(plan.points)} points")
        return
    folder = output or Path("runs") / plan.name
    with _Wait(f"sweeping {plan.name}") as wait:
        grid = run_sweep(plan, folder, jobs=jobs, progress=wait.update)
    _print_grid(grid)
    files = [folder / "grid.parquet"]
    if plots:
        from kvsim.figures import draw_plan

        files += draw_plan(grid, plan, folder)
    for path in files:
        typer.echo(f"written {path}")
    typer.echo(f"{len(grid)} points in {folder}, {wait.seconds:.1f} s of wall time")


def _print_grid(grid: Any) -> None:
    console = _console()
    console.print(grid.table_title, style="bold", highlight=False)
    console.print(_grid([(head, "left") for head in grid.table_head()], grid.table_lines()))
    for line in grid.verdicts():
        console.print(line, highlight=False, soft_wrap=True)


@app.command()
def plot(
    folders: Annotated[list[Path], typer.Argument(help="Results of `kvsim run` or `kvsim sweep`.")],
    kind: Annotated[str, typer.Option(help="line, timeline or lanes.")] = "line",
    x: Annotated[str, typer.Option(help="Column on the x axis.")] = "budget",
    y: Annotated[
        str | None, typer.Option(help="Column on the y axis; recall, or page_hit_rate in the offload regime.")
    ] = None,
    hue: Annotated[str, typer.Option(help="Column that tells the lines apart.")] = "policy",
    steps: Annotated[str | None, typer.Option(help="Timeline: decode steps, such as 100:140.")] = None,
    output: Out = None,
) -> None:
    """Draw curves over a sweep, or the timeline or the lanes of one run, as PNG, SVG or PDF.

    Example: kvsim plot runs/demo --y tpot_p99_s -o latency.svg
    """
    from kvsim.figures import draw
    from kvsim.sweeps import Grid, open_results

    grid = Grid([run for folder in folders for run in open_results(folder).runs], [])
    name = f"{y or 'curve'}.png" if kind == "line" else f"{kind}.png"
    path = draw(grid, output or folders[0] / name, kind=kind, x=x, y=y, hue=hue, steps=steps)
    typer.echo(f"written {path}")


@app.command()
def capture(
    model: Annotated[str, typer.Argument(help="A Hugging Face causal language model: a local folder or a name.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The .kvtrace folder to write.")],
    prompts: Annotated[
        Path | None, typer.Option(help="A .txt file (one prompt a line) or .jsonl (prompt, or tokens).")
    ] = None,
    task: Annotated[
        Path | None, typer.Option(help="A Python file with sample(seed, index, ...), such as the reasoner's.")
    ] = None,
    task_args: Annotated[str, typer.Option(help="Settings for the task: problems=6,steps=8.")] = "",
    count: Annotated[int, typer.Option(help="Prompts to draw from the task.", min=1)] = 8,
    mode: Annotated[str, typer.Option(help="free: generate greedily. forced: feed the given continuation.")] = "free",
    max_new_tokens: Annotated[int | None, typer.Option(help="Decode steps at most.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts run together.", min=1)] = 1,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    heads: Annotated[
        str, typer.Option(help="mean over a KV head's query heads, max beside it, or query: no reduction.")
    ] = "mean",
    prompt_rows: Annotated[str, typer.Option(help="How many of the last prompt rows to store, or all.")] = "64",
    vectors: Annotated[bool, typer.Option(help="Store queries, keys and values too.")] = False,
    spans: Annotated[Path | None, typer.Option(help="JSON list of [start, end, name]: column sums per span.")] = None,
    keep: Annotated[float, typer.Option(help="Share of each row's mass that is kept.")] = 0.99,
    lossless: Annotated[bool, typer.Option(help="Every weight, as float32.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the task's samples.")] = 0,
    name: Annotated[
        str | None, typer.Option(help="What to call the model in results; its folder's name otherwise.")
    ] = None,
    licence: Annotated[str | None, typer.Option(help="Licence of the prompts, noted in the trace.")] = None,
) -> None:
    """Run a model and store the attention it computes as a trace.

    Example: kvsim capture experiments/reasoner/model --task experiments/reasoner/task.py --task-args
    problems=6,steps=8 -o my.kvtrace
    """
    from kvsim.measure.capture import capture as capture_model
    from kvsim.measure.prompts import task_prompts

    if (prompts is None) == (task is None):
        raise ConfigError(
            "give either --prompts or --task",
            hint="a file of prompts, or a generator such as experiments/reasoner/task.py",
        )
    if prompt_rows != "all" and not prompt_rows.isdigit():
        raise ConfigError(f'--prompt-rows "{prompt_rows}"', hint='write a number, or "all"')
    with _Wait("capturing") as wait:
        given: Any = task_prompts(task, count, seed=seed, settings=task_args) if task else prompts
        path = capture_model(
            model,
            given,
            output,
            mode=mode,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            heads=heads,
            prompt_rows="all" if prompt_rows == "all" else int(prompt_rows),
            vectors=vectors,
            spans=spans,
            keep=keep,
            lossless=lossless,
            seed=seed,
            name=name or Path(model).name,
            licence=licence,
            source=f"{task.name}({task_args})" if task else None,
            progress=lambda done, total, what: wait.update(done, total),
        )
    typer.echo(f"written {path} in {wait.seconds:.1f} s; look at it with: kvsim trace info {path}")


@trace_app.command("info")
def trace_info(trace: TraceArg) -> None:
    """What a trace was captured from, its sizes and its density.

    Example: kvsim trace info demo
    """
    from rich.table import Table

    from kvsim.trace.check import info

    table = Table("", "", box=None, pad_edge=False, show_header=False)
    for key, value in _lines(info(_open(trace))):
        table.add_row(key, value)
    _console().print(table)


def _lines(facts: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Facts as dotted lines a person can read; the model's whole configuration stays in the manifest."""
    from kvsim.units import format_bytes

    for key, value in facts.items():
        if isinstance(value, dict):
            if key != "config":
                yield from _lines(value, f"{prefix}{key}.")
        elif value is not None:
            size = key.endswith("bytes") and isinstance(value, int) and value > 1024
            text = (
                format_bytes(value)
                if size
                else f"{value:.4g}"
                if isinstance(value, float)
                else f"{value:,}"
                if type(value) is int
                else value
            )
            if isinstance(value, (list, tuple)):
                text = "; ".join(
                    ", ".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else str(x) for x in value
                )
            yield prefix + key, str(text)


@trace_app.command("check")
def trace_check(trace: TraceArg) -> None:
    """Read every row and say what is wrong with the file, if anything.

    Example: kvsim trace check traces/reasoner.kvtrace
    """
    from kvsim.trace.check import check as check_trace

    problems = check_trace(trace)
    for problem in problems:
        typer.echo(f"broken: {problem}")
    if problems:
        raise typer.Exit(2)
    typer.echo(f"{trace} is whole")


@trace_app.command("export")
def trace_export(
    trace: TraceArg, output: Annotated[Path, typer.Option("-o", "--output", help="A .parquet file.")]
) -> None:
    """The long form, one line per kept weight, for pandas, DuckDB or Polars.

    Example: kvsim trace export demo -o weights.parquet
    """
    from kvsim.trace.export import export

    export(_open(trace), output)
    typer.echo(f"written {output}")


class _Wait:
    """A progress bar on the error stream for work that takes a person's time; silent where nobody looks."""

    def __init__(self, what: str):
        self.what, self.seconds = what, 0.0

    def __enter__(self) -> _Wait:
        import time

        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        from kvsim.cache.kernels import compiled

        if not compiled():
            typer.echo("compiling the kernels: once per installation, up to 20 s", err=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
        )
        self.bar = Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
        self.task = self.bar.add_task(self.what, total=1)
        self.bar.start()
        self.start = time.perf_counter()
        self.clock = time.perf_counter
        return self

    def then(self, what: str) -> Any:
        """Begin another part of the work; returns where its progress goes."""
        self.bar.update(self.task, description=what, completed=0, total=1)
        return self.update

    def update(self, done: int, total: int) -> None:
        self.bar.update(self.task, completed=done, total=max(total, 1))

    def __exit__(self, *_: object) -> None:
        self.seconds = self.clock() - self.start
        self.bar.stop()


def _console() -> Any:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160)
