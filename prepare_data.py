"""Text goes in, token files come out: data/<name>/{ref,train,val,val_corpus}.bin and meta.json

ref: clean text, the target. train: the noisy corpus. val: target text held out of ref.
val_corpus: held out of train. With --sft also sft.bin, and sft_mask.bin (1: part of an answer).
Each is one stream of uint16 or uint32, with end-of-text before each document.

  python prepare_data.py                        the embedded default, data/demo; needs no network
  python prepare_data.py --reference good.jsonl --corpus pages/ more.parquet --out data/mine
  python prepare_data.py --reference qa.jsonl::query,response --corpus web.jsonl:2 wiki.txt
  python prepare_data.py --recipe math --max_tokens 1e9      the paper's sets, streamed from the hub
  python prepare_data.py --train_tokenizer 4096 --out data/bpe good.jsonl      a small tokenizer

A PATH is a file or a folder: .jsonl .ndjson .json .csv .txt .md (also .gz .xz .zst), .parquet,
.arrow. A .txt or .md is cut into documents of 64 kB, or at --separator. All files are read in
step, in proportion to their size; PATH:2 is read twice as fast. PATH::FIELD says which field holds
the text, PATH::QUESTION,ANSWER or PATH::INSTRUCTION,INPUT,OUTPUT which ones make a document; both
together are PATH::FIELD:2. A field may also hold a chat.
"""

import base64
import csv
import gzip
import hashlib
import heapq
import io
import json
import lzma
import math
import os
import random
import re
import shutil
import signal
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice, pairwise
from pathlib import Path

import numpy as np
import regex  # comes with tiktoken
import tiktoken
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # on Microsoft Windows: there two runs that write one folder are not noticed
    fcntl = None

TEXT_ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".txt", ".md")  # these may be packed
TABLE_ENDINGS = (".parquet", ".arrow")
PACKED = {".gz": "gzip", ".xz": "xz", ".zst": "zstandard"}
PIECE = 1 << 16  # characters: a document of a .txt, at most
BATCH = 1 << 20  # characters that are in memory at a time, if no document is longer
LANES = 64  # files of one source that are open at a time
VAL_CORPUS = 200  # documents of the corpus that are held out, at most
NGRAM = 13  # words in a row that make a document contaminated if a question has them too
SHORTEST = 8  # words; a question of fewer is not looked for: every page would have it
QUESTIONS = ("question", "problem", "query", "instruction", "input")  # fields, by preference
ANSWERS = ("answer", "solution", "response", "output", "target")
CHATS = ("messages", "conversations")
ANSWERERS = ("assistant", "gpt", "model", "bot")  # the roles in a chat that --sft learns from
STREAMS = ("ref", "train", "val", "val_corpus")
BESIDE = ("tokenizer_config.json", "special_tokens_map.json")  # they belong to a tokenizer.json
WRITTEN = ("meta.json", "kinds.npz", "questions.jsonl", "tokenizer.json", *BESIDE)
WRITTEN += ("sft_mask.bin", "sft.bin", *[f"{name}.bin" for name in STREAMS])
REMEDY = "Run: python prepare_data.py"
# skipped, empty and contaminated documents are dropped, and copies of held-out ones (duplicates).
# replaced: characters that were no UTF-8. hidden, ignored: files of a folder that are passed over.
COUNTED = ("rows", "documents", "tokens", "skipped", "empty", "contaminated", "duplicates")
COUNTED += ("replaced", "hidden", "ignored")
RECIPES = """
recipe        role       weight name                       split  fields
math          reference  6    meta-math/MetaMathQA         train  query,response
math          reference  4    TIGER-Lab/MathInstruct       train  instruction,output
math          reference  0.1  openai/gsm8k:main            train  question,answer
general       reference  1    allenai/tulu-v2-sft-mixture  train  messages
general       reference  1    teknium/OpenHermes-2.5       train  conversations
general       corpus     6    cerebras/SlimPajama-627B     train  text
general       corpus     3    bigcode/starcoderdata        train  content
math,general  corpus     1    open-web-math/open-web-math  train  text
math,general  questions  1    openai/gsm8k:main            test   question,answer
"""  # all on the hub; weight: share of what is read in that role


# ---- From the flags to the folder ----


def prepare_text(args, sources, command):
    """Tokenize the sources into the folder args.out. InputError if one is bad or too short."""
    spec = tokenizer_spec(args.tokenizer)
    encoding = get_tokenizer(spec)
    dtype = "uint16" if encoding.n_vocab <= 1 << 16 else "uint32"
    report = {"ngram": NGRAM, "dropped": not args.keep_contaminated, "found": 0, "documents": []}
    meta = {"command": command, "tokenizer": spec, "dtype": dtype, "seed": args.seed}
    meta.update(tokens={}, documents={}, contamination=report)
    with new_folder(args.out) as work:
        try_sources(sources, args)
        questions = read_questions(sources, args)
        write_questions(work, questions)
        report["questions"] = len(questions)
        index = QuestionIndex(questions)

        # Held-out target text is known before the rest, so that the rest can leave it out. A
        # --val of its own is not searched for questions, since it may consist of them.
        val = {}
        for document in read_role(sources, "val", args):
            val.setdefault(fingerprint(document.text), document)
        n_val = 0 if args.val else args.val_docs
        reference = clean(read_role(sources, "reference", args), index, report)
        reference = hold_out(reference, val, n_val, args.seed)
        write_split(work, "ref", reference, encoding, meta)
        write_split(work, "val", val.values(), encoding, meta)
        check_enough(sources, "reference", ("ref", "val"), meta)

        val_corpus = {}
        corpus = clean(read_role(sources, "corpus", args), index, report)
        counts = total_counts(sources, "reference")
        limit = (args.max_tokens or math.inf) * counts["characters"] / counts["tokens"]
        corpus = hold_out(corpus, val_corpus, VAL_CORPUS, args.seed, val, limit)
        write_split(work, "train", corpus, encoding, meta, args.max_tokens)
        write_split(work, "val_corpus", val_corpus.values(), encoding, meta)
        check_enough(sources, "corpus", ("train", "val_corpus"), meta)

        if args.sft:
            pairs = clean(read_role(sources, "sft", args), index, report)
            pairs = hold_out(pairs, {}, 0, args.seed, avoid=val)
            write_answers(work, pairs, encoding, meta)
            check_enough(sources, "sft", ("sft",), meta)
        copy_tokenizer(work, spec)
        meta["sources"] = [source.report() for source in sources]
        publish(work, args.out, meta)


def read_questions(sources, args):
    """{question: answer} of --questions."""
    questions = {}
    for document in read_role(sources, "questions", args):
        prompt, *answer = [text for text, _ in document.segments]
        question = prompt.removeprefix("Question: ").removesuffix("\nAnswer:")
        questions[question] = answer[0].strip() if answer else ""
    return questions


def check_enough(sources, role, splits, meta):
    """InputError if one of these splits has too little text; it says what became of the rows."""
    for split in splits:
        if split == "val" and of_role(sources, "val"):
            role = "val"
        counts = total_counts(sources, role)
        lost = [key for key in ("contaminated", "skipped", "duplicates", "empty") if counts[key]]
        rows = ", ".join(f"{counts[key]:,} {key}" for key in ["rows", *lost])
        if meta["tokens"][split] < 100:
            remedy = (
                "--keep_contaminated keeps those" if "contaminated" in lost else "give more text"
            )
            raise InputError(f"--{role}: too little text for {split}.bin: {rows}; {remedy}")


