"""Block gates: a feed forward that computes, of its hidden units, the blocks that each token opens (docs/gates.md).

As learned dropout it switches off parts of an update, token by token; but a gate is computed from what the feed forward
reads, not from what it gives, so that closed blocks need not be computed.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.attention.cache import Cached
from model.attention.means import mean
from model.attention.visibility import CAUSAL, Visible
from model.config.mask_config import Site
from model.config.transformer import TransformerConfig
from model.layers.block_forms import Blocks, all_blocks, blocks_of_one, open_blocks
from model.layers.block_sizes import pays
from model.layers.dropout import noise_site
from model.layers.layers import INIT_STD
from model.layers.noise import uniform
from model.masks.learned_dropout import at_least_fp32, cosine_mask, straight_through
from model.masks.penalties import entropy
from model.masks.site import Statistics
from model.masks.telemetry import mask_statistics

BLOCK_PENALTY = "block_penalty"
"""The statistic that is added to the loss as it is."""


class Gates(NamedTuple):
    """Of G blocks, for each token. In fp32 at least."""

    mask: Tensor
    """[B, T, G] in [0, 1]."""
    opened: Tensor
    """[B, T, G] bool."""
    weights: Tensor
    """[B, T, G]: what a block's update is multiplied by, 0 where it is closed."""


class BlockFeedForward(Cached):
    """C -> F -> C in G blocks of F / G hidden units. The module owns all weights, so that ZeRO-3 gathers them with it.

    With m in [0, 1] from a linear map of x, in fp32:

        top       the k blocks of the largest m = sigmoid(angle) are open and weigh 2 m
        cosine    m = 0.5 cos(angle) + 0.5; a block is open where u < m, u uniform, in evaluation where m >= 0.5, and
                  weighs 1; the gradient with respect to m is that with respect to the weight (straight-through)
    """

    multiplier: Tensor
    """0-d fp32, of `cosine`: see `ascend`."""
    sides: list[Tensor] | None = None
    """While it is a list, each forward pass adds which blocks are open: [B, T, G] bool, or, where there is padding,
    [tokens, G]."""
    sparse = False
    """`cosine`: training, too, computes open blocks only."""

    def __init__(self, config: TransformerConfig, site: Site, layer: int, std: float) -> None:
        """`layer` counts from 0 in its stream; the map that writes to the stream starts at std."""
        super().__init__()
        self.name = f"{site}/{layer:02d}"
        self.config = config.block_gates
        self._noise_site = noise_site(f"gates/{self.name}")
        self._activation = config.ff
        self._block_width = config.block_width
        self.blocks = config.blocks_at(site, layer)
        hidden = self.blocks * self._block_width
        outputs = 2 * hidden if config.ff == "swiglu" else hidden
        self.up = nn.Parameter(torch.empty(outputs, config.width).normal_(std=INIT_STD))
        self.down = nn.Parameter(torch.empty(hidden, config.width).normal_(std=std))
        self.up_bias = nn.Parameter(torch.zeros(outputs)) if config.bias else None
        self.down_bias = nn.Parameter(torch.zeros(config.width)) if config.bias else None
        self.gate = nn.Parameter(torch.empty(self.blocks, config.width).normal_(std=self.config.std))
        start = self.config.shift_init if self.config.kind == "cosine" else 0.0
        self.gate_bias = nn.Parameter(torch.full((self.blocks,), start))
        if self.config.kind == "cosine":
            self.register_buffer("multiplier", torch.zeros(()))

    def forward(self, x: Tensor, keys: Tensor | None, visible: Visible = CAUSAL) -> tuple[Tensor, Statistics]:
        """What the feed forward adds to the stream [B, T, C] that it reads as x, and what is told of its gates.

        Args:
            keys: [B] int64, which key the noise of training; None asks for evaluation.
            visible: says where padding is.
        """
        gates = self.gates(x, keys, visible.first)
        if self.sides is not None:
            self.sides.append(gates.opened if visible.padding is None else gates.opened[~visible.padding])
        weights, opened = gates.weights.to(x.dtype).flatten(0, 1), gates.opened.flatten(0, 1)
        rows = x.flatten(0, 1)
        if not self._open_only(rows, keys):
            update = all_blocks(rows, weights, self._maps())
        elif len(rows) == 1 and not torch.is_grad_enabled():
            update = blocks_of_one(rows, weights, opened, self._maps())
        else:
            update = open_blocks(rows, weights, opened, self._maps())
        update = update.view_as(x) if self.down_bias is None else update.view_as(x) + self.down_bias
        return update, {self.name: self._statistics(gates, visible)} if self.cache is None else {}

    def gates(self, x: Tensor, keys: Tensor | None = None, first: int = 0) -> Gates:
        """Of tokens x [B, T, C], from column `first` of their rows; each token's are its own, so they are causal."""
        bias = at_least_fp32(self.gate_bias)
        angle = functional.linear(x.to(bias.dtype), self.gate.to(bias.dtype), bias)
        if self.config.kind == "top":
            mask = angle.sigmoid()
            chosen = angle.detach().topk(self.config.num_open, dim=-1).indices
            opened = torch.zeros_like(angle, dtype=torch.bool).scatter(-1, chosen, True)
            return Gates(mask, opened, 2.0 * mask * opened)
        mask = cosine_mask(angle)
        shape = (x.shape[1], self.blocks)
        opened = mask >= 0.5 if keys is None else uniform(keys, self._noise_site, shape, first) < mask
        return Gates(mask, opened, straight_through(opened.to(mask.dtype), mask))

    @torch.no_grad()
    def ascend(self, mask_mean: Tensor) -> None:
        """Move the multiplier λ of this feed forward's constraint, that the mean of m is the density (dual ascent).

        λ <- max(0, λ + rate (mean - density)), after a step whose mean over all tokens was `mask_mean`, 0-d.
        """
        self.multiplier.add_(self.config.dual_rate * (mask_mean - self.config.density)).clamp_(min=0.0)

    def _open_only(self, rows: Tensor, keys: Tensor | None) -> bool:
        """Whether closed blocks are left out."""
        needs_all = self.config.kind == "cosine" and keys is not None and not self.sparse
        if needs_all or torch.compiler.is_compiling():  # which takes fixed shapes
            return False
        return pays(rows.shape[0], rows.shape[1], self._block_width, cuda=rows.is_cuda)

    def _maps(self) -> Blocks:
        bias = None if self.up_bias is None else self.up_bias.view(self.blocks, -1)
        width = self.up.shape[1]
        up, down = self.up.view(self.blocks, -1, width), self.down.view(self.blocks, -1, width)
        return Blocks(up, bias, down, self._activation)

    def _statistics(self, gates: Gates, visible: Visible) -> dict[str, Tensor]:
        """`block_entropy` and `block_penalty`, as penalised, carry gradients."""
        found = mask_statistics(gates.mask.detach(), gates.opened, visible)
        if self.config.kind == "cosine":
            excess = mean(gates.mask, visible) - self.config.density
            found[BLOCK_PENALTY] = self.multiplier * excess
            found["block_entropy"] = entropy(gates.mask, self.config.entropy.kind, visible)
            found["multiplier"] = self.multiplier.clone()
        return found


def block_gates(model: nn.Module) -> list[BlockFeedForward]:
    """All of a model."""
    return [module for module in model.modules() if isinstance(module, BlockFeedForward)]
