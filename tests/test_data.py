"""prepare_data.py: what goes in comes out, splits, contamination, bad input, interruptions.

No network and no gpt2: a byte-level tokenizer stands in, handed over as any folder's can be
(`--tokenizer FOLDER/meta.json`). Each group was seen to fail with the code broken on purpose.
"""

import base64
import builtins
import errno
import gzip
import io
import json
import lzma
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import prepare_data
from prepare_data import InputError, get_tokenizer, load_meta

ROOT = Path(prepare_data.__file__).parent
SENTENCE = "sum of two odd numbers is even so each proof begins with what we know and ends there"
WORDS = SENTENCE.split()


def byte_spec(eot=256):
    ranks = [base64.b64encode(bytes([b])).decode() for b in range(256)]
    return {"name": "bytes", "n_vocab": eot + 1, "eot": eot, "pat_str": r"\S+|\s+", "ranks": ranks}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test runs in an empty folder that holds only a tokenizer."""
    monkeypatch.chdir(tmp_path)
    for name, eot in (("bytes", 256), ("large", 70_000)):
        Path(name).mkdir()
        meta = {"tokenizer": byte_spec(eot), "dtype": "uint16", "tokens": {}}
        Path(name, "meta.json").write_text(json.dumps(meta))
    return tmp_path


def documents(n, seed, words=30):
    rng = random.Random(seed)
    return [f"{seed}-{i}: " + " ".join(rng.choices(WORDS, k=words)) for i in range(n)]


def write_jsonl(path, rows):
    lines = [json.dumps(row if isinstance(row, dict) else {"text": row}) + "\n" for row in rows]
    Path(path).write_text("".join(lines))
    return str(path)


def append(path, data):
    with open(path, "ab") as file:
        file.write(data)


def run(*flags, out="out", tokenizer="bytes"):
    """prepare_data.py with these flags -> meta.json of what it made."""
    flags = [*map(str, flags), "--out", out, "--tokenizer", f"{tokenizer}/meta.json"]
    prepare_data.main(flags)
    return load_meta(out)


def refused(capsys, *flags):
    """The one line of a run that must be refused, with status 2 and nothing left behind."""
    before = sorted(str(p) for p in Path().rglob("*"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(*flags)
    assert stop.value.code == 2
    assert sorted(str(p) for p in Path().rglob("*")) == before
    captured = capsys.readouterr()
    lines = [line for line in captured.err.replace("\r", "\n").split("\n") if line.strip()]
    lines = [line for line in lines if "tokens/s" not in line and "tokens [" not in line]
    assert len(lines) == 1 and captured.out == "", captured
    return lines[0]


def read(out, name):
    """The documents of a stream, decoded, each without the end-of-text token in front of it."""
    meta = load_meta(out)
    encoding = get_tokenizer(meta["tokenizer"])
    tokens = np.fromfile(Path(out, f"{name}.bin"), dtype=meta["dtype"])
    assert len(tokens) == meta["tokens"][name]
    starts = np.flatnonzero(tokens == meta["tokenizer"]["eot"])
    assert starts[0] == 0 and len(starts) == meta["documents"][name]
    return [encoding.decode(part[1:].tolist()) for part in np.split(tokens, starts[1:])]


@pytest.fixture
def text():
    """(flags, reference documents, corpus documents) of a small run."""
    reference, corpus = documents(40, "ref"), documents(300, "web")
    flags = ["--reference", write_jsonl("ref.jsonl", reference)]
    return flags + ["--corpus", write_jsonl("web.jsonl", corpus)], reference, corpus


# ---- what goes in comes out ----


@pytest.mark.parametrize(("tokenizer", "dtype"), [("bytes", "uint16"), ("large", "uint32")])
def test_round_trip(text, tokenizer, dtype):
    flags, reference, corpus = text
    reference[3] += " naïve 日本語 🙂 <|endoftext|> \r\n\t\0 tail"
    write_jsonl("ref.jsonl", reference)
    meta = run(*flags, tokenizer=tokenizer)
    assert meta["dtype"] == dtype
    assert sorted(read("out", "ref") + read("out", "val")) == sorted(reference)
    assert sorted(read("out", "train") + read("out", "val_corpus")) == sorted(corpus)
    size = np.dtype(dtype).itemsize
    for name, tokens in meta["tokens"].items():
        assert Path("out", f"{name}.bin").stat().st_size == tokens * size
    assert [s["rows"] for s in meta["sources"]] == [40, 300]


def test_sha256_of_files_and_sources(text):
    import hashlib

    meta = run(*text[0])
    for name, digest in meta["files"].items():
        assert hashlib.sha256(Path("out", name).read_bytes()).hexdigest() == digest
    assert sorted(meta["files"]) == ["ref.bin", "train.bin", "val.bin", "val_corpus.bin"]
    joined = "".join(text[1]).encode()
    assert meta["sources"][0]["sha256"] == hashlib.sha256(joined).hexdigest()


def test_many_threads_give_the_tokens_of_one_by_one_in_order(monkeypatch):
    encoding, texts = get_tokenizer(byte_spec()), documents(2000, "t")
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    dtype = np.dtype("<u2")
    count = prepare_data.write_tokens(Path("t.bin"), iter(texts), encoding, dtype)
    plain = [token for text in texts for token in (256, *encoding.encode_ordinary(text))]
    assert np.fromfile("t.bin", dtype=dtype).tolist() == plain
    assert count == (len(plain), 2000)


def test_gpt2_tokens_are_those_of_tiktoken():
    try:
        encoding = get_tokenizer({"name": "gpt2"})
    except InputError as error:
        pytest.skip(str(error))
    texts = documents(50, "g") + ["  x  \n\n<|endoftext|> é 日本"]
    prepare_data.write_tokens(Path("g.bin"), iter(texts), encoding, np.dtype("<u2"))
    plain = [t for tokens in encoding.encode_ordinary_batch(texts) for t in (50256, *tokens)]
    assert np.fromfile("g.bin", dtype="<u2").tolist() == plain


def test_surrogates_bad_bytes_and_empty_documents_do_not_stop_a_run(text):
    flags, reference, _ = text
    append("ref.jsonl", b'{"text": "half \\ud83d of it"}\n\n{"text": ""}\n{"text": "caf\xe9"}\n')
    run(*flags)
    added = ["half ? of it", "caf\N{REPLACEMENT CHARACTER}"]  # the last one was not UTF-8
    assert sorted(read("out", "ref") + read("out", "val")) == sorted([*reference, *added])


def test_formats_and_folders(text):
    import pyarrow
    import pyarrow.parquet

    flags, _, corpus = text
    Path("web/deep").mkdir(parents=True)
    write_jsonl("web/a.jsonl", corpus[:60])
    lines = Path(write_jsonl("b.jsonl", corpus[60:120])).read_bytes()
    Path("web/deep/b.jsonl.gz").write_bytes(gzip.compress(lines))
    lines = Path(write_jsonl("c.jsonl", corpus[120:180])).read_bytes()
    Path("web/c.jsonl.xz").write_bytes(lzma.compress(lines))
    pyarrow.parquet.write_table(pyarrow.table({"text": corpus[180:240]}), "web/d.parquet")
    Path("web/[1] *").mkdir()  # such names are no patterns
    pyarrow.parquet.write_table(pyarrow.table({"text": corpus[240:270]}), "web/[1] */d.parquet")
    write_jsonl("web/[1] */e.jsonl", corpus[270:299])
    Path("web/e.txt").write_text(corpus[299])
    Path("web/README.md").write_text("not text to train on")
    run(flags[0], flags[1], "--corpus", "web")
    assert sorted(read("out", "train") + read("out", "val_corpus")) == sorted(corpus)


def test_zstandard_is_read_or_named(text, capsys):
    flags, _, corpus = text
    try:
        import zstandard
    except ImportError:
        Path("web.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd")
        line = refused(capsys, *flags[:3], "web.jsonl.zst")
        assert "web.jsonl.zst" in line and "pip install zstandard" in line
    else:
        lines = Path("web.jsonl").read_bytes()
        Path("web.jsonl.zst").write_bytes(zstandard.compress(lines))
        run(*flags[:3], "web.jsonl.zst")
        assert sorted(read("out", "train") + read("out", "val_corpus")) == sorted(corpus)


@pytest.mark.parametrize("n", [400, 60_000])
def test_long_txt_is_cut_at_line_ends(text, n):
    lines = "".join(f"line {i} of a long text, and on and on\n" for i in range(n))
    Path("long.txt").write_bytes(lines.encode().replace(b"\n", b"\r\n"))
    Path("more.txt").write_text("another text, all in one line and not at all long. " * 3)
    run(*text[0][:3], "long.txt", "more.txt")
    pieces = read("out", "train") + read("out", "val_corpus")
    pieces = [piece for piece in pieces if not piece.startswith("another")]
    assert len(pieces) == 1 + len(lines) // (1 << 16)
    assert all(piece.startswith("line ") for piece in pieces)
    assert "".join(sorted(pieces, key=lambda piece: int(piece.split()[1]))) == lines


def test_fields_and_chats(text):
    rows = [{"q": f"What is {i} and {i}?", "a": f"{2 * i}"} for i in range(200)]
    run("--reference", write_jsonl("qa.jsonl", rows), "--corpus", "qa.jsonl", "--field", "q,a")
    assert "Question: What is 7 and 7?\nAnswer: 14" in read("out", "ref") + read("out", "val")
    for role, said in (("role", "content"), ("from", "value")):
        turns = [{role: "user", said: "Add 2 and 2."}, {role: "assistant", said: "That is 4."}]
        assert prepare_data.row_text({"m": turns}, "m") == "Add 2 and 2.\nThat is 4."


def test_sources_are_read_in_step(text):
    """A prefix is a fair sample: a source of three times the size has three times the share."""
    one = write_jsonl("one.jsonl", documents(1000, "one"))
    three = write_jsonl("three.jsonl", documents(3000, "three"))
    run(*text[0][:2], "--corpus", one, three, "--max_tokens", 150_000)
    counts = [sum(t.startswith(name) for t in read("out", "train")) for name in ("one-", "three-")]
    assert 2.6 < counts[1] / counts[0] < 3.4


# ---- splits ----


def test_splits_are_disjoint_and_seeded(text):
    flags, *_ = text
    run(*flags, "--val_docs", 3)
    assert len(read("out", "val")) == 3 and 15 < len(read("out", "val_corpus")) < 45
    for train, held in (("ref", "val"), ("train", "val_corpus")):
        assert not set(read("out", train)) & set(read("out", held))
    run(*flags, "--val_docs", 3, out="same")
    run(*flags, "--val_docs", 3, "--seed", 7, out="other")
    for name in ("ref", "train", "val", "val_corpus"):
        same, other = (Path(out, f"{name}.bin").read_bytes() for out in ("same", "other"))
        assert Path("out", f"{name}.bin").read_bytes() == same != other


def test_split_does_not_depend_on_the_order_of_documents(text):
    """But for one: the first document is always held, so that no split is empty."""
    flags, reference, _ = text
    run(*flags)
    write_jsonl("ref.jsonl", [reference[0], *reference[:0:-1]])
    run(*flags, out="reversed")
    assert sorted(read("out", "val")) == sorted(read("reversed", "val"))
    assert reference[0] in read("out", "val") and len(read("out", "val")) > 1


@pytest.mark.parametrize("seed", range(5))
def test_few_documents_are_split_too(text, seed):
    run(*text[0][:3], write_jsonl("few.jsonl", documents(4, "few")), "--seed", seed)
    assert len(read("out", "val_corpus")) in (1, 2, 3)


def test_the_same_text_as_reference_and_corpus(text):
    """What is held out as target text is not in the corpus, which has held-out text of its own."""
    _, _, corpus = text
    run("--reference", "web.jsonl", "--corpus", "web.jsonl")
    parts = [set(read("out", name)) for name in ("val", "val_corpus", "train")]
    assert set.union(*parts) == set(corpus) and sum(map(len, parts)) == len(corpus)
    assert 10 < len(parts[0]) < 60 and 10 < len(parts[1]) < 60


def test_copies_of_a_document_fall_on_one_side(text):
    """Also across the two inputs: held-out target text is kept out of the corpus."""
    flags, reference, corpus = text
    write_jsonl("ref.jsonl", reference + reference[::-1] + reference)
    write_jsonl("web.jsonl", corpus + reference + corpus)
    run(*flags, "--val_docs", 3)
    val = read("out", "val")
    assert len(set(val)) == len(val) == 3
    assert not set(val) & set(read("out", "ref") + read("out", "train") + read("out", "val_corpus"))
    assert not set(read("out", "val_corpus")) & set(read("out", "train"))
    assert sorted(set(read("out", "ref"))) == sorted(set(reference) - set(val))


def test_named_held_out_files(text):
    flags, reference, corpus = text
    val = write_jsonl("val.jsonl", reference[:5] + documents(5, "new"))
    write_jsonl("web.jsonl", corpus + reference[:2])
    run(*flags, "--val", val)
    assert sorted(read("out", "val")) == sorted(reference[:5] + documents(5, "new"))
    assert sorted(read("out", "ref")) == sorted(reference[5:])
    assert not set(reference[:2]) & set(read("out", "train") + read("out", "val_corpus"))


def test_max_tokens(text):
    flags, reference, _ = text
    meta = run(*flags, "--max_tokens", "1e4", "--val_docs", 4)
    longest = max(map(len, text[1] + text[2])) + 1
    assert 10_000 <= meta["tokens"]["train"] < 10_000 + longest
    assert meta["documents"]["ref"] + meta["documents"]["val"] == len(reference)


# ---- contamination ----

LONG = (
    "A farmer has seven fields with twelve rows of corn each, and he harvests half of the rows "
    "before noon. How many rows are left?"
)
SHORT = "What is nineteen plus twenty-three times four?"


def contaminated(text, *extra, flags=()):
    write_jsonl("q.jsonl", [{"question": q, "answer": "42"} for q in (LONG, SHORT)])
    write_jsonl("web.jsonl", text[2] + list(extra))
    meta = run(*text[0], "--questions", "q.jsonl", *flags)
    kept = read("out", "train") + read("out", "val_corpus")
    return [document in kept for document in extra], meta["contamination"]


def test_questions_are_found_and_dropped(text):
    thirteen = " ".join(LONG.split()[3:16])
    shouted = "see: " + LONG.upper().replace(" ", "\n ").replace(",", " -- ") + " (lost)"
    curly = f"… “{SHORT.replace('-', '–')}” …"
    kept, found = contaminated(text, f"Q: {LONG}", thirteen, shouted, f"x {SHORT} y", curly)
    assert kept == [False] * 5
    assert (found["questions"], found["found"], found["dropped"]) == (2, 5, True)
    named = {d["document"]: d["question"] for d in found["documents"]}
    assert named["web.jsonl:301"] == named["web.jsonl:303"] == LONG
    assert named["web.jsonl:304"] == named["web.jsonl:305"] == SHORT
    saved = [json.loads(line) for line in Path("out/questions.jsonl").read_text().splitlines()]
    assert saved == [{"question": LONG, "answer": "42"}, {"question": SHORT, "answer": "42"}]


def test_answers_may_be_numbers(text):
    """As in MAWPS' own files: {"question": ..., "answer": 43.0}."""
    write_jsonl("q.jsonl", [{"question": LONG, "answer": 43.0}])
    run(*text[0], "--questions", "q.jsonl")
    saved = json.loads(Path("out/questions.jsonl").read_text())
    assert saved == {"question": LONG, "answer": "43.0"}


