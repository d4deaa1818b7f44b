"""Sessions of onnxruntime over dynadepth's ONNX files, and the metadata of those files.

Raises the errors of a file that is missing, damaged, newer, of another kind or of other weights.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dynadepth.errors import CheckpointError, ConfigError
from dynadepth.files import check_schema_version, lfs_hint
from dynadepth.onnx.graph_builder import (
    ONNX_SCHEMA_VERSION,
    PROPERTY_PREFIX,
    need_package,
)

__all__ = ["SessionHolder", "graph_digest", "open_session", "read_facts", "source_name"]

Source = str | os.PathLike[str] | bytes
# Files of the first version all held routers and did not say so.
_FIRST_KIND = "routers"


def open_session(source: Source, providers: Sequence[str] = ("CPUExecutionProvider",)) -> Any:
    """Open a session with one thread, since a decision takes microseconds.

    Args:
        source: The file, or its content.
        providers: Execution providers of onnxruntime, in order of preference.

    Returns:
        An `onnxruntime.InferenceSession`.

    Raises:
        CheckpointError: onnxruntime cannot read the file.
        ConfigError: onnxruntime is not installed.
        FileNotFoundError: There is no such file.
    """
    runtime = need_package("onnxruntime", ConfigError)
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise FileNotFoundError(f"there is no {os.fspath(source)}; make it with `dynadepth export`")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    content = source if isinstance(source, bytes) else os.fspath(source)
    try:
        return runtime.InferenceSession(content, options, providers=list(providers))
    except Exception as error:  # onnxruntime's errors share no base but Exception
        raise CheckpointError(
            f"{source_name(source)} cannot be read by onnxruntime: {error}{lfs_hint(content)}; export it again"
        ) from error


def graph_digest(source: Source) -> str:
    """Return the SHA-256, in hexadecimal, of what a graph computes: nodes, constants, inputs and outputs.

    Names of nodes, comments and metadata, which change nothing, are left out.

    Args:
        source: The file, or its content.

    Raises:
        CheckpointError: It holds no ONNX graph.
        ConfigError: onnx is not installed.
    """
    onnx = need_package("onnx", ConfigError)
    content = source if isinstance(source, bytes) else Path(source).read_bytes()
    try:
        model = onnx.load_model_from_string(content)
    except Exception as error:  # protobuf's errors share no base but Exception
        raise CheckpointError(
            f"{source_name(source)} holds no ONNX graph: {error}{lfs_hint(content)}; export it again"
        ) from error
    graph = model.graph
    for node in graph.node:
        node.ClearField("name")
        node.ClearField("doc_string")
    digest = hashlib.sha256()
    parts = (model.opset_import, model.functions, graph.node, graph.initializer)
    for part in (*parts, graph.sparse_initializer, graph.input, graph.output):
        digest.update(f"{len(part)}\n".encode())
        for each in part:
            data = each.SerializeToString(deterministic=True)
            digest.update(f"{len(data)}\n".encode() + data)
    return digest.hexdigest()


def read_facts(
    session: Any, source: Source, kind: str, needed: Iterable[str], *, digest: str | None = None
) -> dict[str, Any]:
    """Read the metadata of a file and check that it is the one expected.

    Args:
        session: Opened by `open_session`.
        source: What it was opened from, for messages.
        kind: Kind of graph expected, `routers`, `menu` or `exits`.
        needed: Names of the metadata that must be present.
        digest: `graph_digest` of the graph that it must hold; None if that is unknown.

    Returns:
        Name, without dynadepth's prefix, to value.

    Raises:
        CheckpointError: The metadata are damaged or missing, or the file is newer, of another kind or digest.
    """
    found = session.get_modelmeta().custom_metadata_map
    name = source_name(source)
    try:
        facts = {
            key.removeprefix(PROPERTY_PREFIX): json.loads(text)
            for key, text in found.items()
            if key.startswith(PROPERTY_PREFIX)
        }
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{name} has damaged metadata: {error}; export it again") from error
    if "schema_version" not in facts:
        raise CheckpointError(
            f"{name} is an ONNX file, but not one of routers; expected what `dynadepth export` writes"
        )
    check_schema_version(
        facts, ONNX_SCHEMA_VERSION, name=name, error=CheckpointError, make_again="export it again"
    )
    given = facts.get("kind", _FIRST_KIND)
    if given != kind:
        raise CheckpointError(
            f"{name} holds a graph of kind {given!r}; expected {kind!r}: write it again with `dynadepth export`"
        )
    missing = sorted({f"{kind}_digest", *needed} - set(facts))
    if missing:
        raise CheckpointError(f"{name} lacks the property {missing[0]!r}; export it again")
    # Computed from the graph: the writer of a file can put anything into its metadata.
    if digest is not None and graph_digest(source) != digest:
        raise CheckpointError(
            f"{name} was made from other routers than those beside it, or by another version of dynadepth; write it "
            "again with `dynadepth export`"
        )
    return facts


class SessionHolder:
    """A policy that runs a session: a deep copy shares it, and unpickling opens the same file or content again."""

    def open(
        self, source: Source, budget: float, providers: Sequence[str], digest: str | None
    ) -> Any:
        """Open the session and keep the arguments of the class for pickling; raises as `open_session` does.

        Args:
            source: The file, or its content.
            budget: Mean depth over prompts, as a fraction of the number of layers.
            providers: Execution providers of onnxruntime, in order of preference.
            digest: Digest of the graph that the file must hold; None if that is unknown.

        Returns:
            An `onnxruntime.InferenceSession`.
        """
        place = source if isinstance(source, bytes) else Path(source).resolve()
        self._made_from = (place, budget), {"providers": tuple(providers), "digest": digest}
        return open_session(source, providers)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        arguments, options = self._made_from
        return partial(type(self), **options), arguments


def source_name(source: Source) -> str:
    """Name a file or content in messages."""
    return "the ONNX content" if isinstance(source, bytes) else os.fspath(source)
