"""Batch script templates, shipped in the wheel."""
