"""A batch on its way to the device, beside the computation of the step before.

In: groups in pinned memory. Out: the same on the device. The host runs ahead of a CUDA device: when
batch k + 1 is handed over, step k is still being computed there. So its copy goes on a stream of
its own, which the copy engine serves meanwhile, and the computing stream waits for it on the
device; the host waits for nothing. Pinned memory is not given out again before the copy is done:
torch's caching allocator of pinned memory sees to that. Elsewhere batches stay where they are.
"""

from __future__ import annotations

import torch

from vae_dist.data.stream import Batch, Group


class Transfer:
    """Callable: `batch -> batch`, whose tensors may be used on the current stream at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Batch) -> Batch:
        if self._stream is None:
            return batch
        with torch.cuda.stream(self._stream):
            groups = tuple(self._moved(group) for group in batch.groups)
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._stream)
        for group in groups:
            for tensor in (group.images, group.masks):
                if tensor is not None:
                    # its memory belongs to the copying stream and is used on the other one
                    tensor.record_stream(computing)
        return batch._replace(groups=groups)

    def _moved(self, group: Group) -> Group:
        """Labels stay: some of them may be hidden, by draws on the host."""
        images = group.images.to(self._device, non_blocking=True)
        masks = group.masks
        if masks is not None:
            masks = masks.to(self._device, non_blocking=True)
        return group._replace(images=images, masks=masks)
