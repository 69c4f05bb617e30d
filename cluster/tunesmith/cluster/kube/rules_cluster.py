"""What KubeRay's operator refuses of a Ray cluster although the schema allows it, after `validation.go` of KubeRay 1.7."""

from __future__ import annotations

from collections.abc import Iterator

from tunesmith.cluster.kube.findings import Document, Finding
from tunesmith.cluster.kube.objects import (
    DNS_1035,
    DNS_1123,
    LABEL_VALUE,
    SUBDOMAIN,
    Group,
    Object,
    RayCluster,
    annotations_of,
    environment,
    qualified_name,
    ray_cluster,
    value_of,
    version,
)
from tunesmith.cluster.recipe.lines import KeyPath

LONGEST_NAME = {"RayCluster": 53, "RayJob": 47, "RayService": 47}
"""A service's name has 63 characters, `-serve-svc` ten of them, and six name the cluster of a job or service."""
AUTH_SINCE, K8S_AUTH_SINCE, PRIORITY_SINCE = (2, 52, 0), (2, 55, 0), (2, 56, 0)
V2 = "RAY_enable_autoscaler_v2"
START_COMMAND = "KUBERAY_GEN_AUTOSCALER_START_CMD"
TLS_VARIABLES = ("RAY_USE_TLS", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")
SIZES = ("num-cpus", "num-gpus", "memory", "resources")

RULES = {
    "kuberay.name": "a RayCluster's name has at most 53 characters, a RayJob's or RayService's 47, all of them a DNS-1035 label",
    "kuberay.containers": "the head and every worker group have a container",
    "kuberay.group-names": "worker groups have different names, of which pods' names and labels can be made",
    "kuberay.replica-bounds": "replica bounds are there unless the autoscaler sets them, not negative, in order, and hold the replicas",
    "kuberay.group-resources": "a group's resources stand in `resources` or in `rayStartParams`, not in both",
    "kuberay.group-labels": "a group's Ray labels stand in `labels`, in Kubernetes' syntax, not in `rayStartParams`",
    "kuberay.idle-timeout": "idle timeouts are not negative, and those of a group need autoscaler v2",
    "kuberay.group-priority": "a group's priority needs Ray 2.56 and autoscaler v2",
    "kuberay.gcs-options": "fault tolerance of the GCS is set up in gcsFaultToleranceOptions alone",
    "kuberay.gcs-backend": "storage belongs to the rocksdb backend, Redis' keys to the redis backend",
    "kuberay.autoscaler": "autoscaler v2 is chosen in one place, with autoscaling on, pods that are not restarted and groups that are not suspended",
    "kuberay.auth": "token authentication needs a rayVersion of 2.52 or later; Kubernetes tokens need 2.55, mode token and no secret",
    "kuberay.network-policy": "the cluster's own network policy allows only what its mode denies, for groups that exist",
    "kuberay.tls": "with tlsOptions, TLS variables are the operator's",
    "kuberay.history-server": "historyServerOptions have a collector with an image, whose container no pod defines",
    "kuberay.feature-gate": "what the operator has behind a feature gate is not used unless --feature-gate says that it is on",
    "kuberay.upgrade-strategy": "an upgrade strategy is one that the kind has",
}


def check(document: Document, gates: frozenset[str] = frozenset()) -> Iterator[Finding]:
    """Findings about the Ray cluster of a RayCluster, RayJob or RayService.

    Args:
        gates: feature gates that the operator has on besides its own defaults.
    """
    cluster = ray_cluster(document)
    if document["kind"] in LONGEST_NAME:
        yield from _name(document)
    if cluster is None:
        return
    for group in (cluster.head, *cluster.workers):
        yield from _group(group)
    yield from _group_names(cluster)
    for group in cluster.workers:
        yield from _worker_group(group, cluster)
    yield from _gcs(document, cluster)
    yield from _autoscaler(cluster)
    yield from _auth(cluster)
    yield from _network_policy(cluster)
    yield from _tls(cluster)
    yield from _history(cluster)
    yield from _gates(cluster, gates)
    yield from _upgrade(document, cluster)


def _name(document: Document) -> Iterator[Finding]:
    name, longest = (document.get("metadata") or {}).get("name", ""), LONGEST_NAME[document["kind"]]
    if len(name) > longest:
        what = f"{name} has {len(name)} characters, and a {document['kind']} may have {longest}"
        yield Finding("kuberay.name", ("metadata", "name"), what, f"Shorten it by {len(name) - longest}.")
    if name and not DNS_1035.fullmatch(name):
        what = f"{name!r} is no DNS-1035 label"
        fix = "Begin with a lower-case letter; then lower-case letters, digits and dashes."
        yield Finding("kuberay.name", ("metadata", "name"), what, fix)


def _group(group: Group) -> Iterator[Finding]:
    if not group.ray:
        path = (*group.path, "template", "spec", "containers")
        yield Finding("kuberay.containers", path, f"{group.name} has no container", "Ray runs in the first one.")
    params = group.spec.get("rayStartParams") or {}
    twice = [key for key in SIZES if params.get(key)]
    if twice and group.spec.get("resources"):
        what = f"rayStartParams has {', '.join(twice)} and resources is set too"
        yield Finding("kuberay.group-resources", (*group.path, "resources"), what, "Keep one of the two.")
    if "labels" in params:
        path = (*group.path, "rayStartParams", "labels")
        yield Finding("kuberay.group-labels", path, "labels as a start parameter", "Move them to the group's labels.")
    for key, value in (group.spec.get("labels") or {}).items():
        if not qualified_name(key) or not LABEL_VALUE.fullmatch(str(value)):
            what = f"{key}: {value} is no label"
            fix = "Letters, digits, dashes, dots and underscores, at most 63, with an optional domain before a slash."
            yield Finding("kuberay.group-labels", (*group.path, "labels", key), what, fix)


def _group_names(cluster: RayCluster) -> Iterator[Finding]:
    seen: set[str] = set()
    for group in cluster.workers:
        path = (*group.path, "groupName")
        if len(group.name) > 63 or not SUBDOMAIN.fullmatch(group.name.lower()):  # a pod's name has it in lower case
            fix = "At most 63 lower-case letters, digits and dashes."
            yield Finding("kuberay.group-names", path, f"{group.name!r} is no part of a pod's name", fix)
        if group.name in seen:
            what = f"a second worker group named {group.name}"
            yield Finding("kuberay.group-names", path, what, "Give it another name: they must be unique.")
        seen.add(group.name)


def _worker_group(group: Group, cluster: RayCluster) -> Iterator[Finding]:
    least, most = group.spec.get("minReplicas"), group.spec.get("maxReplicas")

    def bounds(key: str, what: str, fix: str) -> Finding:
        return Finding("kuberay.replica-bounds", (*group.path, key), what, fix)

    if not cluster.autoscales and (least is None or most is None):
        key = "minReplicas" if least is None else "maxReplicas"
        yield bounds(key, f"group {group.name} has none, and nothing scales it", "Write minReplicas and maxReplicas.")
    wanted = group.spec.get("replicas")
    for key, value in (("minReplicas", least), ("maxReplicas", most), ("replicas", wanted)):
        if value is not None and value < 0:
            yield bounds(key, f"group {group.name}: {value} is negative", "Write 0 or more.")
    if least is not None and most is not None and least > most:
        yield bounds("minReplicas", f"group {group.name}: {least} is more than maxReplicas {most}", "Swap them.")
    if wanted is not None and least is not None and 0 <= wanted < least:
        what = f"group {group.name}: {wanted} is less than minReplicas {least}, and {least} would start"
        yield bounds("replicas", what, f"Write {least}, or lower minReplicas.")
    if wanted is not None and most is not None and wanted > most >= 0:
        what = f"group {group.name}: {wanted} is more than maxReplicas {most}, and no more than {most} would start"
        yield bounds("replicas", what, f"Write {most}, or raise maxReplicas.")
    idle = group.spec.get("idleTimeoutSeconds")
    if idle is not None:
        path = (*group.path, "idleTimeoutSeconds")
        if idle < 0:
            yield Finding("kuberay.idle-timeout", path, f"{idle} is negative", "Write 0 or more.")
        elif not cluster.autoscales_v2:
            what = f"group {group.name} has an idle timeout without autoscaler v2"
            yield Finding("kuberay.idle-timeout", path, what, "Set autoscalerOptions.version: v2.")
    priority = group.spec.get("priority")
    if priority:
        path, ray = (*group.path, "priority"), version(cluster.spec.get("rayVersion") or "")
        if ray is None or ray < PRIORITY_SINCE:
            what = f"priority {priority} with rayVersion {cluster.spec.get('rayVersion')}"
            yield Finding("kuberay.group-priority", path, what, "It needs rayVersion 2.56.0 or later.")
        elif not cluster.autoscales_v2:
            what = f"priority {priority} without autoscaler v2"
            yield Finding("kuberay.group-priority", path, what, "Set autoscalerOptions.version: v2.")


def _gcs(document: Document, cluster: RayCluster) -> Iterator[Finding]:
    options = cluster.spec.get("gcsFaultToleranceOptions")
    head, noted = cluster.head, annotations_of(document)
    params, variables = head.spec.get("rayStartParams") or {}, environment(head.ray)
    in_env: KeyPath = (*head.path, "template", "spec", "containers", 0, "env")
    in_params: KeyPath = (*head.path, "rayStartParams")

    def gcs(path: KeyPath, what: str, key: str) -> Finding:
        return Finding("kuberay.gcs-options", path, what, f"Write it in gcsFaultToleranceOptions{key}.")

    if options is not None and noted.get("ray.io/ft-enabled"):
        yield gcs(("metadata", "annotations"), "ray.io/ft-enabled beside gcsFaultToleranceOptions", " alone")
    enabled = options is not None or noted.get("ray.io/ft-enabled", "").lower() == "true"
    if not enabled and "RAY_REDIS_ADDRESS" in variables:
        yield gcs(in_env, "RAY_REDIS_ADDRESS without gcsFaultToleranceOptions", ".redisAddress")
    if options is not None:
        if params.get("redis-password") or "REDIS_PASSWORD" in variables:
            path = in_params if params.get("redis-password") else in_env
            yield gcs(path, "Redis' password besides gcsFaultToleranceOptions", ".redisPassword")
        if "RAY_REDIS_ADDRESS" in variables:
            yield gcs(in_env, "RAY_REDIS_ADDRESS besides gcsFaultToleranceOptions", ".redisAddress")
        if noted.get("ray.io/external-storage-namespace"):
            what = "ray.io/external-storage-namespace besides gcsFaultToleranceOptions"
            yield gcs(("metadata", "annotations"), what, ".externalStorageNamespace")
        yield from _gcs_backend(cluster, options, variables, in_env)
    if params.get("redis-username") or "REDIS_USERNAME" in variables:
        path = in_params if params.get("redis-username") else in_env
        yield gcs(path, "Redis' user name outside gcsFaultToleranceOptions", ".redisUsername")


def _gcs_backend(cluster: RayCluster, options: Object, variables: Object, in_env: KeyPath) -> Iterator[Finding]:
    path: KeyPath = (*cluster.path, "gcsFaultToleranceOptions")
    if options.get("backend", "redis") == "redis":
        if "storage" in options:
            fix = "Set backend: rocksdb, or leave storage out."
            yield Finding("kuberay.gcs-backend", (*path, "storage"), "storage with the redis backend", fix)
        return
    for key in ("redisAddress", "redisUsername", "redisPassword", "externalStorageNamespace"):
        if options.get(key):
            yield Finding("kuberay.gcs-backend", (*path, key), f"{key} with the rocksdb backend", "Leave it out.")
    storage = options.get("storage") or {}
    if storage.get("claimName") and storage.keys() & {"size", "storageClassName", "accessModes"}:
        what = "claimName beside size, storageClassName or accessModes"
        yield Finding("kuberay.gcs-backend", (*path, "storage"), what, "A claim that is there has its own.")
    for name in ("RAY_gcs_storage", "RAY_gcs_storage_path"):
        if name in variables:
            yield Finding("kuberay.gcs-backend", in_env, f"{name} is the operator's", "Leave it out.")


def _autoscaler(cluster: RayCluster) -> Iterator[Finding]:
    head, options = cluster.head, cluster.spec.get("autoscalerOptions") or {}
    in_env: KeyPath = (*head.path, "template", "spec", "containers", 0, "env")
    written = value_of(V2, head.ray)

    def wrong(path: KeyPath, what: str, fix: str) -> Finding:
        return Finding("kuberay.autoscaler", path, what, fix)

    if not cluster.autoscales and written in ("1", "true"):
        yield wrong(in_env, f"{V2}={written} without autoscaling", "Set enableInTreeAutoscaling: true.")
    if cluster.autoscales:
        for group in cluster.workers:
            if group.spec.get("suspend"):
                what = f"group {group.name} is suspended while the autoscaler is on"
                yield wrong((*group.path, "suspend"), what, "Set minReplicas and maxReplicas to 0 instead.")
        if options.get("version") is not None and V2 in environment(head.ray):
            yield wrong(in_env, f"{V2} beside autoscalerOptions.version", "Keep autoscalerOptions.version.")
        for group in (head, *cluster.workers) if cluster.autoscales_v2 else ():
            policy = group.pod.get("restartPolicy") or "Never"
            if policy != "Never":
                path = (*group.path, "template", "spec", "restartPolicy")
                yield wrong(path, f"{group.name}: {policy} with autoscaler v2", "Write Never, or leave it out.")
    if (options.get("idleTimeoutSeconds") or 0) < 0:
        path = (*cluster.path, "autoscalerOptions", "idleTimeoutSeconds")
        yield Finding("kuberay.idle-timeout", path, f"{options['idleTimeoutSeconds']} is negative", "Write 0 or more.")
    if START_COMMAND in environment(options):
        path = (*cluster.path, "autoscalerOptions", "env")
        yield wrong(path, f"{START_COMMAND} is the operator's", "Leave it out; args may refer to it.")


def _auth(cluster: RayCluster) -> Iterator[Finding]:
    options = cluster.spec.get("authOptions") or {}
    path: KeyPath = (*cluster.path, "authOptions")
    has_token, by_kubernetes = options.get("mode") == "token", bool(options.get("enableK8sTokenAuth"))
    if by_kubernetes and not has_token:
        yield Finding("kuberay.auth", path, "enableK8sTokenAuth without mode token", "Write mode: token.")
    if not has_token:
        return
    written = cluster.spec.get("rayVersion") or ""
    ray = version(written)
    if ray is None or ray < AUTH_SINCE:
        what = f"mode token with rayVersion {written or 'not given'}"
        fix = "Write the image's Ray version, 2.52.0 or later."
        yield Finding("kuberay.auth", (*cluster.path, "rayVersion"), what, fix)
    elif by_kubernetes and ray < K8S_AUTH_SINCE:
        what = f"enableK8sTokenAuth with rayVersion {written}"
        yield Finding("kuberay.auth", (*cluster.path, "rayVersion"), what, "It needs 2.55.0 or later.")
    if by_kubernetes and options.get("secretName"):
        yield Finding("kuberay.auth", (*path, "secretName"), "a secret beside enableK8sTokenAuth", "Keep one of them.")


def _network_policy(cluster: RayCluster) -> Iterator[Finding]:
    policy = cluster.spec.get("networkPolicy")
    if policy is None:
        return
    path: KeyPath = (*cluster.path, "networkPolicy")
    mode = policy.get("mode") or "DenyAll"
    void = {"DenyAllEgress": "ingressRules", "DenyAllIngress": "egressRules"}.get(mode)
    groups = policy.get("workerGroups") or []
    places = [((*path, key), policy.get(key) or {}) for key in ("head", "worker")]
    places += [((*path, "workerGroups", index), group) for index, group in enumerate(groups)]
    for place, rules in places:
        if void and rules.get(void):
            what = f"{void} under mode {mode}, which denies nothing of the kind"
            yield Finding("kuberay.network-policy", (*place, void), what, "Leave them out, or set mode: DenyAll.")
    names = [group.name for group in cluster.workers]
    for index, group in enumerate(groups):
        if group["groupName"] not in names:
            what = f"there is no worker group {group['groupName']}"
            fix = f"There are {', '.join(names) or 'none'}."
            yield Finding("kuberay.network-policy", (*path, "workerGroups", index), what, fix)
    for group in cluster.workers:
        if len(group.name) > 63 or not DNS_1123.fullmatch(group.name):
            what = f"{group.name!r} becomes part of a policy's name and is no DNS-1123 label"
            fix = "Lower-case letters, digits and dashes."
            yield Finding("kuberay.network-policy", (*group.path, "groupName"), what, fix)


def _tls(cluster: RayCluster) -> Iterator[Finding]:
    if not (cluster.spec.get("tlsOptions") or {}).get("enabled", "tlsOptions" in cluster.spec):
        return
    groups = (cluster.head, *cluster.workers)
    places: list[tuple[KeyPath, Object]] = [
        ((*g.path, "template", "spec", "containers", 0, "env"), g.ray) for g in groups
    ]
    places.append(((*cluster.path, "autoscalerOptions", "env"), cluster.spec.get("autoscalerOptions") or {}))
    for path, holder in places:
        for name in TLS_VARIABLES:
            if name in environment(holder):
                yield Finding("kuberay.tls", path, f"{name} is the operator's under tlsOptions", "Leave it out.")


def _history(cluster: RayCluster) -> Iterator[Finding]:
    options = cluster.spec.get("historyServerOptions")
    if options is None:
        return
    path: KeyPath = (*cluster.path, "historyServerOptions")
    if not (options.get("collectorOptions") or {}).get("image"):
        fix = "Write collectorOptions.image."
        yield Finding("kuberay.history-server", path, "no collector, or one without an image", fix)
    for group in (cluster.head, *cluster.workers):
        for index, container in enumerate(group.pod.get("containers") or []):
            if container["name"] == "collector":
                place = (*group.path, "template", "spec", "containers", index, "name")
                what = f"{group.name} has a container named collector, which the operator adds"
                yield Finding("kuberay.history-server", place, what, "Give yours another name.")


def _gates(cluster: RayCluster, gates: frozenset[str]) -> Iterator[Finding]:
    behind = {
        "networkPolicy": "RayClusterNetworkPolicy",
        "tlsOptions": "RayClusterMTLS",
        "historyServerOptions": "RayClusterHistoryServer",
    }
    used = [((*cluster.path, key), key, gate) for key, gate in behind.items() if key in cluster.spec]
    if (cluster.spec.get("gcsFaultToleranceOptions") or {}).get("backend") == "rocksdb":
        path = (*cluster.path, "gcsFaultToleranceOptions", "backend")
        used.append((path, "backend: rocksdb", "GCSFaultToleranceEmbeddedStorage"))
    for path, key, gate in used:
        if gate not in gates:
            fix = f"Leave it out; or switch the operator's gate {gate} on and check with --feature-gate {gate}."
            yield Finding("kuberay.feature-gate", path, f"{key} is alpha in KubeRay 1.7 and off", fix)


def _upgrade(document: Document, cluster: RayCluster) -> Iterator[Finding]:
    kind = (cluster.spec.get("upgradeStrategy") or {}).get("type")
    path: KeyPath = (*cluster.path, "upgradeStrategy")
    if kind is None:
        return
    if document["kind"] != "RayCluster":
        what = f"the cluster of a {document['kind']} has an upgrade strategy of its own"
        yield Finding("kuberay.upgrade-strategy", path, what, "Leave it out.")
    elif kind not in ("Recreate", "None"):
        yield Finding("kuberay.upgrade-strategy", path, f"{kind} is none of a RayCluster", "Write Recreate or None.")
