"""Ends a worker by SIGKILL between two micro-batches of one step. Python runs this file by itself from `PYTHONPATH`.

`KILL_AFTER_BACKWARD=<rank>:<count>:<marker>` kills that rank right after its count-th backward pass; the marker file
says that it was done, so that it happens once.
"""

import importlib.util
import os
import signal
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

ENGINE = "deepspeed.runtime.engine"


class KillAfterBackward:
    """Finds DeepSpeed's engine as Python would, and counts the backward passes of what it finds."""

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != ENGINE:
            return None
        sys.meta_path.remove(cls)
        spec = importlib.util.find_spec(name)
        assert spec is not None, f"{name} is not installed"
        assert spec.loader is not None, f"{name} has no code"
        run_module = spec.loader.exec_module

        def run_and_watch(module: ModuleType) -> None:
            run_module(module)
            watch(module.DeepSpeedEngine)

        spec.loader.exec_module = run_and_watch
        return spec


def watch(engine: type) -> None:
    rank, count, marker = os.environ["KILL_AFTER_BACKWARD"].split(":", 2)
    backward, passes = engine.backward, 0

    def counted(*inputs: object, **options: object) -> object:
        nonlocal passes
        result = backward(*inputs, **options)
        passes += 1
        if os.environ["RANK"] == rank and passes == int(count) and not Path(marker).exists():
            Path(marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    engine.backward = counted


if "KILL_AFTER_BACKWARD" in os.environ:
    sys.meta_path.insert(0, KillAfterBackward)
