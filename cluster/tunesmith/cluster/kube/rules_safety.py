"""Our own rules: what Kubernetes would run, and nobody should. Pods are held to the restricted Pod Security Standard."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from tunesmith.cluster.jobs.secrets import looks_like
from tunesmith.cluster.kube.findings import Document, Finding
from tunesmith.cluster.kube.objects import (
    GPU,
    LABEL_VALUE,
    RAY_SPEC,
    SUBDOMAIN,
    Object,
    Pod,
    as_quantity,
    is_quantity,
    labels_of,
    pods,
    qualified_name,
    quantity,
    ray_cluster,
)
from tunesmith.cluster.recipe.lines import KeyPath

VOLUMES = (
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "image",
    "persistentVolumeClaim",
    "projected",
    "secret",
)
SECRET_NAME = re.compile(
    r"(?i)(^|_)(token|password|passwd|secret|credentials?|api_?key|access_?key|private_?key)(_|$)(?!path|file|mode|name|id$|type)"
)
SECRET_ASSIGNED = re.compile(
    r"(?i)(?:token|password|secret|api_?key)\s*[:=]\s*['\"]?(?=\S*\d)(?=\S*[a-z])[a-z0-9/+_-]{20,}"
)
REFERENCE = re.compile(r"\$\(\w+\)|\$\{\w+\}")
"""How a value refers to another variable, such as one that comes from a Secret."""
CLUSTER_WIDE = ("Namespace", "ClusterQueue", "ResourceFlavor", "WorkloadPriorityClass", "Topology", "PriorityClass")
OUTSIDE = ("LoadBalancer", "NodePort", "ExternalName")
ENFORCE = "pod-security.kubernetes.io/enforce"

RULES = {
    "core.namespace": "what belongs to the whole cluster stands in no namespace",
    "core.quantity": "amounts of resources are quantities, and none is negative",
    "core.name": "names, namespaces and labels have Kubernetes' syntax",
    "security.non-root": "no container runs as root",
    "security.seccomp": "every container has the runtime's seccomp profile, or one of the node's",
    "security.capabilities": "every container drops all capabilities, and adds none but NET_BIND_SERVICE",
    "security.privileges": "no container is privileged or may gain privileges",
    "security.host": "pods share no network, process, user or file space, no port and no sysctl with their node",
    "security.volumes": "volumes are of the kinds that the restricted standard allows",
    "security.service-account-token": "no pod holds a token of the API server, but a head with KubeRay's autoscaler",
    "security.exposed": "services are reachable inside the cluster alone: no LoadBalancer, NodePort, external address or ingress",
    "security.open-ingress": "a network policy names who may come in",
    "security.auth": "a Ray cluster asks for a token: its jobs API runs what it is given",
    "security.plain-secret": "no secret stands in a manifest, in an environment, a container's command, a runtime environment, an entrypoint, a ConfigMap or a Secret; it is referred to",
    "security.image": "an image has a tag that stays, or a digest",
    "security.namespace": "a namespace enforces the restricted standard",
    "security.wildcard": "a role names what it is for",
    "resources.memory": "every container requests CPU and memory, and its memory's limit is its request",
    "resources.gpu": "a container with GPUs requests what its limits are, CPU too, and whole GPUs",
    "resources.shm": "a container with several GPUs has shared memory of a stated size, which its memory holds",
}


def check(document: Document) -> Iterator[Finding]:
    """Findings about any document."""
    yield from _names(document)
    for pod in pods(document):
        yield from _pod(pod)
        for path, container in pod.containers:
            yield from _container(pod, path, container)
            yield from _environment(path, container)
            yield from _image(path, container)
            yield from _resources(pod, path, container)
    cluster = ray_cluster(document)
    if cluster is not None and (cluster.spec.get("authOptions") or {}).get("mode") != "token":
        what = "nothing but the network keeps anybody from running code here"
        yield Finding(
            "security.auth", (*cluster.path, "authOptions", "mode"), what, "Write authOptions: {mode: token}."
        )
    if document["kind"] in RAY_SPEC:
        yield from _ray_texts(document)
    yield from _exposed(document)
    yield from _of_its_kind(document)


def _names(document: Document) -> Iterator[Finding]:
    metadata = document.get("metadata") or {}
    name = metadata.get("name")
    if not name and not metadata.get("generateName"):
        yield Finding("core.name", ("metadata", "name"), "no name", "Write one.")
    for key in ("name", "namespace"):
        written = metadata.get(key)
        if written and (len(written) > 253 or not SUBDOMAIN.fullmatch(written)):
            what = f"{written!r} is no DNS subdomain"
            yield Finding("core.name", ("metadata", key), what, "Lower-case letters, digits, dashes and dots.")
    if document["kind"] in CLUSTER_WIDE and metadata.get("namespace"):
        what = f"a {document['kind']} belongs to the whole cluster"
        yield Finding("core.namespace", ("metadata", "namespace"), what, "Leave it out.")
    for key, value in labels_of(document).items():
        if not qualified_name(key) or not LABEL_VALUE.fullmatch(value or ""):
            fix = "Letters, digits, dashes, dots and underscores, at most 63."
            yield Finding("core.name", ("metadata", "labels", key), f"{key}: {value!r} is no label", fix)


def _pod(pod: Pod) -> Iterator[Finding]:
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.spec.get(key):
            yield Finding("security.host", (*pod.path, key), f"{key}: true", "Leave it out.")
    if (pod.spec.get("securityContext") or {}).get("sysctls"):
        yield Finding("security.host", (*pod.path, "securityContext", "sysctls"), "sysctls", "Set them on the nodes.")
    for index, volume in enumerate(pod.spec.get("volumes") or []):
        for kind in sorted(volume.keys() - {"name", *VOLUMES}):
            rule = "security.host" if kind == "hostPath" else "security.volumes"
            what = f"volume {volume['name']} is a {kind}"
            yield Finding(rule, (*pod.path, "volumes", index, kind), what, f"Take one of {', '.join(VOLUMES)}.")
    if pod.spec.get("automountServiceAccountToken") is not False and not pod.is_autoscaling_head:
        path = (*pod.path, "automountServiceAccountToken")
        yield Finding("security.service-account-token", path, "the token is mounted", "Write false.")


def _container(pod: Pod, path: KeyPath, container: Object) -> Iterator[Finding]:
    own, shared = container.get("securityContext") or {}, pod.spec.get("securityContext") or {}
    place: KeyPath = (*path, "securityContext")
    name = container["name"]

    def effective(key: str) -> Any:
        return own.get(key, shared.get(key))

    if effective("runAsNonRoot") is not True or effective("runAsUser") == 0:
        what = f"container {name} may run as root"
        yield Finding("security.non-root", (*place, "runAsNonRoot"), what, "Write runAsNonRoot: true, and no user 0.")
    profile = (effective("seccompProfile") or {}).get("type")
    if profile not in ("RuntimeDefault", "Localhost"):
        what = f"container {name} has the profile {profile}"
        yield Finding("security.seccomp", (*place, "seccompProfile"), what, "Write {type: RuntimeDefault}.")
    capabilities = own.get("capabilities") or {}
    if "ALL" not in (capabilities.get("drop") or []):
        what = f"container {name} keeps capabilities"
        yield Finding("security.capabilities", (*place, "capabilities", "drop"), what, "Write drop: [ALL].")
    if added := sorted(set(capabilities.get("add") or []) - {"NET_BIND_SERVICE"}):
        what = f"container {name} adds {', '.join(added)}"
        fix = "Leave them out; for RDMA raise the container runtime's memlock limit instead of adding IPC_LOCK."
        yield Finding("security.capabilities", (*place, "capabilities", "add"), what, fix)
    if own.get("allowPrivilegeEscalation") is not False:
        what = f"container {name} may gain privileges"
        yield Finding("security.privileges", (*place, "allowPrivilegeEscalation"), what, "Write false.")
    if own.get("privileged") or own.get("procMount", "Default") != "Default":
        yield Finding("security.privileges", place, f"container {name} is privileged", "Leave it out.")
    for index, port in enumerate(container.get("ports") or []):
        if port.get("hostPort"):
            what = f"container {name} takes port {port['hostPort']} of its node"
            yield Finding("security.host", (*path, "ports", index, "hostPort"), what, "Leave hostPort out.")


def _environment(path: KeyPath, container: Object) -> Iterator[Finding]:
    for index, entry in enumerate(container.get("env") or []):
        value = entry.get("value") or ""
        if value and (SECRET_NAME.search(entry["name"]) or _secret(value)):
            what = f"{entry['name']} has its value in the manifest"
            fix = "Write valueFrom: {secretKeyRef: {name: …, key: …}}."
            yield Finding("security.plain-secret", (*path, "env", index), what, fix)
    for key in ("command", "args"):
        if found := _secret(" ".join(container.get(key) or [])):
            fix = "Make it the container's environment, from a Secret, and write $(NAME) here."
            yield Finding("security.plain-secret", (*path, key), f"it holds what looks like {found}", fix)


def _secret(text: str) -> str:
    """What kind of secret a text looks like, empty when like none; a commit or a digest is none."""
    found = looks_like(REFERENCE.sub("", text))
    if found and found != "a long run of hexadecimal digits":
        return found
    return "a secret" if SECRET_ASSIGNED.search(text) else ""


def _ray_texts(document: Document) -> Iterator[Finding]:
    """What Ray is told as text: the dashboard and the jobs API show it to everybody who may look."""
    spec = document.get("spec") or {}
    fix = "Make it the pods' environment: envFrom: [{secretRef: {name: …}}]."
    for key in ("entrypoint", "runtimeEnvYAML", "serveConfigV2"):
        text = spec.get(key) or ""
        if not isinstance(text, str):
            continue
        try:
            named = [] if key == "entrypoint" else sorted(_secret_variables(yaml.safe_load(text)))
        except yaml.YAMLError:  # kuberay.runtime-env says so; a look at the text is still worth it
            named = []
        if named:
            yield Finding(
                "security.plain-secret", ("spec", key), f"{', '.join(named)} in env_vars, with its value", fix
            )
        elif found := _secret(text):
            yield Finding("security.plain-secret", ("spec", key), f"it holds what looks like {found}", fix)


def _secret_variables(tree: Any) -> Iterator[str]:
    """Names below any `env_vars` that have a secret's name or value."""
    if isinstance(tree, list):
        for item in tree:
            yield from _secret_variables(item)
    if not isinstance(tree, dict):
        return
    for key, value in tree.items():
        if key == "env_vars" and isinstance(value, dict):
            for name, given in value.items():
                if given and (SECRET_NAME.search(str(name)) or _secret(str(given))):
                    yield str(name)
        else:
            yield from _secret_variables(value)


