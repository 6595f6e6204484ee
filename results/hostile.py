"""Hostile inputs for the public functions: the part fuzz of faults.py.

Each function has a maker of inputs, which is given a random.Random and a folder with the demo's
data in miniature. A crash is an exception that the function does not document, or a result that
breaks what it promises.
"""

import base64
import copy
import json
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

SLOW = 0.5  # seconds

# What texts are put together from, besides a few that cannot be typed.
PIECES = r"""
#### \boxed{ } { \frac answer is $ - 1/0 7 12,345 % = x . e9 1e999 nan inf \sqrt ( ) [ ] \left
\right \begin{pmatrix} & \\ ^ _ ! <<3+4=7>> </script> <!-- <script> @DATA@
½ ² ٣ ∞ é 🙂 \text{and} \infty , thousand "> &lt; 0.5 -- \pi \cup
a) (B) Problem: Question: None |
""".split()
PIECES += ["\n", "\0", "\ud800", "\u2028", " ", "9" * 400, "(" * 60, "2 1/2", "\u202e"]
# What may stand in a JSON file in the place of a value.
VALUES = json.loads(
    r'[null, true, -1, 0, 3, 1e30, 1180591620717411303424, NaN, Infinity, "", "x", "(", "\u0000"]'
)
VALUES += [[], {}, [[]]]
SHAPES = [(), (0,), (1,), (7,), (0, 4), (3, 0), (2, 3), (1, 1, 4), (2, 2, 2, 2)]
NUMBERS = [float(text) for text in "nan inf -inf 3e38 -3e38 0.0 -0.0 1e-45".split()]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


# ---- damage --------------------------------------------------------------------------------------


def damaged_tree(rng, tree):
    """A copy of what a JSON file holds, with one value at any depth replaced or taken out."""
    tree = copy.deepcopy(tree)
    node = tree
    while True:
        keys = range(len(node))
        if isinstance(node, dict):
            keys = [*node]
        key = rng.choice(keys)
        inner = node[key]
        has_more = isinstance(inner, (dict, list)) and len(inner) > 0
        if not has_more or rng.random() < 0.3:
            break
        node = inner
    if rng.random() < 0.3:
        del node[key]
    else:
        node[key] = rng.choice(VALUES)
    return tree


def ways_to_damage(rng, whole):
    """{in words: the bytes of a file after a damage}"""
    if not whole:
        return {"as it was": whole}
    length = rng.randrange(len(whole))
    flipped = bytearray(whole)
    flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
    return {
        "cut short": whole[:length],
        "emptied": b"",
        "with a bit flipped": bytes(flipped),
        "garbage": rng.randbytes(len(whole)),
    }


def maybe_damaged(rng, whole):
    ways = ways_to_damage(rng, whole)
    ways["not"] = whole
    return rng.choice([*ways.values()])


# ---- answers -------------------------------------------------------------------------------------


def hostile_text(rng):
    n_pieces = rng.randrange(12)
    text = "".join(rng.choices(PIECES, k=n_pieces))
    if rng.random() < 0.1:
        text *= 300
    return text


def text_input(rng, place):
    return (hostile_text(rng),)


def check_extraction(text):
    answer = eval_math.extract_answer(text)
    assert answer is None or isinstance(answer, str)


def answers_input(rng, place):
    one = rng.choice([hostile_text(rng), hostile_text(rng), None, 7, 0.5])
    other = hostile_text(rng)
    return rng.choice([(one, other), (other, one), (one, one)])


def check_equality(one, other):
    assert eval_math.is_equiv(one, other) in (True, False)


def questions_input(rng, place):
    """A file of rows of which some are damaged, then perhaps the file."""
    row = {
        "question": "2 + 3?",
        "answer": "#### 5",
        "options": ["a) 1", "b) 5"],
        "body": "Add.",
    }
    rows = [damaged_tree(rng, row) for _ in range(rng.randrange(4))]
    rows.append(rng.choice([row, *VALUES]))
    text = "\n".join(json.dumps(row) for row in rows)
    ending = rng.choice([".jsonl", ".jsonl", ".json", ".csv", ".xml"])
    path = place / f"odd{ending}"
    path.write_bytes(maybe_damaged(rng, text.encode()))
    n = rng.choice([None, 1])
    if rng.random() < 0.3:
        return str(path), n
    task = rng.choice([*eval_math.TASKS])
    return task, n, "data", str(path)


