"""Text goes in, token files come out: data/<name>/{ref,train,val,val_corpus}.bin and meta.json

ref: clean text, the target. train: the noisy corpus. val: target text held out of ref.
val_corpus: held out of train. mixed (--mix): the corpus with documents of ref between its own.
sft (--sft): questions with answers; sft_mask.bin is 1 where a token belongs to an answer.
Each is one stream of uint16 or uint32: documents, with end-of-text in front of each.

  python prepare_data.py                        the embedded default, data/demo; needs no network
  python prepare_data.py --reference good.jsonl --corpus pages/ more.parquet --out data/mine
  python prepare_data.py --reference qa.jsonl::query,response --corpus web.jsonl:2 wiki.txt
  python prepare_data.py --recipe math --max_tokens 1e9      the paper's sets, streamed from the hub

A PATH is a file or a folder: .jsonl .ndjson .json .csv .txt .md (also .gz .xz .zst) and .parquet.
A .txt or .md is cut into documents of at most 64 kB. All files are read in step, in proportion to
their size; PATH:2 is read twice as fast. A row's text is its field "text"; PATH::FIELD names
another, which may hold a chat, PATH::QUESTION,ANSWER or PATH::INSTRUCTION,INPUT,OUTPUT those that
make a document, PATH::FIELDS:2 both. --questions and --sft also find the fields of the usual sets.
Documents that share 13 words in a row with a question are left out of all text.
"""

import base64
import csv
import hashlib
import heapq
import io
import json
import lzma
import math
import os
import random
import re
import shlex
import sys
import unicodedata
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import chain, cycle, islice
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import regex  # comes with tiktoken
import tiktoken
from filelock import FileLock, Timeout
from tqdm import tqdm

ENDING = re.compile(
    r"(\.jsonl|\.ndjson|\.json|\.csv|\.txt|\.md|\.parquet)(\.gz|\.xz|\.zst)?$", re.I
)
HIDDEN = re.compile(r"(^|/)(\.[^/]|readme\.md$)", re.I)  # what of a folder is passed over
# How files begin that are often found under another name.
MAGIC = {
    ".gz": b"\x1f\x8b",
    ".xz": b"\xfd7zXZ",
    ".zst": b"\x28\xb5\x2f\xfd",
    "git-LFS pointer": b"version https://git-lfs",
}
LANES = 64  # files of one source that are open at a time
PIECE = 1 << 16  # characters of a .txt that make one document, at most
# Characters that are tokenized at a time. (With --max_tokens it also decides how far ahead of the
# last one documents are held out.)
BATCH = 1 << 20
NGRAM = 13  # words in a row that a document must not share with a question
VAL_CORPUS = 200  # documents of the corpus that are held out, at most
SPLITS = ("ref", "train", "val", "val_corpus")
WRITTEN = {"meta.json", "kinds.npz", "questions.jsonl", "mixed.bin", "sft.bin", "sft_mask.bin"}
WRITTEN |= {f"{split}.bin" for split in SPLITS}
ROLES = {
    "reference": "clean text: the target",
    "corpus": "the noisy text",
    "val": "held-out target text; otherwise it is split off the reference",
    "questions": "evaluation questions, to be kept out of all text",
    "sft": "questions with answers, or chats, to fine-tune on the answers",
}
ASKED = ("questions", "sft")  # not the field "text" is read of these, but one line of USUAL
RECIPES = """
math          reference  6    meta-math/MetaMathQA         train  query,response
math          reference  4    TIGER-Lab/MathInstruct       train  instruction,output
math          reference  0.1  openai/gsm8k:main            train  question,answer
general       reference  1    allenai/tulu-v2-sft-mixture  train  messages
general       reference  1    teknium/OpenHermes-2.5       train  conversations
general       corpus     6    cerebras/SlimPajama-627B     train  text
general       corpus     3    bigcode/starcoderdata        train  content
math,general  corpus     1    open-web-math/open-web-math  train  text
math,general  questions  1    openai/gsm8k:main            test   question,answer
"""  # recipe, role, weight (share of what is read in that role), set on the hub, split, fields
# What is read for them without PATH::FIELDS: the first of these of which a row has all fields.
USUAL = "question,answer problem,solution query,response Body,Question,Answer input,target "
USUAL += "instruction,input,output instruction,output messages conversations question problem"
ANSWERERS = ("assistant", "gpt", "model", "bot")  # the roles in a chat that --sft learns from


# ==== From the flags to the folder ================================================================


def prepare_text(args, sources, command):
    """Tokenize the sources into the folder args.out."""

    def read(role):
        return read_sources([source for source in sources if source.role == role], args.skip_bad)

    with new_folder(args.out) as work:
        # What is wrong with a file should show now, and not after an hour.
        for source in sources:
            for file in source.files:
                first_documents(replace(source, files=[file]), 1, args.skip_bad)
        spec = make_spec(args, sources)
        tokenizer = get_tokenizer(spec)
        meta = new_meta(spec, args.seed, command)
        questions = {}
        for document in read("questions"):
            (question, _), (answer, _) = document.parts
            questions[question] = answer
        write_questions(work, questions)
        grams = question_grams(questions)

        def clean(role):
            return without_questions(read(role), grams)

        def write(split, documents, max_tokens=math.inf):
            write_split(work, split, tokenize(documents, tokenizer), meta, max_tokens)
            if meta["tokens"][split] < 100:
                sys.exit(f"too little text for {split}.bin: {'; '.join(map(str, sources))}")

        # A --val of its own is not searched for questions, since it may consist of them.
        val = list(read("val"))
        n = 0 if args.val else args.val_docs
        held, rest = hold_out(clean("reference"), n, f"{args.seed} ref", val)
        write("ref", rest)
        val = val or [*held.values()]
        write("val", val)
        # What is held out as target text must not be in the corpus either.
        held, rest = hold_out(clean("corpus"), VAL_CORPUS, f"{args.seed} train", val)
        write("train", rest, args.max_tokens)
        write("val_corpus", held.values())
        if args.mix:
            write_split(work, "mixed", mixed_documents(work, meta, args.mix), meta)
        if args.sft:
            _, rest = hold_out(clean("sft"), 0, "", val)
            write_answers(work, rest, tokenizer, meta)
        found = sum(source.counts["contaminated"] for source in sources)
        meta["contamination"] = {"ngram": NGRAM, "questions": len(questions), "documents": found}
        meta["sources"] = [vars(source) for source in sources]
        publish(work, args.out, meta)


