"""Captions as token ids: CLIP's, as long as the longest, zeros where there is none; in batches, each its image's."""

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image

from panfm.data.batch import NO_GROUP
from panfm.data.captions import TokenizerConfig, load_tokenizer, number_texts, tokenise
from panfm.errors import UserError
from panfm.shards.index import open_shard_set
from panfm.shards.packing import BuildOptions
from panfm.shards.writer import build_shards
from tests.archives import make_source_card, write_table
from tests.data.loading import START, assert_same, draw_steps, make_loader

pytestmark = pytest.mark.skipif(find_spec("open_clip") is None, reason='no open_clip: pip install "panfm[text]"')
TOKENIZER = TokenizerConfig(context_length=16)


def test_ids_are_clips_and_as_long_as_the_longest() -> None:
    texts = tokenise(["A photo of a CAT", None, "  \n", "cat"], TokenizerConfig())
    assert texts.dtype == torch.int64
    assert texts.tolist() == [
        [49406, 320, 1125, 539, 320, 2368, 49407],  # as in OpenAI's CLIP
        [0] * 7,
        [0] * 7,
        [49406, 2368, 49407, 0, 0, 0, 0],
    ]


def test_a_long_text_is_cut_and_still_ends() -> None:
    texts = tokenise(["cat " * 100, "cat"], TokenizerConfig(context_length=10))
    assert texts.shape == (2, 10)
    assert texts[0].tolist() == [49406, *[2368] * 8, 49407]


def test_an_exclamation_mark_is_no_padding() -> None:
    """The id of "!" inside a word is 0."""
    (row,) = tokenise(["!?"], TokenizerConfig()).tolist()
    assert row[0] == 49406 and row[-1] == 49407 and len(row) >= 3


def test_equal_texts_have_equal_numbers_however_padded() -> None:
    captions = ["a nevus", "A  nevus", "a nevus.", None, "a melanoma", "a !", "a"]
    numbers = number_texts(tokenise(captions, TokenizerConfig())).tolist()
    assert numbers[0] == numbers[1] and numbers[3] == NO_GROUP
    assert len(set(numbers)) == 6 and min(numbers[:3] + numbers[4:]) >= 0
    longer = number_texts(tokenise([*captions, "word " * 20], TokenizerConfig())).tolist()
    assert longer[:-1] == numbers


def test_no_caption_at_all_needs_no_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip.tokenizer", None)
    load_tokenizer.cache_clear()
    assert tokenise([None, ""], TokenizerConfig()).tolist() == [[0], [0]]
    with pytest.raises(UserError, match=r'pip install "panfm\[text\]"'):
        tokenise(["a nevus"], TokenizerConfig())


def test_the_vocabulary_is_the_towers() -> None:
    from panfm.models.text import VOCABULARY_SIZE

    assert load_tokenizer().vocab_size == VOCABULARY_SIZE


# ------------------------------------------------------------------------------------------------ in batches


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory, make_picture: Callable[..., Image.Image]) -> Path:
    """24 images, of which each third has no caption, and number 7 an image that does not decode."""
    root = tmp_path_factory.mktemp("captioned")
    rows = [{"path": f"{n}.jpg", "text": f"spot number {n}, naïve" if n % 3 else ""} for n in range(24)]
    for number, row in enumerate(rows):
        make_picture(number).save(root / row["path"], quality=90)
    write_table(root / "table.csv", rows)
    card = make_source_card("captioned", modality="clinical", columns={"path": "path", "caption": "text"})
    out = root / "shards"
    build_shards(card, root, out, options=BuildOptions(samples_per_shard=10))
    shard_set = open_shard_set(out)
    row = next(row for row in range(24) if shard_set.read_caption(row) == "spot number 7, naïve")
    places = shard_set.places
    with (out / places.shard_names[places.shard[row]]).open("r+b") as file:
        file.seek(places.offset[row])
        file.write(bytes(int(places.length[row])))
    return out


def test_every_image_comes_with_its_own_caption(captioned: Path, alpha: Path) -> None:
    """Also the one that takes the place of another which does not decode; sources without captions may be beside it."""
    loader = make_loader(captioned, alpha, tokenizer=TOKENIZER, max_failed_share=1.0)
    captions = [open_shard_set(captioned).read_caption(row) for row in range(24)]
    num_texts = num_failures = 0
    with loader:
        for first in range(0, 96, 12):
            drawn = loader.draw(range(first, first + 12))
            own = [captions[sample.row] if sample.source == "captioned" else None for sample in drawn.samples]
            assert torch.equal(drawn.batch.texts, tokenise(own, TOKENIZER))
            assert torch.equal(drawn.batch.captions, number_texts(drawn.batch.texts))
            num_texts += sum(caption is not None for caption in own)
            num_failures += len(drawn.failures)
    assert num_failures > 0 and 96 // 6 < num_texts < 96 // 2


@pytest.mark.slow
def test_workers_make_the_same_texts(captioned: Path) -> None:
    options = {"tokenizer": TOKENIZER, "max_failed_share": 1.0}
    here = draw_steps(make_loader(captioned, **options), 2, START)
    there = draw_steps(make_loader(captioned, workers=1, **options), 2, START)
    assert_same(here, there)
    assert all(torch.equal(one.texts, other.texts) for one, other in zip(here, there, strict=True))


def test_captions_are_read_only_where_they_are_asked_for(captioned: Path, alpha: Path) -> None:
    with make_loader(captioned, max_failed_share=1.0) as loader:
        batch = loader.draw(range(4)).batch
        assert batch.texts is None and batch.captions is None
    with pytest.raises(UserError, match=r"none of the 60 samples .* has a caption"):
        make_loader(alpha, tokenizer=TOKENIZER)
