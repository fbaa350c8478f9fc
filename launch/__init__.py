"""The `duet` command line. Free of torch, mlflow and pyarrow at import: it runs on login nodes."""
