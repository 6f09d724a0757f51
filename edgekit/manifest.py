"""The table of contents of a bundle: what the model takes and gives, its variants, and every file by hash.

Types and checks only; reads no disk. `docs/bundle-format.md` is the specification.
"""

from __future__ import annotations

import hashlib
from pathlib import PurePosixPath
from typing import Annotated, Literal

import msgspec

from edgekit.errors import BundleError, UnknownName
from edgekit.tensors import TensorSpec

FORMAT_VERSION = 1
Task = Literal["tensor", "classification", "detection", "text-generation"]
MAX_MANIFEST_BYTES = 4 << 20
MAX_FILE_BYTES = 1 << 40

Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z")]
Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
RelativePath = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._/ -]{0,299}\Z")]


class _Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    pass


class FileEntry(_Part, frozen=True, kw_only=True):
    """One file: where it lies under the bundle's folder, how long it is, its SHA-256."""

    path: RelativePath
    size: Annotated[int, msgspec.Meta(ge=0, le=MAX_FILE_BYTES)]
    sha256: Digest


class ImagePreprocess(_Part, frozen=True, kw_only=True):
    """From a picture to a tensor of ``crop`` x ``crop`` pixels, ``(value - mean) / std`` on 0..255.

    ``fit`` "crop": the shorter side becomes ``resize``, and the centre is cut out. The others take the whole picture,
    and ``resize`` is ``crop``: "pad" makes the longer side that long and centres it on ``fill``, "stretch" both sides.
    """

    input: str
    resize: Annotated[int, msgspec.Meta(ge=1, le=8192)]
    crop: Annotated[int, msgspec.Meta(ge=1, le=8192)]
    fit: Literal["crop", "pad", "stretch"] = "crop"
    fill: Annotated[int, msgspec.Meta(ge=0, le=255)] = 0
    mode: Literal["RGB", "L"] = "RGB"
    interpolation: Literal["bicubic", "bilinear", "nearest"] = "bicubic"
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)


class Classification(_Part, frozen=True, kw_only=True):
    """From scores to labels: softmax unless the output is one already, best ``top_k``."""

    output: str
    labels: tuple[str, ...] = ()
    softmax: bool = True
    top_k: int = 5


class Detection(_Part, frozen=True, kw_only=True):
    """From boxes and scores to objects: each candidate's best class, without those that overlap a better one (NMS).

    ``boxes`` [batch, candidates, 4] and ``scores`` [batch, candidates, classes] name outputs. Where both name the same,
    a candidate's numbers are its box, then with ``objectness`` how sure it is of any object, then its classes; without
    ``objectness`` nothing stands between. ``channels_first``: candidates lie on the last axis instead.

    Boxes are in pixels of the network's input, or ``normalized`` by its sides. ``background``: class 0 is none.
    Candidates below ``score_threshold`` are dropped, and those of the same class (of any class if ``class_agnostic``)
    that overlap a better one by more than ``iou_threshold``; 1 keeps all.
    """

    boxes: str
    scores: str
    box_format: Literal["xyxy", "yxyx", "xywh", "cxcywh"] = "xyxy"
    normalized: bool = False
    channels_first: bool = False
    objectness: bool = False
    activation: Literal["none", "sigmoid", "softmax"] = "none"
    background: bool = False
    labels: tuple[str, ...] = ()
    score_threshold: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.25
    iou_threshold: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.45
    class_agnostic: bool = False
    max_detections: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 100


class Embedding(_Part, frozen=True, kw_only=True):
    """From an encoder's output to one vector a text.

    ``output`` is [batch, tokens, width], made one by ``pooling`` over the tokens that the mask counts, or [batch,
    width] with "none". ``normalize``: the vector has length 1, so that a product of two is their cosine.
    """

    output: str
    pooling: Literal["mean", "max", "cls", "last", "none"] = "mean"
    normalize: bool = True


class TextPreprocess(_Part, frozen=True, kw_only=True):
    """From a text, or a pair of texts, to its tokens' numbers, special ones included: cut, or filled up with zeros.

    ``tokenizer`` is a ``tokenizer.json`` of Hugging Face; ``ids``, ``mask`` and ``types`` (which text of a pair a token
    is of) name inputs [batch, ``tokens``] of int64; one that is empty is none.
    """

    tokenizer: RelativePath
    tokens: Annotated[int, msgspec.Meta(ge=2, le=1 << 20)]
    ids: str = "input_ids"
    mask: str = "attention_mask"
    types: str = ""

    @property
    def inputs(self) -> tuple[str, ...]:
        """The inputs that it makes."""
        return tuple(filter(None, (self.ids, self.mask, self.types)))


class Port(_Part, frozen=True, kw_only=True):
    """How a public tensor appears inside one variant's file.

    ``key`` is the tensor's name there; ``axes`` the permutation from public to file order, empty for none. Where the
    file holds integers for floats, ``(integer - zero) * scale`` is the value; a ``scale`` of 0 means that it does not.
    """

    name: str
    key: str
    dtype: str
    axes: tuple[int, ...] = ()
    scale: Annotated[float, msgspec.Meta(ge=0, le=1e30)] = 0.0
    zero: Annotated[int, msgspec.Meta(ge=-128, le=255)] = 0


