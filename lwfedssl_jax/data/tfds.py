"""Data sets of tensorflow-datasets that are prepared on this machine or can be."""

import contextlib
import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from lwfedssl_jax.config import ConfigError, DataConfig
from lwfedssl_jax.data.cache import Example, Notify, Split, Undecoded, refuse, stamp
from lwfedssl_jax.system.files import with_home

if TYPE_CHECKING:
    import tensorflow_datasets as tfds


SECONDS_TO_ANSWER = 10.0  # that a server has for each of connecting and answering
TEST_SPLITS = ("test", "validation")
CLIENT_FEATURES = ("client", "client_id", "user_id")
WITH_TENSORFLOW = 'pip install -e ".[tensorflow]"'


def tfds_folder() -> str:
    """The folder, or the address, of the data sets that tensorflow-datasets has prepared.

    Raises:
      ConfigError: ``TFDS_DATA_DIR`` is not set, and there is no home directory.
    """
    return os.environ.get("TFDS_DATA_DIR") or str(with_home("~/tensorflow_datasets"))


def is_prepared(name: str, note: Notify) -> bool:
    """Whether a data set is prepared in the version that would be used and in a format that needs no TensorFlow."""
    if os.path.expanduser("~") == "~" and not os.environ.get("TFDS_DATA_DIR"):
        return False
    if not (Path(tfds_folder()) / name).is_dir():
        return False
    try:
        builder = builder_of(name)
        return builder.is_prepared() and "array_record" in [f.value for f in builder.info.available_file_formats()]
    except Exception as error:  # tfds raises many kinds
        note(f"{name} in {tfds_folder()} cannot be used ({' '.join(str(error).split()) or type(error).__name__})")
        return False


def builder_of(name: str) -> "tfds.core.DatasetBuilder":
    """Return the builder of a data set, without the warning that its folder has no data set yet."""
    import tensorflow_datasets as tfds
    from absl import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        return tfds.builder(name, data_dir=tfds_folder())
    finally:
        logging.set_verbosity(verbosity)


def open_tfds(config: DataConfig, name: str, note: Notify) -> Undecoded:
    """Find the data set ``name``; if it is not on this machine, download it and prepare it as array_record.

    The image is the data set's own input (``supervised_keys``), or its only ``Image`` or uint8 ``Tensor`` of rank 3;
    the label is its own target, or its only ``ClassLabel``, or else its only scalar integer whose name does not end in
    ``id``. Training images with a negative label have no label. The first split of ``test`` and ``validation`` that
    has labels is for testing; if that is ``test``, ``validation`` is the split ``val``.

    Raises:
      ConfigError: the data set is not installed and cannot be prepared; its features or splits do not show which is
        the image, the label, the client or the test split; its format needs TensorFlow, which is not installed.
    """
    import tensorflow_datasets as tfds

    try:
        builder = builder_of(name)
        if not builder.is_prepared():
            if not any(Path(tfds_folder()).glob("downloads/*")):  # else the archive may be there
                check_host(next(iter(builder.url_infos or ()), ""), note)
            note(f"tensorflow-datasets downloads and prepares {builder.info.full_name} in {tfds_folder()}")
            builder = tfds.builder(name, data_dir=tfds_folder(), file_format="array_record")
            builder.download_and_prepare()
    except Exception as error:  # tfds raises many kinds; to the user all mean "not readable here"
        raise _explain(config, "is not installed and cannot be prepared", error) from error
    info = builder.info
    chosen = choose_features(config, info.features, info.supervised_keys)
    if "train" not in info.splits or not any(name in info.splits for name in TEST_SPLITS):
        raise refuse(config, f"has no {'split for testing' if 'train' in info.splits else 'split train'}, only "
                     f"{', '.join(sorted(info.splits))}", f"splits train and {' or '.join(TEST_SPLITS)}")  # fmt: skip

    def splits() -> dict[str, Split]:
        try:
            tests = [_split(builder, name, chosen) for name in TEST_SPLITS if name in info.splits]
            labelled = [s for s in tests if len(tests) == 1 or s.read(0, next(iter(s.items))).label >= 0]
            parts = zip(("test", "val"), labelled or tests[:1], strict=False)
            return {"train": _split(builder, "train", chosen), **dict(parts)}
        except Exception as error:  # as above
            raise _explain(config, "cannot be read", error) from error

    files = [stamp(path) for path in sorted(Path(builder.data_path).rglob("*")) if path.is_file()]
    names = tuple(getattr(info.features[chosen[1]], "names", None) or ())
    return Undecoded([info.full_name, files, *chosen], splits, names)


