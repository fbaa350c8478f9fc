"""Parameter counts to the digit: our presets, and the published models (docs/model.md C)."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from model.architectures import registry
from tests.model.helpers import configured

PRESETS = Path(__file__).parents[3] / "configs" / "model"


def count(architecture: str = "parallel_encoder_decoder", *, dropout: bool = False, **shape: Any) -> int:
    masks = shape.pop("learned_dropout", {"enabled": dropout})
    config = configured(architecture=architecture, learned_dropout=masks, **shape)
    with torch.device("meta"):
        return registry.build(config).num_parameters()


@pytest.mark.parametrize(
    ("architecture", "layers", "expected"),
    [
        ("parallel_encoder_decoder", 2, 952_064),
        ("parallel_encoder_decoder", 3, 1_411_584),
        ("decoder_only", 4, 804_096),
        # 16 C² of matrices and 4 norms in a layer of the decoder, as in the parallel one; no map into it, one table.
        ("encoder_decoder", 2, 129 * 128 + 2 * (28 * 128**2 + 6 * 128) + 128),
        ("encoder_only", 4, 804_096),  # what a decoder-only model has
    ],
)
def test_tinyshakespeare_size(architecture: str, layers: int, expected: int) -> None:
    shape: dict[str, Any] = {"layers": layers, "width": 128, "heads": 4, "context": 64, "vocab_size": 65}
    assert count(architecture, **shape) == expected
    sites = layers * (2 if architecture.endswith("encoder_decoder") else 1)
    assert count(architecture, dropout=True, **shape) == expected + sites * (3 * 128**2 + 128)


_PUBLISHED_LOSS = {"kind": "mse", "embedding_norm": "embedding", "affine": True}


@pytest.mark.parametrize(
    ("shape", "expected", "total"),
    [
        # As published, but for the norm that the public code makes and does not use where its encoder loss is off.
        ({"layers": 5, "width": 200, "heads": 5}, 15_697_600, 15_737_600),
        ({"layers": 5, "width": 200, "heads": 5, "add_next_position": True}, 15_697_600, 15_737_800),
        (
            {"layers": 5, "width": 200, "heads": 5, "add_next_position": True, "encoder_loss": _PUBLISHED_LOSS},
            15_698_400,
            15_738_600,
        ),
        (
            {
                "layers": 13,
                "width": 150,
                "heads": 5,
                "topology": "serial",
                "subtract_next_position": "plain",
                "encoder_loss": _PUBLISHED_LOSS,
            },
            15_763_500,
            15_793_650,
        ),
        ({"architecture": "decoder_only", "layers": 10, "width": 210, "heads": 10}, 15_850_380, 15_892_380),
        ({"architecture": "decoder_only", "layers": 26, "width": 160, "heads": 10}, 16_036_800, 16_068_800),
        ({"architecture": "decoder_only", "layers": 26, "width": 156, "heads": 12}, 15_441_192, 15_472_392),
        (
            {"architecture": "decoder_only", "layers": 26, "width": 144, "heads": 9, "dropout": True},
            15_335_424,
            15_364_224,
        ),
        (
            {
                "architecture": "decoder_only",
                "layers": 26,
                "width": 144,
                "heads": 9,
                "learned_dropout": {"source": "embed"},
            },
            15_418_368,
            15_447_168,
        ),
    ],
)
def test_published_size(shape: dict[str, Any], expected: int, total: int) -> None:
    rows = 200 + ("add_next_position" in shape or "subtract_next_position" in shape)
    found = count(**shape, context=200, vocab_size=50_257)
    assert found == total
    assert found - rows * shape["width"] == expected


@pytest.mark.parametrize(
    ("name", "vocabulary", "expected", "published"),
    [
        ("published", 50_257, 15_738_600, None),
        # GPT-1 and GPT-2 as the weights that were released have them.
        ("gpt-1", 40_478, 116_534_784, 117e6),
        ("gpt-2-small", 50_257, 124_439_808, None),
        ("gpt-2-medium", 50_257, 354_823_168, None),
        ("gpt-2-large", 50_257, 774_030_080, None),
        ("gpt-2-xl", 50_257, 1_557_611_200, None),
        # GPT-3's table (arXiv:2005.14165, table 2.1) rounds.
        ("gpt-3-125m", 50_257, 125_226_240, 125e6),
        ("gpt-3-350m", 50_257, 355_871_744, 350e6),
        ("gpt-3-760m", 50_257, 760_300_032, 760e6),
        ("gpt-3-1b3", 50_257, 1_315_723_264, 1.3e9),
        ("gpt-3-2b7", 50_257, 2_651_553_280, 2.7e9),
        ("gpt-3-6b7", 50_257, 6_658_404_352, 6.7e9),
        ("gpt-3-13b", 50_257, 12_853_386_240, 13e9),
        ("gpt-3-175b", 50_257, 174_604_259_328, 175e9),
        ("parallel-125m", 50_257, 125_295_840, 125e6),
        ("decoder-125m", 50_257, 124_771_680, 125e6),
        ("parallel-350m", 50_257, 360_862_080, 350e6),
        ("decoder-350m", 50_257, 359_925_120, 350e6),
        ("parallel-760m", 50_257, 756_833_280, 760e6),
        ("decoder-760m", 50_257, 755_169_280, 760e6),
        ("parallel-1b3", 50_257, 1_271_952_384, 1.3e9),
        ("decoder-1b3", 50_257, 1_269_556_224, 1.3e9),
        ("two-stream-4", 65, 804_352, None),
        ("universal", 65, 214_145, None),
        ("feedback", 65, 706_053, None),
        ("draft-tiny", 65, 1_198_848, None),
        ("refined-tiny", 65, 681_344, None),
    ],
)
def test_presets_of_known_shapes(name: str, vocabulary: int, expected: int, published: float | None) -> None:
    text = (PRESETS / f"{name}.yaml").read_text()
    values = yaml.safe_load(text)["model"]
    assert count(**values | {"vocab_size": vocabulary}) == expected
    assert f"{expected:,} parameters at {vocabulary:,} pieces" in text.replace("\n# ", " ")
    if published:
        assert expected == pytest.approx(published, rel=0.032)


@pytest.mark.parametrize("size", ["125m", "350m", "760m", "1b3"])
def test_pairs_have_as_many_parameters_at_the_same_width(size: str) -> None:
    parallel, decoder = (
        yaml.safe_load((PRESETS / f"{kind}-{size}.yaml").read_text())["model"] for kind in ("parallel", "decoder")
    )
    assert [parallel[key] for key in ("width", "heads", "context")] == [
        decoder[key] for key in ("width", "heads", "context")
    ]
    ratio = count(**parallel | {"vocab_size": 50_257}) / count(**decoder | {"vocab_size": 50_257})
    assert ratio == pytest.approx(1, abs=0.005)


def test_biases_are_counted() -> None:
    width = 32
    shape: dict[str, Any] = {"layers": 2, "width": width, "heads": 4, "context": 8, "vocab_size": 10}
    per_layer = (3 + 1 + 4 + 1 + 2) * width  # qkv, out, up, down, two norms
    assert count("decoder_only", bias=True, **shape) == count("decoder_only", **shape) + 2 * per_layer + width


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"positions": "rotary"}, -8 * 48),
        ({"positions": "sinusoidal"}, -8 * 48),
        ({"norm": "rmsnorm"}, 0),
        ({"norm_position": "post"}, -48 - 2 * 48),  # no final norm, none on what cross attention reads
        ({"decoder_input_norm": True}, 48),
        ({"subtract_next_position": "layer_norm"}, 2 * 48),  # the norm, and a position more
        ({"ff": "swiglu"}, 0),  # F = 128 = 8 C / 3
        ({"ff_width": 100}, 4 * 2 * 48 * (100 - 192)),
        ({"kv_heads": 2}, -3 * 2 * 2 * 48 * 24),  # keys and values of 6 attentions have half the width
        ({"cross_source": "layer_input"}, -(12 * 48**2 + 2 * 48)),
        ({"topology": "serial"}, 0),
        ({"learned_dropout": {"source": "elementwise", "sites": ["embed", "cross"]}}, 3 * 2 * 48),
        ({"learned_dropout": {"source": "low_rank", "sites": ["embed", "cross"]}}, 3 * (2 * 12 * 48 + 48)),
        ({"learned_dropout": {"sites": ["embed", "cross"]}}, 3 * (3 * 48**2 + 48)),
        ({"learned_dropout": {"source": "embed", "sites": ["cross"]}}, 2 * (3 * 48**2 + 48) + 4 * 48**2),
        ({"l0": {"enabled": True, "sites": ["enc_sa", "embed"]}}, 3 * 48),
        ({"recurrence": {"steps": 3}}, 2 * 3 * 48),
        ({"recurrence": {"steps": 3, "halt": True, "step_embedding": "none"}}, 48 + 1),
    ],
)
def test_what_each_option_adds(options: dict[str, Any], difference: int) -> None:
    shape: dict[str, Any] = {"layers": 2, "width": 48, "heads": 4, "context": 8, "vocab_size": 10}
    assert count(**shape, **options) - count(**shape) == difference
