"""prepare_data.py: what goes in comes out, splits, contamination, tokenizers, bad input, kills.

No network and no gpt2: a byte-level tokenizer stands in. Oracles are plain loops, `transformers`
or the text itself. Each test was seen to fail with the code broken on purpose.
"""

import base64
import csv
import errno
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import random
import re
import shlex
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import prepare_data
from prepare_data import get_tokenizer, load_meta, read_rows, tokenizer_spec

WORDS = "sum of two odd numbers is even so each proof begins with what we know and ends there"
WORDS = WORDS.split()
QUESTION = (
    "A farmer has seven fields with twelve rows of corn each, and he harvests half of the rows "
    "before noon. How many of the 1250 rows are left?"
)


def byte_spec(eot=256):
    ranks = [base64.b64encode(bytes([b])).decode() for b in range(256)]
    return {"name": "bytes", "n_vocab": eot + 1, "eot": eot, "pat_str": r"\S+|\s+", "ranks": ranks}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test runs in an empty folder, and `--tokenizer bytes` is one of 257 tokens."""
    monkeypatch.chdir(tmp_path)
    plain = prepare_data.tokenizer_spec
    known = {"bytes": byte_spec(), "large": byte_spec(70_000)}
    monkeypatch.setattr(prepare_data, "tokenizer_spec", lambda name: known.get(name) or plain(name))


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


@pytest.fixture
def text():
    """(flags, reference documents, corpus documents) of a small run."""
    reference, corpus = documents(40, "ref"), documents(300, "web")
    flags = ["--reference", write_jsonl("ref.jsonl", reference)]
    return flags + ["--corpus", write_jsonl("web.jsonl", corpus)], reference, corpus


def run(*flags, out="out", tokenizer="bytes"):
    prepare_data.main([*map(str, flags), "--out", out, "--tokenizer", tokenizer])
    return load_meta(out)


def refused(*flags, **kwargs):
    """What a run says that must end with a single line; it leaves every file as it was."""
    before = contents(".")
    with pytest.raises(SystemExit) as end:
        run(*flags, **kwargs)
    assert contents(".") == before
    said = str(end.value.code)
    assert "\n" not in said
    return said


def contents(folder):
    paths = sorted(Path(folder).rglob("*"))
    return {str(path): path.read_bytes() for path in paths if path.is_file()}


def read(name, out="out"):
    """The documents of a stream, decoded, without the end-of-text in front of each."""
    meta = load_meta(out)
    tokens = np.fromfile(Path(out, f"{name}.bin"), meta["dtype"])
    starts = np.flatnonzero(tokens == meta["tokenizer"]["eot"])
    assert starts[0] == 0 and len(starts) == meta["documents"][name]
    assert len(tokens) == meta["tokens"][name]
    decode = get_tokenizer(meta["tokenizer"]).decode
    return [decode(part[1:]) for part in np.split(tokens, starts[1:])]


def corpus_of(out="out"):
    return sorted(read("train", out) + read("val_corpus", out))


def reference_of(out="out"):
    return sorted(read("ref", out) + read("val", out))


# ---- what goes in comes out ----


@pytest.mark.parametrize(("tokenizer", "dtype"), [("bytes", "uint16"), ("large", "uint32")])
def test_tokens_on_disk_decode_to_the_documents(text, tokenizer, dtype):
    flags, reference, corpus = text
    reference[3] += " naïve 日本語 🙂 <|endoftext|> \r\n\t\0 \u2028 tail"
    write_jsonl("ref.jsonl", [*reference, "", "half \ud83d of it"])
    append("ref.jsonl", b'\n{"text": "caf\xe9"}\n')  # not UTF-8
    append("ref.jsonl", '{"text": "a line\u2028end"}\n'.encode())
    meta = run(*flags, tokenizer=tokenizer)
    assert meta["dtype"] == dtype
    assert reference_of() == sorted(
        [*reference, "half ? of it", "a line\u2028end", "caf\N{REPLACEMENT CHARACTER}"]
    )
    assert corpus_of() == sorted(corpus)
    assert sorted(meta["files"]) == ["ref.bin", "train.bin", "val.bin", "val_corpus.bin"]
    for name, digest in meta["files"].items():
        assert prepare_data.file_digest(Path("out", name)) == digest
    counts = meta["sources"][0]["counts"]
    assert (counts["rows"], counts["empty"], counts["characters replaced"]) == (44, 1, 1)
    assert counts["tokens"] == meta["tokens"]["ref"] + meta["tokens"]["val"]
    # The order stays, but for a few that were held out for a while.
    places = [corpus.index(row) for row in read("train")]
    assert sum(a > b for a, b in itertools.pairwise(places)) < 20


def zst(data):
    return pyarrow.compress(data, codec="zstd", asbytes=True)


def every_format(rows):
    """A folder with a file of each format with the rows, each row led by the file's name."""
    Path("web").mkdir()
    packers = {"gz": gzip.compress, "xz": lzma.compress, "zst": zst}
    everything = []
    for name in "a.jsonl b.jsonl.gz c.NDJSON.xz d.jsonl.zst e.json f.csv g.parquet".split():
        named = [f"{name} {row}" for row in rows]
        everything += named
        path = Path("web", name)
        lines = "".join(json.dumps({"text": row, "id": 1}) + "\n" for row in named).encode()
        if name == "e.json":
            path.write_text(json.dumps([{"text": row} for row in named], indent=1))
        elif name == "f.csv":
            with open(path, "w", newline="") as file:
                csv.writer(file).writerows([["id", "text"], *enumerate(named)])
        elif name == "g.parquet":
            maps = pyarrow.map_(pyarrow.string(), pyarrow.int64())
            extra = pyarrow.array([[("a", 1)]] * len(rows), maps)
            binary = [row.encode() for row in named]
            pyarrow.parquet.write_table(pyarrow.table({"map": extra, "text": binary}), path)
        else:
            pack = packers.get(name.split(".")[-1], b"\xef\xbb\xbf".__add__)
            path.write_bytes(pack(lines))
    return everything