def preview(sources, args):
    """--dry_run: each source with its files and its first document; nothing is written."""
    encoding = get_tokenizer(tokenizer_spec(args.tokenizer))
    for source, document in zip(sources, try_sources(sources, args), strict=True):
        passed = f"{source.counts['hidden']} hidden, {source.counts['ignored']} ignored"
        size = sum(file.stat().st_size for file in source.files)
        print(f"{source.role} {source.name}: {len(source.files)} files, {size:,} bytes, {passed}")
        tokens = len(encoding.encode_ordinary(document.text))
        print(f"  {document.place}, {tokens:,} tokens: {document.text[:300]!r}")


# ---- Which files: --reference, --corpus, ... -> sources ----


@dataclass
class Source:
    """One PATH, or one set on the hub, and what was counted while it was read."""

    role: str
    name: str
    fields: str = "text"
    weight: float = 1.0
    split: str = ""  # of a set on the hub; otherwise there are files
    files: list = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)
    digest: object = field(default_factory=hashlib.sha256)  # of all texts, one after another

    def report(self):
        """What meta.json says of it."""
        about = {"role": self.role, "name": self.name, "fields": self.fields}
        about.update(weight=self.weight, files=[str(path) for path in self.files])
        counts = {key: self.counts[key] for key in COUNTED}
        return {**about, **counts, "sha256": self.digest.hexdigest()}


def of_role(sources, role):
    return [source for source in sources if source.role == role]


def total_counts(sources, role):
    return sum((source.counts for source in of_role(sources, role)), Counter())


def find_sources(args):
    """The flags -> [Source, ...]. InputError if a path holds no text, or one file comes twice."""
    sources = []
    for line in RECIPES.strip().splitlines():
        recipe, role, weight, name, split, fields = line.split()
        if args.recipe in recipe.split(","):
            sources.append(Source(role, name, fields, float(weight), split))
    for role in ("reference", "corpus", "val", "questions", "sft", "files"):
        seen = {}
        for argument in getattr(args, role):
            usual = "" if role in ("questions", "sft") else args.field
            path, fields, weight = split_argument(argument, usual)
            source = Source(role, str(path), fields, weight)
            source.files = find_files(path, source.counts)
            if not source.files:
                why = "no text there" if path.exists() else "not found"
                known = " ".join([*TEXT_ENDINGS, *TABLE_ENDINGS, *PACKED])
                raise InputError(f"--{role} {path}: {why}. Endings that are read: {known}")
            check_files_once(source, seen, args.out)
            sources.append(source)
    return sources


def split_argument(argument, fields):
    """PATH, PATH::FIELDS, PATH:WEIGHT, PATH::FIELDS:WEIGHT -> (path, fields, weight).

    Names may have colons (C:/a.jsonl, a::b.jsonl): what exists under its whole name is that.
    """
    path = os.path.expanduser(argument)
    weight = 1.0
    has_weight = re.fullmatch(r"(.+):(-?[0-9]*\.?[0-9]+|nan|inf)", path, re.DOTALL)
    if has_weight and not os.path.exists(path):
        path = has_weight[1]
        weight = float(has_weight[2])
    if "::" in path and not os.path.exists(path):
        path, _, fields = path.rpartition("::")
    if not 0 < weight < 1e9:
        raise InputError(f"{argument}: a weight is a number above 0")
    if fields and (fields.count(",") > 2 or "" in fields.split(",")):
        forms = "FIELD, QUESTION,ANSWER or INSTRUCTION,INPUT,OUTPUT"
        raise InputError(f"{argument}: fields are {forms}, not {fields}")
    return Path(path), fields, weight


def ending(path):
    """How a file is read and packed: (".jsonl", ".gz") of b.JSONL.gz, ("", "") if it is not."""
    name = Path(path.name.lower())
    if name.suffix in TABLE_ENDINGS or name.suffix in TEXT_ENDINGS:
        return name.suffix, ""
    kind = Path(name.stem).suffix
    if name.suffix in PACKED and kind in TEXT_ENDINGS:
        return kind, name.suffix
    return "", ""


def find_files(path, counts):
    """The files of a PATH that can be read, sorted. The others in a folder are counted."""
    if not path.is_dir():
        return [path] if path.exists() and ending(path)[0] else []
    about = ("readme.md", "dataset_info.json", "dataset_dict.json", "state.json")
    found = []
    for file in sorted(path.rglob("*")):
        if not file.is_file():
            continue
        if any(part.startswith(".") for part in file.relative_to(path).parts):
            counts["hidden"] += 1
        elif ending(file)[0] and file.name.lower() not in about:
            found.append(file)
        else:
            counts["ignored"] += 1
    return found


def check_files_once(source, seen, out):
    """InputError for a file that comes twice, packed or not, and for one that --out overwrites."""
    for file in source.files:
        real = os.path.realpath(file)
        unpacked = re.sub(r"\.(gz|xz|zst)$", "", real, flags=re.IGNORECASE)
        where = f"--{source.role} {source.name}: {file}"
        if unpacked in seen:
            raise InputError(f"{where} is the same text as {seen[unpacked]}: leave one out")
        seen[unpacked] = file
        if os.path.dirname(real) == os.path.realpath(out) and file.name in WRITTEN:
            raise InputError(f"{where} would be overwritten: choose another --out")


# ---- Reading: a role -> files in step -> rows -> documents ----


@dataclass
class Document:
    text: str
    source: Source = field(default_factory=lambda: Source("", ""))
    place: str = ""  # file:row
    segments: list = field(default_factory=list)  # [(text, whether it is an answer), ...]
    progress: float = 0.0  # of its file, then of its role; documents are merged by it
    question: str = ""  # of --questions, that is found in it
    continued: bool = False  # a later part of a long one


def read_role(sources, role, args):
    """All Documents of a role, its files read in step: a prefix of them is a fair sample."""
    lanes = []
    for source in of_role(sources, role):
        files = source.files or [Path(source.name)]
        for i in range(min(LANES, len(files))):
            lanes.append(read_lane(source, files[i::LANES], args))
    slowest = min([source.weight for source in of_role(sources, role)], default=1)
    for document in heapq.merge(*lanes, key=lambda document: document.progress):
        source = document.source
        # From here on it goes from 0 to 1, or is 0 where it is not known.
        document.progress = 0 if source.split else document.progress * slowest
        source.counts["characters"] += len(document.text)
        for block in blocks_of(document.text):
            source.digest.update(block.encode())
        if document.text.strip():
            yield document
        else:
            source.counts["empty"] += 1


def read_lane(source, files, args):
    """The Documents of some files, one after another, with progress from 0 to 1 / weight.

    Of a set on the hub, whose size is not known, progress is characters / weight.
    """
    sizes = [1]
    if not source.split:
        sizes = [file.stat().st_size or 1 for file in files]
    before = 0
    for file, size in zip(files, sizes, strict=True):
        for document in read_file(file, source, args):
            used = before + document.progress * size
            document.progress = used / sum(sizes) / source.weight
            yield document
        before += size


def try_sources(sources, args):
    """Open every file and read one row, before hours of work. -> the first Document of each."""
    first = []
    for source in sources:
        trial = replace(source, counts=Counter())
        documents = []
        for file in source.files or [Path(source.name)]:
            documents += islice(read_file(file, trial, args), 1)
        first += documents[:1] or [Document("")]
    return first


def blocks_of(text):
    """Slices of a text: what is done to a long one should not need a copy of all of it."""
    for i in range(0, len(text), BATCH):
        yield text[i : i + BATCH]