def test_near_misses_are_kept(text):
    words = LONG.split()
    twelve = " ".join(words[2:14])
    changed = " ".join(w if i % 12 else "barn" for i, w in enumerate(words))
    part = SHORT.rsplit(" ", 1)[0]
    kept, found = contaminated(text, twelve, changed, part, " ".join(sorted(words)))
    assert kept == [True] * 4 and found["found"] == 0 and found["documents"] == []


def test_every_place_in_a_text_is_searched(text):
    """An n-gram is found wherever it begins, in whatever it is hidden."""
    questions = (LONG, SHORT, "Why so?", "Why?")
    write_jsonl("q.jsonl", [{"question": q, "answer": "42"} for q in questions])
    places = [(before, after) for before in range(30) for after in range(3)]
    hidden = [f"{'w ' * b}{q}{' w' * a}" for q in questions for b, a in places]
    write_jsonl("web.jsonl", [*hidden, "w " * 100, *text[2]])
    found = run(*text[0], "--questions", "q.jsonl")["contamination"]
    assert found["found"] == len(hidden) == 360
    assert not set(hidden) & set(read("out", "train") + read("out", "val_corpus"))
    assert "w " * 100 in read("out", "train") + read("out", "val_corpus")


def test_search_agrees_with_the_definition():
    """Against all n-grams of words with punctuation stripped, on texts of few different words."""
    rng, words = random.Random(0), ["a", "b"]
    hits = 0
    for _ in range(300):
        question = rng.choices(words, k=rng.randint(1, 16))
        text = rng.choices(words, k=rng.randint(0, 400))
        n = min(13, len(question))
        wanted = {tuple(question[i : i + n]) for i in range(len(question) - n + 1)}
        assert set(prepare_data.ngrams(" ".join(question))) == wanted
        there = {tuple(text[i : i + n]) for i in range(len(text) - n + 1)}
        found = set(prepare_data.ngrams(", ".join(text), {n})) if len(text) >= n else set()
        assert found == there
        hits += bool(wanted & there)
    assert 50 < hits < 290