def test_every_format_is_read(text):
    rows = every_format([*documents(20, "x"), 'a "quoted",\nline'])
    run(*text[0][:3], "web")
    assert corpus_of() == sorted(rows)
    assert [row["text"] for path in sorted(Path("web").iterdir()) for row in read_rows(path)] != []
    assert sorted(r["text"] for r in read_rows("web/d.jsonl.zst")) == sorted(rows[63:84])


def test_files_are_read_in_step_and_held_out_over_all(text):
    """A prefix is a fair sample, packed or not."""
    rows = every_format(documents(1500, "x"))
    run(*text[0][:3], "web", "--max_tokens", sum(map(len, rows)) // 3)
    counts = Counter(row.split()[0] for row in read("train"))
    assert len(counts) == 7 and 400 < min(counts.values()) <= max(counts.values()) < 600, counts
    held = Counter(row.split()[0] for row in read("val_corpus"))
    assert len(held) == 7 and sum(held.values()) == 200
    places = [int(row.split("-")[1].split(":")[0]) for row in read("val_corpus")]
    assert max(places) > 600 and 300 < np.mean(places) < 420


def test_weights_names_with_colons_and_a_home(text, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_jsonl("a::b.jsonl", documents(2000, "one"))
    write_jsonl("two.jsonl", [{"body": row} for row in documents(2000, "two")])
    both = ["a::b.jsonl:3", "~/two.jsonl::body:1.0"]
    run(*text[0][:3], *both, "--max_tokens", 150_000)
    counts = Counter(row[:4] for row in read("train"))
    assert 2.6 < counts["one-"] / counts["two-"] < 3.4


def test_folders_pass_over_hidden_and_other_files(text):
    Path("web/deep.parquet/.git").mkdir(parents=True)
    write_jsonl("web/deep.parquet/a.JSONL", text[2])
    for name in ("._a.jsonl", ".git/b.jsonl", "c.pdf", "README.md"):
        write_jsonl(f"web/deep.parquet/{name}", ["not to be read"])
    pyarrow.parquet.write_table(pyarrow.table({"other": []}), "web/empty.parquet")
    Path("web/empty.jsonl").write_text("")
    meta = run(*text[0][:3], "web")
    assert corpus_of() == sorted(text[2])
    assert meta["sources"][1]["counts"]["files passed over"] == 4
    for folder in ("web/deep.parquet/", "web/../web"):
        run(*text[0][:3], folder)
        assert corpus_of() == sorted(text[2])


def test_long_txt_is_cut(text):
    lines = "".join(f"line {i} of a long text, and on and on\n" for i in range(9000))
    Path("long.txt").write_bytes(lines.encode().replace(b"\n", b"\r\n"))
    Path("one.md").write_text("word " * 40_000)
    run(*text[0][:3], "long.txt", "one.md")
    assert all(len(piece) <= 1 << 16 for piece in corpus_of())
    pieces = [piece for piece in corpus_of() if piece.startswith("line ")]
    assert "".join(sorted(pieces, key=lambda piece: int(piece.split()[1]))) == lines
    assert sum(len(piece) for piece in corpus_of() if "line" not in piece) == 200_000


def test_the_only_document_is_on_both_sides(text):
    Path("one.txt").write_text(whole := " ".join(WORDS * 100))
    run(*text[0][:3], "one.txt")
    assert read("train")[0] + read("val_corpus")[0] == whole


def test_of_a_few_documents_that_could_all_be_held_out_one_is_not(text):
    """A tenth of all digests is small, and so may be those of all documents of a small file."""
    pool = iter(documents(1000, "few"))

    def is_small(row):
        return hashlib.sha256(b"1337 train" + row.replace(" ", "").encode()).digest() < b"\x1a"

    few = [*itertools.islice(filter(is_small, pool), 3)]
    run(*text[0][:3], write_jsonl("few.jsonl", few))
    (cut,) = read("train")
    kept = [row for row in few if row in read("val_corpus")]
    assert len(kept) == 2 and len(read("val_corpus")) == 3
    (whole,) = set(few) - set(kept)
    assert whole.startswith(cut) and whole.removeprefix(cut) in read("val_corpus")


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress, zst])
def test_an_archive_of_several_parts_is_read_in_full(text, pack):
    """As `cat a.gz b.gz` makes it; it is a few kB."""
    rows = [f"{i} {'packed words ' * 30}" for i in range(6000)]
    lines = [json.dumps({"text": row}) + "\n" for row in rows]
    parts = ["".join(lines[:5000]), "".join(lines[5000:5001]), "".join(lines[5001:])]
    name = {gzip.compress: "gz", lzma.compress: "xz", zst: "zst"}[pack]
    path = Path(f"web.jsonl.{name}")
    path.write_bytes(b"".join(pack(part.encode()) for part in parts))
    assert [row["text"] for row in read_rows(path)] == rows
    source = prepare_data.Source("corpus", str(path), "text")
    progress = [item[0] for item in prepare_data.read_files(source, [path])]
    assert min(np.diff(progress)) > -1e-9 and progress[-1] == pytest.approx(1)


# ---- fields and chats ----


