"""The README says what the logs say, names files that exist, and commands that run."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import rho

ROOT = Path(rho.__file__).parent
sys.path.insert(0, str(ROOT / "results"))

import figures  # noqa: E402

README = (ROOT / "README.md").read_text()


def test_tables_are_those_of_the_logs():
    assert figures.readme(README) == README, "run: python results/figures.py"


def test_summary_is_that_of_the_logs():
    assert (ROOT / "results" / "summary.json").read_text() == figures.summary()


def test_a_changed_log_would_be_noticed(monkeypatch):
    real = figures.read_logs

    def doctored(folder):
        logs = real(folder)
        logs["slm"][-1]["val_loss"] -= 0.01
        return logs

    monkeypatch.setattr(figures, "read_logs", doctored)
    assert figures.readme(README) != README


def test_files_that_are_named_exist():
    for path in re.findall(r"\]\(([^)#]+)\)", README):
        assert path.startswith("http") or (ROOT / path).exists(), path


@pytest.mark.parametrize("script", ["rho.py", "prepare_data.py", "eval_math.py"])
def test_flags_that_are_named_exist(script):
    command = [sys.executable, str(ROOT / script), "-h"]
    helped = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = re.findall(rf"^(?:python )?{re.escape(script)}.*|^python {script} .*", README, re.M)
    assert lines
    for flag in re.findall(r"--\w+", " ".join(line.split("#")[0] for line in lines)):
        assert re.search(rf"{flag}\b", helped), flag


def test_published_runs_are_comparable():
    """Same seed, data, model, optimizer, schedule and tokens in all arms; only the rule differs."""
    for name in ("demo", "real"):
        logs = figures.read_logs(ROOT / "results" / name)
        arms = {run: records[0]["config"] for run, records in logs.items() if run != "ref"}
        assert set(arms) == {"clm", "slm", "slm-random"}
        own = ("select", "ratio", "name", "stage")
        alike = {json.dumps({k: v for k, v in c.items() if k not in own}) for c in arms.values()}
        assert len(alike) == 1
        ends = {records[-1]["tokens"] for run, records in logs.items() if run != "ref"}
        assert len(ends) == 1
        assert logs["slm"][-1]["trained"] == logs["slm-random"][-1]["trained"]
        assert arms["slm"]["ratio"] == arms["slm-random"]["ratio"] < 1 == arms["clm"]["ratio"]


def test_token_page_is_whole_safe_and_says_what_was_stored(tiny_data, tmp_path):
    """Nothing from outside, no text that ends the script, and the numbers of the arrays."""
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    meta = json.loads((data / "meta.json").read_text())
    meta["kinds"][0] = hostile = "</script><script>alert(1)</script><!--"
    (data / "meta.json").write_text(json.dumps(meta))
    small = {"n_layer": 1, "n_head": 2, "n_kv_head": 1, "n_embd": 16, "block_size": 64}
    quick = {"batch_size": 4, "micro_batch": 4, "tokens": 4096, "ref_tokens": 1024, "questions": 0}
    cfg = rho.Config(data=str(data), out=str(tmp_path), eval_windows=4, **small, **quick)
    rho.train_arm(cfg, rho.Run(cfg), "ref")
    rho.dynamics(cfg, rho.Run(cfg))
    figures.token_page(tmp_path)
    page = (tmp_path / "tokens.html").read_text()
    template = (ROOT / "results" / "tokens_template.html").read_text()
    for sign in ("</script", "<!--", "http", "src=", "url("):
        assert page.count(sign) == template.count(sign)
    assert not re.search("http|src=|url\\(|@import", template)
    told = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    assert told["kinds"][0] == hostile
    runs, ref_loss, text = figures.read_looks(tmp_path)
    assert told["ref"] == [round(100 * float(x)) for x in ref_loss]
    assert len(told["text"]) == len(told["kind"]) == len(ref_loss) == 4 * 64
    assert told["tokens"] == [r["tokens"] for r in runs["slm"][0][1:]] and len(told["tokens"]) == 16
    for run, (_, losses) in runs.items():
        excess = losses - ref_loss
        cut = np.array(told["runs"][run]["cut"])[:, None]  # among equals it keeps all
        assert ((excess > cut).mean(1) <= cfg.ratio).all()
        assert ((excess >= cut).mean(1) >= cfg.ratio - 0.01).all()
        assert np.abs(np.array(told["runs"][run]["loss"]) / 100 - losses).max() < 0.006
    figures.looks_picture((runs, ref_loss, text), tmp_path / "looks.png")
    assert (tmp_path / "looks.png").stat().st_size > 20_000
    rows = list(figures.dynamics_rows((runs, ref_loss, text)))
    assert [row[0] for row in rows[1:]] == list(rho.DYNAMICS)
    assert sum(int(row[2].split()[0]) for row in rows[1:]) == pytest.approx(100, abs=2)
