import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_model_data_config

from panfm.encoder import load_encoder
from panfm.encoder.export import _compute_crop_share, export_encoder
from panfm.encoder.facts import EncoderFacts, SourceFacts, TransformFacts, read_facts, write_facts
from panfm.errors import UserError
from panfm.files import compute_file_sha256, write_json
from panfm.models.vit import EncoderConfig, build_vit, get_timm_kwargs


def make_checkpoint(
    folder: Path, config: EncoderConfig, /, pooling: str = "mean", seed: int = 0, step: int = 7, **more: object
) -> Path:
    """Write what encoder.export reads of a checkpoint: encoder.safetensors, encoder.json, manifest.json."""
    folder.mkdir(parents=True)
    save_file(build_vit(config, seed).state_dict(), folder / "encoder.safetensors")
    facts = EncoderFacts(
        timm_name=config.name,
        timm_kwargs=get_timm_kwargs(config),
        transform=TransformFacts(
            image_size=config.image_size,
            resize_size=config.image_size + 4,
            interpolation="bicubic",
            mean=(0.5, 0.6, 0.7),
            std=(0.2, 0.3, 0.4),
        ),
        pooling=pooling,
        samples_seen=1234,
        step=step,
        sources=(
            SourceFacts(source="ham10000", licence="CC BY-NC 4.0", num_kept=7000, num_excluded=3013, data_hash="ab"),
        ),
        excluded_tasks=("ham10000_diagnosis",),
        code_version="0.1.0",
    )
    write_facts(folder / "encoder.json", facts.model_copy(update=more))
    files = {
        name: {"sha256": compute_file_sha256(folder / name), "size": (folder / name).stat().st_size}
        for name in ("encoder.safetensors", "encoder.json")
    }
    write_json(folder / "manifest.json", {"files": files})
    return folder


SMALL = EncoderConfig(name="test_vit", image_size=48, patch_size=8, num_registers=2, layer_scale=0.5)
ROTARY = EncoderConfig(
    name="vit_tiny_patch16_dinov3_qkvb", image_size=48, patch_size=8, num_registers=2, layer_scale=0.5
)


@pytest.mark.parametrize("config", [SMALL, ROTARY], ids=["absolute", "rotary"])
@pytest.mark.parametrize("pooling", ["mean", "cls", "cls_mean"])
def test_the_features_are_the_same_in_timm_and_panfm(tmp_path: Path, pooling: str, config: EncoderConfig) -> None:
    out = export_encoder(make_checkpoint(tmp_path / "step-1", config, pooling), tmp_path / "out")
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "panfm.json",
    ]
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(tmp_path / "image.png")
    ours = load_encoder(f"panfm:{out}").embed([tmp_path / "image.png"])

    theirs = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=0).eval()
    transform = create_transform(**resolve_model_data_config(theirs), is_training=False)
    image = transform(Image.open(tmp_path / "image.png"))[None]
    assert image.shape == (1, 3, 48, 48)
    with torch.no_grad():
        tokens = theirs.forward_features(image)  # [1, 1 + 2 + 36, 64 or 192]
        expected = {
            "mean": theirs(image),
            "cls": theirs(image),
            "cls_mean": torch.cat([tokens[:, 0], tokens[:, 3:].mean(dim=1)], dim=1),
        }[pooling]
    # Not exact: torchvision rounds the resized side otherwise than EvalTransform in the last pixel row.
    np.testing.assert_allclose(ours, expected.numpy(), rtol=0.02, atol=0.02)
    same_pixels = load_encoder(f"panfm:{out}").transform.apply((tmp_path / "image.png").read_bytes())
    with torch.no_grad():
        x = load_encoder(f"panfm:{out}").transform.normalise(torch.from_numpy(same_pixels[None]))
        if pooling != "cls_mean":
            np.testing.assert_allclose(ours, theirs(x).numpy(), rtol=1e-4, atol=1e-5)
    hf = load_encoder(f"hf:{out}?pooling={pooling}")
    np.testing.assert_allclose(hf.embed([tmp_path / "image.png"]), ours, rtol=1e-4, atol=1e-5)
    assert hf.transform == load_encoder(f"panfm:{out}").transform


def test_timm_resizes_to_the_very_pixel() -> None:
    for size in range(16, 400, 8):
        for resize in range(size, 2 * size, 3):
            facts = TransformFacts(
                image_size=size, resize_size=resize, interpolation="bicubic", mean=(0, 0, 0), std=(1, 1, 1)
            )
            assert math.floor(size / _compute_crop_share(facts)) == resize


