"""What every page has in common: how its template is filled, and how a small picture gets into it.

folder of templates --build_environment--> jinja2 Environment        PIL image --encode_thumbnail--> data: URI
"""

import base64
import io
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image


def build_environment(templates: Path) -> Environment:
    """Build what turns the templates of a folder into pages: everything is escaped, an unknown name is an error."""
    return Environment(
        loader=FileSystemLoader(templates),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def encode_thumbnail(image: Image.Image, side: int, quality: int) -> str:
    """Encode a copy of at most `side` pixels as a JPEG in a data: URI, from pixels alone: no header comes along."""
    small = image.convert("RGB")
    small.info = {}
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=quality)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
