"""kvsim trace: look at traces, check them, give them away."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from kvsim.cli.app import TraceArg, open_named, say_problems, trace_app
from kvsim.cli.screen import screen


@trace_app.command("info")
def trace_info(trace: TraceArg) -> None:
    """What a trace was captured from, its sizes and its density.

    Example: kvsim trace info demo
    """
    from rich.table import Table

    from kvsim.trace.check import info

    table = Table("", "", box=None, pad_edge=False, show_header=False)
    for key, value in _lines(info(open_named(trace))):
        table.add_row(key, value)
    screen().print(table)


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

    say_problems(check_trace(trace), f"{trace} is whole")


@trace_app.command("quantise")
def trace_quantise(
    trace: TraceArg,
    form: Annotated[
        str, typer.Option("--format", help="int4(group=64), 'kivi(bits=2, group=32)', rotatekv, ...")
    ] = "kivi",
) -> None:
    """What storing keys and values in few bits does to a trace that holds them (captured with --vectors).

    Example: kvsim trace quantise runs/vectors.kvtrace --format 'kivi(bits=2, group=32)'
    """
    from kvsim.cli.screen import table
    from kvsim.machine.precision import errors, parse_format

    opened, chosen = open_named(trace), parse_format(form)
    found = errors(opened, chosen)
    console, times = screen(), 1 / chosen.ratio(2.0)
    console.print(f"{chosen.element_bytes:.4g} bytes per element, {times:.3g} times fewer than FP16", highlight=False)
    heads = [("layer", "right"), ("logit error (rms)", "right"), ("worst head", "right"), ("value error", "right")]
    lines = [
        (str(layer), f"{logit.mean():.4f}", f"{logit.max():.4f}", f"{value.mean():.4f}")
        for layer, (logit, value) in enumerate(zip(found["logit"], found["value"], strict=True))
    ]
    console.print(table(heads, lines))


@trace_app.command("export")
def trace_export(
    trace: TraceArg, output: Annotated[Path, typer.Option("-o", "--output", help="A .parquet file.")]
) -> None:
    """The long form, one line per kept weight, for pandas, DuckDB or Polars.

    Example: kvsim trace export demo -o weights.parquet
    """
    from kvsim.trace.export import export

    export(open_named(trace), output)
    typer.echo(f"written {output}")
