"""Assigns processor cores and accelerators to workers."""

import math
import os
import shutil
import subprocess
from pathlib import Path


def search_path() -> str:
    """Return a ``PYTHONPATH`` on which this package is found first."""
    here = str(Path(__file__).parents[2].absolute())
    return os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH", "")]))


def core_slots(jobs: int) -> list[tuple[list[int], dict[str, str]]]:
    """Return the cores and environment of each worker: the whole machine for a single one, otherwise a share."""
    if jobs == 1:
        return [([], {})]
    gpus = visible_gpus()
    if gpus:
        share = (
            {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / math.ceil(jobs / len(gpus)):.3f}"} if jobs > len(gpus) else {}
        )
        return [([], {**share, "CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]}) for i in range(jobs)]
    cores = available_cores()
    each = max(1, len(cores) // jobs)
    # NumPy's and scikit-learn's threads, which are made before a worker has its cores, would wait for each other.
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    threads = {name: str(each) for name in names if name not in os.environ}
    return [([cores[(i * each + k) % len(cores)] for k in range(each)], threads) for i in range(jobs)]


def available_cores() -> list[int]:
    """Return the cores that this process may use; all of them if the system does not report this."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def visible_gpus() -> list[str]:
    """List NVIDIA GPUs in the form of ``CUDA_VISIBLE_DEVICES``, without JAX, which would reserve their memory."""
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [gpu for gpu in chosen.split(",") if gpu and gpu != "-1"]
    if os.environ.get("JAX_PLATFORMS") == "cpu" or not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout.splitlines()
    return [str(i) for i in range(len([line for line in listed if line.startswith("GPU ")]))]
