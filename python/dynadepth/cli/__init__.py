"""The command line `dynadepth` and the commands of the runtime."""
