"""Config: the schema of every knob, loading it from YAML and the command line, and its checks."""

from __future__ import annotations

import sys
import types

from vae_dist.config.schema import TrainConfig


class _Callable(types.ModuleType):
    def __call__(self, *overrides: str) -> TrainConfig:
        """A checked training config from the `key=value` strings that the command line takes.

        Raises ConfigError, which lists every key that is wrong, with the nearest name.

        Example:
            >>> config = vae_dist.config("config=mnist", "training.steps=100", "run=runs/short")
        """
        from vae_dist.config.load import load_train_config

        return load_train_config(list(overrides))


sys.modules[__name__].__class__ = _Callable