def read_file(path, source, args):
    """Yield the Documents of a file, or of a set on the hub, and count its rows.

    InputError says where it is bad, and the remedy that helps there.
    """
    number = 0
    try:
        rows = hub_rows(source) if source.split else open_rows(path, source, args.separator)
        for used, row in rows:
            number += 1
            place = f"{path}:{number}"
            source.counts["rows"] += 1
            try:
                segments = row_segments(row, source.fields)
                if source.role == "sft" and not any(is_answer for _, is_answer in segments):
                    raise ValueError("--sft needs QUESTION,ANSWER or a chat")
            except Exception as error:
                if args.skip_bad:
                    source.counts["skipped"] += 1
                    continue
                # A field that the first row lacks, all rows lack.
                helps = number > 1 or not isinstance(error, InputError)
                remedy = "; --skip_bad skips such rows" if helps else ""
                raise InputError(f"{place}: {describe(error)}{remedy}") from error
            # Half a character (a surrogate) is one that no tokenizer takes.
            text = re.sub("[\ud800-\udfff]", "?", "".join(text for text, _ in segments))
            yield Document(text, source, place, segments, used)
    except InputError:
        raise
    except Exception as error:  # of gzip, xz, pyarrow, the file system: whatever it is, say where
        remedy = "Damaged or cut short? Fetch or write it again"
        if source.split:
            remedy = "No network? Give --reference PATH --corpus PATH"
        raise InputError(f"{path}: after row {number}: {describe(error)}. {remedy}") from error


def describe(error):
    """An exception in one line."""
    text = " ".join(str(error).split())[:200]
    return text if isinstance(error, InputError) else f"{type(error).__name__}: {text}"


def open_rows(path, source, separator):
    """Yield (share of the file used, row): a dict, or a document as it is."""
    kind, packed = ending(path)
    check_beginning(path, PACKED.get(packed))
    if kind in TABLE_ENDINGS:
        yield from table_rows(path, kind, source.fields)
        return
    file = TextFile(path, source.counts)
    if kind in (".txt", ".md"):
        rows = pieces(file.lines(PIECE), separator)
    elif kind == ".csv":
        csv.field_size_limit(1 << 31)
        rows = csv.DictReader(file.lines(), strict=True)
    else:
        rows = json_rows(file)
    for row in rows:
        yield file.used, row


def check_beginning(path, expected):
    """InputError if the first bytes are those of another kind of file than the name says."""
    with open(path, "rb") as file:
        beginning = file.read(32)
    magic = {b"\x1f\x8b": "gzip", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstandard"}
    magic[b"version https://git-lfs"] = "git-LFS"
    for start, name in magic.items():
        if beginning.startswith(start) and name != expected:
            remedy = "git lfs pull" if name == "git-LFS" else "unpack it, or name it so"
            raise InputError(f"{path} is a {name} file under another name: {remedy}")


class SlowFile(io.FileIO):
    """A file that is not read far ahead, so that tell() says how much of it has been used."""

    def read(self, size=4096):
        return super().read(min(size, 4096))


class TextFile:
    """A text file, unpacked, if it is UTF-8; `used` is the share of it that has been read."""

    def __init__(self, path, counts):
        self.path = path
        self.counts = counts
        self.used = 0.0

    def lines(self, longest=sys.maxsize):
        """Yield its lines, a longer one in parts."""
        size = os.path.getsize(self.path)
        end = 0.0
        characters = 0
        replaced = 0
        with SlowFile(self.path) as raw:
            unpacked = unpack(raw, ending(self.path)[1])
            stream = io.TextIOWrapper(unpacked, "utf-8-sig", errors="replace")
            while block := stream.read(4 * PIECE):
                block += stream.readline(longest)
                characters += len(block)
                replaced += block.count("\ufffd")
                self.counts["replaced"] += block.count("\ufffd")
                if "\0" in block or replaced > characters / 100:
                    remedy = "if it is UTF-16 or Latin-1: iconv -f UTF-16 (or LATIN1) -t UTF-8"
                    raise InputError(f"{self.path} is not UTF-8, or has NUL bytes; {remedy}")
                # An archive is unpacked in large blocks: inside one, all text counts alike.
                begin = end
                end = raw.tell() / size
                start = 0
                while start < len(block):
                    stop = block.find("\n", start, start + longest) + 1
                    stop = stop or min(start + longest, len(block))
                    self.used = begin + (end - begin) * stop / len(block)
                    yield block[start:stop]
                    start = stop


def unpack(raw, packed):
    """The stream inside a file. One that is cut short raises when it is read."""
    if packed == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if packed == ".xz":
        return lzma.LZMAFile(raw)
    if packed == ".zst":
        import pyarrow  # comes with datasets; unlike others it refuses half a frame

        stream = pyarrow.PythonFile(raw, mode="r")
        return io.BufferedReader(pyarrow.CompressedInputStream(stream, "zstd"))
    return raw


def pieces(lines, separator):
    """The documents of a text file: up to each separator, or of at most 64 kB up to a line end."""
    rest = ""
    if not separator:
        for line in lines:
            if len(rest) + len(line) > PIECE:
                yield rest
                rest = ""
            rest += line
    # More each time, so that one long document is not searched again and again.
    while more := "".join(islice(lines, 100 + len(rest) // 100)):
        *documents, rest = (rest + more).split(separator)
        yield from documents
    yield rest


def json_rows(file):
    """What each line holds. Of one that is no JSON the error: that row is bad, the rest may do."""
    lines = file.lines()
    for number, line in enumerate(lines):
        if number == 0 and line.startswith("["):
            if ending(file.path)[0] != ".json":
                raise InputError(f"{file.path} is a JSON array, not lines: name the file .json")
            rows = json.loads(line + "".join(lines))  # the only text that is read whole
            for i, row in enumerate(rows, 1):
                file.used = i / len(rows)
                yield row
            return
        try:
            yield json.loads(line) if line.strip() else ""
        except (ValueError, RecursionError) as error:
            yield error


def table_rows(path, kind, fields):
    """The same of a .parquet or .arrow, of which only the columns with text are read."""
    import pyarrow.parquet

    if kind == ".parquet":
        table = pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20)
        names = table.schema_arrow.names
        total = table.metadata.num_rows
    else:
        table = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))).read_all()
        names = table.column_names
        total = table.num_rows
    columns = [name for name in names if not fields or name in fields.split(",")]
    if total and not columns:
        raise InputError(f"{path}: {missing_field(fields, names)}")
    # In small steps: a row may be long.
    if kind == ".parquet":
        batches = table.iter_batches(batch_size=16, columns=columns)
    else:
        batches = table.select(columns).to_batches(max_chunksize=16)
    done = 0
    for batch in batches:
        for row in batch.to_pylist():
            done += 1
            yield done / total, row


def hub_rows(source):
    """Rows from the hub (or a local folder of that name), and how many characters so far."""
    from datasets import load_dataset  # it tries 20 times when the network fails

    columns = source.fields.split(",")
    rows = load_dataset(*source.name.split(":"), split=source.split, streaming=True)
    names = rows.column_names or columns  # None: not known before it is read
    if not set(columns) <= set(names):
        raise InputError(f"{source.name}: {missing_field(source.fields, names)}")
    characters = 0
    for row in rows.select_columns(columns):
        characters += sum(len(str(value)) for value in row.values())
        yield characters, row


# ---- Fields: a row -> its text, of which some may be answers ----


