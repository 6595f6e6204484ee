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
    assert "--stage ref --name base " in line and "--out elsewhere " in line
    assert "--block_size 64" in line  # a model of other windows would not do


@pytest.mark.parametrize(
    "name, flags",
    [
        ("slm", "--stage slm"),
        ("slm-random-mix", "--stage slm --select random --mix 0.6"),
        ("slm-mix", "--stage slm --mix 0.6"),
        ("clm-mix", "--stage clm --mix 0.6"),
        ("slm-mix9", "--stage slm --name slm-mix9"),
        ("dynamics-slm", "--stage dynamics"),
        ("a b", "--stage ref --name 'a b'"),
    ],
)
def test_a_missing_checkpoint_is_made_by_the_command_of_its_name(name, flags):
    """Fine-tuning has a budget of its own, which is not the student's."""
    cfg = rho.arm_config(rho.Config(stage="sft", init=f"my runs/{name}.pt", lr=1e-3), "sft")
    command = rho.command_for(Path(cfg.init), cfg)
    assert command == f"python rho.py {flags} --out 'my runs' --lr 0.001"


def test_missing_data(place, capsys, tmp_path):
    line = refused((tmp_path / "nowhere", place[1]), capsys, "--stage=clm")
    assert "nowhere" in line and "python prepare_data.py" in line


@pytest.mark.parametrize(
    "flags",
    [
        ("--stage=all", "--name=x"),
        ("--stage=all", "--select=loss"),
        ("--stage=clm", "--select=random"),
        ("--stage=sft", "--init="),
    ],
)
def test_flags_at_odds(place, capsys, flags):
    line = refused(place, capsys, *flags)
    assert flags[-1].split("=")[0] in line and len(line) < 200


@pytest.mark.parametrize(
    "flag",
    "seed=-1 seed=1180591620717411303424 batch_size=0 batch_size=-1 block_size=0 evals=0 tokens=0 "
    "ratio=0 ratio=1.5 ratio=-0.1 ratio=nan ratio=0.0001 threshold=nan threshold=inf lr=-1 lr=nan "
    "lr=0 lr=3e4 clip=-1 clip=0 clip=nan warmup=2 warmup=-0.1 lr_end=-1 weight_decay=-1 "
    "questions=-1 save_minutes=0 name=../x name=a/b".split(),
)
def test_a_value_out_of_its_range_is_refused_by_name(place, capsys, flag):
    assert f"--{flag.split('=')[0]} " in refused(place, capsys, "--stage=slm", f"--{flag}")


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
        ("--tokens=1.5", "--tokens"),
        ("--fast=maybe", "--fast"),
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
    assert "another tokenizer" in refused(place, capsys, "--stage=slm")


@pytest.mark.parametrize("vocab", [299, 301])  # of the demo in miniature: 300
def test_hugging_face_weights_of_another_vocabulary(place, capsys, tmp_path, vocab):
    """They come without a tokenizer, so that any other number of tokens must be wrong."""
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_inner": 32}
    model.save_hf(model.GPT(model.GPTConfig(vocab, 64, **shape)), tmp_path / "hf")
    line = refused(place, capsys, "--stage=clm", f"--init={tmp_path / 'hf'}")
    assert "another tokenizer" in line


def test_reference_that_is_not_finished(place, capsys, monkeypatch):
    """The command that began it finishes it, whatever the checkpoint is called."""
    monkeypatch.setattr(sys, "argv", ["rho.py", "--stage=ref", "--restart", "--name", "my own"])
    run(place, "--stage=ref", "--name=mine")
    path = place[1] / "mine.pt"
    torch.save(model.load_checkpoint(path) | {"steps": 1000}, path)
    line = refused(place, capsys, "--stage=slm", f"--reference={path}")
    assert "mine.pt has not finished training" in line
    assert line.endswith("Run: python rho.py --stage=ref --name 'my own'")


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


def test_a_log_with_any_bit_flipped_is_shown_or_refused(place, capsys):
    """It has no checksum: another digit is shown, and a name that is no longer there refused."""
    run(place, "--stage=ref")
    run(place, "--stage=clm")
    log = place[1] / "clm.jsonl"
    whole = log.read_bytes()
    rng = np.random.default_rng(0)
    refusals = 0
    for position in rng.integers(0, len(whole), 300):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(rng.integers(8))
        log.write_bytes(damaged)
        try:
            rho.show_table(place[1])
        except prepare_data.InputError as error:
            assert str(error).startswith(f"{log} is damaged. Delete it: ")
            refusals += 1
    assert 30 < refusals < 270


@pytest.mark.parametrize("name", [*sorted(rho.EVALUATION), "right", "questions", "config"])
def test_a_log_without_a_name_that_is_read_is_damaged(place, capsys, name):
    run(place, "--stage=clm", "--questions=3")
    log = place[1] / "clm.jsonl"
    log.write_text(log.read_text().replace(f'"{name}"', '"x"'))
    if name == "config":  # not a log for the table; but a run cannot go on from it
        line = refused(place, capsys, "--stage=clm", "--tokens=4096")
    else:
        line = refused(place, capsys, "--stage=table")
    assert f"{log} is damaged. Delete it: the command that made it writes it again" in line


