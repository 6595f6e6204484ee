"""What the pages say can be done: files, flags, numbers, the code in the text, the paper's own run.

The tables on the pages are test_results.py's.
"""

import contextlib
import importlib
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import eval_math
import model as model_py
import prepare_data
import rho
from model import load_model

ROOT = Path(rho.__file__).parent
sys.path.insert(0, str(ROOT / "results"))

import checks  # noqa: E402
import experiments  # noqa: E402
from logs import read_log  # noqa: E402

README = (ROOT / "README.md").read_text()
PAGES = {"README.md": README, "results/README.md": (ROOT / "results/README.md").read_text()}
SCRIPTS = {"rho": rho, "prepare_data": prepare_data, "eval_math": eval_math, "model": model_py}


def section(title):
    """A section of the front page, from its heading to the next."""
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.M | re.S)[1]


def code_block(title, language=""):
    return re.search(rf"^```{language}\n(.*?)^```", section(title), re.M | re.S)[1]


# ---- files, flags and numbers that are named -----------------------------------------------------


def test_the_front_page_is_short():
    assert len(README.splitlines()) <= 190
    assert len(README.split()) <= 2070


def slug(heading):
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_files_and_headings_that_are_linked_exist(page):
    folder = (ROOT / page).parent
    links = [link for link in re.findall(r"\]\(([^)]+)\)", PAGES[page]) if ":" not in link]
    assert len(links) > 5
    for link in links:
        path, _, anchor = link.partition("#")
        target = (folder / path).resolve() if path else ROOT / page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)", target.read_text(), re.M)
            assert anchor in map(slug, headings), link


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_in_text_and_code_exist(page):
    named = re.findall(r"(?<![\w/.-])((?:results|tests)/[\w./-]*\w|\w+\.py)\b", PAGES[page])
    assert len(named) > 3
    for name in named:
        places = [ROOT / name, ROOT / "results" / name]
        assert any(place.exists() for place in places), name


def help_of(script):
    """What `python SCRIPT -h` prints."""
    name = script.removeprefix("results/").removesuffix(".py")
    if name in ("plots", "tokens_page"):
        pytest.importorskip("matplotlib", reason="extra plots is not installed")
    module = SCRIPTS.get(name) or importlib.import_module(name)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as stopped:
        module.main(["-h"])
    assert stopped.value.code == 0
    return printed.getvalue()


def command_lines():
    """{script: [the rest of each of its command lines on both pages]}"""
    found = {}
    command = r"(?:python|nproc_per_node=\d+) ((?:results/)?\w+\.py)\b([^\n`#&]*)"
    for script, rest in re.findall(command, "\n".join(PAGES.values())):
        found.setdefault(script, []).append(rest)
    found["rho.py"] += re.findall(r'^(?:RUN|MINE)="(.*)"', README, re.M)
    return found


@pytest.mark.parametrize("script", command_lines())
def test_flags_of_command_lines_exist(script):
    helped = help_of(script)
    for flag in re.findall(r"--\w+", " ".join(command_lines()[script])):
        assert re.search(rf"{flag}\b", helped), flag


OTHER_PROGRAMS = {"--nproc_per_node"}  # torchrun's


def test_flags_that_are_named_alone_exist():
    """Between backticks, without their script: one of the four scripts has them."""
    known = " ".join(help_of(f"{name}.py") for name in SCRIPTS)
    pieces = re.findall(r"`([^`\n]*)`", "\n".join(PAGES.values()))
    alone = [piece for piece in pieces if "python results/" not in piece]
    flags = set(re.findall(r"--\w+", " ".join(alone))) - OTHER_PROGRAMS
    assert len(flags) > 15
    for flag in flags:
        assert re.search(rf"{flag}\b", known), flag


def test_experiments_that_are_named_exist():
    text = PAGES["results/README.md"]
    names = re.findall(r"results/experiments\.py ([a-z][\w-]*)", text)
    known = {*experiments.GROUPS, *experiments.DEMO, *experiments.REAL}
    assert len(names) > 10 and set(names) <= known


