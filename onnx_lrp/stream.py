"""What streams of batches are made of: work done ahead in a thread, and small batches gathered to large ones."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from queue import SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")


class _End(Generic[T]):
    """The last thing that a thread hands over: what ended it, None at the end of its source."""

    def __init__(self, error: BaseException | None):
        self.error = error


def ahead(items: Iterable[T], count: int) -> Generator[T, None, None]:
    """The same items in the same order, up to `count` of them taken from their source in advance, by a thread.

    An error of the source is raised where its item would have come. Closing the iterator ends the thread: it takes no
    further item, and one that it is waiting for is waited for.

    Args:
        items: the source; nobody else may take from it meanwhile.
        count: at least 1; the item in use is not counted.
    """
    free, stopped = threading.Semaphore(count), threading.Event()
    ready: SimpleQueue[T | _End[T]] = SimpleQueue()
    # The thread must not know this generator, lest nothing ever closes one that was dropped.
    thread = threading.Thread(
        target=_take, args=(iter(items), free, stopped, ready), name="onnx_lrp stream", daemon=True
    )
    thread.start()
    try:
        while not isinstance(item := ready.get(), _End):
            free.release()
            yield item
            del item  # while the next is waited for, this one may go
        if item.error is not None:
            raise item.error
    finally:
        stopped.set()
        free.release()
        thread.join()


def _take(
    source: Iterator[T], free: threading.Semaphore, stopped: threading.Event, ready: SimpleQueue[T | _End[T]]
) -> None:
    """Take items while there is room for them."""
    error: BaseException | None = None
    try:
        while free.acquire() and not stopped.is_set():
            try:
                ready.put(next(source))
            except StopIteration:
                break
    except BaseException as failed:  # also an interrupt belongs to whoever takes the items
        error = failed
    ready.put(_End(error))


def gathered(
    items: Iterable[T], size: Callable[[T], int], limit: int, joins: Callable[[T, T], bool]
) -> Generator[list[T], None, None]:
    """Neighbours that can run together, as many as stay within a limit; an item above it stands alone.

    An error of the source is raised after what was gathered before it.

    Args:
        items: in order.
        size: samples of an item.
        limit: samples of all that run together.
        joins: whether two items can.
    """
    group: list[T] = []
    count, failed = 0, None
    try:
        for item in items:
            if group and (count + size(item) > limit or not joins(group[0], item)):
                yield group
                group, count = [], 0
            group.append(item)
            count += size(item)
            if count >= limit:
                yield group
                group, count = [], 0
    except Exception as error:
        failed = error
    if group:
        yield group
    if failed is not None:
        raise failed
