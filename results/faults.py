"""Kills, hostile inputs, damaged files, full disks, two writers, long runs: what they do to us.

    python results/faults.py                 all parts; about half an hour, 20 minutes for memory
    python results/faults.py --part fuzz     one of kills, fuzz, damage, full_disk, writers, memory
    python results/faults.py --quick         a few of each, in seconds; writes nothing

Each part ends as a row of results/faults.jsonl: what was tried, what was right, and in `failed`,
in words, what was not. Everything happens in a temporary folder, with tiny models, one thread and
a seed. The commands are the real scripts with the real signals, in forks of this process: so a
kill falls into their work, and not into two seconds of imports. Linux only.
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch._dynamo  # noqa: E402, F401  (torch imports it late: here it is once for all forks)
from tqdm import tqdm  # noqa: E402

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]

import hostile  # noqa: E402

import eval_math  # noqa: E402, F401
import rho  # noqa: E402, F401
from model import load_checkpoint  # noqa: E402
from prepare_data import get_tokenizer, load_meta, prepare_demo  # noqa: E402

SEED = 1337
TINY = (
    "--data data --out out --device cpu --n_layer 1 --n_head 2 --n_kv_head 1 --n_embd 16 "
    "--n_inner 32 --block_size 64 --batch_size 4 --micro_batch 4 --eval_windows 2 --questions 4 "
)
# A checkpoint every 30 ms, besides those of the evaluations.
TRAIN = TINY + "--tokens 16000 --ref_tokens 8000 --evals 4 --save_minutes 0.0005 "
PREPARE = "--reference text/ref.jsonl --corpus text/train.jsonl --questions text/questions.jsonl "
PREPARE += "--tokenizer data/meta.json --val_docs 20 --out mine "


# ---- running a command, and comparing how two runs ended ----------------------------------------


@dataclass
class Job:
    """A command, as one would type it in the place."""

    script: str
    flags: str

    @property
    def name(self):
        return f"{Path(self.script).name} {self.flags.replace(TINY, '')[:60]}"


KILLED = {
    "prepare": Job("prepare_data.py", PREPARE),
    "score": Job("rho.py", TINY + "--stage score --tokens 24000 --micro_batch 1"),
    "clm": Job("rho.py", TRAIN + "--stage clm"),
    "slm": Job("rho.py", TRAIN + "--stage slm"),
    "eval": Job("eval_math.py", "--ckpt out/ref.pt --data data --batch_size 8 --device cpu"),
}


def run_script(job, place, said, limit):
    """What the forked process does: the script, as `python SCRIPT FLAGS` would run it."""
    # The lock of tqdm is shared among forks, and a killed one would never release it.
    tqdm.set_lock(threading.RLock())
    torch.set_num_threads(1)
    os.chdir(place)
    sys.stdout = Path(os.devnull).open("w")
    sys.stderr = Path(said).open("w", buffering=1)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    script = str(ROOT / job.script)
    sys.argv = [script, *job.flags.split()]
    runpy.run_path(script, run_name="__main__")


class Running:
    """A command that has been started in a place."""

    def __init__(self, job, place, limit=None):
        number, self.said_path = tempfile.mkstemp(dir=place.parent)
        os.close(number)
        fork = multiprocessing.get_context("fork")
        arguments = (job, place, self.said_path, limit)
        self.process = fork.Process(target=run_script, args=arguments)
        self.process.start()

    def end(self, after=None, number=signal.SIGKILL):
        """(status, stderr), once it has ended; it gets a signal `after` so many seconds."""
        self.process.join(after)
        if self.process.is_alive():
            os.kill(self.process.pid, number)
        self.process.join(120)
        said = Path(self.said_path).read_text()
        os.unlink(self.said_path)
        return self.process.exitcode, said


def run(job, place, **how):
    return Running(job, place, **how).end()


def one_line(said):
    """The only line that a command wrote to stderr, bars of progress apart; "" if not one."""
    without_bars = re.sub(r"[^\r\n]*\[\d\d:\d\d[^\]\r\n]*\]", "", said)
    lines = [line.strip() for line in without_bars.splitlines() if line.strip()]
    if len(lines) != 1 or "Traceback" in said:
        return ""
    return lines[0]


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
    if path.suffix == ".pt":
        return text_of(load_checkpoint(path))
    if path.suffix == ".jsonl":
        return text_of([json.loads(line) for line in path.read_text().splitlines()])
    return sha256(path.read_bytes()).hexdigest()


def contents(place, but=""):
    """{file: what is in it} of all files in a place. What is half-written cannot be read."""
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
        text = self.base / "text"
        text.mkdir(parents=True)
        prepare_demo(self.base / "data", SEED, n_ref=300, n_train=24_000, vocab=300)
        encoding = get_tokenizer(load_meta(self.base / "data")["tokenizer"])
        shutil.copy(self.base / "data/questions.jsonl", text)
        for split in ("ref", "train"):
            tokens = np.fromfile(self.base / f"data/{split}.bin", np.uint16)
            documents = encoding.decode(tokens).split("<|endoftext|>")[1:]
            rows = [json.dumps({"text": document}) for document in documents]
            (text / f"{split}.jsonl").write_text("\n".join(rows))
        # Written here, it would name the temporary folder.
        self.make(Job("prepare_data.py", PREPARE + "--seed 1"))
        self.make(Job("rho.py", TRAIN + "--stage ref"))

    def make(self, job):
        status, said = run(job, self.base)
        if status:
            raise RuntimeError(f"{job.name}: {said}")

    def fresh(self):
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self.base, self.place)
        return self.place

    def undisturbed(self, job):
        """(contents at the end, seconds) of a run that nothing happens to."""
        place = self.fresh()
        start = time.time()
        status, said = run(job, place)
        seconds = time.time() - start
        if status:
            raise RuntimeError(f"{job.name}: {said}")
        return contents(place), seconds


# ---- kills ---------------------------------------------------------------------------------------


def kills(ground, rng, quick, jobs=KILLED):
    """kill -9 at random moments, up to three in a row; then the same command runs to its end."""
    row = Counter(kills=0, ends=0, bit_identical=0, signals=0, one_line_and_resumed=0)
    failed = []
    for job in jobs.values():
        wanted, seconds = ground.undisturbed(job)
        n_kills = 0
        while n_kills < (1 if quick else 20):
            place = ground.fresh()
            for _ in range(rng.randint(1, 3)):
                status, _ = Running(job, place).end(rng.uniform(0, seconds))
                n_kills += status == -signal.SIGKILL
            row["ends"] += 1
            if ends_as(wanted, job, place):
                row["bit_identical"] += 1
            else:
                failed.append(f"after kill -9: {job.name}")
        row["kills"] += n_kills
        for number in [signal.SIGINT, signal.SIGTERM] * (0 if quick else 3):
            polite_end(ground, job, number, rng.uniform(0.4, 0.9) * seconds, wanted, row, failed)
    return dict(row), failed


def ends_as(wanted, job, place):
    """Whether the command runs to its end, and leaves what the undisturbed run left."""
    status, _ = run(job, place)
    return status == 0 and contents(place) == wanted


def polite_end(ground, job, number, after, wanted, row, failed):
    """Ctrl-C or SIGTERM: one line, status 128 + its number, and the same command resumes."""
    place = ground.fresh()
    status, said = Running(job, place).end(after, number)
    if status == 0:
        return  # it had ended before
    row["signals"] += 1
    in_one_line = status == 128 + number and one_line(said)
    if ends_as(wanted, job, place) and in_one_line:
        row["one_line_and_resumed"] += 1
    else:
        failed.append(f"{number.name}: {job.name}: status {status}, {said[-200:]!r}")


# ---- hostile inputs ------------------------------------------------------------------------------


def fuzz(ground, rng, quick):
    """100,000 calls of the public functions, see hostile.py."""
    return hostile.fuzz(ground.fresh(), rng, 0.02 if quick else 1)


# ---- damaged files -------------------------------------------------------------------------------

AGAIN = TINY + "--tokens 2000 --evals 2 --name again "


def reader_of(name):
    """(a command that reads this file of data or out, or None; whether the file has a checksum)."""
    path = Path(name)
    if path.parts[0] == "data":
        return Job("rho.py", AGAIN + "--stage clm"), True
    if path.parts[0] != "out":
        return None, False
    if path.suffix == ".npy":
        return Job("results/tokens_page.py", "out"), False
    if path.suffix == ".jsonl":
        return Job("rho.py", TINY + "--stage table"), False
    if path.name == "clm.pt":
        return KILLED["clm"], True
    if path.name == "slm.pt":
        return Job("eval_math.py", "--ckpt out/slm.pt --data data --n 5 --device cpu"), True
    return Job("rho.py", AGAIN + "--stage slm"), True


def damage(ground, rng, quick):
    """Each file of data and out cut short, emptied, with a bit flipped, and as garbage.

    Either one line with status 2 names the file, or the damage does not matter: the command ends
    as without it. Logs and stored losses have no checksum: there it is enough that it ends.
    """
    for stage in ("clm", "slm"):
        ground.make(KILLED[stage])
    row = Counter(damaged=0, refused_in_one_line=0, ran_right=0)
    failed = []
    ends = {}
    for name in sorted(contents(ground.base)):
        job, has_checksum = reader_of(name)
        if job is None or (quick and rng.random() < 0.8):
            continue
        if job.name not in ends:
            ends[job.name], _ = ground.undisturbed(job)
        whole = (ground.base / name).read_bytes()
        for how, damaged in ways_to_damage(rng, whole).items():
            place = ground.fresh()
            (place / name).write_bytes(damaged)
            status, said = run(job, place)
            row["damaged"] += 1
            # A score file's line names the scores, not the file of their checksum.
            if status == 2 and Path(name).name.removesuffix(".sha256") in one_line(said):
                row["refused_in_one_line"] += 1
            elif status == 0 and (not has_checksum or same_but(name, place, ends[job.name])):
                row["ran_right"] += 1
            else:
                failed.append(f"{name} {how}: {job.name}: status {status}, {said[-200:]!r}")
    return dict(row), failed


def ways_to_damage(rng, whole):
    flipped = bytearray(whole)
    flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
    return {
        "cut short": whole[: rng.randrange(1, len(whole))],
        "emptied": b"",
        "with a bit flipped": bytes(flipped),
        "garbage": rng.randbytes(len(whole)),
    }


def same_but(name, place, wanted):
    others = {file: what for file, what in wanted.items() if file != name}
    return contents(place, but=name) == others


# ---- full disks ----------------------------------------------------------------------------------


def full_disk(ground, rng, quick):
    """Files cannot grow beyond a limit, as on a full disk: one line that names what was written,
    old files as they were, nothing half-written, and with room again it ends as undisturbed."""
    row = Counter(full=0, one_line=0, old_files_intact=0, ends_right=0)
    failed = []
    jobs = {**KILLED, "restart": Job("rho.py", TRAIN + "--stage ref --restart")}
    for job in jobs.values():
        wanted, _ = ground.undisturbed(job)
        before = contents(ground.base)
        written = [name for name in wanted if wanted[name] != before.get(name)]
        largest = max((ground.place / name).stat().st_size for name in written or ["out/ref.pt"])
        for _ in range(1 if quick else 5):
            place = ground.fresh()
            status, said = run(job, place, limit=int(rng.uniform(0.05, 0.95) * largest))
            if status == 0:
                continue  # no file of this size was written
            left = {path.name for path in place.rglob("*.tmp")}
            after = contents(place)
            row["full"] += 1
            named = status == 2 and re.search("out|mine", one_line(said)) is not None
            intact = not left and all(after.get(name) == before[name] for name in before)
            right = ends_as(wanted, job, place)
            row["one_line"] += named
            row["old_files_intact"] += intact
            row["ends_right"] += right
            if not (named and intact and right):
                failed.append(f"{job.name}: {named, intact, right}, {status}, {said[-200:]!r}")
    return dict(row), failed


# ---- two writers ---------------------------------------------------------------------------------


def writers(ground, rng, quick):
    """Two commands started together: one of them refuses, or both end with the same bytes."""
    row = Counter(pairs=0, one_refused_one_right=0, score_pairs=0, score_pairs_same_bytes=0)
    failed = []
    for name in ("clm", "slm", "prepare", "score"):
        job = KILLED[name]
        wanted, _ = ground.undisturbed(job)
        for _ in range(1 if quick else 6):
            place = ground.fresh()
            pair = [Running(job, place), Running(job, place)]
            ends = sorted(one.end() for one in pair)
            statuses = [status for status, _ in ends]
            same = contents(place) == wanted
            if name == "score":
                right = statuses == [0, 0] and same
                row["score_pairs"] += 1
                row["score_pairs_same_bytes"] += right
            else:
                right = statuses == [0, 2] and one_line(ends[1][1]) != "" and same
                row["pairs"] += 1
                row["one_refused_one_right"] += right
            if not right:
                failed.append(f"{job.name}: {ends}, the same at the end: {same}")
    return dict(row), failed


# ---- memory --------------------------------------------------------------------------------------


def anonymous_mb(pid):
    """Memory of its own: without files that are mapped, which the kernel can drop."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(re.search(r"^Anonymous: +(\d+) kB", rollup, re.MULTILINE)[1]) / 1024


