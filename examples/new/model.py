"""An encoder of your own: a Flax module with a list of layers. This one is an MLP-Mixer (arXiv 2105.01601)."""

import flax.linen as nn

from lwfedssl_jax.models.layered import add_model


class MixerLayer(nn.Module):
    """Mixes the patches of each channel, then the channels of each patch; BxPxD to BxPxD."""

    @nn.compact
    def __call__(self, x):
        patches, width = x.shape[1:]
        y = nn.LayerNorm()(x).swapaxes(1, 2)
        x = x + nn.Dense(patches)(nn.gelu(nn.Dense(2 * patches)(y))).swapaxes(1, 2)
        y = nn.LayerNorm()(x)
        return x + nn.Dense(width)(nn.gelu(nn.Dense(4 * width)(y)))


class Mixer(nn.Module):
    """Width, depth and patch size come from the config's section ``model``."""

    width: int
    depth: int
    patch_size: int

    def setup(self):
        self.embedding = nn.Dense(self.width)
        self.layers = [MixerLayer() for _ in range(self.depth)]  # a stage adds one, or strategy.layers_per_stage
        self.norm = nn.LayerNorm()

    def stem(self, images):
        """From images BxHxWxC to what the first layer takes; it belongs to layer 1."""
        b, h, w, c = images.shape
        p = self.patch_size
        x = images.reshape(b, h // p, p, w // p, p, c).swapaxes(2, 3)
        return self.embedding(x.reshape(b, -1, p * p * c))

    def pool(self, x):
        """From what the last layer gives to features BxD; it is trained in every stage."""
        return self.norm(x).mean(1)


add_model("my_mixer", Mixer, width=64, depth=4, patch_size=4)
