"""Bad input, bad luck: one clear line, exit status 2, nothing half-written; kills cost nothing."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import model
import prepare_data
import rho

ROOT = Path(rho.__file__).parent
TINY = (
    "--n_layer=1 --n_head=2 --n_kv_head=1 --n_embd=16 --n_inner=32 --block_size=64 --batch_size=4 "
    "--micro_batch=4 --tokens=1024 --ref_tokens=1024 --evals=2 --eval_windows=2 --questions=0 "
    "--device=cpu"
).split()


@pytest.fixture
def place(tiny_data, tmp_path):
    """A copy of the data that a test may damage, and where runs go."""
    data = tmp_path / "data"
    data.mkdir()
    for file in tiny_data.iterdir():
        (data / file.name).write_bytes(file.read_bytes())
    return data, tmp_path / "out"


def run(place, *flags):
    rho.main([*TINY, f"--data={place[0]}", f"--out={place[1]}", *flags])


def refused(place, capsys, *flags, **says):
    """The one line that a command ends with, having exited with 2 and left nothing half-written."""
    before = sorted(p for p in place[1].rglob("*") if p.is_file())
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run(place, *flags)
    assert end.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "Traceback" not in lines[0], lines
    assert sorted(p for p in place[1].rglob("*") if p.is_file()) == before
    assert not list(place[1].rglob("*.tmp"))
    return lines[0]


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["slm", "score"])
def test_missing_reference_names_the_command_that_makes_it(place, capsys, stage):
    line = refused(place, capsys, f"--stage={stage}")
    assert "ref.pt not found" in line and "python rho.py --stage ref" in line
    assert f"--data {place[0]}" in line and f"--out {place[1]}" in line


def test_missing_start_names_the_command_that_makes_that_very_file(place, capsys):
    line = refused(place, capsys, "--stage=clm", "--init=elsewhere/base.pt")
    assert "elsewhere/base.pt not found" in line
    assert "--stage ref --name base " in line and line.endswith("--out elsewhere")


def test_missing_data(place, capsys, tmp_path):
    line = refused((tmp_path / "nowhere", place[1]), capsys, "--stage=clm")
    assert "nowhere" in line and "python prepare_data.py" in line


@pytest.mark.parametrize(
    "flags", [("--seed=-1",), ("--name=x", "--stage=all"), ("--batch_size=0",)]
)
def test_flags_out_of_range_or_at_odds(place, capsys, flags):
    line = refused(place, capsys, *flags)
    assert flags[0].split("=")[0] in line and flags[-1].split("=")[0] in line


@pytest.mark.parametrize("flag", ["--ratio=0", "--ratio=1.5", "--ratio=-0.1", "--ratio=nan"])
def test_ratio_outside_0_1(place, capsys, flag):
    assert flag.replace("=", " ").split("=")[0] in refused(place, capsys, "--stage=slm", flag)


@pytest.mark.parametrize(
    "flag, named",
    [
        ("--stage=train", "--stage"),
        ("--select=best", "--select"),
        ("--optimizer=sgd", "--optimizer"),
        ("--learning_rate=1", "--learning_rate"),
        ("--toke=5", "--toke"),  # no guessing at what was meant
        ("--tokens=many", "--tokens"),
        ("--n_kv_head=3", "n_kv_head"),
        ("--block_size=0", "--block_size"),
        ("--batch_size=-1", "--batch_size"),
        ("--evals=0", "--evals"),
        ("--init=nowhere.pt", "nowhere.pt"),
        ("--device=abacus", "--device"),
    ],
)
def test_flags_that_cannot_be(place, capsys, flag, named):
    assert named in refused(place, capsys, *(["--stage=clm"] * ("stage" not in flag)), flag)


def test_block_size_longer_than_the_reference(place, capsys):
    run(place, "--stage=ref", "--block_size=32")
    assert "--block_size" in refused(place, capsys, "--stage=slm")


def test_reference_of_another_tokenizer(place, capsys):
    run(place, "--stage=ref")
    path = place[1] / "ref.pt"
    checkpoint = model.load_checkpoint(path)
    checkpoint["tokenizer"]["ranks"][300 - 2] = "AAAA"
    torch.save(checkpoint, path)
    assert "wrong tokenizer" in refused(place, capsys, "--stage=slm")


@pytest.mark.parametrize("vocab", [299, 301])  # of the demo in miniature: 300
def test_hugging_face_weights_of_another_vocabulary(place, capsys, tmp_path, vocab):
    """They come without a tokenizer, so that any other number of tokens must be wrong."""
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_inner": 32}
    model.save_hf(model.GPT(model.GPTConfig(vocab, 64, **shape)), tmp_path / "hf")
    line = refused(place, capsys, "--stage=clm", f"--init={tmp_path / 'hf'}")
    assert "wrong tokenizer" in line


def test_hugging_face_weights_without_safetensors(place, capsys, tmp_path, monkeypatch):
    (tmp_path / "hf").mkdir()
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    line = refused(place, capsys, "--stage=clm", f"--init={tmp_path / 'hf'}")
    assert "pip install safetensors" in line


def test_reference_that_is_not_finished(place, capsys):
    run(place, "--stage=ref")
    path = place[1] / "ref.pt"
    torch.save(model.load_checkpoint(path) | {"steps": 1000}, path)
    line = refused(place, capsys, "--stage=slm")
    assert "not trained to its end" in line and "--stage ref" in line


@pytest.mark.parametrize("keep", [0, 10, 5000, -1])
def test_truncated_checkpoint(place, capsys, keep):
    run(place, "--stage=ref")
    path = place[1] / "ref.pt"
    path.write_bytes(path.read_bytes()[:keep])
    for stage in ("slm", "ref"):
        line = refused(place, capsys, f"--stage={stage}")
        assert "ref.pt" in line and "cut short" in line


def test_checkpoint_that_would_run_code_is_not_loaded(place, capsys):
    class Evil:
        def __reduce__(self):
            return (os.system, ("touch evil",))

    place[1].mkdir()
    torch.save({"model": Evil()}, place[1] / "ref.pt")
    assert "ref.pt" in refused(place, capsys, "--stage=slm")
    assert not Path("evil").exists()


@pytest.mark.parametrize("file", ["train.bin", "val.bin", "ref.bin"])
def test_truncated_token_file(place, capsys, file):
    path = place[0] / file
    path.write_bytes(path.read_bytes()[:-2])
    assert file in refused(place, capsys, "--stage=clm")


def test_damaged_or_missing_meta(place, capsys):
    (place[0] / "meta.json").write_text("{")
    assert "meta.json" in refused(place, capsys, "--stage=clm")
    (place[0] / "meta.json").unlink()
    assert "prepare_data.py" in refused(place, capsys, "--stage=clm")


@pytest.mark.parametrize("n", [0, 1, 64])
def test_corpus_too_short_for_one_window(place, capsys, n):
    np.zeros(n, np.uint16).tofile(place[0] / "train.bin")
    meta = json.loads((place[0] / "meta.json").read_text())
    meta["tokens"]["train"] = n
    (place[0] / "meta.json").write_text(json.dumps(meta))
    line = refused(place, capsys, "--stage=clm")
    assert "train.bin" in line and "not one window" in line


def test_oracle_without_truth(place, capsys):
    (place[0] / "kinds.npz").unlink()
    assert "kinds.npz" in refused(place, capsys, "--stage=slm", "--select=oracle")


# ---- bad luck ------------------------------------------------------------------------------------


def test_full_disk_while_a_checkpoint_is_written(place, capsys, monkeypatch):
    run(place, "--stage=clm")
    before = (place[1] / "clm.pt").read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(model.os, "fsync", full)
    line = refused(place, capsys, "--stage=clm", "--lr=1e-3")
    assert "No space left" in line and (place[1] / "clm.pt").read_bytes() == before


def test_full_disk_while_scores_are_written(place, capsys, monkeypatch):
    run(place, "--stage=ref")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(model.os, "fsync", full)
    assert "No space left" in refused(place, capsys, "--stage=score")


def start(place, *flags):
    command = [sys.executable, str(ROOT / "rho.py"), *TINY, *flags]
    command += [f"--data={place[0]}", f"--out={place[1]}"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **quiet)


def test_killed_runs_end_as_if_they_had_not_been(place):
    """kill -9 whenever a new checkpoint has appeared; the last run's bytes equal a whole run's."""
    flags = ["--stage=clm", "--tokens=8192", "--evals=8"]
    whole, cut = place[1] / "whole.pt", place[1] / "cut.pt"
    start(place, *flags, "--name=whole").wait(timeout=120)
    kills = 0
    while kills < 3:
        stamp = cut.stat().st_mtime_ns if cut.exists() else 0
        process = start(place, *flags, "--name=cut")
        while process.poll() is None:
            if cut.exists() and cut.stat().st_mtime_ns != stamp:
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.001)
        if process.wait(timeout=120) == 0:
            break
    assert kills and start(place, *flags, "--name=cut").wait(timeout=120) == 0
    a, b = (model.load_checkpoint(path) for path in (whole, cut))
    assert all(x.equal(y) for x, y in zip(a["model"].values(), b["model"].values(), strict=True))
    timed = ("seconds", "eval_seconds")
    clean = [
        [{k: v for k, v in r.items() if k not in timed} for r in c["records"][1:]] for c in (a, b)
    ]
    assert clean[0] == clean[1]


def test_stages_by_themselves_from_a_fresh_checkout(tmp_path, monkeypatch, capsys):
    """ref makes the demo's data, slm scores what is not scored; nothing else is needed."""
    small = prepare_data.prepare_demo

    def prepare(folder):
        small(folder, n_ref=300, n_train=24_000, vocab=300)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rho, "prepare_demo", prepare)
    rho.main([*TINY, "--stage=ref"])
    rho.main([*TINY, "--stage=slm"])
    assert {p.name for p in Path("out/demo").iterdir()} == {
        *("ref", "ref.pt", "ref.jsonl"),
        *("slm", "slm.pt", "slm.jsonl"),
        "scores",
    }


def test_all_ends_with_table_sentence_and_picture_and_then_skips(place, capfd):
    run(place, "--stage=all", "--questions=4")
    told = capfd.readouterr().out
    for what in ("SLM: selected tokens", " of 4", "SLM passed CLM's final"):
        assert what in told
    assert "demo.png" in told and (place[1] / "demo.png").exists()
    started = time.time()
    run(place, "--stage=all", "--questions=4")
    assert "val_loss" not in capfd.readouterr().out and time.time() - started < 30


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit) as end:
        rho.main(["-h"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    for field in rho.fields(rho.Config):
        assert f"--{field.name} " in text or f"--{field.name}," in text
