"""Parts without a choice of architecture: linear maps, norms, tables, positions, noise, losses by chunk.

It imports config.
"""
