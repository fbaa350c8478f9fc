"""A Duet model for transformers. A copy of this file lies in every export, and needs the package duet-pretrain.

The package is imported, not copied: it is the model that was trained, not a second one to be held equal to it.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizer
from transformers.modeling_outputs import CausalLMOutputWithPast

try:
    import duet_pretrain

    duet_pretrain.check("data_pipeline", "model", "pretrain")  # before they are imported

    from data_pipeline.tokenize.tokenizer import JSON, MODEL, Tokenizer
    from model.architectures import registry
    from model.attention import cache
    from model.attention.rule import Rows
    from pretrain.inference.trained import check_objective
except ImportError as error:
    raise ImportError(
        f"a model that was trained with Duet needs the package duet-pretrain, whose wheel comes with it: {error}"
    ) from error


class DuetConfig(PreTrainedConfig):
    """`duet` holds what Duet reads; what else is in config.json is for transformers."""

    model_type = "duet"
    duet: dict[str, Any] | None = None


class KeptByTransformers(cache.Cache):
    """Keys and values lie in a cache of transformers, an entry for each attention in the order of their calls."""

    def __init__(self, kept: Cache | None, attention_mask: Tensor, count: int, logits: slice) -> None:
        """For one pass.

        Args:
            kept: what passes before this one left; None if nothing is to be kept.
            attention_mask: [B, S] bool, False for pads, wherever they are.
            count: T, columns of this pass; the last of S.
            logits: the columns of which logits are asked.
        """
        super().__init__(attention_mask.new_zeros(len(attention_mask), dtype=torch.int64), attention_mask.shape[1])
        self._kept = kept
        self._padded = not bool(attention_mask.all())
        places = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        self._places = places[:, -count:]
        self._logits = logits
        self._calls = 0
        self.length = attention_mask.shape[1] - count
        # Pads see each other: a softmax over nothing is NaN, which would spread.
        self._rows = Rows(attention_mask.shape, attention_mask.device, segments=attention_mask, positions=places)

    def positions(self, count: int) -> Tensor:
        """Of the columns in their texts: [B, T] int64; pads have any."""
        return self._places

    def extend(self, place: cache.Cached, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `Cache.extend`."""
        if self._kept is not None:
            size = key.shape[-1]
            # They take a cache for empty whose keys have no channels.
            given = key if size else key.new_zeros(*key.shape[:-1], 1)
            key, value = self._kept.update(given, value, self._calls)
            key = key[..., :size]
        self._calls += 1
        return key, value, self._mask(place.patterns)

    def _ring(self, place: cache.Cached) -> None:
        """The caches of transformers keep everything."""

    def asked(self, x: Tensor) -> Tensor:
        """[B, T, C] -> the columns of which logits are asked."""
        return x[:, self._logits]


class DuetForCausalLM(PreTrainedModel, GenerationMixin):
    """A model that continues texts, in evaluation: noise and penalties of training are Duet's own."""

    config_class = DuetConfig
    base_model_prefix = "model"  # the file has no prefix before the names

    def __init__(self, config: DuetConfig) -> None:
        """Raises ConfigError if the model does not continue texts."""
        super().__init__(config)
        assert config.duet is not None
        shape = registry.configure(config.duet["model"])
        check_objective(shape, config.duet["objective"])
        self.model = registry.build(shape)
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Modules start themselves."""

    def get_input_embeddings(self) -> torch.nn.Module:
        """The token table, which is also the head."""
        return self.model.token_embed

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
        return_dict: bool = True,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits of the tokens after input_ids [B, T]: [B, T, V], or of the last `logits_to_keep` of them.

        Args:
            attention_mask: [B, S], 0 for pads; S counts what is in `past_key_values`, too.

        Raises:
            ValueError: a text is longer than the model's context.
        """
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        kept = slice(-logits_to_keep or None, None)
        if past_key_values is None and (attention_mask is None or bool(attention_mask.all())):
            logits = self.model(input_ids)[:, kept]
        else:
            before = 0 if past_key_values is None else past_key_values.get_seq_length()
            shape = (len(input_ids), before + input_ids.shape[1])
            if attention_mask is None:
                attention_mask = input_ids.new_ones(shape)
            if attention_mask.shape != shape:
                raise ValueError(f"attention_mask is {tuple(attention_mask.shape)}, and with what is kept {shape}")
            if (longest := int(attention_mask.sum(-1).max())) > self.model.config.context:
                raise ValueError(f"{longest} tokens do not fit a context of {self.model.config.context}")
            reading = KeptByTransformers(past_key_values, attention_mask.bool(), input_ids.shape[1], kept)
            with reading.used_by(self.model):
                logits = self.model(input_ids)
        found = CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)
        return found if return_dict else found.to_tuple()

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """As transformers does, with the names that an export has."""
        super().save_pretrained(save_directory, **{"state_dict": self.model.state_dict()} | kwargs)


class DuetTokenizer(PreTrainedTokenizer):
    """The tokenizer of the training: no text gives a special token, and nothing is added to it."""

    vocab_files_names = {"vocab_file": MODEL, "tokenizer_file": JSON}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, vocab_file: str | None = None, tokenizer_file: str | None = None, **kwargs: Any) -> None:
        """One of the two kinds of files."""
        self._file = Path(vocab_file or tokenizer_file or "")
        self._duet = Tokenizer.load(self._file)
        self._ids = {self._duet.piece(token): token for token in range(self._duet.vocab_size)}
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        """Pieces."""
        return self._duet.vocab_size

    def get_vocab(self) -> dict[str, int]:
        """Ids by piece."""
        return dict(self._ids)

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:
        """The pieces of a text."""
        return [self._duet.piece(token) for token in self._duet.encode([text])[0].tolist()]

    def _convert_token_to_id(self, token: str) -> int:
        return self._ids.get(token, self._duet.unk_id)

    def _convert_id_to_token(self, index: int) -> str:
        return self._duet.piece(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of pieces."""
        return self._duet.decode([self._ids[token] for token in tokens])

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Copy the tokenizer's file."""
        file = Path(save_directory) / "-".join(filter(None, (filename_prefix, self._file.name)))
        if file != self._file:
            shutil.copyfile(self._file, file)
        return (str(file),)
