"""The command line. Imports nothing heavy before a command runs, so that --help is instant."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs import search_options
from jobs.common_options import (
    DEFAULT_STORAGE,
    Address,
    Assignments,
    Compile,
    DryRun,
    GpusPerWorker,
    Plugins,
    Recipe,
    Storage,
    TrackingUri,
    Workers,
)
from jobs.deadline import Deadline

app = typer.Typer(
    name="unlearn",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Which training examples has a model memorized, which parameters hold them, and how well can they be removed?",
)


@app.command()
def demo(
    storage: Storage = DEFAULT_STORAGE,
    tracking_uri: TrackingUri = None,
    workers: Workers = None,
    address: Address = None,
    assignments: Assignments = None,
) -> None:
    """Run the whole pipeline on the digits that ship with scikit-learn: table, report, and where to look next."""
    from jobs import demo as job
    from jobs.session import Options

    job.run(Options("digits", assignments or (), storage, tracking_uri, workers, 0.0, address))


@app.command()
def memorize(
    recipe: Recipe,
    assignments: Assignments = None,
    storage: Storage = DEFAULT_STORAGE,
    tracking_uri: TrackingUri = None,
    workers: Workers = None,
    gpus_per_worker: GpusPerWorker = 0.0,
    address: Address = None,
    plugin: Plugins = None,
    dry_run: DryRun = False,
    compile: Compile = "auto",
    models: Annotated[
        int | None, typer.Option(min=10, help="Subset models, a multiple of ten; with a target: at most.")
    ] = None,
    target_se: Annotated[
        float | None,
        typer.Option(min=0, help="Grow until the scores' mean standard error is at most this."),
    ] = None,
    target_split_half: Annotated[
        float | None, typer.Option(min=0, max=1, help="Grow until the halves' rank correlation is at least this.")
    ] = None,
    budget_hours: Annotated[float | None, typer.Option(min=0, help="Grow for at most so many hours.")] = None,
    exact: Annotated[
        str | None,
        typer.Option(
            metavar="INDICES",
            help="Train with and without single examples instead: 12,57,300, a file of indices, or by the campaign's "
            "scores top:N (highest), spread:N (even over ranks) or range:N (even over values).",
        ),
    ] = None,
    exact_seeds: Annotated[int, typer.Option(min=2, help="Models with all examples, and without each one.")] = 20,
) -> None:
    """Train subset models on Ray and store Feldman-Zhang memorization scores with intervals."""
    from jobs import memorize as job
    from jobs.session import Options

    chosen = search_options.assignments({"assignments": assignments, "models": models})
    given = (storage, tracking_uri, workers, gpus_per_worker, address, plugin or (), dry_run, compile)
    options = Options(recipe, chosen, *given)
    goal = job.Goal(models, target_se, target_split_half, budget_hours)
    if exact is None:
        job.run(options, goal)
    else:
        from jobs import exact as exact_job  # which draws, and takes as long to import as all the rest

        exact_job.run(options, exact, exact_seeds, goal)


@app.command()
def proxies(
    recipe: Recipe,
    assignments: Assignments = None,
    storage: Storage = DEFAULT_STORAGE,
    workers: Workers = None,
    gpus_per_worker: GpusPerWorker = 0.0,
    address: Address = None,
    plugin: Plugins = None,
    dry_run: DryRun = False,
) -> None:
    """Compute cheap stand-ins for memorization from one training run, and hold them against the scores."""
    from jobs import proxies as job
    from jobs.session import Options

    job.run(
        Options(recipe, assignments or (), storage, "none", workers, gpus_per_worker, address, plugin or (), dry_run)
    )


@app.command()
def influence(
    recipe: Recipe,
    assignments: Assignments = None,
    storage: Storage = DEFAULT_STORAGE,
    plugin: Plugins = None,
    threshold: Annotated[
        float,
        typer.Option(min=0.01, max=1, help="Least influence of a pair: rise in accuracy on the test example."),
    ] = 0.15,
    memorization: Annotated[
        float,
        typer.Option(min=-1, max=1, help="Least memorization score of its training example; -1: every one."),
    ] = 0.25,
) -> None:
    """Find the training examples that change the answers on test examples, from a campaign's subset models."""
    from jobs import influence as job
    from jobs.session import Options

    job.run(
        Options(recipe, assignments or (), storage, "none", plugins=plugin or ()), job.Bounds(threshold, memorization)
    )


