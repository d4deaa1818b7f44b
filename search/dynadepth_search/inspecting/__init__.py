"""What folders of a run hold, as figures, as text tables and as a page; no model is loaded."""
