"""The method, naively: a Python loop over clients and steps, written for reading.

Nothing here is shared, masked, packed or padded: every client holds the whole model and a
whole target model, differentiates all of it, and then forgets the gradients of what is
frozen; batches hold real samples only. The fast round must equal it. What both use: the
modules' own ``apply`` (tested by themselves against NumPy), the views, and the hashes that order a
client's examples.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from lwfedssl_jax.config import Config
from lwfedssl_jax.data.views import two_views
from lwfedssl_jax.method.task import Task
from lwfedssl_jax.models.heads import MLP
from lwfedssl_jax.models.vit import Block, Embedding, LayerNorm
from lwfedssl_jax.system import seeds

Params = dict[str, Any]


def encode(config: Config, params: Params, images: jax.Array, layers: jax.Array) -> jax.Array:
    """``images -> features`` of the layers that are True in ``layers``."""
    types: Any = {"dtype": images.dtype, "param_dtype": images.dtype}
    x = Embedding(config.model.patch_size, config.model.width, **types).apply({"params": params["embedding"]}, images)
    for layer in range(config.model.depth):
        block = jax.tree.map(lambda p, i=layer: p[i], params["blocks"])
        x = jnp.where(layers[layer], Block(config.model.heads, **types).apply({"params": block}, x), x)
    x = LayerNorm(images.dtype).apply({"params": params["norm"]}, x)
    return x.mean(axis=1)


def head(config: Config, params: Params, layers: int, x: jax.Array) -> jax.Array:
    mlp = MLP(layers, config.objective.hidden_dim, config.objective.output_dim, x.dtype, x.dtype)
    return mlp.apply({"params": params}, x, jnp.ones(len(x), bool), mutable=["batch_stats"])[0]


def unit(z_BxO: jax.Array) -> jax.Array:
    return z_BxO / jnp.sqrt(jnp.maximum((z_BxO**2).sum(axis=1), 1e-12))[:, None]


def contrast(anchors: jax.Array, others: jax.Array, positives: jax.Array, temperature: float) -> jax.Array:
    """Mean cross-entropy of each anchor's positive among the others, of which an anchor itself is none."""
    logits = anchors @ others.T / temperature
    if anchors is others:
        logits = jnp.where(jnp.eye(len(anchors), dtype=bool), -jnp.inf, logits)
    return -nn.log_softmax(logits)[jnp.arange(len(anchors)), positives].mean()


def loss_of(
    config: Config, layers: jax.Array, online: Params, target: Params, start: Params, views: jax.Array
) -> jax.Array:
    loss = ssl_loss(config, layers, online, target, views)
    for name, weight in (text.split("=") for text in config.additions.terms):
        if name == "proximal":
            apart = jax.tree.map(lambda a, b: ((a - b) ** 2).sum(), online, start)
            loss += float(weight) / 2 * sum(jax.tree.leaves(apart))
        if name == "alignment":
            same = jnp.arange(views.shape[1])
            models = online, jax.lax.stop_gradient(start)
            for z, goal in zip(*(project(config, layers, model, views) for model in models), strict=True):
                loss += float(weight) / 2 * contrast(unit(z), unit(goal), same, 0.5)
    return loss


def ssl_loss(config: Config, layers: jax.Array, online: Params, target: Params, views: jax.Array) -> jax.Array:
    name, t, n = config.objective.name, config.objective.temperature, views.shape[1]
    z = project(config, layers, online, views)
    if name == "simclr":
        every = unit(jnp.concatenate(z))
        partners = (jnp.arange(2 * n) + n) % (2 * n)
        return contrast(every, every, partners, t)
    q = [unit(head(config, online["prediction"], 2, one)) for one in z]
    k = [unit(one) for one in project(config, layers, target, views)]
    if name == "byol":
        return sum((2 - 2 * (q[a] * k[1 - a]).sum(axis=1)).mean() for a in (0, 1))
    assert name == "mocov3", f"no naive loss for {name}"
    return sum(contrast(q[a], k[1 - a], jnp.arange(n), t) for a in (0, 1))


