"""Costs and sizes as people read them."""

from __future__ import annotations

_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))


def human_flops(flops: float) -> str:
    """FLOPs with a metric prefix: `1.23 TFLOPs`."""
    flops = float(f"{flops:.3g}")  # first, so that 999.9 G is 1 T
    for limit, prefix in _PREFIXES:
        if flops >= limit:
            scaled = flops / limit
            return f"{scaled:.0f} {prefix}FLOPs" if scaled >= 1000 else f"{scaled:.3g} {prefix}FLOPs"
    return f"{flops:.0f} FLOPs"


def flops_unit(flops: float) -> tuple[float, str]:
    """One unit for a whole column: the largest of which `flops`, its largest number, is at least one."""
    return next((unit for unit in _PREFIXES if flops >= unit[0]), (1.0, ""))


def human_seconds(seconds: float) -> str:
    """`43 s`, `2 min 05 s`, `1 h 02 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
