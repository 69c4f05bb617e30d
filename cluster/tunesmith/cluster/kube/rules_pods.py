"""What the API server refuses of pods although the schemas allow it, and what ends them sooner than they say."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tunesmith.cluster.kube.findings import Document, Finding
from tunesmith.cluster.kube.objects import DNS_1123, GPU, Object, Pod, is_quantity, pods, quantity
from tunesmith.cluster.recipe.lines import KeyPath

GRACE_S = 30
"""Kubernetes' default for terminationGracePeriodSeconds."""
PULL_POLICIES = ("Always", "IfNotPresent", "Never")
RESTART_POLICIES = ("Always", "OnFailure", "Never")
EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")
PROBES = ("livenessProbe", "readinessProbe", "startupProbe")
HANDLERS = ("exec", "httpGet", "tcpSocket", "grpc", "sleep")
"""What a probe or a hook does."""
PORTS = range(1, 65536)
WAITS = re.compile(r"(?:--within[ =]|\bsleep )(\d+)\b")
"""How long a hook's command says that it takes: ours, and the shell's."""

RULES = {
    "core.mount": "a container mounts volumes that its pod has, one at each path",
    "core.container-name": "a container's name is a DNS label",
    "core.policy": "imagePullPolicy and restartPolicy are among those that there are",
    "core.toleration": "a toleration has an operator and an effect that there are, and no value with Exists",
    "core.one-of": "a volume has one source, a variable a value or where it comes from, a probe or hook one handler",
    "core.port": "ports are 1 to 65535",
    "core.device": "an adapter or another device of a plugin has a limit, in whole numbers, which the request equals",
    "job.grace": "a pod's grace period is longer than what its preStop hook says that it takes",
}


def check(document: Document) -> Iterator[Finding]:
    """Findings about any document with pods."""
    for pod in pods(document):
        yield from _of_pod(pod)
        for path, container in pod.containers:
            yield from _of_container(path, container)
            yield from _one_of(path, container)
            yield from _ports(path, container)
            yield from _mounts(pod, path, container)
            yield from _devices(path, container)
            yield from _grace(pod, path, container)


def _of_pod(pod: Pod) -> Iterator[Finding]:
    policy = pod.spec.get("restartPolicy") or RESTART_POLICIES[0]
    if policy not in RESTART_POLICIES:
        fix = f"Write one of {', '.join(RESTART_POLICIES)}."
        yield Finding("core.policy", (*pod.path, "restartPolicy"), f"{policy} is none", fix)
    for index, volume in enumerate(pod.spec.get("volumes") or []):
        if len(sources := sorted(key for key, source in volume.items() if key != "name" and source is not None)) > 1:
            what = f"volume {volume['name']} is {' and '.join(sources)}"
            yield Finding("core.one-of", (*pod.path, "volumes", index), what, "Keep one of them.")
    for index, toleration in enumerate(pod.spec.get("tolerations") or []):
        for key, what, fix in _toleration_mistakes(toleration):
            yield Finding("core.toleration", (*pod.path, "tolerations", index, key), what, fix)


def _toleration_mistakes(toleration: Object) -> Iterator[tuple[str, str, str]]:
    operator, effect = toleration.get("operator") or "Equal", toleration.get("effect") or EFFECTS[0]
    if operator not in ("Equal", "Exists"):
        yield "operator", f"{operator} is none", "Write Equal or Exists."
    if operator == "Exists" and toleration.get("value"):
        yield "value", f"Exists with the value {toleration['value']}", "Leave the value out, or write Equal."
    if effect not in EFFECTS:
        yield "effect", f"{effect} is none", f"Write one of {', '.join(EFFECTS)}, or leave it out for all."


def _of_container(path: KeyPath, container: Object) -> Iterator[Finding]:
    name, policy = container["name"], container.get("imagePullPolicy") or PULL_POLICIES[0]
    if len(name) > 63 or not DNS_1123.fullmatch(name):
        fix = "At most 63 lower-case letters, digits and dashes."
        yield Finding("core.container-name", (*path, "name"), f"{name!r} is no DNS label", fix)
    if policy not in PULL_POLICIES:
        what = f"container {name}: {policy} is none"
        yield Finding("core.policy", (*path, "imagePullPolicy"), what, f"Write one of {', '.join(PULL_POLICIES)}.")


def _one_of(path: KeyPath, container: Object) -> Iterator[Finding]:
    for index, entry in enumerate(container.get("env") or []):
        come_from = sorted(entry.get("valueFrom") or {})
        if len(come_from) > 1 or (come_from and entry.get("value")):
            what = f"{entry['name']} is {' and '.join(['value'] * bool(entry.get('value')) + come_from)}"
            yield Finding("core.one-of", (*path, "env", index), what, "Keep one of them.")
    acts = {(key,): container.get(key) for key in PROBES}
    acts |= {("lifecycle", key): act for key, act in (container.get("lifecycle") or {}).items() if key != "stopSignal"}
    for keys, act in acts.items():
        if len(handlers := sorted((act or {}).keys() & set(HANDLERS))) > 1:
            what = f"container {container['name']}: {keys[-1]} is {' and '.join(handlers)}"
            yield Finding("core.one-of", (*path, *keys), what, "Keep one of them.")


def _ports(path: KeyPath, container: Object) -> Iterator[Finding]:
    ports = enumerate(container.get("ports") or [])
    found: list[tuple[KeyPath, int]] = [
        ((*path, "ports", at, "containerPort"), it["containerPort"]) for at, it in ports
    ]
    for probe in PROBES:
        for handler in ("httpGet", "tcpSocket", "grpc"):
            asked = ((container.get(probe) or {}).get(handler) or {}).get("port")
            if isinstance(asked, int):  # or a port's name
                found.append(((*path, probe, handler, "port"), asked))
    for place, port in found:
        if port not in PORTS:
            what = f"container {container['name']}: {port} is no port"
            yield Finding("core.port", place, what, f"Write {PORTS[0]} to {PORTS[-1]}.")


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
