"""FLOPs spent, by what they were spent on."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import ConfigError

LEDGER_CATEGORIES = ("train", "score", "probe", "eval")


class FlopsLedger:
    """FLOPs spent, by what they were spent on, so that what a method saves is never stated gross.

    Args:
        spent: FLOPs by category to start from (a resumed run), as `to_dict` gave them.

    Raises:
        ConfigError: an unknown category, or a negative amount.
    """

    def __init__(self, spent: Mapping[str, float] | None = None):
        self._spent = dict.fromkeys(LEDGER_CATEGORIES, 0.0)
        for category, flops in (spent or {}).items():
            if category != "total":
                self.add(category, flops)

    def add(self, category: str, flops: float) -> None:
        """Book `flops` under `train`, `score`, `probe` or `eval`."""
        if category not in self._spent:
            raise ConfigError(f"category={category!r} is unknown; choose one of {', '.join(LEDGER_CATEGORIES)}")
        if not flops >= 0:
            raise ConfigError(f"flops={flops!r} for {category!r} must be at least 0")
        self._spent[category] += float(flops)

    def __getitem__(self, category: str) -> float:
        return self._spent[category]

    @property
    def total(self) -> float:
        """FLOPs of all categories."""
        return sum(self._spent.values())

    def to_dict(self) -> dict[str, float]:
        """Every category and `total`."""
        return {**self._spent, "total": self.total}
