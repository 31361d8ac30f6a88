"""What a test of your own parts can look like: `pytest test_mine.py`."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import lwfedssl_jax as lw
from lwfedssl_jax.method.objectives import OBJECTIVES

CONFIG = str(Path(__file__).parent / "config.py")
SMALL = {
    "federation.rounds": 1, "federation.local_epochs": 1, "model.depth": 1, "strategy.name": "end_to_end",
    "evaluation.labels_per_class": (0,), "evaluation.neighbours": 0,
}  # fmt: skip


def test_it_trains_and_its_encoder_can_be_loaded(tmp_path):
    run = lw.train(lw.load_config(CONFIG, SMALL), tmp_path / "run", progress=False)
    assert np.isfinite(run.metrics["loss"].iloc[1:]).all()
    encode = lw.load_encoder(tmp_path / "run", CONFIG)
    assert encode(np.zeros((3, 8, 8, 1), np.uint8)).shape == (3, encode.num_features)


def test_the_objective_ignores_padding_and_has_a_gradient_for_one_sample():
    lw.load_config(CONFIG)
    loss = OBJECTIVES["barlow_twins"].loss
    z = jnp.sin(jnp.arange(2 * 4 * 3, dtype=jnp.float32)).reshape(2, 4, 3)
    for real in (1, 3):
        mask = jnp.arange(4) < real
        gradient = jax.grad(lambda z, mask=mask: loss(z, z, mask, 1.0))(z)
        assert np.isfinite(gradient).all()
        assert not gradient[:, real:].any()  # padding has no influence
