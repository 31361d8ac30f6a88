"""The layers that a device has, by their hash: frozen layers are sent to it once."""

import contextlib
import hashlib
import os
import re
from pathlib import Path

from lwfedssl_jax.system.files import is_leftover, write_whole

LIMIT = 2**30
DIGEST = re.compile(r"[0-9a-f]{64}")


class LayerCache:
    """Layers in a folder, each in a file that is named by its SHA-256.

    What is damaged counts as missing, and is sent again. Beyond the limit, those are removed that were not used for
    the longest time.

    Args:
      folder: made if it does not exist.
      limit: bytes of all files together.
    """

    def __init__(self, folder: Path, limit: int = LIMIT) -> None:
        self._folder, self._limit = folder, limit
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in filter(is_leftover, folder.iterdir()):  # of a process that was killed
            leftover.unlink(missing_ok=True)

    def get(self, digest: str) -> bytes | None:
        """Return a layer, or None if it is not there or damaged."""
        if not DIGEST.fullmatch(digest):
            return None  # it is part of a path, and may come from anywhere
        path = self._folder / digest
        try:
            content = path.read_bytes()
        except OSError:
            return None
        if hashlib.sha256(content).hexdigest() != digest:
            path.unlink(missing_ok=True)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return content

    def put(self, digest: str, content: bytes) -> None:
        """Keep a layer, unless the folder cannot be written or the content has another hash."""
        if hashlib.sha256(content).hexdigest() != digest:
            return
        with contextlib.suppress(OSError):  # also if the folder, or a file, is removed meanwhile
            self._folder.mkdir(parents=True, exist_ok=True)
            write_whole(self._folder / digest, content)
            sizes = {path: path.stat() for path in self._files()}
            size = sum(stat.st_size for stat in sizes.values())
            for path in sorted(sizes, key=lambda path: sizes[path].st_mtime):
                if size > self._limit and path.name != digest:
                    size -= sizes[path].st_size
                    path.unlink(missing_ok=True)

    def digests(self) -> list[str]:
        """Return the hashes of the layers, in order; whether they are intact is not known."""
        return sorted(path.name for path in self._files())

    def _files(self) -> list[Path]:
        if not self._folder.is_dir():
            return []
        return [path for path in self._folder.iterdir() if DIGEST.fullmatch(path.name) and path.is_file()]
