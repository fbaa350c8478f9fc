"""A loss that holds the encoder's output against the running mean of the embedded tokens (docs/model.md A7)."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.architectures.parallel_encoder_decoder.spec import ParallelEncoderDecoderConfig
from model.attention.means import mean
from model.attention.visibility import CAUSAL, Visible
from model.masks.telemetry import MOMENTS, moments

_EPS = 1e-6


class EncoderLoss(nn.Module):
    """Mean distance between a_t, the mean of the embedded tokens up to t, and z_t, the encoder's output at t.

    Without trainable norms (the default) neither side can shrink. No parameters then.
    """

    def __init__(self, config: ParallelEncoderDecoderConfig) -> None:
        """`config.encoder_loss.kind` is not `none`."""
        super().__init__()
        self._config = loss = config.encoder_loss

        def norm() -> nn.LayerNorm:
            return nn.LayerNorm(config.width, eps=1e-5, elementwise_affine=loss.affine)

        # Trainable norms have biases even where the model has none, as published.
        self.embedding_norm = nn.Identity() if loss.embedding_norm == "none" else norm()
        self.output_norm = norm() if loss.output_norm else nn.Identity()

    def forward(self, embedded: Tensor, output: Tensor, visible: Visible = CAUSAL) -> dict[str, Tensor]:
        """Compare the embedded tokens with the encoder's output, both [B, T, C].

        `visible` says where padding is, and which place each token has in its document, at whose start the running
        mean begins anew.

        Returns:
            `encoder_loss`, 0-d float32, without its weight, and the `telemetry.moments` of both sides of the
            comparison, `encoder_loss_embedding_moments` and `encoder_loss_output_moments`: of these `telemetry.told`
            makes `…_std`, which goes to 0 when a side shrinks, and `…_spread`, which does when all tokens become alike.
        """
        positions = visible.positions
        detach, norm = self._config.detach, self._config.embedding_norm
        embedded = embedded.detach() if detach == "embedding" else embedded
        output = output.detach() if detach == "encoder_output" else output
        if norm == "embedding":
            embedded = self.embedding_norm(embedded)
        # A running sum in bf16 would lose the later tokens.
        exact = torch.promote_types(embedded.dtype, torch.float32)
        places = torch.arange(embedded.shape[1], device=embedded.device)
        total = embedded.to(exact).cumsum(dim=1)
        if positions is not None:
            before = functional.pad(total, (0, 0, 1, 0))  # [B, T + 1, C]: of the tokens before each
            starts = (places - positions)[..., None].expand_as(total)
            total, places = total - before.gather(1, starts), positions
        average = total / (places + 1)[..., None]
        if norm == "average":
            average = self.embedding_norm(average.to(embedded.dtype)).to(exact)
        target = self.output_norm(output).to(exact)
        return {
            "encoder_loss": self._distance(average, target, visible),
            f"encoder_loss_embedding{MOMENTS}": moments(average, visible),
            f"encoder_loss_output{MOMENTS}": moments(target, visible),
        }

    def _distance(self, average: Tensor, target: Tensor, visible: Visible) -> Tensor:
        if self._config.kind == "mse":
            if visible.padding is None:  # in one go, which rounds otherwise
                return functional.mse_loss(average, target)
            return mean(functional.mse_loss(average, target, reduction="none"), visible)
        likeness = (functional.cosine_similarity(average, target, dim=-1) + 1.0) / 2.0
        distance = 1.0 - likeness if self._config.kind == "cosine" else -likeness.clamp(min=_EPS).log()
        return mean(distance, visible)
