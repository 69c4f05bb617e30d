"""What `torchrun` starts in the start-up benchmark: the same loop, from the same recipe file, without Ray."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"

import torch.distributed as dist

from tunesmith.cluster.recipe.load import load_recipe
from tunesmith.cluster.runs import RunFolder
from tunesmith.trainers.loop import TrainJob, train
from tunesmith.trainers.models import resolve_base

READ_HERE = ["name", "model.base", "model.revision", "output.dir", "cluster.address", "cluster.workers"]


def main() -> None:
    recipe = load_recipe(Path(sys.argv[1]), [])
    dist.init_process_group("gloo")
    output = Path(recipe.output.dir)
    run = RunFolder(output / recipe.name)
    if dist.get_rank() == 0:
        run.create()
        run.begin_attempt()
    dist.barrier()
    base = resolve_base(recipe.model.base, recipe.model.revision, output)
    written = recipe.model_dump(mode="json", exclude_unset=True)
    train(
        TrainJob(written, READ_HERE, run.root, output / ".cache" / "data", base, run.current_attempt()), lambda _: None
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
