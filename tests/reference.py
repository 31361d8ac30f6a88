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
from lwfedssl_jax.models.decoder import Decoder, DecoderSize
from lwfedssl_jax.models.heads import MLP
from lwfedssl_jax.models.vit import Block, Embedding, LayerNorm
from lwfedssl_jax.system import seeds

Params = dict[str, Any]


def encode(config: Config, params: Params, images: jax.Array, layers: jax.Array) -> jax.Array:
    """``images -> features`` of the layers that are True in ``layers``."""
    x = embedding(config, images.dtype).apply({"params": params["embedding"]}, images)
    return run_layers(config, params, x, layers).mean(axis=1)


def embedding(config: Config, dtype: Any) -> Embedding:
    patches = (config.data.image_size // config.model.patch_size) ** 2
    return Embedding(config.model.patch_size, config.model.width, dtype, dtype, patches)


def run_layers(config: Config, params: Params, x: jax.Array, layers: jax.Array) -> jax.Array:
    types: Any = {"dtype": x.dtype, "param_dtype": x.dtype}
    for layer in range(config.model.depth):
        block = jax.tree.map(lambda p, i=layer: p[i], params["blocks"])
        x = jnp.where(layers[layer], Block(config.model.heads, **types).apply({"params": block}, x), x)
    return LayerNorm(x.dtype).apply({"params": params["norm"]}, x)


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
    config: Config,
    layers: jax.Array,
    online: Params,
    target: Params,
    start: Params,
    views: jax.Array,
    visible: jax.Array,
) -> jax.Array:
    if config.objective.name == "mae":
        return mae_loss(config, layers, online, views[0], visible)
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
    if name == "vicreg":
        return vicreg_loss(*z)
    q = [unit(head(config, online["prediction"], 2, one)) for one in z]
    k = [unit(one) for one in project(config, layers, target, views)]
    if name == "byol":
        return sum((2 - 2 * (q[a] * k[1 - a]).sum(axis=1)).mean() for a in (0, 1))
    assert name == "mocov3", f"no naive loss for {name}"
    return sum(contrast(q[a], k[1 - a], jnp.arange(n), t) for a in (0, 1))


def vicreg_loss(z1: jax.Array, z2: jax.Array) -> jax.Array:
    loss = 25 * ((z1 - z2) ** 2).mean()
    for z in (z1, z2):
        covariance = jnp.cov(z.T)
        spread = jnp.sqrt(jnp.diag(covariance) + 1e-4)
        loss += 25 * jnp.maximum(1 - spread, 0).mean()
        loss += ((covariance - jnp.diag(jnp.diag(covariance))) ** 2).sum() / z.shape[1]
    return loss


def mae_loss(config: Config, layers: jax.Array, model: Params, images: jax.Array, visible: jax.Array) -> jax.Array:
    """All patches are embedded here, of which those that are ``visible`` (BxV) go on."""
    p, (b, h, w, c) = config.model.patch_size, images.shape
    corners = [(y, x) for y in range(0, h, p) for x in range(0, w, p)]
    patches = jnp.stack([images[:, y : y + p, x : x + p].reshape(b, -1) for y, x in corners], axis=1)
    spread = jnp.sqrt(patches.var(axis=2, keepdims=True) + 1e-6)
    goal = (patches - patches.mean(axis=2, keepdims=True)) / spread
    tokens = embedding(config, images.dtype).apply({"params": model["encoder"]["embedding"]}, images)
    tokens = jnp.stack([one[at] for one, at in zip(tokens, visible, strict=True)])
    tokens = run_layers(config, model["encoder"], tokens, layers)
    size = DecoderSize(len(corners), p * p * c, config.model.width, 1, config.model.heads)
    found = Decoder(size, images.dtype, images.dtype).apply({"params": model["decoder"]}, tokens, visible)
    error = ((found - goal) ** 2).mean(axis=2)
    hidden = jnp.stack([jnp.ones(len(corners)).at[at].set(0) for at in visible])
    return (error * hidden).sum() / hidden.sum()


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
    visible: jax.Array,
) -> tuple[tuple[Params, Params, Any], jax.Array]:
    online, target, opt_state = state
    loss, grads = jax.value_and_grad(loss_of, argnums=2)(config, layers, online, target, start, views, visible)
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
        path = number, client, epoch
        order = np.argsort([seeds.hashes(config.runtime.seed, seeds.RngTag.BATCHES, *path, i) for i in range(examples)])
        size = config.optimizer.batch_size
        found += [order[first : first + size] for first in range(0, examples, size)]
    return [batch for batch in found if len(batch) >= task.objective.fewest]


