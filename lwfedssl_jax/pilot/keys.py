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
CA, CERTIFICATE, KEY, DEVICES = "ca.crt", "server.crt", "server.key", "devices"
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
      ConfigError: a name is not valid, Flower is not installed, or the folder cannot be written.
    """
    for name in devices:
        if not NAME.fullmatch(name):
            raise ConfigError(f"--devices: {name!r} is not a name; accepted: letters, digits, '.', '_' and '-'")
    check_flower()
    try:
        (folder / DEVICES).mkdir(parents=True, exist_ok=True)
        made = [] if (folder / CERTIFICATE).exists() else _make_certificates(folder, hosts)
        for name in devices:
            if not (folder / DEVICES / name).exists():
                made += _make_device_key(folder / DEVICES / name)
    except OSError as error:
        raise ConfigError(f"DIR: {folder} cannot be written ({error.strerror}); accepted: another folder") from error
    return made


def _make_certificates(folder: Path, hosts: Sequence[str]) -> list[Path]:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    now, authority, own = datetime.datetime.now(datetime.UTC), *(ec.generate_private_key(ec.SECP384R1()) for _ in "ab")
    issuer, subject = (
        x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        for name in ("lwfedssl_jax pilot", "lwfedssl_jax pilot server")
    )

    def builder(subject: Any, key: Any) -> Any:
        start = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
        start = start.serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(days=1))
        return start.not_valid_after(now + datetime.timedelta(days=DAYS))

    ca = builder(issuer, authority).add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    names = [_name_of(host) for host in dict.fromkeys(["127.0.0.1", "localhost", *hosts])]
    server = builder(subject, own).add_extension(x509.SubjectAlternativeName(names), critical=False)
    server = server.add_extension(x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    made = []
    for name, certificate, key in (("ca", ca, authority), ("server", server, own)):
        signed = certificate.sign(authority, hashes.SHA384())
        made.append(_write(folder / f"{name}.crt", signed.public_bytes(serialization.Encoding.PEM), secret=False))
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        made.append(_write(folder / f"{name}.key", private, secret=True))
    return made


def _make_device_key(path: Path) -> list[Path]:
    """Make a key in OpenSSH's format, which Flower reads."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return [_write(path, private, secret=True), _write(path.with_name(f"{path.name}.pub"), public, secret=False)]


def _name_of(host: str) -> Any:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _write(path: Path, content: bytes, *, secret: bool) -> Path:
    path.touch(mode=0o600 if secret else 0o644)
    path.write_bytes(content)
    return path
