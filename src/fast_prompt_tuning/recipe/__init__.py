"""The recipe: every setting of a run, validated before anything is loaded, saved resolved with the run."""

from .reading import load, override, settings_of
from .settings import CacheConfig, OptimConfig, RunConfig, TrainConfig

__all__ = [
    "CacheConfig",
    "OptimConfig",
    "RunConfig",
    "TrainConfig",
    "load",
    "override",
    "settings_of",
]
