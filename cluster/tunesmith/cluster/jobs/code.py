"""`--ship-code`: the submitter's own Tunesmith goes with the job and takes the place of the cluster's."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from tunesmith.cluster.jobs.versions import PORTIONS


def gather(folder: Path) -> Path:
    """Copies this process's Tunesmith into a folder, as one package that Ray's `py_modules` takes.

    Not a wheel: Ray installs one together with all that it depends on, torch included, for every job.
    """
    package = folder / "tunesmith"
    for portion in PORTIONS:
        spec = importlib.util.find_spec(f"tunesmith.{portion}")
        folders = (spec and spec.submodule_search_locations) or []
        assert folders, f"there is no tunesmith.{portion}"
        shutil.copytree(folders[0], package / portion, ignore=shutil.ignore_patterns("__pycache__"))
    return package
