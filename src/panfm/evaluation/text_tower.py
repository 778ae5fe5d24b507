"""The text tower that belongs to an encoder, for what is asked in words: zero-shot classes, captions.

Encoder of panfm:DIR, an export with text/ -> TextSide (texts and features in one space)
"""

from panfm.encoder.address import parse_address
from panfm.encoder.load import Encoder
from panfm.encoder.text import TextSide, load_text
from panfm.errors import UserError


def load_text_side(encoder: Encoder, task: str) -> TextSide:
    """Load the text tower that `encoder` was trained with.

    Raises UserError where there is none, or where the encoder's features are not those that it was trained on: random
    weights, another pooling than the export's.
    """
    address = parse_address(encoder.address)
    way_out = "take an export of a pretraining with an image_text objective (panfm:DIR with text/)"
    if address.scheme != "panfm" or address.seed is not None:
        raise UserError(
            f"task {task}: encoder {encoder.name} has no text tower, and the task is asked in words; {way_out}, or "
            "leave the task out"
        )
    if encoder.facts is not None and encoder.pooling != encoder.facts.pooling:
        raise UserError(
            f"task {task}: {encoder.address} has pooling {encoder.pooling}, its text tower was trained beside "
            f"{encoder.facts.pooling}; leave out ?pooling="
        )
    return load_text(address.target)
