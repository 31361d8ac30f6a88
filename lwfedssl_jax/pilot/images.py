"""The images of a device: a folder of its own, which it never sends."""

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from lwfedssl_jax.config import ConfigError
from lwfedssl_jax.data.cache import fit
from lwfedssl_jax.data.folders import SUFFIXES
from lwfedssl_jax.system.errors import first_of


class DeviceImages:
    """Images in a folder and the folders in it, in the order of their paths, except for hidden ones.

    Args:
      folder: which has at least one.

    Raises:
      ConfigError: it is not a folder, cannot be read, or has no images.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        accepted = f"a folder with images ({', '.join(SUFFIXES)})"
        if not folder.is_dir():
            raise ConfigError(f"--data: {folder} is not a folder; accepted: {accepted}")
        try:
            found = [path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()]
            self.files = sorted(path for path in found if not _is_hidden(path.relative_to(folder)))
            entries = [f"{path.relative_to(folder).as_posix()} {path.stat().st_size}" for path in self.files]
        except OSError as error:
            raise ConfigError(f"--data: {folder} cannot be read ({error}); accepted: {accepted}") from error
        if not self.files:
            raise ConfigError(f"--data: {folder} has no images; accepted: {accepted}")
        self.digest = hashlib.sha256("\n".join(entries).encode(errors="surrogateescape")).hexdigest()

    def check(self) -> None:
        """Refuse images that cannot be read, without decoding them.

        Raises:
          ConfigError: naming one of them.
        """
        unreadable = []
        for path in self.files:
            try:
                with Image.open(path) as image:
                    image.verify()
            except Exception as error:  # Pillow raises many kinds
                unreadable.append(f"{path} ({error})")
        self._refuse(unreadable)

    def _refuse(self, unreadable: Sequence[str]) -> None:
        if unreadable:
            raise ConfigError(
                f"--data: {len(unreadable)} of {len(self.files)} images cannot be read: {first_of(unreadable)}; "
                "accepted: images that Pillow reads, 8 bits per channel"
            )

    @functools.lru_cache(maxsize=1)  # noqa: B019  (the images of one run)
    def load(self, size: int, channels: int) -> np.ndarray:
        """Return all images, uint8 NxHxWxC, as ``folder:`` reads them.

        Raises:
          ConfigError: some cannot be read.
        """
        images = np.empty((len(self.files), size, size, channels), np.uint8)
        unreadable = []
        for i, path in enumerate(self.files):
            try:
                with Image.open(path) as image:
                    images[i] = fit(image, size, channels)
            except Exception as error:  # Pillow raises many kinds
                unreadable.append(f"{path} ({error})")
        self._refuse(unreadable)
        return images


def write_images(folder: Path, images_NxHxWxC: np.ndarray, own: Sequence[int]) -> None:
    """Write some images as PNG files whose order is that of ``own``.

    Raises:
      ConfigError: they have neither 1 nor 3 channels.
    """
    if (channels := images_NxHxWxC.shape[-1]) not in (1, 3):
        raise ConfigError(f"data.name: its images have {channels} channels; accepted: 1 or 3 for a pilot")
    folder.mkdir(parents=True, exist_ok=True)
    for number, i in enumerate(own):
        image = images_NxHxWxC[i]
        Image.fromarray(image[..., 0] if channels == 1 else image).save(folder / f"{number:06}.png")


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
