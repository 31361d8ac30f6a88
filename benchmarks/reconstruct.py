"""How well a client's images can be rebuilt from its update, by strategy and stage (gradient inversion).

    python benchmarks/reconstruct.py                 # about half an hour on 2 cores
    python benchmarks/reconstruct.py --trials 2 --iterations 500

An attacker who knows the broadcast and one client's update searches for the images whose gradient points the way of
the update (cosine; Geiping et al., 2020, arXiv 2003.14053): by Adam on the pixels from the mean image, with total
variation, the same number of steps everywhere. The update is of one SGD step, or of a real round (three AdamW steps
with other views); the attacker knows the random views or masks, or draws its own. Rebuilt images are matched with the
true ones. PSNR stands beside that of the mean image and of an attack on an update of noise; the rank is the true
image's among 100 by its distance to what was rebuilt: 1 is found, and what chance gives (50.5 for one image, less for
several, which are matched) is that from noise.
"""

import functools
import itertools
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.optimize import linear_sum_assignment

from lwfedssl_jax.config import Config, load, override, resolve
from lwfedssl_jax.method.client import client_init, client_step
from lwfedssl_jax.method.depth_dropout import routes
from lwfedssl_jax.method.pretext import pretext_of
from lwfedssl_jax.method.stages import Stage
from lwfedssl_jax.method.task import Broadcast, Task, weights_of
from lwfedssl_jax.simulation import setup
from lwfedssl_jax.simulation.program import make_broadcast
from lwfedssl_jax.simulation.simulator import Simulator

FIELDS: dict[str, Any] = {
    "partition.kind": "iid", "partition.clients": 40, "federation.clients_per_round": 10, "federation.rounds": 12,
    "federation.local_epochs": 1, "strategy.first_stage_share": 0.0, "model.width": 32, "model.heads": 4,
    "model.depth": 3, "objective.hidden_dim": 64, "objective.output_dim": 32,
}  # fmt: skip
# The layer that layerwise trains in its last stage, and all layers: what progressive and end to end upload there.
CASES = {
    "layerwise, first stage": ("layerwise", 0),
    "layerwise, last stage": ("layerwise", -1),
    "end_to_end": ("end_to_end", 0),
}
BATCHES = {"simclr": (8,), "mae": (1, 8)}  # of few images, simclr's batch normalisation leaves no gradient to follow
CANDIDATES, ROUND_STEPS, VARIATION, RATE = 100, 3, 1e-3, 0.05


def main() -> None:
    options = common.arguments(
        __doc__ or "", trials={"type": int, "default": 3}, iterations={"type": int, "default": 1000}
    )
    rows = []
    for objective, (case, (strategy, number)) in itertools.product(BATCHES, CASES.items()):
        run, stage, params = prepared(resolve(override(load("quickstart"), FIELDS | {
            "strategy.name": strategy, "objective.name": objective})), number)  # fmt: skip
        for batch, kind, known in itertools.product(BATCHES[objective], ("SGD step", "round"), (True, False)):
            tried = functools.partial(attack, run, stage, params, batch, kind, known, options.iterations)
            of_trials = [tried(trial, noise=False) for trial in range(options.trials)]
            of_noise = [tried(trial, noise=True) for trial in range(options.trials)]
            row = {
                "objective": objective, "trained": case, "parameters": size_of(stage, params), "batch": batch,
                "update": kind, "views": "known" if known else "unknown",
                "PSNR (dB)": mean(of_trials, "psnr"), "of the mean image": mean(of_trials, "psnr_mean"),
                "from noise": mean(of_noise, "psnr"), "rank of 100": mean(of_trials, "rank"),
                "rank from noise": mean(of_noise, "rank"), "cosine": mean(of_trials, "cosine"),
            }  # fmt: skip
            print(row, flush=True)
            rows.append(row)
            programs.cache_clear()  # the number of programs that a process can hold is limited
            jax.clear_caches()
    common.publish("reconstruct", "Images rebuilt from one client's update", rows,
                   trials=options.trials, iterations=options.iterations)  # fmt: skip


def mean(trials: list[dict[str, float]], name: str) -> float:
    return round(float(np.mean([trial[name] for trial in trials])), 2)


def prepared(config: Config, number: int) -> tuple[setup.Prepared, Stage, Any]:
    """A run, one of its stages, and the global parameters in the middle of it."""
    run = setup.prepare(config)
    stage, simulator = run.stages[number], Simulator([run])
    params, state = simulator.resume(0, [{}])
    for n in range(1, stage.first_round + stage.rounds // 2 + 1):
        of_round = next(s for s in run.stages if n <= s.last_round)
        state = None if n == of_round.first_round + 1 else state
        result = simulator.run_rounds(of_round, params, state, n)
        params, state = result.params, result.state
    return run, stage, jax.device_get(params)


def size_of(stage: Stage, params: Any) -> int:
    trainable = weights_of(make_broadcast(stage, params, stage.rows, stage.depths).trainable)
    return sum(int(x.size) for x in jax.tree.leaves(trainable))


def flat(tree: Any) -> jax.Array:
    return jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(tree)])