@app.command()
def references(
    recipe: Recipe,
    assignments: Assignments = None,
    storage: Storage = DEFAULT_STORAGE,
    tracking_uri: TrackingUri = None,
    workers: Workers = None,
    gpus_per_worker: GpusPerWorker = 0.0,
    address: Address = None,
    plugin: Plugins = None,
    dry_run: DryRun = False,
    compile: Compile = "auto",
) -> None:
    """Train originals, and the references retrained without each forget set."""
    from jobs import references as job
    from jobs.session import Options

    given = (storage, tracking_uri, workers, gpus_per_worker, address, plugin or (), dry_run, compile)
    job.run(Options(recipe, assignments or (), *given))


@app.command()
def sweep(
    recipe: Recipe,
    assignments: Assignments = None,
    storage: Storage = DEFAULT_STORAGE,
    tracking_uri: TrackingUri = None,
    workers: Workers = None,
    gpus_per_worker: GpusPerWorker = 0.0,
    address: Address = None,
    plugin: Plugins = None,
    dry_run: DryRun = False,
    compile: Compile = "auto",
    search: search_options.Kind = None,
    samples: search_options.Samples = None,
    search_seed: search_options.Seed = None,
    objective: search_options.Objective = None,
    direction: search_options.Direction = None,
    scheduler: search_options.Scheduler = None,
    time_budget: search_options.TimeBudget = None,
    max_concurrent: search_options.MaxConcurrent = None,
    retries: search_options.Retries = 2,
    tune: Annotated[
        str | None,
        typer.Option(
            metavar="CRITERION",
            help="Choose each arm's options by a criterion on other seeds and forget sets, and report only these; "
            "`unlearn list criteria` shows them, --set tuning.seeds=... and so on the rest.",
        ),
    ] = None,
) -> None:
    """Run every method, budget and rate of a recipe with Ray Tune, training first what the runs depend on."""
    from jobs import sweep as job
    from jobs.session import Options

    asked = {"search": search, "samples": samples, "search_seed": search_seed, "objective": objective}
    asked |= {"direction": direction, "scheduler": scheduler, "tune": tune}
    texts = search_options.assignments({"assignments": assignments, **asked})
    given = (storage, tracking_uri, workers, gpus_per_worker, address, plugin or (), dry_run, compile)
    job.run(Options(recipe, texts, *given, time_budget or Deadline(), max_concurrent, retries))


@app.command()
def status(
    recipe: Annotated[str | None, typer.Argument(help="A recipe to hold against the store.")] = None,
    assignments: Assignments = None,
    storage: Storage = DEFAULT_STORAGE,
    plugin: Plugins = None,
) -> None:
    """Show what a store holds: sweeps, runs done and failed, campaigns, and what they cost."""
    from jobs import status as job
    from jobs.session import Options

    job.run(Options(recipe or "", assignments or (), storage, "none", plugins=plugin or ()))


@app.command()
def explain(
    first: Annotated[str, typer.Argument(help="Key of a run, or its first characters.")],
    second: Annotated[str, typer.Argument(help="Key of another.")],
    storage: Storage = DEFAULT_STORAGE,
) -> None:
    """Say why two runs have different keys."""
    from jobs import explain as job

    job.run(first, second, storage)


@app.command()
def track(storage: Storage = DEFAULT_STORAGE, tracking_uri: TrackingUri = None) -> None:
    """Bring MLflow level with the store; writing twice adds nothing."""
    from jobs import track as job

    job.run(storage, tracking_uri)


@app.command()
def export(storage: Storage = DEFAULT_STORAGE) -> None:
    """Write the Parquet tables in exports/ anew from the store."""
    from jobs import export as job

    job.run(storage)


