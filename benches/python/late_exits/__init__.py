"""Parts of `bench_exits.py`."""
