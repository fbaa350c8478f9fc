"""What lies in an export for transformers: code, configuration, tokenizer, model card; and how it is uploaded.

May import: data_pipeline.errors, data_pipeline.files, data_pipeline.ingest, data_pipeline.places,
data_pipeline.storage, data_pipeline.tokenize, model.architectures, model.attention, model.batch, model.config,
model.layers, pretrain.checkpoint, pretrain.config, pretrain.objectives.
"""
