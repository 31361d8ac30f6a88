"""Files and folders that can be written."""

import tempfile
from pathlib import Path

PROBE = ".lwfedssl-"  # a killed process may leave a folder of that name


def can_hold(path: Path) -> bool:
    """Whether a folder is there, or can be made, and be written to; tried, as permissions alone do not tell."""
    path = path.absolute()
    try:
        nearest = next(p for p in [path, *path.parents] if p.exists())
        with tempfile.TemporaryDirectory(prefix=PROBE, dir=nearest) as folder:
            (Path(folder) / path.relative_to(nearest)).mkdir(parents=True, exist_ok=True)
            return True
    except OSError:  # also names that are too long
        return False
