"""What the API server refuses of pods although the schemas allow it, and what ends them sooner than they say."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tunesmith.cluster.kube.findings import Document, Finding
from tunesmith.cluster.kube.objects import GPU, Object, Pod, is_quantity, pods, quantity
from tunesmith.cluster.recipe.lines import KeyPath

GRACE_S = 30
"""Kubernetes' default for terminationGracePeriodSeconds."""
WAITS = re.compile(r"(?:--within[ =]|\bsleep )(\d+)\b")
"""How long a hook's command says that it takes: ours, and the shell's."""

RULES = {
    "core.mount": "a container mounts volumes that its pod has, one at each path",
    "core.device": "an adapter or another device of a plugin has a limit, in whole numbers, which the request equals",
    "job.grace": "a pod's grace period is longer than what its preStop hook says that it takes",
}


def check(document: Document) -> Iterator[Finding]:
    """Findings about any document with pods."""
    for pod in pods(document):
        for path, container in pod.containers:
            yield from _mounts(pod, path, container)
            yield from _devices(path, container)
            yield from _grace(pod, path, container)


def _mounts(pod: Pod, path: KeyPath, container: Object) -> Iterator[Finding]:
    volumes = [volume["name"] for volume in pod.spec.get("volumes") or []]
    taken: dict[str, str] = {}
    for index, mount in enumerate(container.get("volumeMounts") or []):
        name, at = mount["name"], mount["mountPath"]
        if name not in volumes:
            what = f"container {container['name']} mounts {name}, and its pod has {', '.join(volumes) or 'no volume'}"
            fix = f"Add {name} to the pod's volumes, or mount one that is there."
            yield Finding("core.mount", (*path, "volumeMounts", index, "name"), what, fix)
        if at in taken:
            what = f"container {container['name']} mounts {taken[at]} and {name} at {at}"
            yield Finding("core.mount", (*path, "volumeMounts", index, "mountPath"), what, "Leave one out.")
        taken.setdefault(at, name)


def _devices(path: KeyPath, container: Object) -> Iterator[Finding]:
    """GPUs have a rule of their own."""
    resources = container.get("resources") or {}
    requests, limits = resources.get("requests") or {}, resources.get("limits") or {}
    for kind in sorted(requests.keys() | limits.keys()):
        domain, slash, _ = kind.partition("/")
        if not slash or domain.endswith("kubernetes.io") or GPU.fullmatch(kind):
            continue
        amounts = (requests.get(kind, limits.get(kind, 0)), limits.get(kind, 0))
        if not all(map(is_quantity, amounts)):
            continue  # core.quantity says so
        request, limit = map(quantity, amounts)
        if request != limit or limit % 1:
            what = (
                f"container {container['name']} requests {amounts[0]} {kind} with the limit {limits.get(kind, 'none')}"
            )
            fix = "Write the same whole number twice, or the limit alone: devices are not shared."
            yield Finding("core.device", (*path, "resources", "limits", kind), what, fix)


def _grace(pod: Pod, path: KeyPath, container: Object) -> Iterator[Finding]:
    hook = (container.get("lifecycle") or {}).get("preStop") or {}
    words = " ".join((hook.get("exec") or {}).get("command") or [])
    takes = max([(hook.get("sleep") or {}).get("seconds", 0), *(int(found) for found in WAITS.findall(words))])
    grace = pod.spec.get("terminationGracePeriodSeconds")
    given = GRACE_S if grace is None else grace
    if takes >= given:
        what = f"container {container['name']} is killed after {given} s{' (the default)' if grace is None else ''}, and its "
        what += f"preStop hook takes up to {takes} s"
        fix = f"Write more than {takes}: the grace period begins with the hook."
        yield Finding("job.grace", (*pod.path, "terminationGracePeriodSeconds"), what, fix)
