"""A config of your own: Barlow Twins on a mixer, with your own data, layer by layer.

lwfedssl train config.py                             # one to two minutes on 2 CPU cores
lwfedssl resources config.py                         # what a client spends, under each strategy
lwfedssl train config.py --strategy.name newest_two  # the strategy of method.py
"""

import data
import method  # noqa: F401  its entries: an objective, a term, a strategy, an aggregator
import model  # noqa: F401  its entry: an encoder

from lwfedssl_jax.config import load, override
from lwfedssl_jax.data.memory import hold
from lwfedssl_jax.data.views import RECIPES

# How the two views of an image are made: the recipe for digits, with smaller crops.
RECIPES["mine"] = RECIPES["digits"]._replace(crop_area=(0.4, 1.0))

config = override(
    load("quickstart"),
    {
        "data.name": hold(data.make_data()),
        "data.views": "mine",
        "partition.kind": "natural",  # the six clients of the data; others: docs/guides/data.md
        "partition.clients": 6,
        "model.name": "my_mixer",
        "model.width": 0,  # 0: the model's own
        "model.depth": 0,
        "model.heads": 0,
        "model.patch_size": 0,
        "objective.name": "barlow_twins",
        "federation.aggregator": "half_way",
        "additions.terms": ("small_weights=1e-4",),
    },
)
