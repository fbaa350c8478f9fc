"""Attention within clusters of tokens: "Efficient Content-Based Sparse Attention with Routing Transformers",
arXiv:2003.05997, section 4."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.attention.cache import Cached
from model.attention.forms import Gathered
from model.attention.rule import Rows
from model.attention.softmax import Softmax, plain
from model.attention.visibility import Visible
from model.config.pattern_config import Pattern
from model.config.transformer import TransformerConfig

_UNIT = 2**24
"""Parts of a vector's length that are counted: sums of whole numbers are the same in any order, on any ranks."""


class Routing(Softmax, Cached):
    """The first heads look at a window; the others, whose keys are their queries, at tokens of the query's cluster.

    Queries of routed heads come without mean and at length sqrt(d) (`routed`). A token's cluster is that of the
    centroid most like it; balanced, each centroid takes so many tokens of the text, those most like it. A token looks
    at itself only where nothing else is to be seen: its own score would drown all others. With a `cluster_window` it
    looks at the last so many of its cluster, and a long text is sorted by cluster, so that no T x T scores are formed.
    A cache keeps the cluster of each token. Centroids follow the mean of
    their tokens, once a step (`move`), over all its passes that learn. Tells of each routed
    head in training: `fullest`, the share of tokens in the fullest cluster, `empty`, that of clusters without one, and
    `dropped`, that of the pairs in a cluster which its window leaves out.
    """

    centroids: Tensor
    """[R, K, d] fp32, of length 1, of R routed heads."""
    sums: Tensor
    """[R, K, d + 1] int64: of the tokens since the last step, by cluster, in parts of a unit, and their number."""
    counts = True

    def __init__(self, config: TransformerConfig, name: str, *, both_ways: bool) -> None:
        """Centroids start anywhere on the sphere. A stream that is not read `both_ways` is never balanced."""
        super().__init__(config, name, config.attention_rate, formed=True)
        scores = self._options = config.scores
        self.routed_heads = scores.routed_heads_of(config.heads)
        self._local = config.heads - self.routed_heads
        self._balanced = scores.assign == "balanced" and both_ways
        self._decay = scores.decay
        self._nearest, self._context = scores.cluster_window, config.context
        clusters, size = scores.clusters_at(config.context), config.width // config.heads
        self._window = scores.window_at(config.context)
        start = torch.randn(self.routed_heads, clusters, size)
        self.register_buffer("centroids", functional.normalize(start, dim=-1))
        sums = torch.zeros(self.routed_heads, clusters, size + 1, dtype=torch.int64)
        self.register_buffer("sums", sums, persistent=False)

    def routed(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [B, T, C] and keys of the local heads -> queries and keys of all heads, [B, T, C]."""
        local, routed = query.split([key.shape[-1], query.shape[-1] - key.shape[-1]], dim=-1)
        size = query.shape[-1] // (self._local + self.routed_heads)
        routed = functional.layer_norm(routed.unflatten(-1, (self.routed_heads, size)), (size,)).flatten(-2)
        return torch.cat([local, routed], dim=-1), torch.cat([key, routed], dim=-1)

    @torch.no_grad()
    def move(self, sums: Tensor) -> None:
        """After a step: centroids by the `sums` of all ranks; one without a token stays. This rank's begin anew."""
        total, number = sums[..., :-1].double() / _UNIT, sums[..., -1:]
        mean = (total / number.clamp(min=1)).to(self.centroids.dtype)
        moved = self._decay * self.centroids + (1 - self._decay) * mean
        self.centroids.copy_(torch.where(number > 0, functional.normalize(moved, dim=-1), self.centroids))
        self.sums.zero_()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor | None, visible: Visible) -> Tensor:
        """See `Softmax.forward`."""
        drops = self._rate and keys is not None
        if self._nearest is None or drops or not self._options.sorts(query.shape[2], key.shape[2], self._context):
            return super().forward(query, key, value, keys, visible)
        (local, query), (near, _), (beside, value) = (
            x.split([self._local, self.routed_heads], dim=1) for x in (query, key, value)
        )
        own, _ = self._clusters(query, visible.padding, _learns(keys))
        self._in_text(own)  # kept, where there is a cache
        found = [self._sorted(query, value, own, self._nearest, visible)]
        if self._local:
            rows = Rows(torch.Size((len(query), query.shape[2])), query.device, visible.causal)
            window = Gathered.of(rows, Pattern(window=self._window))
            window = window if visible.mask is None else window.within(_tensor(visible.mask)[:, 0])
            found.insert(0, window.attend(plain, local, near, beside))
        return torch.cat(found, dim=1)

    def keep(self, key: Tensor) -> None:
        """Put the clusters of keys [B, H, T, d] into the cache."""
        self._in_text(self._clusters(key[:, self._local :], None, learns=False)[0])

    def _formed(self, query: Tensor, key: Tensor, keys: Tensor | None, visible: Visible) -> Tensor:
        scores = self._masked(self._scores(query, key, visible), visible)
        seen = scores.detach() > -torch.inf
        ahead = _ahead(visible, scores.shape[2], scores.device)
        near = seen[:, : self._local] & (ahead.abs() < self._window)
        alike = self._alike(query[:, self._local :], visible, _learns(keys))
        others = seen[:, self._local :] & alike & (ahead != 0)
        if self._nearest is not None:
            others = _nearest(others, ahead, self._nearest)
        alone = ~others.any(-1, keepdim=True)
        among = others | (seen[:, self._local :] & (ahead == 0) & alone)
        scores = scores.masked_fill(~torch.cat([near, among], dim=1), -torch.inf)
        return self._normalised(scores, keys, visible)

    @torch.no_grad()
    def _alike(self, query: Tensor, visible: Visible, learns: bool) -> Tensor:
        """[B, R, T, S] bool: in one cluster."""
        own, likeness = self._clusters(query, visible.padding, learns)
        if self._balanced:
            member = _members(likeness, visible.padding)
            return member @ member.transpose(2, 3) > 0
        return own[..., None] == self._in_text(own)[..., None, :]

    @torch.no_grad()
    def _clusters(self, x: Tensor, padding: Tensor | None, learns: bool) -> tuple[Tensor, Tensor]:
        """[B, R, T] int64 of what is routed [B, R, T, d], and its likeness to each. Where it learns, it is counted."""
        likeness = self._likeness(x)
        own = likeness.argmax(-1)
        if learns:
            self._count(x, own, padding)
        return own, likeness

    def _in_text(self, own: Tensor) -> Tensor:
        """The same of all tokens so far, where there is a cache: [B, R, S]."""
        if self.cache is None:
            return own
        return self.cache.extend(self, own[..., None], own[..., None][..., :0])[0][..., 0]

    def _sorted(self, routed: Tensor, value: Tensor, own: Tensor, most: int, visible: Visible) -> Tensor:
        """Of each query the last `most` of its cluster, [B, R, T, d]: tokens stand by cluster, in blocks of as many."""
        rows, heads, length, _ = routed.shape
        order = own.argsort(stable=True, dim=-1)
        # A 0 is a place behind the last.
        marks = (1 + torch.stack([order, own.gather(-1, order)], dim=-1)).flatten(0, 1)[:, None]
        size, after = min(most, length), int(not visible.causal)
        shape = (len(marks), -(-length // size), size, (2 + after) * size)
        blocks = Gathered(size, 1, after, 0, order.new_empty(shape, dtype=torch.bool))
        at, cluster = (
            functional.pad(marks[:, 0], (0, 0, 0, shape[1] * size - length)).unflatten(1, shape[1:3]).unbind(-1)
        )
        keys_at, of_keys = blocks.keys(marks)[:, 0, :, None].unbind(-1)
        at, cluster = at[..., None], cluster[..., None]
        places = torch.arange(shape[3], device=order.device) - size - torch.arange(size, device=order.device)[:, None]
        others = (cluster == of_keys) & (keys_at > 0) & (keys_at != at) & (places.abs() <= most)
        if visible.mask is not None:
            row = torch.arange(rows, device=order.device).repeat_interleave(heads)[:, None, None, None]
            seen = _tensor(visible.mask)[:, 0].expand(rows, -1, -1)
            others = others & seen[row, (at - 1).clamp(min=0), (keys_at - 1).clamp(min=0)]
        elif visible.causal:
            others = others & (keys_at < at)
        blocks.mask.copy_(others | ((keys_at == at) & ~others.any(-1, keepdim=True)))
        by_cluster = order[..., None].expand_as(routed)
        queries, values = (x.gather(2, by_cluster).flatten(0, 1)[:, None] for x in (routed, value))
        found = blocks.attend(plain, queries, queries, values).unflatten(0, (rows, heads))[:, :, 0]
        return found.gather(2, order.argsort(-1)[..., None].expand_as(found))

    def _likeness(self, x: Tensor) -> Tensor:
        """[B, R, T, d] -> [B, R, T, K]; all are of one length, so the angle alone counts."""
        return x.to(self.centroids.dtype) @ self.centroids.transpose(1, 2)

    def _count(self, key: Tensor, own: Tensor, padding: Tensor | None) -> None:
        clusters = self.centroids.shape[1]
        vectors = (functional.normalize(key.to(self.centroids.dtype), dim=-1) * _UNIT).round().long()
        vectors = functional.pad(vectors, (0, 1), value=1)
        if padding is not None:
            vectors = vectors.masked_fill(padding[:, None, :, None], 0)
        at = own + clusters * torch.arange(self.routed_heads, device=own.device)[:, None]
        sizes = torch.zeros_like(self.sums).view(-1, vectors.shape[-1])
        sizes.index_add_(0, at.flatten(), vectors.flatten(0, 2))
        self.sums.add_(sizes.view_as(self.sums))
        shares = sizes.view_as(self.sums)[..., -1]
        shares = shares / shares.sum(-1, keepdim=True)
        told = {"fullest": shares.amax(-1), "empty": (shares == 0).float().mean(-1)}
        if self._nearest is not None:
            told["dropped"] = _dropped(own, clusters, self._nearest, padding)
        heads = enumerate(zip(*told.values(), strict=True), self._local)
        self._told = {f"{self.name}/h{head}": dict(zip(told, values, strict=True)) for head, values in heads}


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


def _learns(keys: Tensor | None) -> bool:
    """A pass that teaches nothing, such as the first look at a draft, moves no centroid."""
    return keys is not None and torch.is_grad_enabled()


def _tensor(mask: object) -> Tensor:
    assert isinstance(mask, Tensor)
    return mask


def _ahead(visible: Visible, length: int, device: torch.device) -> Tensor:
    """[B, 1, T, S]: how far a query stands behind a key of its text; 0 is the token itself."""
    queries = torch.arange(length, device=device)[None] if visible.positions is None else visible.positions
    keys = queries if visible.key_positions is None else visible.key_positions
    return queries[:, None, :, None] - keys[:, None, None, :]


def _nearest(others: Tensor, ahead: Tensor, most: int) -> Tensor:
    """Of what is seen [B, R, T, S], so many to either side, the nearest; keys stand in the order of the text."""
    before, after = others & (ahead > 0), others & (ahead < 0)
    return (before & (before.flip(-1).cumsum(-1).flip(-1) <= most)) | (after & (after.cumsum(-1) <= most))


def _dropped(own: Tensor, clusters: int, most: int, padding: Tensor | None) -> Tensor:
    """[R]: share of the pairs in a cluster, of own [B, R, T], that have `most` or more others between them."""
    counted = torch.ones_like(own) if padding is None else (~padding[:, None]).long().expand_as(own)
    sizes = own.new_zeros(*own.shape[:2], clusters).scatter_add_(2, own, counted)
    left = (sizes - 1 - most).clamp(min=0)
    pairs = (sizes * (sizes - 1)).sum((0, 2))
    return (left * (left + 1)).sum((0, 2)) / pairs.clamp(min=1)
