"""What the pages say: the picture, the page of tokens, and the front page's commands and code."""

import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch

import model
import prepare_data
import rho
from prepare_data import get_tokenizer, load_meta

sys.path.append(str(Path(__file__).parents[1] / "results"))

import plots  # noqa: E402
import tables  # noqa: E402
import tokens_page  # noqa: E402

SHOWN = 100  # tokens on the page, of 8 * 16
RATIOS = {"ref": 1.0, "clm": 1.0, "clm-mixed": 1.0, "slm": 0.4, "slm-30": 0.3}
STEPS = [10, 20, 30]


@pytest.fixture
def out(tiny_data, tmp_path, monkeypatch):
    """A folder as rho.py leaves it: five runs with three evaluations each."""
    monkeypatch.setattr(tokens_page, "SHOWN", SHOWN)
    # With this seed no two tokens are equal where the kept ones end.
    rng = np.random.default_rng(1)
    same = {"data": str(tiny_data), "block_size": 16, "eval_windows": 8, "threshold": None}
    files = load_meta(tiny_data)["files"]
    for run, ratio in RATIOS.items():
        select = "all" if ratio == 1 else "excess"
        flags = {**same, "stage": run[:3], "select": select, "ratio": ratio}
        before = 5000 if select == "excess" else 0
        records = [{"flags": flags, "identity": {**flags, **files}, "tokens_before": before}]
        for step in STEPS:
            np.save(tmp_path / f"{run}-{step}.npy", np.float16(rng.random((8, 16))))
            right, loss = rng.random(2)
            answers = {"right": right, "questions": 50}
            records.append({"step": step, "tokens": 1000 * step, "val_loss": loss, **answers})
        (tmp_path / f"{run}.jsonl").write_text("\n".join(map(json.dumps, records)))
    return tmp_path


def stored(out, run):
    """The losses (3, 128) of a run."""
    return np.float32([np.load(out / f"{run}-{step}.npy").flatten() for step in STEPS])


def test_page_shows_the_stored_losses_beside_their_tokens(out, tiny_data):
    tokens_page.main([str(out)])
    data = (out / "tokens.html").read_text().split('id="data">')[1].split("</script>")[0]
    page = json.loads(data)
    assert list(page["runs"]) == ["slm", "clm", "clm-mixed", "slm-30"]
    for run, shown in page["runs"].items():
        assert np.allclose(shown["loss"], stored(out, run)[:, :SHOWN], atol=0.0051)
    assert np.allclose(page["ref"], stored(out, "ref")[-1, :SHOWN], atol=0.0051)

    # The first loss is that of the second token: nothing predicts the first.
    meta = load_meta(tiny_data)
    tokens = np.fromfile(tiny_data / "val_corpus.bin", meta["dtype"])[1 : SHOWN + 1]
    text = "".join(page["text"])
    assert text == get_tokenizer(meta["tokenizer"]).decode(tokens)
    assert "<<" in text and "<" not in data  # no text can end the element that it stands in


def test_kept_tokens_are_the_top_k_of_the_excess(out):
    page = tokens_page.page_data(out)
    # A run that trains on all tokens shows what SLM would keep.
    for run, k in {"slm": 51, "slm-30": 38, "clm": 51}.items():
        excess = stored(out, run) - stored(out, "ref")[-1]  # (3, 128)
        for kept, values in zip(page["runs"][run]["kept"], excess, strict=True):
            least = sorted(values)[-k]
            assert kept == [value >= least for value in values[:SHOWN]]


def test_picture_shows_the_logged_values_and_names_each_line(out):
    runs = plots.read_runs(out)
    picture = plots.runs_picture({run: [records] for run, records in runs.items()})
    for ax, key, times in zip(picture.axes, ("right", "val_loss"), (2, 1), strict=True):
        for line, (run, (header, *evaluations)) in zip(ax.lines, runs.items(), strict=True):
            x = [(header["tokens_before"] + record["tokens"]) / 1e6 for record in evaluations]
            y = [times * record[key] for record in evaluations]  # 2: in %, of 50 questions
            if run == "ref":  # a line across, where it ends
                x, y = [0, 0.035], [y[-1], y[-1]]
            assert np.allclose(line.get_xydata().T, [x, y])
        assert {text.get_text() for text in ax.texts} == {line.get_label() for line in ax.lines}
        assert len({line.get_linestyle() + line.get_marker() for line in ax.lines}) == 5


