"""Many runs that are compared: the file, the results, the page, the plots.

May import: data_pipeline.errors, data_pipeline.files, data_pipeline.secret, model.costs, pretrain.config,
pretrain.metric_names, pretrain.report, pretrain.run.
"""