def _image(path: KeyPath, container: Object) -> Iterator[Finding]:
    image = container.get("image") or ""
    tag = image.rpartition("/")[2].partition("@")[0].partition(":")[2]
    if "@sha256:" not in image and tag in ("", "latest"):
        what = f"{image or 'no image'} is another image from day to day"
        yield Finding("security.image", (*path, "image"), what, "Write a version's tag, or a digest.")


def _resources(pod: Pod, path: KeyPath, container: Object) -> Iterator[Finding]:
    resources, name = container.get("resources") or {}, container["name"]
    limits = resources.get("limits") or {}
    requests = {**limits, **(resources.get("requests") or {})}
    place: KeyPath = (*path, "resources")
    written = [*requests.items(), *limits.items()]
    if wrong := dict(pair for pair in written if not is_quantity(pair[1])):
        for kind, amount in wrong.items():
            what = f"container {name}: {amount!r} is no quantity"
            yield Finding("core.quantity", (*place, kind), what, as_quantity(amount))
        return
    for kind, amount in dict(pair for pair in written if quantity(pair[1]) < 0).items():
        what = f"container {name}: {kind} {amount} is negative"
        yield Finding("core.quantity", (*place, kind), what, "Write 0 or more.")
    gpus = {kind: amount for kind, amount in {**requests, **limits}.items() if GPU.fullmatch(kind)}
    for kind in ("cpu", "memory"):
        if kind not in requests:
            what = f"container {name} requests no {kind}"
            yield Finding("resources.memory", (*place, "requests", kind), what, "Write what it needs.")
    for kind in ("memory", *(["cpu"] if gpus else [])):
        rule = "resources.memory" if kind == "memory" else "resources.gpu"
        if kind in requests and quantity(limits.get(kind, -1)) != quantity(requests[kind]):
            what = f"container {name} requests {kind} {requests[kind]} with the limit {limits.get(kind)}"
            fix = "Write the same twice: else the node promises what it may not have."
            yield Finding(rule, (*place, "limits", kind), what, fix)
    for kind, amount in gpus.items():
        if quantity(amount) % 1 or quantity(requests.get(kind, -1)) != quantity(limits.get(kind, -1)):
            what = f"container {name} requests {requests.get(kind)} {kind} with the limit {limits.get(kind)}"
            yield Finding(
                "resources.gpu",
                (*place, "limits", kind),
                what,
                "Write the same whole number twice, or the limit alone.",
            )
    if sum(quantity(amount) for amount in gpus.values()) > 1:
        yield from _shared_memory(pod, path, container, limits)


