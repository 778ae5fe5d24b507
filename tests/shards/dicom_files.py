"""DICOM photographs for the tests, as an archive exports them: a patient in the header, any kind of pixels."""

import io
from typing import Any

import numpy as np
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

PHOTOGRAPH = "1.2.840.10008.5.1.4.1.1.77.1.4"  # VL Photographic Image Storage


def write_dicom(
    pixels: np.ndarray | bytes, photometric: str = "RGB", syntax: str = ExplicitVRLittleEndian, **tags: Any
):
    """A file of `pixels` [H, W(, 3)], or one compressed frame of 60 x 80."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = PHOTOGRAPH
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid(entropy_srcs=["photo"])
    dataset.PatientName, dataset.PatientID, dataset.PatientBirthDate = "PLANTED^Jean", "PLANTED-1", "19610312"
    dataset.StudyDate, dataset.InstitutionName = "20190312", "PLANTED clinic"
    dataset.Manufacturer, dataset.ManufacturerModelName = "Canfield", "VEOS DS3"
    dataset.add_new(0x00091010, "LO", "PLANTED private tag")
    raw = isinstance(pixels, bytes)
    shape = (60, 80, 1 if photometric.startswith("MONO") else 3) if raw else pixels.shape
    dataset.Rows, dataset.Columns = shape[:2]
    dataset.SamplesPerPixel = shape[2] if len(shape) == 3 else 1
    if dataset.SamplesPerPixel == 3:
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated = dataset.BitsStored = 8 if raw else pixels.itemsize * 8
    dataset.PixelRepresentation, dataset.PhotometricInterpretation = 0, photometric
    dataset.PixelData = encapsulate([pixels]) if raw else pixels.tobytes()
    dataset["PixelData"].VR = "OB" if dataset.BitsAllocated == 8 else "OW"
    for name, value in tags.items():
        setattr(dataset, name, value)
    dataset.HighBit = dataset.BitsStored - 1
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()
