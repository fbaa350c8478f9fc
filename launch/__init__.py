"""The `duet` command line. Free of torch, mlflow and pyarrow at import: it runs on login nodes."""

import duet_pretrain

duet_pretrain.check("data_pipeline", "model", "pretrain")
