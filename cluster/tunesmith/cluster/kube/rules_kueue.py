"""What Kueue's webhooks refuse although the schemas allow it, and what a queued workload must say itself."""

from __future__ import annotations

from collections.abc import Iterator

from tunesmith.cluster.kube.findings import Document, Finding
from tunesmith.cluster.kube.objects import (
    LABEL_VALUE,
    SUBDOMAIN,
    Object,
    RayCluster,
    annotations_of,
    labels_of,
    qualified_name,
    quantity,
    ray_cluster,
)
from tunesmith.cluster.recipe.lines import KeyPath

QUEUE, PRIORITY = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class"
ELASTIC, LONGEST_RUN = "kueue.x-k8s.io/elastic-job", "kueue.x-k8s.io/max-exec-time-seconds"
POD_SET = "kueue.x-k8s.io/podset-"
REQUIRED, PREFERRED, FREE = (f"{POD_SET}{kind}-topology" for kind in ("required", "preferred", "unconstrained"))
SLICE, SLICE_SIZE, TOGETHER = f"{POD_SET}slice-required-topology", f"{POD_SET}slice-size", f"{POD_SET}group-name"
MOST_GROUPS = 17
"""Worker groups: a workload has 18 sets of pods, and one is the head."""
MOST_FLAVORS, MOST_QUOTAS = 256, 512

RULES = {
    "kueue.labels": "queue and priority class are names, and max-exec-time-seconds is a positive number",
    "kueue.suspend": "a queued workload begins suspended, so that nothing starts before it is admitted",
    "kueue.shutdown": "a queued RayJob has a cluster of its own and shuts it down when it is finished",
    "kueue.autoscaling": "a queued cluster autoscales only with the annotation kueue.x-k8s.io/elastic-job",
    "kueue.groups": "a queued cluster has at most 17 worker groups, none of them named head",
    "kueue.topology": "topology annotations of a pod template agree with one another, and name labels and sizes",
    "kueue.cluster-queue": "a ClusterQueue covers each resource and flavor once, in one order, with quotas that are not negative and lend what there is",
    "kueue.resource-flavor": "a ResourceFlavor's labels and taints are valid, and no taint stands twice",
}


def check(document: Document) -> Iterator[Finding]:
    """Findings about queued Ray resources, ClusterQueues and ResourceFlavors."""
    kind, cluster = document["kind"], ray_cluster(document)
    yield from _labels(document)
    if cluster is not None:
        yield from _topology(cluster)
        if QUEUE in labels_of(document):
            yield from _queued(document, cluster)
    if kind == "RayJob" and QUEUE in labels_of(document) and (document["spec"].get("clusterSelector")):
        what = "a queued job runs on a cluster that is there already"
        yield Finding("kueue.shutdown", ("spec", "clusterSelector"), what, "Write rayClusterSpec instead.")
    if kind == "ClusterQueue":
        yield from _cluster_queue(document["spec"])
    if kind == "ResourceFlavor":
        yield from _resource_flavor(document.get("spec") or {})


def _labels(document: Document) -> Iterator[Finding]:
    found = labels_of(document)
    for name in (QUEUE, PRIORITY):
        if name in found and not SUBDOMAIN.fullmatch(found[name]):
            what = f"{found[name]!r} is no name"
            fix = "Lower-case letters, digits, dashes and dots."
            yield Finding("kueue.labels", ("metadata", "labels", name), what, fix)
    if LONGEST_RUN in found and not (found[LONGEST_RUN].isdigit() and int(found[LONGEST_RUN]) > 0):
        what = f"{found[LONGEST_RUN]!r} is no number of seconds"
        yield Finding("kueue.labels", ("metadata", "labels", LONGEST_RUN), what, "Write a positive whole number.")


