"""`tunesmith k8s`: names and options, as light as the command line itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from typer import Option

if TYPE_CHECKING:
    from tunesmith.cluster.kube.pods import Placement

Number = TypeVar("Number", int, float)
SHARED_CLAIM = "tunesmith-shared"
FOR_RECIPES = {
    "network": "--network-resource",
    "topology": "--topology",
    "retries": "--retries",
    "deadline": "--deadline",
    "start": "--start-deadline",
    "storage": "--storage-gb-s",
    "overrides": "--set",
}
"""Options of `render` that a serving configuration has no use for, by their parameters."""
NEEDED = {"network": "fleet", "fleets": "fleet", "topology": "queue"}
"""Options that do nothing without another: adapters are for pods with GPUs, and topology is Kueue's."""
FOR_SERVING = {"name": "--name", "weights": "--weights"}
"""Those that a recipe has no use for."""
AsJson = Annotated[bool, Option("--json", help="Print one line of JSON on standard output.")]

k8s = typer.Typer(
    help="Kubernetes: documents from a recipe, and what is wrong with any.", no_args_is_help=True, rich_markup_mode=None
)


@k8s.command("validate")
def validate(
    manifests: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE|FOLDER...", help="Manifests, or folders with a kustomization.", show_default=False
        ),
    ],
    schemas: Annotated[
        Path | None, Option("--schemas", metavar="FOLDER", help="Schemas of further custom resources.")
    ] = None,
    gates: Annotated[
        list[str] | None,
        Option("--feature-gate", metavar="NAME", help="That KubeRay's operator has on. Repeatable."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check manifests: schemas, what KubeRay and Kueue refuse besides, and security. Needs no cluster."""
    from tunesmith.cluster.console import print_json, say, stderr
    from tunesmith.cluster.kube import check
    from tunesmith.cluster.kube.schemas import load_folder, unchecked_rules

    (sources, others), extra = check.sources(manifests), load_folder(schemas) if schemas else {}
    if others:
        say(stderr(), f"no manifests, left out: {', '.join(others)}")
    for kind, schema in extra.items():
        if unchecked := unchecked_rules(schema):
            say(stderr(), f"warning: {kind}: {len(unchecked)} of its rules (CEL) are not checked", "yellow")
    on, count = frozenset(gates or ()), sum(map(len, sources))
    found = [finding for source in sources for finding in check.check_documents(source, extra, on)]
    if as_json:
        findings = [finding.as_json() for finding in found]
        print_json({"valid": not found, "documents": count, "left_out": others, "findings": findings})
    check.refuse(found, count)
    if not as_json:
        say(stderr(), f"{_count(count)} {'is' if count == 1 else 'are'} valid")


@dataclass(frozen=True)
class Wanted:
    """What `render` is asked for.

    Attributes:
        path: of a recipe, or of a serving configuration.
        serves: which of the two.
        fleet, fleets: as `tunesmith plan` takes them; no fleet is workers on CPUs, one a pod.
        deadline_s: None reckons it.
        storage_gb_s: 10^9 bytes a second that one node writes to the claim.
        name: of a service; None takes the file's.
        weights: GiB of bases that are not here, by their names.
    """

    path: Path
    serves: bool
    placement: Placement
    overrides: list[str] = field(default_factory=list)
    fleet: str | None = None
    fleets: Path | None = None
    retries: int = 3
    deadline_s: int | None = None
    start_s: int = 3600
    storage_gb_s: float = 1.0
    name: str | None = None
    weights: dict[str, float] = field(default_factory=dict)


def add_render(make: Callable[[Wanted], list[dict[str, Any]]]) -> None:
    """Adds `render`, whose documents come from `make`: it knows the planner and the service, and we do not."""

    @k8s.command("render")
    def render(
        context: typer.Context,
        what: Annotated[Path, typer.Argument(metavar="RECIPE|CONFIG", help="Or a serving file.", show_default=False)],
        fleet: Annotated[str | None, Option("--fleet", help="Such as 2x8xH100-80GB. [default: CPUs]")] = None,
        fleets: Annotated[Path | None, Option("--fleets", metavar="FILE", help="GPUs and fleets of your own.")] = None,
        image: Annotated[str | None, Option("--image", help="[default: tunesmith:VERSION-cpu or -gpu]")] = None,
        namespace: Annotated[str | None, Option("--namespace", help="[default: kubectl's]")] = None,
        claim: Annotated[str, Option("--claim", help="A volume claim that many nodes may write.")] = SHARED_CLAIM,
        queue: Annotated[str | None, Option("--queue", help="Kueue's LocalQueue.")] = None,
        priority: Annotated[str | None, Option("--priority", help="A priority class; Kueue's with --queue.")] = None,
        secret: Annotated[str | None, Option("--secret", help="A Secret that becomes the environment.")] = None,
        network: Annotated[
            list[str] | None, Option("--network-resource", metavar="NAME=N", help="RDMA devices of a pod. Repeatable.")
        ] = None,
        topology: Annotated[str | None, Option("--topology", help="Node label that pods are to share.")] = None,
        retries: Annotated[int, Option("--retries", min=0, help="Attempts after the first.")] = Wanted.retries,
        deadline: Annotated[int | None, Option("--deadline", min=1, metavar="S", help="[default: reckoned]")] = None,
        start: Annotated[int, Option("--start-deadline", min=1, metavar="S", help="Until pods run.")] = Wanted.start_s,
        storage: Annotated[
            float, Option("--storage-gb-s", min=0.001, help="What a node writes to the claim, 10^9 bytes a second.")
        ] = Wanted.storage_gb_s,
        name: Annotated[str | None, Option("--name", help="Of a service. [default: the file's]")] = None,
        weights: Annotated[
            list[str] | None, Option("--weights", metavar="BASE=GIB", help="Of a base not here. Repeatable.")
        ] = None,
        out: Annotated[Path | None, Option("--out", metavar="FOLDER", help="For kubectl apply -k.")] = None,
        overrides: Annotated[
            list[str] | None, Option("--set", metavar="KEY=VALUE", help="Overrides a key of a recipe. Repeatable.")
        ] = None,
        as_json: AsJson = False,
    ) -> None:
        """Write the RayJob of a recipe, sized by the planner, or the RayService of a serving configuration."""
        from tunesmith.cluster.console import say, stderr

        bases = _bases(what)
        _refuse_unused(context, serves=bases is not None)
        on_gpu = fleet is not None if bases is None else any(base.get("gpus") for base in bases.values())
        devices = _pairs("--network-resource", network or [], int)
        where = _placement(image, on_gpu, namespace, claim, queue, priority, secret, devices, topology)
        sizes = _pairs("--weights", weights or [], float)
        wanted = Wanted(
            what,
            bases is not None,
            where,
            overrides or [],
            fleet,
            fleets,
            retries,
            deadline,
            start,
            storage,
            name,
            sizes,
        )
        if not wanted.serves:
            say(stderr(), f"sizing the pods of {what}: the planner simulates a step, which may take a minute")
        documents = make(wanted)
        if needed := [] if wanted.serves else _on_claim(wanted):
            say(stderr(), f"copy to the claim {claim} first, unless the hub has it: {', '.join(needed)}")
        _finish(documents, out, as_json)


def _refuse_unused(context: typer.Context, serves: bool) -> None:
    """Raises UsageError for an option that was given and would do nothing."""
    from tunesmith.cluster.errors import UsageError

    sources = {parameter: context.get_parameter_source(parameter) for parameter in context.params}
    given = {parameter for parameter, source in sources.items() if source and source.name != "DEFAULT"}
    unused = [option for parameter, option in (FOR_RECIPES if serves else FOR_SERVING).items() if parameter in given]
    if unused:
        kind, other = ("a serving configuration", "recipes") if serves else ("a recipe", "serving configurations")
        what = f"{', '.join(unused)}: of no use to {context.params['what']}, {kind}"
        raise UsageError(what, f"Leave out what is for {other}.")
    for parameter, needed in NEEDED.items():
        if parameter in given and needed not in given:
            option = FOR_RECIPES.get(parameter, f"--{parameter}")
            raise UsageError(f"{option}: of no use without --{needed}", f"Add --{needed}, or leave it out.")


def _bases(path: Path) -> dict[str, Any] | None:
    """The bases of a serving configuration, unchecked; None for a recipe."""
    from tunesmith.cluster.errors import UsageError
    from tunesmith.cluster.recipe.lines import read_yaml

    tree, _ = read_yaml(path, UsageError, "recipe or serving configuration", "model or bases")
    bases = tree.get("bases")
    return {key: base for key, base in bases.items() if isinstance(base, dict)} if isinstance(bases, dict) else None


def _on_claim(wanted: Wanted) -> list[str]:
    """The data of a recipe that pods look for on the claim."""
    from tunesmith.cluster.kube.pods import MOUNT, on_claim
    from tunesmith.cluster.recipe.load import load_recipe

    data = load_recipe(wanted.path, wanted.overrides).data
    paths = [on_claim("data", source.path) for source in (*data.train, *(data.validation or []))]
    return [path for path in dict.fromkeys(paths) if path.startswith(f"{MOUNT}/")]


def _placement(
    image: str | None,
    on_gpu: bool,
    namespace: str | None,
    claim: str,
    queue: str | None,
    priority: str | None,
    secret: str | None,
    network: dict[str, int],
    topology: str | None,
) -> Placement:
    from importlib.metadata import version

    from tunesmith.cluster.kube.pods import Placement

    ours = f"tunesmith:{version('tunesmith')}-{'gpu' if on_gpu else 'cpu'}"
    return Placement(
        image=image or ours,
        namespace=namespace,
        claim=claim,
        queue=queue,
        priority=priority,
        secret=secret,
        network=network,
        topology=topology,
    )


def _finish(documents: Sequence[dict[str, Any]], out: Path | None, as_json: bool) -> None:
    """Checks rendered documents, and prints or writes them.

    Raises:
        InvalidManifestError: an option of the user's makes them such as nobody should apply.
    """
    from tunesmith.cluster.console import print_json, say, stderr
    from tunesmith.cluster.kube import check, output

    check.refuse(check.check_documents(("rendered", document) for document in documents), len(documents))
    files = [str(path) for path in output.write(documents, out)] if out else []
    if as_json:
        print_json({"documents": list(documents), "files": files})
    elif out:
        say(stderr(), f"{_count(len(documents))} in {out}: kubectl apply -k {out}")
    else:
        typer.echo(output.as_yaml(documents), nl=False)


def _count(documents: int) -> str:
    return f"{documents} document{'s' if documents > 1 else ''}"


def _pairs(option: str, texts: Sequence[str], number: Callable[[str], Number]) -> dict[str, Number]:
    """The values of a repeatable option `NAME=NUMBER`.

    Raises:
        UsageError: one is not of that form.
    """
    from tunesmith.cluster.errors import UsageError

    found: dict[str, Number] = {}
    for text in texts:
        name, equals, value = text.rpartition("=")
        try:
            found[name] = number(value)
        except ValueError:
            equals = ""
        if not equals or found[name] <= 0:
            raise UsageError(f"{option} {text}: not of the form NAME=NUMBER", f"Write such as {option} name=8.")
    return found