def row_segments(row, fields):
    """A row's text as [(text, whether it is an answer), ...]. An exception: a bad row."""
    if isinstance(row, Exception):
        raise row
    if isinstance(row, str):
        return [(row, False)]
    if not isinstance(row, dict):
        raise TypeError(f"a {type(row).__name__}, not a row with fields")
    if fields:
        names = fields.split(",")
    else:
        row = {name.lower(): value for name, value in row.items() if value not in (None, "")}
        names = usual_fields(row)
    if len(names) == 1:
        value = row.get(names[0])
        if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
            return chat(value)
        return [(plain_text(row, names[0]), False)]
    question = plain_text(row, names[0])
    if len(names) == 3 and row.get(names[1]) not in (None, ""):  # an instruction's input
        question += "\n" + plain_text(row, names[1])
    if not fields and "body" in row:  # SVAMP's: the story apart from the question
        question = plain_text(row, "body").strip().removesuffix(".") + ". " + question
    segments = [(f"Question: {question}\nAnswer:", False)]
    if names[-1]:
        segments.append((f" {plain_text(row, names[-1])}", True))
    return segments


def usual_fields(row):
    """[a chat], or [question, input, answer] with "" where there is none, as in eval_math.py."""
    chats = [name for name in CHATS if name in row]
    questions = [name for name in QUESTIONS if name in row]
    answers = [name for name in ANSWERS if name in row]
    if chats:
        return chats[:1]
    if not questions:
        raise missing_field("question", row)
    extra = "input" if questions[0] == "instruction" else ""
    return [questions[0], extra, *(answers[:1] or [""])]


def plain_text(row, name):
    """A field's text or number. ValueError, naming it, for anything else."""
    if name not in row:
        raise missing_field(name, row)
    value = row[name]
    if isinstance(value, bytes):
        value = value.decode()
    if value is None or isinstance(value, bool) or not isinstance(value, (str, int, float)):
        kind = "null" if value is None else f"a {type(value).__name__}, no text or number"
        raise ValueError(f"{name} is {kind}")
    return str(value)


def missing_field(wanted, names):
    there = ", ".join(map(str, names))
    return InputError(f"no {wanted}; there are {there} (--field or PATH::FIELD)")


def chat(turns):
    """A chat -> its segments: "role: text" line by line, the role as the file calls it."""
    segments = []
    for turn in turns:
        if "human" in turn and "assistant" in turn:  # both in one turn
            said = [("human", turn["human"]), ("assistant", turn["assistant"])]
        else:
            role = turn["role"] if "role" in turn else turn["from"]
            said = [(role, turn["content"] if "content" in turn else turn["value"])]
        for role, content in said:
            if isinstance(content, list):  # parts; what is no text (a picture) is left out
                texts = [part if isinstance(part, str) else part.get("text") for part in content]
                content = "".join(text or "" for text in texts)
            text = "" if content is None else plain_text({role: content}, role)
            line_start = "\n" if segments else ""
            segments.append((f"{line_start}{role}:", False))
            segments.append((f" {text}", role in ANSWERERS))
    return segments


# ---- Contamination: documents that hold an evaluation question ----


