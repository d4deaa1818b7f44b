"""Routers published on the Hugging Face hub: checked first, then sent in one commit.

Decides what may be pushed where, and explains the errors of the hub. `dynadepth.checkpoints.save_load` loads from it.
"""

import os
import re
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynadepth._core import __version__
from dynadepth.checkpoints.paths import (
    CARD_NAME,
    CONFIG_NAME,
    FOLDER_NAME,
    ONNX_NAME,
    ROUTERS_FILES,
    first_lines,
)
from dynadepth.checkpoints.save_load import export_policy, load_policy, save_policy
from dynadepth.checkpoints.trained_policy import TrainedPolicy
from dynadepth.errors import CheckpointError, ConfigError, DynadepthError, HubError
from dynadepth.models.names import HUB_ID

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

__all__ = ["push_policy"]

_COMMIT = re.compile(r"[0-9a-f]{40}")
# Files at the top of a repository that are not part of a model.
_NEUTRAL = re.compile(r"\.git\w+|LICEN[CS]E(\.\w+)?")
_ADVICE = {
    401: "the hub does not know who is pushing; log in with `hf auth login`, or give a token that may write there",
    402: "the hub requires a paid plan for this repository; push to another one",
    403: "the token may not write there; log in with `hf auth login` as a member, or give a token that may",
    404: "there is no such repository or revision, or this token may not read it; check the names and the token",
    409: "someone else is changing the repository; push again",
    412: "someone else has pushed in between; look at their commit, then push again",
    429: "the hub has had too many requests; push again later",
}


def push_policy(
    folder_or_routers: str | os.PathLike[str] | TrainedPolicy,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    beside_model: bool = False,
) -> str:
    """Publish routers, or a menu, on the Hugging Face hub.

    Everything is checked before anything is sent. All files go into one commit, which also removes a `routers.onnx` of
    other routers: readers of the repository see either the previous routers or these. Nothing but the files of a
    routers folder is sent.

    Args:
        folder_or_routers: A routers folder, a folder that contains one called `routers`, or routers in memory; the
            latter are sent with a model card, and with an ONNX file if the `onnx` extra is installed.
        repo_id: The model repository on the hub, `org/name`; it is created if it does not exist.
        private: Whether a new repository is private; an existing one must match. None: a new one follows its owner's
            settings.
        revision: Branch to push to, created from the main branch if it does not exist; None: the main branch.
        token: Access token of the hub; None: that of the user who is logged in.
        commit_message: Title of the commit; None: one that names the base model.
        create_pr: Open a pull request instead, for a repository that someone else owns.
        beside_model: Put the files into `routers/`, where `wrap_model` finds them if the repository is the base
            model's own.

    Returns:
        The URL of the commit, or of the last commit if the repository already holds the same files.

    Raises:
        CheckpointError: A file is missing or damaged, or `routers.onnx` was made from other routers. Nothing was sent.
        ConfigError: `repo_id` is not a hub id or `revision` not a branch; or there is a `routers.onnx` and no
            onnxruntime to check it. Nothing was sent.
        ExportError: Routers in memory cannot be written as ONNX. Nothing was sent.
        FileNotFoundError: There is no such folder. Nothing was sent.
        HubError: The hub cannot be reached or refuses; or the repository holds something else, or `private` does not
            match it. Its files are unchanged; a new repository or branch may have been created.
    """
    _check_names(repo_id, revision)
    if isinstance(folder_or_routers, TrainedPolicy):
        with tempfile.TemporaryDirectory() as scratch:
            folder = save_policy(Path(scratch) / FOLDER_NAME, folder_or_routers)
            if find_spec("onnx") and find_spec("onnxruntime"):
                export_policy(folder_or_routers, folder / ONNX_NAME)
            return push_policy(
                folder,
                repo_id,
                private=private,
                revision=revision,
                token=token,
                commit_message=commit_message,
                create_pr=create_pr,
                beside_model=beside_model,
            )
    folder, routers = _check_folder(Path(folder_or_routers))
    prefix = f"{FOLDER_NAME}/" if beside_model else ""
    files = {f"{prefix}{name}": folder / name for name in ROUTERS_FILES}
    message = commit_message or _message(routers)
    try:
        from huggingface_hub import HfApi

        api = HfApi(token=token, library_name="dynadepth", library_version=__version__)
        found = _prepare(api, repo_id, private=private, revision=revision, create_pr=create_pr)
        if not beside_model:
            _check_content(repo_id, found)
        return _commit(
            api, repo_id, files, found, message=message, revision=revision, create_pr=create_pr
        )
    except DynadepthError:
        raise
    # huggingface_hub, its HTTP client and hf_xet share no base but Exception.
    except Exception as error:
        at = "" if revision is None else f" at revision {revision}"
        raise HubError(
            f"cannot push {folder} to {repo_id}{at}: {_advice(error)} ({type(error).__name__}: {first_lines(error)})"
        ) from error