class Labelled(_Part, frozen=True, kw_only=True):
    """A metric on labelled validation samples: the compressed model's, the file's, and how much less the file may have.

    ``metric`` is ``top1``, the share of samples (or positions) whose best class is their label, or ``r2``, the share of
    the targets' variance that is explained.
    """

    metric: str
    samples: int
    model: float
    file: float
    max_loss: float

    def __str__(self) -> str:
        told = f"{self.metric} {self.file:.3f} on {self.samples} labelled samples, the model's {self.model:.3f}"
        return f"{told} (at most {self.max_loss:g} less)"


class Parity(_Part, frozen=True, kw_only=True):
    """What was measured of a file against the compressed model, and the limits it had to hold.

    ``checked``: the file ran in its engine. ``evaluated``: the written file was read back and computed by
    other means. ``unverified``: neither was possible; ``reason`` says why.
    """

    status: Literal["checked", "evaluated", "unverified"]
    reason: str = ""
    samples: int = 0
    batches: tuple[int, ...] = ()
    max_abs_error: float | None = None
    sqnr_db: float | None = None
    top1_agreement: float | None = None
    min_sqnr_db: float | None = None
    min_top1_agreement: float | None = None
    labelled: Labelled | None = None


class Expected(_Part, frozen=True, kw_only=True):
    """What this very file answered to the golden inputs at export, and how near another machine has to come.

    The same integers in the same order give nearly the same floats anywhere; a kernel that saturates does not.
    """

    outputs: dict[str, RelativePath]
    min_sqnr_db: float
    min_top1_agreement: float


class Elsewhere(_Part, frozen=True, kw_only=True):
    """What this very file answered on another instruction set, beside this machine's answers.

    ``checked``: it ran there, emulated. ``unverified``: it could not; ``reason`` says why, and the device decides.
    """

    isa: str
    status: Literal["checked", "unverified"]
    reason: str = ""
    samples: int = 0
    sqnr_db: float | None = None
    top1_agreement: float | None = None
    max_abs_error: float | None = None

    def __str__(self) -> str:
        if self.status == "unverified":
            return f"on {self.isa}: unverified: {self.reason}"
        same = "" if self.top1_agreement is None else f", same top-1 {self.top1_agreement:.3f}"
        return f"on {self.isa}: {self.sqnr_db:.1f} dB from its answers where it was exported{same}"


class EngineBuild(_Part, frozen=True, kw_only=True):
    """How a device builds an engine of its own of a variant's file, where its format has that.

    ``workspace_mb`` bounds the builder's scratch memory, 0 leaves it open. ``dla_core`` -1 uses the GPU alone; on a
    DLA ``gpu_fallback`` lets the GPU take the layers that it lacks. Batches above ``max_batch`` are computed in pieces.
    ``fp16`` lets layers in float run in half.
    """

    workspace_mb: Annotated[int, msgspec.Meta(ge=0, le=1 << 20)] = 0
    dla_core: Annotated[int, msgspec.Meta(ge=-1, le=15)] = -1
    gpu_fallback: bool = True
    max_batch: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 16
    fp16: bool = False


class Variant(_Part, frozen=True, kw_only=True):
    """The model for one hardware class: which format, which files, what it needs, how far it is proved."""

    name: Name
    format: Name
    precision: str
    main: RelativePath
    files: tuple[RelativePath, ...]
    parity: Parity
    expected: Expected | None = None
    elsewhere: Elsewhere | None = None
    engine: EngineBuild | None = None
    inputs: tuple[Port, ...] = ()
    outputs: tuple[Port, ...] = ()
    batch: int = -1
    requires: dict[str, str] = {}
    operators: dict[str, int] = {}
    weights: dict[str, str] = {}
    notes: tuple[str, ...] = ()

    @property
    def claims(self) -> set[str]:
        """The files that are there for this variant's sake."""
        return {*self.files, *(self.expected.outputs.values() if self.expected else ())}


class Golden(_Part, frozen=True, kw_only=True):
    """Inputs with the outputs the model must give: ``.npy`` files by tensor name, or prompts with their text."""

    inputs: dict[str, RelativePath] = {}
    outputs: dict[str, RelativePath] = {}
    prompts: tuple[tuple[str, str], ...] = ()


class Step(_Part, frozen=True, kw_only=True):
    """One line of the lineage: a pass or a source, its options, and what was measured."""

    name: str
    options: dict[str, str | int | float | bool | tuple[str | int | float | bool, ...]] = {}
    measured: dict[str, float] = {}