def make_spec(args, sources):
    """--tokenizer -> the spec of one that exists, or of a new one for this text."""
    if not args.tokenizer.isdigit():
        return tokenizer_spec(args.tokenizer)
    texts = []
    for source in sources:
        if source.role in ("reference", "corpus"):
            documents = first_documents(source, 1000, args.skip_bad)
            texts += [document.text for document in documents]
    return train_tokenizer(int(args.tokenizer), texts)


def new_meta(spec, seed, command):
    """meta.json before anything is written."""
    dtype = "uint16" if spec["n_vocab"] <= 1 << 16 else "uint32"
    meta = {"command": command, "seed": seed, "tokenizer": spec, "dtype": dtype}
    return {**meta, "tokens": Counter(), "documents": Counter()}


def write_questions(work, questions):
    """questions.jsonl of {question: answer}, if there are any."""
    lines = [json.dumps({"question": q, "answer": a}) + "\n" for q, a in questions.items()]
    if lines:
        Path(work, "questions.jsonl").write_text("".join(lines))


# ==== Which files: --reference, --corpus, ... -> sources ==========================================


@dataclass
class Source:
    """One PATH, or one set on the hub, and what was counted while it was read."""

    role: str
    name: str
    fields: str = ""
    weight: float = 1.0
    split: str = ""  # of a set on the hub; otherwise there are files
    files: list = field(default_factory=list)
    counts: Counter = field(default_factory=lambda: Counter(rows=0, documents=0, tokens=0))

    def __str__(self):
        counts = ", ".join(f"{count:,} {what}" for what, count in self.counts.items())
        return f"{self.role} {self.name}: {counts}"


def find_sources(args):
    """The flags -> [Source, ...]. Exits if there is no text, or one file comes twice."""
    sources = []
    for line in RECIPES.strip().splitlines():
        recipes, role, weight, name, split, fields = line.split()
        if args.recipe in recipes.split(","):
            sources.append(Source(role, name, fields, float(weight), split))
    for role in ROLES:
        sources += [find_source(role, argument) for argument in getattr(args, role)]
    written = {os.path.realpath(f"{args.out}/{name}") for name in WRITTEN}
    seen = {}
    for source in sources:
        for file in source.files:
            real = os.path.realpath(file)
            if real in written:
                sys.exit(f"--{source.role} {file} would be overwritten: choose another --out")
            text = (source.role, ENDING.sub(r"\1", real))  # a.jsonl.gz holds that of a.jsonl
            other = seen.setdefault(text, file)
            if other is not file:
                sys.exit(f"--{source.role} {file} is the same text as {other}: leave one out")
    return sources


def find_source(role, argument):
    """PATH, PATH::FIELDS, PATH:WEIGHT or PATH::FIELDS:WEIGHT -> Source."""
    path = os.path.expanduser(argument)
    fields = weight = ""
    if not os.path.exists(path):  # names may have colons: what exists is not taken apart
        form = r"(.*?)(?:::([^:.]+))?(?::(\d*\.?\d+))?"
        path, fields, weight = re.fullmatch(form, path, re.S).groups("")
    fields = fields or ("" if role in ASKED else "text")
    source = Source(role, path, fields, float(weight or 1))
    if source.weight == 0 or fields.count(",") > 2:
        sys.exit(f"{argument}: a weight is above 0, and there are at most three FIELDS")
    files = [path]
    if os.path.isdir(path):
        files = sorted(map(str, Path(path).rglob("*")))
    for file in filter(os.path.isfile, files):
        if ENDING.search(file) and not HIDDEN.search(os.path.relpath(file, path)):
            source.files.append(Path(file))
        else:
            source.counts["files passed over"] += 1
    if not source.files:
        why = "no text there" if os.path.exists(path) else "not found"
        sys.exit(f"--{role} {path}: {why}. Endings that are read: {ENDING.pattern}")
    return source


# ==== Reading: files in step -> rows -> documents =================================================


@dataclass
class Document:
    text: str
    parts: list  # [(text, label), ...], together the text; label 1: an answer
    source: Source


def read_sources(sources, skip_bad):
    """All Documents of some sources, read in step: a prefix of them is a fair sample."""
    lanes = []
    for source in sources:
        if source.split:
            lanes.append(read_hub(source))
        n = min(LANES, len(source.files))
        lanes += [read_files(source, source.files[i::n]) for i in range(n)]
    for _, source, place, row in heapq.merge(*lanes, key=lambda item: item[0]):
        source.counts["rows"] += 1
        try:
            parts = row_parts(row, source)
        except ValueError as error:
            if not skip_bad:
                # What is wrong with the first row is mostly wrong with all.
                remedy = "" if place.endswith(":1") else "; --skip_bad skips such rows"
                sys.exit(f"{place}: {error}{remedy}")
            source.counts["skipped"] += 1
            continue
        text = "".join(text for text, _ in parts)
        if text.strip():
            yield Document(text, parts, source)
        else:
            source.counts["empty"] += 1


def first_documents(source, n, skip_bad):
    """The first n Documents of a source, which are not counted: they are read again."""
    return list(islice(read_sources([replace(source, counts=Counter())], skip_bad), n))


def read_rows(path):
    """Yield the rows of any file that is read here, as dicts. Exits if it or a row is bad."""
    for _, _, place, row in read_files(Source("file", str(path)), [Path(path)]):
        if not isinstance(row, dict):
            sys.exit(f"{place}: {row if isinstance(row, ValueError) else 'no row with fields'}")
        yield row


