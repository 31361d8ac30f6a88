"""``python -m lwfedssl_jax`` is ``python run.py``."""

import sys

from lwfedssl_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
