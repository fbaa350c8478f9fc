"""Layouts that others know, and where in them a decoder-only model of ours has its tensors and its sizes.

Llama: rotary positions, RMSNorm, SwiGLU, grouped queries. GPT-2: learned positions, LayerNorm and biases, either
GELU. In both our head is tied. transformers gives both models their names (`models/llama`, `models/gpt2`).
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from data_pipeline.errors import CheckpointError, ConfigError
from model.architectures.decoder_only.spec import DecoderOnlyConfig
from model.config.model_config import ModelConfig

EPS, BASE = 1e-5, 10_000.0
"""Of our norms, and of our rotations."""
Name = Literal["llama", "gpt2"]
_GELUS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
"""What transformers calls our activations, the first name of each being the one that is written."""
_FREE = {
    *("layers", "width", "context", "vocab_size", "heads", "ff_width", "bias", "dropout", "attention_dropout"),
    *("attention", "document_mask", "label_smoothing", "z_loss"),
}
"""Keys of a model that a layout can have as they are, or that are about training."""


class Counterpart(NamedTuple):
    """A module of ours and the modules that it is in a layout, one behind the other."""

    ours: str
    theirs: tuple[str, ...]
    transposed: bool = False
    """Weights are [inputs, outputs] there."""
    sizes: Callable[[DecoderOnlyConfig], list[int]] | None = None
    """Outputs of each of several."""


class Layout(NamedTuple):
    """What a layout is."""

    wants: Mapping[str, tuple[Any, ...]]
    """The values of our keys that fit."""
    outside: tuple[Counterpart, ...]
    inside: tuple[Counterpart, ...]
    """Of each layer; `{}` is its number."""
    has_biases: bool
    """Always, so one of ours without gets zeros."""
    config: Callable[[DecoderOnlyConfig], dict[str, Any]]
    """What config.json says of a model."""
    shape: Callable[[dict[str, Any]], dict[str, Any]]
    """Our keys of what it says."""
    expects: tuple[tuple[str, Any, Any], ...]
    """Of config.json: a field, what it is where it is left out, and what it must be, or one of a tuple."""
    passed_over: tuple[str, ...] = ()
    """Ends of the names of tensors that are no weights."""

    def parts(self, layers: int) -> Iterator[Counterpart]:
        """All of a model."""
        yield from self.outside
        for layer in range(layers):
            for part in self.inside:
                theirs = tuple(name.format(layer) for name in part.theirs)
                yield part._replace(ours=part.ours.format(layer), theirs=theirs)


def _projections(config: DecoderOnlyConfig) -> list[int]:
    narrow = config.width // config.queries_per_kv_head
    return [config.width, narrow, narrow]


def _llama_config(config: DecoderOnlyConfig) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.hidden_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads or config.heads,
        "head_dim": config.width // config.heads,
        "max_position_embeddings": config.context,
        "hidden_act": "silu",
        "rms_norm_eps": EPS,
        "rope_theta": BASE,
        "rope_parameters": {"rope_type": "default", "rope_theta": BASE},
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
        "tie_word_embeddings": True,
    }


def _llama_shape(raw: dict[str, Any]) -> dict[str, Any]:
    heads = raw["num_attention_heads"]
    return {
        "layers": raw["num_hidden_layers"],
        "width": raw["hidden_size"],
        "context": raw["max_position_embeddings"],
        "vocab_size": raw["vocab_size"],
        "heads": heads,
        "kv_heads": None if raw.get("num_key_value_heads") in (None, heads) else raw["num_key_value_heads"],
        "ff_width": raw["intermediate_size"],
        "bias": raw.get("attention_bias", False),
        "positions": "rotary",
        "norm": "rmsnorm",
        "ff": "swiglu",
    }


def _gpt2_config(config: DecoderOnlyConfig) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocab_size,
        "n_positions": config.context,
        "n_embd": config.width,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_inner": config.hidden_width,
        "activation_function": next(name for name, ours in _GELUS.items() if ours == config.ff),
        "layer_norm_epsilon": EPS,
        "tie_word_embeddings": True,
    }


def _gpt2_shape(raw: dict[str, Any]) -> dict[str, Any]:
    return {
        "layers": raw["n_layer"],
        "width": raw["n_embd"],
        "context": raw["n_positions"],
        "vocab_size": raw["vocab_size"],
        "heads": raw["n_head"],
        "ff_width": raw.get("n_inner") or 4 * raw["n_embd"],
        "ff": _GELUS[raw.get("activation_function", "gelu_new")],
        "bias": True,
    }


LAYOUTS: dict[str, Layout] = {
    "llama": Layout(
        wants={"positions": ("rotary",), "norm": ("rmsnorm",), "norm_position": ("pre",), "ff": ("swiglu",)},
        outside=(Counterpart("token_embed", ("model.embed_tokens",)), Counterpart("final_norm", ("model.norm",))),
        inside=(
            Counterpart("backbone.layers.{}.attention_norm", ("model.layers.{}.input_layernorm",)),
            Counterpart(
                "backbone.layers.{}.attention.qkv",
                tuple(f"model.layers.{{}}.self_attn.{name}_proj" for name in "qkv"),
                sizes=_projections,
            ),
            Counterpart("backbone.layers.{}.attention.out", ("model.layers.{}.self_attn.o_proj",)),
            Counterpart("backbone.layers.{}.ff_norm", ("model.layers.{}.post_attention_layernorm",)),
            Counterpart(
                "backbone.layers.{}.ff.up",
                ("model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.up_proj"),
                sizes=lambda config: [config.hidden_width] * 2,
            ),
            Counterpart("backbone.layers.{}.ff.down", ("model.layers.{}.mlp.down_proj",)),
        ),
        has_biases=False,
        config=_llama_config,
        shape=_llama_shape,
        expects=(
            ("hidden_act", "silu", "silu"),
            ("rms_norm_eps", 1e-6, EPS),
            ("rope_theta", BASE, BASE),
            ("rope_scaling", None, None),
            ("rope_parameters", None, {"rope_type": "default", "rope_theta": BASE}),
            ("tie_word_embeddings", False, True),
        ),
        passed_over=("rotary_emb.inv_freq",),
    ),
    "gpt2": Layout(
        wants={
            "positions": ("learned",),
            "norm": ("layernorm",),
            "norm_position": ("pre",),
            "ff": ("gelu", "gelu_tanh"),
        },
        outside=(
            Counterpart("token_embed", ("transformer.wte",)),
            Counterpart("position_embed", ("transformer.wpe",)),
            Counterpart("final_norm", ("transformer.ln_f",)),
        ),
        inside=(
            Counterpart("backbone.layers.{}.attention_norm", ("transformer.h.{}.ln_1",)),
            Counterpart("backbone.layers.{}.attention.qkv", ("transformer.h.{}.attn.c_attn",), transposed=True),
            Counterpart("backbone.layers.{}.attention.out", ("transformer.h.{}.attn.c_proj",), transposed=True),
            Counterpart("backbone.layers.{}.ff_norm", ("transformer.h.{}.ln_2",)),
            Counterpart("backbone.layers.{}.ff.up", ("transformer.h.{}.mlp.c_fc",), transposed=True),
            Counterpart("backbone.layers.{}.ff.down", ("transformer.h.{}.mlp.c_proj",), transposed=True),
        ),
        has_biases=True,
        config=_gpt2_config,
        shape=_gpt2_shape,
        expects=(
            ("activation_function", "gelu_new", tuple(_GELUS)),
            ("layer_norm_epsilon", 1e-5, EPS),
            ("scale_attn_weights", True, True),
            ("scale_attn_by_inverse_layer_idx", False, False),
            ("add_cross_attention", False, False),
            ("tie_word_embeddings", True, True),
        ),
        passed_over=("attn.bias", "attn.masked_bias"),
    ),
}


def check_fits(model: ModelConfig, name: str) -> DecoderOnlyConfig:
    """Raises ConfigError that names the first key of a model that a layout cannot have."""
    if not isinstance(model, DecoderOnlyConfig):
        raise ConfigError(
            f"model.architecture={model.architecture} does not fit --layout {name}: only decoder_only does"
        )
    wants = dict(LAYOUTS[name].wants)
    if name == "gpt2":
        wants["kv_heads"] = (None, model.heads)
    else:
        wants["kv_heads"] = (model.kv_heads,)
    for key, field in type(model).model_fields.items():
        value = getattr(model, key)
        if key == "learned_dropout":
            if model.dropout_sites:
                raise ConfigError(
                    f"model.learned_dropout.enabled=true does not fit --layout {name}, which has no masks"
                )
        elif key in wants:
            if value not in wants[key]:
                raise ConfigError(f"model.{key}={value} does not fit --layout {name}: that has {wants[key][0]}")
        elif key not in {"architecture", *_FREE} and value != field.default:
            raise ConfigError(f"model.{key} does not fit --layout {name}: that has {field.default!r}")
    return model


def to_theirs(weights: Mapping[str, Tensor], config: DecoderOnlyConfig, name: str) -> dict[str, Tensor]:
    """Our parameters under a layout's names and in its shapes."""
    layout, found = LAYOUTS[name], {}
    for part in layout.parts(config.layers):
        sizes = part.sizes(config) if part.sizes else None
        table = "embed" in part.ours
        for kind in ("weight",) if table else ("weight", "bias"):
            values = weights.get(f"{part.ours}.{kind}")
            if values is None:
                if kind == "weight" or not layout.has_biases:
                    continue
                values = weights[f"{part.ours}.weight"].new_zeros(len(weights[f"{part.ours}.weight"]))
            pieces = values.split(sizes) if sizes else (values,)
            for theirs, piece in zip(part.theirs, pieces, strict=True):
                turned = part.transposed and kind == "weight"
                found[f"{theirs}.{kind}"] = (piece.T if turned else piece).contiguous()
    return found


