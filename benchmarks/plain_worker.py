"""What `torchrun` starts in the start-up benchmark: the same loop, from the same recipe file, without Ray."""

from __future__ import annotations

import sys
from pathlib import Path

import workload
import yaml

workload.quiet()

import torch.distributed as dist  # noqa: E402

from tunesmith.cluster.runs import RunFolder  # noqa: E402
from tunesmith.trainers.loop import train  # noqa: E402


def main() -> None:
    written = yaml.safe_load(Path(sys.argv[1]).read_text())
    dist.init_process_group("gloo")
    run = RunFolder(Path(written["output"]["dir"]) / written["name"])
    if dist.get_rank() == 0:
        run.create()
        run.begin_attempt()
    dist.barrier()
    train(workload.job(written, run.root), lambda _record: None)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
