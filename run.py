"""Federated self-supervised learning, layer by layer; `python run.py --help` explains."""

import sys

from lwfedssl_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
