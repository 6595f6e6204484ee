"""prepare_data.py: what goes in comes out, splits, contamination, tokenizers, bad input, kills.

No network and no gpt2: a byte-level tokenizer stands in, handed over as any folder's can be
(`--tokenizer FOLDER/meta.json`). Each group was seen to fail with the code broken on purpose.
"""

import base64
import builtins
import csv
import errno
import gzip
import hashlib
import io
import json
import lzma
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import prepare_data
from prepare_data import Document, InputError, check_files, get_tokenizer, load_meta

ROOT = Path(prepare_data.__file__).parent
SENTENCE = "sum of two odd numbers is even so each proof begins with what we know and ends there"
WORDS = SENTENCE.split()
DTYPE = np.dtype("<u2")
REMEDY = "; --skip_bad skips such rows"


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


def run(*flags, out="out", tokenizer="bytes/meta.json"):
    """prepare_data.py with these flags -> meta.json of what it made."""
    prepare_data.main([*map(str, flags), "--out", out, "--tokenizer", tokenizer])
    return load_meta(out)


def refused(capsys, *flags, **kwargs):
    """The one line of a run that must be refused, with status 2 and nothing left behind."""
    before = sorted(str(p) for p in Path().rglob("*"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(*flags, **kwargs)
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


def corpus_of(out="out"):
    return read(out, "train") + read(out, "val_corpus")


def reference_of(out="out"):
    return read(out, "ref") + read(out, "val")


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
    meta = run(*flags, tokenizer=f"{tokenizer}/meta.json")
    assert meta["dtype"] == dtype
    assert sorted(reference_of()) == sorted(reference)
    assert sorted(corpus_of()) == sorted(corpus)
    for name, tokens in meta["tokens"].items():
        assert Path("out", f"{name}.bin").stat().st_size == tokens * np.dtype(dtype).itemsize
    assert [source["rows"] for source in meta["sources"]] == [40, 300]
    tokens = meta["tokens"]
    assert meta["sources"][1]["tokens"] == tokens["train"] + tokens["val_corpus"]
    assert sorted(meta["files"]) == ["ref.bin", "train.bin", "val.bin", "val_corpus.bin"]
    for name, digest in meta["files"].items():
        assert hashlib.sha256(Path("out", name).read_bytes()).hexdigest() == digest
    joined = "".join(reference).encode()
    assert meta["sources"][0]["sha256"] == hashlib.sha256(joined).hexdigest()


def test_many_threads_give_the_tokens_of_one_by_one_in_order(monkeypatch):
    encoding, texts = get_tokenizer(byte_spec()), documents(2000, "t")
    texts[7] = " ".join(documents(20_000, "long"))  # is cut, in places where the pattern cuts too
    assert len(texts[7]) > prepare_data.BATCH
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    count = prepare_data.write_tokens(Path("t.bin"), map(Document, texts), encoding, DTYPE)
    plain = [token for text in texts for token in (256, *encoding.encode_ordinary(text))]
    assert np.fromfile("t.bin", dtype=DTYPE).tolist() == plain
    assert count == (len(plain), 2000)


def test_surrogates_bad_bytes_and_empty_documents_do_not_stop_a_run(text):
    flags, reference, _ = text
    append("ref.jsonl", b'{"text": "half \\ud83d of it"}\n\n{"text": ""}\n{"text": "caf\xe9"}\n')
    meta = run(*flags)
    added = ["half ? of it", "caf\N{REPLACEMENT CHARACTER}"]  # the last one was not UTF-8
    assert sorted(reference_of()) == sorted([*reference, *added])
    assert (meta["sources"][0]["empty"], meta["sources"][0]["replaced"]) == (2, 1)


def zst(data):
    return pyarrow.compress(data, codec="zstd", asbytes=True)


def every_format(folder, rows):
    """A file of each format with the rows, each row led by the file's name."""
    Path(folder).mkdir()
    named = {}
    for name in "a.jsonl b.jsonl.gz c.NDJSON.xz d.jsonl.zst e.json f.csv g.parquet h.arrow".split():
        named[name] = [f"{name} {row}" for row in rows]
    lines = {name: Path(write_jsonl("lines", named[name])).read_bytes() for name in named}
    Path(folder, "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines["a.jsonl"])
    Path(folder, "b.jsonl.gz").write_bytes(gzip.compress(lines["b.jsonl.gz"]))
    Path(folder, "c.NDJSON.xz").write_bytes(lzma.compress(lines["c.NDJSON.xz"]))
    Path(folder, "d.jsonl.zst").write_bytes(zst(lines["d.jsonl.zst"]))
    array = [{"id": i, "text": row} for i, row in enumerate(named["e.json"])]
    Path(folder, "e.json").write_text(json.dumps(array, indent=1))
    with open(Path(folder, "f.csv"), "w", newline="") as file:
        csv.writer(file).writerows([["id", "text"], *enumerate(named["f.csv"])])
    maps = pyarrow.array([[("a", 1)]] * len(rows), pyarrow.map_(pyarrow.string(), pyarrow.int64()))
    binary = [row.encode() for row in named["g.parquet"]]
    table = pyarrow.table({"map": maps, "text": binary})
    pyarrow.parquet.write_table(table, Path(folder, "g.parquet"))
    table = pyarrow.table({"text": named["h.arrow"]})
    with pyarrow.ipc.new_stream(Path(folder, "h.arrow"), table.schema) as writer:
        writer.write_table(table)
    Path("lines").unlink()
    return [row for name in named for row in named[name]]


def test_every_format_is_read(text):
    rows = every_format("web", [*documents(20, "x"), 'a "quoted",\nline'])
    run(*text[0][:3], "web")
    assert sorted(corpus_of()) == sorted(rows)


def test_all_files_are_read_in_step_packed_or_not(text):
    """A prefix is a fair sample, and what is held out is drawn over all of it."""
    rows = every_format("web", documents(1500, "x"))
    run(*text[0][:3], "web", "--max_tokens", sum(map(len, rows)) // 3)
    counts = Counter(row.split()[0] for row in read("out", "train"))
    assert len(counts) == 8 and 400 < min(counts.values()) <= max(counts.values()) < 600, counts
    held = Counter(row.split()[0] for row in read("out", "val_corpus"))
    assert len(held) == 8 and 120 < sum(held.values()) <= 200


def test_val_corpus_is_drawn_over_all_of_the_corpus(text):
    run(*text[0][:3], write_jsonl("long.jsonl", documents(12_000, "long", words=5)))
    places = [int(row.split("-")[1].split(":")[0]) for row in read("out", "val_corpus")]
    assert 120 < len(places) <= 200
    assert 4000 < np.mean(places) < 8000 and max(places) > 10_000


def test_a_weight_makes_a_file_faster(text):
    one = write_jsonl("one.jsonl", documents(2000, "one"))
    two = write_jsonl("two.jsonl", documents(2000, "two"))
    run(*text[0][:2], "--corpus", f"{one}:3", two, "--max_tokens", 150_000)
    counts = [sum(t.startswith(name) for t in read("out", "train")) for name in ("one-", "two-")]
    assert 2.6 < counts[0] / counts[1] < 3.4


def test_names_with_colons_and_brackets_and_a_home(text, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    rows = {}
    for name in "a::b.jsonl file:x.json c.jsonl:2 [1]*.jsonl home.jsonl".split():
        rows[name] = documents(3, name)
        write_jsonl(name, rows[name])
    Path("c.jsonl:2").rename("c:2.jsonl")
    names = "a::b.jsonl file:x.json c:2.jsonl:2 [1]*.jsonl::text:0.5 ~/home.jsonl".split()
    run(*text[0][:3], *names)
    assert sorted(corpus_of()) == sorted(sum(rows.values(), []))


def test_folders_pass_over_hidden_and_other_files_and_count_them(text):
    Path("web/deep.parquet/.git").mkdir(parents=True)
    write_jsonl("web/deep.parquet/a.JSONL", text[2])
    for name in ("._a.jsonl", ".git/b.jsonl", "c.pdf", "README.md"):
        write_jsonl(f"web/deep.parquet/{name}", ["not to be read"])
    meta = run(*text[0][:3], "web")
    assert sorted(corpus_of()) == sorted(text[2])
    assert (meta["sources"][1]["hidden"], meta["sources"][1]["ignored"]) == (2, 2)


def test_an_empty_shard_is_empty(text):
    Path("web").mkdir()
    Path("web.jsonl").rename("web/web.jsonl")
    pyarrow.parquet.write_table(pyarrow.table({"other": []}), "web/empty.parquet")
    Path("web/empty.jsonl").write_text("")
    run(*text[0][:3], "web")
    assert sorted(corpus_of()) == sorted(text[2])


@pytest.mark.parametrize("n", [400, 60_000])
def test_long_txt_is_cut_at_line_ends(text, n):
    lines = "".join(f"line {i} of a long text, and on and on\n" for i in range(n))
    Path("long.txt").write_bytes(lines.encode().replace(b"\n", b"\r\n"))
    Path("more.md").write_text("another text, all in one line and not at all long. " * 3)
    run(*text[0][:3], "long.txt", "more.md")
    pieces = [piece for piece in corpus_of() if not piece.startswith("another")]
    assert all(piece.startswith("line ") and len(piece) <= 1 << 16 for piece in pieces)
    assert "".join(sorted(pieces, key=lambda piece: int(piece.split()[1]))) == lines
    assert len(pieces) <= 2 + len(lines) // 65_000


def test_txt_is_cut_without_line_ends_and_at_separators(text):
    Path("one.txt").write_text("word " * 40_000)
    Path("two.txt").write_text("<|end|>".join(f"\nstory {i} {'x' * 3000}\n" for i in range(50)))
    run(*text[0][:3], "one.txt")
    assert max(map(len, corpus_of())) == 1 << 16
    run(*text[0][:3], "two.txt", "--separator", "<|end|>", out="stories")
    assert sorted(corpus_of("stories")) == sorted(Path("two.txt").read_text().split("<|end|>"))


def test_the_only_document_is_in_train_and_val_corpus(text):
    Path("one.txt").write_text(SENTENCE * 400)
    run(*text[0][:3], "one.txt")
    assert read("out", "train")[0] + read("out", "val_corpus")[0] == SENTENCE * 400


# ---- fields and chats ----


def document_text(row, fields):
    return "".join(text for text, _ in prepare_data.row_segments(row, fields))


def test_fields_of_each_path(text):
    pairs = [{"query": f"What is {i} and {i}?", "response": 2 * i} for i in range(200)]
    qa = write_jsonl("qa.jsonl", pairs)
    run("--reference", f"{qa}::query,response", *text[0][2:])
    assert "Question: What is 7 and 7?\nAnswer: 14" in reference_of()
    row = {"instruction": "Add.", "input": "2 2", "output": "4"}
    assert document_text(row, "instruction,input,output") == "Question: Add.\n2 2\nAnswer: 4"
    row["input"] = None
    assert document_text(row, "instruction,input,output") == "Question: Add.\nAnswer: 4"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ("a,b,c,d", "a,b,c,d"),
        ("a,", "a,"),
        ("messages,b", "messages is a list"),
        ("tags", "tags is a list"),
        ("other", "there are a, b, c, d, nothing, flag, messages, tags"),
        ("flag", "flag is a bool"),
        ("nothing", "nothing is null"),
    ],
)
def test_what_is_no_text_is_refused_by_name(text, capsys, fields, said):
    row = {"a": "1", "b": "2", "c": "3", "d": "4", "nothing": None, "flag": True}
    row.update(messages=[{"role": "user", "content": "hi"}], tags=["A", "B"])
    path = write_jsonl("r.jsonl", [row])
    line = refused(capsys, *text[0][:3], f"{path}::{fields}")
    assert path in line and said in line and "--skip_bad" not in line.replace(REMEDY, "")


def test_chats_keep_their_roles():
    user, assistant = "Add 2 and 2.", "That is 4."
    for role, said in (("role", "content"), ("from", "value")):
        turns = [{role: "user", said: user}, {role: "assistant", said: assistant}]
        assert document_text({"m": turns}, "m") == f"user: {user}\nassistant: {assistant}"
    turns = [{"human": user, "assistant": assistant}]
    assert document_text({"m": turns}, "m") == f"human: {user}\nassistant: {assistant}"
    parts = [{"type": "text", "text": "Add "}, {"type": "image"}, {"type": "text", "text": "2."}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": None}]
    assert document_text({"m": turns}, "m") == "user: Add 2.\nassistant: "


def test_sft_masks_answers_and_the_token_that_ends_them(text):
    pairs = [{"question": "1+1?", "answer": "2"}, {"instruction": "Add", "output": "3"}]
    turns = [("user", "hi"), ("assistant", "yo"), ("user", "ok")]
    pairs.append({"messages": [{"role": role, "content": said} for role, said in turns]})
    meta = run(*text[0], "--sft", write_jsonl("sft.jsonl", pairs * 2))
    tokens = np.fromfile("out/sft.bin", np.uint16)
    mask = np.fromfile("out/sft_mask.bin", np.uint8)
    assert len(tokens) == len(mask) == meta["tokens"]["sft"]
    shown = "".join("|" if token == 256 else chr(token) for token in tokens)
    whole = "|Question: 1+1?\nAnswer: 2|Question: Add\nAnswer: 3|user: hi\nassistant: yo\nuser: ok|"
    assert shown == whole[:-1] * 2 + "|"
    learned = "".join(char if kept else "." for char, kept in zip(shown, mask, strict=True))
    assert learned.replace(".", "") == " 2| 3| yo" * 2 and learned.endswith(".")
    assert mask[0] == 0


def test_a_token_over_a_seam_belongs_to_the_later_segment():
    """ "ab" is a token, and becomes another one when "c" follows."""
    ranks = [*(bytes([byte]) for byte in range(256)), b"ab", b"abc"]
    encoding = get_tokenizer(prepare_data.ranks_spec("seam", ranks, 259))
    segments = [("x ab", False), ("c", True), (" d", False)]
    tokens, mask = prepare_data.answer_mask(segments, encoding)
    pieces = [encoding.decode([token]) for token in tokens]
    assert list(zip(pieces, mask, strict=True)) == [
        ("x", False),
        (" ", False),
        ("abc", True),
        (" ", False),
        ("d", False),
    ]


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


def test_the_same_text_as_reference_and_corpus(text):
    """What is held out as target text is not in the corpus, which has held-out text of its own."""
    _, _, corpus = text
    run("--reference", "web.jsonl", "--corpus", "web.jsonl")
    parts = [set(read("out", name)) for name in ("val", "val_corpus", "train")]
    assert set.union(*parts) == set(corpus) and sum(map(len, parts)) == len(corpus)
    assert 10 < len(parts[0]) < 60 and 10 < len(parts[1]) < 60


def test_copies_of_a_document_fall_on_one_side(text):
    """Near copies too, which differ in white space; and across the two inputs."""
    flags, reference, corpus = text
    spaced = [row.replace(" ", "  ").replace(" so ", "\nso ") for row in reference]
    write_jsonl("ref.jsonl", reference + spaced[::-1] + reference)
    write_jsonl("web.jsonl", corpus + spaced + corpus)
    meta = run(*flags, "--val_docs", 3)

    def normal(name):
        return {" ".join(row.split()) for row in read("out", name)}

    assert len(normal("val")) == len(read("out", "val")) == 3
    assert not normal("val") & (normal("ref") | normal("train") | normal("val_corpus"))
    assert not normal("val_corpus") & normal("train")
    assert normal("ref") | normal("val") == set(reference)
    assert [source["duplicates"] for source in meta["sources"]][0] == 6


def test_named_held_out_files(text):
    flags, reference, corpus = text
    val = write_jsonl("val.jsonl", reference[:5] + documents(5, "new"))
    write_jsonl("web.jsonl", corpus + reference[:2])
    run(*flags, "--val", val)
    assert sorted(read("out", "val")) == sorted(reference[:5] + documents(5, "new"))
    assert sorted(read("out", "ref")) == sorted(reference[5:])
    assert not set(reference[:2]) & set(corpus_of())


def test_max_tokens(text):
    flags, reference, _ = text
    meta = run(*flags, "--max_tokens", "1e4", "--val_docs", 4)
    longest = max(map(len, text[1] + text[2])) + 1
    assert 10_000 <= meta["tokens"]["train"] < 10_000 + longest
    assert meta["documents"]["ref"] + meta["documents"]["val"] == len(reference)


# ---- contamination ----

LONG = (
    "A farmer has seven fields with twelve rows of corn each, and he harvests half of the rows "
    "before noon. How many of the 1250 rows are left?"
)
SHORT = "What is nineteen plus twenty-three times four?"


def contaminated(text, *extra, questions=(LONG, SHORT), flags=()):
    """Whether each extra document is kept in the corpus, and the report."""
    write_jsonl("q.jsonl", [{"question": q, "answer": "42"} for q in questions])
    write_jsonl("web.jsonl", text[2] + list(extra))
    meta = run(*text[0], "--questions", "q.jsonl", *flags)
    kept = corpus_of()
    return [document in kept for document in extra], meta["contamination"]


def test_questions_are_found_and_dropped(text):
    thirteen = " ".join(LONG.split()[3:16])
    shouted = "see: " + LONG.upper().replace(" ", "\n ").replace(",", " -- ") + " (lost)"
    curly = f"… “{SHORT.replace('-', '–')}” …"
    # Runs of too few different words are in many a document by chance.
    few, enough = "one two three four 5 6 7 8 9", "one two three four five 6 7 8 9"
    kept, _ = contaminated(text, few, enough, questions=[few, enough])
    assert kept == [True, False]
    kept, found = contaminated(text, f"Q: {LONG}", thirteen, shouted, f"x {SHORT} y", curly)
    assert kept == [False] * 5
    assert (found["questions"], found["found"], found["dropped"]) == (2, 5, True)
    named = {d["document"]: d["question"] for d in found["documents"]}
    assert named["web.jsonl:301"] == named["web.jsonl:303"] == LONG
    assert named["web.jsonl:304"] == named["web.jsonl:305"] == SHORT
    saved = [json.loads(line) for line in Path("out/questions.jsonl").read_text().splitlines()]
    assert saved == [{"question": LONG, "answer": "42"}, {"question": SHORT, "answer": "42"}]


def test_other_ways_to_write_a_question_are_found_too(text):
    end = " ".join(LONG.split()[-14:])
    forms = {
        "full width": "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in LONG),
        "underlines": end.replace("many", "_many_").replace(" ", "_"),
        "invisible": end.replace("many", "ma\u200bn\u00ady"),
        "line end": end.replace("noon", "no-\n  on"),
        "thousands": end.replace("1250", "1,250"),
    }
    kept, _ = contaminated(text, *forms.values())
    assert dict(zip(forms, kept, strict=True)) == dict.fromkeys(forms, False)
    composed = "Zoë’s café sells naïve paintings of thirty cliché scenes; how many are still there?"
    kept, _ = contaminated(text, composed.replace("ë", "e\u0308").upper(), questions=[composed])
    assert kept == [False]
    millions = "Of the 1,250,000 people in this old town how many have seen two large boats?"
    kept, _ = contaminated(text, millions.replace(",", ""), questions=[millions])
    assert kept == [False]


def test_near_misses_and_what_every_page_has_are_kept(text):
    words = LONG.split()
    twelve = " ".join(words[2:14])
    changed = " ".join(w if i % 12 else "barn" for i, w in enumerate(words))
    part = SHORT.rsplit(" ", 1)[0]
    markup = r"\begin{pmatrix} 1 & 1 \\ 1 & 1 \end{pmatrix} 1 1 1 1 1 1 1 1 1 1 1 1 1 1"
    common = ["Why?", "What is the answer?", "What is the value of it?", markup]
    common.append("a b c d e f g h i j k l m n")
    extra = [twelve, changed, part, " ".join(sorted(words)), *common]
    kept, found = contaminated(text, *extra, questions=[LONG, SHORT, *common])
    assert kept == [True] * len(extra) and found["found"] == 0 and found["documents"] == []


def test_every_place_in_a_text_is_searched(text):
    """A run of words is found wherever it begins, in whatever it is hidden."""
    places = [(before, after) for before in range(30) for after in range(3)]
    hidden = [f"{'w ' * b}{q}{' w' * a}" for q in (LONG, SHORT) for b, a in places]
    seam = "w " * (prepare_data.BATCH // 2 - 10) + SHORT + " w" * 9  # over the end of a block
    kept, found = contaminated(text, *hidden, "w " * 100, seam)
    assert found["found"] == len(hidden) + 1 == 181
    assert kept == [False] * len(hidden) + [True, False]


def test_contaminated_reference_is_dropped_before_the_split(text):
    flags, reference, _ = text
    write_jsonl("q.jsonl", [{"question": q} for q in reference])
    line = write_jsonl("ref.jsonl", reference + documents(20, "clean"))
    meta = run("--reference", line, *flags[2:], "--questions", "q.jsonl")
    assert meta["contamination"]["found"] == meta["sources"][0]["contaminated"] == 40
    assert sorted(reference_of()) == sorted(documents(20, "clean"))


def test_contaminated_documents_are_kept_on_demand_and_the_list_is_capped(text):
    many = [f"{i} {LONG}" for i in range(120)]
    kept, found = contaminated(text, *many, flags=["--keep_contaminated"])
    assert all(kept) and not found["dropped"]
    assert found["found"] == 120 and len(found["documents"]) == 100


@pytest.mark.parametrize(
    ("row", "saved"),
    [
        ({"question": "1+1?", "answer": 2.0}, ("1+1?", "2.0")),
        ({"problem": "1+1?", "solution": "two"}, ("1+1?", "two")),
        ({"input": "1+1?", "target": 2}, ("1+1?", "2")),
        ({"Body": "Ann has 2. ", "Question": "Left?", "Answer": 2}, ("Ann has 2. Left?", "2")),
        ({"question": "1+1?"}, ("1+1?", "")),
    ],
)
def test_questions_have_the_fields_of_the_public_sets(text, row, saved):
    run(*text[0], "--questions", write_jsonl("q.jsonl", [row]))
    lines = Path("out/questions.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"question": saved[0], "answer": saved[1]}]


# ---- recipes, from local folders laid out as on the hub ----


def write_hub(rows=300):
    """Each set of the recipes, with its configuration and split, under its name on the hub."""
    for line in prepare_data.RECIPES.strip().splitlines()[1:]:
        _, _, _, name, split, fields = line.split()
        folder, _, config = name.partition(":")
        texts = documents(rows, f"{folder} {split}", words=60)
        columns = {"url": ["https://"] * rows}
        for field in fields.split(","):
            columns[field] = texts
        if fields == "messages":
            columns[fields] = [[{"role": "user", "content": text}] for text in texts]
        if fields == "conversations":
            columns[fields] = [[{"from": "human", "value": text}] for text in texts]
        path = Path(folder, config or "data", f"{split}-00000-of-00001.parquet")
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        if config:
            files = [{"split": s, "path": f"{config}/{s}-*"} for s in ("train", "test")]
            files = [f for f in files if list(Path(folder).glob(f["path"]))]
            card = {"configs": [{"config_name": config, "data_files": files}]}
            Path(folder, "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")


def test_math_recipe():
    write_hub()
    meta = run("--recipe", "math", "--max_tokens", 50_000)
    assert meta["contamination"]["questions"] == 300
    assert len(Path("out/questions.jsonl").read_text().splitlines()) == 300
    assert all(text.startswith("Question: ") for text in read("out", "ref"))
    assert any("openai/gsm8k train" in text for text in read("out", "ref"))
    assert not any("openai/gsm8k test" in text for text in read("out", "ref"))
    assert [s["role"] for s in meta["sources"]] == ["reference"] * 3 + ["corpus", "questions"]


def test_general_recipe_mixes_6_3_1():
    write_hub(rows=500)
    run("--recipe", "general", "--max_tokens", 100_000)
    counts = {"cerebras": 0, "bigcode": 0, "open-web-math": 0}
    for text in read("out", "train"):
        counts[text.split("/")[0]] += len(text)
    share = [round(10 * count / sum(counts.values()), 1) for count in counts.values()]
    assert np.allclose(share, [6, 3, 1], atol=0.3)


def test_columns_of_the_hub_are_checked(capsys):
    write_hub()
    path = Path("open-web-math/open-web-math/data/train-00000-of-00001.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"] * 9}), path)
    line = refused(capsys, "--recipe", "math")
    assert all(word in line for word in ("open-web-math", "text", "body"))


def test_no_network_names_the_way_out(monkeypatch, capsys):
    def offline(*args, **kwargs):
        raise ConnectionError("Couldn't reach the hub\nafter 5 retries")

    monkeypatch.setattr("datasets.load_dataset", offline)
    line = refused(capsys, "--recipe", "math")
    assert all(word in line for word in ("MetaMathQA", "--reference", "--corpus"))


# ---- bad input: status 2, one line, nothing written ----


def test_corrupt_line_is_named(text, capsys):
    flags, reference, _ = text
    append("ref.jsonl", b'{"text": "cut of\n')
    assert "ref.jsonl:41" in (line := refused(capsys, *flags)) and REMEDY in line
    append("ref.jsonl", b'\xff\xfe{"text": 1}\n[1]\n3\nnull\n{"text": null}\n')
    append("ref.jsonl", b"[" * 100_000 + b"\n")
    meta = run(*flags, "--skip_bad")
    assert meta["sources"][0]["skipped"] == 7 and meta["sources"][0]["rows"] == 47
    assert sorted(reference_of()) == sorted(reference)


def test_each_source_has_a_closing_line(text, capsys):
    flags, *_ = text
    write_jsonl("q.jsonl", [{"question": LONG}])
    write_jsonl("web.jsonl", [*text[2], LONG, "", text[1][0], text[1][0]])
    append("web.jsonl", b"{bad\n" * 5000)
    run(*flags, "--questions", "q.jsonl", "--skip_bad")
    shown = capsys.readouterr().out
    (line,) = [line for line in shown.splitlines() if line.startswith("corpus web.jsonl: ")]
    for count in ("5,304 rows", "5,000 skipped", "1 empty", "1 contaminated", "2 duplicates"):
        assert count in line
    assert "300 documents" in line


def test_a_column_that_a_parquet_lacks_names_those_there(text, capsys):
    table = pyarrow.table({"body": ["some"] * 30, "title": ["other"] * 30})
    pyarrow.parquet.write_table(table, "f.parquet")
    line = refused(capsys, "--reference", "f.parquet", *text[0][2:])
    assert all(part in line for part in ("f.parquet", "no text", "body, title", "--field"))
    assert "--skip_bad" not in line


TEXT = b'{"text": "' + b"words and words " * 9 + b'"}\n'


DAMAGED = [
    ("a.jsonl.gz", b"not gzip at all", "BadGzipFile"),
    ("b.jsonl.gz", gzip.compress(os.urandom(9999).hex().encode())[:-999], "cut short"),
    ("b.txt.gz", gzip.compress(b"some text\n" * 50)[:-4], "cut short"),
    ("c.jsonl.xz", b"\xfd7zXZ\x00\x00 no more", "cut short"),
    ("c.txt.xz", lzma.compress(b"some text\n" * 50)[:-9], "cut short"),
    ("z.txt.zst", zst(os.urandom(300_000).hex().encode())[:-20_000], "cut short"),
    ("z.jsonl.zst", zst(TEXT * 50)[:-5], "cut short"),
    ("d.parquet", b"PAR1 and no more", "cut short"),
    ("e.json", b'[{"text": "a"}, {"text": "b', "cut short"),
    ("e.json", b'[{"text": "a"}, {"text": "b"}', "cut short"),
    ("f.txt", gzip.compress(TEXT), "gzip"),
    ("f.jsonl", zst(TEXT), "zstandard"),
    ("g.jsonl", b"version https://git-lfs.github.com/spec/v1\noid 4d7\n", "git lfs pull"),
    ("g.parquet", b"version https://git-lfs.github.com/spec/v1\noid 4d7\n", "git-LFS"),
    ("h.txt", "some text in UTF-16".encode("utf-16"), "UTF-16"),
    ("h.jsonl", TEXT.decode().encode("utf-16-le"), "UTF-16"),
    ("i.jsonl", '{"text": "déjà vu, à côté, été"}\n'.encode("latin-1") * 9, "Latin-1"),
    ("j.jsonl", b"[\n" + TEXT.strip() + b",\n" + TEXT + b"]\n", "name the file .json"),
    ("k.csv", b'text\n"some\n', "unexpected end of data"),
]


# The ids are names alone: a gzip header holds the time, and each process would collect other tests.
@pytest.mark.parametrize(("name", "content", "said"), DAMAGED, ids=[case[0] for case in DAMAGED])
def test_damaged_file_is_named(text, capsys, name, content, said):
    Path(name).write_bytes(content)
    line = refused(capsys, *text[0][:3], name)
    assert name in line and said in line and "--skip_bad" not in line
    assert name in refused(capsys, *text[0][:3], name, "--skip_bad")


def test_the_last_file_and_the_folder_are_tried_before_the_first_token(text, capsys, monkeypatch):
    monkeypatch.setattr(prepare_data, "write_tokens", None)
    Path("web").mkdir()
    for i in range(5):
        write_jsonl(f"web/{i}.jsonl", text[2])
    Path("web/9.jsonl.gz").write_bytes(b"not gzip")
    assert "web/9.jsonl.gz" in refused(capsys, *text[0][:3], "web")
    Path("file").write_text("")
    assert "file" in refused(capsys, *text[0], out="file/out")


def test_paths_that_hold_nothing(text, capsys):
    flags, *_ = text
    Path("empty").mkdir()
    Path("web.pdf").write_text("a,b\n")
    Path("none.jsonl").write_text("")
    Path("short.jsonl").write_text('{"text": "too short"}\n')
    assert "nosuch.jsonl: not found" in refused(capsys, *flags[:3], "nosuch.jsonl")
    assert "--corpus empty: no text" in refused(capsys, *flags[:3], "empty")
    assert "--corpus web.pdf" in refused(capsys, *flags[:3], "web.pdf")
    assert "--corpus: too little text" in refused(capsys, *flags[:3], "none.jsonl")
    assert "--corpus" in refused(capsys, *flags[:3], "short.jsonl")
    assert "--reference" in refused(capsys, "--reference", "short.jsonl", *flags[2:])
    assert "--val: too little" in refused(capsys, *flags, "--val", "none.jsonl")
    assert "--corpus PATH is missing" in refused(capsys, *flags[:2])
    assert "--reference PATH is missing" in refused(capsys, *flags[2:])


def test_too_little_text_says_why(text, capsys):
    flags, *_ = text
    write_jsonl("q.jsonl", [{"question": LONG}])
    few = ["--corpus", write_jsonl("few.jsonl", [LONG] * 30)]
    line = refused(capsys, *flags[:2], *few, "--questions", "q.jsonl")
    assert "30 rows, 30 contaminated; " in line and "--keep_contaminated" in line
    Path("few.jsonl").write_text("{bad\n" * 40)
    assert "40 skipped" in refused(capsys, *flags[:2], *few, "--skip_bad")
    assert "9 empty" in refused(capsys, *flags[:2], *few[:1], write_jsonl("few.jsonl", [""] * 9))


def test_one_file_twice_is_refused(text, capsys):
    flags, *_ = text
    Path("web.jsonl.gz").write_bytes(gzip.compress(Path("web.jsonl").read_bytes()))
    Path("link.jsonl").symlink_to("web.jsonl")
    for again in ("web.jsonl", "./web.jsonl", "web.jsonl.gz", "link.jsonl"):
        assert "the same text" in refused(capsys, *flags, again)


@pytest.mark.parametrize(
    "flag",
    "max_tokens=nan max_tokens=-5 max_tokens=0.5 max_tokens=inf val_docs=0 wrong=nan wrong=1.5 "
    "dirty=-1 n_ref=0 train_tokenizer=100 recipe=math".split(),
)
def test_numbers_out_of_range_are_named(text, capsys, flag):
    assert f"--{flag.split('=')[0]}" in refused(capsys, *text[0], f"--{flag}")


def test_unknown_flags_and_bad_numbers(text, capsys):
    for flags in (["--bogus"], ["--seed", "x"], ["--recipe", "none"], ["--max_tokens", "x"]):
        with pytest.raises(SystemExit) as stop:
            prepare_data.main(flags)
        assert stop.value.code == 2 and flags[0] in capsys.readouterr().err
    for weight in ("0", "-1", "nan"):
        assert "weight" in refused(capsys, *text[0][:3], f"web.jsonl:{weight}")


def test_dry_run_shows_the_first_document_and_writes_nothing(text, capsys):
    flags, *_ = text
    Path("web").mkdir()
    Path("web.jsonl").rename("web/web.jsonl")
    Path("web/c.pdf").write_text("")
    before = sorted(Path().rglob("*"))
    prepare_data.main([*flags[:3], "web", "--dry_run", "--tokenizer", "bytes/meta.json"])
    assert sorted(Path().rglob("*")) == before
    shown = capsys.readouterr().out
    assert text[1][0][:30] in shown and text[2][0][:30] in shown and "1 ignored" in shown


# ---- the user's own files, full disks, interruptions ----


def test_the_users_own_files_are_never_touched(text, capsys):
    flags, *_ = text
    Path("mine").mkdir()
    write_jsonl("mine/questions.jsonl", [{"question": LONG, "answer": "1"}])
    asked = [*flags, "--questions", "mine/questions.jsonl"]
    assert "another --out" in refused(capsys, *asked, out="mine")
    assert "another --out" in refused(capsys, *flags, out="mine")
    Path("mine/questions.jsonl").rename("mine/own.jsonl")
    run(*flags, "--questions", "mine/own.jsonl", out="mine")
    run(*flags, out="mine")
    names = sorted(path.name for path in Path("mine").iterdir())
    assert names == ["meta.json", "own.jsonl", "ref.bin", "train.bin", "val.bin", "val_corpus.bin"]
    Path("nano").mkdir()
    Path("nano/train.bin").write_text("mine")
    assert "nano/train.bin" in refused(capsys, *flags, out="nano")


class FullDisk(io.FileIO):
    """A file that takes 20 kB and then has no room."""

    def write(self, data):
        if self.tell() + len(data) > 20_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def test_full_disk(text, monkeypatch, capsys):
    plain = builtins.open

    def open_full(path, mode="r", *args, **kwargs):
        if mode == "wb" and str(path).endswith("train.bin"):
            return FullDisk(path, "w")
        return plain(path, mode, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", open_full)
    line = refused(capsys, *text[0])
    assert "No space left" in line and "out is not written" in line


def test_failure_leaves_an_earlier_preparation_whole(text, capsys):
    flags, *_ = text
    run(*flags)
    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    append("web.jsonl", b"{bad\n")
    assert "web.jsonl:301" in refused(capsys, *flags)
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == before


def test_killed_while_renaming_is_not_a_prepared_folder(text, monkeypatch):
    flags, *_ = text
    write_jsonl("q.jsonl", [{"question": LONG}])
    run(*flags)
    plain = os.replace

    def killed(source, target):
        if Path(target).name == "train.bin":
            raise MemoryError
        plain(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(MemoryError):
        run(*flags, "--seed", 2, "--questions", "q.jsonl")
    with pytest.raises(InputError, match="meta.json is damaged, or of a run that was killed"):
        load_meta("out")
    monkeypatch.setattr(os, "replace", plain)
    run(*flags, "--seed", 2)
    names = sorted(path.name for path in Path("out").iterdir())
    assert names == ["meta.json", "ref.bin", "train.bin", "val.bin", "val_corpus.bin"]


@pytest.mark.parametrize(("number", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGKILL", -9)])
def test_a_stopped_run_says_so_and_the_next_clears_what_it_left(text, number, status):
    flags, *_ = text
    os.mkfifo("slow.jsonl")  # a reader waits here until it is stopped
    command = [sys.executable, str(ROOT / "prepare_data.py"), *flags, "slow.jsonl", "--out", "out"]
    command += ["--tokenizer", "bytes/meta.json"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while not Path(".out.preparing").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(getattr(signal, number))
    said = process.communicate(timeout=600)[1].strip()
    assert process.returncode == status
    if number != "SIGKILL":
        assert said == "interrupted; out is not written"
    assert Path(".out.preparing").exists() == (number == "SIGKILL")
    Path(".out.other").mkdir()  # not of this run
    run(*flags)
    assert not Path(".out.preparing").exists() and Path(".out.other").exists()


def test_two_runs_cannot_write_one_folder(text, capsys):
    with prepare_data.new_folder("out"):
        assert "another run" in refused(capsys, *text[0])
    run(*text[0])


# ---- meta.json ----


def test_load_meta_names_what_disagrees(text):
    flags, *_ = text
    run(*flags)
    command = "Run: python prepare_data.py --reference ref.jsonl"
    train = Path("out/train.bin").read_bytes()
    for damaged in (train[:-2], train[:-2] + b"ab"):
        Path("out/train.bin").write_bytes(damaged)
        with pytest.raises(InputError, match=f"train.bin.*{command}"):
            load_meta("out")
    with pytest.raises(InputError, match=f"train.bin.*{command}"):
        check_files("out", json.loads(Path("out/meta.json").read_text()))
    Path("out/train.bin").unlink()
    with pytest.raises(InputError, match=f"train.bin.*missing.*{command}"):
        load_meta("out")
    with pytest.raises(InputError, match="nosuch.*Run: python prepare_data.py"):
        load_meta("nosuch")


def test_damaged_meta_is_one_line(text):
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
        with pytest.raises(InputError, match="Run: python prepare_data.py") as error:
            load_meta("out")
        assert "out" in str(error.value) and "\n" not in str(error.value)


# ---- tokenizers ----


def sentencepiece(metaspace):
    """As TinyLlama's (a normalizer writes the spaces) or Mistral's (a pre-tokenizer does)."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from tokenizers.trainers import BpeTrainer

    model = models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁*[^▁]+"), "isolated")
    special = ["<unk>", "<s>", "</s>"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = BpeTrainer(vocab_size=700, special_tokens=[*special, *bytes_], show_progress=False)
    tokenizer.train_from_iterator(TRAINING, trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][:3]  # the bytes are plain tokens
    state["pre_tokenizer"] = None
    if metaspace:
        state["normalizer"] = None
        space = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
        state["pre_tokenizer"] = json.loads(space.__getstate__())
    tokenizer = Tokenizer.from_str(json.dumps(state))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    return tokenizer, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def byte_level(kind):
    """As Llama-3's, SmolLM2's or Qwen's."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from tokenizers.trainers import BpeTrainer

    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+"
    pattern += r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    names = {"Llama-3": ["<|begin_of_text|>", "<|end_of_text|>"], "SmolLM2": ["<|endoftext|>"]}
    special = names.get(kind, ["<|endoftext|>", "<|im_end|>"])
    tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "Llama-3"))
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "SmolLM2")
    first = pre_tokenizers.Digits(individual_digits=True) if kind == "SmolLM2" else split
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, level])
    if kind == "Qwen":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator(TRAINING, BpeTrainer(vocab_size=700, **options))
    bos = None if kind == "Qwen" else special[0]
    return tokenizer, {"bos_token": bos, "eos_token": special[-1]}


TRAINING = [SENTENCE, "Zoë’s naïve café, 日本語 1234 + 5678 = 6912", "def f(x):\n    return x"] * 20
TRAINING += documents(100, "train")
KINDS = ("TinyLlama", "Mistral", "Llama-3", "SmolLM2", "Qwen")
TRICKY = ["", " ", "  two  spaces ", "\n\n a", "<s>x</s> <|endoftext|>", "e\u0301 é", "\0\u200b🙂"]
TRICKY += ["<|begin_of_text|>a<|im_end|>", "▁a ▁", "12345", "if x:\n\t\ty\r\n", " <unk> <0x41>"]


def write_tokenizer(kind):
    made = byte_level(kind) if kind in KINDS[2:] else sentencepiece(kind == "Mistral")
    tokenizer, special = made
    Path(kind).mkdir()
    tokenizer.save(f"{kind}/tokenizer.json")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    Path(kind, "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_a_tokenizer_json_are_those_of_transformers(text, kind):
    pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    write_tokenizer(kind)
    rng = random.Random(0)
    texts = [*TRICKY, *documents(100, "prose"), *Path(__file__).read_text().split("\n\n")[:100]]
    for _ in range(150):
        points = [rng.choice((rng.randrange(32, 127), rng.randrange(0xD7FF))) for _ in range(20)]
        texts.append("".join(map(chr, points)))
    theirs = transformers.AutoTokenizer.from_pretrained(kind)
    options = {"add_special_tokens": False, "split_special_tokens": True}
    spec = prepare_data.tokenizer_spec(kind)
    encoding = get_tokenizer(spec)
    wanted = [theirs.encode(text, **options) for text in texts]
    assert len(texts) > 300
    assert [encoding.encode_ordinary(text) for text in texts] == wanted
    assert encoding.encode_batch(texts) == wanted
    bos = getattr(theirs, "bos_token_id", None)
    assert (spec["bos"], spec["eos"]) == (bos, theirs.eos_token_id)


@pytest.mark.parametrize(
    "setting", [{"add_bos_token": False}, {"tokenizer_class": "GPT2Tokenizer"}]
)
def test_a_bos_that_only_begins_turns_stands_in_front_of_no_document(text, setting):
    """As SmolLM2-Instruct's <|im_start|>, which its own tokenizer puts nowhere."""
    pytest.importorskip("tokenizers")
    write_tokenizer("Llama-3")
    path = Path("Llama-3", "tokenizer_config.json")
    before = get_tokenizer(prepare_data.tokenizer_spec("Llama-3"))
    path.write_text(json.dumps({**json.loads(path.read_text()), **setting}))
    after = get_tokenizer(prepare_data.tokenizer_spec("Llama-3"))
    assert prepare_data.document_start(before) == [after.eot_token, before.bos_token]
    assert prepare_data.document_start(after) == [after.eot_token]


def test_data_with_a_tokenizer_json_can_be_moved(text):
    pytest.importorskip("tokenizers")
    write_tokenizer("TinyLlama")
    text[1][0] += " </s> stays text"
    write_jsonl("ref.jsonl", text[1])
    meta = run(*text[0], tokenizer="TinyLlama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert Path("out", name).read_bytes() == Path("TinyLlama", name).read_bytes()
        Path("TinyLlama", name).unlink()
    Path("out").rename("moved")
    meta = load_meta("moved")
    encoding = get_tokenizer(meta["tokenizer"])
    assert prepare_data.document_start(encoding) == [2, 1]  # </s>, <s>
    assert prepare_data.prompt_start(encoding) == [1]
    assert prepare_data.stop_tokens(encoding) == {1, 2}
    tokens = np.fromfile("moved/ref.bin", meta["dtype"]).tolist()
    tokens += np.fromfile("moved/val.bin", meta["dtype"]).tolist()
    shown = encoding.decode(tokens)
    assert tokens[:2] == [2, 1] and tokens.count(2) == tokens.count(1) == 40
    assert " </s> stays text" in shown
    assert encoding.decode([10**6, -1, *encoding.encode_ordinary("odd")]) == "odd"
    append("moved/tokenizer.json", b" ")
    with pytest.raises(InputError, match="tokenizer.json has changed"):
        get_tokenizer(meta["tokenizer"])


def test_tokenizers_that_cannot_be_had_say_why(text, capsys, monkeypatch):
    with pytest.raises(InputError, match="gpt9.*gpt2.*cl100k_base"):
        get_tokenizer({"name": "gpt9"})
    with pytest.raises(InputError, match="tokenizer.*damaged"):
        get_tokenizer({"name": "damaged", "ranks": ["AA=="]})
    assert "nosuch/meta.json" in refused(capsys, *text[0], tokenizer="nosuch/meta.json")
    Path("model").mkdir()
    Path("model/tokenizer.model").write_text("")
    assert "AutoTokenizer" in refused(capsys, *text[0], tokenizer="model")
    Path("model/tokenizer.json").write_text("{}")
    assert "no tokenizer.json" in refused(capsys, *text[0], tokenizer="model")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert "pip install" in refused(capsys, *text[0], tokenizer="model")

    def offline(name):
        raise OSError("no route to host")

    monkeypatch.setattr(prepare_data.tiktoken, "get_encoding", offline)
    with pytest.raises(InputError, match="gpt2.*TIKTOKEN_CACHE_DIR"):
        get_tokenizer({"name": "gpt2"})


def test_decoding_passes_over_ids_that_stand_for_nothing():
    encoding = get_tokenizer(byte_spec(300))  # a hole from 256 to 299
    assert encoding.decode([104, 299, 105, 10**6, -3]) == "hi"
    assert prepare_data.document_start(encoding) == prepare_data.prompt_start(encoding) == [300]
    assert prepare_data.stop_tokens(encoding) == {300}


def test_a_small_tokenizer_is_trained(text, capsys):
    command = ["--train_tokenizer", "300", "--out", "bpe"]
    prepare_data.main([*command, "web.jsonl", "ref.jsonl"])
    meta = run(*text[0], tokenizer="bpe/meta.json")
    assert (meta["tokenizer"]["n_vocab"], meta["tokenizer"]["eot"]) == (300, 299)
    assert sorted(corpus_of()) == sorted(text[2])
    assert meta["sources"][1]["tokens"] < 0.6 * sum(map(len, text[2]))
    with pytest.raises(SystemExit, match="2"):
        prepare_data.main(["--train_tokenizer", "4000", "--out", "big", "ref.jsonl"])
    assert "this text makes" in capsys.readouterr().err
    assert "--train_tokenizer" in refused(capsys, "web.jsonl")


def test_trained_tokens_are_those_of_byte_pair_encoding():
    from tiktoken._educational import bpe_train

    text = Path(__file__).read_text()[:5000]
    theirs = bpe_train(text, 320, prepare_data.PATTERN, visualise=None)
    ours = prepare_data.train_bpe(text, 320, prepare_data.PATTERN)
    assert ours == sorted(theirs, key=theirs.get)


# ---- the demo ----

DEMO = {
    "kinds.npz": "4effca0c8b9e92c8f08cd6ea418e15e76ca8f8e6808ec49bb4f790afd0c3587d",
    "questions.jsonl": "c8b254c62e51edad7368acf59fe680d93ba91b0861ef1191af7d7b87c4c18659",
    "ref.bin": "2d974634acbf2762a1481ab6ef57bbb45e16fe644458d1eb4989125d28849359",
    "train.bin": "1eed0f048c8f22c90bdd7cf7dd96cfcd869d5afbb6b9ee37d211ee4ab6ddc39e",
    "val.bin": "c0122a117c01ca24653ab573cde5b7dce7a5b92eba03480b37f30b87a99242fa",
    "val_corpus.bin": "7328b9e1d0ee8d932db9079eeff0ba55cbca5f7a34af12210337f3dcbb16da8e",
}


def test_the_demo_has_the_bytes_that_the_published_results_were_made_with(tiny_data):
    files = load_meta(tiny_data)["files"]
    assert {name: files[name] for name in DEMO} == DEMO
    assert sorted(set(files) - set(DEMO)) == ["sft.bin", "sft_mask.bin"]


def test_the_demo_has_fresh_pairs_for_fine_tuning(tiny_data):
    meta = load_meta(tiny_data)
    encoding = get_tokenizer(meta["tokenizer"])
    tokens = np.fromfile(tiny_data / "sft.bin", np.uint16)
    mask = np.fromfile(tiny_data / "sft_mask.bin", np.uint8).astype(bool)
    pairs = [text for text in encoding.decode(tokens).split("<|endoftext|>") if text]
    assert len(pairs) == meta["documents"]["sft"] == 1000
    answers = encoding.decode(tokens[mask]).split("<|endoftext|>")[:-1]
    assert answers == [text.partition("\nAnswer:")[2] for text in pairs]
    lines = Path(tiny_data, "questions.jsonl").read_text().splitlines()
    held = {json.loads(line)["question"] for line in lines}
    asked = [text.partition("\nAnswer:")[0].removeprefix("Question: ") for text in pairs]
    assert not held & set(asked)


def test_knobs_of_the_demo(tmp_path):
    """--wrong, --dirty, --n_ref and --max_tokens make other pages."""
    small = ["--n_ref", "300", "--max_tokens", "24000"]
    for out, flags in {"no": ["--wrong", "0"], "all": ["--wrong", "1", "--dirty", "0"]}.items():
        prepare_data.main([*small, *flags, "--out", str(tmp_path / out)])
    kinds = {out: np.load(tmp_path / out / "kinds.npz")["train"] for out in ("no", "all")}
    names = json.loads((tmp_path / "no" / "meta.json").read_text())["kinds"]
    found = {out: {names[k] for k in np.unique(kind)} for out, kind in kinds.items()}
    assert "wrong" not in found["no"] and "noise" in found["no"]
    assert "wrong" in found["all"] and "noise" not in found["all"]
    assert 24_000 <= len(kinds["no"]) < 30_000


def test_no_flags_make_the_demo(monkeypatch):
    made, usual = [], prepare_data.prepare_demo.__defaults__[1:5]
    monkeypatch.setattr(prepare_data, "prepare_demo", lambda *given: made.append(given))
    prepare_data.main([])
    prepare_data.main(["--out", "mine", "--seed", "3"])
    assert made == [("data/demo", 1337, *usual), ("mine", 3, *usual)]


# ---- memory ----

PEAK = """
import sys, prepare_data
prepare_data.main(sys.argv[1:])
print("peak", open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""


def peak(name, reference):
    """MB resident at most. Not ru_maxrss: a child inherits that of pytest, larger than its own."""
    flags = ["--reference", reference, "--corpus", name, "--out", f"o{name}"]
    command = [sys.executable, "-c", PEAK, *flags, "--tokenizer", "bytes/meta.json"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    shown = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    return int(shown.split("peak")[1]) / 1000


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_bounded(text):
    """By 200 MB for lines of any number; a long document counts less than three times."""
    Path("short.jsonl").write_text("".join(f'{{"text": "a {i}"}}\n' for i in range(60_000)))
    line = json.dumps({"text": " ".join(WORDS * 60)}) + "\n"
    Path("many.jsonl").write_text("".join(line.replace("sum", str(i), 1) for i in range(4000)))
    Path("long.jsonl").write_text(json.dumps({"text": " ".join(WORDS * 500_000)}) + "\n")
    append("long.jsonl", TEXT * 2)
    for name in ("short", "many", "long"):
        assert peak(f"{name}.jsonl", "ref.jsonl") < 200, name
