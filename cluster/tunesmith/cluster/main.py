"""The command line. Nothing heavy is imported before a command needs it: `tunesmith --help` answers at once."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from tunesmith.cluster import job_commands
from tunesmith.cluster.imports import switch_off_compiler, uncollected
from tunesmith.cluster.kube import commands as kube
from tunesmith.serving import commands

app = typer.Typer(
    name="tunesmith",
    help="Distributed fine-tuning on Ray: one recipe from a base model to a certified adapter.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Overrides a key, as in train.learning_rate=1e-4. Repeatable."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one line of JSON on standard output.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"tunesmith {version('tunesmith')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def validate(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check a recipe: every key, type and contradiction, each mistake with its line."""
    from tunesmith.cluster.console import print_json, say, stderr
    from tunesmith.cluster.recipe.load import load_recipe, resolved

    checked = load_recipe(recipe, overrides)
    kinds, further = f"{checked.objective.kind}, {checked.adaptation.kind}", "`tunesmith train --dry-run` also checks"
    if checked.tune is not None:
        from tunesmith.tuning import space

        space.check(checked)
        kinds += f", a search of {', '.join(checked.tune.space)}"
        further = "`tunesmith sweep --dry-run` also checks"
    if as_json:
        print_json({"valid": True, "recipe": resolved(checked)})
    else:
        say(
            stderr(),
            f"{recipe} is a valid recipe: {kinds}, run {checked.name} (schema only; {further} the model, the data and the machine)",
        )


