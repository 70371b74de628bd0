"""Tar shards in, batches of images out: index, order, streams, the writer and the digits.

A name is imported when it is asked for: the order and the index do without torch.
"""

from importlib import import_module
from typing import Any

_MODULES = {
    "Batch": "loader",
    "EvaluationBatch": "loader",
    "EvaluationStream": "loader",
    "ImageSettings": "transforms",
    "Order": "order",
    "ShardError": "tar",
    "ShardIndex": "index",
    "TrainingStream": "loader",
    "image_settings": "settings",
    "load_index": "index",
    "make_digits": "digits",
    "write_shards": "writer",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