@pytest.mark.parametrize("n", [0, 1, 64])
def test_corpus_too_short_for_one_window(place, capsys, n):
    np.zeros(n, np.uint16).tofile(place[0] / "train.bin")
    meta = json.loads((place[0] / "meta.json").read_text())
    meta["tokens"]["train"] = n
    meta["files"]["train.bin"] = prepare_data.file_digest(place[0] / "train.bin")
    (place[0] / "meta.json").write_text(json.dumps(meta))
    line = refused(place, capsys, "--stage=clm")
    assert "train.bin" in line and "not one window" in line


def test_oracle_without_truth(place, capsys):
    meta = json.loads((place[0] / "meta.json").read_text())
    del meta["files"]["kinds.npz"]
    (place[0] / "meta.json").write_text(json.dumps(meta))
    (place[0] / "kinds.npz").unlink()
    assert "the truth is not known" in refused(place, capsys, "--stage=slm", "--select=oracle")


# ---- bad luck ------------------------------------------------------------------------------------


def test_full_disk_while_a_checkpoint_is_written(place, capsys, monkeypatch):
    run(place, "--stage=clm")
    before = (place[1] / "clm.pt").read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(prepare_data.os, "fsync", full)
    line = refused(place, capsys, "--stage=clm", "--restart")
    assert "No space left" in line and (place[1] / "clm.pt").read_bytes() == before


def test_full_disk_while_scores_are_written(place, capsys, monkeypatch):
    run(place, "--stage=ref")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(prepare_data.os, "fsync", full)
    assert "No space left" in refused(place, capsys, "--stage=score")


def start(place, *flags, stderr=subprocess.DEVNULL):
    command = [sys.executable, str(ROOT / "rho.py"), *TINY, *flags]
    command += [f"--data={place[0]}", f"--out={place[1]}"]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": stderr, "text": True}
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes)


def test_killed_runs_end_as_if_they_had_not_been(place):
    """kill -9 whenever a new checkpoint has appeared; the last run's bytes equal a whole run's."""
    flags = ["--stage=clm", "--tokens=8192", "--evals=8"]
    whole, cut = place[1] / "whole.pt", place[1] / "cut.pt"
    run(place, *flags, "--name=whole")
    kills = 0
    while kills < 2:
        stamp = cut.stat().st_mtime_ns if cut.exists() else 0
        process = start(place, *flags, "--name=cut")
        while process.poll() is None:
            if cut.exists() and cut.stat().st_mtime_ns != stamp:
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.001)
        if process.wait(timeout=600) == 0:
            break
    assert kills
    run(place, *flags, "--name=cut")
    a, b = (model.load_checkpoint(path) for path in (whole, cut))
    assert all(x.equal(y) for x, y in zip(a["model"].values(), b["model"].values(), strict=True))
    timed = ("seconds", "eval_seconds")
    clean = [
        [{k: v for k, v in r.items() if k not in timed} for r in c["records"][1:]] for c in (a, b)
    ]
    assert clean[0] == clean[1]


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_in_one_line_and_it_resumes(place, number, status):
    flags = ["--stage=clm", "--tokens=1000000", "--evals=1000"]
    process = start(place, *flags, stderr=subprocess.PIPE)
    while not (place[1] / "clm.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    _, said = process.communicate(timeout=600)
    assert process.returncode == status
    assert said.splitlines() == [
        "rho.py: interrupted; the same command (without --restart) resumes"
    ]
    step = model.load_checkpoint(place[1] / "clm.pt")["step"]
    assert 0 < step < 1000000 // 256 and not list(place[1].rglob("*.tmp"))


def test_two_writers_of_one_run_in_two_processes(place, capsys):
    flags = ["--stage=clm", "--tokens=1000000", "--evals=1000"]
    first = start(place, *flags)
    while not (place[1] / "clm.pt").exists():
        assert first.poll() is None
        time.sleep(0.01)
    with pytest.raises(SystemExit) as end:
        run(place, *flags)
    first.kill()
    first.wait()
    assert end.value.code == 2 and "being written by another run" in capsys.readouterr().err
    assert model.load_checkpoint(place[1] / "clm.pt")


def test_shape_flags_that_are_not_the_start_s_are_refused(place, capsys):
    run(place, "--stage=clm")
    start = f"--init={place[1]}/clm.pt"
    line = refused(place, capsys, "--stage=clm", start, "--name=x", "--n_layer=2")
    assert "--n_layer 2: " in line


def test_check_reads_all_files_and_finds_a_flipped_bit_in_each(place, capsys):
    run(place, "--stage=ref")
    run(place, "--stage=slm")
    run(place, "--stage=check")
    assert "whole: " in capsys.readouterr().out
    scores = next(place[1].glob("scores/*/ref_loss.f16"))
    for path in (place[0] / "train.bin", scores, place[1] / "slm.pt"):
        content = path.read_bytes()
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        assert path.name in refused(place, capsys, "--stage=check")
        path.write_bytes(content)


def test_stages_by_themselves_from_a_fresh_checkout(tmp_path, monkeypatch, capsys):
    """ref makes the demo's data, slm scores what is not scored; nothing else is needed."""
    small = prepare_data.prepare_demo

    def prepare(folder):
        small(folder, n_ref=300, n_train=24_000, vocab=300)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rho, "prepare_demo", prepare)
    rho.main([*TINY, "--stage=ref"])
    rho.main([*TINY, "--stage=slm"])
    names = {p.name for p in Path("out/demo").iterdir()}
    assert names == {"ref", "ref.pt", "ref.jsonl", "slm", "slm.pt", "slm.jsonl", "scores"}


