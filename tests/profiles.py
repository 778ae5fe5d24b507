"""Colour profiles for images that are drawn by tests."""

from PIL import ImageCms

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def make_swapped_profile() -> bytes:
    """A profile of another name whose red is sRGB's blue, and the other way round."""
    renamed = SRGB.replace("sRGB".encode("utf-16-be"), "test".encode("utf-16-be"))
    return renamed.replace(b"rXYZ", b"????").replace(b"bXYZ", b"rXYZ").replace(b"????", b"bXYZ")
