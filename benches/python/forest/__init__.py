"""What bench_forest.py is made of: oracles, a table of a real model's rewards, searches, and tables of figures."""
