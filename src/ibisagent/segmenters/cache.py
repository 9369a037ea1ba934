"""Image embeddings in memory, bounded in bytes: embedding an image is the costly part of every promptable segmenter."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol, TypeVar, cast

from ibisagent.errors import ConfigError

DEFAULT_BYTES = 512 * 2**20


class HasBytes(Protocol):
    """An array or tensor, wherever it lies."""

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        ...


Embedding = TypeVar("Embedding", bound=tuple[HasBytes, ...])


class EmbeddingCache:
    """Keeps the embeddings used last, up to `max_bytes` in total. Thread-safe.

    Keys are (segmenter, content hash of the image): the same pixels are embedded once, whatever their file is called.
    An embedding larger than the whole cache is handed out but not kept.
    """

    def __init__(self, max_bytes: int = DEFAULT_BYTES) -> None:
        if max_bytes < 0:
            raise ConfigError(f"embedding cache of {max_bytes} bytes: give 0 (keep nothing) or more")
        self.max_bytes = max_bytes
        self.nbytes = 0
        self.hits = 0
        self.misses = 0
        self._kept: OrderedDict[tuple[str, str], tuple[HasBytes, ...]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def fetch(self, segmenter: str, image_sha256: str, embed: Callable[[], Embedding]) -> Embedding:
        """The embedding of an image, from memory or else from `embed()`.

        `embed` runs outside the lock: two threads that miss the same image at once both embed it, and agree.
        """
        key = (segmenter, image_sha256)
        with self._lock:
            if key in self._kept:
                self.hits += 1
                self._kept.move_to_end(key)
                return cast(Embedding, self._kept[key])
            self.misses += 1
        embedding = embed()
        size = sum(part.nbytes for part in embedding)
        with self._lock:
            if size <= self.max_bytes and key not in self._kept:
                self._kept[key] = embedding
                self.nbytes += size
            while self.nbytes > self.max_bytes:
                _, oldest = self._kept.popitem(last=False)
                self.nbytes -= sum(part.nbytes for part in oldest)
        return embedding
