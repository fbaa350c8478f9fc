"""What the streams of trained models know: states of layers, linear probes, likeness, and a page of them.

May import: data_pipeline.errors, data_pipeline.files, data_pipeline.sampling, data_pipeline.storage,
data_pipeline.tokenize, model.architectures, model.attention, model.batch, pretrain.checkpoint, pretrain.config,
pretrain.engine, pretrain.evaluation, pretrain.export, pretrain.inference, pretrain.report.
"""
