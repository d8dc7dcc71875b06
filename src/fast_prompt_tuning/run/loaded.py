"""A recipe's PLM, whole on each process or in parts over all of them."""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError
from ..plm.loading import load_plm
from ..recipe import RunConfig
from ..train import parallel


def loaded(config: RunConfig, dtype: str) -> Any:
    """The PLM of a recipe; with several processes each of them calls this, and gets its own or its part.

    Raises:
        ConfigError: what the recipe asks for needs whole weights. ModelError: as `load_plm`.
    """
    device = parallel.start(config.model.device, config.train.parallel)
    way = parallel.in_parts()
    if way:
        _check_parts(config, way)
    wanted: dict[str, Any] = {
        "device": device,
        "revision": config.model.revision,
        "split": (way, parallel.size()) if way else None,
    }
    plm = load_plm(config.model.path, dtype=dtype, **wanted)
    if len(set(parallel.gather(str(plm.dtype)))) > 1:  # the processes' probes differ: all take the exact one
        plm = load_plm(config.model.path, dtype="float32", **wanted)
    return plm


def _check_parts(config: RunConfig, way: str) -> None:
    """Raise ConfigError where a setting does not go with weights in parts."""
    refused = {
        "method=full": (config.method == "full", "all weights would be trained; tune a prompt"),
        "train.compile=True": (config.train.compile, "leave it out"),
        "cache.tier=disk": (
            way == "tensor" and config.cache.tier == "disk",
            "processes must miss the same texts; use cache.tier=memory",
        ),
    }
    for setting, (given, fix) in refused.items():
        if given:
            raise ConfigError(f"{setting} does not go with train.parallel={way}: {fix}")
