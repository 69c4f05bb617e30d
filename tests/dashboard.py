"""A dashboard that answers as Ray's does, for what its jobs API says: the jobs, the nodes, and what it is asked to do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

from tunesmith.cluster.jobs.spec import METADATA_KEY, JobSpec

HEAD = "h1"
"""Id of the one node that lives."""


class Answers(BaseHTTPRequestHandler):
    """A cluster that takes no jobs: it answers a submission with what `refusal` says."""

    refusal = (400, "runtime_env: no such package")
    hostname: str | None = "here"
    """Of the head; None while all that is known of it was read from what a head before it has left."""
    jobs: list[dict[str, Any]] = []  # noqa: RUF012 - replaced by whoever has some
    """As Ray shows them."""

    def do_GET(self) -> None:
        head = {"nodeId": HEAD, "state": "ALIVE", "isHeadNode": True, "startTimeMs": "1795330048495"}
        nodes = {"data": {"summary": [{"raylet": head, "hostname": self.hostname}]}}
        known = {"/api/version": {"ray_version": "2.60.0"}, "/api/jobs/": self.jobs}
        known |= {f"/api/jobs/{one['submission_id']}": one for one in self.jobs}
        self._say(200, json.dumps(known.get(self.path, nodes)))

    def do_POST(self) -> None:
        if self.path.endswith("/stop"):
            self._say(200, json.dumps({"stopped": True}))
        else:
            self._say(*self.refusal)

    def _say(self, status: int, text: str) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None: ...


@contextmanager
def answering_dashboard() -> Iterator[str]:
    """Its HOST:PORT, for the length of the block."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def running(spec: JobSpec, variables: dict[str, str] | None = None, node: str = HEAD) -> dict[str, Any]:
    """A job at work, as Ray shows it."""
    return {
        "type": "SUBMISSION",
        "submission_id": spec.record.id,
        "status": "RUNNING",
        "entrypoint": "driver",
        "metadata": {METADATA_KEY: spec.model_dump_json()},
        "runtime_env": {"env_vars": variables or {}},
        "driver_node_id": node,
    }