def test_contaminated_reference_is_dropped_before_the_split(text):
    flags, reference, _ = text
    write_jsonl("q.jsonl", [{"question": q, "answer": ""} for q in reference])
    line = write_jsonl("ref.jsonl", reference + documents(20, "clean"))
    meta = run("--reference", line, *flags[2:], "--questions", "q.jsonl")
    assert meta["contamination"]["found"] == 40
    assert sorted(read("out", "ref") + read("out", "val")) == sorted(documents(20, "clean"))


def test_contaminated_documents_are_kept_on_demand_and_the_list_is_capped(text):
    many = [f"{i} {LONG}" for i in range(120)]
    kept, found = contaminated(text, *many, flags=["--keep_contaminated"])
    assert all(kept) and not found["dropped"]
    assert found["found"] == 120 and len(found["documents"]) == 100


# ---- recipes, with a hub of our own ----


class Hub:
    """Stands in for datasets.load_dataset: a few rows for each set of a recipe."""

    def __init__(self, rows=300):
        self.asked, self.rows = [], rows

    def __call__(self, path, name=None, split=None, streaming=False):
        assert streaming
        self.asked.append((path, name, split))
        texts = documents(self.rows, f"{path} {split}", words=60)
        chat = {"MetaMathQA": ("query", "response"), "MathInstruct": ("instruction", "output")}
        for key, (question, answer) in chat.items():
            if path.endswith(key):
                return [{question: text, answer: "4"} for text in texts]
        if path == "openai/gsm8k":
            return [{"question": text, "answer": "#### 4"} for text in texts[:50]]
        if "tulu" in path:
            return [{"messages": [{"role": "user", "content": text}]} for text in texts]
        if "Hermes" in path:
            return [{"conversations": [{"from": "human", "value": text}]} for text in texts]
        if path == "bigcode/starcoderdata":
            return [{"content": text} for text in texts]
        return [{"text": text, "url": "https://"} for text in texts]


