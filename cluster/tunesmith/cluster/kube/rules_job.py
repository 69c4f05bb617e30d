"""What KubeRay's operator refuses of a RayJob or a RayService besides its cluster, after `validation.go` of KubeRay 1.7."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import yaml

from tunesmith.cluster.kube import strict
from tunesmith.cluster.kube.findings import Document, Finding
from tunesmith.cluster.kube.objects import Object, RayCluster, annotations_of, ray_cluster
from tunesmith.cluster.recipe.lines import KeyPath

TIMEOUT = "ray.io/initializing-timeout"
STRATEGIES = ("NewCluster", "NewClusterWithIncrementalUpgrade", "None")
ORDER = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")
"""What goes first."""

SHELL = re.compile(r"[();<>|&$`\n]+|.*[$`].*", re.DOTALL)
"""Words that a shell does not pass on as they are. A line's end, too, begins another command."""

RULES = {
    "job.entrypoint": "an entrypoint is one command in one line without shell operators, which the submitter's own shell would run there",
    "kuberay.job-cluster": "a RayJob has a cluster of its own or selects one that is there, by name, and not in sidecar mode",
    "kuberay.suspend": "only a RayJob with shutdownAfterJobFinishes and a cluster of its own may be suspended",
    "kuberay.ttl": "ttlSecondsAfterFinished is not negative and goes with shutdownAfterJobFinishes",
    "kuberay.backoff-limit": "backoffLimit is not negative, and 0 in interactive mode and with clusterSelector",
    "kuberay.deadlines": "activeDeadlineSeconds and preRunningDeadlineSeconds are positive",
    "kuberay.sidecar": "sidecar mode has no submitter of its own and a head that is not restarted",
    "kuberay.runtime-env": "runtimeEnvYAML is YAML, a mapping",
    "kuberay.job-auth": "a RayJob or RayService does not authenticate by Kubernetes tokens",
    "kuberay.deletion": "a deletion strategy is whole, has no two rules of one condition, deletes workers before the cluster before the job, and only what there is to delete",
    "kuberay.serve-config": "a RayService has a serveConfigV2, which is YAML, a mapping",
    "kuberay.service": "a RayService leaves the head service's name to the operator, and its times are positive",
    "kuberay.service-upgrade": "a RayService's upgrade strategy is one that there is, and an incremental one is complete",
}


def check(document: Document) -> Iterator[Finding]:
    """Findings about a RayJob or a RayService; none about other kinds."""
    kind, spec = document["kind"], document.get("spec") or {}
    cluster = ray_cluster(document)
    if kind not in ("RayJob", "RayService"):
        return
    if cluster is not None and (cluster.spec.get("authOptions") or {}).get("enableK8sTokenAuth"):
        path = (*cluster.path, "authOptions", "enableK8sTokenAuth")
        yield Finding("kuberay.job-auth", path, f"not for a {kind}", "Leave it out: mode token has its own secret.")
    if kind == "RayJob":
        yield from _job(spec, cluster)
        yield from _submission(spec, cluster)
        yield from _deletion(spec, cluster)
    else:
        yield from _service(document, spec, cluster)


def _job(spec: Object, cluster: RayCluster | None) -> Iterator[Finding]:
    shuts_down, selector = bool(spec.get("shutdownAfterJobFinishes")), spec.get("clusterSelector")
    if cluster is None and not selector:
        what = "neither rayClusterSpec nor clusterSelector"
        yield Finding("kuberay.job-cluster", ("spec",), what, "Write rayClusterSpec.")
    if selector is not None and selector and not selector.get("ray.io/cluster"):
        fix = "Write ray.io/cluster: NAME."
        yield Finding("kuberay.job-cluster", ("spec", "clusterSelector"), "it names no cluster", fix)
    if selector and spec.get("submissionMode") == "SidecarMode":
        what = "sidecar mode with clusterSelector"
        yield Finding("kuberay.job-cluster", ("spec", "submissionMode"), what, "Take K8sJobMode.")
    if spec.get("suspend") and not shuts_down:
        fix = "Set shutdownAfterJobFinishes: true."
        yield Finding("kuberay.suspend", ("spec", "suspend"), "suspend without shutdownAfterJobFinishes", fix)
    if spec.get("suspend") and selector:
        yield Finding("kuberay.suspend", ("spec", "suspend"), "suspend with clusterSelector", "Leave suspend out.")
    ttl = spec.get("ttlSecondsAfterFinished") or 0
    if ttl < 0:
        yield Finding("kuberay.ttl", ("spec", "ttlSecondsAfterFinished"), f"{ttl} is negative", "Write 0 or more.")
    if ttl > 0 and not shuts_down:
        fix = "Set shutdownAfterJobFinishes: true."
        what = f"{ttl} s without shutdownAfterJobFinishes"
        yield Finding("kuberay.ttl", ("spec", "ttlSecondsAfterFinished"), what, fix)
    for key in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        value = spec.get(key)
        if value is not None and value <= 0:
            yield Finding("kuberay.deadlines", ("spec", key), f"{value} s is no time", "Write a positive number.")
    retries = spec.get("backoffLimit") or 0
    path: KeyPath = ("spec", "backoffLimit")
    if retries < 0:
        yield Finding("kuberay.backoff-limit", path, f"{retries} is negative", "Write 0 or more.")
    for reason, holds in (("clusterSelector", selector), ("InteractiveMode", _mode(spec) == "InteractiveMode")):
        if retries > 0 and holds:
            yield Finding("kuberay.backoff-limit", path, f"{retries} retries with {reason}", "Set it to 0.")


