"""edgekit's extras and the state of their packages, read from the package's own metadata: no extra is listed twice.

Imports none of the packages it looks for.
"""

from __future__ import annotations

import re

import msgspec

from edgekit import plugins

ENABLES = {
    "device": "HTTP server, pictures in, updates over MQTT with TUF",
    "grpc": "the Open Inference Protocol over gRPC, beside HTTP",
    "onnx": "run ONNX bundles with ONNX Runtime",
    "tflite": "run LiteRT bundles",
    "text": "read texts for encoders on the device",
    "gguf": "run language models with llama.cpp",
    "llama-cpp": "write GGUF's K and IQ types; built from source, some minutes",
    "tensorrt": "run TensorRT engines on NVIDIA Jetson and servers",
    "tensorrt-rtx": "parse and build TensorRT's files at export, without a GPU",
    "coreml": "read and check Core ML programs, run them on macOS",
    "optimum": "export Hugging Face folders without data, for their shapes alone",
    "openvino": "write and run OpenVINO's IR, for Intel CPUs, GPUs and NPUs",
    "executorch": "write and run ExecuTorch programs for XNNPACK, as Android apps take them; brings PyTorch",
    "compress": "quantize, prune and distil on the workstation",
    "export": "write ONNX, LiteRT, Core ML and GGUF",
    "fleet": "publish releases, roll them out, embedded broker, SQLite or PostgreSQL",
    "s3": "keep what devices fetch in an S3-compatible store",
    "hsm": "sign with keys in PKCS#11 devices",
    "awskms": "sign with keys in AWS KMS",
    "gcpkms": "sign with keys in Google Cloud KMS",
    "all": "everything but TensorRT, which needs NVIDIA's own index, llama-cpp, which is built, and keys elsewhere",
    "dev": "tests and linters of edgekit itself",
    "bench": "the peers that the benchmarks run beside edgekit",
}


class Package(msgspec.Struct, frozen=True):
    """One package that an extra installs; ``installed`` is empty where it is missing."""

    name: str
    wanted: str
    installed: str

    @property
    def is_good(self) -> bool:
        """Say whether it is there and not older than wanted."""
        least = re.search(r">=([\d.]+)", self.wanted)
        return bool(self.installed) and (least is None or _release(self.installed) >= _release(least[1]))


class Extra(msgspec.Struct, frozen=True):
    """One extra of edgekit, what it enables, and the state of its packages."""

    name: str
    enables: str
    packages: tuple[Package, ...]

    @property
    def lacking(self) -> list[str]:
        """Name the packages that are missing or too old."""
        return [f"{p.name} {p.installed} is too old" if p.installed else p.name for p in self.packages if not p.is_good]

    @property
    def install(self) -> str:
        """The exact command that installs it."""
        return plugins.install_command(self.name)


def find_extras() -> list[Extra]:
    """Read edgekit's extras and look up every package they would install."""
    from importlib import metadata

    try:
        requirements = metadata.requires("edgekit") or []
    except metadata.PackageNotFoundError:  # run from a folder that was never installed
        return []
    packages: dict[str, list[Package]] = {}
    for line in requirements:
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", line)
        name = re.match(r"[\w.-]+", line)
        if extra and name:
            found = packages.setdefault(extra[1], [])
            if name[0] != "edgekit":
                found.append(_look_up(name[0], line[name.end() :].partition(";")[0].strip()))
    nested = _nested(requirements)
    return [
        Extra(name, ENABLES.get(name, ""), tuple(p for part in [name, *nested.get(name, ())] for p in packages[part]))
        for name in sorted(packages, key=_order)
    ]


def _order(extra: str) -> int:
    return list(ENABLES).index(extra) if extra in ENABLES else len(ENABLES)


def _nested(requirements: list[str]) -> dict[str, list[str]]:
    """Follow extras that are made of extras, as ``all`` is."""
    direct: dict[str, list[str]] = {}
    for line in requirements:
        found = re.match(r"edgekit\[([\w,-]+)\].*extra\s*==\s*['\"]([\w-]+)['\"]", line)
        if found:
            direct[found[2]] = found[1].split(",")
    return {name: _reach(direct, name) for name in direct}


def _reach(direct: dict[str, list[str]], name: str) -> list[str]:
    parts = direct.get(name, [])
    return list(dict.fromkeys([*parts, *(deeper for part in parts for deeper in _reach(direct, part))]))


def _look_up(name: str, wanted: str) -> Package:
    from importlib import metadata

    try:
        return Package(name, wanted, metadata.version(name))
    except metadata.PackageNotFoundError:
        return Package(name, wanted, "")


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])
