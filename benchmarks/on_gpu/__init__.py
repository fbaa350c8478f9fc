"""The parts b of `python -m tests.gpu`: how fast it is on one GPU.

Imports among these files are relative: `benchmarks/` is a folder of scripts and no package.
"""