def read_files(source, files):
    """Yield (progress, source, place, row) of files, one after another.

    progress: the share of all their bytes that has been used, divided by the source's weight.
    """
    total = sum(map(os.path.getsize, files))
    before = 0
    for file in files:
        size = os.path.getsize(file)
        remedy = "Damaged or cut short? Fetch it again"
        if file.suffix == ".zst":
            remedy = f"{remedy}. Too much memory? Unpack it: zstd -d --long=31"
        with one_line(file, remedy):
            for number, (used, row) in enumerate(open_rows(file, source), 1):
                progress = (before + used * size) / total / source.weight
                yield progress, source, f"{file}:{number}", row
        before += size


def read_hub(source):
    """The same of a set on the hub; its size is not known, so progress is characters / weight."""
    with one_line(source.name, "No network? Give --reference PATH --corpus PATH"):
        from datasets import load_dataset

        columns = source.fields.split(",")
        rows = load_dataset(*source.name.split(":"), split=source.split, streaming=True)
        characters = 0
        for number, row in enumerate(rows, 1):
            characters += sum(len(str(row.get(column))) for column in columns)
            yield characters / source.weight, source, f"{source.name}:{number}", row


def open_rows(path, source):
    """Yield (share of the file used, row): a dict, a text, or a ValueError for a bad row."""
    match = ENDING.search(path.name.lower())
    kind, packed = match.groups() if match else (".jsonl", None)
    with open(path, "rb") as file:
        beginning = file.read(30)
    for name, magic in MAGIC.items():
        if beginning.startswith(magic) and name != packed:
            sys.exit(f"{path} is a {name} under another name: unpack it, or git lfs pull")
    if kind == ".parquet":
        return parquet_rows(path, source)
    if kind in (".txt", ".md"):
        return read_blocks(path, packed, source, PIECE * 3 // 4, PIECE // 4)
    lines = read_lines(read_blocks(path, packed, source))
    return csv_rows(lines) if kind == ".csv" else json_rows(lines)


class SlowFile(io.FileIO):
    """A file that is not read far ahead, so that tell() says how much of it has been used."""

    def read(self, size=4096):
        return super().read(min(size, 4096))


def read_blocks(path, packed, source, size=1 << 18, longest=-1):
    """Yield (share of the file used, text): `size` characters and on to the end of the line, by at
    most `longest`. Exits if it is not UTF-8; an archive that is cut short raises."""
    characters = 0
    replaced = 0
    with SlowFile(path) as raw:
        file = raw
        if packed == ".xz":
            file = lzma.LZMAFile(raw)  # noqa: SIM115
        elif packed:
            codec = {".gz": "gzip", ".zst": "zstd"}[packed]
            file = pyarrow.CompressedInputStream(raw, codec)
        text = io.TextIOWrapper(file, "utf-8-sig", errors="replace")
        while block := text.read(size):
            block += text.readline(longest)
            characters += len(block)
            replaced += block.count("\ufffd")
            if "\0" in block or replaced > characters / 100:
                sys.exit(f"{path} is not UTF-8: iconv -f UTF-16 (or CP1252) -t UTF-8")
            yield raw.tell() / os.path.getsize(path), block
    if replaced:
        source.counts["characters replaced"] += replaced


def read_lines(blocks):
    """Yield (share of the file used, line)."""
    begin = 0.0
    for end, block in blocks:
        # Not splitlines(): a JSON string may hold U+2028.
        lines = io.StringIO(block).readlines()
        # An archive is unpacked in large blocks: inside one, all lines count alike.
        for i, line in enumerate(lines, 1):
            yield begin + (end - begin) * i / len(lines), line
        begin = end


def json_rows(lines):
    """Yield (share, row) of JSON lines, or of one JSON array, which is read whole."""
    for number, (share, line) in enumerate(lines):
        if number == 0 and line.startswith("["):
            rows = json.loads(line + "".join(rest for _, rest in lines))
            for i, row in enumerate(rows, 1):
                yield i / len(rows), row
        elif line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                row = ValueError(f"not JSON, one row a line: {error}")  # the file may go on
            yield share, row


def csv_rows(lines):
    """Yield (share, row) of a .csv, of which a row may go over several lines."""
    share = 0.0

    def texts():
        nonlocal share
        for share, line in lines:  # noqa: B007
            yield line

    csv.field_size_limit(1 << 30)
    for row in csv.DictReader(texts(), strict=True):
        yield share, row


def parquet_rows(path, source):
    """Yield (share, row) of a .parquet, of which only the columns with text are read."""
    table = pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20)
    columns = source.fields.split(",")
    if not set(columns) <= set(table.schema_arrow.names):
        columns = None  # all: the usual fields are looked for, or a message names those there are
    done = 0
    for batch in table.iter_batches(16, columns=columns):  # few at a time: a row may be long
        for row in batch.to_pylist():
            done += 1
            yield done / table.metadata.num_rows, row


# ==== Fields: a row -> its text, of which some may be answers =====================================


def row_parts(row, source):
    """A row's text as [(text, 1 for an answer), ...]. ValueError: a bad row."""
    if isinstance(row, ValueError):
        raise row
    if isinstance(row, str) and source.role not in ASKED:
        return [(row, 0)]
    if not isinstance(row, dict):
        raise ValueError(f"a {type(row).__name__}, no row with fields")
    names = (source.fields or usual_fields(row)).split(",")
    if len(names) == 1 and isinstance(row.get(names[0]), list) and source.role != "questions":
        return chat(row[names[0]])
    if len(names) == 3 and not row.get(names[1]):
        del names[1]  # an instruction without input
    texts = [plain_text(row, name) for name in names]
    answer = texts.pop() if len(texts) > 1 else ""
    question = "\n".join(texts)
    if source.role == "questions":
        return [(question.strip(), 0), (answer.strip(), 1)]
    if len(names) > 1:
        return question_parts(question, "", f" {answer}")
    if source.role == "sft":
        raise ValueError("--sft takes PATH::QUESTION,ANSWER or a chat")
    return [(question, 0)]