def test_fields_of_each_path(text):
    rows = [{"query": f"{i} and {i}?", "more": None, "response": 2 * i} for i in range(100)]
    qa = write_jsonl("q a.jsonl", rows)
    meta = run("--reference", f"{qa}::query,more,response", *text[0][2:])
    assert shlex.split(meta["command"])[3] == "q a.jsonl::query,more,response"
    assert "Question: 7 and 7?\nAnswer: 14" in reference_of()
    write_jsonl(qa, [{**row, "more": "Add."} for row in rows])
    run("--reference", f"{qa}::query,more,response", *text[0][2:])
    assert "Question: 7 and 7?\nAdd.\nAnswer: 14" in reference_of()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ("a,b,c,d", "three FIELDS"),
        ("messages,a", "messages is list"),
        ("tags", "list of str"),
        ("other", "there are a, flag, nothing, messages, tags"),
        ("flag", "flag is bool"),
        ("nothing", "nothing is NoneType"),
    ],
)
def test_what_is_no_text_is_refused_by_name(text, fields, said):
    turns = [{"role": "user", "content": "hi"}]
    row = {"a": "1", "flag": True, "nothing": None, "messages": turns, "tags": ["A", "B"]}
    line = refused(*text[0][:3], write_jsonl("r.jsonl", [row]) + f"::{fields}")
    assert "r.jsonl" in line and said in line and "--skip_bad" not in line


@pytest.mark.parametrize("role", ["questions", "sft"])
def test_questions_and_pairs_without_fields_are_refused(text, role):
    Path("q.txt").write_text("What is it?")
    assert "a str, no row with fields" in refused(*text[0], f"--{role}", "q.txt")
    line = refused(*text[0], f"--{role}", write_jsonl("q.jsonl", ["What?"]))
    assert "no field question; there are text" in line
    chat = write_jsonl("q.jsonl", [{"messages": [{"role": "user", "content": "What?"}]}])
    if role == "questions":
        assert "messages is list" in refused(*text[0], "--questions", chat)
    row = {"text": ["no"], "question": [QUESTION], "answer": ["1"]}
    pyarrow.parquet.write_table(pyarrow.table(row), "q.parquet")
    meta = run(*text[0], f"--{role}", "q.parquet")
    assert meta["sources"][-1]["counts"]["rows"] == 1


def test_chats_keep_their_roles(text):
    parts = [{"type": "text", "text": "Add "}, {"type": "image"}, {"type": "text", "text": "2."}]
    chats = [
        [{"role": "user", "content": parts}, {"role": "assistant", "content": None}],
        [{"from": "user", "value": "Add 2."}, {"from": "assistant", "value": "4"}],
        [{"human": "Add 2.", "assistant": "4"}],
    ]
    path = write_jsonl("m.jsonl", [{"m": turns} for turns in chats])
    run(*text[0], path + "::m")
    assert sorted(set(corpus_of()) - set(text[2])) == [
        "human: Add 2.\nassistant: 4",
        "user: Add 2.\nassistant: ",
        "user: Add 2.\nassistant: 4",
    ]


def test_sft_masks_answers_and_the_token_that_ends_them(text):
    turns = [("user", "hi"), ("assistant", "yo"), ("user", "ok")]
    pairs = [
        {"question": "1+1?", "answer": "2"},
        {"instruction": "Add", "output": "3"},
        {"messages": [{"role": role, "content": said} for role, said in turns]},
    ]
    meta = run(*text[0], "--sft", write_jsonl("sft.jsonl", pairs * 2))
    tokens = np.fromfile("out/sft.bin", np.uint16)
    mask = np.fromfile("out/sft_mask.bin", np.uint8)
    assert len(tokens) == len(mask) == meta["tokens"]["sft"]
    shown = "".join("|" if token == 256 else chr(token) for token in tokens)
    whole = "|Question: 1+1?\nAnswer: 2|Question: Add\nAnswer: 3|user: hi\nassistant: yo\nuser: ok"
    assert shown == whole + whole + "|"
    learned = "".join(char if kept else "." for char, kept in zip(shown, mask, strict=True))
    assert learned.replace(".", "") == " 2| 3| yo" * 2 and learned[0] == learned[-1] == "."


def test_pairs_without_an_answer_are_refused(text):
    for role in ("Assistant", "narrator"):
        row = {"messages": [{"role": "user", "content": "hi"}, {"role": role, "content": "yo"}]}
        path = write_jsonl("sft.jsonl", [row])
        if role == "Assistant":
            run(*text[0], "--sft", path)
        else:
            assert "--sft has no answer" in refused(*text[0], "--sft", path)


def test_a_token_over_a_seam_belongs_to_the_later_part():
    """ "ab" is a token, and becomes another one when "c" follows."""
    spec = byte_spec(258)
    spec["ranks"] += [base64.b64encode(token).decode() for token in (b"ab", b"abc")]
    tokenizer = get_tokenizer(spec)
    parts = [("x ab", False), ("c", True), (" d", False)]
    tokens, labels = prepare_data.labelled_tokens(parts, tokenizer)
    assert tokenizer.decode(tokens[1:]) == "x abc d"
    learned = [token for token, label in zip(tokens, labels, strict=True) if label]
    assert tokenizer.decode(learned) == "abc" and len(learned) == 1


# ---- splits and the mixture ----


def plain(rows):
    return {"".join(row.split()) for row in rows}


