"""Numbers in the form in which a person reads them."""

from __future__ import annotations

import json
import math
from typing import Any

_TOKEN_UNITS = ("", "k", "M", "B", "T")


def setting(value: Any) -> str:
    """A value of a recipe: 1.2e-4, 0.05, 4,096, q_proj + v_proj, true."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return _decimal(value, 3)
    if isinstance(value, list | tuple):
        return " + ".join(map(setting, value)) or "none"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def measure(value: float | None) -> str:
    """A metric to four significant digits, all of them shown: 5.214, 0.8120; a dash where there is none."""
    if value is None:
        return "–"
    if not math.isfinite(value) or value == 0 or not 1e-3 <= abs(value) < 1e4:
        return _decimal(value, 4)
    return f"{value:#.4g}".rstrip(".")


def spread(std: float | None) -> str:
    """A standard deviation after its mean: " ± 0.021"; nothing where it is not known."""
    return "" if std is None else f" ± {_decimal(std, 2) if std < 1e-3 else f'{std:.2g}'}"


def compact(count: float) -> str:
    """A count to three digits: 812, 12.3k, 1.25M."""
    for power, unit in enumerate(_TOKEN_UNITS):
        scaled = count / 1000**power
        if scaled < 999.5:
            return f"{scaled:.3g}{unit}"
    return _decimal(float(count), 3)


def duration(seconds: float) -> str:
    """A time in its two largest units: 3.2s, 42s, 3m 20s, 1h 05m, 2d 3h."""
    if seconds < 9.95:
        return f"{seconds:.1f}".removesuffix(".0") + "s"
    whole = round(seconds)
    minutes, hours = whole // 60, whole // 3600
    if whole < 60:
        return f"{whole}s"
    if hours == 0:
        return f"{minutes}m {whole % 60:02}s".removesuffix(" 00s")
    if hours < 48:
        return f"{hours}h {minutes % 60:02}m".removesuffix(" 00m")
    return f"{hours // 24}d {hours % 24}h"


def percent(share: float) -> str:
    """A share of one: 39%, 3.9%, 0.2%."""
    return f"{100 * share:.{0 if abs(share) >= 0.0995 else 1}f}%"


def listed(parts: list[str]) -> str:
    """a, b and c."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]])) if parts else ""


def _decimal(value: float, digits: int) -> str:
    """Small and large numbers with an exponent (1.2e-4), the others without; no trailing zeros."""
    if not math.isfinite(value) or value == 0:
        return "0" if value == 0 else str(value)
    if not 0.01 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1e3 else f"{value:.{digits}g}"