class Manifest(_Part, frozen=True, kw_only=True):
    """All that a bundle says of itself."""

    format: Literal[1] = 1
    name: Name
    version: str
    task: Task
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    preprocess: ImagePreprocess | None = None
    text: TextPreprocess | None = None
    postprocess: Classification | None = None
    detection: Detection | None = None
    embedding: Embedding | None = None
    variants: Annotated[tuple[Variant, ...], msgspec.Meta(min_length=1)]
    golden: Golden = msgspec.field(default_factory=Golden)
    lineage: tuple[Step, ...] = ()
    license: str = ""
    baseline: RelativePath | None = None
    documents: dict[str, RelativePath] = {}
    files: Annotated[tuple[FileEntry, ...], msgspec.Meta(max_length=10_000)]

    def variant(self, name: str) -> Variant:
        """Return the variant for that hardware class.

        Raises:
            UnknownName: the bundle has none.
        """
        for variant in self.variants:
            if variant.name == name:
                return variant
        raise UnknownName("variant", name, [v.name for v in self.variants])

    def files_of(self, variant: str | None) -> tuple[FileEntry, ...]:
        """List the files a device of that class needs: its own and the golden ones; all for ``None``."""
        if variant is None:
            return self.files
        mine = self.variant(variant).claims
        others = {path for v in self.variants for path in v.claims} - mine
        others |= set(self.documents.values())
        return tuple(entry for entry in self.files if entry.path not in others)


def encode(manifest: Manifest) -> bytes:
    """Return the canonical bytes whose SHA-256 is the bundle's digest."""
    return msgspec.json.format(msgspec.json.encode(manifest, order="sorted"), indent=1) + b"\n"


def decode(data: bytes) -> Manifest:
    """Parse and check a manifest that came from anywhere.

    Raises:
        BundleError: too long, not a manifest, of another version, with unsafe paths, or pointing at unlisted files.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise BundleError(f"the manifest has {len(data)} bytes, more than {MAX_MANIFEST_BYTES}")
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BundleError(
            f"this is no manifest of format {FORMAT_VERSION}: {error}", "export the bundle again"
        ) from error
    _check(manifest)
    return manifest


def digest(manifest: Manifest) -> str:
    """Return the SHA-256 of the canonical manifest: it names every byte of the bundle."""
    return hashlib.sha256(encode(manifest)).hexdigest()


def _check(manifest: Manifest) -> None:
    listed = [entry.path for entry in manifest.files]
    for path in listed:
        pure = PurePosixPath(path)
        if pure.is_absolute() or ".." in pure.parts or str(pure) != path or path == "manifest.json":
            raise BundleError(f"the manifest lists the unsafe path {path!r}")
    if len(set(listed)) != len(listed):
        raise BundleError("the manifest lists a file twice")
    golden = manifest.golden
    used = {path for v in manifest.variants for path in (v.main, *v.claims)}
    used |= {*golden.inputs.values(), *golden.outputs.values(), *manifest.documents.values()}
    used |= {manifest.text.tokenizer} if manifest.text else set()
    used |= {manifest.baseline} if manifest.baseline else set()
    missing = used - set(listed)
    if missing:
        raise BundleError(f"the manifest uses {min(missing)!r} but does not list it")
    for variant in manifest.variants:
        if variant.main not in variant.files:  # a device fetches a variant's files, so it would lack the main one
            raise BundleError(f"variant {variant.name!r} opens {variant.main!r}, which is not among its files")
        for port in (*variant.inputs, *variant.outputs):
            if port.scale and port.dtype not in ("int8", "uint8"):
                raise BundleError(f"variant {variant.name!r} has a scale for {port.name!r}, which is {port.dtype}")
    names = [v.name for v in manifest.variants]
    if len(set(names)) != len(names):
        raise BundleError("the manifest names a variant twice")
    _check_processing(manifest)


def _check_processing(manifest: Manifest) -> None:
    """Refuse what would only be found out at the first picture or text."""
    image, text, labels, found = manifest.preprocess, manifest.text, manifest.postprocess, manifest.detection
    inputs, outputs = ({spec.name for spec in specs} for specs in (manifest.inputs, manifest.outputs))
    read = ([image.input] if image else []) + (list(text.inputs) if text else [])
    told = ([labels.output] if labels else []) + ([found.boxes, found.scores] if found else [])
    told += [manifest.embedding.output] if manifest.embedding else []
    for kind, names, there in (("input", read, inputs), ("output", told, outputs)):
        if missing := set(names) - there:
            raise BundleError(f"the manifest prepares or reads the {kind} {min(missing)!r}, which the model has not")
    if len(set(read)) < len(read):
        raise BundleError(f"the manifest makes one input of several: {', '.join(read)}")
    for spec in manifest.inputs:
        if text and spec.name in text.inputs and not (spec.dtype.startswith("int") and spec.accepts((1, text.tokens))):
            raise BundleError(f"the manifest makes {text.tokens} tokens of a text, the model takes {spec}")
    if image and image.fit != "crop" and image.resize != image.crop:
        raise BundleError(
            f"a picture is fitted by {image.fit!r} to {image.resize} and to {image.crop} pixels: it takes one size"
        )
