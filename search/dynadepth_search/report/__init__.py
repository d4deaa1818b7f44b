"""An evaluation as a page, as plots and as tables."""
