"""Closed loop against open loop: what eviction costs in right answers, and what a replay of the trace says of it.

    python -m experiments.quality run --device cpu --out experiments/quality/results/cpu.jsonl
    python -m experiments.quality lanes --device cpu --out experiments/quality/results/cpu.jsonl
    python -m experiments.quality report          # docs/quality.md and its figures, from the committed rows

`run` writes one JSON line per policy and budget when it is measured; points that the file holds are not measured again.
`lanes` adds to those lines what eviction costs where it is applied in one layer and KV head alone (a quarter of an
hour), and what of the open loop the lines of an older version lack.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import closing
from pathlib import Path

from kvsim.errors import ConfigError, KvsimError

HERE = Path(__file__).resolve().parent


def run(args: argparse.Namespace) -> None:
    import torch

    from experiments.quality import points
    from experiments.quality.rows import read

    torch.set_num_threads(args.threads)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    done = {row["key"] for row in read([args.out])} if args.out.exists() else set()
    given = [p for p in points.POINTS if not args.policy or p[0] in args.policy]
    given += [(p, b) for p in args.policy or () for b in points.BUDGETS if (p, b) not in given and p != "full"]
    began = time.monotonic()
    bench = points.Bench(args.model, args.device, name=args.name, chains=args.chains, settings=args.settings)
    with closing(bench), args.out.open("a", encoding="utf-8") as out:
        wanted = [p for p in given if bench.key(*p) not in done and (not args.budget or p[1] in (*args.budget, "100%"))]
        if args.workers:
            bench.start(wanted, args.workers)
        for i, (policy, budget) in enumerate(wanted):
            if time.monotonic() - began > args.deadline:
                print(f"no time is left for {len(wanted) - i} of {len(wanted)} points", file=sys.stderr)
                return
            tell = Bar(f"{i + 1}/{len(wanted)} {policy} {budget}")
            row = bench.measure(policy, budget, tell)
            out.write(json.dumps(row) + "\n")
            out.flush()
            tell.close()


def lanes(args: argparse.Namespace) -> None:
    import torch

    from experiments.quality import points
    from experiments.quality.rows import read
    from kvsim.results import file_beside

    torch.set_num_threads(args.threads)
    rows = read([args.out])

    def told(row: points.Row) -> Bar:
        return Bar(f"{rows.index(row) + 1}/{len(rows)} {row['policy']} {row['budget']}")

    def save() -> None:
        with file_beside(args.out) as partial:
            partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def bench(chains: int) -> points.Bench:
        return points.Bench(args.model, args.device, name=args.name, chains=chains, settings=args.settings)

    with closing(bench(args.chains)) as whole:
        for row in rows:
            if row["key"] == whole.key(row["policy"], row["budget"]) and "halved" not in row["open"]:
                tell = told(row)
                row["open"] = points.open_loop(whole.path, row["policy"], row["budget"], progress=tell)
                tell.close()
    save()
    with closing(bench(min(args.chains, points.LANE_CHAINS))) as few:
        for row in rows:
            same = row["key"] == whole.key(row["policy"], row["budget"])
            if same and row["budget"] in points.LANE_BUDGETS and "alone" not in row:
                tell = told(row)
                row["alone"] = few.lane_by_lane(row["policy"], row["budget"], tell)
                save()
                tell.close()


class Bar:
    """Progress of a point on the error stream: a bar where a person looks, else a line when it is done."""

    def __init__(self, what: str):
        self.what, self.began, self.shown = what, time.monotonic(), -1

    def __call__(self, done: int, total: int) -> None:
        filled = 30 * done // max(total, 1)
        if sys.stderr.isatty() and filled > self.shown:
            self.shown = filled
            print(f"\r{self.what:40s} [{'#' * filled:30s}]", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        start = "\r" if sys.stderr.isatty() else ""
        print(f"{start}{self.what:40s} {time.monotonic() - self.began:6.1f} s{' ' * 32}", file=sys.stderr, flush=True)


def report(args: argparse.Namespace) -> None:
    from experiments.quality.page import write

    print(f"written {write(args.rows)}")


def main(argv: list[str] | None = None) -> int:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = ap.add_subparsers(required=True)
    measure = commands.add_parser("run", help="measure points")
    alone = commands.add_parser("lanes", help="evict in one layer and KV head alone")
    for command, does in ((measure, run), (alone, lanes)):
        command.add_argument("--device", default="cpu", help="cpu or cuda")
        command.add_argument(
            "--out", type=Path, default=HERE / "results" / "cpu.jsonl", help="rows; those in it are known"
        )
        command.add_argument("--model", type=Path, default=HERE.parent / "reasoner" / "model")
        command.add_argument("--name", default="", help="of the model; the name of its folder's parent")
        command.add_argument("--chains", type=int, default=24)
        command.add_argument("--settings", default="problems=5,steps=8", help="of the task")
        command.add_argument("--threads", type=int, default=1)
        command.set_defaults(command=does)
    measure.add_argument("--policy", action="append", help="only this one, or one more; several times")
    measure.add_argument("--budget", action="append", help="only this one; several times")
    measure.add_argument("--workers", type=int, default=0, help="further processes, for the open loops")
    measure.add_argument("--deadline", type=float, default=float("inf"), help="seconds after which none is begun")
    page = commands.add_parser("report", help="write docs/quality.md")
    page.add_argument("rows", nargs="*", type=Path, help="files of rows; without any, those in results/")
    page.set_defaults(command=report)
    args = ap.parse_args(argv)
    try:
        if getattr(args, "device", "cpu") == "cuda":
            import torch

            if not torch.cuda.is_available():
                raise ConfigError('no device "cuda": torch sees no CUDA GPU', hint="use --device cpu")
        args.command(args)
    except KvsimError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
