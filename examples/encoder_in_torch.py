"""Loads the ViT encoder of a finished run in timm and compares its features with those of load_encoder.

    pip install -e ".[torch]"
    python examples/encoder_in_torch.py runs/mine

The argument is the run's work directory. For a ResNet-18, docs/encoder.md shows the same with torchvision.
"""

import json
import sys
from pathlib import Path

import numpy as np


def main(directory):
    """Build timm's model from encoder.json, load encoder.safetensors, and compare both encoders on random images."""
    try:
        import timm
        import torch
    except ImportError as error:
        sys.exit(f'{error.name} is not installed; accepted: pip install -e ".[torch]"')
    import lwfedssl_jax as lw

    about = json.loads((directory / "encoder.json").read_text())
    if "timm" not in about:
        sys.exit(f"{directory} contains a ResNet-18; accepted: a run with a ViT, or torchvision as in docs/encoder.md")
    channels, height, width = about["input_size"]
    images = np.random.default_rng(0).integers(0, 256, (8, height, width, channels), dtype=np.uint8)

    model = timm.create_model(**about["timm"], checkpoint_path=str(directory / "encoder.safetensors")).eval()
    x = (torch.tensor(images) / 255 - torch.tensor(about["mean"])) / torch.tensor(about["std"])
    with torch.no_grad():
        features = model(x.movedim(-1, 1)).numpy()

    difference = np.abs(features - lw.load_encoder(directory)(images)).max()
    print(f"{len(features)} images, {features.shape[1]} features each; largest difference to JAX: {difference:.1e}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("expected one argument; accepted: the work directory of a finished run, such as runs/mine")
    main(Path(sys.argv[1]))