def test_lines_and_bands_are_mean_and_deviation_over_seeds(out):
    runs = {}
    for run, (header, *evaluations) in plots.read_runs(out).items():
        runs[run] = []
        for factor in (1, 1.1, 1.7):
            changed = [
                {**record, "val_loss": factor * record["val_loss"]} for record in evaluations
            ]
            runs[run].append([header, *changed])
    _, ax = plots.runs_picture(runs).axes
    bands = [band for band in ax.collections if band.get_facecolor().size]
    assert len(bands) == len(ax.lines) == 5
    for line, band, seeds in zip(ax.lines, bands, runs.values(), strict=True):
        # The last point of each line, and what the band spans there.
        losses = [records[-1]["val_loss"] for records in seeds]
        mean, deviation = statistics.mean(losses), statistics.stdev(losses)
        x, y = line.get_xydata()[-1]
        span = [edge for place, edge in band.get_paths()[0].vertices if place == x]
        assert np.allclose([y, min(span), max(span)], [mean, mean - deviation, mean + deviation])


@pytest.fixture
def tokens():
    """What tokens_page.py --save writes, at random: 5 pages, 3 evaluations."""
    rng = np.random.default_rng(2)
    n = 200
    return {
        "text": np.array([f" w{i}" for i in range(n)]),
        "kinds": rng.permutation(n // 5 * [*plots.KINDS][:5]),
        "starts": np.arange(n) % 40 == 0,
        "ref": np.float16(rng.random(n)),
        "clm": np.float16(rng.random((3, n))),
        "slm": np.float16(rng.random((3, n))),
        "tokens": np.array([1000, 2000, 3000]),
    }


def highest(losses, ref, k):
    """The numbers of the k tokens with the most excess."""
    excess = [float(loss) - float(least) for loss, least in zip(losses, ref, strict=True)]
    return sorted(range(len(excess)), key=lambda i: -excess[i])[:k]


def test_selection_picture_shows_shares_of_kinds_and_losses_of_one_set(tokens):
    tokens["kinds"][:9] = "chatter"  # every kind occurs
    left, right = plots.selection_picture(tokens, {"ratio": 0.3, "threshold": None}).axes
    assert {line.get_label() for line in left.lines} == set(tokens["kinds"])
    for line in left.lines:
        for at, (x, share) in enumerate(line.get_xydata()):
            kept = highest(tokens["slm"][at], tokens["ref"], 60)
            of_kind = [i for i in range(200) if tokens["kinds"][i] == line.get_label()]
            assert np.isclose(share, 100 * len({*kept} & {*of_kind}) / len(of_kind))
            assert np.isclose(x, tokens["tokens"][at] / 1e6)
    chosen = highest(tokens["clm"][0], tokens["ref"], 60)
    others = [i for i in range(200) if i not in chosen]
    sets = [("clm", chosen), ("clm", others), ("slm", chosen), ("slm", others)]
    for line, (run, numbers) in zip(right.lines, sets, strict=True):
        for at, loss in enumerate(line.get_ydata()):
            assert np.isclose(loss, statistics.mean(float(tokens[run][at][i]) for i in numbers))


def test_tokens_picture_sets_a_page_and_what_is_kept_of_it_in_bold(tokens):
    tokens["kinds"][:40] = "noise"  # the second page is the first with every kind
    (ax,) = plots.tokens_picture(tokens, {"ratio": 0.3, "threshold": None}).axes
    _, kept_sign, *texts = ax.texts  # after the title, the legend
    assert kept_sign.get_weight() == "bold"
    texts = [text for text in texts if re.fullmatch(r"w\d+", text.get_text())]
    assert [text.get_text() for text in texts] == [f"w{i}" for i in range(41, 80)]
    kept = {f"w{i}" for i in highest(tokens["slm"][0], tokens["ref"], 60) if 40 < i < 80}
    assert {text.get_text() for text in texts if text.get_weight() == "bold"} == kept


# Each panel of the sweeps: what is on the axis, SLM, CLM.
SWEEPS = [
    "20 keep-0.2 clm, 50 slm clm, 80 keep-0.8 clm, 100 clm clm",
    "0 w0-slm w0-clm, 75 slm clm, 90 w0.9-slm w0.9-clm",
    "0 d0-slm d0-clm, 1 slm clm, 6 d6-slm d6-clm",
    "ref slm clm, ref-3x slm-ref-3x clm, ref-short slm-ref-short clm",
]


def test_sweeps_picture_shows_the_last_answers_of_each_run(tmp_path):
    right = {}
    for run in re.findall(r"[a-z][\w.-]*", str(SWEEPS)):
        right.setdefault(run, 3 * len(right) + 1)
        record = {"right": right[run], "questions": 200}
        log = "\n".join(map(json.dumps, [{}, {**record, "right": 0}, record]))
        (tmp_path / f"{run}.jsonl").write_text(log)
    for ax, panel in zip(plots.sweeps_picture(tmp_path).axes, SWEEPS, strict=True):
        places, slm, clm = zip(*map(str.split, panel.split(",")), strict=True)
        # The references are better in this order.
        x = [right[place] / 2 if place in right else float(place) for place in places]
        for line, runs in zip(ax.lines, (slm, clm), strict=True):
            assert np.allclose(line.get_xydata().T, [x, [right[run] / 2 for run in runs]])
    (tmp_path / "d6-slm.jsonl").unlink()
    with pytest.raises(SystemExit, match="d6-slm.jsonl is missing"):
        plots.sweeps_picture(tmp_path)


@pytest.mark.parametrize(
    "script, files, content, says",
    [
        (plots, "*.jsonl", "", "python rho.py --out"),
        (plots, "clm.jsonl", '{"flags": ', "clm.jsonl is missing or damaged"),
        (tokens_page, "ref.jsonl", "", "python rho.py --stage ref --out"),
        (tokens_page, "[cs]*.jsonl", "", "python rho.py --out"),
        (tokens_page, "slm-20.npy", "\x93NUMPY", "slm-20.npy is missing or damaged"),
    ],
)
def test_what_is_missing_or_damaged_is_named_in_one_line(out, script, files, content, says):
    for path in out.glob(files):
        path.write_text(content)
    with pytest.raises(SystemExit, match=f"^[^\n]*{says}[^\n]*$"):
        script.main([str(out)])


def test_losses_of_another_text_are_not_shown(out):
    log = out / "clm.jsonl"
    log.write_text(log.read_text().replace('"val_corpus.bin": "', '"val_corpus.bin": "0'))
    assert "clm" not in tokens_page.page_data(out)["runs"]


# ---- the front page ------------------------------------------------------------------------------

ROOT = Path(rho.__file__).parent
README = (ROOT / "README.md").read_text()


def section(title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.M | re.S)[1]


def commands(script, text):
    """The arguments of each line that calls a script, $NAMES filled in."""
    variables = dict(re.findall(r'^([A-Z]+)="(.*)"$', text, re.M))
    for line in re.findall(rf"^python {script} ?(.*)", text, re.M):
        for name, value in variables.items():
            line = line.replace(f"${name}", value)
        yield shlex.split(line, comments=True)


def test_every_command_of_rho_py_is_one_and_what_is_named_exists():
    lines = [*commands("rho.py", README)]
    lines += [text.split() for text in re.findall(r"python rho\.py(.*?)(?:  |\n)", rho.__doc__)]
    assert len(lines) > 12
    for arguments in lines:
        cfg = rho.parse(arguments)
        if cfg.stage not in ("all", "table"):
            rho.run_config(cfg, cfg.stage)
    for name in re.findall(r"(?:results|tests)/[\w./]*\w|\b\w+\.py\b", README):
        assert (ROOT / name).exists(), name


def test_the_commands_for_your_own_text_run(tmp_path, tiny_data, monkeypatch):
    """Each as it is printed, with a small model and few tokens."""
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps({"text": f"Line {i} of {i * i} good words."}) for i in range(400)]
    (tmp_path / "good.jsonl").write_text("\n".join(rows))
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "a.txt").write_text("\n".join(f"{i} pages, dirty." for i in range(9000)))
    pandas.DataFrame({"text": [f"Row {i}" for i in range(300)]}).to_parquet("more.parquet")
    text = section("Your own text")
    for arguments in commands("prepare_data.py", text):
        prepare_data.main([*arguments, "--tokenizer", str(tiny_data / "meta.json")])
    small = "--block_size 32 --n_layer 1 --n_embd 16 --n_inner 32 --n_head 2 --evals 1"
    small += " --tokens 512 --ref_tokens 512 --eval_windows 2 --device cpu"
    for arguments in commands("rho.py", text):
        rho.main([*arguments, *small.split()])
    assert {path.stem for path in (tmp_path / "out" / "mine").glob("*.pt")} == {
        *("ref", "clm", "slm", "clm-mixed")
    }
    for arguments in commands("model.py", text):
        model.main(arguments)
    assert (tmp_path / "FOLDER" / "config.json").exists()


