"""A cache that is bounded by the bytes of what it holds."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any


class BytesCache:
    """What was used last, up to `limit` bytes by the measure `size`. Safe to use from many threads."""

    def __init__(self, limit: int, size: Callable[[Any], int]):
        self._limit, self._size = limit, size
        self._held: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = threading.Lock()
        self.bytes = 0

    def __contains__(self, key: Hashable) -> bool:
        return key in self._held

    def get(self, key: Hashable) -> Any | None:
        """What is held under a key, or None."""
        with self._lock:
            if key not in self._held:
                return None
            self._held.move_to_end(key)
            return self._held[key]

    def put(self, key: Hashable, value: Any) -> None:
        """Holds a value, and lets go of those that were not used for longest; one above the bound is not held."""
        size = self._size(value)
        with self._lock:
            if key in self._held or size > self._limit:
                return
            self._held[key] = value
            self.bytes += size
            while self.bytes > self._limit:
                _, old = self._held.popitem(last=False)
                self.bytes -= self._size(old)

    def made(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What is held under a key, made first when nothing is."""
        value = self.get(key)
        if value is None:
            value = make()
            self.put(key, value)
        return value
