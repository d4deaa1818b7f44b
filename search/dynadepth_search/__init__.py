"""The offline application of dynadepth: tasks, search, labels, training, evaluation, report and demo."""
