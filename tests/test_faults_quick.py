"""The quick form of results/faults.py; and that it notices what it is there to notice."""

import os
import random
import signal
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("resource")  # no Windows
if not hasattr(os, "fork"):
    pytest.skip("needs fork", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parent.parent / "results"))

import faults  # noqa: E402
import hostile  # noqa: E402
from ground import TRAIN, Ground, Job, Running, contents, one_line  # noqa: E402


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    return Ground(tmp_path_factory.mktemp("faults"))


@pytest.fixture
def rng():
    return random.Random(7)


def own_script(tmp_path, text):
    """A command of a test, in the place of one of the four scripts."""
    script = tmp_path / "own.py"
    script.write_text(text)
    return Job(str(script), "")


# ---- the quick form of each part -----------------------------------------------------------------


def test_killed_commands_end_bit_identical(ground, rng):
    row, failed = faults.kills(ground, rng, True)
    assert failed == []
    assert row["kills"] >= 2 and row["bit_identical"] == row["ends"]
    assert row["one_line_and_resumed"] == row["signals"]


def test_hostile_inputs_crash_nothing(ground, rng, monkeypatch):
    monkeypatch.setattr(hostile, "SLOW", 5)  # the machine may be busy
    row, failed = faults.fuzz(ground, rng, True)
    assert failed == []
    assert row == {"inputs_fuzzed": 2000, "crashes": 0, "slow": 0}


def test_damaged_files_are_refused_by_name(ground, rng):
    row, failed = faults.damage(ground, rng, True)
    assert failed == []
    assert row["damaged"] == row["refused_in_one_line"] + row["ran_right"]
    assert row["refused_in_one_line"] > 5


def test_a_full_disk_costs_nothing(ground, rng):
    row, failed = faults.full_disk(ground, rng, True)
    assert failed == []
    assert row["full"] == row["one_line"] == row["old_files_intact"] == row["ends_right"] == 2


def test_of_two_writers_one_refuses_or_both_end_the_same(ground, rng):
    row, failed = faults.writers(ground, rng, True)
    assert failed == []
    assert row["pairs"] == row["one_refused_one_right"] == 1
    assert row["score_pairs"] == row["score_pairs_same_bytes"] == 1


def test_memory_of_a_training_run_is_read(ground):
    job = Job("rho.py", f"{TRAIN} --stage clm --tokens 1e9 --name long")
    running = Running(job, ground.fresh())
    hours, sizes = faults.watch(running.process.pid, 0.4, 20)
    status, said = running.end(0, signal.SIGKILL)
    assert status == -signal.SIGKILL and said == ""
    assert len(hours) == len(sizes) == 20 and min(sizes) > 20


# ---- what goes wrong is noticed ------------------------------------------------------------------


def test_a_command_that_does_not_survive_a_kill_is_counted(ground, rng, tmp_path):
    """It appends to its file, so that a second start doubles what the first one wrote."""
    text = """
        import signal, time
        signal.signal(signal.SIGTERM, lambda *_: 1 / 0)
        for i in range(200):
            # Closed here: CPython drops an exception of a signal in a file's finalizer.
            with open("log.txt", "a") as log:
                print(i, file=log)
            time.sleep(0.002)
    """
    job = own_script(tmp_path, textwrap.dedent(text))
    row, failed = faults.kills(ground, rng, True, [job])
    assert row["kills"] >= 1 and row["bit_identical"] < row["ends"]
    assert "after kill -9" in failed[0] and row["one_line_and_resumed"] < row["signals"]


def test_an_undisturbed_run_that_fails_is_no_yardstick(ground, tmp_path):
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        ground.undisturbed(own_script(tmp_path, "1 / 0"))


@pytest.mark.parametrize("wrong", ["raises", "undocumented", "panics", "slow", "breaks a promise"])
def test_a_function_that_crashes_or_is_slow_is_counted(ground, rng, wrong, monkeypatch):
    class Panic(BaseException):
        pass

    def function(number):
        if number == 3 and wrong == "slow":
            time.sleep(0.02)
        elif number == 3 and wrong == "breaks a promise":
            raise AssertionError
        elif number == 3:
            raise {"raises": KeyError, "undocumented": TypeError, "panics": Panic}[wrong](number)
        if number == 4:
            raise ValueError("as documented")

    monkeypatch.setattr(hostile, "SLOW", 0.01)
    monkeypatch.setattr(hostile, "slowdown", lambda: 1)
    numbers = iter(range(10))
    targets = {"own": (10, lambda rng, place: (next(numbers),), function, ValueError)}
    row, failed = hostile.fuzz(ground.fresh(), rng, 1, targets)
    count = "slow" if wrong == "slow" else "crashes"
    assert row == {"inputs_fuzzed": 10, "crashes": 0, "slow": 0} | {count: 1}
    assert len(failed) == 1 and failed[0].startswith("own: ")


def test_each_change_in_a_place_is_seen(ground):
    place = ground.fresh()
    before = contents(place)
    for name in ("out/ref.jsonl", "data/train.bin", "data/meta.json"):
        path = place / name
        whole = path.read_bytes()
        path.write_bytes(whole.replace(b"1", b"2", 1))
        assert contents(place) != before and contents(place, but=name).items() < before.items()
        path.write_bytes(whole)
    (place / "left.tmp").touch()
    assert contents(place).keys() - before.keys() == {"left.tmp"}


def test_a_half_written_checkpoint_does_not_pass_for_the_whole_one(ground):
    place = ground.fresh()
    path = place / "out/ref.pt"
    path.write_bytes(path.read_bytes()[:-1])
    assert contents(place)["out/ref.pt"] != contents(ground.base)["out/ref.pt"]


def test_two_lines_and_a_traceback_are_not_one_line():
    bar = "\rref: 0.00 tokens [00:00, ? tokens/s]\r"
    assert one_line(bar + "\nrho.py: no data\n") == "rho.py: no data"
    assert one_line("one\ntwo\n") == one_line("") == one_line("Traceback (most)") == ""


def test_damage_that_is_not_refused_is_counted(ground, rng, tmp_path, monkeypatch):
    """A script that reads nothing, and so refuses nothing, but writes what it has read."""
    text = "import shutil\nshutil.copytree('data', 'again')\nshutil.copytree('out', 'other')\n"
    job = own_script(tmp_path, text)
    monkeypatch.setattr(faults, "reader_of", lambda name: (job, True))
    row, failed = faults.damage(ground, rng, True)
    assert row["damaged"] > 0 and row["refused_in_one_line"] == 0 and len(failed) > 0


def test_memory_that_grows_is_not_flat():
    hours = np.linspace(0, 1, 50)
    steady = faults.flatness(hours, [200.0] * 50)
    grows = faults.flatness(hours, [200 + 30 * hour for hour in hours])
    assert steady == {"mean_mb": 200.0, "spread": 0.0, "mb_per_hour": 0.0}
    assert grows["spread"] > 0.1 and grows["mb_per_hour"] == pytest.approx(30)


def test_a_part_ends_as_one_row(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(faults, "HERE", tmp_path)
    monkeypatch.setattr(faults, "Ground", lambda folder: None)
    monkeypatch.setitem(faults.PARTS, "fuzz", lambda ground, rng, quick: ({"tried": 5}, ["no"]))
    for flags in (["--quick"], []):
        with pytest.raises(SystemExit) as end:
            faults.main(["--part", "fuzz", *flags])
        assert end.value.code == 1
        assert '"tried": 5, "n_failed": 1, "failed": ["no"]' in capsys.readouterr().out
    assert len((tmp_path / "faults.jsonl").read_text().splitlines()) == 1
