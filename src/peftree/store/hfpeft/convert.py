"""From a `.bin` of Hugging Face PEFT to safetensors, in a process of its own with bounded memory.

`python -m peftree.store.hfpeft.convert SOURCE TARGET` is that process: torch's restricted unpickler, which builds
tensors and plain containers and calls nothing else, reads SOURCE; TARGET is a new safetensors file.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from peftree.errors import StoreError
from peftree.files import read_json
from peftree.store.folder import CONFIG, PEFT, cached, read_file, write_folder
from peftree.store.tensors import header

PICKLE = "adapter_model.bin"
LIMIT = 64 << 30  # bytes of a file
ROOM = 1 << 30  # memory of the process beyond what it starts with and four times the file
SECONDS = 3600


def convert(source: str | Path, out: str | Path) -> Path:
    """Write the adapter of `source` to the folder `out` as safetensors, completely or not at all, and return its path.

    Args:
        source: a PEFT folder with `adapter_model.bin`, or that file; `adapter_config.json` is beside it.
        out: created if needed; not the folder of `source`.

    Raises:
        StoreError: a file is missing, damaged, holds anything but plain tensors, or needs too much memory.
    """
    path = Path(source)
    file = path / PICKLE if path.is_dir() else path
    if not file.is_file() or (file.is_symlink() and not cached(file)):
        raise StoreError(f"{file} is not a file.", f"Name a folder that holds {PICKLE}, or that file.")
    if Path(out).resolve() == file.parent.resolve():
        raise StoreError(f"{out} is the source's folder.", "Name another folder; the source stays unchanged.")
    if (file.parent / PEFT).exists():
        raise StoreError(f"{file.parent} already holds {PEFT}.", f"Move {file.name} out of it and load the folder.")
    read_json(file.parent / CONFIG)
    if file.stat().st_size > LIMIT:
        raise StoreError(f"{file} has {file.stat().st_size:,} bytes.", f"At most {LIMIT:,} are read.")
    config = bytes(read_file(file.parent / CONFIG, 1 << 24))
    with tempfile.TemporaryDirectory() as place:
        made = Path(place) / PEFT
        _run(file, made)
        data = read_file(made, LIMIT)
    header(data, str(file))
    return write_folder(out, {PEFT: bytes(data), CONFIG: config})


def _run(file: Path, made: Path) -> None:
    """Let the other process read `file` and write `made`."""
    command = [sys.executable, "-m", "peftree.store.hfpeft.convert", str(file.absolute()), str(made)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)  # noqa: S603
    except subprocess.TimeoutExpired:
        raise StoreError(f"{file} was not read within {SECONDS} seconds.", "Fetch the adapter again.") from None
    if done.returncode or not made.is_file():
        said = (done.stderr.strip().splitlines() or [f"the process ended with code {done.returncode}"])[-1]
        said = "".join(c for c in said if c.isprintable())[:200]
        raise StoreError(f"{file} does not hold plain tensors: {said}", "Convert it with the program that wrote it.")


def _bounded(size: int) -> None:
    """Limit this process to the memory it has now, four times `size`, and some room; only on Linux."""
    if sys.platform.startswith("linux"):
        import resource

        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limit = now + 4 * size + ROOM
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _plain(loaded: Any) -> dict[str, Any]:
    """Return copies of the tensors of a loaded file, none sharing memory; ValueError if there is anything else."""
    import torch

    if not isinstance(loaded, dict) or not loaded:
        raise ValueError(f"it holds a {type(loaded).__name__} where a dict of tensors is expected")
    for name, tensor in loaded.items():
        if not isinstance(name, str) or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            raise ValueError(f"{str(name)[:80]!r} is a {type(tensor).__name__}")
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
            raise ValueError(f"{name[:80]!r} is not a dense tensor with values")
    total = sum(t.numel() * t.element_size() for t in loaded.values())
    if total > LIMIT:
        raise ValueError(f"its tensors have {total:,} bytes")
    return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in loaded.items()}


def converted(source: str) -> bytes:
    """Return the safetensors file of a pickle of plain tensors; ValueError or StoreError says why not."""
    import torch

    from peftree.store.tensors import pack

    try:
        loaded = torch.load(source, map_location="cpu", weights_only=True)
    except MemoryError:
        raise ValueError("it needs more memory than its size allows") from None
    except Exception as error:  # noqa: BLE001  (an unpickler may raise anything)
        said = (str(error).strip() or "no reason given").splitlines()[0]
        raise ValueError(f"{type(error).__name__}: {said}") from None
    return pack(_plain(loaded))


def main(source: str, made: str) -> int:
    """Read `source` and write `made`; the last line on standard error says why not."""
    import torch

    torch.set_num_threads(1)
    try:
        _bounded(Path(source).stat().st_size)
        Path(made).write_bytes(converted(source))
    except (ValueError, MemoryError) as error:
        sys.stderr.write(f"{error or 'too little memory'}\n")
        return 1
    except StoreError as error:
        sys.stderr.write(f"{error.what}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
