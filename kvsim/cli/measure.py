"""capture, calibrate and validate: everything that runs a real model or a real machine."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvsim.cli.app import Out, app, open_named
from kvsim.cli.screen import Wait, screen, table
from kvsim.errors import ConfigError

if TYPE_CHECKING:
    from kvsim.plan import Plan
    from kvsim.trace.access import Trace


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
    keep: Annotated[
        float,
        typer.Option(
            help="Share of each row's mass whose weights are kept; 1: every weight, a byte each. 0.99: smaller files, "
            "that say less of the order of small weights, by which TOVA evicts.",
            min=0.0,
            max=1.0,
        ),
    ] = 1.0,
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
    with Wait("capturing") as wait:
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


@app.command()
def calibrate(
    output: Annotated[Path, typer.Option("-o", "--output", help="The hardware file to write, NAME.toml.")],
    device: Annotated[str | None, typer.Option(help="cpu or cuda; cuda where there is one.")] = None,
    ssd: Annotated[
        Path | None, typer.Option(help="A folder on the SSD to measure; needs room for a test file.")
    ] = None,
    rows: Annotated[
        list[Path] | None, typer.Option(help="Fit these measured rows (.jsonl) instead of measuring.")
    ] = None,
    split: Annotated[
        Path | None, typer.Option(help="A TOML file that says which rows may be fitted; calibration rows otherwise.")
    ] = None,
    base: Annotated[str, typer.Option(help="Hardware from which comes what is not measured.")] = "h100-pcie5",
    quick: Annotated[
        bool, typer.Option(help="A few seconds on a tiny grid, to see that everything runs; not to predict by.")
    ] = False,
) -> None:
    """Measure this machine, fit every constant, and write a hardware file that says how sure each of them is.

    Example: kvsim calibrate --device cpu --ssd /tmp -o mine.toml
    """
    from kvsim.calibrate import calibrate as measure_and_fit
    from kvsim.calibrate import notes
    from kvsim.machine.hardware import Hardware
    from kvsim.validate import read_split

    chosen = read_split(split) if split else None
    with Wait("measuring" if rows is None else "fitting") as wait:
        path = measure_and_fit(
            device, output, ssd, rows, base, chosen, quick, lambda done, total, what: wait.update(done, total, what)
        )
    typer.echo(f"written {path} in {wait.seconds:.0f} s; use it with: kvsim run demo --hardware {path}")
    for note in notes(Hardware.load(path)):
        typer.echo(f"note: {note}")


WARM_UP = 5  # steps of a plan that are performed before those that are timed


@app.command()
def perform(
    plan: Annotated[Path, typer.Argument(help="A movement plan that `kvsim run --export-plan` wrote.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The rows file to add to, NAME.jsonl.")],
    model: Annotated[str, typer.Option(help="Whose layers compute: llama-3.1-8b, cpu-small, ...")] = "cpu-small",
    context: Annotated[
        int | None, typer.Option(help="Tokens; the plan's pages are repeated, or cut, to that length.")
    ] = None,
    trace: Annotated[str | None, typer.Option(help="Refuse the plan unless it was made from this trace.")] = None,
    hardware: Annotated[str | None, typer.Option(help="Also say what this hardware file predicts.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; cuda where there is one.")] = None,
    depth: Annotated[int, typer.Option(help="Layers whose loaded pages the device holds at once.")] = 2,
    known: Annotated[str, typer.Option(help="What a layer loads is known at the start, or after the layer before.")] = (
        "start"
    ),
    method: Annotated[str, typer.Option(help="runs: neighbouring pages in one copy. page: each by itself.")] = "runs",
    steps: Annotated[int, typer.Option(help="Timed steps, the last ones of the plan.", min=1)] = 20,
    disk: Annotated[Path, typer.Option(help="Folder for the pages that the plan has on the SSD.")] = Path("."),
) -> None:
    """Really move the pages of a plan on a device, check them by content, and time each step.

    Example: kvsim perform lru.parquet --model cpu-small --hardware experiments/cpu/cpu-amd-epyc.toml -o rows.jsonl
    """
    from kvsim.machine import ModelShape
    from kvsim.measure.bare import shape
    from kvsim.measure.executor import Executor
    from kvsim.measure.machine_info import slug
    from kvsim.measure.rows import RowLog, quantiles
    from kvsim.measure.schedule import Schedule
    from kvsim.measure.streams import open_device
    from kvsim.plan import read_plan
    from kvsim.units import format_bytes

    moves, schedule, layers = read_plan(plan), Schedule(depth, known, method), shape(model)
    if trace is not None:
        _require(moves, open_named(trace))
    size, most = moves.info.page_size, moves.info.steps - WARM_UP
    tokens = moves.info.pages * size if context is None else context
    if tokens < size or tokens % size:
        hint = f"write a multiple of {size}, the plan's page"
        raise ConfigError(f"a context of {tokens} tokens is no whole number of pages", where="--context", hint=hint)
    if steps > most:
        what = f"the plan has {moves.info.steps} steps, {steps} and {WARM_UP} to warm up are asked for"
        raise ConfigError(what, where="--steps", hint=f"ask for {most} at most")
    predicts = _predictor(hardware)
    sizes: dict[str, Any] = layers.sizes
    weights = format_bytes(ModelShape(layers.name, **sizes).read_bytes)
    cached = format_bytes(tokens * layers.token_bytes * layers.layers)
    with open_device(device) as opened, ExitStack() as stack:
        typer.echo(
            f"{model} on {opened.name}: {weights} of random weights, {cached} of KV and its twin beside", err=True
        )
        stack.enter_context(Wait("performing the plan"))
        executor = stack.enter_context(Executor(opened, layers, 1, tokens, size, folder=disk))
        row = executor.run_plan(moves, schedule, steps=steps, warm_up=WARM_UP)
    how = f"{method}-{known}{depth}"
    with RowLog(output) as log:
        key = f"{slug(opened.name)}/offload/plan/{model}/1x{tokens}/{plan.stem}/{how}/{len(log.rows)}"
        added = log.add(key, **{**row, "phase": "offload"})
    p, ms = added["params"], quantiles(added["ms"])
    moved = sum(p["fetched_pages"]) * p["page"] * layers.token_bytes
    lines = [
        ("measured step", f"{ms['p50']:.3f} ms", f"p10 to p90: {ms['p10']:.3f} to {ms['p90']:.3f} ms, {opened.name}"),
        ("moved per step", f"{moved / 1e6:.3f} MB", f"{sum(p['copies']):.1f} copies"),
        ("checked", f"{p['checked_pages']} pages", "poisoned, moved, and compared with what they should hold"),
    ]
    if predicts:
        seconds, of = predicts(added)
        mark = "" if of == slug(opened.name) else f"; another machine: {of}"
        lines.append(("predicted step", f"{1e3 * seconds:.3f} ms", f"from {hardware}{mark}"))
    screen().print(table([("", "left"), ("value", "right"), ("", "left")], lines))
    typer.echo(f"written to {output}: {key}")


def _require(plan: Plan, trace: Trace) -> None:
    """Raise ResultError unless the plan was made from the trace, or from one request of it."""
    if all(plan.info.trace != trace.only([source.id]).fingerprint for source in trace.sources):
        plan.require(trace.fingerprint)


def _predictor(hardware: str | None) -> Any:
    """What predicts the seconds of a row, and says of which device; or None."""
    if hardware is None:
        return None
    from kvsim.machine.hardware import Hardware
    from kvsim.validate.cases import case_of
    from kvsim.validate.predict import predict

    known = Hardware.load(hardware)
    return lambda row: (predict(case_of(row), known).seconds, known.fit.device if known.fit else known.name)


@app.command()
def validate(
    trace: Annotated[
        str | None, typer.Argument(metavar="[TRACE]", help="A captured .kvtrace: judge the steps of its own run.")
    ] = None,
    hardware: Annotated[str, typer.Option(help="The hardware file that predicts, calibrated on the same device.")] = "",
    rows: Annotated[list[Path] | None, typer.Option(help="Measured rows (.jsonl) to judge instead of a trace.")] = None,
    split: Annotated[
        Path | None, typer.Option(help="With --rows: which of them are held out, and their groups.")
    ] = None,
    any_device: Annotated[bool, typer.Option(help="Go on where the hardware file is of another device.")] = False,
    output: Out = None,
) -> None:
    """Compare predicted times with measured ones: a trace's own steps, or measured rows that no fit has seen.

    Example: kvsim validate traces/reasoner.kvtrace --hardware experiments/cpu/cpu-amd-epyc.toml

    Example: kvsim validate --rows experiments/cpu/results/results.jsonl --split experiments/cpu/split.toml
    --hardware experiments/cpu/cpu-amd-epyc.toml
    """
    from kvsim.machine.hardware import Hardware
    from kvsim.validate import TwinValidation, Validation, read_split, report, validate_rows, validate_trace

    if (trace is None) == (rows is None):
        raise ConfigError("give either a trace or --rows", hint="a .kvtrace folder, or files of measured rows")
    if not hardware:
        raise ConfigError("no hardware was given", hint="--hardware NAME or FILE.toml; kvsim calibrate makes one")
    if rows and split is None:
        raise ConfigError("no split was given", hint="--split FILE.toml says which rows are held out")
    known = Hardware.load(hardware)
    found: Validation | TwinValidation
    with Wait("predicting") as wait:
        if trace is not None:
            found = validate_trace(open_named(trace), known, any_device=any_device)
            lines = report.of_twin(found)
        else:
            assert rows and split
            found = validate_rows(rows, known, read_split(split), any_device=any_device, progress=wait.update)
            lines = report.of_rows(found)
    folder = found.save(output or Path("runs") / f"validate-{found.id}")
    for line in lines:
        screen().print(line, highlight=False, markup=False, soft_wrap=True)
    typer.echo(f"written to {folder}")
