"""What benchmarks/data.py compares with, and the start it times. Not run by themselves."""