@pytest.mark.parametrize("seed", range(5))
def test_splits_are_disjoint_whatever_is_copied(seed):
    """Copies, and copies in other white space, in any order, in one input and across the two."""
    rng = random.Random(seed)
    pool = documents(rng.choice((15, 60, 250)), "x")
    inputs = {}
    for name in ("ref", "web"):
        rows = rng.choices(pool, k=3 * len(pool)) + documents(20, name)
        inputs[name] = [row.replace(" ", rng.choice((" ", "\n", "  "))) for row in rows]
        write_jsonl(f"{name}.jsonl", inputs[name])
    flags = ["--reference", "ref.jsonl", "--corpus", "web.jsonl", "--seed", seed]
    meta = run(*flags, "--val_docs", 4)
    ref, val, train, val_corpus = [plain(read(n)) for n in ("ref", "val", "train", "val_corpus")]
    assert not val & (ref | train | val_corpus) and not val_corpus & train
    assert ref | val == plain(inputs["ref"]) and train | val_corpus | val >= plain(inputs["web"])
    assert 1 <= len(val) == len(read("val")) <= 4
    assert 1 <= len(val_corpus) == len(read("val_corpus")) <= 60
    counts = meta["sources"][1]["counts"]
    assert counts["rows"] == counts["documents"] + counts.get("duplicates", 0)
    # Which are held out depends on the texts, not on their order.
    write_jsonl("ref.jsonl", inputs["ref"][::-1])
    run(*flags, "--val_docs", 4, out="reversed")
    assert plain(read("val", "reversed")) == val
    run(*flags, "--val_docs", 4, "--seed", 9, out="other")
    assert plain(read("val", "other")) != val


def test_named_held_out_files(text):
    flags, reference, corpus = text
    val = write_jsonl("val.jsonl", reference[:5] + documents(5, "new"))
    write_jsonl("web.jsonl", corpus + reference[:2])
    run(*flags, "--val", val)
    assert sorted(read("val")) == sorted(reference[:5] + documents(5, "new"))
    assert sorted(read("ref")) == sorted(reference[5:])
    assert corpus_of() == sorted(corpus)


