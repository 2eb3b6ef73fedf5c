"""run, sweep and plot; list and check: everything about replaying a trace."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvsim.cli.app import Out, app, open_named, say_problems
from kvsim.cli.screen import Wait, screen, table
from kvsim.errors import ConfigError

if TYPE_CHECKING:
    from kvsim.report import Comparison
    from kvsim.results import Result


@app.command()
def run(
    trace: Annotated[str | None, typer.Argument(metavar="TRACE", help='A .kvtrace folder, or "demo".')] = None,
    policy: Annotated[
        str | None,
        typer.Option(help="A policy, a file.py, or either with parameters: 'h2o(recent=64)'; h2o if left out."),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="20% of each request's final length (if left out), 512 pages per lane, or 4GiB per request."),
    ] = None,
    regime: Annotated[
        str | None,
        typer.Option(
            help="lossy: evicted pages are gone. offload: they move one tier down. If left out lossy, or what "
            "--offload and --demand ask for."
        ),
    ] = None,
    offload: Annotated[
        str | None, typer.Option(help="Where victims go: drop (lossy), spill (offload), or a file.py of your own.")
    ] = None,
    demand: Annotated[
        str | None,
        typer.Option(help="Offload, what a step needs: dense (if left out), theta, theta(0.01), topk(64) or select."),
    ] = None,
    use: Annotated[
        str | None,
        typer.Option(help="A page is used from this share of an equal weight (1.0 if left out), or weight(1e-4)."),
    ] = None,
    page_size: Annotated[
        int | None, typer.Option(help="Tokens per page; if left out 1 in the lossy regime, 16 in the offload regime.")
    ] = None,
    granularity: Annotated[
        str | None, typer.Option(help="One decision per head, layer or token; if left out what the policy says.")
    ] = None,
    hardware: Annotated[
        str | None,
        typer.Option(help="A name of `kvsim list hardware` or a TOML file; h100-pcie5 if left out."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Time it as this model: llama-3.1-8b, say, or a Hugging Face config.json."),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Host memory for the pages of all requests, such as 64GiB.")] = None,
    ssd: Annotated[str | None, typer.Option(help="SSD space for the pages of all requests, such as 1TB.")] = None,
    gpu_format: Annotated[
        str | None,
        typer.Option(
            help="How the GPU stores pages: fp16 (if left out), 'int4(group=64)', 'kivi(bits=2)' or rotatekv."
        ),
    ] = None,
    host_format: Annotated[str | None, typer.Option(help="The same of host memory.")] = None,
    ssd_format: Annotated[str | None, typer.Option(help="The same of the SSD.")] = None,
    overlap: Annotated[
        str | None, typer.Option(help="Copies beside compute: layer (if left out), step or none.")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(help="Requests replayed together on one GPU; 1 if left out.")
    ] = None,
    request: Annotated[list[int] | None, typer.Option(help="Only these requests, by number (repeatable).")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of random policies; 0 if left out.")] = None,
    config: Annotated[Path | None, typer.Option(help="A TOML file with the same keys; flags win.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE, also hardware.link.h2d.bandwidth=50GB/s.")
    ] = None,
    references: Annotated[
        bool, typer.Option(help="Also replay LRU, random and the oracles, and give a verdict.")
    ] = True,
    export_plan: Annotated[
        Path | None, typer.Option(help="Also write which pages move when, as a Parquet file for `kvsim perform`.")
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Print the resolved configuration and stop.")] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for the result; runs/ID if left out.")
    ] = None,
) -> None:
    """Replay a trace against one policy on one machine.

    Example: kvsim run demo --policy h2o --budget 20% --hardware a100-pcie4
    """
    from kvsim.config import parse_settings, read_toml, run_config
    from kvsim.machine import Hardware

    flags = {
        "policy": policy, "budget": budget, "regime": regime, "offload": offload, "demand": demand, "use": use,
        "page_size": page_size,
        "granularity": granularity, "hardware": hardware, "model": model, "host": host, "ssd": ssd, "overlap": overlap,
        "gpu_format": gpu_format, "host_format": host_format, "ssd_format": ssd_format,
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
    Hardware.require_units(chosen.constants)
    if dry_run:
        import tomli_w

        keys = {k: v for k, v in chosen.resolved().model_dump().items() if v is not None}
        typer.echo(tomli_w.dumps({"trace": name, **keys}))
        return
    from kvsim.manifest import identify
    from kvsim.replay import prepare
    from kvsim.report import compare
    from kvsim.results import check_free, run_id
    from kvsim.simulate import run as simulate

    opened = open_named(name)
    if output:
        check_free(output, run_id(identify(prepare(opened, chosen))))
    with Wait(f"replaying {opened.name}") as wait:
        result = simulate(opened, chosen, progress=wait.update, export_plan=export_plan)
        comparison = compare(opened, result, wait.then("replaying the references")) if references else None
    result.timing["wall_s"] = wait.seconds
    folder = result.save(output or Path("runs") / result.id)
    _print_run(result, comparison, wait.seconds)
    typer.echo(f"written to {folder}: manifest.json, steps.parquet, requests.parquet, lanes.parquet, links.parquet")
    if export_plan:
        typer.echo(f"written to {export_plan}: the movement plan")


def _print_run(result: Result, comparison: Comparison | None, seconds: float) -> None:
    from kvsim.report import VERDICTS, summary_rows, title

    m, console = result.manifest, screen()
    console.print(title(result), style="bold", highlight=False, soft_wrap=True)
    for warning in m["warnings"]:
        console.print(f"warning: {warning}", style="bold yellow", highlight=False, soft_wrap=True)
    console.print(table([("", "left"), ("value", "right"), ("meaning", "left")], summary_rows(result)))
    if comparison:
        console.print(f"\n{comparison.metric} at the same budget", style="bold", highlight=False)
        console.print(_beside(comparison))
        console.print(f"verdict: {VERDICTS[comparison.verdict]}", highlight=False)
    for note in m["notes"]:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    console.print(m["evidence"], style="dim", highlight=False, soft_wrap=True)
    own = f"{1e3 * result.timing['policy_s']:.1f} ms in the policy's text"
    console.print(f"{seconds:.1f} s of wall time, {own}, {m['events']} simulated events", style="dim", highlight=False)


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
    return table(heads, lines, bold="policy")


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A run's TOML with a [sweep] table of axes.")],
    jobs: Annotated[int, typer.Option(help="Worker processes.")] = 1,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help='KEY=VALUE, also \'sweep.policy=["lru", "h2o"]\'.')
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="List the points and stop.")] = False,
    plots: Annotated[bool, typer.Option(help="Draw the figures that [[plot]] tables ask for.")] = True,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for the results; runs/NAME if left out.")
    ] = None,
) -> None:
    """Run every point of a TOML's axes. Points that are there already are not run again.

    The file holds what all points share, keys of `kvsim run` such as trace = "demo", and below [sweep] a list for each
    key that varies, such as policy = ["h2o", "lru"]. Every policy is asked for its first step before the first point is
    run.

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
    with Wait(f"sweeping {plan.name}") as wait:
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
    console = screen()
    console.print(grid.table_title, style="bold", highlight=False)
    console.print(table([(head, "left") for head in grid.table_head()], grid.table_lines()))
    for line in grid.verdicts():
        console.print(line, highlight=False, soft_wrap=True)