def memory(ground, rng, quick):
    """A long run with an evaluation each thousand steps: is its memory flat from a tenth on?"""
    length = 4 if quick else 20 * 60
    place = ground.fresh()
    long = TINY + "--stage slm --tokens 1e9 --evals 4000 --save_minutes 0.5 "
    command = [sys.executable, str(ROOT / "rho.py"), *long.split()]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=place, **quiet)
    start = time.time()
    hours, sizes = [], []
    while time.time() < start + length and process.poll() is None:
        time.sleep(length / 240)
        if time.time() > start + max(length / 10, 3):
            hours.append((time.time() - start) / 3600)
            sizes.append(anonymous_mb(process.pid))
    process.terminate()
    status = process.wait()
    mean = sum(sizes) / len(sizes)
    row = {
        "minutes": length / 60,
        "samples": len(sizes),
        "steps": load_checkpoint(place / "out/slm.pt")["step"],
        "mean_mb": round(mean, 1),
        "spread": round((max(sizes) - min(sizes)) / mean, 4),
        "slope_mb_per_hour": round(np.polyfit(hours, sizes, 1)[0], 3),
    }
    failed = []
    if row["spread"] > 0.02 or status != 128 + signal.SIGTERM:
        failed.append(f"not flat within 2 %, or status {status}")
    return row, failed


# ---- the parts -----------------------------------------------------------------------------------

PARTS = {part.__name__: part for part in (kills, fuzz, damage, full_disk, writers, memory)}


def measure(name, quick):
    """The row of one part."""
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        row, failed = PARTS[name](Ground(folder), random.Random(SEED), quick)
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    machine = f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}"
    return {
        "part": name,
        **row,
        "n_failed": len(failed),
        "failed": failed[:20],
        "seed": SEED,
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
        "machine": f"{machine}, Python {platform.python_version()}, torch {torch.__version__}",
        "seconds": round(time.time() - start),
    }


def main(argv=None):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="faults.py", description=__doc__, formatter_class=form)
    parser.add_argument("--part", choices=PARTS, help="one part (default: all)")
    parser.add_argument("--quick", action="store_true", help="a few of each; writes nothing")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    n_failed = 0
    for name in [args.part] if args.part else PARTS:
        row = measure(name, args.quick)
        n_failed += row["n_failed"]
        line = json.dumps(row)
        print(line, flush=True)
        if not args.quick:
            with open(HERE / "faults.jsonl", "a") as file:
                file.write(f"{line}\n")
    sys.exit(min(1, n_failed))


if __name__ == "__main__":
    main()
