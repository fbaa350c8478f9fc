"""Texts from a model: sampling, cached decoding, what it did with each token.

May import: data_pipeline.errors, model.architectures, model.attention, model.batch, model.config, model.layers,
model.masks.
"""
