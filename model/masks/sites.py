"""What the configuration wants at a site: learned dropout, hard-concrete gates, or no mask."""

from model.config.mask_config import Site
from model.config.model_config import ModelConfig
from model.config.transformer import TransformerConfig
from model.masks.hard_concrete import HardConcreteGates
from model.masks.learned_dropout import LearnedDropout
from model.masks.site import SiteDropout


def dropout_at(config: ModelConfig, site: Site, layer: int) -> SiteDropout:
    """The module of a site; `layer` counts from 0 in its stream."""
    if not isinstance(config, TransformerConfig):
        return SiteDropout(config, site, layer)
    if site in config.dropout_sites:
        return LearnedDropout(config, site, layer)
    if site in config.l0_sites:
        return HardConcreteGates(config, site, layer)
    return SiteDropout(config, site, layer)