def _queued(document: Document, cluster: RayCluster) -> Iterator[Finding]:
    kind, spec = document["kind"], document["spec"]
    if not spec.get("suspend"):
        what = f"{QUEUE} is set and suspend is not"
        yield Finding("kueue.suspend", ("spec", "suspend"), what, "Write suspend: true; Kueue takes it away.")
    if kind == "RayJob" and not spec.get("shutdownAfterJobFinishes"):
        what = "the cluster of a queued job would keep its quota for ever"
        fix = "Set shutdownAfterJobFinishes: true."
        yield Finding("kueue.shutdown", ("spec", "shutdownAfterJobFinishes"), what, fix)
    if cluster.autoscales and annotations_of(document).get(ELASTIC) != "true":
        path = (*cluster.path, "enableInTreeAutoscaling")
        yield Finding("kueue.autoscaling", path, "a queued cluster autoscales", f'Annotate it: {ELASTIC}: "true".')
    if len(cluster.workers) > MOST_GROUPS:
        path = (*cluster.path, "workerGroupSpecs")
        what = f"{len(cluster.workers)} worker groups, and a workload may have {MOST_GROUPS}"
        yield Finding("kueue.groups", path, what, "Merge groups whose pods are alike.")
    for group in cluster.workers:
        if group.name == "head":
            what = "a worker group named head, which is the head's own name in a workload"
            yield Finding("kueue.groups", (*group.path, "groupName"), what, "Give it another name.")


def _topology(cluster: RayCluster) -> Iterator[Finding]:
    for group in (cluster.head, *cluster.workers):
        found = (group.spec["template"].get("metadata") or {}).get("annotations") or {}
        path: KeyPath = (*group.path, "template", "metadata", "annotations")
        count = 1 if group.is_head else group.spec.get("replicas", 1) * max(1, group.spec.get("numOfHosts", 1))
        for key, what, fix in _topology_mistakes(found, count):
            yield Finding("kueue.topology", (*path, key), what, fix)


def _topology_mistakes(found: Object, count: int) -> Iterator[tuple[str, str, str]]:
    kinds = [key for key in (REQUIRED, PREFERRED, FREE) if key in found]
    if len(kinds) > 1:
        yield kinds[1], f"beside {kinds[0]}", "Keep one of them."
    for key in (REQUIRED, PREFERRED, SLICE):
        if key in found and not qualified_name(found[key]):
            yield key, f"{found[key]!r} is no label of a node", "Write a level of the flavor's Topology."
    if FREE in found and found[FREE].lower() not in ("true", "false", "1", "0", "t", "f"):
        yield FREE, f"{found[FREE]!r} is neither true nor false", 'Write "true".'
    if (SLICE in found) != (SLICE_SIZE in found):
        there, missing = (SLICE, SLICE_SIZE) if SLICE in found else (SLICE_SIZE, SLICE)
        yield there, f"without {missing}", f"Write {missing} too."
    size = found.get(SLICE_SIZE)
    if size is not None and not (size.isdigit() and int(size) >= 1):
        yield SLICE_SIZE, f"{size!r} is no number of pods", "Write 1 or more."
    elif size is not None and int(size) > count:
        yield SLICE_SIZE, f"{size} is more than the {count} pods of the group", f"Write at most {count}."
    if TOGETHER in found and found[TOGETHER].isdigit():
        yield TOGETHER, f"{found[TOGETHER]} is a number", "Write a name."
    if TOGETHER in found and not found.keys() & {REQUIRED, PREFERRED}:
        yield TOGETHER, "no topology is required or preferred", f"Write {REQUIRED} or {PREFERRED}."


