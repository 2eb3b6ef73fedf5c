"""What a person sees while waiting, and tables."""

from __future__ import annotations

import sys
from typing import Any

import typer


class Wait:
    """A progress bar on the error stream for work that takes a person's time; silent where nobody looks."""

    def __init__(self, what: str):
        self.what, self.seconds = what, 0.0

    def __enter__(self) -> Wait:
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
        self.what = what
        self.bar.update(self.task, description=what, completed=0, total=1)
        return self.update

    def update(self, done: int, total: int, what: str | None = None) -> None:
        self.bar.update(self.task, completed=done, total=max(total, 1), description=what or self.what)

    def __exit__(self, *_: object) -> None:
        self.seconds = self.clock() - self.start
        self.bar.stop()


def screen() -> Any:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160)


def table(heads: list[tuple[str, str]], lines: list[Any], bold: str | None = None) -> Any:
    """A plain table; the line whose last cell is `bold` stands out."""
    from rich.table import Table

    drawn = Table(box=None, pad_edge=False)
    for head, side in heads:
        drawn.add_column(head, justify=side)  # type: ignore[arg-type]
    for line in lines:
        drawn.add_row(*line, style="bold" if bold and line[-1] == bold else None)
    return drawn
