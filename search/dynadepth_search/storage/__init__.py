"""Files of long runs: written whole, resumed after a kill, checked when read."""
