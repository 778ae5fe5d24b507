"""An identifier is planted in every place that a hospital's archive has; a build carries none of them over.

The same search is run on the archive first, where it must find every one: it can find what it looks for.
"""

import base64
import binascii
import io
import json
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pyarrow.parquet as pq
import pytest
import tifffile
from PIL import Image, PngImagePlugin, TiffImagePlugin, features

from panfm.errors import UserError
from panfm.shards.cards import SourceCard
from panfm.shards.index import open_shard_set
from panfm.shards.privacy import load_key
from panfm.shards.writer import BuildOptions, build_shards
from tests.archives import describe_source_card, write_table
from tests.profiles import SRGB
from tests.shards.wsi_pyramids import draw_tissue

pytest.importorskip("pydicom")

from tests.shards.dicom_files import write_dicom

STEM = "Qxplant"
PRIVATE = describe_source_card("clinic", identifiers="private", access="private", synthetic=None)
GPS = 4_813_743  # hundred-thousandths of a degree
MRN = 90_817_263
DATES = ("2019:03:12", "20190312", "2019-03-12", "12.03.2019", "19610312", "1961-03-12", "12 mars 1961")
TEXTS = ("anna@north.org", "01 42 49 49 49", "1 84 12 76 451 089 46")


class Plants:
    """Hands out identifiers and remembers where each was put."""

    def __init__(self) -> None:
        self.places: dict[str, str] = {}  # text -> place

    def __call__(self, place: str) -> str:
        text = f"{STEM}{len(self.places):03d}"
        self.places[text] = place
        return text

    def name(self, place: str) -> str:
        """One that is a word, as people's names are."""
        text = STEM + "".join(chr(97 + int(digit)) for digit in f"{len(self.places):03d}")
        self.places[text] = place
        return text


# ------------------------------------------------------------------------------------------------ the search