# ---- the method ----------------------------------------------------------------------------------


def hostile_tensor(rng, shape, dtypes=DTYPES):
    """Of any shape, and often with a number that is not finite, or at the end of the range."""
    generator = np.random.default_rng(rng.getrandbits(32))
    values = np.asarray(generator.normal(size=shape))
    if values.size and rng.random() < 0.5:
        values.flat[rng.randrange(values.size)] = rng.choice(NUMBERS)
    return torch.from_numpy(values).to(rng.choice(dtypes))


def scores_input(rng, place):
    shape = rng.choice(SHAPES)
    student_loss = hostile_tensor(rng, shape)
    others = []
    for _ in range(3):
        tensor = hostile_tensor(rng, shape)
        others.append(rng.choice([tensor, tensor, None]))
    select = rng.choice([*rho.NEEDS, "", "best", None])
    return select, student_loss, *others


def check_scores(select, student_loss, *others):
    score = rho.score_tokens(select, student_loss, *others)
    assert score.shape == student_loss.shape
    assert not score.requires_grad


def selection_input(rng, place):
    score = hostile_tensor(rng, rng.choice(SHAPES))
    ratio = rng.choice([None, 0.0, 1e-9, 0.3, 0.5, 1.0, float("nan")])
    threshold = rng.choice([None, None, *NUMBERS])
    valid = hostile_tensor(rng, score.shape) > 0
    return score, ratio, threshold, rng.choice([None, valid])


def check_selection(score, ratio, threshold, valid):
    mask = rho.select_tokens(score, ratio, threshold, valid)
    assert mask.shape == score.shape
    if valid is None:
        valid = torch.ones_like(mask)
    assert not (mask & ~valid).any()
    if ratio is not None:
        assert mask.sum() <= round(ratio * int(valid.sum()))


def loss_input(rng, place):
    # float32, as token_loss returns it.
    loss = hostile_tensor(rng, rng.choice(SHAPES), [torch.float32])
    least = rng.choice([0, float("inf")])
    mask = hostile_tensor(rng, loss.shape) > least
    return loss.requires_grad_(), rng.choice([mask, mask.float()])


def check_loss(student_loss, mask):
    loss = rho.selective_loss(student_loss, mask)
    loss.backward()
    assert loss.shape == ()
    if not mask.any() and student_loss.isfinite().all():
        assert loss == 0
        assert not student_loss.grad.any()


# ---- data ----------------------------------------------------------------------------------------


def windows_input(rng, place):
    """Tokens 0, 1, 2, ... in a file, mostly too few or too many for whole windows."""
    dtype = rng.choice(["uint16", "uint32"])
    n_tokens = rng.randrange(40)
    np.arange(n_tokens).astype(dtype).tofile(place / "odd.bin")
    meta = {"tokens": {"odd": n_tokens}, "dtype": dtype}
    cfg = rho.Config(data=str(place), block_size=rng.randint(1, 12))
    return cfg, meta, rng.choice(["odd", "odd", "odd", "none"])


def check_windows(cfg, meta, split):
    windows = rho.Windows(cfg, meta, split)
    x, y = windows[range(windows.n)]
    target = torch.arange(1, windows.n * cfg.block_size + 1)
    assert torch.equal(y.flatten(), target)
    assert torch.equal(x.flatten(), target - 1)


def read_json(place):
    return json.loads((place / "data/meta.json").read_text())


def meta_input(rng, place):
    folder = place / "copy"
    if not folder.exists():
        shutil.copytree(place / "data", folder)
    text = json.dumps(damaged_tree(rng, read_json(place)))
    (folder / "meta.json").write_bytes(maybe_damaged(rng, text.encode()))
    return (folder,)


def check_meta(folder):
    """What load_meta accepts has a tokenizer that either works or is refused too."""
    get_tokenizer(load_meta(folder)["tokenizer"])


def tokenizer_input(rng, place):
    spec = damaged_tree(rng, read_json(place)["tokenizer"])
    if rng.random() < 0.1:
        spec = rng.choice(VALUES)
    ids = rng.choices([-1, 0, 255, 299, 300, 2**40], k=rng.randrange(5))
    return spec, ids


def check_tokenizer(spec, ids):
    text = get_tokenizer(spec).decode(ids)
    assert isinstance(text, str)


# ---- the page of tokens --------------------------------------------------------------------------