def test_math_recipe(monkeypatch):
    hub = Hub()
    monkeypatch.setattr("datasets.load_dataset", hub)
    meta = run("--recipe", "math", "--max_tokens", 50_000)
    assert ("openai/gsm8k", "main", "test") in hub.asked
    assert ("open-web-math/open-web-math", None, "train") in hub.asked
    assert meta["contamination"]["questions"] == 50
    assert len(Path("out/questions.jsonl").read_text().splitlines()) == 50
    assert all(text.startswith("Question: ") for text in read("out", "ref"))
    assert any("openai/gsm8k train" in text for text in read("out", "ref"))
    assert not any("openai/gsm8k test" in text for text in read("out", "ref"))
    assert [s["role"] for s in meta["sources"]] == ["reference"] * 3 + ["corpus", "questions"]


def test_general_recipe_mixes_6_3_1(monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", Hub(rows=2000))
    run("--recipe", "general", "--max_tokens", 300_000)
    counts = {"cerebras": 0, "bigcode": 0, "open-web-math": 0}
    for text in read("out", "train"):
        counts[text.split("/")[0]] += len(text)
    share = [round(10 * count / sum(counts.values()), 1) for count in counts.values()]
    assert np.allclose(share, [6, 3, 1], atol=0.3)


def test_no_network_names_the_way_out(monkeypatch, capsys):
    def offline(*args, **kwargs):
        raise ConnectionError("Couldn't reach the hub\nafter 5 retries")

    monkeypatch.setattr("datasets.load_dataset", offline)
    line = refused(capsys, "--recipe", "math")
    assert "--reference" in line and "--corpus" in line and "openai/gsm8k" in line


def test_network_lost_on_the_way_leaves_nothing(monkeypatch, capsys):
    hub = Hub()

    def cut(path, *args, **kwargs):
        yield from hub(path, *args, **kwargs)[:40]
        if path.startswith("open-web-math"):
            raise OSError("connection reset")

    monkeypatch.setattr("datasets.load_dataset", cut)
    line = refused(capsys, "--recipe", "math")
    assert "open-web-math" in line and "connection reset" in line


# ---- bad input: status 2, one line, nothing written ----


def test_corrupt_line_is_named(text, capsys):
    flags, reference, _ = text
    append("ref.jsonl", b'{"text": "cut of\n')
    assert "ref.jsonl:41" in (line := refused(capsys, *flags)) and "--skip_bad" in line
    append("ref.jsonl", b'\xff\xfe{"text": 1}\n[1]\n3\nnull\n{"text": null}\n')
    append("ref.jsonl", b"[" * 100_000 + b"\n")
    meta = run(*flags, "--skip_bad")
    assert meta["sources"][0]["skipped"] == 7 and meta["sources"][0]["rows"] == 47
    assert sorted(read("out", "ref") + read("out", "val")) == sorted(reference)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_missing_field_names_those_there(text, capsys, kind):
    import pyarrow
    import pyarrow.parquet

    rows = {"body": ["some"] * 30, "title": ["other"] * 30}
    pyarrow.parquet.write_table(pyarrow.table(rows), "f.parquet")
    write_jsonl("f.jsonl", [{"body": "some", "title": "other"}] * 30)
    line = refused(capsys, "--reference", f"f.{kind}", *text[0][2:])
    assert all(part in line for part in (f"f.{kind}:1", "text", "body, title", "--field"))
    line = refused(capsys, "--reference", f"f.{kind}", *text[0][2:], "--skip_bad")
    assert "--reference: too little" in line and "--skip_bad skipped" in line


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl.gz", b"not gzip at all"),
        ("b.jsonl.gz", gzip.compress(b'{"text": "' + os.urandom(9999).hex().encode())[:-999]),
        ("c.jsonl.xz", b"\xfd7zXZ\x00\x00 no more"),
        ("d.parquet", b"PAR1 and no more"),
    ],
)
def test_damaged_file_is_named(text, capsys, name, content):
    Path(name).write_bytes(content)
    line = refused(capsys, *text[0][:3], name)
    assert line.startswith(f"{name}: ")


