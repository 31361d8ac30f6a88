"""The command ``embed``."""

import io
import time

import numpy as np
import pandas as pd

from lwfedssl_jax.cli.options import EMBEDDINGS, EmbedOptions
from lwfedssl_jax.cli.status import shown_status
from lwfedssl_jax.config import ConfigError
from lwfedssl_jax.evaluation.embed import Features, embed, find_pictures
from lwfedssl_jax.evaluation.export import load_encoder
from lwfedssl_jax.system import devices
from lwfedssl_jax.system.errors import first_of
from lwfedssl_jax.system.files import can_write, write_whole


def run_embed(options: EmbedOptions) -> None:
    """Write the features of pictures, with progress on standard error."""
    if options.out.suffix not in EMBEDDINGS or options.out.is_dir() or not can_write(options.out.parent):
        raise ConfigError(
            f"--out: {options.out} cannot be written; accepted: a file that ends in {', '.join(EMBEDDINGS)}, in a "
            "folder that you can write to"
        )
    pictures = find_pictures(options.images)
    devices.set_up_cpu()
    devices.set_up_cache(options.compilation_cache)
    devices.check_platform()
    encoder, began = load_encoder(options.run, options.config), time.monotonic()
    with shown_status(f"encoding {pictures.number:,} image{'s' * (pictures.number > 1)}") as show:
        found = embed(
            encoder,
            pictures,
            lambda done: show(
                f"{done:,} of {pictures.number:,} images, {done / (time.monotonic() - began):,.0f} per second"
            ),
        )
        if found.unreadable:
            show(f"{len(found.unreadable):,} images cannot be read and are left out: {first_of(found.unreadable)}")
    if not found.names:
        raise ConfigError(f"IMAGES: no image in {options.images} can be read; accepted: images that Pillow reads")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(options.out, content(found, options.out.suffix))
    print(
        f"{options.out}: {len(found.names):,} image{'s' * (len(found.names) > 1)}, {encoder.num_features} features each"
    )


def content(found: Features, suffix: str) -> bytes:
    """Return the file: an npz with ``names`` (N) and ``features`` (NxD), or a table with a row for each image."""
    if suffix == ".npz":
        file = io.BytesIO()
        np.savez(file, names=np.array(found.names), features=found.features)
        return file.getvalue()
    table = pd.DataFrame(found.features, index=pd.Index(found.names, name="name"))
    return table.to_csv().encode(errors="replace")
