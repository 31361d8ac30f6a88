"""Strategies on your own config, with two seeds.

lwfedssl sweep sweep.py --dry-run    # what would run, and how long it would take
lwfedssl sweep sweep.py --jobs 2
"""

from lwfedssl_jax.sweep import Sweep

sweep = Sweep(
    base="config.py",  # of this folder
    product={"strategy.name": ("layerwise", "newest_two", "end_to_end")},
    seeds=(0, 1),
)
