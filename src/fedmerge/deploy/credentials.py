"""Certificates and keys for development: a CA, a server's certificate, a key pair for each site.

They are for one machine or a test bed. In earnest a CA of one's own signs, and private keys never
leave the site that made them.
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import MissingExtraError

CA = "fedmerge development CA"


def make_credentials(
    folder: Path | str, hosts: Sequence[str], sites: Sequence[str], *, days: float = 365
) -> list[Path]:
    """Write ca.crt, ca.key, server.crt, server.key, and SITE.key with SITE.key.pub for each site.

    Keys of sites that are there are kept: a new key would be a new client. So are certificates that
    are good for these hosts; the others are made anew, the CA's only if it has expired or is not
    there. Certificates without ca.key beside them are somebody else's, and are kept.

    Args:
        hosts: names and addresses under which clients reach the server.
        days: how long the certificates are good for; negative for expired ones.

    Returns:
        The files that were written now.

    Raises:
        MissingExtraError: `cryptography`, which comes with Flower, is not installed.
        StateError: a file cannot be written.
    """
    try:
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.serialization import (
            Encoding,
            NoEncryption,
            PrivateFormat,
            PublicFormat,
        )
    except ImportError as error:
        raise MissingExtraError("flower") from error
    from ..store import write_atomic  # here, as it loads torch, which a node need not yet have

    folder = Path(folder)
    files: dict[str, bytes] = _certificates(folder, hosts, days)
    for site in sites:
        if (folder / f"{site}.key").exists():
            continue
        key = ec.generate_private_key(ec.SECP384R1())
        public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        files[f"{site}.key"] = key.private_bytes(
            Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()
        )
        files[f"{site}.key.pub"] = public + b"\n"
    for name, data in files.items():
        write_atomic(folder / name, data, 0o600 if name.endswith(".key") else 0o644)
    return [folder / name for name in files]


def _certificates(folder: Path, hosts: Sequence[str], days: float) -> dict[str, bytes]:
    """The certificates and their keys that have to be written."""
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.x509.oid import ExtendedKeyUsageOID

    if (folder / "server.crt").exists() and not (folder / "ca.key").exists():
        return {}
    files: dict[str, bytes] = {}
    ca, ca_key = _good(folder, "ca"), _key(folder / "ca.key")
    if ca is None or ca_key is None or ca.public_key() != ca_key.public_key():
        ca, ca_key = _authority(days)
        files |= {"ca.crt": _pem(ca), "ca.key": _pem(ca_key)}
    names = [_name(host) for host in hosts]
    server, server_key = _good(folder, "server"), _key(folder / "server.key")
    if server is not None and server_key is not None:
        own = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        fits = _signed(server, ca) and server.public_key() == server_key.public_key()
        if fits and sorted(map(str, own)) == sorted(map(str, names)):
            return {}
    ca_id = x509.SubjectKeyIdentifier.from_public_key(ca.public_key())
    server_key = ec.generate_private_key(ec.SECP384R1())
    server = (
        _begun(hosts[0], server_key, days)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(ca_id), critical=False
        )
        .sign(ca_key, SHA256())
    )
    return {**files, "server.crt": _pem(server), "server.key": _pem(server_key)}


def _good(folder: Path, name: str) -> Any:
    """The certificate of that name if it can be read and has not expired, else None."""
    from cryptography import x509

    try:
        found = x509.load_pem_x509_certificate((folder / f"{name}.crt").read_bytes())
    except (OSError, ValueError):
        return None
    return found if datetime.datetime.now(datetime.UTC) < found.not_valid_after_utc else None


def _signed(server: Any, ca: Any) -> bool:
    try:
        server.verify_directly_issued_by(ca)
    except Exception:  # whichever of the library's says that it was not
        return False
    return True


def _key(path: Path) -> Any:
    """The private key in a file, None if it cannot be read."""
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        return load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError):
        return None


def _name(host: str) -> Any:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _authority(days: float) -> tuple[Any, Any]:
    """A CA's certificate and key."""
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.hashes import SHA256

    key = ec.generate_private_key(ec.SECP384R1())
    usage = dict.fromkeys(
        (
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    made = (
        _begun(CA, key, days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(
            x509.KeyUsage(digital_signature=True, key_cert_sign=True, crl_sign=True, **usage),
            critical=True,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, SHA256())
    )
    return made, key


def _begun(subject: str, key: Any, days: float) -> Any:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    def name(text: str) -> Any:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    now = datetime.datetime.now(datetime.UTC)
    end = now + datetime.timedelta(days=days)
    start = min(now, end) - datetime.timedelta(days=1)
    return (
        x509.CertificateBuilder()
        .subject_name(name(subject))
        .issuer_name(name(CA))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
    )


def _pem(made: Any) -> bytes:
    """A certificate or a private key as text."""
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
    )

    if hasattr(made, "private_bytes"):
        key: bytes = made.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return key
    certificate: bytes = made.public_bytes(Encoding.PEM)
    return certificate
