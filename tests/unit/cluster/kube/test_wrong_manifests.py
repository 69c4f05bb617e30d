"""Deliberately wrong manifests: each is refused by the rule that is for it, at the place that is wrong, with what to do."""

from __future__ import annotations

from typing import Any

import manifests
import pytest
from manifests import GONE, changed, cluster, cluster_queue, job, of, service

from tunesmith.cluster.kube import check

C = "spec.rayClusterSpec"
HEAD, WORKER = f"{C}.headGroupSpec", f"{C}.workerGroupSpecs.0"
HEAD_POD, POD = f"{HEAD}.template.spec", f"{WORKER}.template.spec"
HEAD_BOX, BOX = f"{HEAD_POD}.containers.0", f"{POD}.containers.0"
NOTES = f"{WORKER}.template.metadata.annotations"
RULES_JOB: dict[str, Any] = {"spec.shutdownAfterJobFinishes": False, "spec.suspend": False}
DELETE = {"policy": "DeleteCluster", "condition": {"jobStatus": "SUCCEEDED", "ttlSeconds": 60}}
WORKERS_LATER = {"policy": "DeleteWorkers", "condition": {"jobStatus": "SUCCEEDED", "ttlSeconds": 90}}
SERVICE = "spec.rayClusterConfig"
INCREMENTAL = {"type": "NewClusterWithIncrementalUpgrade"}
OPTIONS = {"stepSizePercent": 10, "intervalSeconds": 10, "gatewayClassName": "istio", "maxSurgePercent": 100}
LOOSE_POD = of("v1", "Pod", spec={"containers": [{"name": "it", "image": "tunesmith:1"}]})
NAMESPACE = of("v1", "Namespace")
GROUP = "spec.resourceGroups.0"
FLAVOR = of("kueue.x-k8s.io/v1beta2", "ResourceFlavor", spec={"nodeLabels": {"gpu": "h100"}})
TAINT = {"key": "gpu", "effect": "NoSchedule"}

