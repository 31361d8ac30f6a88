"""Certificates and keys of a pilot: an authority of its own, the server's certificate, and a key for each device."""

import datetime
import ipaddress
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lwfedssl_jax.config import ConfigError
from lwfedssl_jax.pilot.processes import check_flower

DAYS = 825  # what browsers accept at most
CA, CA_KEY, CERTIFICATE, KEY, DEVICES = "ca.crt", "ca.key", "server.crt", "server.key", "devices"
AUTHORITY = "lwfedssl_jax pilot"
HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,252}")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def make_keys(folder: Path, devices: Sequence[str], hosts: Sequence[str]) -> list[Path]:
    """Make what is missing in a folder; what is there stays.

    Args:
      folder: for the authority (``ca.crt``, ``ca.key``), the server (``server.crt``, ``server.key``), and for each
        device ``devices/NAME`` and ``devices/NAME.pub``.
      devices: names.
      hosts: names and addresses of the server, in addition to those of its own machine. Devices see it as 127.0.0.1,
        where each counts its bytes.

    Returns:
      The files that were made.

    Raises:
      ConfigError: a name is not valid, Flower is not installed, the certificate has other names or the authority's key
        is missing for a new one, or the folder cannot be written.
    """
    for host in hosts:
        _name_of(host)
    for name in devices:
        if not NAME.fullmatch(name):
            raise ConfigError(f"--devices: {name!r} is not a name; accepted: letters, digits, '.', '_' and '-'")
    check_flower()
    try:
        (folder / DEVICES).mkdir(parents=True, exist_ok=True)
        made = [] if (folder / CA).exists() else _make_authority(folder)
        if not ((folder / CERTIFICATE).exists() and (folder / KEY).exists()):
            made += _make_certificate(folder, hosts)
        elif hosts:
            raise ConfigError(
                f"--hosts: {folder / CERTIFICATE} exists and keeps its names; "
                f"accepted: no --hosts, or delete that file for another one by the same authority"
            )
        for name in devices:
            if not (folder / DEVICES / f"{name}.pub").exists():
                made += _make_device_key(folder / DEVICES / name)
    except OSError as error:
        raise ConfigError(f"DIR: {folder} cannot be written ({error.strerror}); accepted: another folder") from error
    return made


def check_files(ca: Path | None, key: Path | None) -> None:
    """Refuse a device's files that are not a certificate and a private key.

    Raises:
      ConfigError: naming the option.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization

    for option, path, read, accepted in (
        ("--ca", ca, x509.load_pem_x509_certificate, "the file ca.crt"),
        ("--key", key, lambda content: serialization.load_ssh_private_key(content, None), "the file devices/NAME"),
    ):
        try:
            if path:
                read(path.read_bytes())
        except (OSError, ValueError, TypeError) as error:
            why = getattr(error, "strerror", None) or "it is something else"
            raise ConfigError(
                f"{option}: {path} cannot be read ({why}); accepted: {accepted} of `pilot keys`"
            ) from error


def _make_authority(folder: Path) -> list[Path]:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP384R1())
    ca = _certificate(AUTHORITY, AUTHORITY, key).add_extension(x509.BasicConstraints(True, 0), critical=True)
    return _write_pair(folder / CA, ca.sign(key, hashes.SHA384()), key)


def _make_certificate(folder: Path, hosts: Sequence[str]) -> list[Path]:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    if not (folder / CA_KEY).exists():
        raise ConfigError(
            f"DIR: {folder / CA_KEY} is missing, which signs the server's certificate; "
            f"accepted: put it back, or delete {folder / CA} to begin with new keys for all"
        )
    authority: Any = serialization.load_pem_private_key((folder / CA_KEY).read_bytes(), None)
    key = ec.generate_private_key(ec.SECP384R1())
    names = [_name_of(host) for host in dict.fromkeys(["127.0.0.1", "localhost", *hosts])]
    server = _certificate("lwfedssl_jax pilot server", AUTHORITY, key)
    server = server.add_extension(x509.SubjectAlternativeName(names), critical=False)
    server = server.add_extension(x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    return _write_pair(folder / CERTIFICATE, server.sign(authority, hashes.SHA384()), key)


def _certificate(subject: str, issuer: str, key: Any) -> Any:
    from cryptography import x509

    now = datetime.datetime.now(datetime.UTC)
    names = [x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]) for name in (subject, issuer)]
    builder = x509.CertificateBuilder().subject_name(names[0]).issuer_name(names[1]).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(days=1))
    return builder.not_valid_after(now + datetime.timedelta(days=DAYS))


def _write_pair(path: Path, certificate: Any, key: Any) -> list[Path]:
    from cryptography.hazmat.primitives import serialization

    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = certificate.public_bytes(serialization.Encoding.PEM)
    return [_write(path, public, secret=False), _write(path.with_suffix(".key"), private, secret=True)]


def _make_device_key(path: Path) -> list[Path]:
    """Make a key in OpenSSH's format, which Flower reads; of one that is there, only its public part."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    made = list[Path]()
    if path.exists():
        key: Any = serialization.load_ssh_private_key(path.read_bytes(), None)
    else:
        key = ec.generate_private_key(ec.SECP384R1())
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
        )
        made.append(_write(path, private, secret=True))
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return [*made, _write(path.with_name(f"{path.name}.pub"), public, secret=False)]


def _name_of(host: str) -> Any:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not HOST.fullmatch(host):
        raise ConfigError(f"--hosts: {host!r} is not a name; accepted: such as pilot.example.org")
    return x509.DNSName(host)


def _write(path: Path, content: bytes, *, secret: bool) -> Path:
    """Write a file whole or not at all; one that is secret can be read by its owner alone from the start."""
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    part.touch(mode=0o600 if secret else 0o644)
    part.write_bytes(content)
    part.replace(path)
    return path
