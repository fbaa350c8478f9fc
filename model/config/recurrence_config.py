"""What applying a stack of layers several times can be told: how often, and when a token has had enough. Free of torch.

"Universal Transformers" (Dehghani et al. 2019) and "Adaptive Computation Time" (Graves 2016); docs/model.md A13.
"""

from typing import Literal

from pydantic import BaseModel, Field, model_validator

from model.config.mask_config import PenaltyConfig


class PonderConfig(PenaltyConfig, frozen=True):
    """Penalty on the steps that a token takes. Starts late: from step 0 on tokens halt before depth is of use."""

    weight: float = Field(default=0.001, ge=0.0)
    """Factor of the mean over tokens of steps and remainder, from the end of the ramp on."""
    start_step: int = Field(default=1000, ge=0)
    """First step of training at which the term counts."""
    ramp_steps: int = Field(default=1000, ge=0)
    """Steps of linear rise; 0 switches the whole weight on at `start_step`."""


class RecurrenceConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """The stack of layers applied several times with the same weights (docs/model.md A13)."""

    steps: int = Field(default=1, ge=1, le=64)
    """How often; 1 is an ordinary model. Parameters do not depend on it, but for `step_embedding`."""
    step_embedding: Literal["learned", "sinusoidal", "none"] = "learned"
    """What is added to each stream before a step, so that steps differ: a vector of a table, or sines of the step."""
    halt: bool = False
    """Each token takes as many steps as it wants, `steps` at most: adaptive computation time."""
    epsilon: float = Field(default=0.01, gt=0.0, lt=1.0)
    """A token halts once its halting probabilities sum to 1 - epsilon."""
    halt_bias: float = Field(default=-1.0, ge=-10.0, le=10.0)
    """Start of the halting unit's bias: -1 takes 4 steps at first, if there are as many, and 1 takes 2."""
    ponder: PonderConfig = PonderConfig()

    @property
    def marks(self) -> bool:
        """A step begins with other vectors than the one before gave."""
        return self.steps > 1 and (self.halt or self.step_embedding != "none")

    @model_validator(mode="after")
    def _options_are_of_use(self) -> "RecurrenceConfig":
        if self.halt and self.steps == 1:
            raise ValueError("recurrence.halt chooses among steps, and recurrence.steps=1; take more, such as 6")
        if not self.halt:
            default = RecurrenceConfig.model_fields
            for key in ("epsilon", "halt_bias", "ponder"):
                if getattr(self, key) != default[key].default:
                    raise ValueError(f"recurrence.{key} is about halt=true; leave it out")
        return self