def to_ours(tensors: Mapping[str, Tensor], config: DecoderOnlyConfig, name: str, folder: object) -> dict[str, Tensor]:
    """A layout's tensors under our names, in fp32.

    Raises:
        CheckpointError: one is missing, or there is one that no part of our model takes.
    """
    layout, left, found = LAYOUTS[name], dict(tensors), {}
    for part in layout.parts(config.layers):
        for kind in ("weight", "bias"):
            keys = [f"{theirs}.{kind}" for theirs in part.theirs]
            if kind == "bias" and keys[0] not in left:
                continue
            for key in keys:
                if key not in left:
                    raise CheckpointError(f"{folder}: no tensor {key}")
                if not left[key].is_floating_point():
                    raise CheckpointError(f"{folder}: {key} is {left[key].dtype}: quantized weights are not taken")
            pieces = [left.pop(key).float() for key in keys]
            if part.transposed and kind == "weight":
                pieces = [piece.T for piece in pieces]
            found[f"{part.ours}.{kind}"] = torch.cat(pieces).contiguous()
    head = left.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head.float(), found["token_embed.weight"]):
        raise CheckpointError(f"{folder}: tie_word_embeddings: its head is another table than its tokens'")
    if odd := sorted(key for key in left if not key.endswith(layout.passed_over)):
        raise CheckpointError(f"{folder}: {odd[0]}: nothing of ours takes this tensor")
    return found


