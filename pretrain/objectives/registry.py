"""The objectives by name. Free of torch and numpy: login nodes read this."""

from typing import Annotated

from pydantic import AfterValidator

from pretrain.objectives.causal import Causal
from pretrain.objectives.continuation import NextChunk
from pretrain.objectives.conversations import Conversations
from pretrain.objectives.labels import Labels
from pretrain.objectives.masked import Masked
from pretrain.objectives.objective import Objective
from pretrain.objectives.pairs import Pairs
from pretrain.objectives.permutation import RandomOrder
from pretrain.objectives.prefix import Prefix
from pretrain.objectives.span_corruption import SpanCorruption

_ALL: tuple[type[Objective], ...] = (
    *(Causal, Prefix, Masked, SpanCorruption, Pairs, NextChunk, Conversations, RandomOrder, Labels),
)
OBJECTIVES = {objective.name: objective for objective in _ALL}


def objective_of(name: str) -> type[Objective]:
    """The one that `data.objective` names. Raises ValueError if there is none."""
    if name not in OBJECTIVES:
        raise ValueError(f"data.objective={name}: no such objective; there are {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]


def _known(name: str) -> str:
    return objective_of(name).name


ObjectiveName = Annotated[str, AfterValidator(_known)]
"""Of a field: it names one."""
