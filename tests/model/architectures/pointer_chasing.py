"""Pointer chasing: whether a step of refinement becomes an operator that is taken as often as there are hops.

A text is a start a and the pairs (x, f(x)) of a permutation f of six symbols, in random order. After step k the answer
is read at a's place: f applied k times to a. Only the step is trained, with the tables: no encoder, no decoder.

    python -m tests.model.architectures.pointer_chasing [SEED …]
"""

import sys

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.architectures.refined.step import Refiner
from model.attention.visibility import Visible
from model.layers.layers import Linear
from tests.model.helpers import small

SYMBOLS, WIDTH = 6, 64
STEPS, BATCH, LEARNING_RATE, WARM_UP = 450, 64, 2e-3, 50
LATER = 6
"""Steps after which the answer is asked; three are trained at most."""
ARMS: dict[str, tuple[int, bool]] = {
    "K 3, every step supervised": (3, True),
    "K 1": (1, True),
    "K 3, the last step supervised": (3, False),
}


class Chaser(nn.Module):
    """Tables around a step: a pair stands in one place, x as it is and f(x) turned by a place."""

    def __init__(self, reweight: bool) -> None:
        super().__init__()
        config = small(
            "refined",
            layers=1,
            width=WIDTH,
            heads=4,
            learned_dropout={"enabled": False},
            refine={"form": "prefix", "steps": 3, "reweight": reweight},
        )
        self.symbols, self.places = nn.Embedding(SYMBOLS, WIDTH), nn.Embedding(1 + SYMBOLS, WIDTH)
        self.answers = nn.Embedding(SYMBOLS, WIDTH)
        self.role = nn.Parameter(0.1 * torch.randn(WIDTH))
        self.step, self.norm = Refiner(config), nn.LayerNorm(WIDTH, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:  # a start of N(0, 0.02) learns nothing here in so few steps
                nn.init.normal_(parameter, std=WIDTH**-0.5)
        for written in (self.step.layer.attention.out, self.step.layer.ff.down):
            assert isinstance(written, Linear)
            nn.init.normal_(written.weight, std=WIDTH**-0.5 / 2)

    def forward(self, starts: Tensor, pairs: Tensor, steps: int) -> list[Tensor]:
        """Starts [B], pairs [B, 6, 2] -> after each step the logits of the answer [B, 6]."""
        turned = (self.symbols(pairs[..., 1]) + self.role).roll(1, dims=-1)
        x = torch.cat([self.symbols(starts)[:, None], self.symbols(pairs[..., 0]) + turned], dim=1)
        x = x + self.places.weight
        visible = Visible(causal=False, mask=torch.ones(1, 1, 1 + SYMBOLS, 1 + SYMBOLS, dtype=torch.bool))
        found = []
        for _ in range(steps):
            x, _ = self.step(x, None, None, visible, starts, None)
            found.append(self.norm(x[:, 0]) @ self.answers.weight.T)
        return found


def sample(rows: int, steps: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Starts, pairs, and the answer after each step."""
    chased, order = torch.rand(rows, SYMBOLS).argsort(1), torch.rand(rows, SYMBOLS).argsort(1)
    answer = start = torch.randint(SYMBOLS, (rows,))
    answers = []
    for _ in range(steps):
        answer = chased.gather(1, answer[:, None])[:, 0]
        answers.append(answer)
    return start, torch.stack([order, chased.gather(1, order)], dim=-1), answers


def accuracy(steps: int, every: bool, seed: int, reweight: bool = False) -> list[float]:
    """Train with so many steps, supervised at each or at the last one; then the share of right answers after 1 to 6."""
    torch.manual_seed(seed)
    model = Chaser(reweight)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(STEPS):
        curve = 0.1 + 0.45 * (1.0 + torch.cos(torch.tensor(torch.pi * step / STEPS)).item())
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARM_UP) * curve
        starts, pairs, answers = sample(BATCH, steps)
        losses = [functional.cross_entropy(*one) for one in zip(model(starts, pairs, steps), answers, strict=True)]
        loss = sum(losses, torch.zeros(())) / steps if every else losses[-1]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        starts, pairs, answers = sample(2000, LATER)
        found = model(starts, pairs, LATER)
    return [(one.argmax(-1) == other).double().mean().item() for one, other in zip(found, answers, strict=True)]


if __name__ == "__main__":
    for seed in map(int, sys.argv[1:] or ["1", "2", "3"]):
        for arm, (steps, every) in ARMS.items():
            print(f"seed {seed}  {arm:<30}", *(f"{share:.3f}" for share in accuracy(steps, every, seed)), flush=True)
