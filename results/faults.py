"""Kills, hostile inputs, damaged files, full disks, two writers, long runs: what they do to us.

    python results/faults.py                 all parts; about half an hour, 20 minutes for memory
    python results/faults.py --part fuzz     one of kills, fuzz, damage, full_disk, writers, memory
    python results/faults.py --quick         a few of each, in seconds; writes nothing

Each part ends as a row of results/faults.jsonl: what was tried, what ended right, and in `failed`,
in words, what did not. All happens in a temporary folder, with tiny models, one thread and a seed.
ground.py runs the commands, hostile.py makes the inputs. Linux only.
"""

import argparse
import json
import os
import platform
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]

import hostile  # noqa: E402
from ground import (  # noqa: E402
    JOBS,
    SEED,
    TINY,
    TRAIN,
    Ground,
    Job,
    Running,
    contents,
    last_line,
    one_line,
)

from model import load_checkpoint  # noqa: E402

QUICK_JOBS = [JOBS["prepare"], JOBS["slm"]]


# ---- kills ---------------------------------------------------------------------------------------


def kills(ground, rng, quick, jobs=None):
    """kill -9 at random moments, up to three in a row; then the same command runs to its end."""
    row = Counter(kills=0, ends=0, bit_identical=0, signals=0, one_line_and_resumed=0)
    failed = []
    for job in jobs or (QUICK_JOBS if quick else JOBS.values()):
        wanted, seconds = ground.undisturbed(job)
        n_kills = 0
        while n_kills < (1 if quick else 21):
            place = ground.fresh()
            for _ in range(rng.randint(1, 3)):
                status, _ = Running(job, place).end(rng.uniform(0, seconds))
                n_kills += status == -signal.SIGKILL
            row["ends"] += 1
            if ends_as(wanted, job, place):
                row["bit_identical"] += 1
            else:
                failed.append(f"after kill -9: {job}")
        row["kills"] += n_kills
        for _ in range(1 if quick else 8):
            number = rng.choice([signal.SIGINT, signal.SIGTERM])
            polite_end(ground, job, number, rng.uniform(0.4, 0.9) * seconds, wanted, row, failed)
    return dict(row), failed


def ends_as(wanted, job, place):
    """Whether the command runs to its end, and leaves what the undisturbed run left."""
    status, _ = Running(job, place).end()
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
        failed.append(f"{number.name}: {job}: status {status}, {last_line(said)}")


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
        return Job("rho.py", TRAIN + "--stage clm"), True
    if path.name == "slm.pt":
        return Job("eval_math.py", "--ckpt out/slm.pt --data data --n 5 --device cpu"), True
    return Job("rho.py", AGAIN + "--stage slm"), True


def damage(ground, rng, quick):
    """Each file of data and out cut short, emptied, with a bit flipped, and as garbage.

    Either one line with status 2 names the file, or the damage does not matter: the command ends
    as without it. Logs and stored losses have no checksum: there it is enough that it ends.
    """
    row = Counter(damaged=0, refused_in_one_line=0, ran_right=0)
    failed = []
    for name in sorted(contents(ground.base)):
        job, has_checksum = reader_of(name)
        if job is None or (quick and rng.random() < 0.8):
            continue  # None: text of the user's own
        # Of its own: how much another draws depends on the length of its file.
        rng_of_file = random.Random(f"{SEED} {name}")
        wanted, _ = ground.undisturbed(job)
        whole = (ground.base / name).read_bytes()
        for how, damaged in hostile.ways_to_damage(rng_of_file, whole).items():
            place = ground.fresh()
            (place / name).write_bytes(damaged)
            status, said = Running(job, place).end()
            row["damaged"] += 1
            # A score file's line names the scores, not the file of their checksum.
            if status == 2 and Path(name).name.removesuffix(".sha256") in one_line(said):
                row["refused_in_one_line"] += 1
            elif status == 0 and (not has_checksum or same_but(name, place, wanted)):
                row["ran_right"] += 1
            else:
                failed.append(f"{name} {how}: {job}: status {status}, {last_line(said)}")
    return dict(row), failed


