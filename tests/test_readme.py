"""The README says what the logs say, names files that exist, and commands that run."""

import base64
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiktoken._educational import bpe_train

import prepare_data
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
    real = figures.read_log

    def doctored(path):
        records = real(path)
        if Path(path).name == "slm.jsonl":
            records[-1]["val_loss"] -= 0.01
        return records

    monkeypatch.setattr(figures, "read_log", doctored)
    assert figures.readme(README) != README


def test_interval_is_students():
    """Against the textbook: differences 1 2 3 4 5 have mean 3, standard error 0.7071, t 2.776."""
    mean, low, high = figures.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3
    assert (low, high) == pytest.approx((3 - 2.776 * 0.70711, 3 + 2.776 * 0.70711), abs=0.01)


def test_passed_is_the_first_look_at_which_slm_is_where_clm_ends():
    clm = [{}, {"tokens": 100, "right": 9, "questions": 10}, {"tokens": 200, "right": 4}]
    slm = [{}, {"tokens": 50, "right": 3}, {"tokens": 100, "right": 4}, {"tokens": 200, "right": 9}]
    assert figures.passed({"clm": clm, "slm": slm}, "right") == (100, 2.0)
    assert figures.passed({"clm": slm, "slm": clm[:1]}, "right") == (None, None)


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


def alike(arms):
    """The configurations of the arms, but for what makes them arms."""
    own = ("select", "ratio", "threshold", "name", "stage", "reference")
    return {json.dumps({k: v for k, v in c.items() if k not in own}) for c in arms}


def test_published_runs_are_comparable():
    """Same seed, data, model, optimizer, schedule and tokens in all arms; only the rule differs."""
    folders = [*(ROOT / "results" / "runs").glob("seed*")]
    assert len(folders) == 5
    folders += [*(ROOT / "results" / "real").glob("seed*"), ROOT / "results" / "demo"]
    assert len(folders) == 9
    for folder in folders:
        logs = figures.read_logs(folder)
        arms = {run: records[0]["config"] for run, records in logs.items() if run != "ref"}
        assert {"clm", "slm", "slm-random"} <= set(arms) and len(alike(arms.values())) == 1
        assert len({records[-1]["tokens"] for run, records in logs.items() if run != "ref"}) == 1
        assert logs["slm"][-1]["trained"] == logs["slm-random"][-1]["trained"]
        assert arms["slm"]["ratio"] == arms["slm-random"]["ratio"] < 1 == arms["clm"]["ratio"]
        assert arms["slm"]["select"] == "excess" and arms["slm-random"]["select"] == "random"


def test_published_logs_are_of_the_commands_that_are_named():
    """Each command has its log, made with just these flags and trained to its end."""
    found = 0
    for command in " && ".join([*figures.commands(), *figures.real_commands()]).split(" && "):
        if "rho.py" not in command:
            continue
        flags = dict(re.findall(r"--(\w+) (\S+)", command))
        folder = re.sub("^out/(seed.)", r"runs/\1", flags["out"]).removeprefix("out/")
        folder = ROOT / "results" / folder
        if flags["stage"] == "dynamics":
            for arm in ("clm", "slm"):
                assert len(figures.read_log(folder / f"dynamics-{arm}.jsonl")) > 16
            continue
        first, *looks = figures.read_log(folder / f"{flags['name']}.jsonl")
        if flags.get("select") == "oracle":  # within: kinds for losses, and all below one half
            flags["select"] = "ref_loss"
        stage, plain = flags.pop("stage"), rho.Config()
        if stage == "ref" and "ref_tokens" in flags:
            flags["tokens"] = flags.pop("ref_tokens")
        config = first["config"]
        for flag, text in flags.items():
            if not (flag == "ratio" and stage == "slm" and config["threshold"] is not None):
                assert str(config[flag]) == str(type(getattr(plain, flag) or text)(text)), command
        tokens = config["tokens"] // (config["batch_size"] * config["block_size"])
        assert looks[-1]["step"] == tokens
        found += 1
    assert found > 100


def test_page_of_tokens_is_escaped_whatever_the_text_holds(tmp_path):
    """A page that let the corpus out of its data would run what the corpus says."""
    text, n = "</script><script>alert(1)</script><!-- \u2028 & ", 40
    ranks = [base64.b64encode(bytes([b])).decode() for b in range(256)]
    spec = {"name": "bytes", "ranks": ranks, "pat_str": "(?s).", "eot": 256, "n_vocab": 257}
    meta = {"tokenizer": spec, "dtype": "uint16"}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    np.frombuffer(text.encode(), np.uint8).astype(np.uint16).tofile(tmp_path / "val_corpus.bin")
    for run in ("ref", "clm", "slm"):
        (tmp_path / run).mkdir()
        for step in (1, 2, 3):
            loss = np.random.default_rng(step).permutation(n)[None] / 8  # far apart: no rounding
            np.save(tmp_path / run / f"{step}.npy", (loss * (run != "ref")).astype(np.float16))
        records = [{"config": {"data": str(tmp_path), "ratio": 0.5}}]
        records += [{"step": step, "tokens": step} for step in (1, 2, 3)]
        (tmp_path / f"{run}.jsonl").write_text("\n".join(map(json.dumps, records)))
    page = figures.token_page(tmp_path).read_text()
    assert page.count("<script") == page.count("</script>") == 2  # its own
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    assert "".join(data["text"][:38]) == text[1:39] and len(data["text"]) == n
    kept = np.array(data["runs"]["slm"]["loss"][2]) - data["ref"]
    assert (kept >= 100 * data["runs"]["slm"]["cut"][2] - 1).sum() == n // 2


def test_kept_is_the_rule_of_select_tokens():
    looks = {"slm": np.random.rand(3, 50), "ref": np.random.rand(1, 50)}
    for look, mine in zip(looks["slm"], figures.kept(looks, "slm", 0.4), strict=True):
        score = torch.from_numpy(look - looks["ref"][-1])
        assert (rho.select_tokens(score, 0.4).numpy() == mine).all()


@pytest.mark.parametrize(("text", "n"), [("aaaa aaab cab ab b bb " * 3, 260), (README[:3000], 290)])
def test_small_tokenizer_is_byte_pair_encoding(text, n, tmp_path):
    """Against tiktoken's own, which is for teaching; and what is encoded comes back."""
    ours = figures.train_bpe(text, n, prepare_data.PATTERN)
    theirs = bpe_train(text, n, prepare_data.PATTERN, visualise=None)
    assert ours == sorted(theirs, key=theirs.get)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    figures.write_tokenizer(n + 1, tmp_path / "bpe", [tmp_path / "a.jsonl"])
    spec = json.loads((tmp_path / "bpe" / "meta.json").read_text())["tokenizer"]
    encoding = prepare_data.get_tokenizer(spec)
    assert encoding.decode(encoding.encode(text + "ß\n")) == text + "ß\n"
    assert encoding.n_vocab == n + 1 and max(encoding.encode(text)) < n
