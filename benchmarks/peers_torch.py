"""The same work in plain PyTorch, written to be fast: the rival of ``peers.py``.

Same encoder, heads, loss, views, batches and optimizer as ours (SimCLR). The frozen prefix runs once, without
gradients, on both views together; a client's parameters are copied in place and added to the average in place;
attention and AdamW are PyTorch's fused ones.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


class Block(nn.Module):
    """Pre-norm transformer block."""

    fused = True  # attention; the fused one has no batching rule for torch.func.vmap

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, p, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(b, p, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = torch.softmax((q * (d // self.heads) ** -0.5) @ k.mT, -1) @ v
        x = x + self.proj(mixed.transpose(1, 2).reshape(b, p, d))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Model(nn.Module):
    """ViT and SimCLR's projection head, of ``depth`` blocks of which the last ``trained`` are trained."""

    def __init__(
        self, size: int, patch: int, width: int, depth: int, heads: int, trained: int, hidden: int, output: int
    ):
        super().__init__()
        self.patch, self.frozen = patch, depth - trained
        self.embedding = nn.Linear(3 * patch * patch, width)
        self.position = nn.Parameter(0.02 * torch.randn((size // patch) ** 2, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Sequential(
            nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden, track_running_stats=False), nn.ReLU(),
            nn.Linear(hidden, hidden, bias=False), nn.BatchNorm1d(hidden, track_running_stats=False), nn.ReLU(),
            nn.Linear(hidden, output, bias=False),
        )  # fmt: skip

    def trainable(self) -> Iterator[nn.Parameter]:
        """Parameters that a client trains."""
        if not self.frozen:
            yield from (self.embedding.weight, self.embedding.bias, self.position)
        for block in self.blocks[self.frozen :]:
            yield from block.parameters()
        yield from self.norm.parameters()
        yield from self.head.parameters()

    def embed(self, views: Tensor) -> Tensor:
        """Channels-last images to tokens."""
        b, h, w, c = views.shape
        p = self.patch
        x = views.reshape(b, h // p, p, w // p, p, c).permute(0, 1, 3, 2, 4, 5).reshape(b, -1, p * p * c)
        return self.embedding(x) + self.position

    def forward(self, views_2xBxHxWxC: Tensor) -> Tensor:
        x = views_2xBxHxWxC.flatten(0, 1)
        if self.frozen:
            with torch.no_grad():
                x = self.embed(x)
                for block in self.blocks[: self.frozen]:
                    x = block(x)
        else:
            x = self.embed(x)
        for block in self.blocks[self.frozen :]:
            x = block(x)
        features = self.norm(x).mean(1).unflatten(0, (2, -1))
        return torch.stack([self.head(view) for view in features])


def simclr_loss(z_2xBxD: Tensor, temperature: float) -> Tensor:
    """NT-Xent."""
    z = F.normalize(z_2xBxD.flatten(0, 1), dim=-1)
    logits = (z @ z.T / temperature).fill_diagonal_(float("-inf"))
    b = len(z) // 2
    return F.cross_entropy(logits, (torch.arange(2 * b, device=z.device) + b) % (2 * b))


def loss_of(model: Model, images: Tensor, temperature: float) -> Callable[[Tensor], Tensor]:
    """The loss of a batch, given by its rows of ``images``."""
    return lambda rows: simclr_loss(model(two_views(images[rows])), temperature)


def train_round(
    model: Model, state: list[Tensor], clients: list[Tensor], rate: float, loss: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """One round: every client's steps (``TxB`` indices of images), one client after the other, and the average."""
    parameters = list(model.trainable())
    total = [torch.zeros_like(p) for p in parameters]
    examples = 0
    for batches in clients:
        train_client(parameters, state, batches, rate, loss)
        with torch.no_grad():
            torch._foreach_add_(total, parameters, alpha=batches.numel())
        examples += batches.numel()
    return [t / examples for t in total]


def train_client(
    parameters: list[nn.Parameter], state: list[Tensor], batches: Tensor, rate: float, loss: Callable[[Tensor], Tensor]
) -> None:
    """A client's local steps, from the global ``state``."""
    with torch.no_grad():
        torch._foreach_copy_(parameters, state)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=1e-5, fused=True)
    for rows in batches:
        value = loss(rows)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()


@torch.no_grad()
def two_views(images_BxHxWxC: Tensor) -> Tensor:
    """Our ``natural`` recipe (MoCo-v3's views) on a whole batch: ``2xBxHxWxC``, normalised."""
    b, h, w, _ = images_BxHxWxC.shape
    device = images_BxHxWxC.device
    x = (images_BxHxWxC.float() / 255).repeat(2, 1, 1, 1)
    n = 2 * b
    u = torch.rand(16, n, device=device)
    pixels = h * w * (0.08 + 0.92 * u[0])
    aspect = 0.75 * (16 / 9) ** u[1]
    height, width = (pixels / aspect).sqrt().clamp(max=h), (pixels * aspect).sqrt().clamp(max=w)
    top, left = u[2] * (h - height), u[3] * (w - width)
    flip = torch.where(u[4] < 0.5, -1.0, 1.0)
    zero = torch.zeros_like(flip)
    theta = torch.stack(
        [
            torch.stack([flip * width / w, zero, (2 * left + width) / w - 1], -1),
            torch.stack([zero, height / h, (2 * top + height) / h - 1], -1),
        ],
        1,
    )
    grid = F.affine_grid(theta, [n, 3, h, w], align_corners=False)
    x = F.grid_sample(x.permute(0, 3, 1, 2), grid, padding_mode="border", align_corners=False)

    around = lambda centre, reach, u: (centre - reach + 2 * reach * u).view(n, 1, 1, 1)  # noqa: E731
    gray = lambda x: 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:3]  # noqa: E731
    jittered = (x * around(1, 0.4, u[5])).clamp(0, 1)
    factor = around(1, 0.4, u[6])
    jittered = (factor * jittered + (1 - factor) * gray(jittered).mean((1, 2, 3), keepdim=True)).clamp(0, 1)
    factor = around(1, 0.2, u[7])
    jittered = (factor * jittered + (1 - factor) * gray(jittered)).clamp(0, 1)
    jittered = shift_hue(jittered, around(0, 0.1, u[8])[:, 0])
    choose = lambda p, a, b: torch.where((u[p[0]] < p[1]).view(n, 1, 1, 1), a, b)  # noqa: E731
    x = choose((9, 0.8), jittered, x)
    x = choose((10, 0.2), gray(x).expand_as(x), x)

    sigma = (0.1 + 1.9 * u[11]).view(n, 1, 1)
    i = torch.arange(h, dtype=torch.float32, device=device)
    weights = torch.exp(-0.5 * ((i[:, None] - i[None, :]) / sigma) ** 2)
    weights = (weights / weights.sum(-1, keepdim=True))[:, None]
    blur_probability = torch.cat([torch.ones(b, device=device), torch.full((b,), 0.1, device=device)])
    x = torch.where((u[12] < blur_probability).view(n, 1, 1, 1), weights @ x @ weights.mT, x)
    solarize_probability = torch.cat([torch.zeros(b, device=device), torch.full((b,), 0.2, device=device)])
    x = torch.where((u[13] < solarize_probability).view(n, 1, 1, 1) & (x >= 128 / 255), 1 - x, x)
    return ((x - 0.5) / 0.25).permute(0, 2, 3, 1).unflatten(0, (2, b))


def shift_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Hue shifted by ``turns`` of the colour wheel, saturation and value of HSV kept."""
    value, low = x.amax(1), x.amin(1)
    chroma = value - low
    safe = torch.where(chroma > 0, chroma, 1)
    r, g, b = x.unbind(1)
    sextant = torch.where(value == r, (g - b) / safe, torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    hue = sextant / 6 + turns
    out = []
    for offset in (5, 3, 1):
        turn = hue + offset / 6
        k = 6 * (turn - turn.floor())
        out.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(out, 1)