def _shared_memory(pod: Pod, path: KeyPath, container: Object, limits: Object) -> Iterator[Finding]:
    mounts = {mount["mountPath"]: mount["name"] for mount in container.get("volumeMounts") or []}
    volumes = {volume["name"]: volume.get("emptyDir") or {} for volume in pod.spec.get("volumes") or []}
    shm = volumes.get(mounts.get("/dev/shm", ""), {})
    place: KeyPath = (*path, "volumeMounts")
    who = f"container {container['name']} has several GPUs"
    if "/dev/shm" not in mounts:
        what = f"{who} and 64 MiB at /dev/shm, where NCCL exchanges messages"
        yield Finding("resources.shm", place, what, "Mount an emptyDir {medium: Memory, sizeLimit: …} there.")
    elif shm.get("medium") != "Memory":
        what = f"{who} and volume {mounts['/dev/shm']}, which is no memory, at /dev/shm"
        yield Finding("resources.shm", place, what, "Make it an emptyDir {medium: Memory, sizeLimit: …}.")
    elif "sizeLimit" not in shm:
        what = f"{who}, and volume {mounts['/dev/shm']} at /dev/shm has no size: it may fill the container's memory"
        yield Finding("resources.shm", place, what, "Write its sizeLimit, below the container's memory.")
    elif not is_quantity(shm["sizeLimit"]):
        what = f"{shm['sizeLimit']!r} is no quantity"
        yield Finding("core.quantity", place, what, as_quantity(shm["sizeLimit"]))
    elif quantity(shm["sizeLimit"]) >= quantity(limits.get("memory", 0)):
        what = f"/dev/shm may take {shm['sizeLimit']} of the container's {limits.get('memory')}"
        yield Finding("resources.shm", place, what, "Its pages count as the container's memory: make it smaller.")


