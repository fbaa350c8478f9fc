"""What the shell completes (`duet --install-completion`): run folders, presets. Quick: it runs at each press of Tab."""

from pathlib import Path

from duet_pretrain import SOURCE


def complete_runs(incomplete: str) -> list[str]:
    """Run folders, and folders on the way to one."""
    from launch.slurm.run_files import is_run

    folder = Path(incomplete) if incomplete.endswith("/") else Path(incomplete).parent
    if not folder.is_dir():
        return []
    paths = [path for path in sorted(folder.iterdir()) if path.is_dir() and str(path).startswith(incomplete)]
    runs = [str(path) for path in paths if is_run(path)]
    return runs or [f"{path}/" for path in paths if not path.name.startswith(".")]


def shipped() -> list[str]:
    """Presets and sites, in order: `model/tiny`, `cluster/gpu`, …."""
    return sorted(
        f"{room.name}/{preset.name.removesuffix('.yaml')}"
        for room in (SOURCE / "configs").iterdir()
        if room.is_dir()
        for preset in room.iterdir()
        if preset.name.endswith(".yaml")
    )


def complete_configs(incomplete: str) -> list[str]:
    """Presets, and YAML files."""
    folder = Path(incomplete) if incomplete.endswith("/") else Path(incomplete).parent
    files = [str(path) for path in folder.glob("*.yaml")] if folder.is_dir() else []
    return sorted(name for name in [*shipped(), *files] if name.startswith(incomplete))


def complete_decode(incomplete: str) -> list[str]:
    """Ways in which a model that drafts writes."""
    from model.architectures.draft_and_verify.spec import DraftAndVerifyConfig

    return [way for way in DraftAndVerifyConfig.traits.decodings if way.startswith(incomplete)]
