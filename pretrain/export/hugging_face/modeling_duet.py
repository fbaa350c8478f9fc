"""Duet's models for transformers. Exports hold this file and, in files beside it, all of Duet that it imports.

A model is in evaluation, whatever its mode: noise and penalties of training are Duet's own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast, MaskedLMOutput, Seq2SeqLMOutput

from model.architectures.registry import build, configure
from model.attention import cache
from model.attention.rule import Rows
from model.batch import IGNORE, Batch
from model.layers.int8 import Int8Map


class DuetConfig(PreTrainedConfig):
    """`duet` holds what the model is built from, `int8` names the maps whose weights are in 8 bits in the file."""

    model_type = "duet"
    duet: dict[str, Any] | None = None
    int8: list[str] | None = None


class KeptByTransformers(cache.Cache):
    """Keys and values lie in a cache of transformers, an entry for each attention in the order of their calls."""

    may_stop = False  # what is kept is found by the order of calls

    def __init__(self, kept: Cache, attention_mask: Tensor, count: int) -> None:
        """For one pass.

        Args:
            kept: what passes before this one left.
            attention_mask: [B, S] bool, False for pads, wherever they are.
            count: T, columns of this pass; the last of S.
        """
        super().__init__(attention_mask.new_zeros(len(attention_mask), dtype=torch.int64), attention_mask.shape[1])
        self._kept = kept
        self.padded = not bool(attention_mask.all())
        places = positions_of(attention_mask)
        self._places = places[:, -count:]
        self._calls = 0
        self.length = attention_mask.shape[1] - count
        # Pads see each other: a softmax over nothing is NaN, which would spread.
        self._rows = Rows(attention_mask.shape, attention_mask.device, segments=attention_mask, positions=places)

    def positions(self, count: int) -> Tensor:
        """Of the columns in their texts: [B, T] int64; pads have any."""
        return self._places

    def extend(self, place: cache.Cached, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `Cache.extend`."""
        return *self.append(place, key, value), self._mask(place.patterns)

    def append(self, place: cache.Cached, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """As `Cache.append`."""
        # transformers makes an entry for each layer, and a layer may hold several attentions.
        if isinstance(self._kept, DynamicCache) and len(self._kept.layers) == self._calls:
            self._kept.layers.append(DynamicLayer())
        size = key.shape[-1]
        # It takes a cache for empty whose keys have no channels.
        given = key if size else key.new_zeros(*key.shape[:-1], 1)
        key, value = self._kept.update(given, value, self._calls)
        self._calls += 1
        return key[..., :size], value

    def held(self, place: cache.Cached) -> tuple[Tensor, Tensor] | None:
        """As `Cache.held`."""
        layers = self._kept.layers
        if not self.length or len(layers) <= self._calls:
            return None
        return layers[self._calls].keys, layers[self._calls].values

    def holds(self) -> Tensor:
        """As `Cache.holds`."""
        assert self._rows is not None and self._rows.segments is not None
        return self._rows.segments

    def _ring(self, place: cache.Cached) -> None:
        """The caches of transformers keep everything."""

    def asked(self, x: Tensor) -> Tensor:
        """All columns [B, T, C]."""
        return x


class DuetPreTrainedModel(PreTrainedModel):
    """What the models share."""

    config_class = DuetConfig
    base_model_prefix = "model"  # the file has no prefix before the names

    def __init__(self, config: DuetConfig) -> None:
        """The model that `config.duet` describes."""
        super().__init__(config)
        assert config.duet is not None
        self.model = build(configure(config.duet["model"]))
        for name in config.int8 or ():
            base = self.model.get_submodule(name)
            assert isinstance(base, nn.Linear)
            _replace(self.model, name, Int8Map(base))
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers does, which leaves nothing in tensors that no file holds: these are made anew."""
        found = super().from_pretrained(*args, **kwargs)
        model = found[0] if isinstance(found, tuple) else found
        for name in model.config.int8 or ():
            read = model.model.get_submodule(name)
            _replace(model.model, name, read.restore(model.model.token_embed.weight.dtype))
        model.config.int8 = None
        if any(_made_with(module) for module in model.model.modules()):
            fresh = build(model.model.config)
            for module, other in zip(model.model.modules(), fresh.modules(), strict=True):
                for name in _made_with(module):
                    setattr(module, name, getattr(other, name).to(model.device))
        return found

    def _init_weights(self, module: nn.Module) -> None:
        """Modules start themselves."""

    def get_input_embeddings(self) -> nn.Module:
        """The token table, which is also the head."""
        return self.model.token_embed

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """More rows or fewer in the token table, which is also the head; new ones are the mean of the old.

        Raises:
            NotImplementedError: the architecture keeps something else for each token.
        """
        table = self.model.token_embed.weight
        count = len(table) if new_num_tokens is None else new_num_tokens
        count = -(-count // (pad_to_multiple_of or 1)) * (pad_to_multiple_of or 1)
        if count == len(table):
            return self.get_input_embeddings()
        facts = self.config.duet | {"model": self.config.duet["model"] | {"vocab_size": count}}
        with torch.device("meta"):
            other = build(configure(facts["model"]))
        old = {name: values.shape for name, values in self.model.state_dict().items()}
        changed = [name for name, values in other.state_dict().items() if values.shape != old.get(name)]
        if changed != ["token_embed.weight"]:
            raise NotImplementedError(f"with another vocabulary {', '.join(changed)} change their shape, too")
        new = table.new_empty(count, table.shape[1])
        new[: len(table)] = table[:count].detach()
        if mean_resizing:
            new[len(table) :] = table.detach().mean(0)
        else:
            nn.init.normal_(new[len(table) :], std=0.02)
        self.model.token_embed.weight = nn.Parameter(new, table.requires_grad)
        self.model.token_embed.num_embeddings = self.config.vocab_size = count
        self.model.config, self.config.duet = other.config, facts
        return self.get_input_embeddings()

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """As transformers does, with the names that an export has."""
        super().save_pretrained(save_directory, **{"state_dict": self.model.state_dict()} | kwargs)

    def _batch(self, input_ids: Tensor, attention_mask: Tensor | None, **more: Any) -> Batch | None:
        """What there is to say of inputs [B, T] beside their ids; None if nothing."""
        segments = padding = positions = None
        traits = self.model.config.traits
        if attention_mask is not None and not bool(attention_mask.all()):
            self._check_mask(attention_mask, input_ids.shape)
            if not (traits.documents_apart or traits.two_sequences):
                raise ValueError("this architecture cannot keep padding apart: give texts of one length")
            padding = ~attention_mask.bool()
            segments, positions = -padding.long(), positions_of(attention_mask)
        elif not any(value is not None for value in more.values()):
            return None
        rows, step = input_ids.new_zeros(len(input_ids)), input_ids.new_ones(())
        labels = more.get("decoder_input_ids", input_ids)
        return Batch(input_ids, labels, rows, step, 0, segments, positions, padding=padding, **more)

    def _check_mask(self, attention_mask: Tensor, shape: tuple[int, ...]) -> None:
        if attention_mask.shape != shape:
            raise ValueError(f"attention_mask is {tuple(attention_mask.shape)}, and with what is kept {tuple(shape)}")
        if (longest := int(attention_mask.sum(-1).max())) > self.model.config.context:
            raise ValueError(f"{longest} tokens do not fit a context of {self.model.config.context}")


class DuetForCausalLM(DuetPreTrainedModel, GenerationMixin):
    """A model that continues texts."""

    accepts_loss_kwargs = True  # a Trainer gives `num_items_in_batch`

    def __init__(self, config: DuetConfig) -> None:
        """Generation keeps nothing where the architecture cannot go on with what was kept."""
        super().__init__(config)
        if self.generation_config is not None and not self.model.config.traits.cached:
            self.generation_config.use_cache = False

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool = False,
        output_hidden_states: bool = False,
        logits_to_keep: int = 0,
        return_dict: bool = True,
        num_items_in_batch: Tensor | int | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits of the tokens after input_ids [B, T]: [B, T, V], or of the last `logits_to_keep` of them.

        Args:
            attention_mask: [B, S], 0 for pads; S counts what is in `past_key_values`, too.
            position_ids: [B, T], the places that the mask gives its tokens, and no others.
            labels: [B, T] int64, the same tokens as the inputs, -100 for none: they are shifted here.
            num_items_in_batch: labels that the loss is divided by; their own number unless given.
            output_hidden_states: of the embedded tokens, of each layer in the order in which they are computed, and, in
                the place of the last layer's, what the head reads.

        Raises:
            ValueError: a text is longer than the model's context; the architecture cannot do what is asked.
        """
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        with layers_recorded(self.model.backbone, output_hidden_states) as states:
            x, states = self._read(input_ids, attention_mask, position_ids, past_key_values, states)
        logits = self.model.token_embed(x[:, slice(-logits_to_keep or None, None)])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits, labels, vocab_size=self.config.vocab_size, num_items_in_batch=num_items_in_batch
            )
        told = (*states[:-1], x) if output_hidden_states else None
        found = CausalLMOutputWithPast(loss, logits, past_key_values=past_key_values, hidden_states=told)
        return found if return_dict else found.to_tuple()

    def _read(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        kept: Cache | None,
        states: list[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """What the head reads, [B, T, C], and the states of layers that `states` collects meanwhile."""
        if kept is not None and not self.model.config.traits.cached:
            raise ValueError("this architecture keeps no keys and values: use_cache=False")
        before = 0 if kept is None else kept.get_seq_length()
        shape = (len(input_ids), before + input_ids.shape[1])
        if attention_mask is None:
            attention_mask = input_ids.new_ones(shape)
        self._check_mask(attention_mask, shape)
        if position_ids is not None:
            check_positions(position_ids, attention_mask)
        mask = attention_mask.bool()
        if kept is not None:
            with KeptByTransformers(kept, mask, input_ids.shape[1]).used_by(self.model):
                x = self.model.hidden(input_ids, None).x
            return x, _behind(states, x)
        if bool(mask.all()):
            x = self.model.hidden(input_ids, None).x
            return x, _behind(states, x)
        # Pads go to the end of a row, where a causal model does not see them, and back.
        order = (~mask).sort(dim=1, stable=True).indices
        back = order.argsort(dim=1)[..., None]
        x = self.model.hidden(input_ids.gather(1, order), None).x
        x, *states = (of.gather(1, back.expand_as(of)) for of in (x, *_behind(states, x)))
        return x, states


class DuetPrefixForCausalLM(DuetPreTrainedModel):
    """A model that was trained on texts whose beginning it reads both ways. It does not generate."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        prefix_lengths: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits [B, T, V] of the tokens after input_ids [B, T], `prefix_lengths` [B] of which all of a row sees."""
        with layers_recorded(self.model.backbone, output_hidden_states) as states:
            x = self.model.hidden(
                input_ids, None, self._batch(input_ids, attention_mask, prefix_lengths=prefix_lengths)
            ).x
        logits = self.model.token_embed(x)
        loss = None if labels is None else self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        told = (*states[:-1], x) if output_hidden_states else None
        found = CausalLMOutputWithPast(loss, logits, hidden_states=told)
        return found if return_dict else found.to_tuple()


class DuetForMaskedLM(DuetPreTrainedModel):
    """A model that reads texts both ways, and says of each position which token it is."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
    ) -> MaskedLMOutput | tuple[Any, ...]:
        """Logits [B, T, V] of the tokens at input_ids [B, T]; labels [B, T], -100 for none. See `DuetForCausalLM`."""
        if position_ids is not None:
            check_positions(position_ids, torch.ones_like(input_ids) if attention_mask is None else attention_mask)
        with layers_recorded(self.model.backbone, output_hidden_states) as states:
            x = self.model.hidden(input_ids, None, self._batch(input_ids, attention_mask)).x
        logits = self.model.token_embed(x)
        told = (*states[:-1], x) if output_hidden_states else None
        found = MaskedLMOutput(mean_loss(logits, labels), logits, hidden_states=told)
        return found if return_dict else found.to_tuple()


class DuetForSeq2SeqLM(DuetPreTrainedModel):
    """A model that reads a sequence and writes another. It does not generate."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> Seq2SeqLMOutput | tuple[Any, ...]:
        """Logits [B, U, V] of the tokens after decoder_input_ids [B, U], or of labels [B, U] behind the end-of-text.

        Raises:
            ValueError: neither decoder_input_ids nor labels are given.
        """
        if decoder_input_ids is None:
            if labels is None:
                raise ValueError("give decoder_input_ids, or labels")
            start = torch.full_like(labels[:, :1], self.config.decoder_start_token_id)
            decoder_input_ids = torch.cat([start, labels[:, :-1].clamp(min=0)], dim=1)
        x = self.model.hidden(
            input_ids, None, self._batch(input_ids, attention_mask, decoder_input_ids=decoder_input_ids)
        ).x
        logits = self.model.token_embed(x)
        found = Seq2SeqLMOutput(mean_loss(logits, labels), logits)
        return found if return_dict else found.to_tuple()


def positions_of(attention_mask: Tensor) -> Tensor:
    """Places of tokens in their texts, from a mask [B, S] that is 0 for pads, which have any: [B, S] int64."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def check_positions(position_ids: Tensor, attention_mask: Tensor) -> None:
    """Raises ValueError unless position_ids [B or 1, T] are those of the last T columns of a mask [B, S]."""
    real = attention_mask[:, -position_ids.shape[-1] :].bool()
    expected = positions_of(attention_mask)[:, -position_ids.shape[-1] :]
    if bool(((position_ids != expected) & real).any()):
        raise ValueError("position_ids: each text counts from 0, without its pads; leave them out")


@contextmanager
def layers_recorded(backbone: nn.Module, wanted: bool) -> Iterator[list[Tensor]]:
    """What the embedded tokens are, and then what each call of a layer gives, [B, T, C], if that is wanted.

    Raises:
        ValueError: the architecture has no lists of layers.
    """
    found: list[Tensor] = []
    if not wanted:
        yield found
        return
    layers = [layer for child in backbone.children() if isinstance(child, nn.ModuleList) for layer in child]
    if not layers:
        raise ValueError("output_hidden_states: the layers of this architecture do not stand in a list")

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        found.append(output if isinstance(output, Tensor) else output[0])

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    hooks.append(backbone.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0].tokens)))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _behind(states: list[Tensor], x: Tensor) -> list[Tensor]:
    """States as long as x [B, T, C]: where queries stand behind the tokens, theirs, which predict."""
    return [of[:, -x.shape[1] :] for of in states]


def mean_loss(logits: Tensor, labels: Tensor | None) -> Tensor | None:
    """Mean cross entropy of labels [B, T] by logits [B, T, V] of the same places."""
    if labels is None:
        return None
    return functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def _made_with(module: nn.Module) -> list[str]:
    """Tensors of a module that its constructor makes and no file holds."""
    plain = [name for name, value in vars(module).items() if isinstance(value, Tensor)]
    return [*module._non_persistent_buffers_set, *plain]
