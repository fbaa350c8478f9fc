"""What the shell completes (`duet --install-completion`): runs, presets, keys, values. Quick: it runs at each Tab."""

import os
from pathlib import Path

import typer

from duet_pretrain import SOURCE
from launch.config_keys import ConfigKeys


def complete_runs(incomplete: str) -> list[str]:
    """Run folders, and folders on the way to one, such as a study's."""
    from pretrain.run.run_listing import FILES, is_run

    folder = Path(incomplete) if incomplete.endswith("/") else Path(incomplete).parent
    if not folder.is_dir():
        return []
    paths = [path for path in sorted(folder.iterdir()) if path.is_dir() and str(path).startswith(incomplete)]
    return [str(path) if is_run(path) else f"{path}/" for path in paths if path.name[0] != "." and path.name != FILES]


def shipped() -> list[str]:
    """Presets and sites, in order: `model/tiny`, `cluster/gpu`, …."""
    return sorted(
        f"{room.name}/{preset.name.removesuffix('.yaml')}"
        for room in (SOURCE / "configs").iterdir()
        if room.is_dir()
        for preset in room.iterdir()
        if preset.name.endswith(".yaml")
    )


def complete_configs(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Presets, YAML files and keys with what they mean; behind `KEY=` its values."""
    known = ConfigKeys()
    if key := _key_before(ctx, incomplete):
        return [(value, "") for value in known.values(key.split(".")) if value.startswith(incomplete)]
    key, equals, value = incomplete.partition("=")
    if equals:
        return [(f"{key}={one}", "") for one in known.values(key.split(".")) if one.startswith(value)]
    folder = Path(incomplete) if incomplete.endswith("/") else Path(incomplete).parent
    files = [str(path) for path in folder.glob("*.yaml")] if folder.is_dir() else []
    return [(name, "") for name in sorted([*shipped(), *files]) if name.startswith(incomplete)] + keys(
        known, incomplete
    )


def _key_before(ctx: typer.Context, incomplete: str) -> str | None:
    """The key whose value is asked for, in bash, to which `KEY`, `=` and `VALUE` are three words."""
    words = [str(word) for given in ctx.params.values() if isinstance(given, list | tuple) for word in given]
    if words[-1:] == ["="]:
        return words[-2] if len(words) > 1 else None
    here = os.environ.get("COMP_WORDS", "").split("\n")[int(os.environ.get("COMP_CWORD", 0)) :]
    return words[-1] if words and not incomplete and here[:1] == ["="] else None


def keys(known: ConfigKeys, incomplete: str) -> list[tuple[str, str]]:
    """Keys that begin so, up to the next dot or `=`, with what they mean; of a single one also what follows.

    So a shell has several to choose from, and sets no space behind the dot or the `=`.
    """
    above, dot, last = incomplete.rpartition(".")
    path = above.split(".") if dot else []
    names = {name: about for name, about in known.below(path).items() if name.startswith(last)}
    if len(names) != 1:
        return [
            (f"{above}{dot}{name}{'.' if known.below([*path, name]) else '='}", about) for name, about in names.items()
        ]
    [(name, about)] = names.items()
    key = f"{above}{dot}{name}"
    if known.below([*path, name]):
        return keys(known, f"{key}.")
    return [(f"{key}=", about), *((f"{key}={value}", "") for value in known.values([*path, name]))]


def complete_changes(incomplete: str) -> list[str]:
    """Keys that may change in a trained model, up to the `=`."""
    from model.architectures.registry import ARCHITECTURES
    from pretrain.config.changes import keys_in_use

    found = sorted({key for kind in ARCHITECTURES.values() for key in keys_in_use(kind)})
    return [f"{key}=" for key in found if key.startswith(incomplete)]


def complete_decode(incomplete: str) -> list[str]:
    """Ways in which a model that drafts writes."""
    from model.architectures.draft_and_verify.spec import DraftAndVerifyConfig

    return [way for way in DraftAndVerifyConfig.traits.decodings if way.startswith(incomplete)]
