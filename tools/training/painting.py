"""A pool of training pictures: scenes drawn by several processes, small as the model sees them."""

from __future__ import annotations

import multiprocessing
import os
import time
from concurrent.futures import Future, ProcessPoolExecutor

import torch
from torch import Tensor

from tools.training.architecture import resized
from tools.training.questions import zoom
from vlmfix.world.render import render
from vlmfix.world.scenes import scene

CHUNK = 100
"""Scenes of one job: the first are there soon, and no job holds up those who wait for it."""


def paint(seed: int, start: int, stop: int, side: int, device: str) -> Tensor:
    """Draw scenes and, for each, the enlarged part that `zoom` chooses.

    Args:
        seed: Seed of the scenes.
        start: First index.
        stop: One past the last index.
        side: Height and width of the pictures in pixels.
        device: Where to draw.

    Returns:
        (N, 2, 3, side, side) uint8 on the CPU: the whole scene, then its part.
    """
    found = torch.empty((stop - start, 2, 3, side, side), dtype=torch.uint8, device=device)
    for low in range(start, stop, 50):
        views = [scene(seed, index) for index in range(low, min(low + 50, stop))]
        canvas = render(views, device=device)  # (n, 3, 512, 512)
        rows = found[low - start : low - start + len(views)]
        rows[:, 0] = resized(canvas, side, side)
        for number, view in enumerate(views):
            x0, y0, x1, y1 = zoom(view)[0]
            rows[number, 1] = resized(canvas[number : number + 1, :, y0:y1, x0:x1], side, side)[0]
    return found.cpu()


class Painters:
    """A pool of pictures that is drawn while the training goes on.

    `waited` counts the seconds for which whoever asked had to wait.

    Args:
        seed: Seed of the scenes.
        count: How many scenes.
        side: Height and width of the pictures in pixels.
        device: Where they are drawn.
        processes: How many draw at a time; 0 draws here, when pictures are asked for.
        at: Where they are kept; None keeps them where they are drawn.
    """

    def __init__(self, *, seed: int, count: int, side: int, device: str, processes: int, at: str | None = None) -> None:
        self.pool = torch.empty((count, 2, 3, side, side), dtype=torch.uint8, device=at or device)
        self.drawn = 0
        self.waited = 0.0
        self.jobs = [(seed, start, min(start + CHUNK, count), side, device) for start in range(0, count, CHUNK)]
        self.executor: ProcessPoolExecutor | None = None
        self.parts: list[Future[bytes]] = []
        if processes:
            # A process that is spawned imports everything for itself, which takes many of them a minute. Where the CPU
            # draws, one process imports it all and the others are its forks; a forked process may fail to draw on CUDA.
            context = multiprocessing.get_context("forkserver" if device == "cpu" else "spawn")
            context.set_forkserver_preload([__name__])
            # who learns, and who writes texts, goes first
            self.executor = ProcessPoolExecutor(processes, mp_context=context, initializer=os.nice, initargs=(10,))
            self.parts = [self.executor.submit(_paint_bytes, *job) for job in self.jobs]

    def pictures(self, reach: int) -> Tensor:
        """Wait until the first `reach` scenes are drawn. (count, 2, 3, side, side) uint8: whole and enlarged part."""
        while self.drawn < reach:
            job, since = self.drawn // CHUNK, time.perf_counter()
            if self.executor is None:
                part = paint(*self.jobs[job])
            else:
                data = bytearray(self.parts[job].result())
                self.parts[job] = Future()  # lets go of the bytes
                self.waited += time.perf_counter() - since
                part = torch.frombuffer(data, dtype=torch.uint8).view(-1, *self.pool.shape[1:])
            self.pool[self.drawn : self.drawn + len(part)] = part
            self.drawn += len(part)
        return self.pool

    def close(self) -> None:
        """End the processes; pictures that nobody asked for are not drawn."""
        if self.executor is not None:
            self.executor.shutdown(cancel_futures=True)


def _paint_bytes(seed: int, start: int, stop: int, side: int, device: str) -> bytes:
    # plain bytes: shared-memory tensors would need as much /dev/shm as the whole pool
    torch.set_num_threads(1)
    return paint(seed, start, stop, side, device).numpy().tobytes()
