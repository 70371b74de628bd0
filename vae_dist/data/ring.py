"""Memory in which the loader processes of a rank decode, and out of which the trainer reads.

A `Ring` holds a few rooms, each for the images of one step. All workers of a rank write into one
room, each its own lanes, so that a step lies in one piece when the last of them is done: nothing is
pickled, mapped anew or put together. The trainer gets the room itself, as a tensor, and the room
goes round once that tensor is gone. Whoever keeps more tensors than `MAX_LENT` gets copies, so that
the workers never run out of rooms.

The memory is anonymous and comes to the workers by fork: it takes nothing from /dev/shm, which is
small in containers. Where processes are not forked there is no ring (`can_share`).
"""

from __future__ import annotations

import math
import mmap
import multiprocessing
import weakref
from collections import deque
from typing import Any

import numpy as np
import torch

# libjpeg-turbo writes rows that begin at a multiple of 32 bytes past the caches, which costs 6% of
# its time, and the reading that follows.
BEHIND_BYTES = 16
MAX_LENT = 3  # rooms that the trainer holds: this step's, the one before it, the one on its way
NUM_AHEAD = 3  # rooms that the workers fill meanwhile
NO_ROOM = -1


def can_share() -> bool:
    return multiprocessing.get_start_method() == "fork"


class Ring:
    """Rooms of one shape (b, H, W, C), for `num_workers` processes that are forked after this."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any], *, num_workers: int) -> None:
        self._shape, self._dtype = shape, dtype
        num_bytes = math.prod(shape) * dtype.itemsize
        count = MAX_LENT + NUM_AHEAD
        self._memory = [mmap.mmap(-1, num_bytes + BEHIND_BYTES) for _ in range(count)]
        self._queues: list[Any] = [multiprocessing.SimpleQueue() for _ in range(num_workers)]
        self._offered: deque[int] = deque()
        # written by whatever thread drops a tensor, and in the middle of anything: only appended to
        self._returned: deque[int] = deque()
        self._num_lent = 0
        for number in range(count):
            self._offer(number)

    def next_room(self, worker: int) -> np.ndarray | None:
        """In a worker: the room (b, H, W, C) of its next step; waits for it. None: it is over."""
        number = self._queues[worker].get()
        return None if number == NO_ROOM else self._room(number)

    def lend(self, *, pin: bool = False) -> torch.Tensor:
        """In the trainer, once all workers have filled it: the next step's images (b, H, W, C).

        pin: as a copy in pinned memory.
        """
        number = self._offered.popleft()
        room = self._room(number)
        if pin or self._num_lent >= MAX_LENT:
            copy = empty_pixels(self._shape, torch.from_numpy(room).dtype, pin=pin)
            copy.copy_(torch.from_numpy(room))
            self._offer(number)
            return copy
        self._num_lent += 1
        weakref.finalize(room, self._returned.append, number).atexit = False
        return torch.from_numpy(room)  # which keeps `room`, as do all its views

    def take_back(self) -> None:
        """In the trainer: give the workers the rooms whose tensors are gone."""
        while self._returned:
            self._num_lent -= 1
            self._offer(self._returned.popleft())

    def close(self) -> None:
        """Wake the workers that wait for a room, so that they end."""
        for queue in self._queues:
            queue.put(NO_ROOM)

    def _offer(self, number: int) -> None:
        self._offered.append(number)
        for queue in self._queues:
            queue.put(number)

    def _room(self, number: int) -> np.ndarray:
        count = math.prod(self._shape)
        flat = np.frombuffer(self._memory[number], self._dtype, count, BEHIND_BYTES)
        return flat.reshape(self._shape)


def empty_pixels(
    shape: tuple[int, ...], dtype: torch.dtype, *, pin: bool = False, shared: bool = False
) -> torch.Tensor:
    """Room for images (b, H, W, C).

    Decoders write pixel by pixel, so an image is copied in one piece, wherever it goes on its way
    to the device. shared: in memory that another process maps instead of copying it.
    """
    count, behind = math.prod(shape), BEHIND_BYTES // dtype.itemsize
    if shared:
        storage = torch.UntypedStorage._new_shared((count + behind) * dtype.itemsize)
        room = torch.empty(0, dtype=dtype).set_(storage)
    else:
        room = torch.empty(count + behind, dtype=dtype, pin_memory=pin)
    return room[behind:].view(shape)
