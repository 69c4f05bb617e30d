"""Asks a Ray cluster: one witness on each node, all at once, and none is waited for without an end."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray import cloudpickle
from ray._private.worker import get_dashboard_url
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tunesmith.cluster.doctor import probe
from tunesmith.cluster.doctor.facts import Clock, Exchange, Machine

PATIENCE_S = 60.0
LOOKING_PATIENCE_S = 5 * PATIENCE_S
"""Torch is imported where there are GPUs, and storage may be slow."""
ROUND_TRIPS = 9
EXCHANGED_BYTES = 64 * 2**20


class Census:
    """The witnesses of a cluster that this process is connected to. A context manager: they end with it."""

    def __init__(self) -> None:
        cloudpickle.register_pickle_by_value(probe)  # so that a node without Tunesmith can be asked too
        alive = [node for node in ray.nodes() if node["Alive"]]
        addresses = [node["NodeManagerAddress"] for node in alive]
        self.addresses = {
            f"node {address}" + (f" ({node['NodeID'][:6]})" if addresses.count(address) > 1 else ""): address
            for node, address in zip(alive, addresses, strict=True)
        }
        self._ids = {name: node["NodeID"] for name, node in zip(self.addresses, alive, strict=True)}
        self._gpus = {name: node["Resources"].get("GPU", 0) for name, node in zip(self.addresses, alive, strict=True)}
        self._actors: list[Any] = []
        self._witnesses = {name: self._send(name, 0) for name in self.addresses}
        self.silent: dict[str, str] = {}
        """Nodes that did not answer, and why."""

    def __enter__(self) -> Census:
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._actors:
            ray.kill(actor)

    def machines(self, libraries: list[str], folder: str) -> list[Machine]:
        """What each node is and has. Nodes that do not answer are left out of everything that follows."""
        session = ray.get_runtime_context().get_session_name()
        awake, asleep = _gather({name: one.clock.remote() for name, one in self._witnesses.items()}, PATIENCE_S)
        asked = {name: self._witnesses[name].look.remote(name, libraries, folder, session) for name in awake}
        answers, failed = _gather(asked, LOOKING_PATIENCE_S)
        self.silent = asleep | failed
        self._witnesses = {name: self._witnesses[name] for name in answers}
        return [Machine.model_validate(answer) for answer in answers.values()]

    def clocks(self) -> list[Clock]:
        """How far the nodes' clocks are from ours: each is asked several times, and the quickest answer counts."""
        found = []
        for name, one in self._witnesses.items():
            try:
                found.append(bracketed(name, lambda one=one: ray.get(one.clock.remote(), timeout=PATIENCE_S)))
            except RayError as error:
                self.silent[name] = _reason(error)
        return found

    def readings(self, folder: str, nonce: str) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
        """What each node sees of the driver's file and lock, and what it wrote itself, by the name of its file."""
        asked, answers = {}, {}
        for name, one in self._witnesses.items():
            answers[name] = f"node-{self._ids[name][:12]}-{secrets.token_hex(4)}"
            asked[name] = one.read_and_answer.remote(folder, nonce, answers[name])
        return _said(*_gather(asked, PATIENCE_S)), answers

    def speeds(self, folder: str, size: int) -> dict[str, dict[str, Any]]:
        """Writing and reading on all nodes at once, as checkpoints are written."""
        asked = {
            name: one.measure_storage.remote(folder, self._ids[name][:12], size)
            for name, one in self._witnesses.items()
        }
        return _said(*_gather(asked, LOOKING_PATIENCE_S))

    def exchange(self, cuda: bool) -> Exchange | None:
        """An all-reduce over the nodes with GPUs where torch is built for them, else over all; None on fewer than two.

        With GPUs it reserves one on each node, so it waits its turn on a busy cluster, and gives up after a minute.
        """
        nodes = [name for name in self._witnesses if not cuda or self._gpus[name] >= 1]
        if len(nodes) < 2:
            return None
        seen = Exchange(backend="nccl" if cuda else "gloo", machines=nodes, bytes=EXCHANGED_BYTES)
        hosts = [self._send(name, 1) for name in nodes] if cuda else [self._witnesses[name] for name in nodes]
        address = self.addresses[nodes[0]]
        try:
            port = ray.get(hosts[0].free_port.remote(address), timeout=PATIENCE_S)
            meet = f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"
            asked = [
                host.all_reduce.remote(seen.backend, rank, len(hosts), meet, seen.bytes, PATIENCE_S)
                for rank, host in enumerate(hosts)
            ]
            seconds = ray.get(asked, timeout=3 * PATIENCE_S)
        except RayError as error:
            return seen.model_copy(update={"error": _reason(error)})
        return seen.model_copy(update={"seconds": max(seconds)})

    def dashboard(self) -> str | None:
        """Address of the cluster's dashboard, which also takes jobs; None when there is none."""
        return get_dashboard_url() or None

    def _send(self, name: str, gpus: int) -> Any:
        place = NodeAffinitySchedulingStrategy(self._ids[name], soft=False)
        # no CPU is reserved: a cluster that is busy can be asked too
        actor = ray.remote(probe.Witness).options(num_cpus=0, num_gpus=gpus, scheduling_strategy=place).remote()
        self._actors.append(actor)
        return actor


def bracketed(name: str, ask: Callable[[], float]) -> Clock:
    """A clock that is read between two readings of ours: at the instant half-way, give or take half of the time between."""
    readings = []
    for _ in range(ROUND_TRIPS):
        before = time.time()
        theirs = ask()
        after = time.time()
        readings.append((after - before, theirs - (before + after) / 2))
    shortest, offset = min(readings)
    return Clock(machine=name, offset_s=offset, uncertainty_s=shortest / 2)


def _gather(asked: Mapping[str, Any], patience_s: float) -> tuple[dict[str, Any], dict[str, str]]:
    """What each node answered, and why others did not."""
    ray.wait(list(asked.values()), num_returns=len(asked), timeout=patience_s)
    answers, reasons = {}, {}
    for name, reference in asked.items():
        try:
            answers[name] = ray.get(reference, timeout=0)
        except RayError as error:
            reasons[name] = _reason(error)
    return answers, reasons


def _said(answers: dict[str, Any], reasons: dict[str, str]) -> dict[str, dict[str, Any]]:
    return answers | {name: {"error": reason} for name, reason in reasons.items()}


def _reason(error: RayError) -> str:
    if isinstance(error, GetTimeoutError):
        return "no answer in time"
    return str(getattr(error, "cause", None) or error).strip().partition("\n")[0] or type(error).__name__
