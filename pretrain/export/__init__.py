"""A model for others: plain torch, Hugging Face, DeepSpeed's layout, lm-evaluation-harness.

May import: data_pipeline.errors, data_pipeline.files, data_pipeline.places, data_pipeline.storage,
data_pipeline.tokenize, model.architectures, model.attention, model.batch, model.config, model.generation, model.layers,
model.masks, pretrain.checkpoint, pretrain.config, pretrain.engine, pretrain.evaluation, pretrain.finetune,
pretrain.inference, pretrain.metric_names, pretrain.objectives, pretrain.report, pretrain.run.
"""
