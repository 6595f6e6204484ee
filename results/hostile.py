"""Hostile inputs for the public functions: part fuzz of faults.py.

Each function has a maker of inputs, which is given a random.Random and a folder with the demo's
data in miniature. A crash is any exception that the function does not document, or a result that
breaks what it promises.
"""

import base64
import copy
import json
import math
import re
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from tokens_page import write_page  # noqa: E402

import eval_math  # noqa: E402
import rho  # noqa: E402
from prepare_data import InputError, get_tokenizer, load_meta  # noqa: E402

# ---- fuzz: makers of hostile inputs, and what is called with them ---------------------------------

TEXTS = r"""#### | \boxed{ | } | { | \frac | the answer is | $ | - | 1/0 | 7 | 12,345 | 2 1/2 | % | = | x | .
e9 | 1e999 | nan | inf | \sqrt | ( | ) | [ | ] | \left | \right | \begin{pmatrix} | & | \\ | ^ | _ | !
<<3+4=7>> | </script> | <!-- | <script> | @DATA@ | ½ | ² | ٣ | ∞ | é | 🙂 | \text{ and } | \infty | , """
TEXTS = [*re.split(r" \| |\n", TEXTS), "\n", "\0", "\ud800", "\u2028", " ", "9" * 400, "(" * 60]
VALUES = [None, True, -1, 0, 3, 2**70, 1e308, math.nan, math.inf, "", "x", "(", [], {}, [[]], "\0"]
SHAPES = [(), (0,), (1,), (7,), (0, 4), (3, 0), (2, 3), (1, 1, 4), (2, 2, 2, 2)]
NUMBERS = [math.nan, math.inf, -math.inf, 3e38, -3e38, 0.0, -0.0, 1e-45]


def hostile_text(rng):
    repeat = rng.choice([1, 1, 1, 1, 1, 1, 1, 300])
    return "".join(rng.choices(TEXTS, k=rng.randrange(12))) * repeat


def damaged_tree(rng, tree):
    """A copy of what a JSON file holds with one value, at any depth, replaced or taken out."""
    tree = copy.deepcopy(tree)
    node = tree
    while True:
        key = rng.choice([*node] if isinstance(node, dict) else range(len(node)))
        if not isinstance(node[key], (dict, list)) or not node[key] or rng.random() < 0.3:
            break
        node = node[key]
    if rng.random() < 0.3:
        del node[key]
    else:
        node[key] = rng.choice(VALUES)
    return tree


def damaged_bytes(rng, whole):
    """Cut short, emptied, with one bit flipped, or replaced by garbage of the same length."""
    at = rng.randrange(max(1, len(whole)))
    flipped = bytearray(whole)
    if whole:
        flipped[at] ^= 1 << rng.randrange(8)
    return rng.choice([whole[:at], b"", bytes(flipped), rng.randbytes(len(whole))])


def hostile_tensor(rng, shape):
    generator = np.random.default_rng(rng.getrandbits(32))
    values = torch.from_numpy(np.asarray(generator.normal(size=shape)))
    if values.numel() and rng.random() < 0.5:
        values.view(-1)[rng.randrange(values.numel())] = rng.choice(NUMBERS)
    dtype = rng.choice([torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16])
    return values.to(dtype).contiguous()


def scores_input(rng, place):
    shape = rng.choice(SHAPES)
    given = [hostile_tensor(rng, shape) for _ in range(4)]
    given = [given[0], *(rng.choice([tensor, tensor, None]) for tensor in given[1:])]
    return rng.choice([*rho.NEEDS, "", "best", None]), *given


def check_scores(select, student_loss, *others):
    score = rho.score_tokens(select, student_loss, *others)
    assert score.shape == student_loss.shape and not score.requires_grad


def selection_input(rng, place):
    score = hostile_tensor(rng, rng.choice(SHAPES))
    ratio = rng.choice([None, 0.0, 1e-9, 0.3, 0.5, 1.0, math.nan])
    threshold = rng.choice([None, None, *NUMBERS])
    valid = rng.choice([None, hostile_tensor(rng, score.shape) > 0])
    return score, ratio, threshold, valid