WORDS = [bytes([byte]) for byte in range(256)]
WORDS += [
    piece.encode(errors="ignore") for piece in PIECES if len(piece.encode("utf-8", "ignore")) > 1
]


def page_input(rng, place):
    """A folder of two runs over a corpus of hostile words, and these words."""
    folder = place / "page"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    n = rng.randrange(1, 30)
    tokens = rng.choices(range(len(WORDS)), k=n + 1)
    np.array(tokens, np.uint16).tofile(folder / "val_corpus.bin")
    meta = read_json(place)
    meta["tokenizer"]["ranks"] = [base64.b64encode(word).decode() for word in WORDS]
    meta["tokenizer"]["eot"] = len(WORDS)
    meta["tokenizer"]["n_vocab"] = len(WORDS) + 1
    (folder / "meta.json").write_text(json.dumps(meta))
    config = {"data": str(folder), "threshold": None, "ratio": 0.5}
    for name in ("ref", rng.choice(["slm", "<script>", "<!--", '"><b>', "@DATA@"])):
        (folder / "out" / name).mkdir(parents=True)
        records = [{"run": name, "config": config}]
        for step in (1, 2):
            np.save(folder / "out" / name / f"{step}.npy", np.ones((1, n), np.float16))
            records.append({"step": step, "tokens": step})
        log = "\n".join(json.dumps(record) for record in records)
        (folder / "out" / f"{name}.jsonl").write_text(log)
    words = [WORDS[token].decode(errors="replace") for token in tokens[1:]]
    return folder / "out", words


def check_page(folder, words):
    """The words come back from the page whole, and none of them begins or ends an element."""
    page = write_page(folder).read_text()
    _, _, rest = page.partition('id="data">')
    data, _, _ = rest.partition("</script>")
    assert json.loads(data)["text"] == words
    template = (HERE / "tokens_template.html").read_text()
    for mark in ("<script", "</script", "<!--"):
        assert page.count(mark) == template.count(mark)


# ---- all of them ---------------------------------------------------------------------------------

# {function: (of 100,000 inputs, who makes them, what is called, the exceptions that it documents)}
FUZZ = {
    "extract_answer": (20_000, text_input, check_extraction, ()),
    "is_equiv": (10_000, answers_input, check_equality, ()),
    "load_questions": (8_000, questions_input, eval_math.load_questions, InputError),
    "score_tokens": (15_000, scores_input, check_scores, ValueError),
    "select_tokens": (20_000, selection_input, check_selection, ValueError),
    "selective_loss": (10_000, loss_input, check_loss, ()),
    "Windows": (7_000, windows_input, check_windows, InputError),
    "get_tokenizer": (4_000, tokenizer_input, check_tokenizer, InputError),
    "load_meta": (4_000, meta_input, check_meta, InputError),
    "tokens_page": (2_000, page_input, check_page, ()),
}


def outcome(function, arguments, documented):
    """(what went wrong in words, or "", and the seconds) of one call."""
    wrong = ""
    start = time.perf_counter()
    try:
        function(*arguments)
    except documented:
        pass
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic in Rust is no Exception
        wrong = f"{type(error).__name__}: {error}"
    return wrong, time.perf_counter() - start


def slowdown():
    """How many times longer than on a free processor a computation takes at the moment."""
    start = time.perf_counter()
    end = time.process_time() + 0.2
    while time.process_time() < end:
        pass
    return max(1, (time.perf_counter() - start) / 0.2)


def fuzz(place, rng, share=1, targets=FUZZ):
    """(counts, each kind of failure once): only documented exceptions, no call over SLOW."""
    row = {"inputs_fuzzed": 0, "crashes": 0, "slow": 0}
    failed = {}
    for name, (count, make, function, documented) in targets.items():
        for _ in range(round(count * share)):
            arguments = make(rng, place)
            wrong, seconds = outcome(function, arguments, documented)
            if seconds > SLOW:  # the input, or a busy machine?
                _, again = outcome(function, arguments, documented)
                seconds = again / slowdown()
            row["inputs_fuzzed"] += 1
            if wrong:
                row["crashes"] += 1
            if seconds > SLOW:
                row["slow"] += 1
                wrong += f" {seconds:.1f} s"
            if wrong:
                kind = f"{name}: {wrong[:100]}"
                failed.setdefault(kind, f"{kind}: {arguments!r:.200}")
    return row, [*failed.values()]