@pytest.mark.parametrize("share", [0.1, 0.6, 0.9])
def test_mixed_is_the_corpus_with_clean_documents_all_along(text, share):
    meta = run(*text[0], "--mix", share, "--max_tokens", 30_000)
    assert 30_000 <= meta["tokens"]["train"] < 31_000
    mixed, train, ref = read("mixed"), read("train"), read("ref")
    assert [row for row in mixed if row not in ref] == train
    clean = [row for row in mixed if row in ref]
    assert clean == list(itertools.islice(itertools.cycle(ref), len(clean)))
    sizes = np.array([(len(row.encode()) + 1) * (1 if row in ref else 1j) for row in mixed])
    so_far = sizes.cumsum()[len(sizes) // 10 :]
    assert np.allclose(so_far.real / (so_far.real + so_far.imag), share, atol=0.05)


# ---- contamination ----


def oracle(document, question):
    """Whether 13 words in a row are in both: slow and plain."""

    def words(text):
        text = "".join(c if c.isalnum() else " " for c in text.lower())
        return text.split()

    d, q = words(document), words(question)
    runs = [q[i : i + 13] for i in range(len(q) - 12)]
    return any(d[i : i + 13] in runs for i in range(len(d)))


def kept(text, extra, questions=(QUESTION,)):
    """Whether each extra document is kept in the corpus."""
    write_jsonl("q.jsonl", [{"question": q, "answer": "42"} for q in questions])
    write_jsonl("web.jsonl", text[2] + list(extra))
    meta = run(*text[0], "--questions", "q.jsonl")
    rows = corpus_of()
    assert meta["contamination"]["documents"] == sum(row not in rows for row in extra)
    return [row in rows for row in extra]


def test_a_document_with_13_words_of_a_question_is_dropped_and_no_other(text):
    rng = random.Random(0)
    words = QUESTION.replace("1250", "many").split()
    extra = []
    for i in range(150):
        start, length = rng.randrange(15), rng.randrange(9, 18)
        filler = [" ".join(rng.choices(WORDS, k=rng.randrange(40))) for _ in "ab"]
        extra.append(f"{i} {filler[0]} {' '.join(words[start : start + length])} {filler[1]}")
    wanted = [not oracle(row, " ".join(words)) for row in extra]
    assert 30 < sum(wanted) < 120
    assert kept(text, extra, [" ".join(words)]) == wanted
    lines = Path("out/questions.jsonl").read_text().splitlines()
    assert [json.loads(line)["answer"] for line in lines] == ["42"]


def test_other_ways_to_write_a_question_are_found_too(text):
    end = " ".join(QUESTION.split()[-14:])
    forms = {
        "as it is": f"Q: {QUESTION} A: 7",
        "capitals": QUESTION.upper().replace(" ", "\n ").replace(",", " -- "),
        "full width": "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in QUESTION),
        "underlines": end.replace("many", "_many_").replace(" ", "_"),
        "invisible": end.replace("many", "ma\u200bn\u00ady"),
        "line end": end.replace("noon", "no-\n  on"),
        "thousands": end.replace("1250", "1,250"),
        "over a block's end": "w " * (prepare_data.BATCH // 2 - 20) + end,
        "decomposed": "cafe\u0301 " + end,
    }
    questions = [QUESTION, "café " + end]
    is_kept = kept(text, forms.values(), questions)
    assert dict(zip(forms, is_kept, strict=True)) == dict.fromkeys(forms, False)


def test_what_every_page_has_is_kept(text):
    common = [
        "Why?",
        "What is the value of it?",
        r"\begin{pmatrix} 1 & 1 \\ 1 & 1 \end{pmatrix} 1 1 1 1 1 1 1 1 1 1 1 1 1 1",
        "a b c d e f g h i j k l m n",
    ]
    changed = " ".join(w if i % 12 else "barn" for i, w in enumerate(QUESTION.split()))
    extra = [*common, changed, " ".join(sorted(QUESTION.split()))]
    assert kept(text, extra, [QUESTION, *common]) == [True] * len(extra)


def test_contaminated_reference_is_dropped_before_the_split(text):
    flags, reference, _ = text
    line = write_jsonl("ref.jsonl", reference + documents(20, "clean"))
    run(
        "--reference", line, *flags[2:], "--questions", write_jsonl("q.jsonl", reference) + "::text"
    )
    assert reference_of() == sorted(documents(20, "clean"))


@pytest.mark.parametrize(
    ("row", "saved"),
    [
        ({"question": "1+1?", "answer": 2.0}, ("1+1?", "2.0")),
        ({"problem": "1+1?", "solution": "two"}, ("1+1?", "two")),
        ({"input": "1+1?", "target": 2}, ("1+1?", "2")),
        ({"Body": "Ann has 2. ", "Question": "Left?", "Answer": 2}, ("Ann has 2. \nLeft?", "2")),
        ({"question": "1+1?"}, ("1+1?", "")),
    ],
)
def test_questions_have_the_fields_of_the_public_sets(text, row, saved):
    run(*text[0], "--questions", write_jsonl("q.jsonl", [row]))
    lines = Path("out/questions.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"question": saved[0], "answer": saved[1]}]


# ---- recipes, from local folders laid out as on the hub ----


def test_the_general_recipe_mixes_6_3_1_and_names_the_way_out(monkeypatch):
    def load(name, *config, split, streaming):
        rows = documents(500, f"{name} {split}", words=60)
        turns = [{"role": "user", "content": row, "from": "human"} for row in rows]
        return [
            {"text": row, "content": row, "question": row, "answer": "1", "messages": [turn]}
            | {"conversations": [turn]}
            for row, turn in zip(rows, turns, strict=True)
        ]

    monkeypatch.setattr("datasets.load_dataset", load)
    meta = run("--recipe", "general", "--max_tokens", 100_000)
    counts = Counter()
    for row in read("train"):
        counts[row.split("/")[0]] += len(row)
    shares = [counts[name] / counts.total() for name in ("cerebras", "bigcode", "open-web-math")]
    assert np.allclose(shares, [0.6, 0.3, 0.1], atol=0.03)
    assert meta["contamination"]["questions"] == 500

    def offline(*args, **kwargs):
        raise ConnectionError("Couldn't reach the hub\nafter 5 retries")

    monkeypatch.setattr("datasets.load_dataset", offline)
    line = refused("--recipe", "math", out="new")
    assert all(word in line for word in ("gsm8k", "Couldn't reach", "--reference"))


# ---- bad input: one line, nothing written ----


def test_bad_rows_are_named_or_skipped_and_counted(text, capsys):
    flags, reference, _ = text
    append("ref.jsonl", b'{"text": "cut of\n')
    line = refused(*flags)
    assert "ref.jsonl:41" in line and "--skip_bad" in line
    append("ref.jsonl", b'[1]\n3\nnull\n{"text": null}\n{"other": 1}\n' + b"[" * 100_000 + b"\n")
    write_jsonl("q.jsonl", [{"question": QUESTION}])
    write_jsonl("val.jsonl", documents(9, "val"))
    write_jsonl("web.jsonl", [*text[2], QUESTION, "", documents(9, "val")[3]])
    run(*flags, "--skip_bad", "--questions", "q.jsonl", "--val", "val.jsonl")
    assert sorted(read("ref")) == sorted(reference)
    said = capsys.readouterr().out
    assert re.search(r"reference ref.jsonl: 47 rows, 40 documents, [\d,]+ tokens, 7 skipped", said)
    for count in ("303 rows", "300 documents", "1 empty", "1 contaminated", "1 duplicates"):
        assert re.search(f"corpus web.jsonl: .*{count}", said)


TEXT = b'{"text": "' + b"words and words " * 9 + b'"}\n'
LFS = b"version https://git-lfs.github.com/spec/v1\noid 4d7\n"
DAMAGED = {
    "a.jsonl.gz": (b"not gzip at all", "header"),
    "b.jsonl.gz": (gzip.compress(random.Random(0).randbytes(9999).hex().encode())[:-999], "cut"),
    "b.txt.gz": (gzip.compress(b"some text\n" * 50)[:-4], "cut short"),
    "c.jsonl.xz": (b"\xfd7zXZ\x00\x00 no more", "cut short"),
    "c.txt.xz": (lzma.compress(b"some text\n" * 50)[:-9], "cut short"),
    "z.txt.zst": (zst(random.Random(0).randbytes(300_000).hex().encode())[:-20_000], "cut short"),
    "z.jsonl.zst": (zst(TEXT * 50)[:-5], "cut short"),
    "d.parquet": (b"PAR1 and no more", "cut short"),
    "e.json": (b'[{"text": "a"}, {"text": "b"}', "cut short"),
    "f.txt": (gzip.compress(TEXT), ".gz under another name"),
    "f.jsonl": (zst(TEXT), ".zst under another name"),
    "g.jsonl": (LFS, "git lfs pull"),
    "g.parquet": (LFS, "git lfs pull"),
    "h.txt": ("some text in UTF-16".encode("utf-16"), "not UTF-8"),
    "h.jsonl": (TEXT.decode().encode("utf-16-le"), "not UTF-8"),
    "i.jsonl": ('{"text": "déjà vu, à côté, été"}\n'.encode("latin-1") * 9, "not UTF-8"),
    "k.csv": (b'text\n"some\n', "unexpected end of data"),
    "empty.jsonl": (b"", "too little text for train.bin"),
    "short.jsonl": (b'{"text": "too short"}\n', "too little text for train.bin"),
    "web.pdf": (b"text", "no text there"),
    "missing.jsonl": (None, "not found"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_file_is_named(text, name):
    content, said = DAMAGED[name]
    if content is not None:
        Path(name).write_bytes(content)
    line = refused(*text[0][:3], name, "--skip_bad")
    assert name in line and said in line and "--skip_bad" not in line


def test_the_last_file_and_the_folder_are_tried_before_the_first_token(text, monkeypatch):
    monkeypatch.setattr(prepare_data, "write_split", None)
    Path("web").mkdir()
    for i in range(70):
        write_jsonl(f"web/{i}.jsonl", text[2][:2])
    Path("web/99.jsonl.gz").write_bytes(b"not gzip")
    assert "web/99.jsonl.gz" in refused(*text[0][:3], "web")


def test_one_file_twice_is_refused(text):
    Path("web.jsonl.gz").write_bytes(gzip.compress(Path("web.jsonl").read_bytes()))
    Path("link.jsonl").symlink_to("web.jsonl")
    for again in ("web.jsonl", "./web.jsonl", "web.jsonl.gz", "link.jsonl"):
        assert "the same text" in refused(*text[0], again)
    run(*text[0], "--sft", "web.jsonl::text,text")  # another role may read it too


def test_flags_that_make_no_sense_are_named(text, capsys):
    flags = "max_tokens=nan max_tokens=0 val_docs=0 n_ref=0 wrong=nan mix=1 recipe=math"
    for flag in flags.split():
        with pytest.raises(SystemExit):
            run(*text[0], f"--{flag}")
        assert f"--{flag.split('=')[0]}" in capsys.readouterr().err
    for flags in (text[0][:2], text[0][2:], ["--sft", "web.jsonl"]):
        with pytest.raises(SystemExit):
            run(*flags)
        assert "--corpus" in capsys.readouterr().err
    assert "weight" in refused(*text[0][:3], "web.jsonl:0")
    assert "not found" in refused(*text[0][:3], "")


# ---- the user's own files, full disks, interruptions ----


def test_the_users_own_files_are_never_touched(text):
    flags, *_ = text
    Path("mine").mkdir()
    write_jsonl("mine/questions.jsonl", [{"question": QUESTION, "answer": "1"}])
    asked = [*flags, "--questions", "mine/questions.jsonl"]
    assert "another --out" in refused(*asked, out="mine")
    assert "another --out" in refused(*flags, out="mine")
    Path("mine/questions.jsonl").rename("mine/own.jsonl")
    own = Path("mine/own.jsonl").read_bytes()
    run(*flags, "--questions", "mine/own.jsonl", "--mix", 0.5, out="mine")
    run(*flags, out="mine")
    names = sorted(path.name for path in Path("mine").iterdir())
    assert names == ["meta.json", "own.jsonl", "ref.bin", "train.bin", "val.bin", "val_corpus.bin"]
    assert Path("mine/own.jsonl").read_bytes() == own
    for name in ("train.bin", "meta.json"):
        Path(name).mkdir()
        Path(name, name).write_text('{"mine": 1}')
        assert f"{name}/{name}" in refused(*flags, out=name)


def test_a_full_disk_leaves_what_was_there(text, monkeypatch):
    flags, *_ = text
    run(*flags)
    before = contents(".")

    class FullDisk(io.FileIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    plain = open

    def open_full(path, mode="r", *args, **kwargs):
        is_mixed = mode == "wb" and "mixed" in str(path)
        return FullDisk(path, "w") if is_mixed else plain(path, mode, *args, **kwargs)

    monkeypatch.setattr("builtins.open", open_full)
    with pytest.raises(SystemExit, match="mixed.bin: No space left"):
        prepare_data.run_script(lambda: run(*flags, "--mix", 0.5))
    assert contents(".") == before


def test_whole_file_is_whole_or_as_it_was(monkeypatch):
    with prepare_data.whole_file("new/file") as file:
        file.write(b"old")
    with pytest.raises(OSError) as full, prepare_data.whole_file("new/file") as file:
        file.write(b"half")
        try:  # as torch.save does
            raise OSError(errno.ENOSPC, "full")
        except OSError:
            raise RuntimeError("unexpected pos") from None
    assert full.value.filename == "new/file" and contents("new") == {"new/file": b"old"}


def killed_at(moment):
    """SIGKILL when for the moment-th time a split is written or a file is moved."""
    calls = itertools.count(1)

    def before(plain):
        def function(*args, **kwargs):
            if next(calls) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(*args, **kwargs)

        return function

    for module, name in ((prepare_data, "write_split"), (prepare_data, "clear"), (os, "replace")):
        setattr(module, name, before(getattr(module, name)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_moment_the_same_command_ends_the_same(text):
    new = [*text[0], "--mix", 0.5, "--seed", 2]
    wanted = run(*new, out="other")["files"]
    old = run(*text[0])["files"]
    unfinished = 0
    for moment in itertools.count(1):
        pid = os.fork()
        if pid == 0:
            killed_at(moment)
            run(*new)
            os._exit(0)
        if os.waitpid(pid, 0)[1] == 0:
            break
        try:
            assert load_meta("out")["files"] in (old, wanted)
        except SystemExit as end:
            unfinished += 1
            assert re.search("killed.*Run: python prepare_data.py --ref", end.code)
        if moment % 2:
            assert run(*new)["files"] == wanted
        assert run(*text[0])["files"] == old
    assert unfinished > 5 and load_meta("out")["files"] == wanted
    assert sorted(os.listdir(".")) == ["other", "out", "ref.jsonl", "web.jsonl"]


def test_what_an_older_run_alone_had_goes_also_after_a_kill(text, monkeypatch):
    run(*text[0], "--mix", 0.5)
    plain = os.replace

    def killed(source, target):
        if Path(target).parent.name == "out" and Path(target).name != "meta.json":
            raise KeyboardInterrupt
        plain(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        run(*text[0])
    run(*text[0])
    assert "mixed.bin" not in os.listdir("out")


def test_a_stopped_run_says_so_and_of_two_writers_one_waits_for_nothing(text, monkeypatch, capsys):
    def interrupted(*args):
        assert "another run" in refused(*text[0])
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_data, "write_split", interrupted)
    with pytest.raises(SystemExit, match="130"):
        prepare_data.run_script(lambda: run(*text[0]))
    assert capsys.readouterr().err == "interrupted; what was not finished starts anew\n"
    assert sorted(os.listdir(".")) == ["ref.jsonl", "web.jsonl"]


# ---- meta.json ----


def test_load_meta_names_what_is_wrong_and_advises_nothing_else(text):
    run(*text[0])
    path = Path("out/meta.json")
    meta = json.loads(path.read_text())
    spec = meta["tokenizer"]
    damaged = [[], {}, 3, None, {**meta, "dtype": "u7"}, {**meta, "tokens": {"ref": 1}}]
    damaged += [{**meta, "tokenizer": {**spec, "n_vocab": "768"}}, {**meta, "tokenizer": []}]
    damaged += [{**meta, "tokens": {**meta["tokens"], "val": "9"}}, {**meta, "files": 3}]
    for key in ("tokenizer", "files", "tokens", "dtype"):
        damaged.append({name: value for name, value in meta.items() if name != key})
    for content in [json.dumps(value) for value in damaged] + ['{"dtype": "ui', "\0"]:
        path.write_text(content)
        with pytest.raises(SystemExit, match="^out is damaged.*Run: python prepare_data.py"):
            load_meta("out")
    path.write_text(json.dumps(meta))
    train = Path("out/train.bin").read_bytes()
    for content in (train[:-2], train[:-2] + b"ab", b""):
        Path("out/train.bin").write_bytes(content)
        with pytest.raises(SystemExit, match="train.bin.*Run: .*--reference ref.jsonl"):
            load_meta("out")
    Path("out/train.bin").unlink()
    with pytest.raises(SystemExit, match="train.bin"):
        load_meta("out")
    for wrong in ("ref.jsonl", ".", "nosuch"):
        with pytest.raises(SystemExit) as end:
            load_meta(wrong)
        assert wrong in end.value.code and "delete" not in end.value.code


# ---- tokenizers ----

TRAINING = [" ".join(WORDS), "Zoë’s naïve café, 日本語 1234 + 5678 = 6912", "def f(x):\n  return x"]
TRICKY = ["", " ", "  two  spaces ", "\n\n a", "<s>x</s> <|endoftext|>", "e\u0301 é", "\0\u200b🙂"]
TRICKY += ["<|begin_of_text|>a<|im_end|>", "▁a ▁", "12345", "if x:\n\t\ty\r\n", " <unk> <0x41>"]


def write_tokenizer(kind, start, folder="model"):
    """A tokenizer.json like TinyLlama's ("sentencepiece") or Qwen's ("bytes"), and its config."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    options = {"vocab_size": 700, "show_progress": False}
    if kind == "sentencepiece":
        tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(spaces)
        special = ["<unk>", "<s>", "</s>"]
        all_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(special_tokens=special + all_bytes, **options)
        parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    else:
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        special = ["<|endoftext|>", "<s>", "<|im_end|>"]
        alphabet = tokenizer.pre_tokenizer.alphabet()
        trainer = trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, **options)
        tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(TRAINING * 20 + documents(100, "train"), trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][:3]  # the bytes are plain tokens
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(state))
    if start:
        ids = [("<s>", tokenizer.token_to_id("<s>"))]
        template = processors.TemplateProcessing(single="<s> $A", pair="$A $B", special_tokens=ids)
        tokenizer.post_processor = template
    Path(folder).mkdir()
    tokenizer.save(f"{folder}/tokenizer.json")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    config["eos_token"] = special[-1]
    Path(folder, "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("kind", ["sentencepiece", "bytes"])
def test_a_tokenizer_json_is_what_transformers_makes_of_it(text, kind, start):
    transformers = pytest.importorskip("transformers")
    write_tokenizer(kind, start)
    theirs = transformers.AutoTokenizer.from_pretrained("model")
    rng = random.Random(0)
    texts = [*TRICKY, *documents(50, "prose"), *Path(__file__).read_text().split("\n\n")[:50]]
    for _ in range(100):
        points = [rng.choice((rng.randrange(32, 127), rng.randrange(0xD7FF))) for _ in range(20)]
        texts.append("".join(map(chr, points)))
    options = {"add_special_tokens": False, "split_special_tokens": True}
    wanted = [theirs.encode(text, **options) for text in texts]
    # The text of special tokens stays text, and nothing depends on where the file came from.
    text[1][:] = documents(40, "ref", words=120)
    text[1][0] += " </s> <|endoftext|> stays text"
    write_jsonl("ref.jsonl", text[1])
    run(*text[0], tokenizer="model")
    Path("model").rename("elsewhere")
    meta = load_meta("out")
    tokenizer = get_tokenizer(meta["tokenizer"])
    assert meta["tokenizer"] == tokenizer_spec("elsewhere")
    assert [tokenizer.encode(text) for text in texts] == wanted
    assert [list(ids) for ids in tokenizer.encode_batch(texts)] == wanted
    assert tokenizer.decode([10**6, -1, *tokenizer.encode("odd")]) == "odd"
    assert theirs.eos_token_id in tokenizer.stops and tokenizer.eot in tokenizer.stops
    assert tokenizer.prompt_start == (theirs.encode("") or [tokenizer.eot])
    tokens = np.fromfile("out/ref.bin", meta["dtype"])
    where = np.flatnonzero(tokens == tokenizer.eot)
    assert len(where) == meta["documents"]["ref"]
    for i, id_ in enumerate(tokenizer.document_start):
        assert (tokens[where + i] == id_).all()
    assert tokenizer.document_start == [tokenizer.eot, *theirs.encode("")]
    shown = [tokenizer.decode(part).strip() for part in np.split(tokens, where[1:])]
    held = tokenizer.decode(np.fromfile("out/val.bin", meta["dtype"]))
    assert all(any(row in doc for doc in [*shown, held]) for row in text[1])


def test_tokenizers_that_cannot_be_had_say_why(monkeypatch):
    def said(name):
        with pytest.raises(SystemExit) as end:
            tokenizer_spec(name)
        return str(end.value.code)

    assert "gpt2" in said("gpt9") and "hf download Qwen/Qwen9" in said("Qwen/Qwen9")
    assert "nosuch" in said("nosuch/meta.json")
    Path("model").mkdir()
    assert "model/tokenizer.json is missing" in said("model")
    Path("model/tokenizer.json").write_text("{}")
    assert "pip install" in said("model")

    def offline(name):
        raise OSError("no route to host")

    monkeypatch.setattr(prepare_data.tiktoken, "get_encoding", offline)
    assert "TIKTOKEN_CACHE_DIR" in said("gpt2")


def test_a_small_tokenizer_is_made_of_the_text(text):
    pytest.importorskip("tokenizers")
    meta = run(*text[0], tokenizer="300")
    assert meta["tokenizer"]["n_vocab"] == 300
    assert corpus_of() == sorted(text[2]) and reference_of() == sorted(text[1])
    assert meta["sources"][1]["counts"]["tokens"] < 0.7 * sum(map(len, text[2]))
    assert run(*text[0], out="same", tokenizer="300")["files"] == meta["files"]
    assert run(*text[0], out="third", tokenizer="out/meta.json")["tokenizer"] == meta["tokenizer"]


def test_ids_that_stand_for_nothing_and_special_text():
    tokenizer = get_tokenizer(byte_spec(300))  # a hole from 256 to 299
    assert tokenizer.decode([104, 299, 105, 10**6, -3]) == "hi"
    assert tokenizer.document_start == tokenizer.prompt_start == [300]
    assert tokenizer.stops == {300} and tokenizer.n_vocab == 301
    assert tokenizer.encode("<|endoftext|>") == list(b"<|endoftext|>")


# ---- the demo ----


def test_the_demo_is_what_it_says(tiny_data, capsys):
    """The kinds say where wrong answers begin; questions and pairs for fine-tuning are fresh."""
    meta = load_meta(tiny_data)
    tokenizer = get_tokenizer(meta["tokenizer"])
    kinds = np.load(tiny_data / "kinds.npz")
    lines = Path(tiny_data, "questions.jsonl").read_text().splitlines()
    held = {json.loads(line)["question"] for line in lines}
    assert len(held) == 500
    for split in ("ref", "val", "train", "val_corpus"):
        assert len(kinds[split]) == meta["tokens"][split]
        right = set(np.unique(kinds[split])) == {0}
        assert right == (split in ("ref", "val"))
    tokens = np.fromfile(tiny_data / "train.bin", meta["dtype"])
    for name, marker in (("chatter", " wrote: "), ("noise", "https://"), ("furniture", "Views: ")):
        of_kind = tokenizer.decode(tokens[kinds["train"] == meta["kinds"].index(name)])
        assert of_kind.count(marker) == tokenizer.decode(tokens).count(marker) > 5
    for split in ("ref", "train", "val_corpus", "sft"):
        shown = tokenizer.decode(np.fromfile(tiny_data / f"{split}.bin", meta["dtype"]))
        asked = re.findall("Question: (.*)\nAnswer:", shown)
        assert len(asked) > 2 and not held & set(asked)
    for row in read("ref", tiny_data):
        steps = re.findall(r"<<(.*?)=(.*?)>>", row)
        assert all(eval(left.replace("/", "//")) == int(result) for left, result in steps)
        assert row.endswith(f"#### {steps[-1][1]}\n")
    mask = np.fromfile(tiny_data / "sft_mask.bin", np.uint8)
    pairs = np.fromfile(tiny_data / "sft.bin", meta["dtype"])
    learned = tokenizer.decode(pairs[mask == 1]).split("<|endoftext|>")
    assert len(learned) == 1001 and "Question" not in "".join(learned)


def test_the_demo_has_an_end(monkeypatch):
    monkeypatch.setattr(prepare_data, "prepare_demo", lambda *args: calls.append(args))
    calls = []
    prepare_data.main(["--max_tokens", "inf"])
    prepare_data.main([])
    assert calls == [("data/demo", 1337, 5000, 3_200_000, 0.75, 1, 0.6)] * 2


def test_knobs_of_the_demo():
    small = ["--n_ref", "100", "--max_tokens", "9000", "--out"]
    prepare_data.main([*small, "no", "--wrong", "0", "--mix", "0"])
    prepare_data.main([*small, "all", "--wrong", "1", "--dirty", "0", "--mix", "0.3"])
    kinds = {out: set(np.load(f"{out}/kinds.npz")["train"]) for out in ("no", "all")}
    assert kinds == {"no": {0, 2, 3, 4, 5}, "all": {0, 1, 4}}
    meta = load_meta("all")
    assert 9000 <= meta["tokens"]["train"] < 10_000 and "mixed" not in load_meta("no")["tokens"]
    assert abs(1 - meta["tokens"]["train"] / meta["tokens"]["mixed"] - 0.3) < 0.02