def test_the_export_says_where_it_came_from(tmp_path: Path) -> None:
    out = export_encoder(make_checkpoint(tmp_path / "step-1", SMALL), tmp_path / "skin")
    readme = (out / "README.md").read_text()
    assert "| ham10000 | CC BY-NC 4.0 | 7,000 | 3,013 |" in readme
    assert "by task: ham10000_diagnosis." in readme and "For research only" in readme
    encoder = load_encoder(f"panfm:{out}")
    assert encoder.name == "skin" and encoder.card.contamination == "excluded"
    assert encoder.card.training_data == "ham10000 (CC BY-NC 4.0): 7,000 images"
    assert encoder.facts is not None and encoder.facts.excluded_tasks == ("ham10000_diagnosis",)
    assert encoder.transform.mean == (0.5, 0.6, 0.7) and encoder.transform.resize_size == 52


def test_the_untrained_twin_shares_all_but_the_weights(tmp_path: Path) -> None:
    out = export_encoder(make_checkpoint(tmp_path / "step-1", SMALL), tmp_path / "out")
    trained, twin = load_encoder(f"panfm:{out}"), load_encoder(f"panfm:{out}@random:0")
    assert twin.transform == trained.transform and twin.pooling == trained.pooling
    assert twin.card.num_parameters == trained.card.num_parameters and twin.embed_dim == trained.embed_dim
    assert twin.hash != load_encoder(f"panfm:{out}@random:1").hash
    assert twin.card.contamination == "none" and twin.facts is None
    larger = load_encoder(f"panfm:{out}?image_size=96")
    assert (larger.transform.image_size, larger.transform.resize_size, larger.token_grid(96)) == (96, 104, (12, 12))


def test_a_run_gives_its_newest_whole_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_checkpoint(run / "checkpoints/step-00000009", SMALL, seed=9, step=9)
    make_checkpoint(run / "checkpoints/step-00000010", SMALL, seed=10, step=10)
    make_checkpoint(run / "checkpoints/step-00000011", SMALL, seed=11, step=11)
    (run / "checkpoints/step-00000011/manifest.json").unlink()
    make_checkpoint(run / "checkpoints/step-00000012.tmp", SMALL, seed=12, step=12)  # killed before it got its name
    out = export_encoder(run, tmp_path / "out")
    assert load_encoder(f"panfm:{out}").facts.step == 10  # type: ignore[union-attr]
    newer = make_checkpoint(tmp_path / "step-00000012", SMALL, seed=12, step=12)
    assert export_encoder(newer, out) == out  # replaces an earlier export
    assert load_encoder(f"panfm:{out}").facts.step == 12  # type: ignore[union-attr]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run", "step-00000012"]


def make_source(**more: object) -> SourceFacts:
    return SourceFacts(source="isic", licence="CC BY-NC 4.0", num_kept=9, num_excluded=0, data_hash="cd", **more)  # type: ignore[arg-type]


def test_an_export_for_a_use_that_a_source_does_not_permit_is_refused(tmp_path: Path) -> None:
    free = make_source(permitted_uses=("research", "education", "commercial"))
    bound = make_source(permitted_uses=("research", "education"))
    good = make_checkpoint(tmp_path / "good", SMALL, sources=(free,))
    out = export_encoder(good, tmp_path / "out", use="commercial")
    assert read_facts(out / "panfm.json").use == "commercial"
    readme = (out / "README.md").read_text()
    assert "exported for: commercial" in readme and "For research only" not in readme
    assert "It is not a medical device" in readme

    both = make_checkpoint(tmp_path / "both", SMALL, sources=(free, bound))
    with pytest.raises(UserError, match=r"isic \(licence CC BY-NC 4.0\), which does not permit the use commercial"):
        export_encoder(both, tmp_path / "refused", use="commercial")
    assert not (tmp_path / "refused").exists()
    assert read_facts(export_encoder(both, tmp_path / "default") / "panfm.json").use == "research"
    assert read_facts(export_encoder(both, tmp_path / "taught", use="education") / "panfm.json").use == "education"


