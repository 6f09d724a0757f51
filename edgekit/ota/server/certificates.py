"""Who a device is on the wire: certificates of the fleet's own authority, and the list of those that are revoked.

A certificate's common name is what a broker knows its owner by. Sees no private key: `keys` signs.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Literal

import msgspec

from edgekit.durable import write_file
from edgekit.errors import MessageError, TrustError, UnknownName, UsageError
from edgekit.ota import messages
from edgekit.ota.server import metadata

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime
    from pathlib import Path

    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes as PublicKey

    from edgekit.ota.server.keys import Custody

AUTHORITY, REVOKED, LEDGER = "authority.pem", "revoked.pem", "certificates.json"
SERVER = "edgekit-server"
"""Reads every device's topics: no device may be called so."""
LASTS = timedelta(days=7300)
"""Of the authority and of the list of revoked ones: a broker whose list ran out lets nobody in."""
SKEW = timedelta(days=1)
Part = Literal["device", "server", "broker"]


class Entry(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One certificate: serial number in hexadecimal, whose it is, until when (Unix seconds), when it was revoked."""

    serial: str
    name: str
    part: Part
    until: float
    revoked: float = 0.0


@dataclass(frozen=True)
class Holder:
    """Whose a certificate is: a device's, the server's, or the broker's, which is reached at ``name`` and ``hosts``."""

    name: str
    part: Part = "device"
    hosts: Sequence[str] = ()


def issue(custody: Custody, holder: Holder, public: PublicKey, *, now: datetime, days: int) -> bytes:
    """Certify that a key is somebody's; return the PEM.

    Raises:
        UsageError: the name cannot stand in a topic, or is somebody else's.
        KeyAway: the authority's key cannot be reached.
    """
    _require_name(holder.name)
    until = now + timedelta(days=days)
    with metadata.sole_writer(custody.folder):
        authority = _authority(custody, now)
        ledger = read_ledger(custody.folder)
        _require_own(holder, ledger)
        certificate = custody.certify(_certificate(holder, public, authority, (now, until)))
        serial = f"{certificate.serial_number:x}"
        # Written down before it is handed out: what is not in the ledger could never be revoked.
        ledger.append(Entry(serial=serial, name=holder.name, part=holder.part, until=until.timestamp()))
        _write_ledger(custody.folder, ledger)
    return _pem(certificate)


def revoke(custody: Custody, name: str, now: datetime) -> Path:
    """Put every certificate of a name on the list that the broker reads; return its path.

    Raises:
        UnknownName: nobody was certified by that name.
        KeyAway: the authority's key cannot be reached.
    """
    with metadata.sole_writer(custody.folder):
        ledger = read_ledger(custody.folder)
        if not any(entry.name == name for entry in ledger):
            raise UnknownName("device", name, {entry.name for entry in ledger})
        for entry in ledger:
            if entry.name == name and not entry.revoked:
                entry.revoked = now.timestamp()
        _write_ledger(custody.folder, ledger)
        return _write_list(custody, _authority(custody, now), ledger, now)


def key_of_request(data: bytes, name: str) -> PublicKey:
    """Return the public key of a request (PKCS#10 in PEM) that a device made, whose private key never leaves it.

    Raises:
        UsageError: it is none, is for another name, or its key is weak.
        TrustError: its sender does not have the key.
    """
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.x509.oid import NameOID

    hint = f"openssl req -new -key key.pem -subj /CN={name}"
    try:
        request = x509.load_pem_x509_csr(data)
        names = [str(one.value) for one in request.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
        is_signed, key = request.is_signature_valid, request.public_key()
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UsageError(f"this is no certificate request: {error}", hint) from error
    if not is_signed:
        raise TrustError("the certificate request is not signed by its own key", "have the device make it anew")
    if names != [name]:
        raise UsageError(f"the certificate request is for {', '.join(names) or 'nobody'}, not {name}", hint)
    if not _is_strong(key):
        raise UsageError(f"the key of {name} is weak, or of a kind nobody expects", "take P-256, Ed25519 or RSA 2048")
    return key


def _is_strong(key: PublicKey) -> bool:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    if isinstance(key, rsa.RSAPublicKey):
        return key.key_size >= 2048
    return isinstance(key, ed25519.Ed25519PublicKey) or (
        isinstance(key, ec.EllipticCurvePublicKey) and key.key_size >= 256
    )


def authority(custody: Custody, now: datetime) -> bytes:
    """Return the certificate of the fleet's authority (PEM); made where there is none."""
    with metadata.sole_writer(custody.folder):
        return _pem(_authority(custody, now))


def replace_authority(custody: Custody, now: datetime) -> None:
    """Make another authority, after the key of the old one was stolen: nothing that it certified is good any more.

    Raises:
        KeyAway: the folder of its key is not there.
    """
    with metadata.sole_writer(custody.folder):
        _authority(custody, now)
        custody.replace_authority()
        _authority(custody, now)


def read_ledger(folder: Path) -> list[Entry]:
    """Read what was ever certified.

    Raises:
        TrustError: the file is damaged.
    """
    path = folder / LEDGER
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[Entry]) if path.exists() else []
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise TrustError(f"{path} is damaged: {error}", "restore it from the backup") from error


def _write_ledger(folder: Path, ledger: list[Entry]) -> None:
    write_file(folder / LEDGER, msgspec.json.format(msgspec.json.encode(ledger)) + b"\n")


def _authority(custody: Custody, now: datetime) -> x509.Certificate:
    from cryptography import x509

    path, public = custody.folder / AUTHORITY, custody.authority()
    if not path.is_file() or x509.load_pem_x509_certificate(path.read_bytes()).public_key() != public:
        name = _name(f"edgekit devices of {custody.folder.absolute().name}"[:64])
        made = _builder(name, name, public, (now, now + LASTS))
        made = made.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        usage = x509.KeyUsage(
            key_cert_sign=True, crl_sign=True, digital_signature=False, content_commitment=False,
            key_encipherment=False, data_encipherment=False, key_agreement=False,
            encipher_only=False, decipher_only=False,
        )  # fmt: skip
        certificate = custody.certify(made.add_extension(usage, critical=True))
        _write_list(custody, certificate, read_ledger(custody.folder), now)
        write_file(path, _pem(certificate))
    return x509.load_pem_x509_certificate(path.read_bytes())


def _certificate(
    holder: Holder, public: PublicKey, authority: x509.Certificate, span: tuple[datetime, datetime]
) -> x509.CertificateBuilder:
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID

    is_broker = holder.part == "broker"
    usage = ExtendedKeyUsageOID.SERVER_AUTH if is_broker else ExtendedKeyUsageOID.CLIENT_AUTH
    made = _builder(_name(holder.name), authority.subject, public, span)
    made = made.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    made = made.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    issuer = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    made = made.add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer), critical=False)
    if is_broker:
        hosts = [_host(one) for one in (holder.name, *holder.hosts)]
        made = made.add_extension(x509.SubjectAlternativeName(hosts), critical=False)
    return made


