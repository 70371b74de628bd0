"""Tar shards in, batches of images out: index, order, streams, the writer and the digits.

A name is imported when it is asked for: the order and the index do without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vae_dist.data.digits import load_digits, make_digits
    from vae_dist.data.evaluation import EvaluationBatch, EvaluationStream
    from vae_dist.data.index import ShardError, ShardIndex, load_index
    from vae_dist.data.loader import Batch, Group, TrainingStream
    from vae_dist.data.order import Order
    from vae_dist.data.reader import SkippedSample
    from vae_dist.data.settings import image_settings
    from vae_dist.data.transforms import ImageSettings
    from vae_dist.data.writer import write_shards

__all__ = [
    "Batch",
    "EvaluationBatch",
    "EvaluationStream",
    "Group",
    "ImageSettings",
    "Order",
    "ShardError",
    "ShardIndex",
    "SkippedSample",
    "TrainingStream",
    "image_settings",
    "load_digits",
    "load_index",
    "make_digits",
    "write_shards",
]

_MODULES = {
    "Batch": "loader",
    "EvaluationBatch": "evaluation",
    "EvaluationStream": "evaluation",
    "Group": "loader",
    "ImageSettings": "transforms",
    "Order": "order",
    "ShardError": "index",
    "ShardIndex": "index",
    "SkippedSample": "reader",
    "TrainingStream": "loader",
    "image_settings": "settings",
    "load_digits": "digits",
    "load_index": "index",
    "make_digits": "digits",
    "write_shards": "writer",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
