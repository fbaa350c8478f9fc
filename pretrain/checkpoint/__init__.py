"""Sharded checkpoints that any number of ranks and any stage can read.

It imports engine, run and what these may.
"""
