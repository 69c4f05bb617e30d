"""Tunesmith's code as `--ship-code` sends it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def digest(path: Path) -> str:
    """Of the code that a process with this folder first on its path would run."""
    code = f"import sys; sys.path.insert(0, {str(path)!r})\nfrom tunesmith.cluster.jobs.versions import here, CODE\nprint(here()[CODE])"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
