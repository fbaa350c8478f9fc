"""Prompts that are typed one after the other, each continued at once."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import typer

from data_pipeline.errors import ConfigError, UserError

if TYPE_CHECKING:
    from pretrain.inference.continuation import Settings
    from pretrain.inference.trained import Trained

_HELP = "Type a prompt. Ctrl-C stops a text, Ctrl-D ends. /set NAME VALUE changes an option, /set shows them."
_SAMPLING = {"repetition_penalty": float, "temperature": float, "top_k": int, "top_p": float, "min_p": float}
_OWN = {"tokens": int, "seed": int}


def ask(trained: "Trained", settings: "Settings") -> None:
    """Until the input ends. The first text draws from the seed, the next one from the next seed.

    Raises:
        ConfigError: the model was not trained to continue a text.
    """
    import readline  # noqa: F401 - gives `input` a history

    from pretrain.inference.continuation import Continuation

    trained.check_continues()
    typer.echo(_HELP)
    while True:
        try:
            line = input("> ")
        except EOFError:
            typer.echo()
            return
        except KeyboardInterrupt:
            typer.echo()
            continue
        if line.split()[:1] == ["/set"]:
            try:
                settings = changed(settings, line.split()[1:])
                typer.echo(_shown(settings))
            except UserError as error:
                typer.echo(str(error))
            continue
        try:
            typer.echo(line, nl=False)
            for _, piece in Continuation(trained, [line], settings).pieces():
                typer.echo(piece, nl=False)
        except KeyboardInterrupt:
            pass  # the reader has seen enough
        typer.echo()
        settings = replace(settings, seed=settings.seed + 1)


def changed(settings: "Settings", words: list[str]) -> "Settings":
    """Settings after `/set` with these words; as they are without any.

    Raises:
        ConfigError: no such option, or not a value of it.
    """
    if not words:
        return settings
    names = _SAMPLING | _OWN
    if len(words) != 2 or words[0].replace("-", "_") not in names:
        raise ConfigError(f"/set takes a name and a value; names are {', '.join(names)}")
    name = words[0].replace("-", "_")
    try:
        value = names[name](words[1])
    except ValueError:
        raise ConfigError(
            f"{name}={words[1]}; it is a {'number' if names[name] is float else 'whole number'}"
        ) from None
    change: dict[str, Any] = {name: None if name == "top_k" and value == 0 else value}
    if name in _SAMPLING:
        return replace(settings, sampling=replace(settings.sampling, **change))
    least = 1 if name == "tokens" else 0
    if value < least:
        raise ConfigError(f"{name}={value}; it is {least} or more")
    return replace(settings, **change)


def _shown(settings: "Settings") -> str:
    values = {name: getattr(settings.sampling, name) for name in _SAMPLING}
    values |= {"top_k": settings.sampling.top_k or 0, "tokens": settings.tokens, "seed": settings.seed}
    return "  ".join(f"{name}={value}" for name, value in values.items())