def _check_names(repo_id: str, revision: str | None) -> None:
    if not HUB_ID.fullmatch(repo_id):
        raise ConfigError(
            f"repo_id is {repo_id!r}; expected a hub id like org/name: a user or organisation and a name"
        )
    if revision is not None and (not revision or _COMMIT.fullmatch(revision)):
        raise ConfigError(
            f"revision is {revision!r}; expected the name of a branch, since nothing can be pushed to a commit"
        )


def _check_folder(path: Path) -> tuple[Path, TrainedPolicy]:
    """Return the routers folder and its policy, after checking that every file can be loaded."""
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder {path}; expected a routers folder")
    routers = load_policy(path)
    folder = routers.folder or path
    card = folder / CARD_NAME
    try:
        text = card.read_text(encoding="utf-8")
    except (FileNotFoundError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{card}, the model card, is missing or not text ({error}); write one, or save the routers again"
        ) from error
    if not text.strip():
        raise CheckpointError(f"{card}, the model card, is empty; save the routers again")
    if (folder / ONNX_NAME).is_file():
        lowest, highest = calibrated = routers.calibration.range
        # A depth of the table, so that the policy does not warn of a distant one.
        depths = [depth for depth in routers.calibration.depths if lowest <= depth <= highest]
        routers.policy((depths or calibrated)[0], backend="onnx")
    return folder, routers


def _message(routers: TrainedPolicy) -> str:
    what = "a menu" if routers.kind == "menu" else "routers"
    return f"Upload {what} for {routers.base_model or 'a model without a name'} with dynadepth"


def _prepare(
    api: "HfApi", repo_id: str, *, private: bool | None, revision: str | None, create_pr: bool
) -> "ModelInfo":
    """Create the repository and the branch if need be, and return their content."""
    api.create_repo(repo_id, repo_type="model", private=private, exist_ok=True)
    found = api.model_info(repo_id)
    if private is not None and bool(found.private) is not private:
        is_so, wanted = ("private", "public") if found.private else ("public", "private")
        raise HubError(
            f"the hub repository {repo_id} exists and is {is_so}, but private={private} asks for a {wanted} one; "
            "nothing was sent: change it in its settings on the hub, or leave private out"
        )
    if revision is None:
        return found
    if not create_pr and not revision.startswith("refs/"):
        refs = api.list_repo_refs(repo_id)
        if revision in {tag.name for tag in refs.tags}:
            raise HubError(
                f"revision {revision} of {repo_id} is a tag, to which nothing can be pushed; give a branch"
            )
        if revision not in {branch.name for branch in refs.branches}:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
    return api.model_info(repo_id, revision=revision)


def _names(found: "ModelInfo") -> set[str]:
    return {file.rfilename for file in found.siblings or ()}


def _check_content(repo_id: str, found: "ModelInfo") -> None:
    """Refuse the top of a repository that holds something else: the routers' model card would replace its own."""
    names = _names(found)
    others = sorted(
        name for name in names if name not in ROUTERS_FILES and not _NEUTRAL.fullmatch(name)
    )
    if others and CONFIG_NAME not in names:
        raise HubError(
            f"the hub repository {repo_id} holds {others[0]!r}{' and more' if others[1:] else ''} and no routers, and "
            "their model card would replace its own; nothing was sent: give the routers a repository of their own, or, "
            "if it is the base model's, push them beside it: beside_model=True, --beside-model"
        )


def _commit(
    api: "HfApi",
    repo_id: str,
    files: dict[str, Path],
    found: "ModelInfo",
    *,
    message: str,
    revision: str | None,
    create_pr: bool,
) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    there = _names(found)
    operations: list[Any] = []
    for name, file in files.items():
        if file.is_file():
            operations.append(CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(file)))
        elif name in there:
            operations.append(CommitOperationDelete(path_in_repo=name))
    info = api.create_commit(
        repo_id,
        operations,
        commit_message=message,
        revision=revision,
        create_pr=create_pr,
        # The commit builds on the revision that was checked, so two simultaneous pushes cannot mix their files.
        parent_commit=found.sha,
    )
    return str(info.commit_url)


def _advice(error: Exception) -> str:
    """Say what an error of the hub means and what to do about it."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    # An upload in a thread fails with a RuntimeError whose cause is the hub's answer.
    while isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, OfflineModeIsEnabled):
        return "huggingface_hub is in offline mode; to push, unset HF_HUB_OFFLINE"
    if isinstance(error, LocalTokenNotFoundError):
        return _ADVICE[401]
    if status in _ADVICE:
        return _ADVICE[status]
    if status is not None and status >= 500:
        return "the hub has failed; push again later"
    if status is not None or isinstance(error, ValueError):
        return "the hub rejects the request; correct it and push again"
    # The base class comes from the HTTP client, whichever one this huggingface_hub uses.
    if isinstance(error, (OSError, *HfHubHTTPError.__bases__)):
        return (
            "the hub cannot be reached; check the network, a proxy and HF_ENDPOINT, then push again"
        )
    return "huggingface_hub failed; update it, or HF_ENDPOINT is not a hub"