@pytest.mark.parametrize("ratio", [0.3, 0.6, 1.0])
def test_the_code_for_your_own_trainer_equals_rho_py(ratio):
    code = re.search(r"```python\n(.*?)```", section("In your own trainer"), re.S)[1]
    there = {"torch": torch, "F": torch.nn.functional}
    exec(code, there)
    logits = torch.randn(3, 9, 11, requires_grad=True)
    labels = torch.randint(11, (3, 9))
    labels[0, 4:] = -100
    ref_losses = there["token_losses"](torch.randn(3, 9, 11), labels)
    loss = there["slm_loss"](logits, labels, ref_losses, ratio)
    valid = labels[:, 1:] != -100
    student_loss = rho.token_loss(logits[:, :-1], labels[:, 1:].clamp(min=0))
    score = rho.score_tokens("excess", student_loss, ref_losses)
    loss_sum, mask_sum = rho.selective_loss(
        student_loss, rho.select_tokens(score, ratio, None, valid)
    )
    torch.testing.assert_close(loss, loss_sum / mask_sum)
    gradients = [torch.autograd.grad(x, logits)[0] for x in (loss, loss_sum / mask_sum)]
    torch.testing.assert_close(*gradients)


def test_the_demos_numbers_are_those_of_its_logs():
    right = []
    for run in ("ref", "clm", "slm", "clm-mixed", "slm-random"):
        *_, last = plots.read_log(ROOT / "results" / "demo" / f"{run}.jsonl")
        right.append(str(last["right"]))
    assert re.findall(r"(\d+) of 500", rho.__doc__) == right
    [sentence] = re.findall(r"It ends with .*", README)
    assert re.findall(r"(\d+)(?: of 500 answers right)? for", sentence) == right[:4]


