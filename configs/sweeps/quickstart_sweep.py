"""The three strategies with three seeds each on digits: within 15 minutes on 2 CPU cores.

python run.py sweep quickstart_sweep --dry-run
python run.py sweep quickstart_sweep
"""

from lwfedssl_jax.sweep import Sweep

sweep = Sweep(
    base="quickstart",
    product={"strategy.name": ("layerwise", "progressive", "end_to_end")},
    seeds=(0, 1, 2),
)