# ---- the table -----------------------------------------------------------------------------------


def test_all_ends_with_the_table_and_then_skips(place, capsys):
    run(place, "--stage=all", "--questions=4")
    said = capsys.readouterr().out
    for what in ("target loss", "slm-random", " of 4", "clm's final target loss"):
        assert what in said
    run(place, "--stage=all", "--questions=4")
    assert capsys.readouterr().out.count("finished already") == 5
    # The rival with the clean text in its corpus reads as much as SLM and its reference together.
    runs = rho.read_runs(place[1])
    in_all = {name: rho.tokens_in_all(records) for name, records in runs.items()}
    assert in_all["clm-mix"] == in_all["slm"] == 2048 and in_all["clm"] == 1024


def test_every_run_shows_and_another_length_is_marked(place, capsys):
    """Own names and rules are in the table; what cannot be compared with CLM says why."""
    for flags in (
        ["--stage=ref"],
        ["--stage=clm"],
        ["--stage=slm", "--name=mine"],
        ["--stage=slm", "--name=longer", "--tokens=2048"],
        ["--stage=slm", "--threshold=0.1", "--name=above"],
    ):
        run(place, *flags)
    capsys.readouterr()
    run(place, "--stage=table")
    said = capsys.readouterr().out
    rows = {line.split()[0]: line for line in said.splitlines() if line.strip()}
    assert {"mine", "above", "longer", "ref", "clm"} <= rows.keys()
    assert "longer *" in rows["longer"] and "*" not in rows["mine"] + rows["above"]
    assert "longer cannot be compared with clm: tokens 2048, not 1024" in said


def test_an_unfinished_run_is_marked_and_nothing_is_compared_with_an_unfinished_clm(place, capsys):
    run(place, "--stage=clm")
    run(place, "--stage=clm", "--mix=0.5")
    for name, said in (
        ("clm-mix", "* clm-mix cannot be compared with clm: unfinished"),
        ("clm", "clm is unfinished: nothing can be compared with it yet"),
    ):
        log = place[1] / f"{name}.jsonl"
        log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
        capsys.readouterr()
        run(place, "--stage=table")
        assert said in capsys.readouterr().out


def test_a_table_of_nothing_says_what_to_run(place, capsys):
    assert "holds no runs" in refused(place, capsys, "--stage=table")


def log(*shares, of=500):
    """Records of evaluations at 1,000, 2,000, ... tokens; shares: right answers."""
    rows = [{"step": 0}]
    for i, right in enumerate(shares):
        rows.append({"tokens": 1000 * (i + 1), "right": right, "questions": of, "val_loss": -right})
    return rows


@pytest.mark.parametrize(
    "slm, clm, tokens",
    [
        ((22, 3, 40, 90), (1, 2, 3, 20), 3000),  # an untrained model had guessed 22
        ((1, 30, 31, 15), (1, 2, 3, 20), None),  # passed, but not to the end
        ((1, 20, 20, 20), (1, 2, 3, 20), 2000),
        ((1, 2, 3, 19), (1, 2, 3, 20), None),
    ],
)
def test_passing_clm_must_hold_to_the_end(slm, clm, tokens):
    for key in ("right", "val_loss"):
        assert rho.tokens_to_reach(log(*slm), log(*clm)[-1], key) == tokens


def test_shares_are_compared_not_counts():
    assert rho.tokens_to_reach(log(5, 9, of=10), log(20, 400)[-1], "right") == 2000
    assert rho.tokens_to_reach(log(20, 100), log(5, 9, of=10)[-1], "right") is None


# ---- flags ---------------------------------------------------------------------------------------


def test_numbers_may_be_written_as_people_do():
    cfg = rho.parse(["--tokens", "1e6", "--ref_tokens=900_000", "--fast", "false", "--compile"])
    assert (cfg.tokens, cfg.ref_tokens, cfg.fast, cfg.compile) == (1_000_000, 900_000, False, True)


@pytest.mark.parametrize("field", rho.fields(rho.Config), ids=lambda field: field.name)
def test_help_says_more_than_the_name(field, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = field.metadata["help"]
    beyond = set(text.lower().replace(":", " ").split()) - {*field.name.split("_"), field.name}
    assert len(beyond) >= 2, f"--{field.name}: {text}"
    with pytest.raises(SystemExit) as end:
        rho.parse(["-h"])
    shown = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0 and " ".join(text.split()) in shown
