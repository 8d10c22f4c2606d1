"""An ordered map over threads with a bounded number of results ahead of the consumer."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor


def map_ahead(pool: Executor, function: Callable, items: Iterable, ahead: int) -> Iterator:
    """Yields function(item) for each item in order, computed in `pool` at most `ahead` items ahead of the consumer."""
    pending: deque = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
