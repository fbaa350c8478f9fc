"""`duet generate`: texts while they grow, as JSON, as a page, or one prompt after the other."""

import json
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from data_pipeline.errors import ConfigError, UserError
from launch.commands.runs import run_argument
from launch.completion import complete_changes, complete_decode
from pretrain import status_line

if TYPE_CHECKING:
    from data_pipeline.ingest.readers import Message
    from pretrain.inference.continuation import Continuation, Settings
    from pretrain.inference.trained import Trained

_TOKENS = 200


def generate(
    run: Annotated[Path, run_argument(metavar="RUN", help="A run folder, a checkpoint or an export.")],
    words: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue; may be given several times.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Texts to continue, one on each line; empty lines are left out.")
    ] = None,
    chat: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="What a user says; may be given several times."),
    ] = None,
    messages: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Conversations to go on with, as JSON Lines with `messages`.")
    ] = None,
    step: Annotated[int | None, typer.Option("--step", help="Use the checkpoint of this step, not the newest.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most, for each text.")] = _TOKENS,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always take the likeliest token.")] = False,
    temperature: Annotated[float, typer.Option(min=0.0, max=100.0, help="Divides the logits; 0 is --greedy.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Choose among this many likeliest tokens; 0: among all.")] = 50,
    top_p: Annotated[
        float, typer.Option(max=1.0, help="Choose among the fewest tokens that have this probability together.")
    ] = 1.0,
    min_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Leave out tokens less likely than this share of the likeliest.")
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1, tokens that the text holds already become less likely.")
    ] = 1.0,
    stop: Annotated[
        list[str] | None, typer.Option(help="End a text before this string; may be given several times.")
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Another value than trained with, of a key that allows it.",
            autocompletion=complete_changes,
        ),
    ] = None,
    decode: Annotated[
        str | None,
        typer.Option(
            metavar="WAY",
            help="Of a model that drafts: verify, ar, nar, mask_predict or refine.",
            autocompletion=complete_decode,
        ),
    ] = None,
    fill: Annotated[
        bool,
        typer.Option("--fill", help="Fill gaps: `<gap:5>` in a prompt is 5 missing tokens. Of a model that can."),
    ] = False,
    iterations: Annotated[int, typer.Option(min=1, help="Passes of --decode mask_predict.")] = 10,
    candidates: Annotated[int, typer.Option(min=1, help="Lengths that nar and mask_predict try.")] = 1,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="The same seed gives the same text.")] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="A line of JSON for each text: tokens, probabilities, gates.")
    ] = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page that shows gates and attention of each token.")
    ] = None,
) -> None:
    """Continue texts; several are computed side by side, and the first is shown while it grows.

    Without a prompt it is read from standard input; on a terminal you are asked for one after the other.

    Examples: `duet generate runs/quickstart --prompt "Return the "`,
    `duet generate runs/quickstart --prompts prompts.txt --top-k 0 --top-p 0.9 --stop "."`,
    `duet generate runs/quickstart --prompt "Return the " --html text.html`,
    `duet generate runs/talk --chat "Who are you?"`
    """
    from model.generation.drafting import Drafting
    from model.generation.sampling import Sampling
    from pretrain.export.use import open_trained
    from pretrain.inference.continuation import Settings

    if words:
        meant = shlex.join(["duet", "generate", str(run), "--prompt", " ".join(words)])
        raise ConfigError(f"a text to continue is given with --prompt: {meant}")
    sampling = Sampling(repetition_penalty, 0.0 if greedy else temperature, top_k or None, top_p, min_p)
    if decode is None and (iterations, candidates) != (10, 1):
        raise ConfigError("--iterations and --candidates belong to --decode mask_predict or nar; name the way")
    drafting = Drafting(decode, iterations, candidates) if decode else None
    settings = Settings(sampling, tokens, tuple(stop or []), seed, drafting)
    texts = _given(prompt, prompts)
    asked = _asked(chat, messages)
    if asked and (texts or fill):
        raise ConfigError("--prompt and --prompts are texts to continue, --chat and --messages conversations: give one")
    if fill:
        others = bool(html or tokens != _TOKENS)
        _fill(texts or [_standard_input()], open_trained(run, step, changes or []), settings, as_json, others)
    elif asked:
        _continue(asked, open_trained(run, step, changes or []), settings, as_json, html)
    elif not texts and _is_terminal() and not as_json and not html:
        ask(open_trained(run, step, changes or []), settings)
    else:
        _continue(texts or [_standard_input()], open_trained(run, step, changes or []), settings, as_json, html)


def _given(prompt: list[str] | None, prompts: Path | None) -> list[str]:
    from pretrain.inference.text import read_prompts

    return [*(prompt or []), *(read_prompts(prompts) if prompts else [])]


def _asked(chat: list[str] | None, messages: Path | None) -> "list[list[Message]]":
    from pretrain.inference.chat import question, read_conversations

    return [*map(question, chat or []), *(read_conversations(messages) if messages else [])]


