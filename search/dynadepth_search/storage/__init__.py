"""Files of long runs: written whole, resumed after a kill, and checked when read."""