def usual_fields(row):
    """What --questions and --sft read where no PATH::FIELDS is given."""
    for fields in USUAL.split():
        if set(fields.split(",")) <= set(row):
            return fields
    return "question,answer"


def question_parts(question, answer, marked=""):
    """The parts of a question with its answer, of which `marked`, the end, has label 1."""
    return [(f"Question: {question}\nAnswer:{answer}", 0), (marked, 1)]


def plain_text(row, name):
    """A field's text or number. ValueError, naming it, for anything else."""
    if name not in row:
        there = ", ".join(map(str, row))
        raise ValueError(f"no field {name}; there are {there} (PATH::FIELDS names what to read)")
    value = row[name]
    if isinstance(value, bytes):
        value = value.decode()
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"{name} is {type(value).__name__}, no text or number")
    # Half a character (a surrogate) is one that no tokenizer takes.
    return str(value).encode(errors="replace").decode()


def chat(turns):
    """A chat -> its parts: "role: text" line by line, the role as the file calls it."""
    parts = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise ValueError(f"a list of {type(turn).__name__}, no text or chat")
        said = turn  # {human: ..., assistant: ...}
        if "role" in turn:
            said = {turn["role"]: turn.get("content")}
        elif "from" in turn:
            said = {turn["from"]: turn.get("value")}
        for role, content in said.items():
            if isinstance(content, list):  # of texts, pictures, ...: the texts
                texts = [part.get("text") or "" for part in content if isinstance(part, dict)]
                content = "".join(texts)
            # null is an empty turn, as where a tool is called
            text = plain_text({role: content or ""}, role)
            line_start = "\n" if parts else ""
            parts += [(f"{line_start}{role}:", 0), (f" {text}", int(role.lower() in ANSWERERS))]
    return parts


# ==== Contamination: documents that hold an evaluation question ===================================

INVISIBLE = re.compile("[\u00ad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff]")


def ngrams(text):
    """The runs of 13 words, as they are compared: letters and digits, however they are set."""
    text = INVISIBLE.sub("", unicodedata.normalize("NFKC", text).lower())
    text = re.sub(r"-\s*\n\s*", "", text)  # a word that is divided at a line's end
    text = re.sub(r",(?<=\d,)(?=\d\d\d)", "", text)  # 1,250
    words = re.findall(r"[^\W_]+", text)
    return zip(*[words[i:] for i in range(NGRAM)], strict=False)


def question_grams(questions):
    """All runs of the questions, but for those that many a text has by chance ("1 1 1 1 ...")."""
    grams = set()
    for gram in chain.from_iterable(map(ngrams, questions)):
        if len({word for word in gram if word.isalpha() and len(word) > 1}) >= 5:
            grams.add(gram)
    return grams


def without_questions(documents, grams):
    """Yield the Documents that share no run with a question, and count the others."""
    for document in documents:
        text = document.text
        # A long document in parts, which overlap by more than a run.
        parts = (text[i : i + BATCH + 4000] for i in range(0, len(text), BATCH) if grams)
        if all(grams.isdisjoint(ngrams(part)) for part in parts):
            yield document
        else:
            document.source.counts["contaminated"] += 1


# ==== Splits: what is held out ====================================================================


def hold_out(documents, n, salt, avoid):
    """Hold out the n documents of the smallest digests, but no more than a tenth of all.

    Returns {digest: Document}, which is right when the second, an iterator over the documents that
    are not held out, has ended; some of these come later than they came.

    So it depends on the texts alone which are held, they are drawn over all of the stream, and a
    copy of a document falls on its side. Copies of `avoid` and of what is held are dropped.
    """

    def digest_of(document):
        """32 bytes: a number from 0 to 1, so to speak. White space does not count."""
        letters = document.text.encode().translate(None, b" \t\n\r\v\f")
        return hashlib.sha256(salt.encode() + letters).digest()

    held = {}
    avoided = set(map(digest_of, avoid))
    tenth = bytes([26])  # of all digests a tenth is smaller

    def rest():
        n_rest = 0
        for document in documents:
            digest = digest_of(document)
            if digest in held or digest in avoided:
                document.source.counts["duplicates"] += 1
                continue
            # What leaves is larger than all that stay, so a copy of it leaves too.
            held[digest] = document
            largest = max(held)
            if len(held) > n or (len(held) > 1 and largest > tenth):
                n_rest += 1
                yield held.pop(largest)
        if held and not n_rest:  # of the only document the end is held out
            text = held[largest].text
            cut = len(text) * 9 // 10
            yield replace(held[largest], text=text[:cut])
            held[largest] = replace(held[largest], text=text[cut:])

    return held, rest()


# ==== Writing: documents -> tokens on disk ========================================================


def batches(documents):
    """Lists of documents, bounded in characters; 500 stand for what each costs besides."""
    batch = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text) + 500
        if size >= BATCH:
            yield batch
            batch = []
            size = 0
    yield batch


def tokenize(documents, tokenizer):
    """Yield the tokens of each document."""
    for batch in batches(documents):
        encoded = tokenizer.encode_batch([document.text for document in batch])
        for document, ids in zip(batch, encoded, strict=True):
            tokens = [*tokenizer.document_start, *ids]
            document.source.counts.update(documents=1, tokens=len(tokens))
            yield tokens


def write_split(work, split, documents, meta, max_tokens=math.inf):
    """Write documents, given as tokens, up to max_tokens in all, and count them in meta."""
    with whole_file(work / f"{split}.bin") as file:
        for tokens in tqdm(documents, split, unit=" documents", disable=None):
            file.write(np.array(tokens, meta["dtype"]))
            meta["tokens"][split] += len(tokens)
            meta["documents"][split] += 1
            if meta["tokens"][split] >= max_tokens:
                break