def test_paths_that_hold_nothing(text, capsys):
    flags, *_ = text
    Path("empty").mkdir()
    Path("web.csv").write_text("a,b\n")
    Path("none.jsonl").write_text("")
    Path("short.jsonl").write_text('{"text": "too short"}\n')
    assert "nosuch.jsonl" in refused(capsys, *flags[:3], "nosuch.jsonl")
    assert "--corpus empty" in refused(capsys, *flags[:3], "empty")
    assert "--corpus web.csv" in refused(capsys, *flags[:3], "web.csv")
    assert "--corpus: too little text" in refused(capsys, *flags[:3], "none.jsonl")
    assert "--corpus" in refused(capsys, *flags[:3], "short.jsonl")
    assert "--reference" in refused(capsys, "--reference", "short.jsonl", *flags[2:])
    assert "--val" in refused(capsys, *flags, "--val", "none.jsonl")
    assert "--corpus: too little text" in refused(capsys, *flags[:2])
    assert "--reference: too little text" in refused(capsys, *flags[2:])
    assert "q.jsonl:1" in refused(
        capsys, *flags, "--questions", write_jsonl("q.jsonl", [{"question": "Why?"}])
    )


def test_unknown_flag_and_bad_numbers(text, capsys):
    for flags in (["--bogus"], ["--seed", "x"], ["--recipe", "none"], ["--max_tokens", "x"]):
        with pytest.raises(SystemExit) as stop:
            prepare_data.main(flags)
        assert stop.value.code == 2 and flags[0] in capsys.readouterr().err