class QuestionIndex:
    """The runs of words that must not be in a document, by the numbers of their words."""

    def __init__(self, questions):
        self.numbers = {}  # word -> its number
        self.runs = {}  # bytes of int32 numbers -> question
        for question in questions:
            (its_words,) = words([question]).to_pylist()
            for run in question_runs([word for word in its_words if word]):
                key = [self.numbers.setdefault(word, len(self.numbers)) for word in run]
                self.runs.setdefault(np.array(key, np.int32).tobytes(), question)
        self.lengths = sorted({len(key) // 4 for key in self.runs})

    def search(self, documents):
        """Set the question that each Document holds. A long one is searched in parts."""
        import pyarrow
        from pyarrow import compute

        vocabulary = pyarrow.array([*self.numbers], pyarrow.large_string())
        longest = max([len(document.text) for document in documents], default=0)
        for at in range(0, longest, BATCH):
            # The parts overlap, since a run may lie over a seam.
            lists = words([document.text[at : at + BATCH + 4000] for document in documents])
            numbers = compute.index_in(lists.flatten(), value_set=vocabulary)
            numbers = compute.fill_null(numbers, -1).to_numpy()
            bounds = pairwise(lists.offsets.to_numpy())
            for document, (start, end) in zip(documents, bounds, strict=True):
                document.question = document.question or self.find_run(numbers[start:end])

    def find_run(self, numbers):
        """A question of which a run is among these words, or ""."""
        # A run can only begin where no unknown word follows for its whole length: that is rare.
        unknown = np.append(0, np.cumsum(numbers < 0))
        for length in self.lengths:
            for i in np.flatnonzero(unknown[length:] == unknown[:-length]):
                question = self.runs.get(numbers[i : i + length].tobytes())
                if question:
                    return question
        return ""


def question_runs(question):
    """The runs of a question's words that are looked for: of 13, or of all where it is shorter.

    Only those with five different words of letters: "1 1 1 1 ..." and a matrix's markup are in
    many a document by chance.
    """
    length = min(NGRAM, len(question))
    if length < SHORTEST:
        return
    for i in range(len(question) - length + 1):
        run = question[i : i + length]
        if len({word for word in run if word.isalpha() and len(word) > 1}) >= 5:
            yield run


def words(texts):
    """The words of each text, as a pyarrow list array; without Python's lock, so on all cores.

    Compared are letters and digits alone: NFKC (full-width and composed forms), lower case,
    without invisible characters, hyphens at line ends and commas of thousands. "_" splits.
    """
    import pyarrow
    from pyarrow import compute

    array = pyarrow.array(texts, pyarrow.large_string())
    array = compute.utf8_lower(compute.utf8_normalize(array, form="NFKC"))
    array = compute.replace_substring_regex(array, r"\p{Cf}", "")
    array = compute.replace_substring_regex(array, r"(\p{L})-\s*\n\s*(\p{L})", r"\1\2")
    for _ in range(2):  # 1,250,000: the second comma is found the second time
        array = compute.replace_substring_regex(array, r"(\d),(\d\d\d)", r"\1\2")
    return compute.split_pattern_regex(array, r"[^\p{L}\p{M}\p{N}]+")


def clean(documents, index, report):
    """Yield the documents without those that hold a question, and list these in the report."""
    cores = os.cpu_count()
    with ThreadPoolExecutor(cores) as pool:
        for batch in batches(documents):
            if index.runs:
                list(pool.map(index.search, [batch[i::cores] for i in range(cores)]))
            for document in batch:
                if document.question:
                    document.source.counts["contaminated"] += 1
                    report["found"] += 1
                    where = {"document": document.place, "question": document.question}
                    report["documents"] = [*report["documents"], where][:100]
                if not (document.question and report["dropped"]):
                    yield document


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


# ---- Splits: what is held out ----


def fingerprint(text):
    """A digest of the text without white space: near copies must fall on one side of a split."""
    digest = hashlib.sha256()
    for block in blocks_of(text):
        digest.update("".join(block.split()).encode())
    return digest.digest()


def hold_out(documents, held, n, seed, avoid=(), max_characters=math.inf):
    """Yield the documents but for at most n, spread over all of them, which go into `held`.

    Whether one is held depends on its text alone, and the share of those that are only falls: so
    a copy of a document that was not held is not held later. Copies of what is in `held` or
    `avoid` ({fingerprint: Document}) are dropped.
    """
    documents = iter(documents)
    beginning = list(islice(documents, 2))
    if n and len(beginning) == 1:  # the only document: its end is held out
        only = beginning.pop()
        cut = len(only.text) * 9 // 10
        held[""] = replace(only, text=only.text[cut:])
        yield replace(only, text=only.text[:cut])
    share = 0.1
    characters = 0
    for seen, document in enumerate(chain(beginning, documents), 1):
        characters += len(document.text)
        if seen % 64 == 0:
            progress = max(document.progress, characters / max_characters)
            share = min(share, n * progress / seen) if progress else share
        key = fingerprint(document.text)
        lot = hashlib.sha256(f"{seed} {document.source.role} ".encode() + key).digest()
        drawn = int.from_bytes(lot[:8], "big") / 2**64 < share
        if key in held or key in avoid:
            document.source.counts["duplicates"] += 1
        elif len(held) < n and (drawn or not held):  # the first one, so that none is empty
            held[key] = document
        else:
            yield document


# ---- Writing ----


def cut_long(documents):
    """The documents, a very long one in parts: cut where every tiktoken pattern cuts too."""
    word_start = regex.compile(r"(?<=\S) (?=\p{L})")
    for document in documents:
        start = 0
        while match := word_start.search(document.text, start + BATCH):
            part = document.text[start : match.start()]
            yield replace(document, text=part, continued=start > 0)
            start = match.start()
        yield replace(document, text=document.text[start:], continued=start > 0)


def write_split(work, name, documents, encoding, meta, max_tokens=None):
    path = work / f"{name}.bin"
    tokens, count = write_tokens(path, documents, encoding, meta["dtype"], max_tokens)
    meta["tokens"][name] = tokens
    meta["documents"][name] = count


def write_tokens(path, documents, encoding, dtype, max_tokens=None):
    """Stream Documents to `path`, on all cores, in constant memory -> (tokens, documents)."""
    tokens = 0
    count = 0
    start = np.array(document_start(encoding))
    bar = tqdm(desc=path.stem, unit=" tokens", unit_scale=True, total=max_tokens, mininterval=0.5)
    if isinstance(encoding, Encoding):
        documents = cut_long(documents)
    with open(path, "wb") as file, ThreadPoolExecutor(os.cpu_count()) as pool, bar:
        for batch in batches(documents):
            encoded = encoding.encode_batch([document.text for document in batch], pool)
            for document, ids in zip(batch, encoded, strict=True):
                if not document.continued:
                    ids = np.append(start, ids)
                    count += 1
                    document.source.counts["documents"] += 1
                file.write(np.asarray(ids).astype(dtype).tobytes())
                document.source.counts["tokens"] += len(ids)
                tokens += len(ids)
                bar.update(len(ids))
                if max_tokens and tokens >= max_tokens:
                    return tokens, count
    return tokens, count


def answer_mask(segments, encoding):
    """The tokens of a document, and for each whether it belongs to an answer."""
    text = ""
    tokens = []
    mask = []
    for segment, is_answer in segments:
        # The text so far is tokenized whole, since tokens may span the seams; a token that grew
        # belongs to the later segment.
        text += segment
        longer = encoding.encode_ordinary(text)
        same = 0
        while same < len(tokens) and tokens[same] == longer[same]:
            same += 1
        mask = mask[:same] + [is_answer] * (len(longer) - same)
        tokens = longer
    return tokens, mask


def write_answers(work, documents, encoding, meta):
    """sft.bin and sft_mask.bin. The token that ends an answer is part of it."""
    start = document_start(encoding)
    tokens = 0
    count = 0
    ended = False  # whether the last document ended with an answer
    with open(work / "sft.bin", "wb") as file, open(work / "sft_mask.bin", "wb") as mask_file:
        for document in documents:
            ids, mask = answer_mask(document.segments, encoding)
            ids = [*start, *ids]
            mask = [ended, *[False] * (len(start) - 1), *mask]
            ended = mask[-1]
            file.write(np.array(ids, meta["dtype"]).tobytes())
            mask_file.write(np.array(mask, np.uint8).tobytes())
            document.source.counts["documents"] += 1
            document.source.counts["tokens"] += len(ids)
            tokens += len(ids)
            count += 1
        file.write(np.array(start[:1], meta["dtype"]).tobytes())  # the end of the last answer
        mask_file.write(np.array([ended], np.uint8).tobytes())
    meta["tokens"]["sft"] = tokens + 1
    meta["documents"]["sft"] = count


def write_questions(work, questions):
    lines = [json.dumps({"question": q, "answer": a}) + "\n" for q, a in questions.items()]
    if lines:
        Path(work, "questions.jsonl").write_text("".join(lines))


def copy_tokenizer(work, spec):
    """The files of a tokenizer.json, so that the data does not depend on where they came from."""
    if "file" not in spec:
        return
    folder = Path(spec["file"]).parent
    for name in ("tokenizer.json", *BESIDE):
        if (folder / name).exists():
            shutil.copyfile(folder / name, work / name)
    spec["file"] = "tokenizer.json"


# ---- The folder that is written ----


@contextmanager
def new_folder(folder):
    """An empty folder beside `folder` to write in. What a killed run left in it is cleared."""
    folder = Path(folder).absolute()
    for name in set(WRITTEN) - listed_files(folder):
        if Path(folder, name).exists():
            raise InputError(f"{folder / name} is not of prepare_data.py: choose another --out")
    work = folder.parent / f".{folder.name}.preparing"
    with only_writer(work, remedy="choose another --out"):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        try:
            yield work
        finally:
            shutil.rmtree(work)


def listed_files(folder):
    """The names of the files that an earlier run wrote there, also if it was interrupted."""
    try:
        return {"meta.json", *json.loads(Path(folder, "meta.json").read_text())["files"]}
    except (OSError, ValueError, LookupError, TypeError):  # missing or damaged
        return set()


def publish(work, folder, meta):
    """Move the files of `work` to `folder`; those of the run before go."""
    files = sorted(work.iterdir())
    meta["files"] = {path.name: file_digest(path) for path in files}
    old = listed_files(folder) - {"meta.json"}
    # A run that is killed below leaves this meta.json, which load_meta refuses, and which says
    # what the next run may replace.
    write_meta(folder, {"files": [*old, *meta["files"]]})
    for path in files:
        os.replace(path, Path(folder, path.name))
    for name in old - set(meta["files"]):
        Path(folder, name).unlink(missing_ok=True)
    write_meta(folder, meta)


def write_meta(folder, meta):
    with whole_file(Path(folder, "meta.json")) as file:
        file.write(json.dumps(meta, indent=1).encode())


def load_meta(folder):
    """meta.json of a prepared folder, when its files have the size and, below 1 GiB, the sha256
    that it says. InputError otherwise. check_files compares the larger ones too."""
    meta = read_meta(folder)
    try:
        itemsize = np.dtype(meta["dtype"]).itemsize
        for name in [*STREAMS, *meta["tokens"]]:
            path = Path(folder, f"{name}.bin")
            if path.stat().st_size != meta["tokens"][name] * itemsize:
                raise InputError(f"{path} has another size than meta.json says. {rerun(meta)}")
        check_files(folder, meta, below=1 << 30)
    except OSError as error:
        raise InputError(f"{error.filename} is missing. {rerun(meta)}") from error
    except (LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{folder}/meta.json: {describe(error)}. {rerun(meta)}") from error
    return meta


def check_files(folder, meta, below=math.inf):
    """Compare the files with their sha256 in meta.json, those below a size. InputError."""
    for name, digest in meta["files"].items():
        path = Path(folder, name)
        if path.stat().st_size < below and file_digest(path) != digest:
            raise InputError(f"{path} has changed since it was made. {rerun(meta)}")


def rerun(meta):
    return f"Run: {meta.get('command', 'python prepare_data.py')}"


def read_meta(folder):
    """meta.json with a tokenizer in it. InputError if it is missing or damaged."""
    path = Path(folder, "meta.json")
    try:
        meta = json.loads(path.read_text())
        spec = meta["tokenizer"]
        kinds = [type(spec[key]) for key in ("name", "n_vocab", "eot")]
        if kinds != [str, int, int] or meta["dtype"] not in ("uint16", "uint32"):
            raise ValueError("tokenizer or dtype")
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing. {REMEDY} --out {folder}") from error
    except (OSError, ValueError, LookupError, TypeError) as error:
        why = f"damaged, or of a run that was killed ({describe(error)})"
        remedy = f"Repeat that run, or delete {folder}. {REMEDY}"
        raise InputError(f"{path} is {why}. {remedy}") from error
    if "file" in spec:
        spec["file"] = str(Path(folder, spec["file"]).resolve())  # it moves with the data
    return meta


# ---- Tokenizers: a name that tiktoken knows, ranks in a meta.json, or a tokenizer.json ----


class Encoding(tiktoken.Encoding):
    """tiktoken's, but decode passes over an id that stands for nothing."""

    def encode_batch(self, texts, pool):
        # tiktoken lets go of Python's lock, so this is done on all cores.
        return pool.map(partial(self.encode_to_numpy, disallowed_special=()), texts)

    def decode(self, tokens, errors="replace"):
        parts = []
        for token in tokens:
            try:
                parts.append(self.decode_single_token_bytes(int(token)))
            except (KeyError, OverflowError):
                continue
        return b"".join(parts).decode("utf-8", errors=errors)


class FileTokenizer:
    """A tokenizer.json, read by the package `tokenizers`, with tiktoken's methods.

    It normalizes and cuts as the file says, but adds no token of its own: document_start says
    how a document begins. The text of a special token inside a document stays text.
    """

    def __init__(self, spec):
        if file_digest(spec["file"]) != spec["sha256"]:
            raise InputError(f"{spec['file']} has changed since it was used (sha256). {REMEDY}")
        try:
            from tokenizers import Tokenizer

            self.tokenizer = Tokenizer.from_file(spec["file"])
        except ImportError as error:
            raise InputError("a tokenizer.json needs: pip install tokenizers") from error
        except Exception as error:  # the package raises nothing more precise
            raise InputError(f"{spec['file']} is no tokenizer.json: {error}") from error
        self.tokenizer.encode_special_tokens = True  # as the text that they are
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.vocabulary = self.tokenizer.get_vocab()
        self.n_vocab = max(self.vocabulary.values(), default=-1) + 1  # ids may leave holes
        self.eot_token = spec.get("eot")
        self.bos_token = spec.get("bos")
        self.eos_token = spec.get("eos")

    def encode_ordinary(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts, pool=None):  # the package has threads of its own
        encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [item.ids for item in encoded]

    def decode(self, tokens):
        known = [int(token) for token in tokens if 0 <= token < self.n_vocab]
        return self.tokenizer.decode(known, skip_special_tokens=False)


def get_tokenizer(spec):
    """meta["tokenizer"] -> an Encoding or FileTokenizer. InputError if it cannot be made."""
    try:
        if "file" in spec:
            return FileTokenizer(spec)
        name = spec["name"]
        if "ranks" in spec:
            ranks = {base64.b64decode(token): rank for rank, token in enumerate(spec["ranks"])}
            special = {"<|endoftext|>": spec["eot"]}
            pattern = spec["pat_str"]
        elif name in tiktoken.list_encoding_names():
            known = tiktoken.get_encoding(name)
            ranks = known._mergeable_ranks  # so tiktoken's README extends an encoding
            special = known._special_tokens
            pattern = known._pat_str
        else:
            names = ", ".join(tiktoken.list_encoding_names())
            raise InputError(f"--tokenizer {name}: not a file or folder, nor one of {names}")
        return Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    except InputError:
        raise
    except OSError as error:
        why = "no network? TIKTOKEN_CACHE_DIR may name a folder that has it"
        raise InputError(f"--tokenizer {spec.get('name')}: {why} ({error})") from error
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(f"--tokenizer: damaged in meta.json ({error!r}). {REMEDY}") from error


def tokenizer_spec(name):
    """--tokenizer -> what meta.json says of it: a name, ranks, or a tokenizer.json's sha256."""
    path = Path(name).expanduser()
    if path.name == "meta.json":
        return read_meta(path.parent)["tokenizer"]
    if str(name) in tiktoken.list_encoding_names() or not (path.is_dir() or path.suffix):
        encoding = get_tokenizer({"name": str(name)})
        return {"name": str(name), "n_vocab": encoding.n_vocab, "eot": encoding.eot_token}
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.exists():
        remedy = "transformers' AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        raise InputError(f"--tokenizer: {path} is missing; {remedy} writes it")
    path = path.resolve()
    spec = {"name": path.parent.name, "file": str(path), "sha256": file_digest(path)}
    tokenizer = FileTokenizer(spec)
    try:
        special = special_tokens(path.parent, tokenizer.vocabulary)
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        why = f"no end-of-text token, or {' and '.join(BESIDE)} are damaged: {error!r}"
        raise InputError(f"--tokenizer {path}: {why}") from error
    return {**spec, "n_vocab": tokenizer.n_vocab, **special}


def special_tokens(folder, vocabulary):
    """{"eot", "bos", "eos"} -> ids: as the files beside a tokenizer.json say, else by name."""
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    for file in BESIDE:
        if Path(folder, file).exists():
            named.update(json.loads(Path(folder, file).read_text(encoding="utf-8")))
    found = {}
    for key in ("bos", "eos"):
        token = named[f"{key}_token"]
        found[key] = vocabulary.get(token["content"] if isinstance(token, dict) else token)
    # A chat model's bos may begin a turn (<|im_start|>) and not a document: it stands in front only
    # where the model's own tokenizer puts it there.
    is_gpt2 = str(named.get("tokenizer_class")).startswith("GPT2")
    if not named.get("add_bos_token", not is_gpt2):
        found["bos"] = None
    # The separator of documents is not always eos: an instruct model's ends a turn (<|im_end|>).
    separators = [vocabulary.get("<|endoftext|>"), vocabulary.get("<|end_of_text|>")]
    separators += [found["eos"], found["bos"]]
    known = [token for token in separators if token is not None]
    return {**found, "eot": known[0]}


def document_start(encoding):
    """The tokens in front of each document: [separator], or [separator, bos]."""
    bos = getattr(encoding, "bos_token", None)
    if bos is None or bos == encoding.eot_token:
        return [encoding.eot_token]
    return [encoding.eot_token, bos]


def prompt_start(encoding):
    """The token in front of a prompt: [bos] where the tokenizer has one, else [separator]."""
    return document_start(encoding)[-1:]


def stop_tokens(encoding):
    """The tokens that end a document or an answer."""
    names = ("eot_token", "bos_token", "eos_token")
    return {getattr(encoding, name, None) for name in names} - {None}


# ---- The demo ----

# The embedded default, demo: clean grade-school problems with worked steps for the reference, and
# web-like pages in which such problems hide, with the dirt of real crawls: wrong worked answers,
# chatter, articles (they can be learned, so they cost capacity), page furniture, random strings.
KINDS = ("target", "wrong", "chatter", "article", "furniture", "noise")
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


def a_slip(rng, before, sign, b, value):
    """A wrong result of `before sign b`: off by one or ten, digits swapped, another operation."""
    other_sign = "-" if sign == "+" else "+"
    other = APPLY[other_sign](before, b)
    digits_swapped = int(str(abs(value))[::-1])
    slips = [value - 1, value + 1, value - 10, value + 10, digits_swapped, other, other]
    return rng.choice([slip for slip in slips if slip > 0 and slip != value])


def problem(rng, wrong=False):
    """(question, [(text, kind), ...]): one to three steps, worked; from a slip on it is wrong."""
    name, other = rng.sample(NAMES, 2)
    fill = {"name": name, "other": other, "thing": rng.choice(THINGS)}
    value = rng.randint(2, 30)  # as worked out
    right = value  # as it should be
    question = rng.choice(STARTS).format(a=value, **fill)
    n_steps = rng.choice((1, 1, 1, 2, 2, 3))
    slip = rng.randrange(n_steps) if wrong else n_steps
    worked = ""
    n_right = 1000  # characters of it up to the slip
    for i in range(n_steps):
        ways = {"+": rng.randint(1, 20), "-": rng.randint(1, min(20, max(1, right - 1)))}
        if right <= 20:
            ways["*"] = rng.randint(2, 4)
        parts = [part for part in (2, 3, 4, 5) if right % part == 0 and right > part]
        if parts:
            ways["/"] = rng.choice(parts)
        sign, b = rng.choice([*ways.items()])
        question += " " + rng.choice(VERBS[sign]).format(b=b, **fill)
        worked += f" {value}{sign}{b}=<<{value}{sign}{b}="
        before = value
        value = APPLY[sign](before, b)
        right = APPLY[sign](right, b)
        if i == slip:
            value = a_slip(rng, before, sign, b, value)
            n_right = len(worked)
        worked += f"{value}>>{value}."
    worked += f"\n#### {value}\n"
    question += " " + rng.choice(ASKS).format(**fill)
    asked = f"Question: {question}\nAnswer:"
    return question, [(asked + worked[:n_right], 0), (worked[n_right:], 1)]


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


def make_towns(rng):
    """400 towns, each with what an article can say of it, in sentences."""
    towns = []
    for _ in range(400):
        town = "".join(rng.choices(SYLLABLES, k=3)).capitalize()
        river = "".join(rng.choices(SYLLABLES, k=2)).capitalize()
        craft = rng.choice(CRAFTS)
        year = rng.randint(1100, 1950)
        towns.append(FACTS.format(town=town, river=river, craft=craft, year=year).split("|"))
    return towns


def fresh_problem(rng, held, wrong=0):
    """The segments of a problem that is not held out, or, with chance `wrong`, of a wrong one."""
    while True:
        question, segments = problem(rng, rng.random() < wrong)
        if question not in held:
            return segments


def pages(rng, held, towns, wrong, dirty):
    """Yield web-like pages for ever, each a list of (text, kind)."""
    while True:
        page = [(" | ".join(rng.sample(MENU, 6)) + "\n", 4)]
        for _ in range(rng.randint(2, 4)):
            page += fresh_problem(rng, held, wrong)
            page += [dirt(rng, towns) for _ in range(dirty)]
        yield page


def demo_tokenizer(documents, vocab):
    """The spec of a tokenizer of the bytes, so that any text has tokens, and of frequent words."""
    text = "".join(text for document in documents for text, _ in document)
    words = Counter(regex.findall(PATTERN, text)).most_common()
    ranks = [bytes([byte]) for byte in range(256)]
    ranks += [word.encode() for word, _ in words if len(word) > 1][: vocab - 257]
    return ranks_spec("demo", ranks, vocab)


def ranks_spec(name, ranks, n_vocab):
    ranks = [base64.b64encode(token).decode() for token in ranks]
    spec = {"name": name, "n_vocab": n_vocab, "eot": n_vocab - 1, "pat_str": PATTERN}
    return {**spec, "ranks": ranks}


def demo_tokens(documents, encoding, limit):
    """(tokens, kind of each) of documents, up to the one that reaches `limit`."""
    tokens = []
    kinds = []
    while len(tokens) < limit and (document := next(documents, None)):
        for text, kind in [("<|endoftext|>", 0), *document]:
            ids = encoding.encode(text, allowed_special="all")
            tokens += ids
            kinds += [kind] * len(ids)
    return np.array(tokens, np.uint16), np.array(kinds, np.uint8)


def prepare_demo(
    folder, seed=1337, n_ref=5000, n_train=3_200_000, wrong=0.75, dirty=1, vocab=768, n_sft=1000
):
    """Write the demo: n_ref clean problems, pages of n_train tokens, 500 held-out questions.
    wrong: share of the pages' problems whose worked answer is wrong. dirty: pieces of dirt beside
    each problem. The rest does not depend on them. kinds.npz: which of KINDS each token is."""
    rng = random.Random(seed)
    held = {}
    while len(held) < 500:
        question, segments = problem(rng)
        held[question] = segments
    towns = make_towns(rng)
    clean_text = [fresh_problem(rng, held) for _ in range(n_ref)]
    # The tokenizer sees pages as they are by default, so that it does not depend on the knobs.
    usual_pages = pages(random.Random(seed + 1), held, towns, 0.75, 1)
    spec = demo_tokenizer([*clean_text[:1500], *islice(usual_pages, 300)], vocab)
    encoding = get_tokenizer(spec)
    corpus = pages(random.Random(seed + 2), held, towns, wrong, dirty)
    splits = {  # written in this order: val_corpus goes on where train ends
        "ref": (iter(clean_text), np.inf),
        "train": (corpus, n_train),
        "val": (iter(held.values()), np.inf),
        "val_corpus": (corpus, n_train // 40),
    }
    meta = {"tokenizer": spec, "dtype": "uint16", "kinds": KINDS, "seed": seed}
    meta.update(wrong=wrong, dirty=dirty, tokens={}, documents={}, sources=[])
    command = f"python prepare_data.py --seed {seed} --n_ref {n_ref} --max_tokens {n_train}"
    meta["command"] = f"{command} --wrong {wrong} --dirty {dirty} --out {folder}"
    with new_folder(folder) as work:
        kinds = {}
        for name, (documents, limit) in splits.items():
            tokens, kinds[name] = demo_tokens(documents, encoding, limit)
            tokens.tofile(work / f"{name}.bin")
            meta["tokens"][name] = len(tokens)
            meta["documents"][name] = int((tokens == spec["eot"]).sum())
        np.savez(work / "kinds.npz", **kinds)
        answers = [segments[0][0].partition("\nAnswer: ")[2] for segments in held.values()]
        write_questions(work, dict(zip(held, answers, strict=True)))
        pairs = demo_pairs(random.Random(seed + 3), held, n_sft)
        write_answers(work, pairs, encoding, meta)
        publish(work, folder, meta)


def demo_pairs(rng, held, n):
    """n clean problems for fine-tuning, as Documents of question and answer."""
    for _ in range(n):
        prompt, seam, answer = fresh_problem(rng, held)[0][0].partition("\nAnswer:")
        yield Document(prompt + seam + answer, segments=[(prompt + seam, False), (answer, True)])


# ---- A small tokenizer ----


def train_bpe(text, size, pattern):
    """Tokens by rank of a byte pair encoding: the bytes, then the commonest pair, and so on."""
    ranks = [bytes([byte]) for byte in range(256)]
    counts = Counter(regex.findall(pattern, text))
    # A word is a string with one character for each token: chr of the token's rank.
    words = [(word.encode().decode("latin-1"), n) for word, n in counts.items()]
    while len(ranks) < size:
        pairs = Counter()
        for word, n in words:
            for pair in pairwise(word):
                pairs[pair] += n
        if not pairs:
            raise InputError(f"--train_tokenizer: this text makes {len(ranks)} tokens, no more")
        a, b = max(pairs, key=pairs.get)
        words = [(word.replace(a + b, chr(len(ranks))), n) for word, n in words]
        ranks.append(ranks[ord(a)] + ranks[ord(b)])
    return ranks


def train_tokenizer(args, sources):
    """Write args.out/meta.json for --tokenizer, of the first 2,000 documents of the files.

    The vocabulary matrix is most of a small model: of gpt2's 50,257 tokens, 85 % of its work.
    """
    documents = islice(read_role(sources, "files", args), 2000)
    text = "\n".join(document.text for document in documents)
    ranks = train_bpe(text, args.train_tokenizer - 1, PATTERN)
    spec = ranks_spec("bpe", ranks, args.train_tokenizer)
    with new_folder(args.out) as work:
        publish(work, args.out, {"tokenizer": spec, "dtype": "uint16", "tokens": {}})


# ---- What all four scripts share ----


class InputError(ValueError):
    """Something the user can fix: one line naming file or flag. Scripts print it and exit 2."""


class OneLineParser(ArgumentParser):
    """Says in one line what is wrong with a flag, without the whole usage."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}. See python {self.prog} -h\n")


class Interrupted(KeyboardInterrupt):
    """Raised on a signal; args[0] is its number."""


def raise_interrupted(number, frame):
    raise Interrupted(number)


@contextmanager
def catch_signals(handler):
    """Ctrl-C and SIGTERM call `handler` inside the with block."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old_handler in before.items():
            signal.signal(number, old_handler)


@contextmanager
def only_writer(path, wait=False, remedy="give a --name"):
    """Hold PATH.lock inside the with block. While another process holds it: wait, or InputError."""
    if fcntl is None:
        yield
        return
    lock_path = Path(f"{path}.lock")
    lock_path.parent.mkdir(parents=True, exist_ok=True)
    lock = take_lock(lock_path, wait, remedy)
    try:
        yield
    finally:
        lock_path.unlink(missing_ok=True)
        os.close(lock)


def take_lock(path, wait, remedy):
    """A file descriptor that holds the lock. Its end comes with the process, also after a crash."""
    how = fcntl.LOCK_EX
    if not wait:
        how |= fcntl.LOCK_NB
    while True:
        lock = os.open(path, os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(lock, how)
        except BlockingIOError as error:
            os.close(lock)
            run = path.with_suffix("")
            raise InputError(f"{run} is being written by another run: {remedy}") from error
        # The holder before may have deleted the file after we opened it. A lock on a deleted file
        # keeps nobody out: try again.
        if path.exists() and path.stat().st_ino == os.fstat(lock).st_ino:
            return lock
        os.close(lock)


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
    except OSError as error:
        error.filename = error.filename or str(path)  # a write does not know its file's name
        raise
    except RuntimeError as error:
        # torch.save hides the OSError that a full disk is in a RuntimeError.
        if isinstance(error.__context__, OSError):
            error.__context__.filename = str(path)
            raise error.__context__ from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def file_digest(path):
    """sha256, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ---- The command line ----


def make_parser():
    raw = RawDescriptionHelpFormatter
    parser = OneLineParser("prepare_data.py", description=__doc__, formatter_class=raw)
    add = parser.add_argument
    paths = {"nargs": "+", "metavar": "PATH", "default": []}
    add("--reference", **paths, help="clean text: the target")
    add("--corpus", **paths, help="the noisy text")
    add("--val", **paths, help="held-out target text; otherwise it is split off the reference")
    add("--sft", **paths, help="questions with answers, or chats, to fine-tune on the answers")
    add("--recipe", choices=["math", "general"], help="the paper's sets from the hub, not PATHs")
    add("--out", help="folder to write (default: data/RECIPE, data/mine or data/demo)")
    add("--field", default="text", help="the field(s) of a row with the text, if no PATH::FIELD")
    add("--separator", help="what stands between documents in a .txt or .md; \\n is a line end")
    add(
        "--tokenizer",
        default="gpt2",
        help="name in tiktoken, FOLDER/meta.json for the same, or a tokenizer.json or its folder",
    )
    add("--max_tokens", type=float, metavar="N", help="stop the corpus here; 1e9 is a number")
    add("--val_docs", type=int, default=500, metavar="N", help="documents split off, at most")
    add("--questions", **paths, help="questions (answers if there are) to keep out of all text")
    add("--keep_contaminated", action="store_true", help="count documents with questions, no more")
    add("--skip_bad", action="store_true", help="skip and count rows that cannot be read")
    add("--dry_run", action="store_true", help="show what would be read, and write nothing")
    add("--seed", type=int, default=1337, help="of the splits, and of the demo")
    add("--n_ref", type=int, default=5000, help="demo: clean problems for the reference")
    add("--wrong", type=float, default=0.75, help="demo: share of wrong answers on the pages")
    add("--dirty", type=int, default=1, help="demo: pieces of dirt beside each problem")
    add("--train_tokenizer", type=int, metavar="SIZE", help="make a tokenizer of FILES instead")
    add("files", **{**paths, "nargs": "*"}, help="for --train_tokenizer alone")
    return parser


def check_flags(args):
    """InputError for a number out of its range, and for flags that do not go together."""
    ranges = {
        "max_tokens": (1, 1e15),
        "val_docs": (1, 1e9),
        "n_ref": (1, 1e9),
        "wrong": (0, 1),
        "dirty": (0, 1000),
        "train_tokenizer": (258, 1 << 16),
    }
    for name, (least, most) in ranges.items():
        value = getattr(args, name)
        if value is not None and not least <= value <= most:  # nan is in no range
            raise InputError(f"--{name} {value:g} is not from {least:g} to {most:g}")
    if args.max_tokens:
        args.max_tokens = int(args.max_tokens)
    if args.recipe and (args.reference or args.corpus):
        raise InputError("--recipe brings its own text: leave out --reference and --corpus")
    if bool(args.files) != bool(args.train_tokenizer):
        raise InputError(f"--train_tokenizer SIZE goes with FILES; got {args.files}")
    text = args.recipe or args.reference or args.corpus
    for flag in ("val", "sft", "questions", "dry_run"):
        if getattr(args, flag) and not text:
            raise InputError(f"--{flag} goes with --reference and --corpus")
    for flag in ("reference", "corpus"):
        if text and not args.recipe and not getattr(args, flag):
            raise InputError(f"--{flag} PATH is missing")


def run(args, command):
    check_flags(args)
    sources = find_sources(args)
    if args.train_tokenizer:
        train_tokenizer(args, sources)
    elif not sources:
        n_train = args.max_tokens or 3_200_000
        prepare_demo(args.out, args.seed, args.n_ref, n_train, args.wrong, args.dirty)
    elif args.dry_run:
        preview(sources, args)
    else:
        prepare_text(args, sources, command)
    if not args.dry_run:
        for source in sources:
            counts = [f"{source.counts[key]:,} {key}" for key in COUNTED]
            print(f"{source.role} {source.name}: {', '.join(counts)}")
        print(f"{args.out} is written")


def main(argv):
    parser = make_parser()
    args = parser.parse_args(argv)
    if not args.out:
        args.out = "data/" + (args.recipe or ("mine" if args.reference else "demo"))
    if args.separator:
        args.separator = args.separator.replace("\\n", "\n")
    try:
        with catch_signals(raise_interrupted):
            run(args, " ".join(["python prepare_data.py", *argv]))
    except (InputError, OSError) as error:  # OSError: a full disk, a folder that is read-only
        parser.exit(2, f"{error}; {args.out} is not written\n")
    except Interrupted as error:
        parser.exit(128 + error.args[0], f"interrupted; {args.out} is not written\n")


if __name__ == "__main__":
    main(sys.argv[1:])