def test_facts_of_before_uses_were_recorded_permit_the_trained_use_only(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "old", SMALL)
    values = json.loads((checkpoint / "encoder.json").read_text())
    values["format"] = 1
    del values["use"], values["sources"][0]["permitted_uses"]
    write_json(checkpoint / "encoder.json", values)
    entry = {"sha256": compute_file_sha256(checkpoint / "encoder.json"), "size": 0}
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    write_json(checkpoint / "manifest.json", {"files": manifest["files"] | {"encoder.json": entry}})
    out = export_encoder(checkpoint, tmp_path / "out")
    assert load_encoder(f"panfm:{out}").facts.use == "research"  # type: ignore[union-attr]
    with pytest.raises(UserError, match="it is not recorded what its terms permit besides research"):
        export_encoder(checkpoint, tmp_path / "out", use="commercial")


def test_the_terms_of_a_teacher_bind_its_pupil(tmp_path: Path) -> None:
    free = make_source(permitted_uses=("research", "commercial"))
    teacher = export_encoder(make_checkpoint(tmp_path / "step-1", SMALL), tmp_path / "teacher")  # research only
    config = {"objectives": [{"kind": "masked_image", "target": {"address": f"panfm:{teacher}?image_size=96"}}]}
    pupil = make_checkpoint(tmp_path / "step-2", SMALL, sources=(free,), config=config)
    with pytest.raises(UserError, match=r"learned from panfm:.*teacher.*ham10000"):
        export_encoder(pupil, tmp_path / "out", use="commercial")
    export_encoder(pupil, tmp_path / "out")
    shutil.rmtree(teacher)
    with pytest.raises(UserError, match="which is not there"):
        export_encoder(pupil, tmp_path / "out", use="commercial")
    for init, name in (
        ("timm:vit_tiny_patch16_224", "timm:vit_tiny_patch16_224"),
        ("/data/mae_vitb.pth", "mae_vitb.pth"),
    ):
        config = {"encoder": {"init": init}}
        other = make_checkpoint(tmp_path / f"from-{name}", SMALL, sources=(free,), config=config)
        readme = (export_encoder(other, tmp_path / "other", use="commercial") / "README.md").read_text()
        assert f"began from or learned from {name}, whose own terms bind it too" in readme


def test_what_cannot_be_exported_leaves_nothing_behind(tmp_path: Path) -> None:
    good = make_checkpoint(tmp_path / "good", SMALL)
    damaged = shutil.copytree(good, tmp_path / "damaged")
    data = bytearray((damaged / "encoder.safetensors").read_bytes())
    data[-5] ^= 1
    (damaged / "encoder.safetensors").write_bytes(data)
    torn = shutil.copytree(good, tmp_path / "torn")
    (torn / "manifest.json").unlink()
    (tmp_path / "begun/checkpoints/step-00000001").mkdir(parents=True)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("keep me")
    for checkpoint, out, message in (
        (damaged, tmp_path / "out", "so it is damaged; take another checkpoint"),
        (torn, tmp_path / "out", "no manifest.json, so it is no whole checkpoint"),
        (tmp_path / "begun", tmp_path / "out", r"no whole checkpoint in .* \(1 begun\)"),
        (tmp_path / "absent", tmp_path / "out", "no such folder; name a run"),
        (good, mine, "exists and is not an export"),
    ):
        with pytest.raises(UserError, match=message):
            export_encoder(checkpoint, out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["begun", "damaged", "good", "mine", "torn"]
    assert (mine / "notes.txt").read_text() == "keep me"
    with pytest.raises(UserError, match="a run or a checkpoint, not an export; run `panfm export"):
        load_encoder(f"panfm:{good}")


def test_a_changed_export_is_not_trusted(tmp_path: Path) -> None:
    out = export_encoder(make_checkpoint(tmp_path / "step-1", SMALL), tmp_path / "out")
    weights = load_file(out / "model.safetensors")
    weights["norm.bias"] += 1
    save_file(weights, out / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors: its hash is not the one in panfm\.json"):
        load_encoder(f"panfm:{out}")
    for change, message in (
        ({"format": 3}, "format is 3; this panfm reads formats 1 and 2"),
        ({"pooling": "max"}, "pooling .'max'.: Input should be 'cls', 'mean', 'cls_mean' or 'map'"),
        ({"colour": "red"}, "colour .'red'.: Extra inputs are not permitted"),
    ):
        facts = json.loads((out / "panfm.json").read_text())
        write_json(tmp_path / "out/panfm.json", {**facts, **change})
        with pytest.raises(UserError, match=message):
            load_encoder(f"panfm:{out}")
        write_json(tmp_path / "out/panfm.json", facts)
