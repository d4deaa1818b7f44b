"""Who does the blocks of a long work: this process, a process for each device, or actors of a Ray cluster."""