def test_a_missing_package_is_one_line():
    def main():
        raise ModuleNotFoundError("No module named 'tokenizers'", name="tokenizers")

    with pytest.raises(SystemExit, match="pip install tokenizers"):
        prepare_data.run_script(main)


# ---- the published tables ------------------------------------------------------------------------

PAGES = {path: path.read_text() for path in (tables.FRONT_PAGE, tables.HERE_PAGE)}


@pytest.mark.parametrize("name", tables.TABLES)
def test_a_table_is_what_the_logs_say(name):
    path, table = tables.TABLES[name]
    assert tables.publish(PAGES[path], name, table(tables.Logs())) == PAGES[path]


def test_each_decimal_of_the_prose_stands_in_a_table():
    """So that no sentence keeps a number of older runs."""
    numbers = r"\d+\.\d+"
    pages = "\n".join(PAGES.values())
    known = set()
    for line in re.findall(r"^\|.*", pages, re.M):
        known |= set(re.findall(numbers, line))
    prose = re.sub(r"```.*?```|^\|.*?$|`[^`]*`|\]\([^)]*\)", "", pages, flags=re.M | re.S)
    assert set(re.findall(numbers, prose)) <= known


def test_the_sentence_on_seeds_6_and_7_is_of_their_logs():
    logs = tables.Logs()
    [sentence] = re.findall(r"Seeds 6 and 7.*? of 500 (.*?)\. ", PAGES[tables.HERE_PAGE])
    right = [
        logs.last(seed, run)["right"] for run in ("slm", "clm", "started", "ref") for seed in (6, 7)
    ]
    assert re.findall(r"\d+", sentence) == list(map(str, right))


def test_all_logs_are_of_the_commit_that_the_page_names():
    logs = [path for path in tables.Logs().root.rglob("*.jsonl")]
    commits = {json.loads(path.read_text().split("\n")[0])["commit"] for path in logs}
    assert len(logs) > 40 and len(commits) == 1
    assert f"commit {commits.pop()}" in PAGES[tables.HERE_PAGE]


def made_logs(folder, **runs):
    """A log for each run and seed, from {run: {seed: [(tokens, right of 100, loss), ...]}}."""
    for run, seeds in runs.items():
        for seed, points in seeds.items():
            header = {"flags": {"lr": 1e-3}, "tokens_before": 30}
            keys = ("tokens", "right", "val_loss")
            records = [dict(zip(keys, point, strict=True), questions=100) for point in points]
            path = folder / f"seed{seed}" / f"{run}.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_text("\n".join(map(json.dumps, [header, *records])))
    return tables.Logs(folder)


