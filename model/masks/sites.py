"""What the configuration wants at a site: learned dropout, hard-concrete gates, or no mask; and which feed forward."""

from model.config.mask_config import Site
from model.config.model_config import ModelConfig
from model.config.transformer import TransformerConfig
from model.layers.layers import FeedForward, FewerChannels
from model.masks.block_gates import BlockFeedForward
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


def feed_forward_at(config: TransformerConfig, site: Site, layer: int, std: float) -> FeedForward | BlockFeedForward:
    """The feed forward of a site; its map to the stream starts at std. `layer` counts from 0 in its stream."""
    if site in config.gate_sites:
        return BlockFeedForward(config, site, layer, std)
    if channels := config.channels_left.get(f"{site}/{layer:02d}"):
        return FewerChannels(config, std, channels)
    return FeedForward(config, std)