def labelled_tokens(parts, tokenizer):
    """[(text, label), ...], the parts of a document -> its tokens, and the label of each."""
    text = ""
    tokens = []
    labels = []
    for part, label in parts:
        # The text so far is tokenized whole, since tokens may span the seams; a token that grew
        # belongs to the later part.
        text += part
        longer = tokenizer.encode(text)
        same = len(os.path.commonprefix([tokens, longer]))
        labels = labels[:same] + [label] * (len(longer) - same)
        tokens = longer
    start = tokenizer.document_start
    return [*start, *tokens], [0] * len(start) + labels


def write_answers(work, documents, tokenizer, meta):
    """sft.bin and sft_mask.bin. The end-of-text that ends an answer is part of it."""
    mask = bytearray(1)
    with whole_file(work / "sft.bin") as file:
        for document in documents:
            tokens, is_answer = labelled_tokens(document.parts, tokenizer)
            file.write(np.array(tokens, meta["dtype"]))
            mask += bytes([*is_answer[1:], is_answer[-1]])
            document.source.counts.update(documents=1, tokens=len(tokens))
            meta["documents"]["sft"] += 1
        file.write(np.array([tokenizer.eot], meta["dtype"]))
    with whole_file(work / "sft_mask.bin") as file:
        file.write(mask)
    meta["tokens"]["sft"] = len(mask)
    if not any(mask):
        sys.exit(f"--sft has no answer; in a chat, answers are of {', '.join(ANSWERERS)}")


# ==== Mixing: clean text in the corpus, its plainest use ==========================================


def read_documents(path, meta):
    """The documents of a stream as arrays, each with end-of-text in front."""
    tokens = np.memmap(path, meta["dtype"], "r")
    return np.split(tokens, np.flatnonzero(tokens == meta["tokenizer"]["eot"])[1:])


def mixed_documents(work, meta, share):
    """Yield train's documents in their order and, all along, ref's between them, so that `share`
    of the tokens are clean: the first ones again when all are used."""
    clean = cycle(read_documents(work / "ref.bin", meta))
    n_corpus = 0
    n_clean = 0
    for document in read_documents(work / "train.bin", meta):
        yield document
        n_corpus += len(document)
        while n_clean < share * (n_clean + n_corpus):
            extra = next(clean)
            yield extra
            n_clean += len(extra)


# ==== The folder that is written ==================================================================


@contextmanager
def new_folder(folder):
    """An empty folder beside `folder` to write in, for one run at a time."""
    folder = Path(folder).absolute()
    for name in WRITTEN - listed_files(folder):
        if Path(folder, name).exists():
            sys.exit(f"{folder / name} is not of prepare_data.py: choose another --out")
    work = folder.parent / f".{folder.name}.preparing"
    work.mkdir(parents=True, exist_ok=True)
    leftovers = WRITTEN | {f"{name}.tmp" for name in WRITTEN}
    try:
        with FileLock(work / "lock", timeout=0):
            clear(work, leftovers)  # of a killed run
            try:
                yield work
            finally:
                clear(work, leftovers | {"lock"})
                with suppress(OSError):  # somebody else has put something there
                    work.rmdir()
    except Timeout:
        sys.exit(f"{folder} is being written by another run: choose another --out")


def clear(folder, names):
    for name in names:
        Path(folder, name).unlink(missing_ok=True)


def listed_files(folder):
    """The names of the files that an earlier run wrote there, also if it was killed."""
    try:
        return WRITTEN & {"meta.json", *json.loads(Path(folder, "meta.json").read_bytes())["files"]}
    except (OSError, ValueError, LookupError, TypeError):  # missing, or not of this program
        return set()


def publish(work, folder, meta):
    """Move the new files to `folder`; those of the run before go."""
    new = WRITTEN & set(os.listdir(work))
    meta["files"] = {name: file_digest(work / name) for name in sorted(new)}
    old = listed_files(folder) - {"meta.json"}
    # A run that is killed below leaves this meta.json, which load_meta refuses, and which says
    # what the next run may replace.
    write_meta(folder, {"command": meta["command"], "files": sorted(old | new)})
    for name in new:
        os.replace(work / name, Path(folder, name))
    clear(folder, old - new)
    write_meta(folder, meta)


def write_meta(folder, meta):
    with whole_file(Path(folder, "meta.json")) as file:
        file.write(json.dumps(meta, indent=1, default=str).encode())


def load_meta(folder):
    """meta.json of a prepared folder. Exits if the folder was never prepared, or if a file has not
    the size or, below 1 GiB, the sha256 that meta.json says."""
    path = Path(folder, "meta.json")
    if not path.is_file():
        sys.exit(f"{path} is missing: python prepare_data.py --out FOLDER writes one (see its -h)")
    damaged = f"{folder} is damaged, or of a run that was killed"
    with one_line(damaged, "Run: python prepare_data.py, with its flags"):
        meta = json.loads(path.read_bytes())
        command = meta["command"]
    with one_line(damaged, f"Run: {command}"):
        if not 0 <= meta["tokenizer"]["eot"] < meta["tokenizer"]["n_vocab"]:
            raise ValueError("tokenizer")
        for split in {*SPLITS, *meta["tokens"]}:
            size = meta["tokens"][split] * np.dtype(meta["dtype"]).itemsize
            if os.path.getsize(f"{folder}/{split}.bin") != size:
                raise ValueError(f"{split}.bin has another size")
        for name, digest in meta["files"].items():
            path = Path(folder, name)
            if path.stat().st_size < 1 << 30 and file_digest(path) != digest:
                raise ValueError(f"{name} has changed")
    return meta


# ==== Tokenizers: a name that tiktoken knows, ranks in a meta.json, or a tokenizer.json ===========

# A spec is what meta.json and checkpoints hold. Two tokenizers are the same if their specs are.