def test_no_flags_make_the_demo(monkeypatch):
    made, usual = [], prepare_data.prepare_demo.__defaults__[1:5]
    monkeypatch.setattr(prepare_data, "prepare_demo", lambda *given: made.append(given))
    prepare_data.main([])
    prepare_data.main(["--out", "mine", "--seed", "3"])
    assert made == [("data/demo", 1337, *usual), ("mine", 3, *usual)]


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        prepare_data.main(["-h"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out.split("options:")[1]
    for entry in shown.split("\n  -")[1:]:
        assert len(" ".join(entry.split()).split(" ")) > 3, entry


def test_unknown_tokenizer_lists_the_choices(text, capsys):
    with pytest.raises(InputError, match="gpt9.*gpt2.*cl100k_base"):
        get_tokenizer({"name": "gpt9"})
    with pytest.raises(InputError, match="--tokenizer"):
        get_tokenizer({"name": "damaged", "ranks": ["AA=="]})
    with pytest.raises(SystemExit) as stop:
        prepare_data.main([*text[0], "--tokenizer", "nosuch/meta.json"])
    assert stop.value.code == 2 and "nosuch/meta.json" in capsys.readouterr().err


def test_tokenizer_that_cannot_be_downloaded(monkeypatch):
    def offline(name):
        raise OSError("no route to host")

    monkeypatch.setattr(prepare_data.tiktoken, "get_encoding", offline)
    with pytest.raises(InputError, match="gpt2.*TIKTOKEN_CACHE_DIR"):
        get_tokenizer({"name": "gpt2"})


# ---- full disks and interruptions ----


class FullDisk(io.FileIO):
    """A file that takes 20 kB and then has no room."""

    def write(self, data):
        if self.tell() + len(data) > 20_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


@pytest.fixture
def full_disk(monkeypatch):
    plain = builtins.open

    def open_full(path, mode="r", *args, **kwargs):
        if mode == "wb" and str(path).endswith("train.bin"):
            return FullDisk(path, "w")
        return plain(path, mode, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", open_full)


def test_full_disk(text, full_disk, capsys):
    line = refused(capsys, *text[0])
    assert "No space left" in line and "out is not written" in line


def test_failure_leaves_an_earlier_preparation_whole(text, capsys):
    flags, *_ = text
    run(*flags)
    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    append("web.jsonl", b"{bad\n")
    assert "web.jsonl:301" in refused(capsys, *flags)
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == before


def test_interrupted_run_leaves_nothing_and_the_next_starts_cleanly(text, monkeypatch):
    flags, *_ = text
    plain, seen, before = prepare_data.row_text, [], sorted(Path().iterdir())

    def interrupted(row, fields):
        seen.append(row)
        if len(seen) > 200:
            raise KeyboardInterrupt
        return plain(row, fields)

    monkeypatch.setattr(prepare_data, "row_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(*flags)
    assert sorted(Path().iterdir()) == before
    monkeypatch.setattr(prepare_data, "row_text", plain)
    run(*flags)
    assert sorted(Path().iterdir()) == sorted([*before, Path("out")])


def test_killed_while_renaming_is_not_a_prepared_folder(text, monkeypatch):
    flags, *_ = text
    run(*flags)
    plain = os.replace

    def killed(source, target):
        if Path(target).name == "train.bin":
            raise KeyboardInterrupt
        plain(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        run(*flags, "--seed", 2)
    assert not Path("out/meta.json").exists()
    with pytest.raises(InputError, match="meta.json is missing"):
        load_meta("out")
    monkeypatch.setattr(os, "replace", plain)
    run(*flags, "--seed", 2)


def test_knobs_of_the_demo(tmp_path):
    """--wrong, --dirty, --n_ref and --max_tokens make other pages; what cannot be is refused."""
    small = ["--n_ref", "300", "--max_tokens", "24000"]
    for out, flags in {"no": ["--wrong", "0"], "all": ["--wrong", "1", "--dirty", "0"]}.items():
        prepare_data.main([*small, *flags, "--out", str(tmp_path / out)])
    kinds = {out: np.load(tmp_path / out / "kinds.npz")["train"] for out in ("no", "all")}
    names = json.loads((tmp_path / "no" / "meta.json").read_text())["kinds"]
    found = {out: {names[k] for k in np.unique(kind)} for out, kind in kinds.items()}
    assert "wrong" not in found["no"] and "noise" in found["no"]
    assert "wrong" in found["all"] and "noise" not in found["all"]
    assert 24_000 <= len(kinds["no"]) < 30_000
    with pytest.raises(SystemExit, match="2"):
        prepare_data.main(["--wrong", "1.5", "--out", str(tmp_path / "bad")])
    assert not (tmp_path / "bad").exists()


def test_another_preparation_leaves_nothing_of_the_one_before(text):
    write_jsonl("q.jsonl", [{"question": LONG, "answer": "42"}])
    run(*text[0], "--questions", "q.jsonl")
    Path("out/kinds.npz").write_bytes(b"0")
    run(*text[0])
    names = sorted(path.name for path in Path("out").iterdir())
    assert names == ["meta.json", "ref.bin", "train.bin", "val.bin", "val_corpus.bin"]


# ---- meta.json ----


def test_load_meta_names_what_disagrees(text):
    flags, *_ = text
    run(*flags)
    command = "Run: python prepare_data.py --reference ref.jsonl"
    train = Path("out/train.bin").read_bytes()
    Path("out/train.bin").write_bytes(train[:-1])
    with pytest.raises(InputError, match=f"train.bin.*{command}"):
        load_meta("out")
    Path("out/train.bin").unlink()
    with pytest.raises(InputError, match=f"missing.*train.bin.*{command}"):
        load_meta("out")
    Path("out/train.bin").write_bytes(train)
    meta = json.loads(Path("out/meta.json").read_text())
    for damaged in ({**meta, "dtype": "uint32"}, {**meta, "dtype": "u7"}, {"dtype": "uint16"}, []):
        Path("out/meta.json").write_text(json.dumps(damaged))
        with pytest.raises(InputError, match="Run: python prepare_data.py"):
            load_meta("out")
    Path("out/meta.json").write_text('{"dtype": "ui')
    with pytest.raises(InputError, match="damaged"):
        load_meta("out")
    with pytest.raises(InputError, match="nosuch.*Run: python prepare_data.py"):
        load_meta("nosuch")


# ---- memory ----

PEAK = """
import sys, prepare_data
prepare_data.np.memmap = lambda *_, **__: b""  # mapped pages are a cache that Linux takes back
prepare_data.main(sys.argv[1:])
print("peak", open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_corpus(text):
    def peak(megabytes):  # not ru_maxrss: a child inherits that of pytest, larger than its own
        name = f"{megabytes}.jsonl"
        line = json.dumps({"text": " ".join(WORDS * 60)}) + "\n"
        with open(name, "w") as file:
            for i in range(megabytes * 1_000_000 // len(line)):
                file.write(line.replace("sum", str(i), 1))
        flags = [*text[0][:3], name, "--out", f"o{name}", "--tokenizer", "bytes/meta.json"]
        command = [sys.executable, "-c", PEAK, *flags]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        shown = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
        return int(shown.split("peak")[1]) / 1000  # MB

    small, large = peak(3), peak(40)
    assert large - small < 15, (small, large)