@app.command()
def plan(
    recipe: RecipePath,
    fleet: Annotated[
        str,
        typer.Option("--fleet", help="Such as 8xH100-80GB, 2x8xA100-80GB, a name of a fleets file, or `this machine`."),
    ] = "this machine",
    fleets: Annotated[
        Path | None, typer.Option("--fleets", metavar="FILE", help="GPUs and fleets of your own.")
    ] = None,
    work_as: Annotated[
        str, typer.Option("--as", metavar="tunesmith|hf", help="Whose training: ours, or the HF Trainer's with PEFT.")
    ] = "tunesmith",
    explain: Annotated[bool, typer.Option("--explain", help="Show the arithmetic in words.")] = False,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Simulate a recipe on a fleet: does it fit, what does it cost, what to change. Needs no GPU and no weights."""
    from tunesmith.cluster.console import print_json, stdout
    from tunesmith.cluster.errors import UsageError
    from tunesmith.cluster.fleet import parse_fleet
    from tunesmith.cluster.fleet_file import load_fleets
    from tunesmith.cluster.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides)
    if work_as not in ("tunesmith", "hf"):
        raise UsageError(f"--as {work_as}: there are tunesmith and hf")
    where = parse_fleet(fleet, load_fleets(fleets), loaded.cluster.most_workers)
    gc.disable()  # importing makes a million objects that stay; the planner switches it on again before it simulates
    switch_off_compiler()  # a plan runs nothing that is compiled
    from tunesmith.trainers.memory.geometry import geometry
    from tunesmith.trainers.memory.plan import make_plan

    model = geometry(loaded.model.base, loaded.output.dir)
    made = make_plan(loaded, model, where, as_hf=work_as == "hf", alone=True)
    gc.freeze()  # the process ends; looking for garbage then would take most of a second
    if as_json:
        print_json(made.as_json())
        return
    from tunesmith.trainers.memory.show import show

    show(made, stdout(), explain)


@app.command()
def advise(
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="DATA... | RECIPE", help="Data files, or one recipe with model and data.", show_default=False
        ),
    ],
    model: Annotated[
        str | None, typer.Option("--model", metavar="BASE", help="The base, when data files are given.")
    ] = None,
    goal: Annotated[str | None, typer.Option("--goal", help="knowledge, ability, format or safety.")] = None,
    fleet: Annotated[
        str | None,
        typer.Option("--fleet", help="Such as 8xH100-80GB; this machine when not given.", show_default=False),
    ] = None,
    fleets: Annotated[Path | None, typer.Option("--fleets", metavar="FILE", help="A file of GPUs and fleets.")] = None,
    tasks: Annotated[int, typer.Option("--tasks", min=1, help="Tasks that will be trained on this base.")] = 1,
    out: Annotated[Path | None, typer.Option("--out", help="The recipe's file. [default: NAME-advised.yaml]")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure the data against the base, recommend an objective and adaptation, and write the recipe."""
    from tunesmith.cluster.console import print_json, stderr
    from tunesmith.trainers.advise import command, talk

    with stderr().status("reading the data and asking the base …"):
        report = command.run(command.Request(what, model, goal, fleet, fleets, tasks, out))
    if as_json:
        print_json(report.as_json())
        return
    talk.show(report, stderr())
    typer.echo(str(report.path))


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    allow_change: Annotated[
        bool, typer.Option("--allow-change", help="Go on with a run whose recipe, data or base has changed.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check model, data and resources, and stop there.")
    ] = False,
    places: Annotated[
        list[str] | None,
        typer.Option("--place", metavar="NODE=WORKERS", hidden=True, help="Of the cluster, by Ray's id. Repeatable."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train a recipe, here or on the connected cluster. The same command again goes on where it stopped."""
    from dataclasses import asdict

    from tunesmith.cluster.console import print_json, say, stderr
    from tunesmith.cluster.progress import Display
    from tunesmith.cluster.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides)
    with Display(stderr()) as display:
        with uncollected():
            from tunesmith.trainers import launch

        if dry_run:
            plan = launch.plan(loaded, display)
            if as_json:
                print_json(plan)
            return
        placed = {node: int(workers) for node, _, workers in (place.partition("=") for place in places or [])}
        result = launch.run(loaded, allow_change, display, placed)
    if as_json:
        print_json(asdict(result))
        return
    from tunesmith.trainers.closing import summary

    changed = [argument for override in overrides or [] for argument in ("--set", override)]
    say(stderr(), summary(loaded, result, ["train", str(recipe), *changed]))


@app.command()
def sweep(
    recipe: RecipePath,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the search, the model, data and resources, and stop there.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Search a recipe's `tune` section, and write the winner as a recipe and a model. The same command goes on."""
    from dataclasses import asdict

    from tunesmith.cluster.console import print_json, say, stderr
    from tunesmith.cluster.progress import Display
    from tunesmith.cluster.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides)
    with Display(stderr()) as display:
        from tunesmith.tuning import sweep as search

        if dry_run:
            plan = search.plan(loaded, display)
            if as_json:
                print_json(plan)
            return
        result = search.run(loaded, display, stderr())
    if as_json:
        print_json(asdict(result))
        return
    from tunesmith.tuning.closing import summary

    say(stderr(), summary(result))


@app.command()
def quickstart(
    folder: Annotated[Path, typer.Option("--dir", help="Where the runs go.")] = Path("quickstart"),
    serve: Annotated[bool, typer.Option(help="Serve the adapter at the end and ask it something.")] = True,
    as_json: AsJson = False,
) -> None:
    """Do the whole path on this machine, offline, on real text, in minutes."""
    from tunesmith.cluster.console import print_json, stderr
    from tunesmith.cluster.progress import Display
    from tunesmith.cluster.session import RaySession

    began = time.monotonic()
    with RaySession() as session:
        session.start()  # one Ray for everything
        with Display(stderr()) as display:
            from tunesmith.trainers import quickstart as path

            summary = path.run(folder, display)
        if serve:
            from tunesmith.serving import showing

            with stderr().status("serving the adapter …"):
                shown = showing.side_by_side(folder, *(Path(stage["artifact"]) for stage in summary["stages"]))
            stderr().print(showing.table(shown))
            summary["answers"] = showing.as_json(shown)
    summary["seconds"] = time.monotonic() - began
    path.say_end(folder, summary, stderr())
    if as_json:
        print_json(summary)


def _k8s_documents(wanted: kube.Wanted) -> list[dict[str, Any]]:
    """What `tunesmith k8s render` writes: a recipe is sized by the planner, a serving configuration by its bases' weights."""
    from tunesmith.trainers.memory.weights import weights_gib

    if wanted.serves:
        from tunesmith.serving.kube import documents as service

        return service(wanted, weights_gib)
    switch_off_compiler()  # as in `plan`
    from tunesmith.trainers.kube import documents as job

    return job(wanted)


kube.add_render(_k8s_documents)
app.add_typer(kube.k8s, name="k8s")
for command in (
    *(job_commands.submit, job_commands.jobs, job_commands.describe, job_commands.logs, job_commands.stop),
    *(job_commands.artifacts, job_commands.up, job_commands.down, job_commands.status),
):
    app.command()(command)


@app.command()
def doctor(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="[RECIPE]", help="Its folder, address and needs count.", show_default=False)
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            "--address", help="Of a Ray cluster: auto, host:port, or local to start Ray here.", show_default=False
        ),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option("--storage", metavar="FOLDER", help="Where runs are written. [default: the recipe's, or here]"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Find out what is wrong with this machine or a cluster, and how to mend it. Exit code 1 when something is."""
    from tunesmith.cluster.doctor import command

    command.run(recipe, address, storage, as_json)


app.command()(commands.serve)
app.command()(commands.chat)
app.command()(commands.certify)
app.add_typer(commands.adapters, name="adapters")
app.add_typer(commands.keys, name="keys")


def main() -> None:
    """Entry point: runs a command and turns whatever ends it into an exit code."""
    try:
        app()
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the one place where a command's errors end
        from tunesmith.cluster.console import exit_code_of

        raise SystemExit(exit_code_of(error)) from None


if __name__ == "__main__":
    main()