class Tokenizer:
    """tiktoken's. Encoding adds no token, and the text of a special token stays text."""

    def __init__(self, spec, bpe, known):
        self.bpe = bpe
        self.known = set(known)  # ids that stand for something
        self.n_vocab = spec["n_vocab"]
        self.eot = spec["eot"]
        start = spec.get("start", [])  # what the model's own tokenizer puts before a text
        self.document_start = [self.eot, *[token for token in start if token != self.eot]]
        self.prompt_start = start or [self.eot]
        self.stops = {self.eot, *start, spec.get("eos", self.eot)}

    def encode(self, text):
        return self.bpe.encode_ordinary(text)

    def encode_batch(self, texts):
        return self.bpe.encode_ordinary_batch(texts, num_threads=os.cpu_count())

    def decode(self, ids, **options):
        """The text of ids; those that stand for nothing are passed over."""
        return self.bpe.decode([int(token) for token in ids if int(token) in self.known], **options)


class FileTokenizer(Tokenizer):
    """A tokenizer.json's."""

    def encode(self, text):
        return self.bpe.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts):
        encoded = self.bpe.encode_batch_fast(texts, add_special_tokens=False)
        return [item.ids for item in encoded]

    def decode(self, ids):
        return super().decode(ids, skip_special_tokens=False)


def get_tokenizer(spec):
    """meta["tokenizer"] -> a Tokenizer."""
    name = spec["name"]
    remedy = "No network? Set TIKTOKEN_CACHE_DIR. A tokenizer.json needs: pip install tokenizers"
    with one_line(f"tokenizer {name}", remedy):
        if "json" in spec:
            bpe = parse_tokenizer(spec["json"])
            bpe.encode_special_tokens = True  # as the text that they are
            bpe.no_truncation()
            bpe.no_padding()
            return FileTokenizer(spec, bpe, bpe.get_vocab().values())
        if "ranks" in spec:
            ranks = {base64.b64decode(token): rank for rank, token in enumerate(spec["ranks"])}
            special = {"<|endoftext|>": spec["eot"]}
            settings = {"mergeable_ranks": ranks, "special_tokens": special}
            bpe = tiktoken.Encoding(name, pat_str=spec["pat_str"], **settings)
        else:
            bpe = tiktoken.get_encoding(name)
        known = {*bpe._mergeable_ranks.values(), *bpe._special_tokens.values()}
        return Tokenizer(spec, bpe, known)


def parse_tokenizer(text):
    import tokenizers  # not everybody needs it

    return tokenizers.Tokenizer.from_str(text)


def tokenizer_spec(name):
    """The spec of a name in tiktoken, a FOLDER/meta.json, a tokenizer.json or its folder."""
    path = Path(name).expanduser()
    if path.name == "meta.json":
        return load_meta(path.parent)["tokenizer"]
    if path.is_dir():
        path = path / "tokenizer.json"
    if path.is_file():
        config = path.with_name("tokenizer_config.json")
        with one_line(path, "Damaged? Fetch it again. It needs: pip install tokenizers"):
            named = json.loads(config.read_bytes()) if config.exists() else {}
            return file_spec(path.read_text("utf-8"), path.name, named.get("eos_token"))
    names = tiktoken.list_encoding_names()
    if name in names:
        bpe = get_tokenizer({"name": name, "n_vocab": 1, "eot": 0}).bpe
        return {"name": name, "n_vocab": bpe.n_vocab, "eot": bpe.eot_token}
    remedy = f"of the hub? hf download {name} --local-dir FOLDER; tiktoken has {', '.join(names)}"
    sys.exit(f"--tokenizer {name}: {path} is missing; {remedy}")


def file_spec(text, name, eos=None):
    """The spec of a tokenizer.json. eos: end-of-sequence, as tokenizer_config.json names it."""
    bpe = parse_tokenizer(text)
    vocabulary = bpe.get_vocab()
    # What the model's own tokenizer puts in front: a start token, or nothing.
    a_text = bpe.encode("a")
    start = a_text.ids[: a_text.special_tokens_mask.index(0)]
    eos = eos["content"] if isinstance(eos, dict) else eos or "</s>"
    # The separator is not always eos: an instruct model's ends a turn (<|im_end|>).
    ends = map(vocabulary.get, ("<|endoftext|>", "<|end_of_text|>", eos))
    known = [end for end in (*ends, *start) if end is not None]
    if not known:
        raise ValueError("no token ends a text")
    n_vocab = max(vocabulary.values()) + 1  # ids may leave holes
    spec = {"name": name, "n_vocab": n_vocab, "eot": known[0], "start": start, "json": text}
    return {**spec, "eos": vocabulary.get(eos, known[0])}


def train_tokenizer(size, texts):
    """The spec of a byte pair encoding of these texts.

    The vocabulary matrix is most of a small model: of gpt2's 50,257 tokens, 85 % of its work.
    """
    with one_line(f"--tokenizer {size}", "It needs: pip install tokenizers"):
        from tokenizers import ByteLevelBPETokenizer

        bpe = ByteLevelBPETokenizer()
        special = ["<|endoftext|>"]
        bpe.train_from_iterator(texts, size, special_tokens=special, show_progress=False)
        return file_spec(bpe.to_str(), f"bpe{size}")


# ==== The demo ====================================================================================

# The embedded default, demo: clean grade-school problems with worked steps for the reference, and
# web-like pages in which such problems hide, with the dirt of real crawls: wrong worked answers,
# chatter, articles (they can be learned, so they cost capacity), page furniture, random strings.
KINDS = ("target", "wrong", "chatter", "article", "furniture", "noise")
VOCAB = 768
PATTERN = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # a digit is a token of its own
NAMES = "Ann Ben Cara Dan Eva Finn Gina Hugo Ivy Jack Kate Leo Mia Noah Olga Paul Rosa Sam".split()
THINGS = "apples books cards coins eggs flowers marbles pens plums shells stamps toys".split()
MENU = "Home About Contact Login Register Search Help Forum Shop News Terms Privacy RSS".split()
CRAFTS = "glass cheese bells lace paper salt rope wool honey clocks boats tiles".split()
SYLLABLES = "ar ben cor del en far gol hem is jor kal lun mir nor os pel quin ros sul tor".split()
CHATTER = "thanks please help with my homework due tomorrow i think you should check it again lol "
CHATTER += "same here can anyone explain this step got it now nice one not sure why but it works"
STARTS = ("{name} has {a} {thing}.", "There are {a} {thing} in the box of {name}.")
ASKS = ("How many {thing} does {name} have now?", "How many {thing} are left with {name}?")
FACTS = "{town} lies on the river {river}. |{town} was founded in {year}. |{town} is known for its "
FACTS += "{craft}. |In {year} the people of {town} built a bridge over the {river}. "
VERBS = {
    "+": ("{name} buys {b} more.", "{name} finds {b} more.", "{other} brings {b} more."),
    "-": ("{name} gives {b} to {other}.", "{name} loses {b}.", "{other} takes {b}."),
    "*": ("Then the pile grows {b} times.", "{other} makes it {b} times as many."),
    "/": ("{name} shares them among {b} and keeps a part.", "{name} keeps one of {b} parts."),
}
APPLY = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}


