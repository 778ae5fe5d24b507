"""An encoder for a computer without torch: one ONNX graph from pixels to the feature, checked against PyTorch.

    Encoder  --export_onnx-->  DIR/ {model.onnx, model.int8.onnx if there are images to calibrate on, panfm_onnx.json}

The graph takes uint8 images [B, 3, S, S] as the evaluation transform delivers them, any B, and gives float32 [B, D]:
normalisation is inside, so that nobody can forget it. `panfm_onnx.json` is written last and holds the rest of the
transform, the hashes, and what the check found. int8 is static quantisation of the matrix products (weights by channel,
activations by range over the calibration images); all else stays in fp32.
"""

import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from panfm import __version__
from panfm.encoder.load import Encoder
from panfm.errors import UserError
from panfm.files import compute_file_sha256, write_json

FORMAT = 1
FP32, INT8, FACTS = "model.onnx", "model.int8.onnx", "panfm_onnx.json"
MAX_DIFFERENCE = 1e-4  # of a feature, relative to the largest: fp32 against PyTorch
MAX_BATCH = 1024  # images at once that the graph is exported for
CHECK_BATCH = 32
RESEARCH = "For research only. Not a medical device; gives no diagnosis."

Images = NDArray[np.uint8]  # [N, 3, S, S]


@dataclass(frozen=True)
class OnnxCheck:
    """What the graphs were found to compute, on the images that they were checked with.

    fp32_difference: largest difference to PyTorch relative to the largest feature. int8_cosine: mean and lowest cosine
    of a quantised feature with PyTorch's, both less PyTorch's mean over the images; None without int8.
    """

    num_images: int
    images: str  # "random", or what was given
    fp32_difference: float
    int8_cosine_mean: float | None = None
    int8_cosine_min: float | None = None


def export_onnx(encoder: Encoder, out: Path, images: Images | None = None) -> OnnxCheck:
    """Write the encoder as ONNX into the folder `out` (new, or an earlier export of this kind) and check it.

    images: uint8 [N, 3, S, S] as the encoder's transform delivers them, to calibrate int8 on (the first half) and to
    check with (all); None exports fp32 only and checks it on random pixels.

    Raises UserError where the extra `onnx` is not installed, for a folder with other things in it, for an encoder that
    cannot be exported, and where the graph computes something else than PyTorch.
    """
    _check_installed()
    out = Path(out)
    if out.exists() and not (out / FACTS).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is no ONNX export; name a new or empty folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{out.name}.tmp-", dir=out.parent))
    try:
        _write_graph(encoder, temporary / FP32)
        if images is not None:
            _quantise(temporary / FP32, temporary / INT8, images[: max(1, len(images) // 2)])
        check = check_onnx(encoder, temporary, images)
        if check.fp32_difference > MAX_DIFFERENCE:
            raise UserError(
                f"{encoder.address}: as ONNX it differs from PyTorch by {check.fp32_difference:.1e} (at most "
                f"{MAX_DIFFERENCE:g} is tolerated); it is not written"
            )
        write_json(temporary / FACTS, _describe(encoder, temporary, check))
        temporary.chmod(0o755)
        if out.exists():
            shutil.rmtree(out)
        temporary.replace(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return check


def check_onnx(encoder: Encoder, folder: Path, images: Images | None = None) -> OnnxCheck:
    """Compare the graphs of a folder with PyTorch on images uint8 [N, 3, S, S], or on random pixels."""
    size = encoder.image_size
    random = np.random.default_rng(0).integers(0, 256, (3, 3, size, size), dtype=np.uint8)
    given = random if images is None else images
    batches = [given[start : start + CHECK_BATCH] for start in range(0, len(given), CHECK_BATCH)]
    expected = np.concatenate([encoder.forward(torch.from_numpy(batch)).cpu().numpy() for batch in batches])
    found = run_onnx(folder / FP32, given)
    difference = float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-12))
    kind = "random" if images is None else "given"
    if not (folder / INT8).is_file():
        return OnnxCheck(len(given), kind, difference)
    quantised = run_onnx(folder / INT8, given)
    centre = expected.mean(0)  # what all images share would make any two features look alike
    cosine = np.sum((quantised - centre) * (expected - centre), axis=1) / (
        np.linalg.norm(quantised - centre, axis=1) * np.linalg.norm(expected - centre, axis=1)
    )
    return OnnxCheck(len(given), kind, difference, float(cosine.mean()), float(cosine.min()))


def run_onnx(path: Path, images: Images, threads: int = 0) -> NDArray[np.float32]:
    """Run a graph on images uint8 [N, 3, S, S] -> features [N, D]. threads: 0 = as many as there are cores."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    batches = [images[start : start + CHECK_BATCH] for start in range(0, len(images), CHECK_BATCH)]
    return np.concatenate([session.run(None, {"images": batch})[0] for batch in batches])


class _Graph(nn.Module):
    """Pixels to feature: the encoder's normalisation before its network."""

    mean: Tensor  # [1, 3, 1, 1], of pixels in 0..255
    std: Tensor

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.network = encoder.module
        self.register_buffer("mean", 255 * torch.tensor(encoder.transform.mean).view(1, 3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(encoder.transform.std).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        feature: Tensor = self.network((images.float() - self.mean) / self.std)
        return feature


def _write_graph(encoder: Encoder, path: Path) -> None:
    if encoder.dtype != "fp32" or encoder.device.type != "cpu":
        raise UserError(f"{encoder.address}: ONNX is exported in fp32 from the CPU; leave out ?dtype=")
    size = encoder.image_size
    example = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    with _quiet():
        try:
            program: Any = torch.onnx.export(
                _Graph(encoder).eval(),
                (example,),
                dynamo=True,
                dynamic_shapes=({0: batch},),
                input_names=["images"],
                output_names=["features"],
                external_data=False,
                verbose=False,
            )
        except Exception as error:
            line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(f"{encoder.address}: torch cannot export it to ONNX: {line}") from error
        program.save(str(path))


def _quantise(source: Path, out: Path, images: Images) -> None:
    """Static int8 of the matrix products, calibrated on the images."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rest: Iterator[Images] = (images[start : start + 8] for start in range(0, len(images), 8))

        def get_next(self) -> dict[str, Images] | None:
            batch = next(self.rest, None)
            return None if batch is None else {"images": batch}

    with tempfile.TemporaryDirectory(dir=out.parent) as folder, _quiet():
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(out),
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["MatMul", "Gemm", "Conv"],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )


def _describe(encoder: Encoder, folder: Path, check: OnnxCheck) -> dict[str, Any]:
    """The content of panfm_onnx.json: all that a reader without panfm needs to know."""
    facts = encoder.facts
    return {
        "format": FORMAT,
        "panfm_version": __version__,
        "name": encoder.name,
        "encoder_hash": encoder.hash,
        "image_size": encoder.image_size,
        "embed_dim": encoder.embed_dim,
        "pooling": encoder.pooling,
        "transform": encoder.transform.to_plain(),
        "licences": None if facts is None else sorted({source.licence for source in facts.sources}),
        "use": None if facts is None else facts.use,
        "warning": RESEARCH,
        "files": {name: compute_file_sha256(folder / name) for name in (FP32, INT8) if (folder / name).is_file()},
        "check": asdict(check),
    }


def _check_installed() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"export to ONNX needs {error.name}; run `pip install 'panfm[onnx]'`") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' progress and advice: they speak to developers of exporters."""
    import logging

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
