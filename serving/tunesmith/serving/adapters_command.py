"""`tunesmith adapters`: what an operator does with versions and aliases, and how the registry looks afterwards."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from tunesmith.cluster.console import print_json, say, stderr, stdout
from tunesmith.cluster.errors import UsageError
from tunesmith.serving.bases import RUNS, base_of, facts_of
from tunesmith.serving.catalog import SHORTEST_PIN, Adapter, Catalog, Version, as_state
from tunesmith.serving.checks import Rules
from tunesmith.serving.registry import Registry


@dataclass(frozen=True)
class Offered:
    """What `add` was given; see its options."""

    name: str
    artifact: Path
    alias: str | None = None
    owner: str | None = None
    base: str | None = None
    base_digest: str | None = None
    trust_base: bool = False
    trust_template: bool = False
    max_rank: int = 256


def add(root: str, offered: Offered, as_json: bool) -> None:
    """Checks an adapter and makes it a version; prints what came of it.

    Raises:
        AdapterError, RegistryError: it may not enter; nothing was written.
        ModelError: there is no such base.
        StorageError: writing failed.
    """
    rules = Rules(
        base=facts_of(base_of("--base", offered.base, RUNS)) if offered.base else None,
        base_digest=offered.base_digest,
        trust_base=offered.trust_base,
        trust_template=offered.trust_template,
        max_rank=offered.max_rank,
    )
    registry = Registry(root)
    added = registry.add(offered.name, offered.artifact, offered.owner, offered.alias, rules)
    if as_json:
        print_json(asdict(added))
        return
    asked_by = ", ".join(f"{added.name}@{alias}" for alias in added.aliases)
    what = "is a new version" if added.new else "was there already"
    leads = f"; {asked_by} leads to it" if asked_by else "; no alias leads to it yet"
    _changed(registry, f"{added.name}: {added.digest[:SHORTEST_PIN]} {what}{leads}", added.name)


def alias(root: str, name: str, alias: str, version: str, if_generation: int | None, as_json: bool) -> None:
    """Moves an alias; prints where it leads.

    Raises:
        MovedError: the registry is of another generation.
        RegistryError, AdapterError: there is no such version, or no alias is called that.
    """
    registry = Registry(root)
    _moved(registry, name, alias, registry.move(name, alias, version, if_generation), as_json)


def split(
    root: str, name: str, alias: str, weights: list[str], shadow: str | None, if_generation: int | None, as_json: bool
) -> None:
    """Splits an alias by weight; prints where it leads.

    Args:
        weights: as `VERSION=WEIGHT`.

    Raises:
        MovedError, RegistryError, AdapterError: see `alias`.
        UsageError: a weight is not written like that.
    """
    registry = Registry(root)
    shares = _shares(weights)
    _moved(registry, name, alias, registry.split(name, alias, shares, shadow, if_generation), as_json)


def rollback(root: str, name: str, alias: str, if_generation: int | None, as_json: bool) -> None:
    """Makes an alias lead where it led before; prints where that is.

    Raises:
        MovedError, RegistryError: see `alias`; or it has led nowhere else.
    """
    registry = Registry(root)
    _moved(registry, name, alias, registry.rollback(name, alias, if_generation), as_json)


def remove(root: str, name: str, what: str, if_generation: int | None, as_json: bool) -> None:
    """Takes out a version or an alias; prints what is left of the name.

    Raises:
        MovedError, RegistryError: see `alias`; or an alias leads to the version.
    """
    registry = Registry(root)
    generation = registry.remove(name, what, if_generation)
    if as_json:
        print_json({"name": name, "removed": what, "generation": generation})
        return
    left = name in registry.read()[1].adapters
    _changed(registry, f"{name}: {what} is removed{'' if left else ', and the name with it'}", name if left else None)


def show(root: str, name: str | None, as_json: bool) -> None:
    """Prints the registry, or one adapter of it.

    Raises:
        RegistryError: there is no such adapter.
    """
    generation, catalog = Registry(root).read()
    if name is not None:
        catalog = Catalog(adapters={name: catalog.adapter(name)})
    if as_json:
        print_json({"registry": root, "generation": generation, **as_state(catalog)})
        return
    if not catalog.adapters:
        say(stderr(), f"{root} holds no adapter yet; `tunesmith adapters add NAME ARTIFACT` adds one")
        return
    stdout().print(table(catalog))
    say(stderr(), f"{root}, generation {generation}", "dim")


def table(catalog: Catalog) -> Group:
    """A table for each adapter: its versions, the newest first, and who is sent to them."""
    return Group(*(_adapter_table(name, adapter) for name, adapter in sorted(catalog.adapters.items())))


def _adapter_table(name: str, adapter: Adapter) -> Table:
    title = Text.assemble((name, "bold"), f"  owned by {adapter.owner}" if adapter.owner else "")
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, title_style="")
    for column in ("version", "kind", "base", "size", "added (UTC)"):
        made.add_column(column, no_wrap=True, justify="right" if column == "size" else "left")
    made.add_column("aliases", overflow="fold")
    for version in reversed(adapter.versions):
        leading = _leading(adapter, version)
        made.add_row(
            Text(version.digest[:SHORTEST_PIN], style="bold" if leading else "dim"),
            f"{version.peft_type} {version.rank}" if version.rank else version.peft_type,
            version.base_digest[:8] if version.base_digest else "unknown",
            _size(version.size),
            version.added[:16].replace("T", " "),
            Text("\n".join(leading) or "–"),
        )
    return made


def _leading(adapter: Adapter, version: Version) -> list[str]:
    """The aliases that lead to a version, with their shares."""
    found = []
    for name, alias in sorted(adapter.aliases.items()):
        total = sum(route.weight for route in alias.routes)
        for route in alias.routes:
            if route.digest == version.digest:
                found.append(name if len(alias.routes) == 1 else f"{name} {100 * route.weight / total:.3g} %")
        if alias.shadow == version.digest:
            found.append(f"{name} (shadow)")
    return found


def _moved(registry: Registry, name: str, alias: str, generation: int, as_json: bool) -> None:
    if as_json:
        target = registry.read()[1].alias(name, alias)
        routes = [asdict(route) for route in target.routes]
        print_json({"name": name, "alias": alias, "routes": routes, "shadow": target.shadow, "generation": generation})
        return
    _changed(registry, f"{name}@{alias} is moved", name)


def _changed(registry: Registry, what: str, name: str | None) -> None:
    generation, catalog = registry.read()
    say(stderr(), f"{what} (generation {generation})", "green")
    if name is not None:
        stdout().print(table(Catalog(adapters={name: catalog.adapter(name)})))


def _shares(weights: list[str]) -> dict[str, float]:
    shares: dict[str, float] = {}
    for text in weights:
        version, _, weight = text.partition("=")
        try:
            share = float(weight)
        except ValueError:
            raise UsageError(f"{text!r}: expected VERSION=WEIGHT, such as 3f2a9c41d0e7=90") from None
        if version in shares:
            raise UsageError(f"{version} stands twice: {', '.join(weights)}")
        shares[version] = share
    return shares


def _size(size: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size} B"