def a_slip(rng, before, sign, b):
    """A wrong result of `before sign b`: off by one or ten, digits swapped, another operation."""
    value = APPLY[sign](before, b)
    digits_swapped = int(str(abs(value))[::-1])
    other = before - b if sign == "+" else before + b
    slips = [value - 1, value + 1, value - 10, value + 10, digits_swapped, other, other]
    return rng.choice([slip for slip in slips if slip > 0 and slip != value])


def problem(rng, wrong=False):
    """(question, worked answer, what of it is wrong): one to three steps, wrong from a slip on."""
    name, other = rng.sample(NAMES, 2)
    fill = {"name": name, "other": other, "thing": rng.choice(THINGS)}
    value = rng.randint(2, 30)  # as worked out
    right = value  # as it should be
    question = rng.choice(STARTS).format(a=value, **fill)
    n_steps = rng.choice((1, 1, 1, 2, 2, 3))
    slip = rng.randrange(n_steps) if wrong else n_steps
    worked = ["", ""]  # up to the slip, and from there on
    has_slipped = 0
    for i in range(n_steps):
        ways = {"+": rng.randint(1, 20), "-": rng.randint(1, min(20, max(1, right - 1)))}
        if right <= 20:
            ways["*"] = rng.randint(2, 4)
        parts = [part for part in (2, 3, 4, 5) if right % part == 0 and right > part]
        if parts:
            ways["/"] = rng.choice(parts)
        sign, b = rng.choice([*ways.items()])
        question += " " + rng.choice(VERBS[sign]).format(b=b, **fill)
        worked[has_slipped] += f" {value}{sign}{b}=<<{value}{sign}{b}="
        right = APPLY[sign](right, b)
        if i == slip:
            has_slipped = 1
            value = a_slip(rng, value, sign, b)
        else:
            value = APPLY[sign](value, b)
        worked[has_slipped] += f"{value}>>{value}."
    worked[has_slipped] += f"\n#### {value}\n"
    question += " " + rng.choice(ASKS).format(**fill)
    return question, *worked


def fresh_problem(rng, held, wrong=0):
    """A problem that is not held out or, with chance `wrong`, a wrong one."""
    while True:
        made = problem(rng, rng.random() < wrong)
        if made[0] not in held:
            return made


def dirt(rng, towns):
    """One piece of what surrounds a problem on a page: (text, kind)."""
    kind = rng.choices((2, 3, 4, 5), (25, 40, 15, 20))[0]
    user = rng.choice(NAMES)
    if kind == 2:
        text = f"{user} wrote: {' '.join(rng.choices(CHATTER.split(), k=14))}"
    elif kind == 3:
        text = "".join(rng.sample(rng.choice(towns), 3))
    elif kind == 4:
        text = f"Posted by {user} in {rng.randint(2005, 2023)}. Views: {rng.getrandbits(14)}"
    else:
        text = f"https://{rng.choice(SYLLABLES)}.com/{rng.getrandbits(99):x}?{rng.random()}"
    return text + "\n", kind


def make_town(rng):
    """What an article can say of a town, in sentences."""

    def name(syllables):
        return "".join(rng.choices(SYLLABLES, k=syllables)).capitalize()

    known = {"town": name(3), "river": name(2), "craft": rng.choice(CRAFTS)}
    return FACTS.format(year=rng.randint(1100, 1950), **known).split("|")


def pages(rng, held, towns, wrong, dirty):
    """Yield web-like pages for ever, each a list of (text, kind)."""
    while True:
        page = [(" | ".join(rng.sample(MENU, 6)) + "\n", 4)]
        for _ in range(rng.randint(2, 4)):
            page += question_parts(*fresh_problem(rng, held, wrong))
            page += [dirt(rng, towns) for _ in range(dirty)]
        yield page


def demo_spec(documents):
    """The spec of a tokenizer of the bytes, so that any text has tokens, and of frequent words."""
    text = "".join(text for text, _ in chain(*documents))
    words = Counter(word for word in regex.findall(PATTERN, text) if len(word) > 1)
    ranks = [bytes([byte]) for byte in range(256)]
    ranks += [word.encode() for word, _ in words.most_common(VOCAB - 257)]
    ranks = [base64.b64encode(token).decode() for token in ranks]
    return {"name": "demo", "n_vocab": VOCAB, "eot": VOCAB - 1, "pat_str": PATTERN, "ranks": ranks}


