"""The device's part of FedCA's dictionary: embeddings of images of the clients that lanes have finished."""

import jax
import jax.numpy as jnp

from lwfedssl_jax.method.aggregation import RoundContext
from lwfedssl_jax.method.depth_dropout import PER_ROUND, routes, skipped_layers
from lwfedssl_jax.method.fedca import embed_images
from lwfedssl_jax.method.task import Broadcast
from lwfedssl_jax.simulation.packing import Schedule
from lwfedssl_jax.simulation.rounds import ALL, BY_LANE, SCHEDULE_BY_LANE, Method, Work, over_lanes, squared_distance
from lwfedssl_jax.tree import Tree


def embed_row(method: Method, trainable: Tree, broadcast: Broadcast, work: Work, context: RoundContext) -> jax.Array:
    """Embed images of the clients that lanes have finished, by the schedule's row ``work.first``.

    Args:
      method: static.
      trainable: of the clients, with a leading lane axis.
      broadcast, context: of the round.
      work: images and rows (``pack_embeddings``).

    Returns:
      Embeddings WxBxO, of which those of real images count; NaN for a client whose update is not finite.
    """

    def on_device(trainable: Tree, broadcast: Broadcast, work: Work, context: RoundContext) -> jax.Array:
        task = method.task._replace(hyper=context.hyper)
        images, row = work.images_GxNxHxWxC, jax.tree.map(lambda x: x[work.first], work.schedule)

        def in_lane(trained: Tree, row: Schedule, pool: jax.Array) -> jax.Array:
            client_key = jax.random.fold_in(context.key, row.client)
            key = jax.random.fold_in(client_key, row.step)
            skipped_L = skipped_layers(task, broadcast, client_key, key)
            mask_B = jnp.arange(row.examples.shape[-1]) < row.real
            of_client = routes(broadcast, skipped_L if task.drops_layers == PER_ROUND else None)
            z_BxO = embed_images(task, broadcast, trained, pool[row.examples], mask_B, key, of_client)
            return jnp.where(jnp.isfinite(squared_distance(trained, broadcast.trainable)), z_BxO, jnp.nan)

        if len(images) == 1:
            return over_lanes(lambda trained, row: in_lane(trained, row, images[0]), task.vmap_on_cpu, trainable, row)
        return over_lanes(in_lane, task.vmap_on_cpu, trainable, row, images)

    pool = ALL if len(work.images_GxNxHxWxC) == 1 else BY_LANE
    return jax.shard_map(
        on_device,
        mesh=method.mesh,
        in_specs=(BY_LANE, ALL, Work._make((pool, SCHEDULE_BY_LANE, ALL, ALL)), ALL),
        out_specs=BY_LANE,
        check_vma=False,
    )(trainable, broadcast, work, context)
