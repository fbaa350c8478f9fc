"""Attention within clusters of tokens: "Efficient Content-Based Sparse Attention with Routing Transformers",
arXiv:2003.05997, section 4."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.attention.softmax import Softmax
from model.attention.visibility import Visible
from model.config.transformer import TransformerConfig


class Routing(Softmax):
    """The first heads look at a window; the others, whose keys are their queries, at tokens of the query's cluster.

    Queries of routed heads come without mean and at length sqrt(d) (`routed`). A token's cluster is that of the
    centroid most like it; balanced, each centroid takes so many tokens of the text, those most like it. A token looks
    at itself only where nothing else is to be seen: its own score would drown all others. Centroids follow the mean of
    their tokens, once a step (`move`), over all its passes that learn. Tells of each routed
    head in training: `fullest`, the share of tokens in the fullest cluster, and `empty`, that of clusters without one.
    """

    centroids: Tensor
    """[R, K, d] fp32, of length 1, of R routed heads."""
    sums: Tensor
    """[R, K, d + 1] fp32: of the tokens since the last step, by cluster, and their number."""
    counts = True

    def __init__(self, config: TransformerConfig, name: str, *, both_ways: bool) -> None:
        """Centroids start anywhere on the sphere. A stream that is not read `both_ways` is never balanced."""
        super().__init__(config, name, config.attention_rate, formed=True)
        scores = config.scores
        self.routed_heads = scores.routed_heads_of(config.heads)
        self._local = config.heads - self.routed_heads
        self._balanced = scores.assign == "balanced" and both_ways
        self._decay = scores.decay
        clusters, size = scores.clusters_at(config.context), config.width // config.heads
        self._window = scores.window or -(-config.context // clusters)
        start = torch.randn(self.routed_heads, clusters, size)
        self.register_buffer("centroids", functional.normalize(start, dim=-1))
        self.register_buffer("sums", torch.zeros(self.routed_heads, clusters, size + 1), persistent=False)

    def routed(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [B, T, C] and keys of the local heads -> queries and keys of all heads, [B, T, C]."""
        local, routed = query.split([key.shape[-1], query.shape[-1] - key.shape[-1]], dim=-1)
        size = query.shape[-1] // (self._local + self.routed_heads)
        routed = functional.layer_norm(routed.unflatten(-1, (self.routed_heads, size)), (size,)).flatten(-2)
        return torch.cat([local, routed], dim=-1), torch.cat([key, routed], dim=-1)

    @torch.no_grad()
    def move(self, sums: Tensor) -> None:
        """After a step: centroids by the `sums` of all ranks; one without a token stays. This rank's begin anew."""
        total, number = sums[..., :-1], sums[..., -1:]
        moved = self._decay * self.centroids + (1 - self._decay) * total / number.clamp(min=1.0)
        self.centroids.copy_(torch.where(number > 0, functional.normalize(moved, dim=-1), self.centroids))
        self.sums.zero_()

    def _formed(self, query: Tensor, key: Tensor, keys: Tensor | None, visible: Visible) -> Tensor:
        scores = self._masked(self._scores(query, key, visible), visible)
        seen = scores.detach() > -torch.inf
        distance = _distance(visible, scores.shape[2], scores.device)
        near = seen[:, : self._local] & (distance < self._window)
        # A pass that teaches nothing, such as the first look at a draft, moves no centroid.
        learns = keys is not None and torch.is_grad_enabled()
        alike = self._alike(query[:, self._local :].detach(), key[:, self._local :].detach(), visible, learns)
        others = seen[:, self._local :] & alike & (distance > 0)
        alone = ~others.any(-1, keepdim=True)
        among = others | (seen[:, self._local :] & (distance == 0) & alone)
        scores = scores.masked_fill(~torch.cat([near, among], dim=1), -torch.inf)
        return self._normalised(scores, keys, visible)

    @torch.no_grad()
    def _alike(self, query: Tensor, key: Tensor, visible: Visible, training: bool) -> Tensor:
        """[B, R, T, S] bool: in one cluster. In training their tokens are counted in."""
        likeness = self._likeness(key)
        own = likeness.argmax(-1)
        if training:
            self._count(key, own, visible)
        if not self._balanced:
            of_queries = own if query is key or query.shape == key.shape else self._likeness(query).argmax(-1)
            return of_queries[..., None] == own[..., None, :]
        member = _members(likeness, visible.padding)
        return member @ member.transpose(2, 3) > 0

    def _likeness(self, x: Tensor) -> Tensor:
        """[B, R, T, d] -> [B, R, T, K]; all are of one length, so the angle alone counts."""
        return x.to(self.centroids.dtype) @ self.centroids.transpose(1, 2)

    def _count(self, key: Tensor, own: Tensor, visible: Visible) -> None:
        clusters = self.centroids.shape[1]
        vectors = functional.pad(functional.normalize(key.to(self.sums.dtype), dim=-1), (0, 1), value=1.0)
        if visible.padding is not None:
            vectors = vectors.masked_fill(visible.padding[:, None, :, None], 0.0)
        at = own + clusters * torch.arange(self.routed_heads, device=own.device)[:, None]
        sizes = torch.zeros_like(self.sums).view(-1, vectors.shape[-1])
        sizes.index_add_(0, at.flatten(), vectors.flatten(0, 2))
        self.sums.add_(sizes.view_as(self.sums))
        shares = sizes.view_as(self.sums)[..., -1]
        shares = shares / shares.sum(-1, keepdim=True)
        told = zip(shares.amax(-1), (shares == 0).float().mean(-1), strict=True)
        self._told = {f"{self.name}/h{self._local + n}": {"fullest": f, "empty": e} for n, (f, e) in enumerate(told)}


def routings(model: nn.Module) -> list[Routing]:
    """All of a model."""
    return [module for module in model.modules() if isinstance(module, Routing)]


def _members(likeness: Tensor, padding: Tensor | None) -> Tensor:
    """Of likeness [B, R, T, K], 1 where a token is among the T / K that are most like a centroid, T without padding."""
    length, clusters = likeness.shape[2:]
    if padding is None:
        taken = likeness.topk(max(1, length // clusters), dim=2).indices
        return torch.zeros_like(likeness).scatter_(2, taken, 1.0)
    likeness = likeness.masked_fill(padding[:, None, :, None], -torch.inf)
    places = likeness.argsort(dim=2, descending=True).argsort(dim=2)
    sizes = ((~padding).sum(1) // clusters).clamp(min=1)
    return (places < sizes[:, None, None, None]).to(likeness.dtype)


def _distance(visible: Visible, length: int, device: torch.device) -> Tensor:
    """[B, 1, T, S] between queries and keys of a text; 0 is the token itself."""
    queries = torch.arange(length, device=device)[None] if visible.positions is None else visible.positions
    keys = queries if visible.key_positions is None else visible.key_positions
    return (queries[:, None, :, None] - keys[:, None, None, :]).abs()
