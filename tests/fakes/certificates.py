"""A certificate authority for an afternoon."""

import datetime as dt
import ipaddress

import pytest


class Authority:
    """Signs certificates; ``certificate`` is the PEM file of its own."""

    def __init__(self, folder):
        from cryptography.hazmat.primitives.asymmetric import ec

        folder.mkdir()
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name("authority")
        self.certificate = folder / "authority.pem"
        self.certificate.write_bytes(_pem(self._signed(self._name, self._key.public_key(), is_authority=True)))

    def issue(self, name):
        """Return the PEM files of a certificate for a name or an address, and of its key."""
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        key = ec.generate_private_key(ec.SECP256R1())
        files = tuple(self._folder / f"{name.replace('/', '_')}.{end}" for end in ("pem", "key"))
        files[0].write_bytes(_pem(self._signed(_name(name), key.public_key(), host=name)))
        plain = serialization.NoEncryption()
        form = serialization.PrivateFormat.PKCS8
        files[1].write_bytes(key.private_bytes(serialization.Encoding.PEM, form, plain))
        return files

    def _signed(self, subject, key, *, host=None, is_authority=False):
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes

        now = dt.datetime.now(dt.UTC)
        made = x509.CertificateBuilder().subject_name(subject).issuer_name(self._name).public_key(key)
        made = made.serial_number(x509.random_serial_number()).not_valid_before(now - dt.timedelta(hours=1))
        made = made.not_valid_after(now + dt.timedelta(days=1))
        made = made.add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        if host:
            try:
                named = x509.IPAddress(ipaddress.ip_address(host))
            except ValueError:
                named = x509.DNSName(host)
            made = made.add_extension(x509.SubjectAlternativeName([named]), critical=False)
        return made.sign(self._key, hashes.SHA256())


def authority(folder):
    """Make one in a new folder."""
    pytest.importorskip("cryptography")
    return Authority(folder)


def _name(text):
    from cryptography import x509

    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])


def _pem(certificate):
    from cryptography.hazmat.primitives.serialization import Encoding

    return certificate.public_bytes(Encoding.PEM)
