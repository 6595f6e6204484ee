"""A place in which commands are run and disturbed, and how two of their ends compare.

faults.py uses it. The commands are the real scripts with the real signals, in forks of this
process: so a kill falls into their work, and not into two seconds of imports. Linux only.
"""

import json
import multiprocessing
import os
import re
import resource
import runpy
import shutil
import signal
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

# torch and pyarrow import these two when they need them: here it is once for all forks.
import numpy as np
import pandas  # noqa: F401
import torch
import torch._dynamo  # noqa: F401
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from model import load_checkpoint  # noqa: E402
from prepare_data import get_tokenizer, load_meta, prepare_demo  # noqa: E402

SEED = 1337
TINY = (
    "--data data --out out --device cpu --n_layer 1 --n_head 2 --n_kv_head 1 --n_embd 16 "
    "--n_inner 32 --block_size 64 --batch_size 4 --micro_batch 4 --eval_windows 2 --questions 4 "
)
# A checkpoint every 30 ms, besides those of the evaluations.
TRAIN = TINY + "--tokens 8000 --ref_tokens 6000 --evals 3 --save_minutes 0.0005 "
PREPARE = "--reference text/ref.jsonl --corpus text/train.jsonl --questions text/questions.jsonl "
PREPARE += "--tokenizer data/meta.json --val_docs 20 --out mine "


@dataclass(frozen=True)
class Job:
    """A command, as one would type it in the place where it runs."""

    script: str
    flags: str

    def __str__(self):
        return f"{self.script} {self.flags.replace(TINY, '')[:50]}"


# What is killed and disturbed. Where they start there are runs and scores of other names and
# shapes, and data of another seed in the folder that is written.
JOBS = {
    "prepare": Job("prepare_data.py", PREPARE),
    "score": Job("rho.py", TINY + "--stage score --tokens 24000 --micro_batch 2 --block_size 32"),
    "clm": Job("rho.py", TRAIN + "--stage clm --name cut"),
    "slm": Job("rho.py", TRAIN + "--stage slm --name cut --block_size 32"),
    "eval": Job("eval_math.py", "--ckpt out/ref.pt --data data --batch_size 8 --device cpu"),
}


def tell_of_handlers(ready):
    """Signals as a terminal's shell leaves them; the file READY once the script handles SIGTERM."""
    install = signal.signal
    install(signal.SIGINT, signal.default_int_handler)
    install(signal.SIGTERM, signal.SIG_DFL)

    def install_and_tell(number, handler):
        if handler in (signal.default_int_handler, signal.SIG_DFL):
            handler = signal.SIG_IGN  # the script is done: what comes now comes too late
        before = install(number, handler)
        if number == signal.SIGTERM:
            ready.touch()
        return before

    signal.signal = install_and_tell


def run_script(job, place, said, ready, limit):
    """What the forked process does: the script, as `python SCRIPT FLAGS` would run it."""
    tell_of_handlers(ready)
    # The lock of tqdm is shared among forks, and a killed one would never release it.
    tqdm.set_lock(threading.RLock())
    torch.set_num_threads(1)
    os.chdir(place)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = open(said, "w", buffering=1)  # noqa: SIM115
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    script = ROOT / job.script
    sys.path.insert(0, str(script.parent))
    sys.argv = [job.script, *job.flags.split()]
    try:
        runpy.run_module(script.stem, run_name="__main__", alter_sys=True)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


class Running:
    """A command that has been started in a place."""

    def __init__(self, job, place, limit=None):
        number, said = tempfile.mkstemp(dir=place.parent)
        os.close(number)
        self.said = Path(said)
        self.ready = Path(said + ".ready")
        fork = multiprocessing.get_context("fork")
        arguments = (job, place, self.said, self.ready, limit)
        self.process = fork.Process(target=run_script, args=arguments)
        self.process.start()

    def end(self, after=None, number=signal.SIGKILL):
        """(status, stderr), once it has ended; it gets a signal `after` so many seconds.

        SIGINT and SIGTERM wait for the script's handler: before, they would meet Python's own.
        """
        self.process.join(after)
        if number != signal.SIGKILL:
            while self.process.is_alive() and not self.ready.exists():
                time.sleep(0.001)
        if self.process.is_alive():
            os.kill(self.process.pid, number)
        self.process.join(120)
        said = self.said.read_text()
        self.said.unlink()
        self.ready.unlink(missing_ok=True)
        return self.process.exitcode, said