def _entrypoint(text: str) -> Iterator[Finding]:
    path, fix = ("spec", "entrypoint"), "Put them into a script of the image, or quote them for two shells."
    words = shlex.shlex(text.replace("\\\n", " "), posix=False, punctuation_chars="();<>|&\n")
    words.whitespace_split, words.commenters, words.whitespace = True, "", " \t\r"
    try:
        taken = [word for word in words if SHELL.fullmatch(word) and not word.startswith("'")]
    except ValueError as error:
        yield Finding("job.entrypoint", path, f"{str(error).lower()}", fix)
        return
    if any("\n" in word for word in taken if not word.startswith('"')):
        what = "it has a line's end, where the submitter's shell would end the command"
        yield Finding(
            "job.entrypoint", path, what, "Write one line; entrypoint: >- joins several, and ends without one."
        )
    elif taken:
        what = f"{' '.join(taken)} would be taken by the submitter's shell, not by the job's"
        yield Finding("job.entrypoint", path, what, fix)


def _mode(spec: Object) -> str:
    return spec.get("submissionMode") or "K8sJobMode"


def _submission(spec: Object, cluster: RayCluster | None) -> Iterator[Finding]:
    if _mode(spec) in ("K8sJobMode", "SidecarMode"):
        yield from _entrypoint(spec.get("entrypoint") or "")
    if _mode(spec) == "SidecarMode":
        for key in ("submitterPodTemplate", "submitterConfig"):
            if key in spec:
                yield Finding("kuberay.sidecar", ("spec", key), f"{key} in sidecar mode", "Leave it out.")
        policy = cluster.head.pod.get("restartPolicy") or "Never" if cluster else "Never"
        if cluster is not None and policy != "Never":
            path = (*cluster.head.path, "template", "spec", "restartPolicy")
            yield Finding("kuberay.sidecar", path, f"the head's is {policy}", "Write Never, or leave it out.")
    if spec.get("runtimeEnvYAML") and (problem := _no_mapping(spec["runtimeEnvYAML"])):
        yield Finding("kuberay.runtime-env", ("spec", "runtimeEnvYAML"), problem, "Write it as a mapping in YAML.")


def _no_mapping(text: str) -> str:
    """What is wrong with a text that is to be a mapping in YAML; empty when nothing is."""
    try:
        return "" if isinstance(strict.load(text), dict) else "it is no mapping"
    except yaml.YAMLError as error:
        return " ".join(str(error).split())


def _deletion(spec: Object, cluster: RayCluster | None) -> Iterator[Finding]:
    strategy = spec.get("deletionStrategy")
    if strategy is None:
        return
    path: KeyPath = ("spec", "deletionStrategy")
    rules, old = strategy.get("deletionRules") or [], [key for key in ("onSuccess", "onFailure") if key in strategy]
    policies = [((*path, key, "policy"), strategy[key].get("policy")) for key in old]
    policies += [((*path, "deletionRules", index, "policy"), rule["policy"]) for index, rule in enumerate(rules)]

    def wrong(place: KeyPath, what: str, fix: str) -> Finding:
        return Finding("kuberay.deletion", place, what, fix)

    if rules and spec.get("shutdownAfterJobFinishes"):
        yield wrong((*path, "deletionRules"), "deletionRules with shutdownAfterJobFinishes", "Keep one of the two.")
    if rules and old:
        yield wrong((*path, "deletionRules"), f"deletionRules beside {' and '.join(old)}", "Keep deletionRules.")
    if not rules and len(old) < 2:
        yield wrong(path, "neither deletionRules nor both onSuccess and onFailure", "Write deletionRules.")
    for place, policy in policies:
        if policy is None:
            yield wrong(place, "no policy", f"Write one of {', '.join((*ORDER, 'DeleteNone'))}.")
        if spec.get("clusterSelector") and policy in ("DeleteCluster", "DeleteWorkers"):
            yield wrong(place, f"{policy} of a cluster that is not the job's", "Write DeleteSelf or DeleteNone.")
        if cluster is not None and cluster.autoscales and policy == "DeleteWorkers":
            yield wrong(place, "DeleteWorkers with the autoscaler", "Write DeleteCluster.")
        if old and policy == "DeleteNone" and spec.get("shutdownAfterJobFinishes"):
            yield wrong(place, "DeleteNone with shutdownAfterJobFinishes", "Keep one of the two.")
    yield from _deletion_times(rules, (*path, "deletionRules"))