def iterate_bytes(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Everything below a folder: names, bytes, and what lies compressed in them."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        yield f"name {name}", name.encode()
        if not path.is_file():
            continue
        data = path.read_bytes()
        yield name, data
        yield from ((f"{name}, inflated", part) for part in inflate_png(data))
        if path.suffix == ".tar":
            with tarfile.open(path) as tar:
                for member in tar:
                    inside = tar.extractfile(member).read()  # type: ignore[union-attr]
                    yield from ((f"{member.name}, inflated", part) for part in inflate_png(inside))
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            yield f"{name}, values", json.dumps(table.to_pylist(), ensure_ascii=False).encode()
            yield f"{name}, schema", repr(table.schema.metadata).encode()


def inflate_png(data: bytes) -> Iterator[bytes]:
    place = 8
    pixels = b""
    while data[:4] == b"\x89PNG" and place + 12 <= len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        kind, body = data[place + 4 : place + 8], data[place + 8 : place + 8 + length]
        if kind == b"IDAT":
            pixels += body
        elif kind in (b"zTXt", b"iCCP"):
            yield zlib.decompress(body[body.index(b"\0") + 2 :])
        place += length + 12
    if pixels:
        yield zlib.decompress(pixels)


def spell(text: str) -> Iterator[bytes]:
    """A text in lower case as bytes may hold it, for comparison with bytes in lower case."""
    yield text.lower().encode()
    yield text.lower().encode("utf-16-le")
    yield text.lower().encode("utf-16-be")
    yield text.encode().hex().encode()


def spell_base64(text: str) -> Iterator[bytes]:
    """The characters of a base64 text that its neighbours do not change, at each of three alignments."""
    for one in {text, text.lower(), text.upper()}:
        for shift in range(3):
            encoded = base64.b64encode(b"\0" * shift + one.encode())
            inner = encoded[-(-8 * shift // 6) : 8 * (shift + len(one.encode())) // 6]
            if len(inner) >= 8:  # fewer are found by chance
                yield inner


def find(folder: Path, text: str) -> list[str]:
    plain, exact = tuple(spell(text)), tuple(spell_base64(text))
    return [
        place
        for place, data in iterate_bytes(folder)
        if any(one in data.lower() for one in plain) or any(one in data for one in exact)
    ]


def find_number(folder: Path, number: int) -> list[str]:
    packed = [struct.pack(kind, number) for kind in ("<I", ">I", "<q", ">q", "<d", ">d", "<f", ">f")]
    packed += [str(number).encode()]
    return [place for place, data in iterate_bytes(folder) if any(one in data for one in packed)]


# ------------------------------------------------------------------------------------------------ the archive


def draw(seed: int, size: tuple[int, int] = (80, 60)) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def plant_exif(plant: Plants, where: str) -> Image.Exif:
    exif = Image.Exif()
    for tag, name in ((270, "description"), (305, "software"), (315, "artist"), (316, "host"), (33432, "copyright")):
        exif[tag] = plant(f"{where} exif {name}")
    exif[271], exif[272], exif[274], exif[306] = "Canon", "EOS 5D", 6, "2019:03:12 10:11:12"
    for tag, name in ((0x9C9B, "title"), (0x9C9D, "author"), (0x9C9F, "subject")):  # as Windows writes them
        exif[tag] = (plant(f"{where} exif {name}") + "\0").encode("utf-16-le")
    inner = exif.get_ifd(0x8769)
    inner[0x9286] = b"ASCII\0\0\0" + plant(f"{where} user comment").encode()
    inner[0x927C] = plant(f"{where} maker note").encode()
    inner[0x9003] = "2019:03:12 10:11:12"
    for tag, name in ((0xA430, "owner"), (0xA431, "serial number"), (0xA435, "lens serial"), (0xA420, "image id")):
        inner[tag] = plant(f"{where} exif {name}")
    degrees = TiffImagePlugin.IFDRational(GPS, 100_000)
    exif.get_ifd(0x8825).update({1: "N", 2: (degrees, 7.0, 8.0), 29: "2019:03:12", 28: plant(f"{where} gps area")})
    return exif


def add_segments(jpeg: bytes, *segments: tuple[int, bytes]) -> bytes:
    parts = [bytes((0xFF, marker)) + (len(body) + 2).to_bytes(2, "big") + body for marker, body in segments]
    return jpeg[:2] + b"".join(parts) + jpeg[2:]


def make_iptc(text: str) -> bytes:
    record = b"\x1c\x02\x78" + len(text).to_bytes(2, "big") + text.encode()
    return b"8BIM\x04\x04\0\0" + len(record).to_bytes(4, "big") + record + b"\0" * (len(record) % 2)


def make_profile(plant: Plants, where: str, *, as_srgb: bool = False) -> bytes:
    """sRGB with other texts in it, of the same length."""
    title = "sRGB built-in"
    assert SRGB.count(title.encode("utf-16-be")) == 1 and SRGB.count("No copyright".encode("utf-16-be")) == 1
    profile = SRGB.replace("No copyright".encode("utf-16-be"), (plant(f"{where} icc text") + "!!").encode("utf-16-be"))
    if not as_srgb:
        name = (plant(f"{where} icc name") + "!!!").encode("utf-16-be")
        profile = profile.replace(title.encode("utf-16-be"), name)
    return profile


def make_jpeg(plant: Plants, where: str, size: tuple[int, int]) -> bytes:
    jpeg = encode(
        draw(1, size),
        "JPEG",
        quality=90,
        exif=plant_exif(plant, where),
        xmp=f"<x:xmpmeta>{plant(f'{where} xmp')}</x:xmpmeta>".encode(),
        comment=plant(f"{where} comment").encode(),
        icc_profile=make_profile(plant, where, as_srgb=True),
    )
    thumbnail = encode(draw(2, (16, 16)), "JPEG", comment=plant(f"{where} comment in a thumbnail").encode())
    jpeg = add_segments(
        jpeg,
        (0xE0, b"JFXX\0\x10" + thumbnail),
        (0xE1, b"http://ns.adobe.com/xmp/extension/\0" + plant(f"{where} extended xmp").encode()),
        (0xE3, b"META\0\0" + plant(f"{where} app3").encode()),
        (0xEB, b"HDR_RI ver=11 " + plant(f"{where} app11").encode()),
        (0xEC, b"Ducky\0" + plant(f"{where} app12").encode()),
        (0xED, b"Photoshop 3.0\0" + make_iptc(plant(f"{where} iptc"))),
    )
    preview = encode(draw(3), "JPEG", comment=plant(f"{where} comment in a second image").encode())
    return jpeg + preview + plant(f"{where} behind the end").encode()


def make_png(plant: Plants, where: str, image: Image.Image) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", binascii.crc32(kind + body))

    text = PngImagePlugin.PngInfo()
    text.add_text("Patient", plant(f"{where} tEXt"))
    text.add_text("Comment", plant(f"{where} zTXt") * 20, zip=True)
    text.add_itxt("XML:com.adobe.xmp", plant(f"{where} iTXt"))
    options: dict[str, Any] = {}
    if image.mode == "RGB":
        options = {"exif": plant_exif(plant, where), "icc_profile": make_profile(plant, where)}
    data = encode(image, "PNG", pnginfo=text, **options)
    extra = chunk(b"tIME", struct.pack(">HBBBBB", 2019, 3, 12, 10, 11, 12))
    extra += chunk(b"qxPl", plant(f"{where} private chunk").encode())
    return data[:33] + extra + data[33:] + plant(f"{where} behind the end").encode()


def make_tiff(plant: Plants, where: str, image: Image.Image) -> bytes:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    for tag in (270, 305, 315, 316, 33432, 65000):
        tags.tagtype[tag] = 2
        tags[tag] = plant(f"{where} tag {tag}")
    for tag in (700, 33723, 34377, 65001):
        tags.tagtype[tag] = 7
        tags[tag] = plant(f"{where} tag {tag}").encode()
    tags[306] = "2019:03:12 10:11:12"
    return encode(image, "TIFF", tiffinfo=tags) + plant(f"{where} behind the end").encode()


def make_dicom(plant: Plants, where: str, pixels: np.ndarray | bytes, *form: str) -> bytes:
    names = "PatientName PatientID OtherPatientNames AccessionNumber StudyID StudyDescription ImageComments"
    names += " ReferringPhysicianName OperatorsName InstitutionName InstitutionAddress DeviceSerialNumber StationName"
    tags = {name: plant(f"{where} {name}") for name in names.split()}
    tags["StudyInstanceUID"] = f"1.2.826.{MRN}"
    return write_dicom(pixels, *form, **tags, PatientAddress=plant(f"{where} address"))


def make_images(plant: Plants) -> dict[str, bytes]:
    """File extension and bytes of one image of every kind, by a short name."""
    plain = encode(draw(4), "JPEG", quality=90)
    padded = plain[:-2] + (plant("jpeg, behind the last pixel") + "-" * 30).encode() + plain[-2:]
    large = draw(5, (160, 120))
    jpeg2000 = encode(draw(6), "JPEG2000", comment=plant("jpeg 2000 comment"))
    mpo = encode(draw(12), "MPO", save_all=True, append_images=[draw(13)])
    files = {
        "small.jpg": make_jpeg(plant, "jpeg", (80, 60)),
        "large.jpg": make_jpeg(plant, "large jpeg", (160, 120)),
        "profile.jpg": encode(draw(7), "JPEG", icc_profile=make_profile(plant, "profile jpeg")),
        "padded.jpg": padded,
        "two.jpg": add_segments(mpo, (0xFE, plant("mpo comment").encode())),
        "text.png": make_png(plant, "png", draw(8)),
        "large.png": make_png(plant, "large png", large),
        "tags.tif": make_tiff(plant, "tiff", draw(9)),
        "chunks.webp": encode(
            draw(10),
            "WEBP",
            exif=plant_exif(plant, "webp"),
            xmp=plant("webp xmp").encode(),
            icc_profile=make_profile(plant, "webp"),
        ),
        "comment.gif": encode(draw(11).quantize(), "GIF", comment=plant("gif comment").encode()),
        "end.bmp": encode(draw(14), "BMP") + plant("bmp, behind the end").encode(),
        "comment.ppm": b"P6\n# %s\n80 60\n255\n" % plant("ppm comment").encode() + draw(15).tobytes(),
        "comment.jp2": jpeg2000,
        "plain.dcm": make_dicom(plant, "dicom", np.asarray(draw(16))),
        "jpeg.dcm": make_dicom(
            plant,
            "dicom jpeg",
            encode(draw(17), "JPEG", comment=plant("dicom jpeg comment").encode()),
            "YBR_FULL_422",
            "1.2.840.10008.1.2.4.50",
        ),
    }
    if features.check("avif"):
        files["boxes.avif"] = encode(
            draw(18), "AVIF", exif=plant_exif(plant, "avif"), xmp=plant("avif xmp").encode(), speed=10
        )
    return files


def make_archive(plant: Plants, root: Path) -> SourceCard:
    """A photograph archive with something planted wherever there is a place for it."""
    rows: list[dict[str, str]] = []
    root.mkdir()
    for number, (name, data) in enumerate(make_images(plant).items()):
        folder = root / plant("folder name")
        folder.mkdir()
        path = folder / f"{plant('file name')}_{name}"
        path.write_bytes(data)
        file = path.relative_to(root).as_posix()
        if number == 3:
            with zipfile.ZipFile(folder / f"{plant('zip name')}.zip", "w") as archive:
                member = f"{plant('folder in a zip')}/{plant('name in a zip')}.jpg"
                archive.writestr(member, data)
                file = f"{folder.name}/{Path(archive.filename or '').name}::{member}"
        mask = Image.fromarray((np.asarray(draw(number).convert("L")) > 128).astype(np.uint8) * 255)
        mask_name = ""
        if number % 3 == 0:
            if name in ("small.jpg", "large.png", "boxes.avif"):  # masks are drawn on the upright image
                mask = mask.transpose(Image.Transpose.ROTATE_270)
            mask_name = f"{plant('mask name')}.{('png', 'tif')[number % 2]}"
            make_mask = (make_png, make_tiff)[number % 2]
            (root / mask_name).write_bytes(make_mask(plant, "mask", mask))
        person, patient, lesion = plant.name("name column"), plant("patient id"), plant("lesion id")
        doctor, sister = plant.name("doctor in a caption"), plant.name("maiden name column")
        captions = (
            f"Nevus of {person} {sister}, patient {patient}, lesion {lesion.upper()}, file {path.name}, Prof. {doctor}",
            f"See {path.stem} and {folder.name}; born 12 mars 1961, seen 12.03.2019 by Dr. {doctor}",
            f"{patient}_2.jpg, {TEXTS[1]}, {TEXTS[0]}, NIR {TEXTS[2]}, MRN {MRN}, {person.lower()}, Mme {doctor}",
        )
        rows.append(
            {
                "file": file,
                "mask": mask_name,
                "person": person,
                "maiden": sister,
                "born": "1961-03-12",
                "mrn": str(MRN + number),
                "patient": patient,
                "lesion": lesion,
                "date": f"2019-03-{12 + number % 3}",
                "dx": ("nv", "mel", f"mel (Mme {doctor})")[number % 3],
                "text": captions[number % 3] + ". Brown.",
                "site": "left arm",
                "unused": plant("column that no one reads"),
            }
        )
    owned = plant.name("owner in the camera model")
    exif = Image.Exif()
    exif[271], exif[272] = "Apple", f"{owned} iPhone 6"
    (root / "owned.jpg").write_bytes(encode(draw(20), "JPEG", exif=exif))
    rows.append(rows[0] | {"file": "owned.jpg", "mask": "", "person": owned})
    write_table(root / "table.csv", rows)
    return SourceCard.model_validate(
        PRIVATE
        | {
            "modality": "clinical",
            "images": {"image": {"path": "{file}", "mask": "{mask}"}},
            "columns": {
                "patient_id": "patient",
                "lesion_id": "lesion",
                "visit_date": "date",
                "caption": "text",
                "anatomic_site": "site",
            },
            "identifying_columns": ["person", "maiden", "born", "mrn"],
            "labels": {
                "diagnosis": {
                    "column": "dx",
                    "values": {"nv": "nevus", "mel": "melanoma"}
                    | {row["dx"]: "melanoma" for row in rows if "Mme" in row["dx"]},
                }
            },
        }
    )


# ------------------------------------------------------------------------------------------------ the tests


def test_nothing_planted_in_an_archive_of_photographs_comes_through(tmp_path: Path) -> None:
    plant, root, out = Plants(), tmp_path / "raw", tmp_path / "shards"
    card = make_archive(plant, root)
    key_file = tmp_path / "keys" / "clinic.key"
    options = BuildOptions(short_side=64, key_file=key_file, create_key=True, max_rejected_share=0.0)
    report = build_shards(card, root, out, options=options)
    assert report.num_rejected == {} and report.num_samples >= 16

    archive = [(place, data, data.lower()) for place, data in iterate_bytes(root)]
    for text, place in plant.places.items():  # the control
        spellings = tuple(spell(text))
        assert any(one in lower for _, _, lower in archive for one in spellings), f"{place} was not planted"
    for text in (*DATES, *TEXTS):
        assert find(root, text), text
    assert find_number(root, GPS) and find_number(root, MRN)

    assert find(out, STEM) == []
    for text in (*DATES, *TEXTS, load_key(key_file, shard_folder=out).secret.hex(), "owned.jpg", "iphone", "small.jpg"):
        assert find(out, text) == [], text
    assert find_number(out, GPS) == [] and find_number(out, MRN) == []
    table = open_shard_set(out).table
    assert set(table["visit_day"].to_pylist()) == {0}
    assert set(filter(None, table["device"].to_pylist())) == {"Canon EOS 5D", "Canfield VEOS DS3"}
    assert set(table["extension"].to_pylist()) == {"jpg", "png"}
    shard_set = open_shard_set(out)
    captions = [shard_set.read_caption(row) for row in range(table.num_rows)]
    assert all(caption is not None and "[removed]" in caption and "Brown." in caption for caption in captions)
    index = json.loads((out / "index.json").read_text())
    kinds = "identifying patient_id lesion_id image_id folder date email phone national_id name"
    assert all(index["text_scan"][f"caption.{kind}"] >= 4 for kind in kinds.split())
    assert index["text_scan"]["device.identifying"] == 1
    assert index["identifiers"]["kind"] == "private"


def test_the_search_finds_what_it_should(tmp_path: Path) -> None:
    spellings = {
        "plain": STEM.encode(),
        "upper": STEM.upper().encode(),
        "utf-16-le": STEM.encode("utf-16-le"),
        "utf-16-be": STEM.upper().encode("utf-16-be"),
        "hex": STEM.encode().hex().upper().encode(),
        **{f"base64-{n}": base64.b64encode(b"x" * n + STEM.encode() + b"yz") for n in range(3)},
    }
    for name, data in spellings.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "file").write_bytes(b"before" + data + b"after")
        assert find(folder, STEM) == ["file"], name
        (folder / "file").write_bytes(b"before and after")
        assert find(folder, STEM) == []


@pytest.mark.parametrize(
    ("column", "cell", "words"),
    [
        ("labels.diagnosis", "nevus, Mme Qxplant", "a person's name"),
        ("labels.diagnosis", "Qxplant 77, nevus", "a patient id"),
        ("anatomic_site", "arm of qxplant-77", "a patient id"),
        ("institution", "ward of 2019-03-12", "a date"),
        ("tabular.extra", str(MRN), "a number of six or more digits"),
        ("tabular.extra", "Qxplant_77.JPG", "a patient id"),
    ],
)
def test_a_planted_field_stops_the_build(tmp_path: Path, column: str, cell: str, words: str) -> None:
    root, out = tmp_path / "raw", tmp_path / "shards"
    root.mkdir()
    (root / "photo.jpg").write_bytes(encode(draw(1), "JPEG"))
    cells = {"file": "photo.jpg", "patient": "QXPLANT_77", "anatomic_site": "arm", "institution": "x", "extra": "y"}
    cells |= {"diagnosis": "nevus"} | {column.rpartition(".")[2]: cell}
    (root / "table.csv").write_text(",".join(cells) + "\n" + ",".join(f'"{cell}"' for cell in cells.values()) + "\n")
    card = SourceCard.model_validate(
        PRIVATE
        | {
            "modality": "clinical",
            "columns": {
                "path": "file",
                "patient_id": "patient",
                "anatomic_site": "anatomic_site",
                "institution": "institution",
            },
            "labels": {"diagnosis": {"column": "diagnosis"}},
            "tabular": ["extra"],
        }
    )
    options = BuildOptions(key_file=tmp_path / "a.key", create_key=True)
    with pytest.raises(UserError, match=rf"line 2, {column}: holds {words}") as error:
        build_shards(card, root, out, options=options)
    assert STEM.lower() not in str(error.value).lower() and str(MRN) not in str(error.value)
    assert find(out, STEM) == [] and not (out / "index.json").exists() and not list(out.glob("*.tar"))


def write_aperio(path: Path, plant: Plants) -> None:
    """A slide as a scanner writes it: the tissue, a thumbnail, and photographs of the label and of the whole glass."""
    tissue = draw_tissue(1024, 768)
    marked = np.full((200, 200, 3), (20, 235, 20), dtype=np.uint8)  # no tissue has this colour
    facts = {"AppMag": 20, "MPP": 0.5, "Date": "12.03.2019", "User": plant("slide user")}
    facts |= {"Patient": plant("slide property"), "Filename": plant("slide file name")}
    head = "Aperio Image Library v12.0.5\r\n1024x768 [0,0 1024x768] (256x256)|"
    head += "|".join(f"{name} = {fact}" for name, fact in facts.items())
    with tifffile.TiffWriter(path) as file:
        common: dict[str, Any] = {"photometric": "rgb", "metadata": None, "software": plant("slide software")}
        artist = [(315, 2, 0, plant("slide artist"), True)]
        file.write(tissue, tile=(256, 256), description=head, extratags=artist, **common)
        file.write(tissue[::8, ::8].copy(), description=head, **common)
        for name in ("label", "macro"):
            file.write(
                marked, description=f"{head}\r\n{name} 200x200", subfiletype=1 if name == "label" else 9, **common
            )


def test_nothing_planted_in_slides_comes_through(tmp_path: Path) -> None:
    plant, root, out = Plants(), tmp_path / "raw", tmp_path / "shards"
    root.mkdir()
    name = f"{plant('slide name')}.svs"
    write_aperio(root / name, plant)
    patient = plant("patient id")
    (root / "table.csv").write_text(f"file,patient,slide\n{name},{patient},{plant('slide id')}\n")
    with openslide.OpenSlide(root / name) as slide:  # the control
        assert set(slide.associated_images) >= {"label", "macro"}
        assert STEM in slide.properties["tiff.ImageDescription"]
    for text, place in plant.places.items():
        assert find(root, text), place
    card = SourceCard.model_validate(
        PRIVATE
        | {
            "name": "slides",
            "modality": "histopathology",
            "columns": {"path": "file", "patient_id": "patient", "slide_id": "slide"},
            "slides": {"tile_um": 64, "mpp": 0.5},
        }
    )
    options = BuildOptions(key_file=tmp_path / "a.key", create_key=True)
    assert build_shards(card, root, out, options=options).num_samples == 48
    assert find(out, STEM) == [] and all(find(out, text) == [] for text in DATES)
    shard_set = open_shard_set(out)
    for row in range(shard_set.num_samples):
        pixels = np.asarray(Image.open(io.BytesIO(shard_set.read_image(row)))).astype(int)
        assert (pixels[..., 1] - pixels[..., 0]).max() < 0  # tissue is pink; label and macro are green
