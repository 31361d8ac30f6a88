"""Messages between processes of one machine, over a Unix socket that only its user can open."""

import hashlib
import json
import os
import shutil
import socket
import stat
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

LENGTH = struct.Struct("<QQ")
LONGEST = 2**34


class Packet(NamedTuple):
    """Plain data and arrays of bytes by name."""

    data: dict[str, Any]
    arrays: Mapping[str, bytes] = {}


def private_folder(owner: Path) -> Path:
    """Return a folder with a short path for sockets, empty and of this user alone; always the same one for an owner.

    Raises:
      OSError: another user has it.
    """
    name = hashlib.sha256(str(owner.absolute()).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"lwfedssl-{os.getuid()}-{name}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise OSError(f"{folder} belongs to another user, or others can open it")
    for path in folder.iterdir():  # left behind by a process that was killed
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder


def listen(path: Path) -> socket.socket:
    """Return a socket that listens at a path, which is made anew."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    path.chmod(0o600)
    listener.listen()
    return listener


def connect(path: str) -> socket.socket:
    """Return a connection to a socket.

    Raises:
      OSError: nobody listens there.
    """
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(path)
    except OSError:
        connection.close()
        raise
    return connection


def send(connection: socket.socket, packet: Packet) -> None:
    """Send a packet.

    Raises:
      OSError: the other side is gone.
    """
    sizes = {name: len(content) for name, content in packet.arrays.items()}
    head = json.dumps({"data": packet.data, "sizes": sizes}).encode()
    connection.sendall(LENGTH.pack(len(head), sum(sizes.values())) + head)
    for content in packet.arrays.values():
        connection.sendall(content)


def receive(connection: socket.socket) -> Packet:
    """Wait for a packet.

    Raises:
      OSError: the other side is gone, or sends something else.
    """
    head_size, size = LENGTH.unpack(_read(connection, LENGTH.size))
    if head_size + size > LONGEST:
        raise OSError(f"a packet of {head_size + size} bytes")
    head = json.loads(_read(connection, head_size))
    arrays = {name: _read(connection, length) for name, length in head["sizes"].items()}
    return Packet(head["data"], arrays)


def _read(connection: socket.socket, size: int) -> bytes:
    content = bytearray(size)
    view, done = memoryview(content), 0
    while done < size:
        count = connection.recv_into(view[done:])
        if not count:
            raise ConnectionResetError("the other side has closed the connection")
        done += count
    return bytes(content)