def check_selection(score, ratio, threshold, valid):
    mask = rho.select_tokens(score, ratio, threshold, valid)
    assert mask.shape == score.shape and mask.dtype == torch.bool
    assert valid is None or not (mask & ~valid).any()
    if ratio is not None:
        n_valid = score.numel() if valid is None else int(valid.sum())
        assert mask.sum() <= round(ratio * n_valid)


def loss_input(rng, place):
    loss = hostile_tensor(rng, rng.choice(SHAPES)).requires_grad_()
    mask = hostile_tensor(rng, loss.shape) > rng.choice([0, math.inf])
    return loss, rng.choice([mask, mask.float()])


def check_loss(student_loss, mask):
    loss = rho.selective_loss(student_loss, mask)
    loss.backward()
    assert loss.shape == () and student_loss.grad.shape == student_loss.shape
    if not mask.any() and student_loss.isfinite().all():
        assert loss == 0 and not student_loss.grad.any()


def windows_input(rng, place):
    tokens = np.arange(rng.randrange(40)).astype(rng.choice([np.uint16, np.uint32]))
    tokens.tofile(place / "odd.bin")
    splits = rng.choice([{"odd": len(tokens)}, {"odd": len(tokens)}, {}])
    meta = {"tokens": splits, "dtype": tokens.dtype.name}
    return rho.Config(data=str(place), block_size=rng.randint(1, 12)), meta, "odd"


def check_windows(cfg, meta, split):
    windows = rho.Windows(cfg, meta, split)
    x, y = windows[range(windows.n)]
    target = torch.arange(1, windows.n * cfg.block_size + 1)
    assert torch.equal(y.flatten(), target) and torch.equal(x.flatten(), target - 1)


def meta_input(rng, place):
    meta = json.loads((place / "data/meta.json").read_text())
    text = json.dumps(damaged_tree(rng, meta)).encode()
    if rng.random() < 0.3:
        text = damaged_bytes(rng, text)
    folder = place / "copy"
    if not folder.exists():
        shutil.copytree(place / "data", folder)
    (folder / "meta.json").write_bytes(text)
    return (folder,)


def tokenizer_input(rng, place):
    spec = json.loads((place / "data/meta.json").read_text())["tokenizer"]
    ids = [rng.choice([-1, 0, 255, 299, 300, 2**40]) for _ in range(rng.randrange(5))]
    return rng.choice([damaged_tree(rng, spec), damaged_tree(rng, spec), rng.choice(VALUES)]), ids


def check_tokenizer(spec, ids):
    assert isinstance(get_tokenizer(spec).decode(ids), str)


def questions_input(rng, place):
    row = {"question": "2 + 3?", "answer": "#### 5", "options": ["a) 1", "b) 5"], "body": "Add"}
    rows = [json.dumps(damaged_tree(rng, row)) for _ in range(rng.randrange(4))]
    rows.append(json.dumps(rng.choice(VALUES)))
    text = "\n".join(rows).encode()
    if rng.random() < 0.5:
        text = damaged_bytes(rng, text)
    path = place / f"odd{rng.choice(['.jsonl', '.jsonl', '.json', '.csv', '.xml'])}"
    path.write_bytes(text)
    if rng.random() < 0.3:
        return str(path), rng.choice([None, 1])
    return rng.choice([*eval_math.TASKS]), None, "data", str(path)


