"""What only a GPU can prove, in minutes, part by part: `python -m tests.gpu` (docs/gpu.md)."""