def check_host(url: str, note: Notify) -> None:
    """Ask the server of a data set for its first file: tensorflow-datasets tries a missing one for minutes.

    Raises:
      OSError: it does not answer.
    """
    if not url.startswith("http"):
        return
    import requests

    note(f"trying {url}")
    with contextlib.suppress(requests.HTTPError), requests.get(url, stream=True, timeout=SECONDS_TO_ANSWER):
        pass


def choose_features(
    config: DataConfig, features: "Mapping[str, tfds.features.FeatureConnector]", own: Any
) -> tuple[str, str, str | None]:
    """The names of the features that are the image, the label and the client's id, which may be None.

    Args:
      config: may name the last of them.
      features: of the data set, by name.
      own: names of its input and its target, or None.

    Raises:
      ConfigError: no feature, or more than one, could be meant.
    """
    import tensorflow_datasets as tfds

    names = [config.client_column] if config.client_column else CLIENT_FEATURES
    client = next((n for n in names if n in features and _is_id(features[n])), None)
    listed = ", ".join(f"{name} {feature!r}" for name, feature in sorted(features.items())).replace("\n", "")
    if config.client_column and not client:
        raise ConfigError(
            f"data.client_column: {config.name!r} has no scalar integer or text {config.client_column!r}; "
            f"accepted: one of {listed}"
        )
    uint8 = {n: f for n, f in features.items() if f.shape is not None and len(f.shape) == 3 and f.np_dtype == np.uint8}
    images = [n for n, f in uint8.items() if isinstance(f, tfds.features.Image)] or list(uint8)
    numbers = [n for n, f in features.items() if n != client and _is_id(f) and np.issubdtype(f.np_dtype, np.integer)]
    named = [n for n in numbers if not n.lower().endswith("id") or (own and own[1] == n)]
    labels = [n for n in numbers if isinstance(features[n], tfds.features.ClassLabel)] or named
    found = []
    for place, what, candidates in (
        (0, "an image (Image, or uint8 Tensor of rank 3)", images),
        (1, "a label (ClassLabel, or scalar integer that is not an id)", labels),
    ):
        if own and own[place] in candidates:
            candidates = [own[place]]
        if len(candidates) != 1:
            several = f"{len(candidates)} features that could be" if candidates else "no feature that is"
            raise refuse(config, f"has {several} {what}: {listed}", "a data set with one, or that names its own")
        found += candidates
    return found[0], found[1], client


def _is_id(feature: "tfds.features.FeatureConnector") -> bool:
    import tensorflow_datasets as tfds

    return isinstance(feature, tfds.features.Text) or (
        isinstance(feature, tfds.features.Tensor)
        and feature.shape == ()
        and np.issubdtype(feature.np_dtype, np.integer)
    )


def _split(builder: "tfds.core.DatasetBuilder", name: str, chosen: tuple[str, str, str | None]) -> Split:
    import tensorflow_datasets as tfds

    image, label, client = chosen
    encoded = isinstance(builder.info.features[image], tfds.features.Image)
    # Images stay as they are in the file: our threads decode them.
    decoders = {image: tfds.decode.SkipDecoding()} if encoded else None
    rows: Iterable[Any]
    try:
        source = builder.as_data_source(name, decoders=decoders)
        count, rows, get = len(source), range(len(source)), source.__getitem__
    except NotImplementedError:  # not a format of random access
        import tensorflow as tf

        tf.config.set_visible_devices([], "GPU")  # the memory is JAX's
        count = builder.info.splits[name].num_examples
        rows, get = tfds.as_numpy(builder.as_dataset(name, decoders=decoders)), lambda row: row

    def read(i: int, row: Any) -> Example:
        row = get(row)
        pixels = Image.open(io.BytesIO(row[image])) if encoded else row[image]
        owner = None if client is None else row[client]
        return Example(pixels, int(row[label]), owner.decode() if isinstance(owner, bytes) else owner)

    return Split(count, rows, read, lambda i: f"{name}[{i}]")


def _explain(config: DataConfig, what: str, error: Exception) -> ConfigError:
    if isinstance(error, ConfigError):
        return error
    name = config.name.partition(":")[2] or config.name
    if isinstance(error, ImportError) and "tensorflow" in str(error):
        return refuse(config, f"{what} without TensorFlow", f"{WITH_TENSORFLOW}, or a data set prepared by "
                      f"`tfds build {name} --overwrite --file_format=array_record`")  # fmt: skip
    reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    return refuse(config, f"{what} ({reason})", "a data set that tensorflow-datasets has prepared, or can prepare, "
                  "on this machine")  # fmt: skip