@app.command()
def plot(
    folders: Annotated[list[Path], typer.Argument(help="Results of `kvsim run` or `kvsim sweep`.")],
    kind: Annotated[str, typer.Option(help="line, families, timeline or lanes.")] = "line",
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


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(help="policies, offload or hardware")],
    name: Annotated[str | None, typer.Argument(help="One policy: its source, formula and parameters.")] = None,
) -> None:
    """Show what comes with kvsim.

    Example: kvsim list policies; kvsim list policies h2o
    """
    rows = {"policies": _policies, "offload": _offloads, "hardware": _hardware}
    if what not in rows:
        raise ConfigError(f'cannot list "{what}"', hint=f"list one of {', '.join(rows)}")
    if name is not None:
        if what != "policies":
            raise ConfigError(f'"list {what}" shows them all', hint=f"leave {name} away")
        _policy(name)
        return
    head, lines = rows[what]()
    screen().print(table([(name, "left") for name in head], lines))
    if what == "policies":
        _legend()


def _policies() -> tuple[list[str], list[list[str]]]:
    from kvsim.catalogue import entries

    head = ["policy", "family", "kind", "regimes", "decides per", "needs", "evidence", "parameters"]
    return head, [
        [e.name, e.family, e.kind, ", ".join(e.regimes), e.decides, ", ".join(e.needs), e.evidence, e.defaults]
        for e in entries()
    ]


def _legend() -> None:
    from kvsim.catalogue import EVIDENCE

    lines = (
        "",
        "kind: an oracle knows the future; once: decides after the prompt alone; a read set holds all and reads a part",
        "needs: what a trace has to hold beside attention rows; k, q and v: captured with --vectors",
        "evidence: " + "; ".join(f"{word}: {meaning}" for word, meaning in EVIDENCE.items()),
        "parameters: as in 'h2o(recent=64)'; `kvsim list policies h2o` says what they mean; all also take sink and "
        "recent (the first and the newest tokens, which stay), protect_head and protect_tail (shares of the budget)",
    )
    for line in lines:
        screen().print(line, style="dim", highlight=False, soft_wrap=True)


def _policy(name: str) -> None:
    from kvsim.catalogue import EVIDENCE, entry

    e = entry(name)
    kind = ", ".join(dict.fromkeys(filter(None, (e.family, e.kind))))
    typer.echo(f"{e.name}: {kind}; {' and '.join(e.regimes)}; one decision per {e.decides}")
    typer.echo(f"evidence: {e.evidence}, {EVIDENCE[e.evidence]}")
    typer.echo(f"needs: {', '.join(e.needs) or 'attention rows only'}")
    typer.echo("parameters: " + ", ".join(f"{k}={v!r}" for k, v in e.parameters.items()))
    typer.echo(f"\n{e.text}")


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

    say_problems(check_policy(spec), f"{spec} keeps the contract")
