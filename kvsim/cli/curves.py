"""curve: what policies keep at every budget."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvsim.cli.app import TraceArg, app, open_named
from kvsim.cli.screen import Wait, screen, table
from kvsim.errors import ConfigError

if TYPE_CHECKING:
    from kvsim.curves import Curve, Curves

_FEW = 15  # budgets that are printed; of more, a grid


@app.command()
def curve(
    trace: TraceArg,
    policy: Annotated[
        list[str] | None,
        typer.Option(help="A policy, a file.py, or either with parameters (repeatable); h2o if left out."),
    ] = None,
    budgets: Annotated[
        str | None,
        typer.Option(
            help="A list such as 10%,512,4GiB (pages per lane, bytes per request), or all: every number of pages; "
            "every whole percent if left out."
        ),
    ] = None,
    rows: Annotated[
        str | None, typer.Option(help="full: policies see full rows in the lossy regime too, a variant of them.")
    ] = None,
    regime: Annotated[
        str | None,
        typer.Option(
            help="lossy: evicted pages are gone. offload: they move one tier down. If left out lossy, or what --demand "
            "asks for."
        ),
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
    request: Annotated[list[int] | None, typer.Option(help="Only these requests, by number (repeatable).")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of random policies; 0 if left out.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE, as in a run.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the curves into a .png, .svg or .pdf file.")] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="A .csv, .json or .parquet file for the numbers.")
    ] = None,
) -> None:
    """Recall (lossy) or hit rate (offload) at every budget, from one replay wherever that is exact.

    Example: kvsim curve demo --policy lru --policy 'h2o(recent=32)' --rows full --plot curve.svg -o curve.csv
    """
    from kvsim.config import parse_settings, run_config
    from kvsim.curves import Curves, check_name, rehearse
    from kvsim.curves import curve as measure
    from kvsim.figures import draw
    from kvsim.figures.page import check_name as check_figure

    flags = {
        "regime": regime, "demand": demand, "use": use, "page_size": page_size, "granularity": granularity,
        "requests": request, "seed": seed,
    }  # fmt: skip
    values = parse_settings(settings or []) | {k: v for k, v in flags.items() if v is not None}
    if unused := values.keys() & {"budget", "policy", "trace"}:
        raise ConfigError(f'"{unused.pop()}" is not a setting of a curve', hint="use TRACE, --policy and --budgets")
    listed = budgets if budgets in (None, "all") else str(budgets).split(",")
    check_name(output) if output else None
    check_figure(plot) if plot else None
    opened, curves = open_named(trace), Curves()
    with Wait(f"replaying {opened.name}") as wait:
        configs = [run_config({**values, "policy": name}) for name in dict.fromkeys(policy or ["h2o"])]
        for config in configs[1:]:  # before the long work on the first
            rehearse(opened, config, rows)
        for config in configs:
            progress = wait.then(f"{opened.name}: {config.policy}")
            curves.append(measure(opened, config, budgets=listed, rows=rows, progress=progress))
    _print(curves, wait.seconds)
    if output:
        typer.echo(f"written to {curves.save(output)}")
    if plot:
        typer.echo(f"written to {draw(curves, plot)}")


def _print(curves: Curves, seconds: float) -> None:
    from kvsim.curves import GRID
    from kvsim.manifest import CAVEAT

    console, first = screen(), curves[0]
    c, requests = first.config, first.trace["requests"]
    regime = c.regime if c.regime == "lossy" else f"offload, demand {c.demand}"
    title = f"{first.trace['name']} ({requests} request{'s' * (requests != 1)}) | {regime} | pages of {c.page_size}"
    console.print(f"{first.metric.replace('_', ' ')} by budget | {title}", style="bold", highlight=False)
    shown = min((curve.budgets for curve in curves), key=len)
    lines = [_line(curves, budget) for budget in (shown if len(shown) <= _FEW else GRID)]
    heads: list[Any] = [("budget", "right"), ("pages", "right"), *((curve.policy, "right") for curve in curves)]
    console.print(table(heads, lines))
    for curve in curves:
        console.print(f"{curve.policy}: {curve.method}, because {curve.reason}", highlight=False, soft_wrap=True)
    if any(curve.full_rows and not curve.oracle for curve in curves):
        words = (
            "policies see full rows, as if evicted pages were still attended to: a variant of those that look at rows"
        )
        console.print(f"note: {words}", highlight=False, soft_wrap=True)
    console.print(CAVEAT, style="dim", highlight=False, soft_wrap=True)
    console.print(f"{seconds:.1f} s of wall time", style="dim", highlight=False)


def _line(curves: Curves, budget: str) -> list[str]:
    """One budget's cells; empty where a policy protects more than it."""
    found = [_point(curve, budget) for curve in curves]
    pages = next((f"{p['pages']:.1f}" for p in found if p), "")
    return [budget, pages, *(f"{p[c.metric]:.4f}" if p else "" for c, p in zip(curves, found, strict=True))]


def _point(curve: Curve, budget: str) -> dict[str, Any] | None:
    from kvsim.curves import ONE_PASS

    known = next((p for p in curve.points if p["budget"] == budget), None)
    if known or curve.method != ONE_PASS:
        return known
    try:
        return curve.at(budget)
    except ConfigError:
        return None