def read_shape(raw: dict[str, Any], folder: object) -> tuple[str, dict[str, Any]]:
    """Layout and our keys of what a config.json says.

    Raises:
        CheckpointError: names the first field that does not fit.
    """
    name = raw.get("model_type")
    if name not in LAYOUTS:
        raise CheckpointError(f"{folder}: model_type={name!r}: this version takes {' and '.join(LAYOUTS)}")
    layout = LAYOUTS[name]
    if "quantization_config" in raw:
        raise CheckpointError(f"{folder}: quantization_config: only weights that are not quantized are taken")
    for field, default, wanted in layout.expects:
        value = raw.get(field, default)
        if field == "rope_parameters" and value is None:
            continue
        fitting = wanted if isinstance(wanted, tuple) else (wanted,)
        if value not in fitting:
            known = " or ".join(map(repr, fitting))
            raise CheckpointError(f"{folder}: {field}={value!r} does not fit: our models have {known}")
    if raw.get("mlp_bias", False) != raw.get("attention_bias", False):
        raise CheckpointError(f"{folder}: mlp_bias={raw.get('mlp_bias')!r} and attention_bias differ: ours are alike")
    try:
        shape = layout.shape(raw)
    except KeyError as error:
        raise CheckpointError(f"{folder}: config.json has no {error.args[0]}") from None
    except TypeError:
        raise CheckpointError(f"{folder}: config.json has a size that is no number") from None
    for key in ("layers", "heads", "width", "ff_width", "context", "vocab_size"):
        if type(shape[key]) is not int:  # None means something else to our models, and true is no size
            raise CheckpointError(f"{folder}: config.json has {shape[key]!r} where {key} is an integer of ours")
    head_dim = raw.get("head_dim")
    if head_dim is not None and head_dim * shape["heads"] != shape["width"]:
        raise CheckpointError(f"{folder}: head_dim={head_dim} does not fit: ours is width / heads")
    return name, {"architecture": "decoder_only", "learned_dropout": {"enabled": False}} | shape
