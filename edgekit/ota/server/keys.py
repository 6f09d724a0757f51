"""Custody of private keys: the only room that sees one. Makes them, finds them by their address, signs with them.

An address is a URI: ``file:keys/root.pem`` (PKCS#8 in PEM, below the fleet's folder unless it begins with ``/``; with
``?encrypted`` behind a passphrase), ``env:NAME`` (the same text in an environment variable), or what securesystemslib
knows: ``hsm:`` (PKCS#11), ``awskms:``, ``gcpkms:`` and others. Which address a key has says ``keyring.json``, which
holds no secret. Knows nothing of roles and metadata beyond that, and asks nobody: whoever opens a custody brings what
answers.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import parse_qsl

import msgspec

from edgekit.durable import write_file
from edgekit.errors import MissingExtra, TrustError, UsageError
from edgekit.ota.server import metadata
from edgekit.plugins import extra, install_command

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from cryptography import x509
    from securesystemslib.signer import Key, Signer, SSlibKey  # type: ignore[attr-defined]  # re-exported without __all__

KEYRING = "keyring.json"
MIN_PASSPHRASE = 12
"""PKCS#8 as everybody reads it stretches a passphrase by 2,048 rounds of PBKDF2 only: its length is what protects."""


class KeyAway(TrustError):
    """A private key cannot be used here and now: its file, its device or its passphrase is elsewhere."""


@dataclass(frozen=True)
class Unlock:
    """What opens keys: ``ask`` answers with a passphrase or PIN (``None``: unknown), ``folders`` hold key files.

    A key file that is not where its address says is looked for in ``folders`` by its name: a stick has many places.
    """

    ask: Callable[[str], str | None] = lambda _: None
    folders: tuple[Path, ...] = ()


CLOSED = Unlock()


