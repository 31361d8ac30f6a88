"""The three strategies with three seeds each, and a shallow encoder trained end to end, on any config.

    python run.py sweep strategies --base quickstart --dry-run
    python run.py sweep strategies --base my_config.py

The shallow encoder has only the layers of layerwise's first stage. Where it is as good as the others, the later layers
have not paid. It is trained for as many rounds, and for as many as have the same traffic as layerwise.
"""

from lwfedssl_jax.sweep import Sweep

sweep = Sweep(
    base="quickstart",
    product={"strategy.name": ("layerwise", "progressive", "end_to_end")},
    seeds=(0, 1, 2),
    shallow_control=True,
)
