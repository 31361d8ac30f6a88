"""An objective, a term of the loss, a strategy and an aggregator of your own: one entry in a dictionary each."""

import jax
import jax.numpy as jnp

from lwfedssl_jax.method.aggregation import AGGREGATORS, WEIGHTED_MEAN
from lwfedssl_jax.method.objectives import OBJECTIVES, Objective
from lwfedssl_jax.method.stages import STRATEGIES
from lwfedssl_jax.method.terms import TERMS


def barlow_twins(online_2xBxD, target_2xBxD, mask_B, temperature):
    """From the embeddings of both views, 2xBxD; mask_B is False for the padding of a short batch."""
    mask = mask_B[None, :, None]
    mean = online_2xBxD.mean(1, keepdims=True, where=mask)
    variance = online_2xBxD.var(1, keepdims=True, where=mask)
    z = jnp.where(mask, (online_2xBxD - mean) * jax.lax.rsqrt(variance + 1e-5), 0)
    c_DxD = z[0].T @ z[1] / mask_B.sum().astype(z.dtype)
    on_diagonal = jnp.eye(len(c_DxD), dtype=bool)
    return jnp.where(on_diagonal, (1 - c_DxD) ** 2, 0.005 * c_DxD**2).sum()


OBJECTIVES["barlow_twins"] = Objective(barlow_twins, has_target=False, has_prediction=False, paper_views=2)

# A term sees the fields of Local: see the API reference.
TERMS["small_weights"] = lambda local: sum(jnp.square(w).sum() for w in jax.tree.leaves(local.weights))

# For each stage: how many layers are frozen, and how many exist. Freezing, traffic and ledger follow.
STRATEGIES["newest_two"] = lambda layers, k: [(max(d - k, 0), min(d + k, layers)) for d in range(0, layers, k)]


def half_way(context, state, broadcast, mean, summed):
    """After a round: from the weighted mean of the clients to the new global parameters, and what was measured."""
    return state, jax.tree.map(lambda old, new: (old + new) / 2, broadcast.trainable, mean), {}


AGGREGATORS["half_way"] = lambda config: WEIGHTED_MEAN._replace(finish=half_way)
