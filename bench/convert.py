"""Conversion of a checkpoint: seconds a GiB, and memory beyond the maps of the files themselves.

The source has the published 7B's shape and is empty: files of zeros that take no disk. What is
written takes some: twice 13 GiB at a time. Where there is less room, the model has fewer layers.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

from common import parser, report

from openchameleon.checkpoints.checkpoint import shapes_of, vq_shapes_of
from openchameleon.checkpoints.convert import Layout, convert
from openchameleon.checkpoints.hf import TOKENIZER
from openchameleon.config import to_dict
from openchameleon.model.config import PRESETS as SHAPES
from openchameleon.model.config import ModelConfig
from openchameleon.model_folder import FolderConfig
from openchameleon.vocab import Vocab
from openchameleon.vqgan.config import PRESETS as VQ_SHAPES


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--folder", type=Path, help="where there is room (else a temporary one)")
    args = arguments.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        root = Path(name)
        shape = SHAPES["7b"]
        if args.quick:
            shape = ModelConfig(256, 2, 4, 4, shape.vocab_size, 256, 512)
        elif (room := shutil.disk_usage(root).free >> 30) < 36:
            shape = replace(shape, n_layers=max(1, room - 8))  # a layer takes twice 0.4 GiB
        write_empty(root / "native", shape)
        measure(root / "native", root / "verified", "hf", shape, args.out, verify=True)
        shutil.rmtree(root / "verified")
        for layout in ("hf", "meta"):
            measure(root / "native", root / layout, layout, shape, args.out)
            measure(root / layout, root / "back", "native", shape, args.out)
            shutil.rmtree(root / layout)
            shutil.rmtree(root / "back")


def measure(
    source: Path,
    target: Path,
    to: Layout,
    shape: ModelConfig,
    out: Path | None,
    verify: bool = False,
) -> None:
    """Converts and reports; the manifest's sums and the sync to the disk are in the time."""
    before, done = own_kib(), threading.Event()
    peak = before

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, own_kib())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    start, cpu = time.perf_counter(), time.process_time()
    manifest = convert(source, target, to, allow_pickle=True, verify=verify)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    done.set()
    watcher.join()
    gib = sum(file["bytes"] for file in manifest["files"].values()) / 2**30
    largest = max(2 * a * b for a, b in (s for s in shapes_of(shape).values() if len(s) == 2))
    report(
        f"convert/{source.name}_to_{to}" + "_verified" * verify,
        out,
        {
            "gib": round(gib, 3), "layers": shape.n_layers, "source": "zeros",
            "largest_tensor_gib": largest / 2**30,
        },
        dtype="bfloat16",
        seconds_per_gib=seconds / gib,
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        own_memory_gib=(peak - before) / 2**20,
    )  # fmt: skip


def own_kib() -> int:
    """Memory of this process that is no page of a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def write_empty(folder: Path, shape: ModelConfig) -> None:
    """A native folder of bfloat16 zeros, in sparse files."""
    vq = VQ_SHAPES["published"]
    (folder / "image_tokenizer").mkdir(parents=True)
    config = FolderConfig("empty", Vocab.published(), shape, text_tokenizer=TOKENIZER)
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    (folder / "image_tokenizer/config.json").write_text(json.dumps(to_dict(vq)))
    (folder / TOKENIZER).write_text('{"model": {"vocab": {}}}')
    sparse(folder / "model.safetensors", shapes_of(shape))
    sparse(folder / "image_tokenizer/model.safetensors", vq_shapes_of(vq))


def sparse(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file whose tensors are holes."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start = end
        for n in (*shape, 2):
            end = start + (end - start or 1) * n
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


if __name__ == "__main__":
    main()
