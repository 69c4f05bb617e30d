"""The commands of serving: `adapters` and `keys`. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print one line of JSON on standard output.")]

adapters = typer.Typer(
    help="Adapter versions, and the aliases that clients ask for them by.", no_args_is_help=True, rich_markup_mode=None
)

RegistryRoot = Annotated[
    str,
    typer.Option("--registry", metavar="DIR", envvar="TUNESMITH_REGISTRY", help="Folder or object-store URI."),
]
AdapterName = Annotated[str, typer.Argument(metavar="NAME", help="The adapter.", show_default=False)]
AliasName = Annotated[str, typer.Argument(metavar="ALIAS", help="Such as prod.", show_default=False)]
IfGeneration = Annotated[
    int | None,
    typer.Option(
        "--if-generation", metavar="N", help="Only if the registry is as `list` showed it.", show_default=False
    ),
]


@adapters.command("add")
def adapters_add(
    name: AdapterName,
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Its folder.", show_default=False)],
    alias: Annotated[str | None, typer.Option("--alias", help="Move this alias to it.")] = None,
    owner: Annotated[str | None, typer.Option("--owner", help="Tenant that alone sees it.")] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base", metavar="BASE", help="The base it will be served on, to compare with; its own without a manifest."
        ),
    ] = None,
    base_digest: Annotated[
        str | None, typer.Option("--base-digest", metavar="HEX", help="The base it was trained on, without a manifest.")
    ] = None,
    trust_base: Annotated[
        bool, typer.Option("--trust-base", help="Take it although nobody says which base it was trained on.")
    ] = False,
    trust_template: Annotated[
        bool, typer.Option("--trust-template", help="Take its chat templates unjudged; they run at every request.")
    ] = False,
    max_rank: Annotated[int, typer.Option("--max-rank", min=1, help="Largest LoRA rank.")] = 256,
    registry: RegistryRoot = "registry",
    as_json: AsJson = False,
) -> None:
    """Check an adapter and make it a version. The first version of a name is served as NAME at once."""
    from tunesmith.serving import adapters_command

    offered = adapters_command.Offered(
        name, artifact, alias, owner, base, base_digest, trust_base, trust_template, max_rank
    )
    adapters_command.add(registry, offered, as_json)


@adapters.command("alias")
def adapters_alias(
    name: AdapterName,
    alias: AliasName,
    version: Annotated[str, typer.Argument(metavar="VERSION", help="Beginning of its digest.", show_default=False)],
    if_generation: IfGeneration = None,
    registry: RegistryRoot = "registry",
    as_json: AsJson = False,
) -> None:
    """Make an alias lead to a version. Requests at work end on the version they began with."""
    from tunesmith.serving import adapters_command

    adapters_command.alias(registry, name, alias, version, if_generation, as_json)


@adapters.command("split")
def adapters_split(
    name: AdapterName,
    alias: AliasName,
    weights: Annotated[
        list[str], typer.Argument(metavar="VERSION=WEIGHT...", help="Such as 3f2a=90 77c1=10.", show_default=False)
    ],
    shadow: Annotated[
        str | None, typer.Option("--shadow", metavar="VERSION", help="Ask this one too, and show nobody its answers.")
    ] = None,
    if_generation: IfGeneration = None,
    registry: RegistryRoot = "registry",
    as_json: AsJson = False,
) -> None:
    """Split an alias between versions by weight. A user stays on one version."""
    from tunesmith.serving import adapters_command

    adapters_command.split(registry, name, alias, weights, shadow, if_generation, as_json)


@adapters.command("rollback")
def adapters_rollback(
    name: AdapterName,
    alias: AliasName,
    if_generation: IfGeneration = None,
    registry: RegistryRoot = "registry",
    as_json: AsJson = False,
) -> None:
    """Make an alias lead where it led before."""
    from tunesmith.serving import adapters_command

    adapters_command.rollback(registry, name, alias, if_generation, as_json)


@adapters.command("list")
def adapters_list(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One adapter.", show_default=False)] = None,
    registry: RegistryRoot = "registry",
    as_json: AsJson = False,
) -> None:
    """Show versions, and the aliases that lead to them."""
    from tunesmith.serving import adapters_command

    adapters_command.show(registry, name, as_json)


@adapters.command("remove")
def adapters_remove(
    name: AdapterName,
    what: Annotated[
        str, typer.Argument(metavar="VERSION|ALIAS", help="A version that no alias leads to.", show_default=False)
    ],
    if_generation: IfGeneration = None,
    registry: RegistryRoot = "registry",
    as_json: AsJson = False,
) -> None:
    """Take out a version or an alias. Files of a version that no name has any more are deleted."""
    from tunesmith.serving import adapters_command

    adapters_command.remove(registry, name, what, if_generation, as_json)


keys = typer.Typer(help="API keys of a serving registry.", no_args_is_help=True)


@keys.command("create")
def keys_create(
    tenant: Annotated[str, typer.Argument(help="Whose key it is.", show_default=False)],
    name: Annotated[str, typer.Option("--name", help="What people call it.")] = "",
    scopes: Annotated[
        list[str] | None, typer.Option("--scope", help="infer or admin; repeatable. [default: infer]")
    ] = None,
    models: Annotated[
        list[str] | None, typer.Option("--model", help="A model that it may ask; repeatable. [default: all]")
    ] = None,
    expires: Annotated[str | None, typer.Option("--expires", help="Such as 90d or 12h. [default: never]")] = None,
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="The key's own limit.")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(min=1, help="The key's own limit.")] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="The key's own limit.")] = None,
    registry: RegistryRoot = "registry",
    as_json: AsJson = False,
) -> None:
    """Make a key. It is printed once, and only a hash of it is kept."""
    from tunesmith.serving import keys_command

    limits = {
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "concurrency": concurrency,
    }
    keys_command.create(registry, tenant, name, scopes or ["infer"], models or [], expires, limits, as_json)


@keys.command("list")
def keys_list(registry: RegistryRoot = "registry", as_json: AsJson = False) -> None:
    """Show the keys, never their secrets."""
    from tunesmith.serving import keys_command

    keys_command.show(registry, as_json)


@keys.command("revoke")
def keys_revoke(
    id: Annotated[str, typer.Argument(metavar="ID", help="As `list` shows it.", show_default=False)],
    registry: RegistryRoot = "registry",
    as_json: AsJson = False,
) -> None:
    """End a key for good."""
    from tunesmith.serving import keys_command

    keys_command.revoke(registry, id, as_json)


Url = Annotated[str, typer.Option("--url", envvar="TUNESMITH_URL", help="The service's base URL.")]
ApiKey = Annotated[
    str | None,
    typer.Option("--key", envvar="TUNESMITH_API_KEY", help="Its API key; better given in the environment."),
]
LOCAL = "http://127.0.0.1:8000/v1"


def serve(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file: docs/serve.md.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Serve bases, adapters and mixtures of agents behind OpenAI's API, until it is told to end."""
    from tunesmith.serving import serve_command

    serve_command.run(config, as_json)


def chat(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="An adapter, a base or a mixture.", show_default=False)],
    url: Url = LOCAL,
    key: ApiKey = None,
) -> None:
    """Talk to a served model; /model changes it."""
    from tunesmith.serving.chat import talk

    talk(url, key, model)


def certify(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Its folder.", show_default=False)],
    model: Annotated[str, typer.Option("--model", help="The name it is served by.", show_default=False)],
    base: Annotated[
        str | None, typer.Option("--base", help="Name of the base an adapter runs on. [default: found by itself]")
    ] = None,
    url: Url = LOCAL,
    key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Check that a running service answers as the model that was trained. Exit code 1 when it does not."""
    from tunesmith.serving import certify_command

    certify_command.run(artifact, model, base, url, key, as_json)
