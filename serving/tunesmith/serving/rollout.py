"""Which version of an alias answers whom: by weight, and the same one for the same user."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Route:
    """One version of an alias and its share.

    Attributes:
        weight: relative to the other routes' weights; above 0.
    """

    digest: str
    weight: float


def choose(routes: Sequence[Route], name: str, alias: str, key: str) -> str:
    """The digest that answers a key: always the same for the same routes.

    Weighted rendezvous hashing (Thaler and Ravishankar 1998; weights as in Schindelhauer and Schomaker 2005): each
    route draws an exponential of its weight's rate from the key's own hash, and the soonest wins. When weights
    change, a key moves only towards a route whose share has grown, and never between two others.

    Args:
        key: of the user, or of the request when there is no user.
    """
    assert routes, "an alias has at least one route"
    return min(routes, key=lambda route: _waiting(f"{name}\0{alias}\0{key}\0{route.digest}") / route.weight).digest


def sticky_key(user: str | None, request: str) -> str:
    """What a request is told apart by: its user when it names one, otherwise itself."""
    return f"user:{user}" if user else f"request:{request}"


def _waiting(text: str) -> float:
    """An exponentially distributed number of rate 1 made from a text."""
    drawn = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return -math.log((drawn + 1) / 2**64)
