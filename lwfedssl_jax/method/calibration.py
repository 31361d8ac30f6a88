"""Server-side calibration: after averaging, the server trains L1..Ls end to end on its own unlabelled images.

See arXiv 2401.11647 v3. Layers that were trained one by one learn to work together. Since all of them
change, clients download all of them in every round (traffic.py).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from lwfedssl_jax import tree
from lwfedssl_jax.config import Config, ConfigError
from lwfedssl_jax.method.client import client_init, client_step
from lwfedssl_jax.method.stages import Stage, freeze
from lwfedssl_jax.method.task import Broadcast, ClientState, Hyper, Task
from lwfedssl_jax.system import seeds
from lwfedssl_jax.tree import Tree


def check_calibration(config: Config) -> None:
    """Refuse calibration without images to calibrate on.

    Raises:
      ConfigError: ``additions.calibration_steps`` without ``partition.server_share``.
    """
    if config.additions.calibration_steps and not config.partition.server_share:
        raise ConfigError(
            f"additions.calibration_steps: {config.additions.calibration_steps} steps need images that the server "
            "holds, and partition.server_share is 0.0; accepted: 0, or a partition.server_share above 0"
        )


def all_trainable(stage: Stage, layers: Tree) -> Stage:
    """Make a stage in which all existing layers are trainable, in one shape for as many stages as can share a program.

    Args:
      stage: any.
      layers: each parameter's layer number (``client.param_layers``).
    """
    frozen, trainable = freeze(layers, 0, stage.depth)
    length = max(len(n) if n.ndim else 1 for n in jax.tree.leaves(layers))
    rows = tree.rows(trainable, length)
    return stage._replace(frozen_depth=0, trained_before=0, trainable=trainable, frozen=frozen, rows=rows)


class ServerWork(NamedTuple):
    """What the server trains on.

    Attributes:
      hyper: in place of the task's.
      params: of all layers.
      rows: where those to be trained are (``all_trainable``).
      depth: how many layers exist.
      images_NxHxWxC: uint8.
      key: of this training.
    """

    hyper: Hyper
    params: Tree
    rows: Tree
    depth: ArrayLike
    images_NxHxWxC: ArrayLike
    key: jax.Array


def calibrate(task: Task, batch_size: int, steps: int, work: ServerWork) -> tuple[Tree, jax.Array]:
    """Train ``steps`` local steps of the objective, without additions, with a fresh optimizer and target branch.

    Args:
      task: static.
      batch_size, steps: static; a batch is drawn from all images without replacement, at most all of them.
      work: model and images.

    Returns:
      The parameters and the mean loss.
    """
    params, rows, images = work.params, work.rows, jnp.asarray(work.images_NxHxWxC)
    task = task._replace(terms=(), drops_layers="", hyper=work.hyper._replace(weights=()))
    none = jnp.int32(0)
    nothing = jax.tree.map(lambda _: None, params)
    depth = jnp.asarray(work.depth)
    broadcast = Broadcast(tree.take(params, rows), tree.present(params, rows), nothing, depth, none, none)
    batch = min(batch_size, len(images))

    def step(state: ClientState, i: jax.Array) -> tuple[ClientState, jax.Array]:
        step_key = jax.random.fold_in(work.key, i)
        images_key = jax.random.fold_in(step_key, seeds.ServerTag.IMAGES)
        drawn = jax.random.choice(images_key, len(images), (batch,), replace=False)
        every, client_key = jnp.ones(batch, bool), jax.random.fold_in(step_key, seeds.ServerTag.CLIENT_STEP)
        return client_step(task, state, broadcast, images[drawn], every, client_key)

    state, loss = jax.lax.scan(step, client_init(task, broadcast.trainable), jnp.arange(steps))
    return tree.put(params, rows, state.trainable), loss.mean()
