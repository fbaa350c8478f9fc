"""A smaller model of a trained one, beside which it is measured: without parts, or with numbers of fewer bits.

May import: data_pipeline.errors, model.architectures, model.attention, model.batch, model.config, model.generation,
model.layers, model.masks, pretrain.checkpoint, pretrain.config, pretrain.export, pretrain.finetune,
pretrain.inference, pretrain.metric_names.
"""
