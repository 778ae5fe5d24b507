"""What a hospital PC without a GPU can expect: one encoder, five ways to run it, on one core and on two.

    python benchmarks/inference.py [--quick] [--threads 1 2] [--json FILE]

    vit_small_patch16_224, vit_base_patch16_224, random weights
      PyTorch fp32 (the peer), bf16 autocast, compiled; ONNX fp32, int8 (`panfm export --to onnx`)
      -> images a second at batches of 32, milliseconds for a single image, peak memory of the process

Every way runs in a process of its own, so that its memory is its own; the processes take turns, one at a time, and
every number is the median over turns: other work on the machine meets all of them alike. Times are those of the
network on ready pixels: reading and resizing a photograph (some 10 ms) comes on top, and is the same for all.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rows import Row, write_rows

MODELS = {"ViT-S": "vit_small_patch16_224", "ViT-B": "vit_base_patch16_224"}
QUICK_MODELS = {"ViT-Ti": "vit_tiny_patch16_224"}
WAYS = ("torch_fp32", "torch_bf16", "torch_compiled", "onnx_fp32", "onnx_int8")
PEER = "torch_fp32"
BATCH = 32
SIZE = 224
TURNS = 5


def build_run(way: str, name: str, folder: Path, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """The function from uint8 images [B, 3, S, S] to features [B, D] of one way."""
    if way.startswith("onnx"):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        path = folder / ("model.onnx" if way == "onnx_fp32" else "model.int8.onnx")
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return lambda images: session.run(None, {"images": images})[0]
    import torch

    from panfm.encoder import load_encoder

    torch.set_num_threads(threads)
    encoder = load_encoder(f"timm:{name}@random:0{'?dtype=bf16' if way == 'torch_bf16' else ''}")
    if way == "torch_compiled":
        encoder.module.compile(dynamic=False)
    return lambda images: encoder.forward(torch.from_numpy(images)).numpy()


def read_peak_memory() -> float:
    """MiB that this process has held at most. Not ru_maxrss, which begins with what its parent held."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def work(way: str, name: str, folder: Path, threads: int) -> None:
    """The worker: load, warm up, then a measurement for every line on stdin, as JSON on stdout."""
    run = build_run(way, name, folder, threads)
    images = np.random.default_rng(0).integers(0, 256, (BATCH, 3, SIZE, SIZE), dtype=np.uint8)
    for batch in (images, images[:1]):
        run(batch)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        answer = {}
        for kind, batch in (("batch", images), ("single", images[:1])):
            repeats = int(line) if kind == "batch" else 4 * int(line)
            started = time.perf_counter()
            for _ in range(repeats):
                run(batch)
            answer[kind] = (time.perf_counter() - started) / repeats
        answer["memory"] = read_peak_memory()
        print(json.dumps(answer), flush=True)


def measure(name: str, folder: Path, threads: int, turns: int) -> dict[str, dict[str, float]]:
    """Median seconds a batch and an image, and MiB, of every way; the ways take turns."""
    workers = {
        way: subprocess.Popen(  # noqa: S603  this file itself
            [sys.executable, __file__, "--worker", way, name, str(folder), str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )
        for way in WAYS
    }  # fmt: skip
    answers: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    try:
        for way, worker in workers.items():
            assert worker.stdout is not None and worker.stdout.readline(), f"{way} did not start"
        for _ in range(turns):
            for way, worker in workers.items():
                assert worker.stdin is not None and worker.stdout is not None
                worker.stdin.write("1\n")
                worker.stdin.flush()
                answers[way].append(json.loads(worker.stdout.readline()))
    finally:
        for worker in workers.values():
            worker.communicate()
    return {
        way: {key: statistics.median(answer[key] for answer in found) for key in ("batch", "single", "memory")}
        for way, found in answers.items()
    }


def export(name: str, folder: Path) -> str:
    """Write both graphs; int8 is calibrated on smooth pictures, which cost the same as photographs."""
    import torch

    from panfm.encoder import load_encoder
    from panfm.encoder.onnx import export_onnx

    coarse = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (8, 3, 14, 14)).astype(np.float32))
    images = torch.nn.functional.interpolate(coarse, (SIZE, SIZE), mode="bilinear").to(torch.uint8).numpy()
    check = export_onnx(load_encoder(f"timm:{name}@random:0"), folder, images)
    return f"as ONNX it differs by {check.fp32_difference:.0e} from PyTorch"


def main() -> None:
    """Parse, export, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ViT-Ti, one core, one turn: within a minute")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="threads of one network")
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        way, name, folder, threads = arguments.worker
        work(way, name, Path(folder), int(threads))
        return
    rows: list[Row] = []
    turns = 1 if arguments.quick else TURNS
    for title, name in (QUICK_MODELS if arguments.quick else MODELS).items():
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "onnx"
            print(f"{title} ({name}, {SIZE} px): {export(name, folder)}", flush=True)
            for threads in [1] if arguments.quick else arguments.threads:
                found = measure(name, folder, threads, turns)
                print(f"  {threads} thread{'s' if threads > 1 else ''}: images/s | ratio | ms an image | peak MiB")
                for way, values in found.items():
                    ratio = found[PEER]["batch"] / values["batch"]
                    speed = BATCH / values["batch"]
                    single, memory = 1000 * values["single"], values["memory"]
                    print(f"    {way:15} {speed:8.1f} {ratio:6.2f} {single:9.1f} {memory:9.0f}", flush=True)
                    rows += [
                        Row(f"{title} {threads}t {way}", speed, BATCH / found[PEER]["batch"], ratio, "images/s"),
                        Row(
                            f"{title} {threads}t {way} single", single,
                            1000 * found[PEER]["single"], found[PEER]["single"] / values["single"], "ms",
                        ),
                        Row(
                            f"{title} {threads}t {way} memory", memory, found[PEER]["memory"],
                            found[PEER]["memory"] / memory, "MiB",
                        ),
                    ]  # fmt: skip
    write_rows(arguments.json, rows)


if __name__ == "__main__":
    main()