def one_line(said):
    """The only line that a command wrote to stderr, bars of progress apart; "" if not one."""
    without_bars = re.sub(r"[^\r\n]*\[\d\d:\d\d[^\]\r\n]*\]", "", said)
    lines = [line.strip() for line in without_bars.splitlines() if line.strip()]
    if len(lines) != 1 or "Traceback" in said:
        return ""
    return lines[0]


def last_line(said):
    """What a traceback ends with."""
    return "".join(said.strip().splitlines()[-1:])


UNEQUAL = ("seconds", "eval_seconds", "commit")  # may differ between two equal runs


def text_of(value):
    """A checkpoint or log as text: equal texts, equal bits."""
    if isinstance(value, dict):
        return str({k: text_of(inner) for k, inner in value.items() if k not in UNEQUAL})
    if isinstance(value, list):
        return str([text_of(inner) for inner in value])
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {sha256(value.numpy().tobytes()).hexdigest()}"
    return repr(value)


def content(path):
    """A file as text, whatever may differ between two equal runs left out."""
    try:
        if path.suffix == ".pt":
            return text_of(load_checkpoint(path))
        if path.suffix == ".jsonl":
            return text_of([json.loads(line) for line in path.read_text().splitlines()])
    except ValueError:
        pass  # damaged or half-written: like no whole file
    return sha256(path.read_bytes()).hexdigest()


def contents(place, but=""):
    """{file: what is in it} of all files in a place."""
    found = {}
    for path in sorted(place.rglob("*")):
        name = str(path.relative_to(place))
        if path.is_file() and name != but:
            found[name] = content(path)
    return found


class Ground:
    """What the commands start from: text, tiny data, a reference, data of an earlier run."""

    def __init__(self, folder):
        self.base = Path(folder, "base")
        self.place = Path(folder, "place")
        self.ends = {}
        text = self.base / "text"
        text.mkdir(parents=True)
        prepare_demo(self.base / "data", SEED, n_ref=300, n_train=24_000, vocab=300)
        encoding = get_tokenizer(load_meta(self.base / "data")["tokenizer"])
        questions = (self.base / "data/questions.jsonl").read_text().splitlines()
        (text / "questions.jsonl").write_text("\n".join(questions[:20]))
        for split in ("ref", "train"):
            tokens = np.fromfile(self.base / f"data/{split}.bin", np.uint16)
            documents = encoding.decode(tokens).split("<|endoftext|>")[1:]
            rows = [json.dumps({"text": document}) for document in documents]
            (text / f"{split}.jsonl").write_text("\n".join(rows))
        self.add(Job("prepare_data.py", PREPARE + "--seed 1"))
        for stage in ("ref", "clm", "slm"):
            self.add(Job("rho.py", TRAIN + f"--stage {stage}"))

    def add(self, job, folder=None):
        """Run a command that has to succeed; without a folder, where all others start."""
        status, said = Running(job, folder or self.base).end()
        if status:
            raise RuntimeError(f"{job}: {said}")

    def fresh(self):
        """A new copy of where all commands start."""
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self.base, self.place)
        return self.place

    def undisturbed(self, job):
        """(contents at the end, seconds) of a run that nothing happens to."""
        if job not in self.ends:
            place = self.fresh()
            start = time.time()
            self.add(job, place)
            seconds = time.time() - start
            self.ends[job] = contents(place), seconds
        return self.ends[job]

    def largest(self, folder):
        """Bytes of the largest file there."""
        return max(path.stat().st_size for path in (self.base / folder).rglob("*"))
