"""Figures that show images: of clients with their random views, and of the encoder's nearest neighbours."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lwfedssl_jax.analysis.style import new_figure, save_figure

GAP, FRAME = 3, 3  # pixels between images, and of a frame
PIXELS = 64  # height and width of an image in a figure
SAME, OTHER, WHITE = (0, 158, 115), (213, 94, 0), (255, 255, 255)  # Okabe and Ito's green and vermilion


def plot_views(images_KxNxHxWxC: np.ndarray, views_2xKxNxHxWxC: np.ndarray, clients: Sequence[str], path: Path) -> None:
    """Draw ``views.png``: some images of some clients, each followed by its two views; a row for each client.

    Args:
      images_KxNxHxWxC: uint8, N images of each of K clients.
      views_2xKxNxHxWxC: uint8, their two views.
      clients: their names.
      path: of the picture.
    """
    triples_KxNx3xHxWxC = np.stack([images_KxNxHxWxC, *views_2xKxNxHxWxC], 2)
    rows = [[_tile(image, WHITE) for image in np.concatenate(triples)] for triples in triples_KxNx3xHxWxC]
    _draw(rows, "Images of some clients, each followed by two random views", clients, path)


def plot_neighbours(
    test_NxHxWxC: np.ndarray, neighbours_NxKxHxWxC: np.ndarray, same_NxK: np.ndarray | None, path: Path
) -> None:
    """Draw ``neighbours.png``: test images, each followed by the training images whose features are most similar.

    Args:
      test_NxHxWxC, neighbours_NxKxHxWxC: uint8; the nearest comes first.
      same_NxK: whether a neighbour has the class of the test image, which its frame shows; None without labels.
      path: of the picture.
    """
    colours = np.full((*neighbours_NxKxHxWxC.shape[:2], 3), WHITE)
    if same_NxK is not None:
        colours = np.where(same_NxK[..., None], SAME, OTHER)
    rows = [
        [_tile(image, WHITE), *(_tile(x, tuple(colour)) for x, colour in zip(near, row_colours, strict=True))]
        for image, near, row_colours in zip(test_NxHxWxC, neighbours_NxKxHxWxC, colours, strict=True)
    ]
    legend = "" if same_NxK is None else "\n(green frame: of the same class, orange: of another)"
    _draw(rows, f"Test images (left) and their nearest training images{legend}", [], path)


def _tile(image_HxWxC: np.ndarray, colour: tuple[int, ...]) -> np.ndarray:
    """An image in RGB, enlarged by whole pixels, in a frame and a gap."""
    times = max(1, PIXELS // image_HxWxC.shape[0])
    large = np.repeat(np.repeat(image_HxWxC, times, 0), times, 1)
    large = np.broadcast_to(large, (*large.shape[:2], 3))
    framed = np.empty((large.shape[0] + 2 * FRAME, large.shape[1] + 2 * FRAME, 3), np.uint8)
    framed[:] = colour
    framed[FRAME:-FRAME, FRAME:-FRAME] = large
    return np.pad(framed, [(GAP, GAP), (GAP, GAP), (0, 0)], constant_values=255)


def _draw(rows: Sequence[Sequence[np.ndarray]], title: str, names: Sequence[str], path: Path) -> None:
    """Draw rows of tiles as one picture, with a name beside each row."""
    picture = np.concatenate([np.concatenate(row, 1) for row in rows])
    figure, axes = new_figure(title)
    figure.set_size_inches(8, 0.8 + 8 * picture.shape[0] / picture.shape[1])
    axes.imshow(picture, interpolation="nearest")
    height = picture.shape[0] / len(rows)
    axes.set_yticks([height * (row + 0.5) for row in range(len(names))], names)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    save_figure(figure, path)