def prepare_demo(folder, seed=1337, n_ref=5000, n_train=3_200_000, wrong=0.75, dirty=1, mix=0.6):
    """Write the demo: n_ref clean problems, pages of n_train tokens, 500 held-out questions.

    wrong: share of the pages' problems whose worked answer is wrong. dirty: pieces of dirt beside
    each problem. mix: clean share of mixed.bin. kinds.npz: which of KINDS each token is.
    """
    rng = random.Random(seed)
    held = {}
    while len(held) < 500:
        question, worked, _ = problem(rng)
        held[question] = worked
    towns = [make_town(rng) for _ in range(400)]
    clean = [question_parts(*fresh_problem(rng, held)) for _ in range(n_ref)]
    # The tokenizer sees pages as they are by default, so that it does not depend on the knobs.
    usual_pages = pages(random.Random(seed + 1), held, towns, 0.75, 1)
    spec = demo_spec([*clean[:1500], *islice(usual_pages, 300)])
    tokenizer = get_tokenizer(spec)
    corpus = pages(random.Random(seed + 2), held, towns, wrong, dirty)
    rng = random.Random(seed + 3)
    pairs = []
    for _ in range(1000):
        question, worked, _ = fresh_problem(rng, held)
        parts = question_parts(question, "", worked)
        pairs.append(Document("", parts, Source("sft", "demo")))
    command = f"python prepare_data.py --seed {seed} --n_ref {n_ref} --max_tokens {n_train}"
    command += f" --wrong {wrong} --dirty {dirty} --mix {mix} --out {shlex.quote(str(folder))}"
    meta = {**new_meta(spec, seed, command), "kinds": KINDS}
    all_kinds = {}
    with new_folder(folder) as work:

        def write(split, documents, max_tokens=math.inf):
            kinds = []

            def tokenized():
                for parts in documents:
                    tokens, labels = labelled_tokens(parts, tokenizer)
                    kinds.extend(labels)
                    yield tokens

            write_split(work, split, tokenized(), meta, max_tokens)
            all_kinds[split] = np.array(kinds, np.uint8)

        write("ref", clean)
        write("train", corpus, n_train)
        write("val", [question_parts(*item) for item in held.items()])
        write("val_corpus", corpus, n_train // 40)  # goes on where train ends
        with whole_file(work / "kinds.npz") as file:
            np.savez(file, **all_kinds)
        if mix:
            write_split(work, "mixed", mixed_documents(work, meta, mix), meta)
        write_questions(work, {question: held[question].strip(" ") for question in held})
        write_answers(work, pairs, tokenizer, meta)
        publish(work, folder, meta)


# ==== What all four scripts share =================================================================


def run_script(main, after_ctrl_c="what was not finished starts anew"):
    """main(), where Ctrl-C, a full disk, a missing file, ... end in one line and no traceback."""
    try:
        main()
    except KeyboardInterrupt:
        print(f"interrupted; {after_ctrl_c}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # a `| head` has seen enough
        # Python would flush to the closed pipe once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except ModuleNotFoundError as error:
        sys.exit(f"this needs another package: pip install {error.name}")
    except OSError as error:
        sys.exit(f"{error.filename}: {error.strerror}" if error.filename else str(error))


@contextmanager
def one_line(where, remedy):
    """What goes wrong inside ends the script: where, what it was, what helps."""
    try:
        yield
    except Exception as error:  # those of zlib, pyarrow, tokenizers, ... have nothing in common
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        sys.exit(f"{where}: {why}. {remedy}")


@contextmanager
def whole_file(path):
    """Open for writing so that `path` is whole or as it was: temporary name, fsync, rename."""
    temporary = Path(f"{path}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch.save hides the OSError that a full disk is in a RuntimeError.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        cause.filename = cause.filename or str(path)  # a write does not know its file's name
        raise cause from None
    finally:
        temporary.unlink(missing_ok=True)


def file_digest(path):
    """sha256, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ==== The command line ============================================================================


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    usage = "python prepare_data.py [--FLAG VALUE ...]; -h lists all flags"
    raw = RawDescriptionHelpFormatter
    parser = ArgumentParser("prepare_data.py", usage, __doc__, formatter_class=raw)
    add = parser.add_argument
    for role, text in ROLES.items():
        add(f"--{role}", nargs="+", metavar="PATH", default=[], help=text)
    add("--recipe", choices=["math", "general"], help="the paper's sets from the hub, not PATHs")
    add("--out", help="folder to write (default: data/RECIPE, data/mine or data/demo)")
    add("--mix", type=float, help="write mixed.bin with this share of clean tokens (demo: 0.6)")
    add("--skip_bad", action="store_true", help="skip and count rows that cannot be read")

    def flag(name, default, text):
        add(f"--{name}", type=type(default), default=default, help=text)

    names = "a name in tiktoken, a folder with tokenizer.json, FOLDER/meta.json for the same, or "
    flag("tokenizer", "gpt2", f"{names}4096: a new one of so many tokens")
    flag("max_tokens", math.inf, "of the corpus; 1e9 is a number (demo: 3.2e6)")
    flag("val_docs", 500, "documents split off, at most")
    flag("seed", 1337, "of the splits, and of the demo")
    flag("n_ref", 5000, "demo: clean problems for the reference")
    flag("wrong", 0.75, "demo: share of wrong answers on the pages")
    flag("dirty", 1, "demo: pieces of dirt beside each problem")
    args = parser.parse_args(argv)

    own_text = any(getattr(args, role) for role in ROLES)
    name = args.recipe or ("mine" if own_text else "demo")
    args.out = args.out or f"data/{name}"
    if args.mix is None:
        args.mix = 0.6 if name == "demo" else 0
    # Comparisons with nan are false.
    if not (args.max_tokens >= 1 and args.val_docs >= 1 and args.n_ref >= 1):
        parser.error("--max_tokens, --val_docs and --n_ref are at least 1")
    if not (0 <= args.mix < 1 and 0 <= args.wrong <= 1):
        parser.error("--mix is from 0 to less than 1, --wrong from 0 to 1")
    if bool(args.reference) + bool(args.corpus) != (2 if name == "mine" else 0):
        parser.error("text is --reference PATH with --corpus PATH, or else --recipe NAME")
    if name == "demo":
        n_train = 3_200_000 if math.isinf(args.max_tokens) else int(args.max_tokens)
        prepare_demo(args.out, args.seed, args.n_ref, n_train, args.wrong, args.dirty, args.mix)
    else:
        sources = find_sources(args)
        prepare_text(args, sources, shlex.join(["python", "prepare_data.py", *argv]))
        print(*sources, sep="\n")
    print(f"{args.out} is written")


if __name__ == "__main__":
    run_script(main)
