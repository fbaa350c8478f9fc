"""A trained model in use: loading, texts, records and pages of what it did.

May import: data_pipeline.errors, data_pipeline.files, data_pipeline.ingest, data_pipeline.places,
data_pipeline.storage, data_pipeline.tokenize, model.architectures, model.attention, model.batch, model.config,
model.generation, pretrain.checkpoint, pretrain.config, pretrain.engine, pretrain.finetune, pretrain.objectives,
pretrain.run, pretrain.status_line.
"""