@functools.cache
def programs(run_id: int, batch: int, known: bool, steps: int, iterations: int) -> Any:
    run, stage, params = OPEN[run_id]
    task, broadcast = run.task, jax.tree.map(jnp.asarray, make_broadcast(stage, params, stage.rows, stage.depths))
    # Loops of a known length can be differentiated.
    broadcast = broadcast._replace(depth=int(broadcast.depth), frozen_depth=int(broadcast.frozen_depth))
    sgd = task._replace(optimizer=lambda hyper: optax.sgd(1.0))
    real = jnp.ones(batch, bool)

    def update(images: jax.Array, keys: jax.Array, one_sgd_step: bool) -> jax.Array:
        state = client_init(sgd if one_sgd_step else task, broadcast.trainable)
        for key in keys:
            state = client_step(sgd if one_sgd_step else task, state, broadcast, images, real, key)[0]
        return flat(weights_of(state.trainable)) - flat(weights_of(broadcast.trainable))

    def descent(images: jax.Array, keys: jax.Array) -> jax.Array:
        """The way of one SGD step, summed over the views of all steps of a round."""
        return sum((-gradient(task, broadcast, images, key) for key in keys), jnp.zeros(()))

    def loss(pixels: jax.Array, observed: jax.Array, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = descent(255 * pixels, keys)
        cosine = (found * observed).sum() / jnp.maximum(jnp.linalg.norm(found) * jnp.linalg.norm(observed), 1e-20)
        variation = sum(jnp.abs(jnp.diff(pixels, axis=axis)).mean() for axis in (1, 2))
        return 1 - cosine + VARIATION * variation, cosine

    optimizer = optax.adam(optax.cosine_decay_schedule(RATE, iterations))

    @jax.jit
    def search(start: jax.Array, observed: jax.Array, keys: jax.Array, own: jax.Array) -> tuple[jax.Array, jax.Array]:
        def body(i: jax.Array, carry: Any) -> Any:
            pixels, state, _ = carry
            used = keys if known else jax.random.split(jax.random.fold_in(own, i), len(keys))
            (_, cosine), gradient = jax.value_and_grad(loss, has_aux=True)(pixels, observed, used)
            updates, state = optimizer.update(gradient, state)
            return jnp.clip(optax.apply_updates(pixels, updates), 0, 1), state, cosine

        pixels, _, cosine = jax.lax.fori_loop(0, iterations, body, (start, optimizer.init(start), jnp.zeros(())))
        return pixels, cosine

    return jax.jit(update, static_argnums=2), search


def gradient(task: Task, broadcast: Broadcast, images: jax.Array, key: jax.Array) -> jax.Array:
    """As of a client's step, but a differentiable function of the images, also through the frozen layers."""
    pretext, (route, frozen_route) = pretext_of(task), routes(broadcast, None)
    seen, real = pretext.see(task, key, images), jnp.ones(len(images), bool)
    seen = seen._replace(x=task.encoder.frozen_forward(broadcast.frozen, seen.x, *frozen_route))
    statistics = {"statistics": broadcast.trainable["statistics"]}

    def loss(weights: Any) -> jax.Array:
        outputs, _ = pretext.online(task, weights | statistics, seen, real, route)
        return pretext.loss(task, broadcast, outputs, None, seen, real)

    return flat(jax.grad(loss)(weights_of(broadcast.trainable)))


OPEN: dict[int, Any] = {}


def attack(
    run: setup.Prepared, stage: Stage, params: Any, batch: int, kind: str, known: bool, iterations: int, trial: int,
    *, noise: bool,
) -> dict[str, float]:  # fmt: skip
    OPEN[id(run)] = run, stage, params
    rng = np.random.default_rng(trial)
    images = run.dataset.train_images
    chosen = rng.choice(len(images), CANDIDATES - 1 + batch, replace=False)
    true, others = images[chosen[:batch]], images[chosen[batch:]] / 255.0
    steps = ROUND_STEPS if kind == "round" else 1
    update, search = programs(id(run), batch, known, steps, iterations)
    keys = jax.random.split(jax.random.key(100 + trial), steps)
    observed = update(jnp.asarray(true), keys, kind != "round")
    if noise:
        observed = jax.random.normal(jax.random.key(200 + trial), observed.shape) * jnp.std(observed)
    average = images.mean(0) / 255.0
    start = jnp.asarray(np.clip(average + rng.normal(size=true.shape) * 0.05, 0, 1), jnp.float32)
    found, cosine = jax.device_get(search(start, observed, keys, jax.random.key(300 + trial)))
    true = true / 255.0
    errors = ((found[:, None] - true[None]) ** 2).mean((2, 3, 4))
    rebuilt, original = linear_sum_assignment(errors)
    ranks = [
        1 + int((((others - found[i]) ** 2).mean((1, 2, 3)) < errors[i, j]).sum())
        for i, j in zip(rebuilt, original, strict=True)
    ]
    return {
        "psnr": psnr(errors[rebuilt, original]),
        "psnr_mean": psnr(((true - average) ** 2).mean((1, 2, 3))),
        "rank": float(np.mean(ranks)),
        "cosine": float(cosine),
    }


def psnr(errors: np.ndarray) -> float:
    return float(np.mean(-10 * np.log10(np.maximum(errors, 1e-12))))


if __name__ == "__main__":
    main()