def _exposed(document: Document) -> Iterator[Finding]:
    spec = document.get("spec") or {}
    services: list[tuple[KeyPath, Object]] = []
    if document["kind"] == "Service":
        services.append((("spec",), spec))
    if document["kind"] == "RayService" and spec.get("serveService"):
        services.append((("spec", "serveService", "spec"), spec["serveService"].get("spec") or {}))
    cluster = ray_cluster(document)
    if cluster is not None:
        head = cluster.head
        service = (head.spec.get("headService") or {}).get("spec") or {}
        services.append(((*head.path, "headService", "spec"), service))
        if head.spec.get("serviceType") in OUTSIDE:
            what = f"the head's service is a {head.spec['serviceType']}"
            yield Finding("security.exposed", (*head.path, "serviceType"), what, "Write ClusterIP.")
        if head.spec.get("enableIngress"):
            yield Finding("security.exposed", (*head.path, "enableIngress"), "an ingress to the head", "Leave it out.")
    for path, service in services:
        if service.get("type") in OUTSIDE:
            yield Finding("security.exposed", (*path, "type"), f"the type is {service['type']}", "Write ClusterIP.")
        if service.get("externalIPs"):
            yield Finding("security.exposed", (*path, "externalIPs"), "external addresses", "Leave them out.")


def _of_its_kind(document: Document) -> Iterator[Finding]:
    kind, spec = document["kind"], document.get("spec") or {}
    if kind == "NetworkPolicy":
        for index, rule in enumerate(spec.get("ingress") or []):
            if not rule.get("from"):
                fix = "Name pods or namespaces in from."
                yield Finding("security.open-ingress", ("spec", "ingress", index), "everybody may come in", fix)
    if kind == "Secret" and (document.get("data") or document.get("stringData")):
        fix = "Make it with kubectl create secret, or have an external store make it, and refer to it."
        yield Finding("security.plain-secret", ("data",), "a secret's value in a manifest", fix)
    if kind == "ConfigMap":
        for key, value in (document.get("data") or {}).items():
            if found := _secret(value or ""):
                what = f"{key} holds what looks like {found}"
                yield Finding("security.plain-secret", ("data", key), what, "Refer to a Secret from the pod instead.")
    if kind == "Namespace" and labels_of(document).get(ENFORCE) != "restricted":
        what = f"it enforces {labels_of(document).get(ENFORCE, 'nothing')}"
        yield Finding("security.namespace", ("metadata", "labels", ENFORCE), what, "Write restricted.")
    if kind == "ServiceAccount" and document.get("automountServiceAccountToken") is not False:
        path = ("automountServiceAccountToken",)
        yield Finding("security.service-account-token", path, "pods get its token", "Write false.")
    if kind == "Role":
        for index, rule in enumerate(document.get("rules") or []):
            for key in ("apiGroups", "resources", "verbs"):
                if "*" in (rule.get(key) or []):
                    yield Finding("security.wildcard", ("rules", index, key), "*", "Name what it is for.")
