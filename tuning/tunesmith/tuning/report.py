"""Placeholder until the report lands."""

from __future__ import annotations

import json
from typing import Any


def render(results: dict[str, Any]) -> str:
    """A page."""
    return f"<pre>{json.dumps(results, indent=1)}</pre>"
