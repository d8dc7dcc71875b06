"""The recipe: every setting of a run, validated before anything is loaded, saved resolved with the run."""

from .reading import load, override
from .settings import METHOD_NAMES, CacheConfig, OptimConfig, RunConfig, TrainConfig

__all__ = [
    "METHOD_NAMES",
    "CacheConfig",
    "OptimConfig",
    "RunConfig",
    "TrainConfig",
    "load",
    "override",
]