def visible_patches(config: Config, key: jax.Array, samples: int) -> np.ndarray:
    """Of each image a quarter of the patches, in order."""
    patches = (config.data.image_size // config.model.patch_size) ** 2
    keys = [jax.random.fold_in(jax.random.fold_in(key, 2**32 - 6), i) for i in range(samples)]
    return np.array([np.sort(jax.random.permutation(k, patches)[: patches // 4]) for k in keys])


def held_layers(config: Config, key: jax.Array, droppable: int) -> np.ndarray:
    """The layers that a client has in a round: all but ``rate * droppable``, rounded down or up at random."""
    held = np.ones(config.model.depth, bool)
    if config.additions.depth_dropout_per == "round":
        u = np.asarray(jax.random.uniform(jax.random.fold_in(key, 2**32 - 5), (len(held) + 1,), jnp.float32))
        skipped = int(config.additions.depth_dropout * droppable + u[-1])
        held[np.argsort(u[:droppable])[:skipped]] = False
    return held


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
) -> tuple[Params, list[tuple[float, int]], np.ndarray]:
    """One client's round: its model, each step's loss and samples, and the layers that it has.

    ``trainable`` is True where the stage trains, and the ``droppable`` first layers may be skipped.
    """
    state = (params, params, adamw(config).init(params))
    key = seeds.key(config.runtime.seed, seeds.KeyTag.ROUND, number, client)
    layer, losses = np.arange(config.model.depth), []
    held = runs = held_layers(config, key, droppable)
    for step, row in enumerate(batches(config, task, len(images), number, client)):
        batch = jnp.asarray(images[row])
        step_key = jax.random.fold_in(key, step)
        views = two_views(step_key, batch, task.recipe, task.dtype)
        visible = visible_patches(config, step_key, len(batch))
        if config.additions.depth_dropout_per == "step":
            u = jax.random.uniform(jax.random.fold_in(step_key, 2**32 - 1), (config.model.depth,), jnp.float32)
            runs = (layer >= droppable) | (np.asarray(u) >= config.additions.depth_dropout)
        state, loss = local_step(config, (layer < depth) & runs, state, params, trainable, views, visible)
        losses.append((float(loss), len(row)))
    return state[0], losses, held


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
    trained, sizes, losses, held = [], [], [], []
    for client, images in client_images.items():
        if len(images) < task.objective.fewest:
            continue
        model, client_losses, layers = train_client(
            config, task, params, trainable, depth, droppable, images, number, client
        )
        held.append(layers)
        trained.append(model)
        sizes.append(len(images))
        losses += client_losses
    if not trained:
        return params, float("nan")
    average = jax.tree.map(
        lambda *xs: sum(n * np.asarray(x) for n, x in zip(sizes, xs, strict=True)) / sum(sizes), *trained
    )
    for layer in range(config.model.depth):
        having = [i for i, layers in enumerate(held) if layers[layer]]

        def mean(sent: jax.Array, *xs: jax.Array, layer: int = layer, having: list[int] = having) -> np.ndarray:
            models = [sizes[i] * np.asarray(xs[i][layer]) for i in having]
            return sum(models) / sum(sizes[i] for i in having) if having else np.asarray(sent[layer])

        own = jax.tree.map(mean, params["encoder"]["blocks"], *[m["encoder"]["blocks"] for m in trained])
        jax.tree.map(lambda whole, row, at=layer: whole.__setitem__(at, row), average["encoder"]["blocks"], own)
    return average, sum(loss * n for loss, n in losses) / sum(n for _, n in losses)