def _cluster_queue(spec: Object) -> Iterator[Finding]:
    groups = spec.get("resourceGroups") or []
    path: KeyPath = ("spec", "resourceGroups")
    seen_resources: set[str] = set()
    seen_flavors: set[str] = set()

    def wrong(place: KeyPath, what: str, fix: str) -> Finding:
        return Finding("kueue.cluster-queue", place, what, fix)

    for index, group in enumerate(groups):
        for number, name in enumerate(group["coveredResources"]):
            if name in seen_resources:
                yield wrong((*path, index, "coveredResources", number), f"{name} is covered twice", "Leave one out.")
            seen_resources.add(name)
        for number, flavor in enumerate(group["flavors"]):
            place = (*path, index, "flavors", number)
            if flavor["name"] in seen_flavors:
                yield wrong((*place, "name"), f"{flavor['name']} stands twice", "Leave one out.")
            seen_flavors.add(flavor["name"])
            pairs = zip(flavor["resources"], group["coveredResources"], strict=False)
            for at, (resource, covered) in enumerate(pairs):
                if resource["name"] != covered:
                    what = f"{resource['name']} stands where coveredResources has {covered}"
                    yield wrong((*place, "resources", at, "name"), what, "Keep the order of coveredResources.")
                yield from _quotas(
                    resource, (*place, "resources", at), bool(spec.get("cohortName", spec.get("cohort")))
                )
        if (total := sum(len(flavor["resources"]) for flavor in group["flavors"])) > MOST_QUOTAS:
            yield wrong((*path, index), f"{total} quotas in one group, and {MOST_QUOTAS} may be", "Split the group.")
    for number, total in (("flavors", len(seen_flavors)), ("covered resources", len(seen_resources))):
        if total > MOST_FLAVORS:
            yield wrong(path, f"{total} {number}, and {MOST_FLAVORS} may be", "Split the queue.")
    for number, check_ in enumerate((spec.get("admissionChecksStrategy") or {}).get("admissionChecks") or []):
        for unknown in sorted(set(check_.get("onFlavors") or []) - seen_flavors):
            place = ("spec", "admissionChecksStrategy", "admissionChecks", number, "onFlavors")
            yield wrong(place, f"{unknown} is no flavor of this queue", f"There are {', '.join(sorted(seen_flavors))}.")


def _quotas(resource: Object, place: KeyPath, has_cohort: bool) -> Iterator[Finding]:
    for key in ("nominalQuota", "borrowingLimit", "lendingLimit"):
        if key in resource and quantity(resource[key]) < 0:
            yield Finding("kueue.cluster-queue", (*place, key), f"{resource[key]} is negative", "Write 0 or more.")
    if "lendingLimit" in resource:
        lent = resource["lendingLimit"]
        if not has_cohort:
            what = f"{lent} is lent, and the queue has no cohort to lend to"
            yield Finding("kueue.cluster-queue", (*place, "lendingLimit"), what, "Name a cohort, or leave it out.")
        if quantity(lent) > quantity(resource["nominalQuota"]):
            what = f"{lent} is more than the nominalQuota {resource['nominalQuota']}"
            yield Finding("kueue.cluster-queue", (*place, "lendingLimit"), what, "Lower it.")


def _resource_flavor(spec: Object) -> Iterator[Finding]:
    for key, value in (spec.get("nodeLabels") or {}).items():
        if not qualified_name(key) or not LABEL_VALUE.fullmatch(value):
            path = ("spec", "nodeLabels", key)
            yield Finding("kueue.resource-flavor", path, f"{key}: {value} is no label", "Write a label of your nodes.")
    seen: set[tuple[str, str]] = set()
    for index, taint in enumerate(spec.get("nodeTaints") or []):
        path = ("spec", "nodeTaints", index)
        if not qualified_name(taint.get("key", "")) or not LABEL_VALUE.fullmatch(taint.get("value", "")):
            what = f"{taint.get('key')}={taint.get('value', '')} is no taint"
            yield Finding("kueue.resource-flavor", path, what, "A key and a value have the syntax of labels.")
        pair = (taint.get("key", ""), taint.get("effect", ""))
        if pair in seen:
            yield Finding("kueue.resource-flavor", path, f"{':'.join(pair)} stands twice", "Leave one out.")
        seen.add(pair)
