"""The table of rules in docs/kubernetes.md.

python -m tunesmith.cluster.kube.reference
"""

from __future__ import annotations

from tunesmith.cluster.kube.check import RULES

SOURCES = {
    "schema": "the schemas of Kubernetes, KubeRay and Kueue",
    "core": "Kubernetes' own validation",
    "kuberay": "KubeRay's operator",
    "kueue": "Kueue's webhooks",
    "job": "nobody, but it would run elsewhere than meant",
    "security": "us: the restricted Pod Security Standard, and what follows from it",
    "resources": "us: what scheduler and kubelet are told",
}


def rule_table() -> str:
    """Every rule by name, under who refuses what breaks it."""
    lines: list[str] = []
    for source, who in SOURCES.items():
        rules = {name: holds for name, holds in RULES.items() if name.partition(".")[0] == source}
        lines += [f"### {who[0].upper()}{who[1:]}", "", "| rule | what holds |", "| --- | --- |"]
        lines += [f"| `{name}` | {holds} |" for name, holds in rules.items()]
        lines.append("")
    return "\n".join(lines).rstrip()


if __name__ == "__main__":
    print(rule_table())