WRONG: list[tuple[str, dict[str, Any], dict[str, Any], str, str]] = [
    # what it is, a valid document, what is changed, the rule, words of the message
    ("a misspelt kind", job(), {"kind": "RayJobs"}, "schema.kind", "no schema of ray.io/v1/RayJobs"),
    ("a misspelt key", job(), {"spec.backofLimit": 3}, "schema.unknown", "Did you mean backoffLimit?"),
    ("a misspelt key of a pod", job(), {f"{POD}.contaners": []}, "schema.unknown", "Did you mean containers?"),
    ("a misspelt key of the metadata", job(), {"metadata.lables": {}}, "schema.unknown", "Did you mean labels?"),
    ("no head", job(), {HEAD: GONE}, "schema.required", "headGroupSpec"),
    ("a text for a number", job(), {"spec.backoffLimit": "3"}, "schema.type", '"3" is no integer'),
    ("a mode that there is not", job(), {f"{C}.authOptions.mode": "tokens"}, "schema.value", "Did you mean token?"),
    ("no quantity", job(), {f"{BOX}.resources.limits.memory": "256 GB"}, "schema.value", '"256 GB" is no quantity'),
    ("bytes as people write them", job(), {f"{BOX}.resources.requests.memory": "8GB"}, "schema.value", "Write 8G (powers of 1000) or 8Gi (of 1024)."),
    ("a deadline of zero", job(), {"spec.preRunningDeadlineSeconds": 0}, "schema.value", "less than the minimum"),
    ("an environment variable twice", job(), {f"{BOX}.env.1": {"name": "HOME", "value": "/"}}, "schema.duplicate", "name HOME"),
    (
        "half a deletion strategy",
        job(),
        {"spec.deletionStrategy": {"onSuccess": {"policy": "DeleteSelf"}}},
        "schema.cel",
        "BOTH onSuccess and onFailure",
    ),
    ("a name with an underscore", job(), {"metadata.name": "my_job"}, "kuberay.name", "DNS-1035"),
    ("a job's name of 48", job(), {"metadata.name": "a" * 48}, "kuberay.name", "48 characters, and a RayJob may have 47"),
    ("a cluster's name of 54", cluster(), {"metadata.name": "a" * 54}, "kuberay.name", "a RayCluster may have 53"),
    ("a service's name of 48", service(), {"metadata.name": "a" * 48}, "kuberay.name", "a RayService may have 47"),
    ("a head without a container", job(), {f"{HEAD_POD}.containers": []}, "kuberay.containers", "the head has no container"),
    ("bounds in the wrong order", job(), {f"{WORKER}.minReplicas": 5}, "kuberay.replica-bounds", "5 is more than"),
    ("more replicas than there may be", job(), {f"{WORKER}.replicas": 5}, "kuberay.replica-bounds", "no more than 2 would start"),
    ("negative bounds", job(), {f"{WORKER}.minReplicas": -1}, "kuberay.replica-bounds", "-1 is negative"),
    ("negative replicas", job(), {f"{WORKER}.replicas": -1}, "kuberay.replica-bounds", "replicas: group workers: -1 is negative"),
    ("fewer replicas than there must be", job(), {f"{WORKER}.replicas": 0}, "kuberay.replica-bounds", "0 is less than minReplicas 2, and 2 would start"),
    ("two groups of one name", job(), {f"{C}.workerGroupSpecs": job()["spec"]["rayClusterSpec"]["workerGroupSpecs"] * 2}, "kuberay.group-names", "they must be unique"),
    ("a group's name with an underscore", job(), {f"{WORKER}.groupName": "my_group"}, "kuberay.group-names", "'my_group' is no part of a pod's name"),
    (
        "resources in two places",
        job(),
        {f"{WORKER}.resources": {"CPU": "4"}, f"{WORKER}.rayStartParams.num-gpus": "8"},
        "kuberay.group-resources",
        "rayStartParams has num-gpus",
    ),
    ("labels for ray start", job(), {f"{WORKER}.rayStartParams.labels": "a=b"}, "kuberay.group-labels", "Move them"),
    ("no Ray label", job(), {f"{WORKER}.labels": {"-zone": "a"}}, "kuberay.group-labels", "-zone: a is no label"),
    ("an idle timeout of v1", job(), {f"{WORKER}.idleTimeoutSeconds": 60}, "kuberay.idle-timeout", "autoscaler v2"),
    ("a priority of an old Ray", job(), {f"{WORKER}.priority": 2, f"{C}.rayVersion": "2.55.0"}, "kuberay.group-priority", "2.56.0"),
    (
        "Redis in the environment",
        job(),
        {f"{HEAD_BOX}.env.0": {"name": "RAY_REDIS_ADDRESS", "value": "redis:6379"}},
        "kuberay.gcs-options",
        "gcsFaultToleranceOptions.redisAddress",
    ),
    (
        "storage for Redis",
        job(),
        {f"{C}.gcsFaultToleranceOptions": {"redisAddress": "redis:6379", "storage": {"size": "1Gi"}}},
        "kuberay.gcs-backend",
        "storage with the redis backend",
    ),
    (
        "an autoscaler that is off",
        job(),
        {f"{HEAD_BOX}.env.0": {"name": "RAY_enable_autoscaler_v2", "value": "1"}},
        "kuberay.autoscaler",
        "enableInTreeAutoscaling: true",
    ),
    ("a restarted pod under v2", service(), {f"{SERVICE}.headGroupSpec.template.spec.restartPolicy": "Always"}, "kuberay.autoscaler", "Write Never"),
    ("a suspended group that scales", service(), {f"{SERVICE}.workerGroupSpecs.0.suspend": True}, "kuberay.autoscaler", "suspended while"),
    ("a token without a version", job(), {f"{C}.rayVersion": GONE}, "kuberay.auth", "rayVersion not given"),
    ("a token of an old Ray", job(), {f"{C}.rayVersion": "2.51.1"}, "kuberay.auth", "2.52.0 or later"),
    (
        "rules that the mode makes void",
        job(),
        {f"{C}.networkPolicy": {"mode": "DenyAllEgress", "head": {"ingressRules": [{}]}}},
        "kuberay.network-policy",
        "denies nothing of the kind",
    ),
    (
        "TLS variables beside tlsOptions",
        job(),
        {f"{C}.tlsOptions": {"enabled": True}, f"{BOX}.env.0": {"name": "RAY_USE_TLS", "value": "1"}},
        "kuberay.tls",
        "RAY_USE_TLS is the operator's",
    ),
    ("a history server without a collector", job(), {f"{C}.historyServerOptions": {}}, "kuberay.history-server", "no collector"),
    ("what is behind a gate", job(), {f"{C}.networkPolicy": {}}, "kuberay.feature-gate", "--feature-gate RayClusterNetworkPolicy"),
    ("a strategy of a job's cluster", job(), {f"{C}.upgradeStrategy": {"type": "Recreate"}}, "kuberay.upgrade-strategy", "Leave it out"),
    ("two commands", job(), {"spec.entrypoint": "cd /shared && tunesmith train a.yaml"}, "job.entrypoint", "&& would be taken"),
    ("a variable of another machine", job(), {"spec.entrypoint": "tunesmith train $HOME/a.yaml"}, "job.entrypoint", "$HOME/a.yaml would be"),
    ("a command a line", job(), {"spec.entrypoint": "tunesmith train a\ntunesmith train b"}, "job.entrypoint", "it has a line's end"),
    ("a command with a line's end", job(), {"spec.entrypoint": "tunesmith train a\n"}, "job.entrypoint", "entrypoint: >- joins several"),
    ("a quote that does not end", job(), {"spec.entrypoint": "echo 'a"}, "job.entrypoint", "no closing quotation"),
    ("a job without a cluster", job(), {C: GONE}, "kuberay.job-cluster", "neither rayClusterSpec nor clusterSelector"),
    ("suspended for ever", job(), {"spec.shutdownAfterJobFinishes": False}, "kuberay.suspend", "shutdownAfterJobFinishes: true"),
    ("a time to live of nothing", job(), {**RULES_JOB, "spec.ttlSecondsAfterFinished": 60}, "kuberay.ttl", "60 s without"),
    ("retries of an interactive job", job(), {"spec.submissionMode": "InteractiveMode"}, "kuberay.backoff-limit", "3 retries with InteractiveMode"),
    ("retries on a borrowed cluster", job(), {"spec.clusterSelector": {"ray.io/cluster": "desk"}}, "kuberay.backoff-limit", "with clusterSelector"),
    ("no time at all", job(), {"spec.activeDeadlineSeconds": 0}, "kuberay.deadlines", "0 s is no time"),
    ("a submitter in sidecar mode", job(), {"spec.submissionMode": "SidecarMode"}, "kuberay.sidecar", "submitterPodTemplate in sidecar mode"),
    ("a runtime environment of no YAML", job(), {"spec.runtimeEnvYAML": "{a: b"}, "kuberay.runtime-env", "mapping in YAML"),
    ("a key twice in a runtime environment", job(), {"spec.runtimeEnvYAML": "pip: [a]\npip: [b]"}, "kuberay.runtime-env", "pip is written twice"),
    ("Kubernetes tokens for a job", job(), {f"{C}.authOptions.enableK8sTokenAuth": True}, "kuberay.job-auth", "not for a RayJob"),
    ("rules beside shutdown", job(), {"spec.deletionStrategy": {"deletionRules": [DELETE]}}, "kuberay.deletion", "Keep one of the two"),
    (
        "workers deleted after their cluster",
        job(),
        {**RULES_JOB, "spec.deletionStrategy": {"deletionRules": [DELETE, WORKERS_LATER]}},
        "kuberay.deletion",
        "Give DeleteCluster at least 90 s",
    ),
    ("a service of nothing", service(), {"spec.serveConfigV2": GONE}, "kuberay.serve-config", "nothing would be served"),
    ("applications of no YAML", service(), {"spec.serveConfigV2": "applications: [{name: a"}, "kuberay.serve-config", "a mapping in YAML"),
    ("a list of applications alone", service(), {"spec.serveConfigV2": "- name: a"}, "kuberay.serve-config", "it is no mapping"),
    ("a timeout of no time", service(), {"metadata.annotations": {"ray.io/initializing-timeout": "soon"}}, "kuberay.service", "'soon' is no time"),
    ("a strategy that there is not", service(), {"spec.upgradeStrategy.type": "BlueGreen"}, "kuberay.service-upgrade", "BlueGreen is no strategy"),
    ("an incremental upgrade without options", service(), {"spec.upgradeStrategy": INCREMENTAL}, "kuberay.service-upgrade", "clusterUpgradeOptions"),
    (
        "a step larger than the surge",
        service(),
        {"spec.upgradeStrategy": {**INCREMENTAL, "clusterUpgradeOptions": {**OPTIONS, "stepSizePercent": 50, "maxSurgePercent": 20}}},
        "kuberay.service-upgrade",
        "50 is more than maxSurgePercent 20",
    ),
    ("no queue's name", job(), {"metadata.labels.kueue|x-k8s|io/queue-name": "GPU queue"}, "kueue.labels", "'GPU queue' is no name"),
    ("a queued job that starts at once", job(), {"spec.suspend": GONE}, "kueue.suspend", "Write suspend: true"),
    ("a queued job that keeps its cluster", job(), {"spec.shutdownAfterJobFinishes": GONE}, "kueue.shutdown", "for ever"),
    (
        "a queued cluster that scales",
        job(),
        {f"{C}.enableInTreeAutoscaling": True},
        "kueue.autoscaling",
        'kueue.x-k8s.io/elastic-job: "true"',
    ),
    ("a group named head", job(), {f"{WORKER}.groupName": "head"}, "kueue.groups", "a worker group named head"),
    ("eighteen groups", job(), {f"{C}.workerGroupSpecs": job()["spec"]["rayClusterSpec"]["workerGroupSpecs"] * 18}, "kueue.groups", "18 worker groups"),
    (
        "two topologies",
        job(),
        {NOTES: {"kueue.x-k8s.io/podset-required-topology": "rack", "kueue.x-k8s.io/podset-preferred-topology": "block"}},
        "kueue.topology",
        "Keep one of them",
    ),
    ("a slice without a topology", job(), {NOTES: {"kueue.x-k8s.io/podset-slice-size": "2"}}, "kueue.topology", "slice-required-topology"),
    ("a resource covered twice", cluster_queue(), {f"{GROUP}.coveredResources.1": "cpu"}, "kueue.cluster-queue", "cpu is covered twice"),
    ("quotas in another order", cluster_queue(), {f"{GROUP}.flavors.0.resources.0.name": "memory"}, "kueue.cluster-queue", "Keep the order"),
    ("lending more than there is", cluster_queue(), {f"{GROUP}.flavors.0.resources.1.lendingLimit": 9}, "kueue.cluster-queue", "9 is more than"),
    ("borrowing without a cohort", cluster_queue(), {"spec.cohortName": GONE, f"{GROUP}.flavors.0.resources.1.borrowingLimit": 1}, "schema.cel", "cohort is empty"),
    ("a taint twice", FLAVOR, {"spec.nodeTaints": [TAINT, TAINT]}, "kueue.resource-flavor", "gpu:NoSchedule stands twice"),
    ("a cluster's queue in a namespace", cluster_queue(), {"metadata.namespace": "team"}, "core.namespace", "belongs to the whole cluster"),
    ("no DNS name", NAMESPACE, {"metadata.name": "My_Team"}, "core.name", "no DNS subdomain"),
    ("root", job(), {f"{POD}.securityContext.runAsNonRoot": GONE}, "security.non-root", "ray-worker may run as root"),
    ("user 0", job(), {f"{BOX}.securityContext.runAsUser": 0}, "security.non-root", "no user 0"),
    ("no seccomp profile", job(), {f"{HEAD_POD}.securityContext.seccompProfile": GONE}, "security.seccomp", "RuntimeDefault"),
    ("an unconfined submitter", job(), {"spec.submitterPodTemplate.spec.securityContext.seccompProfile.type": "Unconfined"}, "security.seccomp", "ray-job-submitter"),
    ("all capabilities", job(), {f"{BOX}.securityContext.capabilities": GONE}, "security.capabilities", "drop: [ALL]"),
    ("locked memory by capability", job(), {f"{BOX}.securityContext.capabilities.add": ["IPC_LOCK"]}, "security.capabilities", "memlock"),
    ("a privileged container", job(), {f"{BOX}.securityContext.privileged": True}, "security.privileges", "is privileged"),
    ("gained privileges", job(), {f"{BOX}.securityContext.allowPrivilegeEscalation": GONE}, "security.privileges", "Write false"),
    ("the node's network", job(), {f"{POD}.hostNetwork": True}, "security.host", "hostNetwork: true"),
    ("the node's disk", job(), {f"{POD}.volumes.0": {"name": "scratch", "hostPath": {"path": "/"}}}, "security.host", "is a hostPath"),
    ("a port of the node", job(), {f"{BOX}.ports": [{"containerPort": 8000, "hostPort": 80}]}, "security.host", "port 80 of its node"),
    ("a volume of NFS", job(), {f"{POD}.volumes.0": {"name": "scratch", "nfs": {"server": "a", "path": "/"}}}, "security.volumes", "is a nfs"),
    ("the API server's token", job(), {f"{POD}.automountServiceAccountToken": GONE}, "security.service-account-token", "Write false"),
    ("a public dashboard", job(), {f"{HEAD}.serviceType": "LoadBalancer"}, "security.exposed", "Write ClusterIP"),
    ("a port on every node", of("v1", "Service", spec={"type": "NodePort"}), {}, "security.exposed", "NodePort"),
    ("an ingress to the head", job(), {f"{HEAD}.enableIngress": True}, "security.exposed", "an ingress to the head"),
    (
        "everybody lets in",
        of("networking.k8s.io/v1", "NetworkPolicy", spec={"podSelector": {}, "ingress": [{}]}),
        {},
        "security.open-ingress",
        "everybody may come in",
    ),
    ("no token", job(), {f"{C}.authOptions": GONE}, "security.auth", "authOptions: {mode: token}"),
    ("a secret's name alone", job(), {f"{C}.authOptions": {"secretName": "token"}}, "security.auth", "mode: token"),
    ("a token in the environment", job(), {f"{BOX}.env.0": {"name": "HF_TOKEN", "value": "abc"}}, "security.plain-secret", "HF_TOKEN has its value"),
    ("a key by its look", job(), {f"{BOX}.env.0": {"name": "X", "value": "hf_" + "a" * 30}}, "security.plain-secret", "secretKeyRef"),
    ("a key in a ConfigMap", of("v1", "ConfigMap", data={"a": "AKIA" + "A" * 16}), {}, "security.plain-secret", "what looks like an AWS key"),
    ("a Secret in a file", of("v1", "Secret", stringData={"a": "b"}), {}, "security.plain-secret", "kubectl create secret"),
    ("the latest image", job(), {f"{BOX}.image": "tunesmith:latest"}, "security.image", "another image from day to day"),
    ("an image without a tag", job(), {f"{BOX}.image": "somewhere:5000/tunesmith"}, "security.image", "Write a version's tag"),
    ("a namespace that enforces nothing", NAMESPACE, {}, "security.namespace", "it enforces nothing"),
    (
        "a role for everything",
        of("rbac.authorization.k8s.io/v1", "Role", rules=[{"apiGroups": [""], "resources": ["pods"], "verbs": ["*"]}]),
        {},
        "security.wildcard",
        "Name what it is for",
    ),
    (
        "a key in the runtime environment",
        job(),
        {"spec.runtimeEnvYAML": "env_vars: {WANDB_API_KEY: " + "0123456789abcdef" * 2 + "01234567}"},
        "security.plain-secret",
        "WANDB_API_KEY in env_vars",
    ),
    ("a key by its look in a runtime environment", job(), {"spec.runtimeEnvYAML": "pip: [hf_" + "a" * 30 + "]"}, "security.plain-secret", "envFrom"),
    (
        "a password in an address of a runtime environment",
        job(),
        {"spec.runtimeEnvYAML": "working_dir: https://me:tok3n@github.com/us/it/archive/main.zip"},
        "security.plain-secret",
        "it holds what looks like a password in an address",
    ),
    (
        "a password in an address",
        job(),
        {f"{BOX}.env.0": {"name": "DB", "value": "postgresql://u:secretpw@db/x"}},
        "security.plain-secret",
        "DB has its value in the manifest",
    ),
    ("a key in a container's command", job(), {f"{BOX}.args": ["--token", "hf_" + "a" * 30]}, "security.plain-secret", "write $(NAME) here"),
    ("a key in a command", job(), {"spec.entrypoint": "tunesmith train a --token hf_" + "a" * 30}, "security.plain-secret", "envFrom"),
    (
        "a key of an application",
        service(),
        {"spec.serveConfigV2": "applications: [{name: a, runtime_env: {env_vars: {DB_PASSWORD: x}}}]"},
        "security.plain-secret",
        "DB_PASSWORD in env_vars",
    ),
    ("a mount of nothing", job(), {f"{BOX}.volumeMounts.0.name": "scratchy"}, "core.mount", "mounts scratchy, and its pod has scratch, shared, shm"),
    ("two mounts at one path", job(), {f"{BOX}.volumeMounts.1.mountPath": "/tmp"}, "core.mount", "scratch and shared at /tmp"),
    ("a container's name with an underscore", job(), {f"{BOX}.name": "ray_worker"}, "core.container-name", "'ray_worker' is no DNS label"),
    ("a pull policy that there is not", job(), {f"{BOX}.imagePullPolicy": "Sometimes"}, "core.policy", "Always, IfNotPresent, Never"),
    ("a restart policy that there is not", job(), {f"{POD}.restartPolicy": "Sometimes"}, "core.policy", "Always, OnFailure, Never"),
    ("a value that only has to exist", job(), {f"{POD}.tolerations.0.value": "yes"}, "core.toleration", "Exists with the value yes"),
    ("an effect that there is not", job(), {f"{POD}.tolerations.0.effect": "NoScheduling"}, "core.toleration", "NoScheduling is none"),
    ("an operator that there is not", job(), {f"{POD}.tolerations.0.operator": "Is"}, "core.toleration", "Write Equal or Exists"),
    ("a volume of two kinds", job(), {f"{POD}.volumes.0.configMap": {"name": "a"}}, "core.one-of", "volume scratch is configMap and emptyDir"),
    (
        "a value and where it comes from",
        job(),
        {f"{BOX}.env.0": {"name": "A", "value": "b", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}},
        "core.one-of",
        "A is value and fieldRef",
    ),
    (
        "a probe that asks twice",
        job(),
        {f"{BOX}.readinessProbe": {"exec": {"command": ["true"]}, "tcpSocket": {"port": 8000}}},
        "core.one-of",
        "readinessProbe is exec and tcpSocket",
    ),
    ("no port", job(), {f"{BOX}.ports": [{"containerPort": 80000}]}, "core.port", "80000 is no port"),
    ("a probe of no port", job(), {f"{BOX}.readinessProbe": {"tcpSocket": {"port": 0}}}, "core.port", "0 is no port"),
    ("less memory than none", job(), {f"{BOX}.resources.requests.memory": "-8Gi"}, "core.quantity", "memory -8Gi is negative"),
    ("an adapter without a limit", job(), {f"{BOX}.resources.requests.rdma/ib": 8}, "core.device", "requests 8 rdma/ib with the limit none"),
    ("half an adapter", job(), {f"{BOX}.resources.limits.rdma/ib": "500m"}, "core.device", "the same whole number twice"),
    ("killed while it saves", job(), {f"{POD}.terminationGracePeriodSeconds": 5}, "job.grace", "killed after 5 s, and its preStop hook takes up to 270 s"),
    ("the default grace", job(), {f"{HEAD_POD}.terminationGracePeriodSeconds": GONE}, "job.grace", "after 30 s (the default)"),
    ("asleep for longer than it lives", job(), {f"{BOX}.lifecycle.preStop": {"sleep": {"seconds": 400}}}, "job.grace", "Write more than 400"),
    ("no quantity in a plain pod", changed(LOOSE_POD, {"spec.containers.0.resources": {"limits": {"memory": "8 GB"}}}), {}, "core.quantity", "'8 GB' is no quantity"),
    ("no memory", LOOSE_POD, {}, "resources.memory", "requests no memory"),
    ("memory that may not be there", job(), {f"{BOX}.resources.requests.memory": "8Gi"}, "resources.memory", "Write the same twice"),
    ("CPUs that may not be there", job(), {f"{BOX}.resources.requests.cpu": "8"}, "resources.gpu", "cpu 8 with the limit 64"),
    ("fewer GPUs than its limit", job(), {f"{BOX}.resources.requests.nvidia|com/gpu": 4}, "resources.gpu", "Write the same whole number twice, or the limit alone."),
    ("shared memory on a disk", job(), {f"{POD}.volumes.2.emptyDir.medium": GONE}, "resources.shm", "volume shm, which is no memory, at /dev/shm"),
    ("no shared memory", job(), {f"{BOX}.volumeMounts.2": GONE}, "resources.shm", "64 MiB at /dev/shm"),
    ("shared memory without a size", job(), {f"{POD}.volumes.2.emptyDir.sizeLimit": GONE}, "resources.shm", "volume shm at /dev/shm has no size"),
    ("shared memory larger than the memory", job(), {f"{POD}.volumes.2.emptyDir.sizeLimit": "300Gi"}, "resources.shm", "may take 300Gi"),
]  # fmt: skip