def _builder(
    subject: x509.Name, issuer: x509.Name, public: PublicKey, span: tuple[datetime, datetime]
) -> x509.CertificateBuilder:
    from cryptography import x509

    made = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(public)
    made = made.serial_number(x509.random_serial_number()).not_valid_before(span[0] - SKEW).not_valid_after(span[1])
    return made.add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)


def _write_list(custody: Custody, issuer: x509.Certificate, ledger: Sequence[Entry], now: datetime) -> Path:
    from cryptography import x509

    made = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.subject)
        .last_update(now - SKEW)
        .next_update(now + LASTS)
    )
    for entry in ledger:
        if entry.revoked:
            one = x509.RevokedCertificateBuilder().serial_number(int(entry.serial, 16)).revocation_date(now - SKEW)
            made = made.add_revoked_certificate(one.build())
    path = custody.folder / REVOKED
    write_file(path, _pem(custody.sign_list(made)))
    return path


def _require_name(name: str) -> None:
    try:
        messages.topic("fleet", name, "hello")
    except MessageError as error:
        raise UsageError(error.message, error.hint) from error
    if name == "+":
        raise UsageError("'+' is no identifier", "use letters, digits, '.', '_' and '-', at most 64")


def _require_own(holder: Holder, ledger: Sequence[Entry]) -> None:
    name, part = holder.name, holder.part
    other = next((entry.part for entry in ledger if entry.name == name and entry.part != part), None)
    if name == SERVER and part != "server":
        other = "server"
    if other:
        raise UsageError(
            f"{name} is the name of the {other}: a {part} of that name would have its rights", "take another"
        )


def _host(name: str) -> x509.GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _name(text: str) -> x509.Name:
    from cryptography import x509

    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])


def _pem(signed: x509.Certificate | x509.CertificateRevocationList) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return signed.public_bytes(Encoding.PEM)