def test_targets_of_make_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"(?:^|`)make ([a-z-]+)", "\n".join(PAGES.values()), re.M)
    assert "demo" in targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_hours_and_memory_on_the_front_page_are_those_of_the_tables():
    hours = {row[0]: round(float(row[1].split()[0])) for row in [*checks.paper_table(ROOT)][1:]}
    run = code_block("The paper's own run")
    for arm, stages in {"clm": ["student, CLM"], "slm": ["scoring", "student, SLM 60"]}.items():
        comment = re.search(rf"--stage {arm} .*#(.*)", run)[1]
        wanted = [next(n for name, n in hours.items() if name.startswith(s)) for s in stages]
        assert [int(n) for n in re.findall(r"(\d+) h", comment)] == wanted
    reference = re.search(r"--stage ref .*#.*?(\d+) h", run)[1]
    assert int(reference) == hours["reference: 3 epochs of 0.5 B tokens"]

    rows = {tuple(row[:3]): row[3:] for row in [*checks.memory_table(ROOT / "results")][1:]}
    here, there = re.search(r"(\d+) GB here, (\d+) GB there", README).groups()
    assert rows["TinyLlama 1.1 B", "adamw", "1"][2].startswith(f"8 windows: {here}.")
    small = rows["SmolLM2 135 M", "adamw", "1"][0]
    assert small.startswith("8 windows: ") and round(float(small.split()[2])) == int(there)
    assert "TinyLlama fits on 24 GB with `--recompute --micro_batch 2`" in README
    assert rows["TinyLlama 1.1 B", "adamw", "1"][1].startswith("2 windows: ")
    assert all(cell.startswith("no: ") for cell in rows["Mistral 7 B", "adamw", "1"])


# ---- try it yourself -----------------------------------------------------------------------------

VARIANTS = sorted((ROOT / "results" / "variants").glob("*.diff"))


def test_each_variant_applies_to_rho_py(tmp_path):
    """That they train is test_train.py's."""
    assert "results/variants" in section("Try it yourself") and len(VARIANTS) > 10
    shutil.copy(rho.__file__, tmp_path)
    for diff in VARIANTS:
        subprocess.run(["git", "apply", "--check", str(diff)], cwd=tmp_path, check=True)


# ---- in your own trainer -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("safetensors", reason="extra hf is not installed")
    pytest.importorskip("tokenizers", reason="extra hf is not installed")
    transformers = pytest.importorskip("transformers", reason="extra dev is not installed")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def tiny_llama(transformers, vocab_size, seed=0, **settings):
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
    }
    config = transformers.LlamaConfig(vocab_size=vocab_size, **sizes, **settings)
    return transformers.LlamaForCausalLM(config)


def labels_with_holes(ids):
    labels = ids.clone()
    labels[torch.rand(ids.shape) < 0.3] = -100
    labels[0, :5] = -100
    return labels


@pytest.mark.parametrize("ratio", [0.6, 1.0])
def test_the_code_for_a_trainer_is_rho_py(transformers, ratio):
    source = code_block("In your own trainer", "python")
    assert len([line for line in source.splitlines() if line.strip()]) <= 15
    theirs = {"torch": torch, "F": F}
    exec(source, theirs)
    student = tiny_llama(transformers, 50)
    reference = tiny_llama(transformers, 50, seed=1)
    ids = torch.randint(50, (3, 20))
    labels = labels_with_holes(ids)
    with torch.no_grad():
        ref_losses = theirs["token_losses"](reference(ids).logits, labels)
    loss = theirs["slm_loss"](student(ids).logits, labels, ref_losses, ratio)
    loss.backward()
    gradients = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()

    targets = ids[:, 1:]
    valid = labels[:, 1:] != -100
    student_loss = rho.token_loss(student(ids).logits[:, :-1], targets)
    with torch.no_grad():
        ref_loss = rho.token_loss(reference(ids).logits[:, :-1], targets)
    score = rho.score_tokens("excess", student_loss.detach(), ref_loss)
    mask = rho.select_tokens(score, ratio, valid=valid)
    ours = rho.selective_loss(student_loss, mask)
    ours.backward()
    assert mask.sum() == round(ratio * int(valid.sum())) and not mask[~valid].any()
    torch.testing.assert_close(loss, ours)
    for theirs_grad, parameter in zip(gradients, student.parameters(), strict=True):
        torch.testing.assert_close(theirs_grad, parameter.grad, atol=1e-6, rtol=1e-4)


def test_the_code_for_a_trainer_takes_a_batch_without_labels(transformers):
    theirs = {"torch": torch, "F": F}
    exec(code_block("In your own trainer", "python"), theirs)
    logits = torch.randn(2, 6, 9, requires_grad=True)
    loss = theirs["slm_loss"](logits, torch.full((2, 6), -100), torch.zeros(2, 5))
    loss.backward()
    assert loss == 0 and not logits.grad.any()


# ---- the paper's own run, at toy size ------------------------------------------------------------

