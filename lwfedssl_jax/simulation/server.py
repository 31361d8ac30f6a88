"""Training on the server: calibration after a round, and FedCA's base model before the first one."""

import functools
from collections.abc import Callable

import jax
import numpy as np

from lwfedssl_jax import tree
from lwfedssl_jax.method import calibration, fedca
from lwfedssl_jax.method.programs import program_config
from lwfedssl_jax.method.stages import Stage
from lwfedssl_jax.simulation.events import Compiling, Hear
from lwfedssl_jax.simulation.setup import Cache, Prepared, check_finite, initial_params
from lwfedssl_jax.system import seeds
from lwfedssl_jax.tree import Tree


class ServerTraining:
    """The server's own training of a run, on one device.

    Args:
      run: prepared.
      cache: shared with other simulators of this process.
      hear: called when a compilation begins.
    """

    def __init__(self, run: Prepared, cache: Cache, hear: Hear) -> None:
        self._run, self._cache, self._hear = run, cache, hear

    @property
    def calibrates(self) -> bool:
        """Whether the server trains after each round."""
        return self._run.config.additions.calibration_steps > 0

    def after_round(self, stage: Stage, params: Tree, number: int) -> tuple[Tree, float]:
        """Calibrate after a round; return the parameters, on the host, and the loss.

        Raises:
          FloatingPointError: the loss is not finite.
        """
        config = self._run.config
        key = seeds.key(config.runtime.seed, seeds.KeyTag.SERVER, number)
        params, loss = self._train(stage, params, config.additions.calibration_steps, key)
        check_finite(config, "the calibration's loss is not finite", number, loss)
        return params, loss

    @functools.cached_property
    def extras(self) -> Tree:
        """Return the constant part of ``Broadcast.extras``, on the host: the base model, trained now, and its images.

        Raises:
          FloatingPointError: the base model's loss is not finite.
        """
        run = self._run
        if not fedca.has_base(run.config):
            return {}
        (stage,), key = run.stages, seeds.key(run.config.runtime.seed, seeds.KeyTag.BASE)
        params, loss = self._train(stage, initial_params(run), run.config.additions.base_steps, key)
        check_finite(run.config, "the base model's loss is not finite", 0, loss)
        return {"base": jax.device_get(tree.take(params, stage.rows)), "public": run.server_images}

    def _train(self, stage: Stage, params: Tree, steps: int, key: jax.Array) -> tuple[Tree, float]:
        run = self._run
        stage = calibration.all_trainable(stage, run.layers)

        def compiled() -> Callable[..., tuple[Tree, jax.Array]]:
            self._hear(Compiling("the server's training"))
            return jax.jit(functools.partial(calibration.calibrate, run.task, run.config.optimizer.batch_size, steps))

        shapes = str(jax.tree.map(np.shape, stage.rows))
        calibrate = self._cache.get(("calibration", program_config(run.config), steps, shapes), compiled)
        host, depth = jax.device_get(params), np.int32(stage.depth)
        work = calibration.ServerWork(run.hyper, host, stage.rows, depth, run.server_images, key)
        params, loss = calibrate(work)
        return jax.device_get(params), float(loss)
