"""Pictures of a run's data: images of clients with their views, and nearest neighbours of test images."""

import functools

import jax
import numpy as np

from lwfedssl_jax.analysis import image_plots
from lwfedssl_jax.evaluation import label_free
from lwfedssl_jax.experiment.active import ActiveRun
from lwfedssl_jax.simulation.events import Note
from lwfedssl_jax.simulation.setup import Prepared
from lwfedssl_jax.tree import Tree

CLIENTS, IMAGES = 4, 4  # that are shown
TESTED, NEIGHBOURS, SEARCHED = 6, 7, 2048  # test images, neighbours of each, and training images among which they are


def draw(run: ActiveRun, params: Tree) -> None:
    """Draw both pictures; if one fails, a note says so, since the run is complete without it."""
    for draw_one in (draw_views, functools.partial(draw_neighbours, params=params)):
        try:
            draw_one(run)
        except OSError:
            raise
        except Exception as error:
            run.hear(Note(f"a picture of images cannot be drawn ({' '.join(str(error).split())})"))


def names_of_clients(run: Prepared) -> list[str]:
    """Return the names of the clients, if they are the data set's own and have names."""
    own, names = run.clients.own, run.dataset.client_names
    return [names[number] for number in own] if own is not None and names else []


def draw_views(run: ActiveRun) -> None:
    """Draw images of the first clients that have enough, with two views of each."""
    assert run.workdir
    prepared = run.prepared
    clients = [int(n) for n in np.flatnonzero(prepared.clients.sizes >= IMAGES)[:CLIENTS]]
    if not clients or not prepared.clients.is_here:
        return
    rows = np.concatenate([np.sort(prepared.clients[n][:IMAGES]) for n in clients])
    images = np.asarray(prepared.dataset.train_images[rows])
    views = label_free.views_of(images, prepared.task.recipe, run.config.runtime.seed)
    shape = len(clients), IMAGES, *images.shape[1:]
    named = names_of_clients(prepared)
    names = [named[n] if named else f"client {n}" for n in clients]
    image_plots.plot_views(
        images.reshape(shape), views.reshape(2, *shape), names, run.workdir.path / "plots" / "views.png"
    )


def draw_neighbours(run: ActiveRun, params: Tree) -> None:
    """Draw test images and the training images whose features are most similar (cosine), if there are test images."""
    assert run.workdir
    dataset, depth = run.prepared.dataset, run.config.model.depth
    searched = dataset.labelled if len(dataset.labelled) else np.arange(len(dataset.train_images))
    if not len(dataset.test_images) or len(searched) < NEIGHBOURS:
        return
    train, test = (
        rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)]
        for rows, count in ((searched, SEARCHED), (np.arange(len(dataset.test_images)), TESTED))
    )
    params = jax.device_get(params)
    train_NxD, test_NxD = (
        label_free.unit(run.encode(params, np.asarray(images[rows]), depth))
        for images, rows in ((dataset.train_images, train), (dataset.test_images, test))
    )
    nearest_NxK = train[np.argsort(-(test_NxD @ train_NxD.T), axis=1, kind="stable")[:, :NEIGHBOURS]]
    same_NxK = None
    if len(dataset.labelled):
        same_NxK = dataset.train_labels[nearest_NxK] == dataset.test_labels[test][:, None]
    neighbours = np.stack([np.asarray(dataset.train_images[rows]) for rows in nearest_NxK])
    image_plots.plot_neighbours(
        np.asarray(dataset.test_images[test]), neighbours, same_NxK, run.workdir.path / "plots" / "neighbours.png"
    )
