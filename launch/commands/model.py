"""`duet model`: what a configuration's model holds and costs, before anything is made."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from model.config.model_config import ModelConfig

if TYPE_CHECKING:
    from pretrain.config.schema import Config

app = typer.Typer(no_args_is_help=True, help="Size and cost of a model.")
ConfigArgs = Annotated[
    list[str],
    typer.Argument(metavar="CONFIG… KEY=VALUE…", help="YAML files or presets, then overrides such as model.layers=4."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="As JSON.")]


@app.command()
def params(config: ConfigArgs, as_json: JsonOption = False) -> None:
    """Count the parameters: all, without the position table, and by part. Nothing is allocated.

    Examples: `duet model params model/published model.vocab_size=50257`,
    `duet model params model/tiny model.width=256 model.vocab_size=4096 --json`
    """
    from model.costs.parameters import parameters_by_part

    parts = parameters_by_part(_model(config))
    total = sum(parts.values())
    totals = {"total": total, "without position table": total - parts.get("position table", 0)}
    _print(totals, parts, as_json)


@app.command()
def flops(config: ConfigArgs, as_json: JsonOption = False) -> None:
    """Floating-point operations for each token of a full context: forward, in training, and forward by part.

    Matrix products only; the token table is the head. Training is three times the forward pass.

    Examples: `duet model flops model/published model.vocab_size=50257`,
    `duet model flops model/decoder-125m model.vocab_size=50257 model.context=4096 --json`
    """
    from model.costs.flops import forward_flops_per_token, sample_flops_by_part, training_flops_per_token

    whole = _load(config)
    model, pairs = whole.model, whole.data.objective == "pairs"
    parts = {name: count / model.context for name, count in sample_flops_by_part(model, pairs).items()}
    totals = {"forward": forward_flops_per_token(model, pairs), "training": training_flops_per_token(model, pairs)}
    _print(totals, parts, as_json)


def _model(config: list[str]) -> ModelConfig:
    return _load(config).model


def _load(config: list[str]) -> "Config":
    from pretrain.config.schema import load

    return load(config)


def _print(totals: Mapping[str, float], parts: Mapping[str, float], as_json: bool) -> None:
    """A line for each number; of parts, their share of the sum, too."""
    if as_json:
        typer.echo(json.dumps({**{key.replace(" ", "_"): value for key, value in totals.items()}, "parts": parts}))
        return
    width = max(map(len, [*totals, *parts]))
    for name, count in totals.items():
        typer.echo(f"{name:<{width}} {count:>18,.0f}")
    for name, count in sorted(parts.items(), key=lambda part: -part[1]):
        typer.echo(f"{name:<{width}} {count:>18,.0f} {count / sum(parts.values()):7.2%}")
