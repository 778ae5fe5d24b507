"""DICOM photographs: one file with a patient in its header -> an ordinary image file without one, in memory.

    DICOM bytes -> unwrap_dicom -> UnwrappedDicom: a JPEG or TIFF, the camera's make and model -> privacy.clean_image

A baseline JPEG inside comes out as it is, so that its compressed data can be kept; all else is decoded to 8 bits.
Of the header nothing goes on but make and model. DICOM whole slides are no photographs: OpenSlide reads them (wsi).
"""

import io
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from panfm.errors import UserError
from panfm.shards.quality import RejectedImageError, RejectReason

if TYPE_CHECKING:
    from pydicom import Dataset

JPEG_BASELINE = "1.2.840.10008.1.2.4.50"
WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
PHOTOMETRICS = ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR", "RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
ICC_CHUNK = 65_519  # bytes of a profile that one JPEG segment holds


@dataclass(frozen=True)
class UnwrappedDicom:
    """The picture of a DICOM file as an ordinary file; `make` and `model` are raw text that privacy has to judge."""

    data: bytes  # JPEG as encapsulated, or TIFF of 8-bit L or RGB; with the colour profile of the header
    make: str | None
    model: str | None


def is_dicom(data: bytes) -> bool:
    """Whether these are the bytes of a DICOM file (PS3.10: a preamble of 128 bytes, then DICM)."""
    return data[128:132] == b"DICM"


def unwrap_dicom(data: bytes) -> UnwrappedDicom:
    """Take the first frame out of a DICOM file of photographs.

    Read are RGB, YBR_FULL, YBR_FULL_422, MONOCHROME1 and 2 of up to 16 bits (by the window in the header, else by the
    range of the stored bits), palette colour, and every transfer syntax that pydicom finds a decoder for. Overlay
    planes, also those in unused bits of the pixels, are left out.

    Raises RejectedImageError: burned_in_annotation where the header says that text is burned into the pixels,
    decompression_bomb, and undecodable, which names a transfer syntax whose decoder is not installed. UserError
    without pydicom.
    """
    try:
        import pydicom
    except ImportError:
        raise UserError(
            'DICOM photographs need pydicom, which is not installed; run pip install "panfm[dicom]"'
        ) from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's warnings quote header values, which name patients
        try:
            dataset = pydicom.dcmread(io.BytesIO(data))
            return _unwrap(dataset)
        except RejectedImageError:
            raise
        except MemoryError:
            raise
        except Exception as error:  # any: pydicom raises what damaged bytes make it raise
            text = " ".join(str(error).split()) or type(error).__name__
            reason: RejectReason = "truncated" if "less than expected" in text else "undecodable"
            raise RejectedImageError(reason, f"DICOM: {text}") from None


def _unwrap(dataset: "Dataset") -> UnwrappedDicom:
    from pydicom.encaps import get_frame

    _check_photograph(dataset)
    syntax = dataset.file_meta.TransferSyntaxUID
    profile = _find_profile(dataset)
    photometric = str(dataset.PhotometricInterpretation)
    # A JPEG without colour transform (RGB) says so in the DICOM header alone: decoders of plain files get it wrong.
    if syntax == JPEG_BASELINE and photometric in ("YBR_FULL", "YBR_FULL_422", "MONOCHROME2"):
        frames = int(dataset.get("NumberOfFrames") or 1)
        picture = _replace_metadata(get_frame(dataset.PixelData, 0, number_of_frames=frames), profile)
    else:
        buffer = io.BytesIO()
        Image.fromarray(_decode_pixels(dataset)).save(buffer, "TIFF", icc_profile=profile)
        picture = buffer.getvalue()
    return UnwrappedDicom(picture, _get_text(dataset, "Manufacturer"), _get_text(dataset, "ManufacturerModelName"))


