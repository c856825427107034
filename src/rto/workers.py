"""Worker processes that end with their parent. No library that looks for devices is imported here."""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import active_children, get_context
from typing import Any

PR_SET_PDEATHSIG = 1
"""Of Linux's prctl.h."""
EVERY = 1.0
"""Seconds between two looks at the parent, where the system does not tell of its end."""


@contextmanager
def pool(devices: Sequence[str | None]) -> Iterator[ProcessPoolExecutor]:
    """A spawned process for each device that is named, with that device as its own; None is any.

    A signal that stops this process stops them at once, and none outlives it.
    """
    context = get_context("spawn")
    left = context.Queue()
    for device in devices:
        left.put(device)
    with ProcessPoolExecutor(
        len(devices), mp_context=context, initializer=begin_worker, initargs=(os.getpid(), left)
    ) as workers:
        try:
            yield workers
        except BaseException as error:
            if not isinstance(error, Exception):  # asked to stop: nobody waits for a job's end
                for worker in active_children():
                    worker.terminate()
            raise


def begin_worker(parent: int, devices: Any) -> None:
    """End with the parent, however it dies, and take a device from the queue; None is any.

    Args:
        parent: its process id.
        devices: one entry a worker.
    """
    end_with(parent)
    device = devices.get()
    if device is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")  # what the parent sees; its devices count from 0
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[int(device)].strip() if visible else device
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def end_with(parent: int) -> None:
    """Have the system kill this process when its parent ends, and look after the parent as well."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended before this
        os._exit(1)
    threading.Thread(target=_look_after, args=(parent,), daemon=True).start()


def _look_after(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(EVERY)
    os._exit(1)