def findings(*documents: dict[str, Any]) -> list[Any]:
    return check.check_documents(("it.yaml", document) for document in documents)


@pytest.mark.parametrize(
    ("document", "changes", "rule", "words"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG]
)
def test_a_wrong_manifest_is_refused_by_its_rule(
    document: dict[str, Any], changes: dict[str, Any], rule: str, words: str
) -> None:
    found = [finding for finding in findings(changed(document, changes)) if finding.rule == rule]
    assert found, findings(changed(document, changes))
    assert any(words in finding.line() for finding in found), [finding.line() for finding in found]
    for finding in found:
        assert finding.file == "it.yaml"
        assert finding.what
        assert finding.fix


@pytest.mark.parametrize("document", [row[1] for row in WRONG if row[2]], ids=[row[0] for row in WRONG if row[2]])
def test_what_was_changed_is_all_that_was_wrong(document: dict[str, Any]) -> None:
    allowed = {"security.namespace"} if document is NAMESPACE else set()
    assert {finding.rule for finding in findings(document)} <= allowed


def test_a_document_that_stands_twice_is_refused() -> None:
    assert [finding.rule for finding in findings(job(), job())] == ["core.twice"]


def test_every_rule_has_a_manifest_that_breaks_it() -> None:
    assert {row[3] for row in WRONG} | {"core.twice"} == set(check.RULES)


