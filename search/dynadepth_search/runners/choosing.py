"""Which runner a command line asks for."""

from collections.abc import Sequence

import torch

from dynadepth.errors import ConfigError
from dynadepth_search.runners.crew import CrewRunner
from dynadepth_search.runners.local import LocalRunner
from dynadepth_search.runners.processes import process_runner
from dynadepth_search.runners.ray_actors import ray_runner
from dynadepth_search.runners.worker import ModelSource

__all__ = ["choose_runner"]


def choose_runner(
    kind: str,
    source: ModelSource,
    *,
    workers: int | None = None,
    devices: Sequence[str] = (),
    threads: int | None = None,
    address: str | None = None,
) -> LocalRunner | CrewRunner:
    """Return a runner; the caller closes it.

    Args:
        kind: `local`, `processes` or `ray`.
        source: Where workers load the model from.
        workers: Number of workers; None: one for each device.
        devices: Where workers run, as torch names it; empty: all GPUs.
        threads: Number of threads of each worker; None: those of this machine divided, for Ray those of the cluster.
        address: Of a Ray cluster; None: a new one on this machine.

    Raises:
        ConfigError: The runner is unknown, or an option is not one of its own.
        RunnerError: There is no Ray, or no such cluster, or it has no room.
    """
    given = {
        "--workers": workers is not None,
        "--devices": bool(devices),
        "--threads": threads is not None,
        "--address": address is not None,
    }
    known = {
        "local": set(),
        "processes": {"--workers", "--devices", "--threads"},
        "ray": set(given),
    }
    if kind not in known:
        raise ConfigError(f"runner {kind!r} is unknown; expected one of {', '.join(known)}")
    foreign = [
        option for option, is_given in given.items() if is_given and option not in known[kind]
    ]
    if foreign:
        raise ConfigError(
            f"{foreign[0]} was given, but the runner {kind} has no such option; give --runner "
            f"{'ray' if foreign[0] == '--address' else 'processes or --runner ray'}, or leave it out"
        )
    if kind == "local":
        return LocalRunner()
    if kind == "ray":
        if len(set(devices)) > 1:
            raise ConfigError(
                f"--devices is {','.join(devices)}; a Ray cluster gives each worker its GPU: give cuda or cpu"
            )
        device = devices[0] if devices else None
        return ray_runner(source, address=address, workers=workers, threads=threads, device=device)
    places = _places(workers, devices)
    return process_runner(
        source, places, threads=threads or max(1, torch.get_num_threads() // len(places))
    )


def _places(workers: int | None, devices: Sequence[str]) -> tuple[str, ...]:
    """Return the device of each process."""
    found = tuple(devices) or tuple(f"cuda:{index}" for index in range(torch.cuda.device_count()))
    if not found or found == ("cpu",):
        if workers is None:
            raise ConfigError(
                "the runner processes was asked for without a GPU and without a number of workers; give --workers, or "
                "name --devices"
            )
        return ("cpu",) * workers
    if workers not in (None, len(found)):
        raise ConfigError(
            f"{workers} workers were asked for on {len(found)} devices ({', '.join(found)}); give one of --workers and "
            "--devices"
        )
    return found