# What a command is given in place of the size that it is published with. All else stays.
TOY_SIZES = {
    "--max_tokens": "30000",
    "--block_size": "128",
    "--batch_size": "8",
    "--micro_batch": "4",
    "--ref_tokens": "4096",
    "--tokens": "8192",
    "--evals": "2",
    "--max_new_tokens": "8",
}
WORDS = "seven boxes hold red apples and Nina sells some of them for two coins at market".split()
MMLU = {"subject": "astronomy", "choices": ["x", "y", "z", "w"], "answer": 2}
QUESTIONS = {  # one question for each of the paper's nine tasks, in its public form
    "gsm8k": {"question": "What is 2 + 2?", "answer": "2 + 2 = 4. #### 4"},
    "math": {"problem": "What is $1 + 2$?", "answer": "3", "solution": r"It is $\boxed{3}$."},
    "svamp": {"Body": "Ida has 3 hens", "Question": "How many?", "Answer": "3"},
    "asdiv": {"body": "Ida has 3 hens.", "question": "How many?", "answer": "3 (hens)"},
    "mawps": {"input": "What is 4 - 1?", "target": "3"},
    "tabmwp": {"question": "How many hens?", "table": "hens | 3", "answer": "3"},
    "mathqa": {"Problem": "1 + 1?", "options": "a ) 1 , b ) 2", "correct": "b"},
    "mmlu_stem": {"question": "Which?", **MMLU},
    "sat": {"Question": "Which?", "options": "A) 1 B) 2", "Answer": "A"},
}


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_texts(path, n, seed):
    rng = np.random.default_rng(seed)
    texts = [f"{path.stem} {i}: " + " ".join(rng.choice(WORDS, 60)) + "." for i in range(n)]
    write_lines(path, [{"text": text} for text in texts])


def write_base(transformers, folder, path):
    """A random Llama with a tokenizer of TinyLlama's kind, in place of `hf download`."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(spaces)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train([str(path)], trainer)
    ends = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends)
    wrapped.save_pretrained(folder)
    llama = tiny_llama(transformers, 400, max_position_embeddings=2048)
    llama.save_pretrained(folder)
    # The README downloads all but these files.
    line = next(line for line in commands() if line[:2] == ["hf", "download"])
    assert line[line.index("--local-dir") + 1] == folder.name
    (pattern,) = line[line.index("--exclude") + 1 :]
    (folder / "pytorch_model.bin").write_text("the same weights once more")
    left_out = [file for file in folder.iterdir() if fnmatch(file.name, pattern)]
    assert [file.name for file in left_out] == ["pytorch_model.bin"]
    left_out[0].unlink()


def commands():
    """The commands of "The paper's own run" as lists of words, with RUN filled in."""
    lines = []
    shared = []
    for line in code_block("The paper's own run").splitlines():
        words = shlex.split(line, comments=True)
        if words[0].startswith("RUN="):
            shared = words[0].removeprefix("RUN=").split()
        else:
            at = words.index("$RUN") if "$RUN" in words else len(words)
            lines.append(words[:at] + (shared if at < len(words) else []) + words[at + 1 :])
    return lines


def at_toy_size(words):
    """(script, flags) of a command of this section, with only what must be replaced."""
    program, script, *flags = words
    assert program == "python"
    for i, flag in enumerate(flags):
        if flag in TOY_SIZES:
            flags[i + 1] = TOY_SIZES[flag]
    if "--recipe" in flags:  # else from the hub
        at = flags.index("--recipe")
        flags[at : at + 2] = ["--reference", "good.jsonl", "--corpus", "pages.jsonl"]
    if script == "eval_math.py":
        flags += ["--file", "sets"]
    if script in ("rho.py", "eval_math.py"):
        flags += ["--device", "cpu"]
    return script, flags


def run(script, flags):
    """What a command prints; it must end well."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        SCRIPTS[script.removesuffix(".py")].main(flags)
    return printed.getvalue()


@pytest.fixture(scope="module")
def paper_run(transformers, tmp_path_factory):
    """(folder, {stage or script: what it printed}): each command of the section, in order."""
    folder = tmp_path_factory.mktemp("paper")
    write_texts(folder / "good.jsonl", 60, 0)
    write_texts(folder / "pages.jsonl", 200, 1)
    (folder / "sets").mkdir()
    for task, row in QUESTIONS.items():
        write_lines(folder / "sets" / f"{task}.jsonl", [row])
    said = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for words in commands():
            if words[:2] == ["hf", "download"]:
                write_base(transformers, folder / "base", folder / "good.jsonl")
            elif words[0] != "pip":
                script, flags = at_toy_size(words)
                name = flags[1] if script == "rho.py" else script
                said[name] = run(script, flags)
    torch.set_num_threads(threads)
    return folder, said