def test_points_are_paired_by_seed_with_students_interval():
    # Differences 1, 2, 3: mean 2, standard deviation 1, and 4.303 / sqrt(3) = 2.484.
    assert tables.points([11, 22, 33], [10, 20, 30]) == "+2.0 (-0.5 to 4.5)"
    assert tables.spread([1, 2, 3], 1) == "2.0 ± 1.0"


def test_fewer_tokens_are_read_off_the_line_between_two_evaluations(tmp_path):
    clm = {1: [(100, 10, 3.0), (200, 20, 2.0)]}
    # At 20 right answers in the middle between 50 and 100 tokens; at a loss of 2.0 never.
    slm = {1: [(50, 10, 3.0), (100, 30, 2.5), (200, 40, 2.1)]}
    logs = made_logs(tmp_path, clm=clm, slm=slm, ref={1: [(60, 90, 1.0)]})
    assert tables.fewer(logs, 1, "clm", "slm", "right", in_all=False) == pytest.approx(200 / 75)
    # The reference read 60, and scoring 75 tokens costs as much as 25.
    assert tables.fewer(logs, 1, "clm", "slm", "right", in_all=True) == pytest.approx(200 / 160)
    assert np.isnan(tables.fewer(logs, 1, "clm", "slm", "val_loss", in_all=False))


def test_dynamics_sorts_tokens_by_the_line_through_their_losses(tmp_path):
    # Six evaluations, the first of which is too early: its losses would turn each of the lines.
    early, x = [[9, 0, 9, 0, 9, 9]], np.arange(5)[:, None]
    slopes = np.array([0, 0.06, -0.06, 0, 0.04, -0.04])  # over four steps: more than 0.2, or less
    losses = np.float16([*early, *(np.array([5, 0.5, 5, 0.1, 0.5, 5]) + slopes * x)])
    tokens = [100_000, *range(500_000, 1_000_000, 100_000)]
    np.savez(tmp_path / "tokens.npz", clm=losses, tokens=tokens)
    # The mean of the last losses is 2.6. High: the first and the last; low: two.
    row = tables.dynamics(tables.Logs(tmp_path)).split("\n")[2]
    assert row == "| here | 33 % | 17 % | 17 % | 33 % |"


def test_rates_stand_beside_their_answers_with_the_chosen_one_bold(tmp_path):
    runs = {"slm": 50, "slm-lr5e-4": 40, "slm-lr2e-3": 45}
    logs = made_logs(tmp_path, **{run: {1: [(9, right, 1.0)]} for run, right in runs.items()})
    [row] = tables.with_rates(logs, {"slm": "SLM"}, [{}])
    assert list(row.values()) == ["5: 40.0, **10: 50.0**, 20: 45.0"]


@pytest.mark.parametrize("variant", sorted((ROOT / "results" / "variants").glob("*.diff")))
def test_a_variant_fits_the_scripts_as_they_are(variant):
    checked = subprocess.run(["git", "apply", "--check", variant], cwd=ROOT, capture_output=True)
    assert checked.returncode == 0, checked.stderr


def test_run_sh_makes_each_run_that_a_table_or_picture_shows(tmp_path):
    """Its commands are written down in place of being run, and read by rho.py."""
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/commands')
    fake.chmod(0o755)
    there = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PACK": "pack"}
    run_sh = ROOT / "results" / "run.sh"
    functions = set(re.findall(r"^(\w+)\(\) \{$", run_sh.read_text(), re.M))
    for name in functions - {"setup", "collect", "real_base", "all_jobs"}:
        subprocess.run(["bash", run_sh, name, "1"], env=there, check=True)
    made = {}
    for line in (tmp_path / "commands").read_text().splitlines():
        _, *arguments = shlex.split(line)
        run = rho.run_config(rho.parse(arguments), rho.parse(arguments).stage)
        key = (run.out, run.name)
        assert made.get(key, run) == run  # one name, one run
        made[key] = run
    shown = {*tables.FRONT, *tables.MAIN, *tables.DIRTIER, *tables.RULES, *plots.MAIN}
    shown |= {*plots.KEPT.values(), *plots.REFERENCES}
    shown |= {
        f"{name}{arm}"
        for name in [*plots.WRONG.values(), *plots.DIRT.values()]
        for arm in ("clm", "slm")
    }
    assert {("out/seed1", run) for run in shown} <= made.keys()
    assert {("out/real/seed1", run) for run in tables.REAL} <= made.keys()