def project(config: Config, layers: jax.Array, model: Params, views: jax.Array) -> list[jax.Array]:
    """The projections of each view by itself; vmap, so that they are traced once."""

    def project_view(view: jax.Array) -> jax.Array:
        return head(config, model["projection"], 3, encode(config, model["encoder"], view, layers))

    return list(jax.vmap(project_view)(views))


@functools.partial(jax.jit, static_argnums=0)
def local_step(
    config: Config,
    layers: jax.Array,
    state: tuple[Params, Params, Any],
    start: Params,
    trainable: Params,
    views: jax.Array,
) -> tuple[tuple[Params, Params, Any], jax.Array]:
    online, target, opt_state = state
    loss, grads = jax.value_and_grad(loss_of, argnums=2)(config, layers, online, target, start, views)
    updates, opt_state = adamw(config).update(grads, opt_state, online)
    moved = optax.apply_updates(online, updates)
    online = jax.tree.map(lambda new, old, m: jnp.where(m, new, old), moved, start, trainable)
    m = config.objective.momentum
    target = jax.tree.map(lambda t, o: m * t + (1 - m) * o, target, online)
    return (online, target, opt_state), loss


def adamw(config: Config) -> optax.GradientTransformation:
    return optax.adamw(config.learning_rate, weight_decay=config.optimizer.weight_decay)


def batches(config: Config, task: Task, examples: int, number: int, client: int) -> list[np.ndarray]:
    """A client's batches in a round, of all epochs; one that is too short to learn from is left out."""
    found = []
    for epoch in range(config.federation.local_epochs):
        hashes = [seeds.hashes(config.runtime.seed, seeds.RngTag.BATCHES, number, client, epoch, i) for i in range(examples)]
        order = np.argsort(hashes)
        size = config.optimizer.batch_size
        found += [order[first : first + size] for first in range(0, examples, size)]
    return [batch for batch in found if len(batch) >= task.objective.fewest]


def train_client(
    config: Config,
    task: Task,
    params: Params,
    trainable: Params,
    depth: int,
    droppable: int,
    images: np.ndarray,
    number: int,
    client: int,
) -> tuple[Params, list[tuple[float, int]]]:
    """One client's round, and each step's loss and samples; ``trainable`` is True where the stage trains; ``droppable`` first layers may be skipped."""
    state = (params, params, adamw(config).init(params))
    key = seeds.key(config.runtime.seed, seeds.KeyTag.ROUND, number, client)
    losses = []
    for step, row in enumerate(batches(config, task, len(images), number, client)):
        batch = jnp.asarray(images[row])
        step_key = jax.random.fold_in(key, step)
        views = two_views(step_key, batch, task.recipe, task.dtype)
        u = jax.random.uniform(jax.random.fold_in(step_key, 2**32 - 1), (config.model.depth,), jnp.float32)
        layer = np.arange(config.model.depth)
        layers = (layer < depth) & ((layer >= droppable) | (np.asarray(u) >= config.additions.depth_dropout))
        state, loss = local_step(config, layers, state, params, trainable, views)
        losses.append((float(loss), len(row)))
    return state[0], losses


def train_round(
    config: Config,
    task: Task,
    params: Params,
    trainable: Params,
    depth: int,
    droppable: int,
    client_images: dict[int, np.ndarray],
    number: int,
) -> tuple[Params, float]:
    """The global model after a round of the clients that reported, and the mean loss of a sample."""
    trained, sizes, losses = [], [], []
    for client, images in client_images.items():
        if len(images) < task.objective.fewest:
            continue
        model, client_losses = train_client(
            config, task, params, trainable, depth, droppable, images, number, client
        )
        trained.append(model)
        sizes.append(len(images))
        losses += client_losses
    if not trained:
        return params, float("nan")
    average = jax.tree.map(
        lambda *xs: sum(n * np.asarray(x) for n, x in zip(sizes, xs, strict=True)) / sum(sizes), *trained
    )
    return average, sum(loss * n for loss, n in losses) / sum(n for _, n in losses)
