"""A small GPT over bytes in plain PyTorch. It knows nothing of data parallelism or dpcomm.

No dropout: with equal seeds and equal batches two runs differ only by how their gradients were averaged.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 256  # one token is one byte


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """Size of the model: the defaults give 3.3 million parameters."""

    layers: int = 4
    width: int = 256
    heads: int = 4
    context: int = 128


class Block(nn.Module):
    """One pre-norm transformer layer: causal self-attention, then a feed-forward network of four times the width."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.norm_attention = nn.LayerNorm(shape.width)
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.project = nn.Linear(shape.width, shape.width)
        self.norm_feed = nn.LayerNorm(shape.width)
        self.widen = nn.Linear(shape.width, 4 * shape.width)
        self.narrow = nn.Linear(4 * shape.width, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [batch, time, width] to the same shape."""
        batch, time, width = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(batch, time, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(attended.transpose(1, 2).reshape(batch, time, width))
        feed: Tensor = self.narrow(F.gelu(self.widen(self.norm_feed(x))))
        return x + feed


class GPT(nn.Module):
    """Predicts the next byte. Input embedding and output layer share one weight."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, shape.width)
        self.positions = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, VOCABULARY, bias=False)
        self.apply(_initialise)
        self.head.weight = self.tokens.weight

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy (nats per byte) of targets [batch, time] given inputs [batch, time], both int64."""
        x = self.tokens(inputs) + self.positions.weight[: inputs.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def count_parameters(model: nn.Module) -> int:
    """Number of parameters; a shared weight counts once."""
    return sum(p.numel() for p in model.parameters())


def seeded_model(shape: ModelShape, seed: int) -> GPT:
    """A model whose initial weights depend on the seed only."""
    torch.manual_seed(seed)
    return GPT(shape)