def page_input(rng, place):
    """A folder of two runs over a corpus of hostile words, and these words."""
    folder = place / "page"
    folder.mkdir(exist_ok=True)
    words = [bytes([byte]) for byte in range(256)]
    words += sorted({text.encode(errors="ignore") for text in TEXTS if len(text) > 1} - {*words})
    n = rng.randrange(1, 30)
    tokens = rng.choices(range(len(words)), k=n + 1)
    np.array(tokens, np.uint16).tofile(folder / "val_corpus.bin")
    meta = json.loads((place / "data/meta.json").read_text())
    ranks = [base64.b64encode(word).decode() for word in words]
    meta["tokenizer"].update(ranks=ranks, eot=len(words), n_vocab=len(words) + 1)
    (folder / "meta.json").write_text(json.dumps(meta))
    config = {"data": str(folder), "threshold": None, "ratio": 0.5}
    shutil.rmtree(folder / "out", ignore_errors=True)
    for name in ("ref", rng.choice(["slm", "<script>", "<!--", '"><b>', "@DATA@"])):
        (folder / "out" / name).mkdir(parents=True)
        records = [{"run": name, "config": config}]
        for step in (1, 2):
            np.save(folder / f"out/{name}/{step}.npy", np.ones((1, n), np.float16))
            records.append({"step": step, "tokens": step})
        log = "\n".join(json.dumps(record) for record in records)
        (folder / f"out/{name}.jsonl").write_text(log)
    return folder / "out", [words[token].decode(errors="replace") for token in tokens[1:]]


def check_page(folder, words):
    """The words come back from the page whole, and none of them ends or begins an element."""
    page = write_page(folder).read_text()
    data = page.partition('id="data">')[2].partition("</script>")[0]
    assert json.loads(data)["text"] == words
    template = (HERE / "tokens_template.html").read_text()
    for mark in ("<script", "</script", "<!--"):
        assert page.count(mark) == template.count(mark)


def answer_input(rng, place):
    return rng.choice([hostile_text(rng), hostile_text(rng), None, 7, 0.5]), hostile_text(rng)


# {function: (of 100,000 inputs, who makes them, what is called, the exceptions it documents)}
FUZZ = {
    "extract_answer": (20_000, lambda rng, _: (hostile_text(rng),), eval_math.extract_answer, ()),
    "is_equiv": (10_000, answer_input, eval_math.is_equiv, ()),
    "load_questions": (8_000, questions_input, eval_math.load_questions, InputError),
    "score_tokens": (15_000, scores_input, check_scores, ValueError),
    "select_tokens": (20_000, selection_input, check_selection, ValueError),
    "selective_loss": (10_000, loss_input, check_loss, ()),
    "Windows": (7_000, windows_input, check_windows, InputError),
    "get_tokenizer": (4_000, tokenizer_input, check_tokenizer, InputError),
    "load_meta": (4_000, meta_input, load_meta, InputError),
    "tokens_page": (2_000, page_input, check_page, ()),
}
SLOW = 0.5  # seconds


def outcome(function, arguments, documented):
    """(what went wrong in words or "", seconds) of one call."""
    wrong = ""
    start = time.perf_counter()
    try:
        function(*arguments)
    except documented:
        pass
    except (Exception, SystemExit) as error:
        wrong = f"{type(error).__name__}: {error}"
    except BaseException as error:  # what a panic in Rust becomes
        if isinstance(error, KeyboardInterrupt):
            raise
        wrong = f"{type(error).__name__}: {error}"
    return wrong, time.perf_counter() - start


def fuzz(place, rng, share=1, targets=FUZZ):
    """Hostile inputs: only the documented exceptions, and no call over half a second."""
    row = {"inputs_fuzzed": 0, "crashes": 0, "slow": 0}
    failed = []
    for name, (count, make, function, documented) in targets.items():
        for _ in range(round(count * share)):
            arguments = make(rng, place)
            wrong, seconds = outcome(function, arguments, documented)
            if seconds > SLOW:  # the input, or a busy machine?
                _, seconds = outcome(function, arguments, documented)
            row["inputs_fuzzed"] += 1
            row["crashes"] += wrong != ""
            row["slow"] += seconds > SLOW
            if wrong or seconds > SLOW:
                failed.append(f"{name}, {seconds:.2f} s, {wrong[:100]}: {arguments!r:.200}")
    return row, failed
