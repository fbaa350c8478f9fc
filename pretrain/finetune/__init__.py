"""A run that begins with the weights of another, or of an export: all of them trained, or adapters beside them.

May import: data_pipeline.errors, data_pipeline.places, data_pipeline.tokenize, model.architectures, model.batch,
model.layers, model.masks, pretrain.checkpoint, pretrain.config, pretrain.run.
"""
