"""DICOM photographs: the right pixels, nothing of the header, and no file that says a name is burned into it."""

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("pydicom")

from pydicom import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    MPEG2MPML,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
)

from panfm.shards.dicom import is_dicom, unwrap_dicom
from panfm.shards.privacy import clean_image
from panfm.shards.quality import RejectedImageError
from tests.profiles import SRGB, make_swapped_profile
from tests.shards.dicom_files import write_dicom


def draw(seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((80, 60), Image.Resampling.BICUBIC))


def encode(pixels: np.ndarray, kind: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def decode(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def reason_of(data: bytes) -> str:
    with pytest.raises(RejectedImageError) as error:
        clean_image(data)
    assert "PLANTED" not in str(error.value)
    return f"{error.value.reason}: {error.value}"


def test_only_pixels_and_device_come_out() -> None:
    data = write_dicom(draw())
    assert is_dicom(data) and not is_dicom(encode(draw())) and not is_dicom(b"")
    assert data.count(b"PLANTED") == 4
    clean = clean_image(data, min_side=32)
    assert (clean.extension, clean.device) == ("png", "Canfield VEOS DS3")
    assert np.array_equal(decode(clean.data), draw())
    for data_out in (clean.data, unwrap_dicom(data).data):
        assert b"PLANTED" not in data_out and b"1961" not in data_out and b"2019" not in data_out
    small = clean_image(data, short_side=32)
    assert (small.extension, small.width, small.original_width) == ("jpg", 43, 80)
    assert clean_image(write_dicom(draw(), ManufacturerModelName="of Dr. PLANTED")).device is None


@pytest.mark.parametrize("photometric", ["YBR_FULL", "YBR_FULL_422"])
def test_colours_of_uncompressed_ybr_are_right(photometric: str) -> None:
    ybr = np.asarray(Image.fromarray(draw()).convert("YCbCr"))
    if photometric == "YBR_FULL_422":  # Y1 Y2 Cb Cr for every two pixels
        pairs = np.stack([ybr[:, ::2, 0], ybr[:, 1::2, 0], ybr[:, ::2, 1], ybr[:, ::2, 2]], axis=-1)
        data = write_dicom(ybr, photometric, PixelData=pairs.tobytes())
    else:
        data = write_dicom(ybr, photometric)
    assert np.abs(decode(clean_image(data).data).astype(int) - draw()).mean() < 4.5  # half the chroma is not there


def test_grey_palette_and_sixteen_bits() -> None:
    ramp = np.tile(np.linspace(0, 4095, 80).astype(np.uint16), (60, 1))
    grey = np.rint(np.linspace(0, 4095, 80).astype(np.uint16) / 4095 * 255).astype(np.uint8)
    assert np.array_equal(decode(clean_image(write_dicom(ramp, "MONOCHROME2", BitsStored=12)).data)[0], grey)
    assert np.array_equal(decode(clean_image(write_dicom(ramp, "MONOCHROME1", BitsStored=12)).data)[0], 255 - grey)
    window = {"BitsStored": 12, "WindowCenter": 1000, "WindowWidth": 401}
    seen = decode(clean_image(write_dicom(ramp, "MONOCHROME2", **window)).data)[0]
    assert seen[0] == 0 and seen[-1] == 255 and abs(int(seen[np.abs(ramp[0].astype(int) - 1000).argmin()]) - 127) < 10
    overlay = ramp | np.uint16(0x8000)  # annotations of old devices lie in the bits above
    assert np.array_equal(decode(clean_image(write_dicom(overlay, "MONOCHROME2", BitsStored=12)).data)[0], grey)
    table = np.random.default_rng(0).integers(0, 256, (3, 256)).astype(np.uint16)
    names = ("RedPaletteColorLookupTable", "GreenPaletteColorLookupTable", "BluePaletteColorLookupTable")
    tables = {f"{name}Data": (row << 8).tobytes() for name, row in zip(names, table, strict=True)}
    tables |= {f"{name}Descriptor": [256, 0, 16] for name in names}
    index = np.tile(np.arange(80, dtype=np.uint8), (60, 1))
    assert np.array_equal(decode(clean_image(write_dicom(index, "PALETTE COLOR", **tables)).data), table.T[index])


def test_a_jpeg_inside_keeps_its_own_data() -> None:
    exif = Image.Exif()
    exif[0x010E], exif[0x0112] = "PLANTED", 6  # an orientation that DICOM does not know of
    inside = encode(draw(), quality=90, exif=exif, comment=b"PLANTED comment")
    for profile in (None, SRGB):
        tags = {} if profile is None else {"ICCProfile": profile}
        clean = clean_image(write_dicom(inside, "YBR_FULL_422", JPEGBaseline8Bit, **tags))
        assert clean.data == encode(draw(), quality=90)
        assert (clean.width, clean.height, clean.device) == (80, 60, "Canfield VEOS DS3")
    grey = draw()[..., 1].copy()
    clean = clean_image(write_dicom(encode(grey), "MONOCHROME2", JPEGBaseline8Bit))
    assert clean.data == encode(grey)


def test_other_compressed_frames_are_decoded() -> None:
    lossless = encode(draw(), "JPEG2000", irreversible=False, no_jp2=True, mct=1)
    assert np.array_equal(decode(clean_image(write_dicom(lossless, "YBR_RCT", JPEG2000Lossless)).data), draw())
    untransformed = encode(draw(), quality=95, keep_rgb=True)
    clean = clean_image(write_dicom(untransformed, "RGB", JPEGBaseline8Bit))
    assert np.abs(decode(clean.data).astype(int) - draw()).mean() < 4
    import pydicom

    dataset = pydicom.dcmread(io.BytesIO(write_dicom(draw())))
    dataset.compress(RLELossless, encoding_plugin="pydicom")
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    assert np.array_equal(decode(clean_image(buffer.getvalue()).data), draw())


def test_the_first_of_several_frames_is_taken() -> None:
    both = np.stack([draw(1), draw(2)])
    data = write_dicom(draw(1), NumberOfFrames=2, PixelData=both.tobytes())
    assert np.array_equal(decode(clean_image(data).data), draw(1))
    frames = [encode(draw(seed), quality=90) for seed in (1, 2)]
    data = write_dicom(frames[0], "YBR_FULL_422", JPEGBaseline8Bit, NumberOfFrames=2, PixelData=encapsulate(frames))
    assert clean_image(data).data == frames[0]


def test_profiles_of_the_header_are_applied() -> None:
    swapped = make_swapped_profile()
    plain = decode(clean_image(write_dicom(draw(), ICCProfile=SRGB)).data)
    assert np.array_equal(plain, draw())
    path = Dataset()
    path.ICCProfile = swapped
    inside = encode(draw(), quality=95)
    for data in (
        write_dicom(draw(), ICCProfile=swapped),
        write_dicom(draw(), OpticalPathSequence=[path]),
        write_dicom(inside, "YBR_FULL_422", JPEGBaseline8Bit, ICCProfile=swapped),
    ):
        stored = decode(clean_image(data).data).astype(int)
        assert np.abs(stored - draw()[..., ::-1]).mean() < 4


def test_what_must_not_or_cannot_be_read_has_its_reason() -> None:
    assert reason_of(write_dicom(draw(), BurnedInAnnotation="YES")).startswith("burned_in_annotation: ")
    clean_image(write_dicom(draw(), BurnedInAnnotation="NO"))
    slide = write_dicom(
        draw(), SOPClassUID="1.2.840.10008.5.1.4.1.1.77.1.6", ImageType=["ORIGINAL", "PRIMARY", "LABEL"]
    )
    assert "undecodable: a DICOM whole slide (or its label" in reason_of(slide)
    for syntax, name in ((JPEGLSLossless, "JPEG-LS Lossless"), (MPEG2MPML, "MPEG2")):
        data = write_dicom(b"\xff\xd8 no frame \xff\xd9", "RGB", syntax)
        assert "undecodable: DICOM transfer syntax" in reason_of(data) and name in reason_of(data)
    assert "needs a decoder that is not installed (" in reason_of(write_dicom(b"\xff\xd8 x ", "RGB", JPEGLSLossless))
    assert "PhotometricInterpretation CMYK is not read" in reason_of(write_dicom(draw(), "CMYK"))
    assert reason_of(write_dicom(draw(), Rows=60_000, Columns=60_000)).startswith("decompression_bomb: ")
    assert reason_of(write_dicom(draw())[:-5000]).startswith("truncated: ")
    assert reason_of(write_dicom(draw())[:400]).startswith("undecodable: ")
    assert reason_of(b"\0" * 128 + b"DICM" + b"\xff" * 500).startswith("undecodable: ")
    with pytest.raises(RejectedImageError, match="60 pixels, the least side is 61"):
        clean_image(write_dicom(draw()), min_side=61)


def test_without_pydicom_the_extra_is_named(tmp_path: Path) -> None:
    path = tmp_path / "photo.dcm"
    path.write_bytes(write_dicom(draw()))
    script = (
        "import sys; sys.modules['pydicom'] = None\n"
        "from pathlib import Path; from panfm.errors import UserError; from panfm.shards.privacy import clean_image\n"
        "try: clean_image(Path(sys.argv[1]).read_bytes())\n"
        "except UserError as error: print(error)\n"
    )
    answer = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    assert answer.stdout.strip().endswith('run pip install "panfm[dicom]"')