def _deletion_times(rules: list[Any], path: KeyPath) -> Iterator[Finding]:
    """Each condition deletes a thing once, and a part not later than the whole."""
    times: dict[tuple[str, str], dict[str, int]] = {}
    for index, rule in enumerate(rules):
        condition, place = rule["condition"], (*path, index)
        after = condition.get("ttlSeconds") or 0
        if after < 0:
            yield Finding("kuberay.deletion", (*place, "condition", "ttlSeconds"), f"{after} is negative", "Write 0.")
        kind = "jobStatus" if "jobStatus" in condition else "jobDeploymentStatus"
        found = times.setdefault((kind, condition.get(kind, "")), {})
        if rule["policy"] in found:
            what = f"a second {rule['policy']} for {kind} {condition.get(kind)}"
            yield Finding("kuberay.deletion", place, what, "Leave one out.")
        found.setdefault(rule["policy"], after)
    for (kind, status), found in times.items():
        steps = [policy for policy in ORDER if policy in found]
        for first, then in pairwise(steps):
            if found[then] < found[first]:
                what = f"for {kind} {status}, {then} after {found[then]} s comes before {first} after {found[first]} s"
                yield Finding("kuberay.deletion", path, what, f"Give {then} at least {found[first]} s.")


def _service(document: Document, spec: Object, cluster: RayCluster | None) -> Iterator[Finding]:
    timeout = annotations_of(document).get(TIMEOUT)
    if timeout:
        written = re.fullmatch(r"(\d+(?:\.\d+)?(?:ns|us|µs|ms|s|m|h))+|\d+", timeout)
        if not written or not re.search(r"[1-9]", timeout):
            path = ("metadata", "annotations", TIMEOUT)
            yield Finding("kuberay.service", path, f"{timeout!r} is no time", "Write such as 30m, or seconds.")
    if problem := _no_mapping(spec.get("serveConfigV2") or ""):
        what = problem if spec.get("serveConfigV2") else "there is none, so nothing would be served"
        fix = "Write a mapping in YAML, with applications."
        yield Finding("kuberay.serve-config", ("spec", "serveConfigV2"), what, fix)
    if cluster is None:
        return
    service = cluster.head.spec.get("headService") or {}
    if (service.get("metadata") or {}).get("name"):
        path = (*cluster.head.path, "headService", "metadata", "name")
        yield Finding("kuberay.service", path, "the head service of a RayService is named", "Leave the name out.")
    delay = spec.get("rayClusterDeletionDelaySeconds") or 0
    if delay < 0:
        yield Finding("kuberay.service", ("spec", "rayClusterDeletionDelaySeconds"), f"{delay} is negative", "Write 0.")
    yield from _service_upgrade(spec, cluster)


def _service_upgrade(spec: Object, cluster: RayCluster) -> Iterator[Finding]:
    strategy = spec.get("upgradeStrategy") or {}
    kind, path = strategy.get("type"), ("spec", "upgradeStrategy")

    def wrong(place: KeyPath, what: str, fix: str) -> Finding:
        return Finding("kuberay.service-upgrade", place, what, fix)

    if kind is not None and kind not in STRATEGIES:
        yield wrong((*path, "type"), f"{kind} is no strategy", f"Write one of {', '.join(STRATEGIES)}.")
    if kind != "NewClusterWithIncrementalUpgrade":
        return
    options, place = strategy.get("clusterUpgradeOptions"), (*path, "clusterUpgradeOptions")
    if not cluster.autoscales:
        yield wrong((*path, "type"), "an incremental upgrade without autoscaling", "Set enableInTreeAutoscaling: true.")
    if options is None:
        yield wrong(place, "an incremental upgrade without options", "Write clusterUpgradeOptions.")
        return
    surge, step = options.get("maxSurgePercent", 100), options.get("stepSizePercent")
    for key, value in (("maxSurgePercent", surge), ("stepSizePercent", step)):
        if value is None or not 0 <= value <= 100:
            yield wrong((*place, key), f"{value} is no share in per cent", "Write 0 to 100.")
    if step is not None and step > surge:
        yield wrong((*place, "stepSizePercent"), f"{step} is more than maxSurgePercent {surge}", "Lower it.")
    if (options.get("intervalSeconds") or 0) <= 0:
        yield wrong((*place, "intervalSeconds"), f"{options.get('intervalSeconds')} s", "Write a positive number.")
    if not options.get("gatewayClassName"):
        yield wrong((*place, "gatewayClassName"), "no gateway class", "Name the Gateway API class that moves traffic.")
