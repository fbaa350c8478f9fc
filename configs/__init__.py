"""YAML presets, shipped in the wheel."""
