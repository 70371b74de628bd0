"""vae_dist: train variational autoencoders on images, and use them.

    import vae_dist

    vae = vae_dist.load("runs/mnist")            # a TrainedVAE
    images = vae.sample(64, seed=0)              # (64, C, H, W), float32 in [0, 1]
    mean, std = vae.encode(images)               # of q(z|x)
    again = vae.decode(mean)                     # E[x|z]
    nats = vae.neg_elbo(images)                  # (64,)

    config = vae_dist.config("config=mnist", "training.steps=500", "run=runs/short")
    vae = vae_dist.load(vae_dist.train(config))

`write_shards` writes samples as WebDataset shards for training. The commands are `python -m
vae_dist.train` and its neighbours; --help of each lists its keys. `import vae_dist` loads no torch,
and sets GOMP_SPINCOUNT, which torch reads when it is loaded: import vae_dist before torch.
"""

from __future__ import annotations

import os
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from vae_dist.config.schema import TrainConfig
    from vae_dist.data.writer import write_shards
    from vae_dist.inference.api import TrainedVAE, load

    def config(*overrides: str) -> TrainConfig: ...
    def train(config: TrainConfig) -> Path: ...


# A GNU OpenMP thread waits in a loop of 300,000 turns before it sleeps, or of 1,000 where it shares
# its cores. Where another program uses one of them, training takes 20 times as long by the former
# (benchmarks/RESULTS.md). A count or a policy that the environment has stays.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

__all__ = ["TrainedVAE", "__version__", "config", "load", "train", "write_shards"]

# Where names are found when they are first asked for. `config` and `train` are modules that can be
# called.
_MODULES = {
    "TrainedVAE": "vae_dist.inference.api",
    "load": "vae_dist.inference.api",
    "write_shards": "vae_dist.data.writer",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        try:
            return metadata.version("vae_dist")
        except metadata.PackageNotFoundError:  # a checkout that is not installed
            return "0+unknown"
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    if name in __all__:
        return import_module(f"vae_dist.{name}")
    raise AttributeError(f"module 'vae_dist' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
