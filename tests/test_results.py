"""What the pages say: the picture, the page of tokens, and the front page's commands and code."""

import json
import re
import shlex
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
        records = [{"flags": flags, "identity": {**flags, **files}}]
        for step in STEPS:
            np.save(tmp_path / f"{run}-{step}.npy", np.float16(rng.random((8, 16))))
            right, loss = rng.random(2)
            records.append({"step": step, "tokens": 1000 * step, "right": right, "val_loss": loss})
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
    for ax, key in zip(plots.runs_picture(runs).axes, ("right", "val_loss"), strict=True):
        for line, (run, records) in zip(ax.lines, runs.items(), strict=True):
            points = [[record["tokens"] / 1e6, record[key]] for record in records[1:]]
            if run == "ref":  # a line across, where it ends
                points = [[0, points[-1][1]], points[-1]]
            assert line.get_xydata().tolist() == points
        assert {text.get_text() for text in ax.texts} == {line.get_label() for line in ax.lines}
        assert len({line.get_linestyle() + line.get_marker() for line in ax.lines}) == 5


@pytest.mark.parametrize(
    "script, files, content, says",
    [
        (plots, "*.jsonl", "", "python rho.py --out"),
        (plots, "clm.jsonl", '{"flags": ', "clm.jsonl is damaged"),
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


def test_the_demos_numbers_are_those_of_its_logs(capsys):
    rho.show_table(ROOT / "results" / "demo")
    table = capsys.readouterr().out.strip("\n").split("\n\n")[0]
    assert table in README
    right = []
    for run in ("ref", "clm", "slm", "clm-mixed", "slm-random"):
        last = (ROOT / "results" / "demo" / f"{run}.jsonl").read_text().splitlines()[-1]
        right.append(f"{json.loads(last)['right']} of 500")
    assert re.findall(r"\d+ of 500", rho.__doc__) == right


def test_a_missing_package_is_one_line():
    def main():
        raise ModuleNotFoundError("No module named 'tokenizers'", name="tokenizers")

    with pytest.raises(SystemExit, match="pip install tokenizers"):
        prepare_data.run_script(main)
