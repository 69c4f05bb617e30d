"""The tables of docs/serve.md, from the schema: `python -m tunesmith.serving.reference`."""

from __future__ import annotations

from tunesmith.cluster.fleet_reference import key_table
from tunesmith.serving.config import Agent, Autoscaling, Base, Endpoint, Http, Limits, Proposer, Sampling, Serve

SECTIONS = {
    "Top level": Serve,
    "`bases.NAME`": Base,
    "`bases.NAME.autoscaling`": Autoscaling,
    "`agents.NAME`": Agent,
    "A proposer, or the aggregator": Proposer,
    "`sampling`": Sampling,
    "`endpoints.NAME`": Endpoint,
    "`limits`": Limits,
    "`http`": Http,
}


def markdown() -> str:
    """A table for each section."""
    return "\n\n".join(f"### {title}\n\n{key_table(section)}" for title, section in SECTIONS.items())


if __name__ == "__main__":
    print(markdown())