def _check_photograph(dataset: "Dataset") -> None:
    from pydicom.pixels import get_decoder

    if _get_text(dataset, "SOPClassUID") == WHOLE_SLIDE:
        raise RejectedImageError(
            "undecodable", "a DICOM whole slide (or its label or overview) is no photograph; its card needs `slides`"
        )
    if (_get_text(dataset, "BurnedInAnnotation") or "").strip().upper() == "YES":
        raise RejectedImageError(
            "burned_in_annotation", "BurnedInAnnotation is YES: text that may name the patient is part of the pixels"
        )
    if "PixelData" not in dataset:
        raise RejectedImageError("undecodable", "a DICOM file without pixels")
    photometric = str(dataset.PhotometricInterpretation)
    if photometric not in PHOTOMETRICS:
        raise RejectedImageError("undecodable", f"DICOM PhotometricInterpretation {photometric} is not read")
    num_pixels = int(dataset.Rows) * int(dataset.Columns)
    limit = 2 * (Image.MAX_IMAGE_PIXELS or num_pixels)  # where Pillow refuses other files
    if num_pixels > limit:
        raise RejectedImageError("decompression_bomb", f"a DICOM image of {num_pixels} pixels, the limit is {limit}")
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax.is_compressed and syntax.name != "Deflated Explicit VR Little Endian":
        try:
            decoder = get_decoder(syntax)
        except NotImplementedError:  # video, among others
            raise RejectedImageError("undecodable", f"DICOM transfer syntax {syntax.name} is not read") from None
        if not decoder.is_available:
            needs = "; or ".join(decoder.missing_dependencies)
            raise RejectedImageError(
                "undecodable", f"DICOM transfer syntax {syntax.name} needs a decoder that is not installed ({needs})"
            )


def _decode_pixels(dataset: "Dataset") -> npt.NDArray[np.uint8]:
    """The first frame, uint8 [H, W] or [H, W, 3]."""
    from pydicom.pixels import apply_color_lut, pixel_array

    pixels: Any = pixel_array(dataset, index=0)  # YBR becomes RGB here
    bits = int(dataset.BitsStored)
    photometric = str(dataset.PhotometricInterpretation)
    if not dataset.get("PixelRepresentation"):
        pixels = pixels & ((1 << bits) - 1)  # old files keep overlays, which are annotations, in the unused bits
    if photometric == "PALETTE COLOR":
        colours: Any = apply_color_lut(pixels, dataset)[..., :3]
        return np.asarray(colours >> 8 if colours.dtype.itemsize > 1 else colours, dtype=np.uint8)
    if pixels.ndim == 3 and bits == 8:
        return np.asarray(pixels, dtype=np.uint8)
    scaled = _scale_to_8_bits(pixels.astype(np.float64), dataset, bits)
    return 255 - scaled if photometric == "MONOCHROME1" else scaled


def _scale_to_8_bits(pixels: npt.NDArray[np.float64], dataset: "Dataset", bits: int) -> npt.NDArray[np.uint8]:
    """By the window of the header (PS3.3 C.11.2.1.2), else from the whole range of the stored bits."""
    slope, intercept = float(dataset.get("RescaleSlope", 1)), float(dataset.get("RescaleIntercept", 0))
    first = -(1 << (bits - 1)) if dataset.get("PixelRepresentation") else 0
    low, high = first * slope + intercept, (first + (1 << bits) - 1) * slope + intercept
    centres, widths = (np.atleast_1d(dataset.get(name) or ()) for name in ("WindowCenter", "WindowWidth"))
    if centres.size and widths.size and float(widths[0]) > 1:
        low = float(centres[0]) - 0.5 - (float(widths[0]) - 1) / 2
        high = low + float(widths[0]) - 1
    scaled = (pixels * slope + intercept - low) * (255.0 / (high - low))
    return np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)


def _find_profile(dataset: "Dataset") -> bytes | None:
    for place in (dataset, *(dataset.get("OpticalPathSequence") or ())[:1]):
        if profile := place.get("ICCProfile"):
            return bytes(profile)
    return None


def _replace_metadata(jpeg: bytes, profile: bytes | None) -> bytes:
    """A JPEG with the profile of the DICOM header, and without EXIF, whose orientation does not hold in DICOM."""
    chunks = [profile[start : start + ICC_CHUNK] for start in range(0, len(profile), ICC_CHUNK)] if profile else []
    parts = [jpeg[:2]]
    parts += [
        b"\xff\xe2" + (len(chunk) + 16).to_bytes(2, "big") + b"ICC_PROFILE\0" + bytes((number, len(chunks))) + chunk
        for number, chunk in enumerate(chunks, start=1)
    ]
    place = 2
    while jpeg[place : place + 1] == b"\xff" and jpeg[place + 1 : place + 2] not in (b"", b"\xda"):
        end = place + 2 + int.from_bytes(jpeg[place + 2 : place + 4], "big")
        if jpeg[place + 1] not in ((0xE1, 0xE2) if profile else (0xE1,)):
            parts.append(jpeg[place:end])
        place = end
    return b"".join([*parts, jpeg[place:]])


def _get_text(dataset: "Dataset", name: str) -> str | None:
    value = dataset.get(name)
    return str(value) if value else None
