"""Parts of any model: linear maps, norms, tables, positions, noise, dropout, the loss by chunks.

May import: model.batch, model.config.
"""