def same_but(name, place, wanted):
    others = {file: what for file, what in wanted.items() if file != name}
    return contents(place, but=name) == others


# ---- full disks ----------------------------------------------------------------------------------


def full_disk(ground, rng, quick):
    """Files cannot grow beyond a limit, as on a full disk: one line that names what was written,
    old files as they were, nothing half-written, and with room again it ends as undisturbed."""
    row = Counter(full=0, one_line=0, old_files_intact=0, ends_right=0)
    failed = []
    before = contents(ground.base)
    again = Job("rho.py", TRAIN + "--stage ref --restart")
    for job in [JOBS["prepare"], again] if quick else [*JOBS.values(), again]:
        wanted, _ = ground.undisturbed(job)
        largest = ground.largest("mine" if job == JOBS["prepare"] else "out")
        for _ in range(1 if quick else 5):
            place = ground.fresh()
            limit = int(rng.uniform(0.02, 0.7) * largest)
            status, said = Running(job, place, limit).end()
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
                failed.append(f"{job}: {named, intact, right}, {status}, {last_line(said)}")
    return dict(row), failed


# ---- two writers ---------------------------------------------------------------------------------


def writers(ground, rng, quick):
    """Two commands started together: one of them refuses, or both end with the same bytes."""
    row = Counter(pairs=0, one_refused_one_right=0, score_pairs=0, score_pairs_same_bytes=0)
    failed = []
    for name in ["slm", "score"] if quick else ["prepare", "clm", "slm", "score"]:
        job = JOBS[name]
        wanted, _ = ground.undisturbed(job)
        for _ in range(1 if quick else 4):
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
                failed.append(f"{job}: {ends}, the same at the end: {same}")
    return dict(row), failed


# ---- memory --------------------------------------------------------------------------------------


def anonymous_mb(pid):
    """Memory of its own: without files that are mapped, which the kernel can drop."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(re.search(r"^Anonymous: +(\d+) kB", rollup, re.MULTILINE)[1]) / 1024


def watch(pid, seconds, count=200):
    """(hours, MB of anonymous memory) of a process, so many times over so many seconds."""
    start = time.time()
    hours, sizes = [], []
    for _ in range(count):
        time.sleep(seconds / count)
        hours.append((time.time() - start) / 3600)
        sizes.append(anonymous_mb(pid))
    return hours, sizes


def flatness(hours, sizes):
    mean = sum(sizes) / len(sizes)
    return {
        "mean_mb": round(mean, 1),
        "spread": round((max(sizes) - min(sizes)) / mean, 4),
        "mb_per_hour": round(np.polyfit(hours, sizes, 1)[0], 3),
    }


def memory(ground, rng, quick):
    """20 minutes of training, an evaluation each thousand steps and a checkpoint each second:
    is its memory flat within 2 % after the first two minutes?"""
    place = ground.fresh()
    flags = TINY + "--stage slm --tokens 1e9 --evals 4000 --save_minutes 0.02 --name long"
    command = [sys.executable, str(ROOT / "rho.py"), *flags.split()]
    # A process by itself: a fork would have our memory too.
    process = subprocess.Popen(command, cwd=place, stdout=subprocess.DEVNULL)
    while not (place / "out/long.pt").exists() and process.poll() is None:
        time.sleep(0.1)
    time.sleep(0 if quick else 120)
    hours, sizes = watch(process.pid, 2 if quick else 18 * 60)
    process.terminate()
    status = process.wait()
    steps = load_checkpoint(place / "out/long.pt")["step"]
    row = {"minutes": round(60 * hours[-1], 1), "steps": steps, **flatness(hours, sizes)}
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
        failed = [text.replace(folder, "") for text in failed]
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