def test_the_paper_s_commands_run_in_their_order(paper_run):
    folder, said = paper_run
    arms = ["ref", "slm", "clm"]
    assert list(said) == ["prepare_data.py", *arms, "table", "eval_math.py", "model.py"]
    logs = {arm: read_log(folder / f"out/math/{arm}.jsonl") for arm in ("ref", "slm", "clm")}
    for arm, (header, *evaluations) in logs.items():
        config = header["config"]
        wanted = {"ref": (5e-5, 4096), "clm": (8e-5, 8192), "slm": (8e-5, 8192)}[arm]
        assert (config["lr"], evaluations[-1]["tokens"]) == wanted
        assert config["optimizer"] == "adamw" and config["init"] == "base"
        assert np.isfinite(evaluations[-1]["val_loss"]) and "right" not in evaluations[-1]
    assert logs["clm"][-1]["trained"] == 8192
    assert logs["slm"][-1]["trained"] == 16 * round(0.6 * 4 * 128)  # micro-batches
    for arm in logs:
        assert re.search(rf"^ *{arm} ", said["table"], re.M)


def test_the_paper_s_nine_tasks_are_answered(paper_run):
    _, said = paper_run
    for task in eval_math.TASKS:
        assert re.search(rf"^{task}: [01] of 1 right", said["eval_math.py"], re.M), task
    assert re.search("^mean ", said["eval_math.py"], re.M)


@torch.no_grad()
def test_the_student_is_exported_with_its_logits_and_ids(paper_run, transformers):
    folder, _ = paper_run
    exported = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf/slm")
    ours, checkpoint = load_model(folder / "out/math/slm.pt")
    encoding = prepare_data.get_tokenizer(checkpoint["tokenizer"])
    text = "Nina sells seven apples."
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "hf/slm")
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert ids == encoding.encode_ordinary(text)
    tokens = torch.tensor([ids])
    torch.testing.assert_close(
        exported(tokens).logits.float(), ours.head(ours(tokens)), atol=5e-5, rtol=1e-5
    )


def weights_of(path):
    return load_model(path)[0].state_dict()


def stage_flags(stage):
    words = next(words for words in commands() if words[2:4] == ["--stage", stage])
    return at_toy_size(words)[1]


def test_recompute_changes_no_weight(paper_run, monkeypatch):
    folder, _ = paper_run
    monkeypatch.chdir(folder)
    recompute, *micro_batch = re.search(r"`(--recompute) (--micro_batch) (2)`", README).groups()
    flags = [*stage_flags("slm"), *micro_batch, "--tokens", "2048", "--evals", "1"]
    run("rho.py", [*flags, "--name", "kept"])
    run("rho.py", [*flags, "--name", "again", recompute])
    asked = [read_log(folder / f"out/math/{run}.jsonl")[0]["config"] for run in ("kept", "again")]
    assert [config["recompute"] for config in asked] == [False, True]
    kept = weights_of(folder / "out/math/kept.pt")
    again = weights_of(folder / "out/math/again.pt")
    start = weights_of(folder / "base")
    for name, weight in kept.items():
        torch.testing.assert_close(again[name], weight, atol=1e-6, rtol=1e-5)
    assert any(not torch.allclose(start[name], weight, atol=1e-4) for name, weight in kept.items())


def test_eight_cards_are_torchrun_in_place_of_python(paper_run, two_processes):
    """With two: the environment that torchrun gives its processes, gloo, the CLM command."""
    assert "`torchrun --nproc_per_node=8 rho.py` for `python rho.py`" in README
    folder, _ = paper_run
    command = [sys.executable, rho.__file__, *stage_flags("clm"), "--name", "two"]
    processes = []
    for own in two_processes():
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, cwd=folder, env=own, **pipes))
    said = [process.communicate(timeout=600) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    one, two = (read_log(folder / f"out/math/{run}.jsonl") for run in ("clm", "two"))
    assert two[0]["world"] == 2 and one[0]["world"] == 1
    for ours, theirs in zip(one[1:], two[1:], strict=True):
        assert theirs["val_loss"] == pytest.approx(ours["val_loss"], abs=1e-4)


BENCHMARKS = """mmlu bbh_cot_fewshot minerva_math gsm8k mbpp humaneval agieval_en arc_challenge
arc_easy boolq piqa hellaswag winogrande openbookqa tydiqa_goldp""".split()


def test_the_harness_is_asked_the_paper_s_fifteen_benchmarks():
    """Its task names and flags, as text: nothing is loaded here."""
    line = re.search(r"^HF_ALLOW_CODE_EVAL=1 (lm_eval run .*)", PAGES["results/README.md"], re.M)[1]
    words = shlex.split(line)
    values = dict(zip(words[2:], words[3:], strict=False))
    assert values["--tasks"].split(",") == BENCHMARKS and len(BENCHMARKS) == 15
    assert values["--model"] == "hf" and "--confirm_run_unsafe_code" in words
    # A prompt begins with a document's start, as in training.
    assert values["--model_args"].split(",") == [
        "pretrained=hf/slm",
        "dtype=bfloat16",
        "add_bos_token=True",
    ]