class Keyring(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The address of each key id's private half, which key signs models, and the address of the devices' authority."""

    keys: dict[str, str] = {}
    models: str = ""
    authority: str = ""


class Custody:
    """The private keys of a fleet, as far as they can be reached."""

    def __init__(self, folder: Path, unlock: Unlock = CLOSED) -> None:
        self.folder = folder
        self.ring = _read_ring(folder)
        self._unlock = unlock
        self._opened: dict[str, Signer] = {}

    def save(self) -> None:
        """Write down where the keys are, if that has changed."""
        data, path = msgspec.json.format(msgspec.json.encode(self.ring)) + b"\n", self.folder / KEYRING
        if not path.is_file() or path.read_bytes() != data:
            write_file(path, data)

    def signer(self, key: Key) -> Signer:
        """Return what signs with the private half of ``key``.

        Raises:
            KeyAway: it cannot be reached, or not be opened.
            TrustError: what lies there is damaged, or another key.
        """
        if key.keyid not in self._opened:
            uri = self.ring.keys.get(key.keyid)
            if uri is None:
                raise KeyAway(f"nobody here knows where key {key.keyid[:12]} is", "name it: --key URI")
            self._opened[key.keyid] = self._open(uri, key)
        return self._opened[key.keyid]

    def make(self, name: str, place: Path, *, encrypted: bool) -> Key:
        """Make an Ed25519 key in ``place``/``name``.pem (mode 0600); one that lies there already is used again."""
        with extra("fleet"):
            from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        uri = self._made(name, place, Ed25519PrivateKey.generate, encrypted=encrypted)
        return self.adopt(uri)

    def make_beside(self, keyid: str, name: str) -> Key:
        """Make the successor of a key in a file, in the same folder and locked like it.

        Raises:
            UsageError: that key is in no file.
            KeyAway: its folder is not there.
        """
        uri = self.ring.keys.get(keyid, "")
        scheme, _, rest = uri.removesuffix("?encrypted").partition(":")
        if scheme != "file":
            raise UsageError(
                f"key {keyid[:12]} is in no file: {uri or 'nobody knows where'}", "name the new one: --key URI"
            )
        here = self._found(self.folder / rest)
        places = (
            [here.parent] if here else [p for p in ((self.folder / rest).parent, *self._unlock.folders) if p.is_dir()]
        )
        if not places:
            raise KeyAway(f"{(self.folder / rest).parent} is not there", "bring it, or give another one: --keys FOLDER")
        return self.make(name, places[0], encrypted=uri.endswith("?encrypted"))

    def adopt(self, uri: str) -> Key:
        """Take up the key at an address; return its public half.

        Raises:
            UsageError: no address that anybody knows.
            KeyAway: there is no such key.
        """
        from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]  # re-exported without __all__

        scheme = uri.partition(":")[0]
        if scheme in ("file", "env"):
            signer: Signer = CryptoSigner(self._private(uri))
            self._opened[signer.public_key.keyid] = signer
            key = signer.public_key
        else:
            uri, key = self._imported(scheme, uri)
        self.ring.keys[key.keyid] = uri
        return key

    def sees(self, keyid: str) -> str:
        """Say ``yes`` or ``no`` of a key in a file or in the environment, ``?`` of one that only its device knows."""
        scheme, _, rest = self.ring.keys.get(keyid, "").removesuffix("?encrypted").partition(":")
        if scheme == "env":
            return "yes" if os.environ.get(rest) else "no"
        if scheme == "file":
            return "yes" if self._found(self.folder / rest) else "no"
        return "?"

    def forget(self, kept: set[str]) -> list[str]:
        """Strike keys that no role has any more; return their addresses."""
        gone = [uri for keyid, uri in self.ring.keys.items() if keyid not in kept]
        self.ring.keys = {keyid: uri for keyid, uri in self.ring.keys.items() if keyid in kept}
        return gone

    def authority(self) -> Any:  # noqa: ANN401  # one of cryptography's public keys
        """Return the public key of the devices' certificate authority; the key is made where there is none."""
        if not self.ring.authority:
            self.make_authority(self.folder / "keys", encrypted=False)
        return self._private(self.ring.authority).public_key()

    def make_authority(self, place: Path, *, encrypted: bool, name: str = "authority") -> None:
        """Make the key that certifies devices (P-256, which every TLS speaks)."""
        from cryptography.hazmat.primitives.asymmetric import ec

        def fresh() -> ec.EllipticCurvePrivateKey:
            return ec.generate_private_key(ec.SECP256R1())

        self.ring.authority = self._made(name, place, fresh, encrypted=encrypted)
        self.save()

    def replace_authority(self) -> None:
        """Make the authority's successor, in the same folder and locked like it."""
        uri = self.ring.authority
        path = self.folder / uri.removesuffix("?encrypted").partition(":")[2]
        stem, _, number = path.stem.partition("-v")
        place = (self._found(path) or path).parent
        self.make_authority(place, encrypted=uri.endswith("?encrypted"), name=f"{stem}-v{int(number or 1) + 1}")

    def certify(self, made: x509.CertificateBuilder) -> x509.Certificate:
        """Sign a certificate as the devices' authority."""
        from cryptography.hazmat.primitives.hashes import SHA256

        return made.sign(self._private(self.ring.authority), SHA256())

    def sign_list(self, made: x509.CertificateRevocationListBuilder) -> x509.CertificateRevocationList:
        """Sign a list of revoked certificates as the devices' authority."""
        from cryptography.hazmat.primitives.hashes import SHA256

        return made.sign(self._private(self.ring.authority), SHA256())

    def _made(self, name: str, place: Path, generate: Callable[[], Any], *, encrypted: bool) -> str:
        path = (place / f"{name}.pem").absolute()
        inside = path.is_relative_to(self.folder.absolute())
        uri = f"file:{path.relative_to(self.folder.absolute()) if inside else path}{'?encrypted' if encrypted else ''}"
        if not path.exists():
            secret = _long_enough(self._ask(f"new passphrase for {path.name}", uri)) if encrypted else None
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_file(path, _pem(generate(), secret), mode=0o600)
        return uri

    def _open(self, uri: str, key: Key) -> Signer:
        from securesystemslib.exceptions import KeyMismatchError, UnsupportedLibraryError
        from securesystemslib.signer import CryptoSigner, Signer  # type: ignore[attr-defined]  # re-exported without __all__

        scheme = uri.partition(":")[0]
        try:
            if scheme in ("file", "env"):
                return CryptoSigner(self._private(uri), cast("SSlibKey", key))
            return Signer.from_priv_key_uri(uri, key, lambda what: self._ask(f"{what} of {uri}", uri))
        except KeyMismatchError as error:
            raise TrustError(f"{uri} holds another key than {key.keyid[:12]}", "restore it from the backup") from error
        except UnsupportedLibraryError as error:
            raise _missing(scheme) from error
        except _refusals() as error:
            raise KeyAway(f"{uri} cannot be used: {_words(error)}", "see that the device is there") from error

    def _private(self, uri: str) -> Any:  # noqa: ANN401  # one of cryptography's private keys
        with extra("fleet"):
            from cryptography.hazmat.primitives.serialization import load_pem_private_key
        data = self._read(uri)
        secret = self._ask(f"passphrase of {uri}", uri).encode() if uri.endswith("?encrypted") else None
        try:
            return load_pem_private_key(data, secret)
        except (ValueError, TypeError) as error:
            if "password" in str(error).lower():
                raise KeyAway(f"{uri} does not open: {error}", "give its passphrase") from error
            raise TrustError(f"{uri} holds no usable private key: {error}", "restore it from the backup") from error

    def _read(self, uri: str) -> bytes:
        scheme, _, rest = uri.removesuffix("?encrypted").partition(":")
        if scheme == "env":
            if text := os.environ.get(rest):
                return text.encode()
            raise KeyAway(f"the key in the environment variable {rest} is missing", f"set {rest} to its PEM text")
        path = self.folder / rest
        if found := self._found(path):
            return found.read_bytes()
        raise KeyAway(
            f"the {path.stem} key is missing: {path}", "bring it: --keys FOLDER, or restore it from the backup"
        )

    def _found(self, path: Path) -> Path | None:
        places = (path, *(folder / path.name for folder in self._unlock.folders))
        return next((one for one in places if one.is_file()), None)

    def _ask(self, what: str, uri: str) -> str:
        answer = self._unlock.ask(what)
        if answer is None:
            raise KeyAway(
                f"{uri} is locked, and nobody gave its {'PIN' if uri.startswith('hsm:') else 'passphrase'}",
                "set EDGEKIT_PASSPHRASE, or give --passphrase-file",
            )
        return answer

    def _imported(self, scheme: str, uri: str) -> tuple[str, Key]:
        from securesystemslib.exceptions import UnsupportedLibraryError
        from securesystemslib.signer import AWSSigner, GCPSigner, HSMSigner  # type: ignore[attr-defined]  # as above

        rest, _, query = uri.partition(":")[2].partition("?")
        try:
            if scheme == "hsm":
                number, label = int(rest) if rest else None, dict(parse_qsl(query)).get("label")
                return HSMSigner.import_(number, label, lambda what: self._ask(f"{what} of {uri}", uri))
            if scheme in ("awskms", "gcpkms"):
                return (AWSSigner if scheme == "awskms" else GCPSigner).import_(rest)
        except UnsupportedLibraryError as error:
            raise _missing(scheme) from error
        except _refusals() as error:
            raise KeyAway(f"{uri} cannot be read: {_words(error)}", "see that the device is there") from error
        raise UsageError(f"{uri} is no address of a key", "file:PATH, env:NAME, hsm:ID?label=…, awskms:ID or gcpkms:ID")


def tls_key() -> tuple[bytes, Any]:
    """Make a key for somebody's certificate; return its PEM, which is handed over and not kept, and its public half."""
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    return _pem(key, None), key.public_key()


def _pem(key: Any, secret: str | None) -> bytes:  # noqa: ANN401  # one of cryptography's private keys
    from cryptography.hazmat.primitives import serialization

    how = serialization.BestAvailableEncryption(secret.encode()) if secret else serialization.NoEncryption()
    data: bytes = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how)
    return data