@app.command()
def report(
    storage: Storage = DEFAULT_STORAGE,
    sweep: Annotated[
        str | None, typer.Option(help="Key of a sweep, or its first characters. Default: the newest.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("report.html"),
    table: Annotated[
        str, typer.Option(help="What to print: comparison, selections, paper, ablation or rum.")
    ] = "comparison",
) -> None:
    """Write the HTML report of a sweep, and print one of its tables, from the exported tables."""
    from jobs import report as job

    job.run(storage, sweep, out, table)


@app.command()
def pack(
    recipe: Recipe,
    assignments: Assignments = None,
    storage: Storage = DEFAULT_STORAGE,
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("order.json"),
    plugin: Plugins = None,
    dry_run: DryRun = False,
) -> None:
    """Write a sweep's missing runs as a work order for a machine without Ray or a network."""
    from jobs import pack as job
    from jobs.session import Options

    job.run(Options(recipe, assignments or (), storage, "none", plugins=plugin or (), dry_run=dry_run), out)


@app.command()
def unpack(
    parts: Annotated[list[Path], typer.Argument(help="What orchestrator.offline wrote there: part-*.npz.")],
    storage: Storage = DEFAULT_STORAGE,
) -> None:
    """Bring the runs of a work order into a store, where they are like any other."""
    from jobs import pack as job

    job.unpack(parts, storage)


@app.command("list")
def catalogue(
    what: Annotated[
        str | None, typer.Argument(help="recipes, methods, strategies, datasets, ...; default: all.")
    ] = None,
    plugin: Plugins = None,
) -> None:
    """List recipes, methods, strategies, data sets, models, forget sets and metrics, with their options."""
    from jobs import catalogue as job

    job.run(what, plugin or ())


@app.command()
def doctor(
    storage: Storage = DEFAULT_STORAGE,
    tracking_uri: TrackingUri = None,
    address: Annotated[
        str | None,
        typer.Option(help="A dashboard (http://...), or a Ray as for other commands. Default: RAY_ADDRESS, else none."),
    ] = None,
    plugin: Plugins = None,
) -> None:
    """Check a cluster, or this machine, before a sweep does: versions, GPUs, storage, plugins, MLflow, token, room."""
    from jobs import doctor as job
    from jobs.session import Options

    job.run(Options("", (), storage, tracking_uri, address=address, plugins=plugin or ()))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def submit(
    context: typer.Context,
    address: Annotated[str, typer.Option(help="The cluster's dashboard.")] = "http://127.0.0.1:8265",
    submission_id: Annotated[str | None, typer.Option(help="Name of the job; a name runs once.")] = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Do not stream the logs.")] = False,
) -> None:
    """Run a command (after --) as a Ray job on a cluster, logs streamed: submit -- sweep digits --storage /shared."""
    from jobs import submit as job

    if given := _given(context):
        job.check_study(given.get("recipe"), search_options.assignments(given), given.get("plugin") or ())
    job.run(list(context.args), address, submission_id, wait=not no_wait)


def _given(context: typer.Context) -> dict[str, Any]:
    """What the command after -- is given, by its parameters; empty for none, which the job refuses, and for --help.

    Refuses a command that is none of ours, or that would not take its words: before it is sent.
    """
    from orchestrator.registry import InputError, suggest

    known: Any = context.find_root().command
    name, words = (context.args or [""])[0], context.args[1:]
    if not name or "--help" in context.args:
        return {}
    own = _options(context.command)
    place = "before --, the command after it: unlearn submit --address URL -- sweep digits"
    if name.startswith("-"):
        flag = name.partition("=")[0]
        said = f"{flag} is an option of submit" if flag in own else f"submit has no option {flag}, {suggest(flag, own)}"
        raise InputError(f"{said}; its options go {place}")
    if name not in known.commands:
        raise InputError(f"unknown command {name!r} after --; {suggest(name, known.commands)}")
    for word in (word.partition("=")[0] for word in words):
        if word in own - _options(known.commands[name]):
            raise InputError(f"{word} is an option of submit, not of {name}, and goes {place}")
    found = known.commands[name].make_context(name, list(words))  # ends with its own usage error
    given: dict[str, Any] = found.params
    return given | ({"recipe": "digits"} if name == "demo" else {})


def _options(command: Any) -> set[str]:
    return {flag for parameter in command.params for flag in parameter.opts if flag.startswith("-")}


def main() -> None:
    """Run the command line; bad input is one sentence and exit code 2, an interrupt 130, failed runs 1.

    Work that the world stopped (storage full or away, no node left) is one sentence and 1: the input was good.
    """
    try:
        app()
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and end.code != 130:  # typer's answer to an interrupt
            raise
        _stop("interrupted; what is finished is kept, and the same command goes on from there", 130)
    except Exception as error:
        from orchestrator.pool import NoWorkersError
        from orchestrator.registry import InputError
        from orchestrator.store import StorageError

        if isinstance(error, InputError):
            _stop(str(error), 2)
        if isinstance(error, NoWorkersError | StorageError):
            _stop(str(error), 1)
        raise


def _stop(message: str, code: int) -> None:
    print(f"unlearn: {message}", file=sys.stderr)
    sys.exit(code)
