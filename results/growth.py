"""How `--stage slm` grows: tokens per second and peak memory as one size at a time grows.

bench.py calls `measure`. Each point is a process of its own, since peak memory is a process's.
"""

import contextlib
import hashlib
import io
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

GROWTH = {  # one at a time, the others as their first; corpus in tokens
    "width": [128, 256, 512, 1024],
    "context": [128, 256, 512, 1024],
    "vocabulary": [1024, 8192, 50304, 131072],
    "corpus": [10**6, 10**7, 10**8, 10**9],
}
QUICK = {"width": [32], "context": [32], "vocabulary": [300], "corpus": [5000]}
STEPS = 8
STEP_TOKENS = 2048


def write_zeros(path, size):
    """A file of `size` zeros, which takes no space on disk; returns its sha256."""
    with open(path, "wb") as file:
        file.truncate(size)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def write_data(folder, sizes):
    """A data folder of zeros, as prepare_data.py would leave it."""
    dtype = np.dtype("<u4")
    held_out = 2 * sizes["context"]
    tokens = {"train": sizes["corpus"], "ref": held_out, "val": held_out, "val_corpus": held_out}
    files = {}
    for split, n in tokens.items():
        files[f"{split}.bin"] = write_zeros(folder / f"{split}.bin", n * dtype.itemsize)
    meta = {
        "tokenizer": {"name": "none", "n_vocab": sizes["vocabulary"], "eot": 0},
        "dtype": dtype.name,
        "tokens": tokens,
        "files": files,
    }
    (folder / "meta.json").write_text(json.dumps(meta))


def train(folder, sizes):
    """In a process of its own: what STEPS steps of `--stage slm` took, as a line of JSON."""
    import resource

    import rho

    windows = max(1, STEP_TOKENS // sizes["context"])
    cfg = rho.Config(
        data=str(folder),
        out=str(folder / "out"),
        n_layer=4,
        n_embd=sizes["width"],
        n_inner=3 * sizes["width"],
        block_size=sizes["context"],
        batch_size=windows,
        micro_batch=windows,
        tokens=STEPS * STEP_TOKENS,
        ref_tokens=STEP_TOKENS,
        evals=1,
        eval_windows=1,
        questions=0,
    )
    process = rho.Process(cfg)
    with contextlib.redirect_stdout(io.StringIO()):
        rho.train_arm(cfg, process, "ref")
        records = rho.train_arm(cfg, process, "slm")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
    speed = records[-1]["tokens"] / records[-1]["seconds"]
    print(json.dumps({"tokens_per_s": round(speed), "gib": peak / 2**20}))


def measure(quick=False):
    """Yield a record {"axis": which size grows, the sizes, tokens_per_s, gib} for each point."""
    axes = QUICK if quick else GROWTH
    first = {axis: values[0] for axis, values in axes.items()}
    for axis, values in axes.items():
        for value in values:
            sizes = {**first, axis: value}
            with tempfile.TemporaryDirectory() as folder:
                write_data(Path(folder), sizes)
                command = [sys.executable, __file__, folder, json.dumps(sizes)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            *_, last_line = done.stdout.splitlines()
            yield {"axis": axis, **sizes, **json.loads(last_line)}
        if quick:
            return  # one point shows that it runs


if __name__ == "__main__":
    train(Path(sys.argv[1]), json.loads(sys.argv[2]))
