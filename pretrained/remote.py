"""A file on a web server: fetch all of it, or only the tensors that are needed.

ImageBind's file has 4.8 GB, the audio tower in it 0.35. Every checkpoint has an index that says
where each tensor lies, and a web server sends any range of bytes that it is asked for (RFC 9110,
section 14). So we read the index, about 0.5 MB, and then the bytes of these tensors.

A connection that is cut goes on where it stopped, in the same call or in the next one.
"""
import contextlib
import hashlib
import http.client
import io
import json
import math
import re
import struct
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from tqdm import tqdm

from pretrained.formats import WEB_PAGE, unwrap

BLOCK = 2**16        # bytes to fetch at least, while the index is read
CHUNK = 2**18        # bytes to write at a time
TRIES = 3            # in a row that bring nothing
PAUSE = 1.0          # seconds after the first of them


class NoParts(Exception):
    """The server sends whole files only, or the file has no index that we can read."""


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects. The hub knows the SHA-256 of a file, the server behind it does not."""

    linked = ""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        self.linked = headers.get("X-Linked-Etag", self.linked)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class RemoteFile(io.RawIOBase):
    """A file on a web server, open for reading like a local one. It fetches blocks on demand.

    parts     whether the server sends parts of it
    size      in bytes, or None
    version   the server's own name for this version of the file, or None
    sha256    64 hexadecimal digits, or None
    """

    def __init__(self, url: str):
        self.url, self.position, self.blocks = url, 0, {}
        self.size = self.version = None
        redirects = Redirects()
        self.opener = urllib.request.build_opener(redirects)
        self.reply = self.ask(0, 1)
        self.version = self.reply.headers["ETag"]
        size = self.reply.headers["Content-Length"] or ""
        if self.reply.status == 206:
            size = self.reply.headers["Content-Range"].rpartition("/")[2]    # bytes 0-0/4803584173
            self.reply.close()
        self.size = int(size) if size.isdigit() else None
        self.parts = self.reply.status == 206 and self.size is not None
        linked = re.fullmatch('"?([0-9a-f]{64})"?', redirects.linked)
        self.sha256 = linked[1] if linked else None

    def ask(self, first: int, last: int):
        """The server's reply when it is asked for the bytes from `first` to before `last`.

        Status 206, or 200 and the whole file. Raises OSError when it is something else.
        """
        headers = {"User-Agent": "torch.hub", "Range": f"bytes={first}-{last - 1}"}
        reply = self.opener.open(urllib.request.Request(self.url, headers=headers), timeout=30)
        part = reply.headers["Content-Range"] or "nothing that was asked for"
        if reply.status == 206 and not part.startswith(f"bytes {first}-"):
            raise OSError(f"asked for bytes from {first}, the server sent {part}")
        # A file that changes meanwhile would end as a mixture of two.
        if self.version and reply.headers.get("ETag", self.version) != self.version:
            raise OSError("the file has changed on the server meanwhile")
        return reply

    def stream(self, first: int, last: int):
        """Yield the bytes from `first` to before `last`, in chunks.

        Raises OSError after TRIES connections in a row that brought nothing, and NoParts.
        """
        tries = 0
        while first < last:
            before, reason = first, "the connection was cut"     # this looks like the end of file
            try:
                with self.ask(first, last) as reply:
                    if reply.status != 206:
                        raise NoParts("the server does not send parts of files")
                    while chunk := reply.read(min(CHUNK, last - first)):
                        first += len(chunk)
                        yield chunk
            except (OSError, http.client.HTTPException) as error:
                if isinstance(error, urllib.error.HTTPError) and error.code < 500:
                    raise                                    # no permission: it will say so again
                reason = error
            tries = 0 if first > before else tries + 1
            if tries == TRIES:
                raise OSError(f"{reason}, {last - first} bytes are missing")
            time.sleep(PAUSE * tries)

    # ---- What zipfile asks of a file ----

    def readable(self):
        return True

    def seekable(self):
        return True

    def tell(self):
        return self.position

    def seek(self, offset, whence=io.SEEK_SET):
        self.position = offset + (0, self.position, self.size)[whence]
        return self.position

    def readinto(self, buffer):
        first = self.position
        last = min(first + len(buffer), self.size)
        blocks = range(first // BLOCK, math.ceil(last / BLOCK))
        missing = [n for n in blocks if n not in self.blocks]
        if missing:
            start, end = missing[0] * BLOCK, min((missing[-1] + 1) * BLOCK, self.size)
            fetched = b"".join(self.stream(start, end))
            for n in range(missing[0], missing[-1] + 1):
                self.blocks[n] = fetched[n * BLOCK - start:(n + 1) * BLOCK - start]
        content = b"".join(self.blocks[n] for n in blocks)
        skip = first - blocks.start * BLOCK
        buffer[:last - first] = content[skip:skip + last - first]
        self.position = last
        return last - first


# ---- Where the tensors lie ----

class Place(NamedTuple):
    first: int                                # byte in the file
    last: int                                 # byte after it
    tensor: Callable[[bytes], torch.Tensor]   # makes the tensor of these bytes


def index_of(remote: RemoteFile) -> dict[str, Place]:
    """Name -> Place of every tensor in the file. Raises NoParts, or OSError."""
    try:
        if not remote.parts:
            raise NoParts("the server does not send parts of files")
        if remote.url.endswith(".safetensors"):
            return safetensors_index(remote)
        return zip_index(remote)
    except (NoParts, OSError, http.client.HTTPException):
        raise
    except Exception as error:     # an old format, or a server that sends nonsense
        raise NoParts(f"its index cannot be read ({type(error).__name__})") from error


def safetensors_index(remote: RemoteFile) -> dict[str, Place]:
    """A .safetensors file starts with the length of its index, 8 bytes, and the index, JSON."""
    length, = struct.unpack("<Q", remote.read(8))
    index = json.loads(remote.read(length))
    places = {}
    for name, about in index.items():
        if name != "__metadata__":
            first, last = (8 + length + offset for offset in about["data_offsets"])
            places[name] = Place(first, last, of_safetensors(about["dtype"], about["shape"]))
    return places


def of_safetensors(dtype: str, shape: list[int]):
    def tensor(content):
        # A file of this one tensor.
        about = dict(dtype=dtype, shape=shape, data_offsets=[0, len(content)])
        index = json.dumps({"tensor": about}).encode()
        return safetensors.torch.load(struct.pack("<Q", len(index)) + index + content)["tensor"]
    return tensor


def zip_index(remote: RemoteFile) -> dict[str, Place]:
    """torch.save writes a zip archive: a pickle of the dictionary, and one record a tensor.

    We make an archive of the same records on this side, with nothing in those of the tensors. Torch
    reads shapes, types and places out of that, as "meta" tensors, which have no content.
    """
    small = io.BytesIO()
    with zipfile.ZipFile(remote) as whole, zipfile.ZipFile(small, "w") as archive:
        ends = sorted(record.header_offset for record in whole.infolist())
        ends.append(whole.start_dir)
        records = {}                            # place in `small` -> record of the whole archive
        for record in whole.infolist():
            if "/." in record.filename:         # they describe the order of records in `whole`
                continue
            is_tensor = "/data/" in record.filename
            archive.writestr(record.filename, b"" if is_tensor else whole.read(record))
            # An empty record has its data where the archive ends now: torch says that place.
            records[archive.start_dir] = record
    small.seek(0)
    state = torch.load(small, map_location="meta", weights_only=True)
    places = {}
    for name, like in unwrap(state).items():
        record = records[like.untyped_storage()._checkpoint_offset]
        first = record.header_offset
        places[name] = Place(first, ends[ends.index(first) + 1], of_record(record, like))
    return places


def of_record(record: zipfile.ZipInfo, like: torch.Tensor):
    def tensor(content):
        # 30 bytes, of them the lengths of two names, these names, and the tensor.
        start = 30 + sum(struct.unpack("<HH", content[26:30]))
        content = content[start:start + record.file_size]
        if zlib.crc32(content) != record.CRC:
            raise ValueError(f"the checksum of {record.filename} is another one")
        flat = torch.frombuffer(bytearray(content), dtype=like.dtype)
        return flat.as_strided(like.shape, like.stride(), like.storage_offset())
    return tensor


# ---- Fetching ----

def fetch_tensors(remote: RemoteFile, places: dict[str, Place], path: Path) -> None:
    """Write the tensors at these places to `path`, a .safetensors file."""
    spans = sorted({(place.first, place.last) for place in places.values()})
    partial = partial_file(remote, path)
    fetch(remote, spans, partial)
    starts, position = {}, 0
    for first, last in spans:
        starts[first] = position
        position += last - first
    tensors = {}
    try:
        with open(partial, "rb") as file:
            for name, place in places.items():
                file.seek(starts[place.first])
                tensors[name] = place.tensor(file.read(place.last - place.first)).contiguous()
    except Exception as error:
        partial.unlink()
        raise OSError(f"it came damaged ({error})") from error
    written = path.with_name(f"{path.name}.partial")
    safetensors.torch.save_file(tensors, written, {"format": "pt", "from": remote.url})
    written.replace(path)     # a file under the real name is always whole
    partial.unlink()


def fetch_file(remote: RemoteFile, path: Path, sha256: str | None = None) -> None:
    """Write the whole file to `path`. sha256: its first digits, where they are known."""
    partial = partial_file(remote, path)
    sha256 = sha256 or remote.sha256
    if remote.size is None and (sha256 is None or remote.reply.status == 206):
        raise OSError("the server does not say how large it is, so nobody knows when it is whole")
    if remote.parts:
        fetch(remote, [(0, remote.size)], partial)
    else:
        fetch_at_once(remote, partial)
    with open(partial, "rb") as file:
        head = file.read(64)
    if WEB_PAGE.match(head):
        partial.unlink()
        raise OSError("the server sent a web page instead")
    if sha256:
        with open(partial, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()[:len(sha256)]
        if found != sha256:
            partial.unlink()
            raise OSError(f"invalid hash: sha256 {found}, not {sha256}")
    partial.replace(path)


def check_once(path: Path, sha256: str | None) -> None:
    """A file that somebody has put there, against its hash. Raises ValueError.

    That it was right is written down beside it, in the form that `sha256sum --check` reads.
    """
    note = path.with_name(path.name + ".sha256")
    if not sha256 or (note.is_file() and note.stat().st_mtime >= path.stat().st_mtime):
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(sha256):
        raise ValueError(f"{path} is not the public file (sha256 {found[:len(sha256)]}, not"
                         f" {sha256}): delete it, and it is fetched again")
    with contextlib.suppress(OSError):     # a shared folder that we may only read
        note.write_text(f"{found}  {path.name}\n")


def partial_file(remote: RemoteFile, path: Path) -> Path:
    """Where the bytes for `path` are kept until it is whole: another name for another version."""
    version = f"{remote.url} {remote.size} {remote.version}".encode()
    partial = path.with_name(f"{path.name}.{hashlib.sha256(version).hexdigest()[:8]}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in path.parent.glob(f"{path.name}.*.partial"):
        if old != partial:
            old.unlink()
    return partial


def progress_bar(total: int | None, path: Path, done: int = 0) -> tqdm:
    return tqdm(total=total, initial=done, desc=path.parent.name, unit="B", unit_scale=True,
                disable=None, dynamic_ncols=True)


def fetch(remote: RemoteFile, spans: list[tuple[int, int]], partial: Path) -> None:
    """Write these spans, (first byte, byte after the last), one behind the other to `partial`.

    What an earlier call has written there stays, and is not fetched again.
    """
    have = partial.stat().st_size if partial.exists() else 0
    total = sum(last - first for first, last in spans)
    with open(partial, "ab") as file, progress_bar(total, partial, have) as bar:
        for first, last in joined(spans):
            skipped = min(have, last - first)
            have -= skipped
            for chunk in remote.stream(first + skipped, last):
                file.write(chunk)
                bar.update(len(chunk))
    if partial.stat().st_size != total:
        partial.unlink()
        raise OSError("two programs have fetched it at once; start one of them again")


def joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans without a gap between them become one, so that they need one request."""
    result = spans[:1]
    for first, last in spans[1:]:
        if first == result[-1][1]:
            first = result.pop()[0]
        result.append((first, last))
    return result


def fetch_at_once(remote: RemoteFile, partial: Path) -> None:
    """From a server that does not send parts: its reply to the first request is the whole file."""
    got = 0
    with progress_bar(remote.size, partial) as bar, open(partial, "wb") as file:
        with remote.reply as reply:
            while chunk := reply.read(CHUNK):
                file.write(chunk)
                got += len(chunk)
                bar.update(len(chunk))
    if remote.size not in (None, got):
        partial.unlink()
        raise OSError(f"got {got} of {remote.size} bytes")