def _fill(texts: list[str], trained: "Trained", settings: "Settings", as_json: bool, others: bool) -> None:
    """Texts with their gaps filled, or a line of JSON for each; `others`: options were given that fit no gap."""
    from pretrain.inference.filling import filled

    if others or settings.stops or settings.drafting:
        raise ConfigError("--fill: gaps say how long they are; leave --tokens, --stop, --decode and --html out")
    found = filled(trained, texts, settings.sampling, settings.seed)
    for number, text in enumerate(found, 1):
        if as_json:
            typer.echo(json.dumps(text.told(trained.tokenizer), allow_nan=False))
        else:
            status_line.show((f"== {number} of {len(found)} ==\n" if len(found) > 1 else "") + text.text)


def _continue(
    texts: "Sequence[str | Sequence[Message]]",
    trained: "Trained",
    settings: "Settings",
    as_json: bool,
    html: Path | None,
) -> None:
    """All of them, shown as was asked for."""
    from pretrain.inference.continuation import Continuation
    from pretrain.inference.text_page import prepare, records, write_page

    continuation = Continuation(trained, texts, settings, recorded=as_json or html is not None)
    if html:
        prepare(html, continuation)
    if as_json:
        for _ in continuation.pieces():
            pass
    else:
        _show([text.prompt + _between(continuation) for text in continuation.texts], continuation.pieces())
        _tell_passes(continuation)
    if not as_json and not html:
        return
    found = records(trained, continuation, attention=html is not None)
    if as_json:
        for one in found:
            told = {name: value for name, value in one.items() if name != "attention"}
            typer.echo(json.dumps(told, allow_nan=False))
    if html:
        write_page(html, found)
        typer.echo(str(html), err=as_json)


def _show(prompts: list[str], pieces: Iterable[tuple[int, str]]) -> None:
    """The first text while it grows, then the others."""
    later = list(prompts)
    if len(prompts) > 1:
        typer.echo(f"== 1 of {len(prompts)} ==")
    status_line.show(prompts[0], end="")
    for number, piece in pieces:
        if number:
            later[number] += piece
        else:
            status_line.show(piece, end="")
    typer.echo()
    for number, text in enumerate(later[1:], 2):
        status_line.show(f"== {number} of {len(prompts)} ==\n{text}")


def _between(continuation: "Continuation") -> str:
    """What stands between a prompt and what comes of it: something where that is another text."""
    return " ⟶ " if continuation.apart else ""


def _tell_passes(continuation: "Continuation") -> None:
    """How a model that drafts wrote each text, on standard error."""
    for number, passes in enumerate(continuation.passes or [], 1):
        assert continuation.drafting is not None
        which = f" {number} of {len(continuation.texts)}" if len(continuation.texts) > 1 else ""
        tokens = continuation.texts[number - 1].num_tokens
        typer.echo(
            f"{continuation.drafting.decode}{which}: {tokens} tokens in {passes.drafts} drafts and {passes.writes} "
            "passes of the decoder that writes",
            err=True,
        )


def _is_terminal() -> bool:
    """Somebody can be asked, and sees what comes."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))


def _standard_input() -> str:
    """All of it, but for the newline at its end, which `echo` adds, and a byte order mark; nothing from a terminal.

    Raises:
        ConfigError: not UTF-8.
    """
    if sys.stdin is None or sys.stdin.isatty():
        return ""
    try:
        return sys.stdin.buffer.read().decode("utf-8").removeprefix("\ufeff").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"standard input: not UTF-8 at byte {error.start}") from error


_HELP = "Type a prompt. Ctrl-C stops a text, Ctrl-D ends. /set NAME VALUE changes an option, /set shows them; /help."
_LITERAL = "A text that begins with / is given with --prompt."
_COMMAND = re.compile(r"/set( .*)?|/[a-z]+")
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
    status_line.end()  # it would write over what is being typed
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
        if _COMMAND.fullmatch(line.strip()):
            settings = _commanded(settings, line.split())
            continue
        try:
            continuation = Continuation(trained, [line], settings)
            status_line.show(line + _between(continuation), end="")
            for _, piece in continuation.pieces():
                status_line.show(piece, end="")
        except KeyboardInterrupt:
            pass  # the reader has seen enough
        typer.echo()
        _tell_passes(continuation)
        settings = replace(settings, seed=settings.seed + 1)


def _commanded(settings: "Settings", words: list[str]) -> "Settings":
    """Settings after a line that begins with `/`; what it asks for, or what is wrong with it, is shown."""
    try:
        if words[0] == "/set":
            settings = changed(settings, words[1:])
            typer.echo(_shown(settings))
        elif words[0] == "/help":
            typer.echo(f"{_HELP}\n{_shown(settings)}")
        else:
            typer.echo(f"{words[0]}: no command, and not sent to the model; there are /set and /help. {_LITERAL}")
    except UserError as error:
        typer.echo(str(error))
    return settings


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