def _long_enough(secret: str) -> str:
    if len(secret) < MIN_PASSPHRASE:
        raise UsageError(f"a passphrase of {len(secret)} characters is too short", f"at least {MIN_PASSPHRASE}")
    return secret


def _refusals() -> tuple[type[Exception], ...]:
    """Return what the libraries of devices and clouds raise, as far as they are loaded."""
    names = {
        "pkcs11.exceptions": ("PKCS11Error",),
        "botocore.exceptions": ("BotoCoreError", "ClientError"),
        "google.api_core.exceptions": ("GoogleAPIError",),
    }
    found = [(sys.modules[module], name) for module, each in names.items() if module in sys.modules for name in each]
    return (ValueError, *(getattr(module, name) for module, name in found))


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__  # PKCS#11's errors have no words


def _missing(scheme: str) -> MissingExtra:
    return MissingExtra(scheme, f"what signs with {scheme}: keys", install_command(scheme))


def _read_ring(folder: Path) -> Keyring:
    path = folder / KEYRING
    try:
        return msgspec.json.decode(path.read_bytes(), type=Keyring)
    except FileNotFoundError:
        return _first_ring(folder)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise TrustError(f"{path} is damaged: {error}", "restore it from the backup") from error


def _first_ring(folder: Path) -> Keyring:
    """Say where the keys of a fleet lie that was made before there was a keyring."""
    if not metadata.place(folder, "1.root").is_file():
        return Keyring()
    roles = metadata.current_root(folder).signed.roles
    return Keyring(keys={keyid: f"file:keys/{role}.pem" for role, one in roles.items() for keyid in one.keyids})
