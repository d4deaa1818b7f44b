"""The command line `dynadepth`, and the verbs of the runtime."""