@pytest.mark.parametrize(
    "value",
    [
        "postgresql://u:$(DB_PASSWORD)@db/x",
        "https://github.com/us/it/archive/" + "0123456789abcdef" * 2 + "01234567.zip",
        "tunesmith@sha256:" + "0123456789abcdef" * 4,
        "redis://cache:6379",
    ],
)
def test_a_reference_a_commit_and_a_digest_are_no_secrets(value: str) -> None:
    named = changed(job(), {f"{BOX}.env.0": {"name": "WHERE", "value": value}})
    assert findings(named) == []


@pytest.mark.parametrize(
    "entrypoint", ["tunesmith train \\\n  a", "python -c 'import a\na.main()'", 'python -c "a\nb"']
)
def test_lines_that_no_shell_ends_are_one_command(entrypoint: str) -> None:
    assert findings(changed(job(), {"spec.entrypoint": entrypoint})) == []


def test_a_gate_that_is_on_allows_what_is_behind_it() -> None:
    gated = changed(job(), {f"{C}.networkPolicy": {"mode": "DenyAll"}})
    assert [finding.rule for finding in findings(gated)] == ["kuberay.feature-gate"]
    assert check.check_documents([("it", gated)], gates=frozenset({"RayClusterNetworkPolicy"})) == []


def test_a_head_with_the_autoscaler_may_hold_a_token() -> None:
    head = service()["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]
    assert "automountServiceAccountToken" not in head
    assert findings(service()) == []


def test_an_elastic_job_may_autoscale_in_a_queue() -> None:
    elastic = {"metadata.annotations": {"kueue.x-k8s.io/elastic-job": "true"}, f"{C}.enableInTreeAutoscaling": True}
    elastic[f"{HEAD_POD}.automountServiceAccountToken"] = GONE
    assert findings(changed(manifests.job(), elastic)) == []
