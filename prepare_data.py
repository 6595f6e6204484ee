"""Text goes in, token files come out:  data/<name>/{ref,train,val,val_corpus}.bin + meta.json

    ref.bin         clean reference text: what the reference model learns
    train.bin       the large noisy corpus: what is scored and what the student learns
    val.bin         held-out *target* text, split off the reference by document
    val_corpus.bin  held-out documents of the corpus
A file is one flat stream of tokens, uint16 (uint32 if the vocabulary needs it); each document is its tokens
with the end-of-text token in front. meta.json says what everything is, and is written last.

    python prepare_data.py                                     the embedded default: data/demo, no network
    python prepare_data.py --reference good.jsonl --corpus pages/ more.parquet --out data/mine
    python prepare_data.py --recipe math --max_tokens 1e9      MetaMathQA & co. against OpenWebMath, streamed

PATH is a .jsonl, .txt (one document; a longer one is cut at a line end each MB) or .parquet file, with .gz, .xz
or .zst, or a folder of them. PATH:0.3 keeps a random 30 % of its documents, PATH:-0.3 exactly the other 70 %.
"""

import argparse
import base64
import errno
import gzip
import hashlib
import heapq
import json
import lzma
import os
import random
import re
import shlex
import sys
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

NGRAM = 13  # words that a document must share with a question to count as contaminated
LANES = 64  # files open at once
MIN_TOKENS = 256  # less than this is no training text
FILES = ["ref", "train", "val", "val_corpus"]
SUFFIXES = (".jsonl", ".txt", ".parquet")


class InputError(Exception):
    """The user can mend this: one line that names the file or flag. Scripts print it and exit with status 2."""


# ---- tokenizer ----


def get_tokenizer(spec):
    """meta["tokenizer"] -> tiktoken.Encoding: by name, or from its ranks (rank = index). InputError if neither."""
    try:
        if "ranks" in spec:
            ranks = {base64.b64decode(token): rank for rank, token in enumerate(spec["ranks"])}
            eot = {"<|endoftext|>": spec["eot"]}
            return tiktoken.Encoding(
                spec["name"], pat_str=spec["pat_str"], mergeable_ranks=ranks, special_tokens=eot
            )
        return tiktoken.get_encoding(spec["name"])
    except (KeyError, TypeError, ValueError) as error:
        names = ", ".join(tiktoken.list_encoding_names())
        raise InputError(f"--tokenizer {spec.get('name')}: unknown. Choose from {names}") from error
    except OSError as error:  # requests' errors are OSErrors
        reason = f"tiktoken cannot download its ranks ({type(error).__name__})"
        raise InputError(f"--tokenizer {spec['name']}: {reason}; see TIKTOKEN_CACHE_DIR") from error


def tokenizer_spec(name):
    """--tokenizer, a tiktoken name or the meta.json of a prepared folder -> spec dict for meta.json."""
    if name.endswith(".json"):
        try:
            return json.loads(Path(name).read_text())["tokenizer"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"--tokenizer {name}: no readable meta.json of a prepared folder"
            ) from error
    encoding = get_tokenizer({"name": name})
    return {"name": name, "n_vocab": encoding.n_vocab, "eot": encoding.eot_token}


# ---- reading sources ----


def row_text(record, fields):
    """One row -> its document: the field, or `Question: ..\\nAnswer: ..` of several. ValueError says what is wrong."""
    if not isinstance(record, dict):
        raise ValueError(record if isinstance(record, str) else "not an object with fields")
    values = []
    for field in fields:
        if field not in record:
            raise ValueError(f"no field {field!r} (--field); there are: {', '.join(record)}")
        value = record[field]
        if isinstance(value, list):  # a chat: its turns, one after the other
            value = "\n".join(str(turn.get("content") or turn.get("value")) for turn in value)
        if not isinstance(value, str):
            raise ValueError(f"field {field!r} is not text")
        values.append(value)
    if len(values) == 1:
        return values[0]
    return "Question: " + "\n".join(values[:-1]) + "\nAnswer: " + values[-1]


def decompress(raw, path):
    """A binary file opened for reading -> a stream of its decompressed bytes."""
    if path.suffix == ".gz":
        return gzip.open(raw)
    if path.suffix == ".xz":
        return lzma.open(raw)
    if path.suffix != ".zst":
        return raw
    try:
        from compression import zstd  # Python 3.14
    except ImportError:
        try:
            import zstandard as zstd
        except ImportError as error:
            raise InputError(
                f"{path}: .zst needs one more package: pip install zstandard"
            ) from error
    return zstd.open(raw, "rb")


def read_file(path, fields):
    """Yield (row from 1, record, bytes of the file read so far); a record that is a str says what is wrong."""
    path, size = Path(path), os.path.getsize(path)
    with open(path, "rb") as raw:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            table, row = pyarrow.parquet.ParquetFile(raw), 0
            names = table.schema_arrow.names
            if missing := [field for field in fields if field not in names]:
                raise InputError(
                    f"{path}: no field {missing[0]!r} (--field); there are: {', '.join(names)}"
                )
            for batch in table.iter_batches(1024, columns=fields):
                for row, record in enumerate(batch.to_pylist(), row + 1):
                    yield row, record, size * row // table.metadata.num_rows
            return
        stream = decompress(raw, path)
        if ".txt" in path.suffixes[-2:]:
            row = 0
            while lines := stream.readlines(1 << 20):
                row += 1
                yield row, {fields[0]: b"".join(lines).decode()}, raw.tell()
            return
        for row, line in enumerate(stream, 1):
            try:
                record = json.loads(line) if line.strip() else {fields[0]: ""}
            except (ValueError, RecursionError) as error:
                record = f"not JSON ({error})"
            yield row, record, raw.tell()


class Source:
    """One input: `rows()` yields (row, record, position); position / size is the share that has been read."""

    def __init__(self, role, name, rows, size, fields, share=1.0):
        self.rows, self.size, self.fields, self.share = rows, max(size, 1e-9), fields, share
        self.hash = hashlib.sha256()
        self.info = {"role": role, "name": name, "rows": 0, "skipped": 0}

    def texts(self, skip_bad, seed):
        """Yield (text, row, position) of every document; a bad row raises InputError or is skipped and counted."""
        rng = random.Random(f"{seed} {os.path.basename(self.info['name'])}")
        try:
            for row, record, position in self.rows():
                if (rng.random() < abs(self.share)) != (self.share > 0):
                    continue
                self.info["rows"] += 1
                try:
                    text = row_text(record, self.fields)
                except ValueError as error:
                    if not skip_bad:
                        raise InputError(
                            f"{self.info['name']}:{row}: {error}. Or: --skip_bad"
                        ) from error
                    self.info.setdefault("first_skipped", f"row {row}: {error}")
                    text = ""
                if not text.strip():
                    self.info["skipped"] += 1
                    continue
                # lone surrogates (legal in JSON) have no UTF-8, thus no tokens
                text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
                self.hash.update(text.encode())
                yield text, row, position
        except (EOFError, ValueError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(f"{self.info['name']}: cannot be read ({error})") from error


def file_sources(role, paths, fields):
    """--reference, --corpus or --val -> list of Source, one a file, folders searched."""
    sources = []
    for path in paths:
        base, _, share = path.rpartition(":")
        if os.path.exists(path) or not re.fullmatch(r"-?0?\.\d+", share):
            base, share = path, "1"
        root = Path(base)
        if not root.exists():
            raise InputError(f"--{role} {base}: no such file or folder")
        files = sorted(root.rglob("*")) if root.is_dir() else [root]
        files = [
            f
            for f in files
            if f.is_file() and re.search(r"\.(jsonl|txt|parquet)(\.(gz|xz|zst))?$", f.name)
        ]
        if not files:
            raise InputError(f"--{role} {base}: no .jsonl, .txt or .parquet (.gz, .xz, .zst) in it")
        for file in files:

            def rows(file=file):
                return read_file(file, fields)

            sources.append(Source(role, str(file), rows, file.stat().st_size, fields, float(share)))
    return sources


def interleave(sources, skip_bad, seed):
    """Yield (source, row, text) so that all sources have been read to the same share at any time: a prefix is fair."""
    sources = random.Random(seed).sample(sources, len(sources))

    def lane(members):  # some files one after the other: a folder may hold more than can be open
        before, total = 0, sum(source.size for source in members)
        for source in members:
            for text, row, position in source.texts(skip_bad, seed):
                yield (before + position) / total, source, row, text
            before += source.size

    lanes = [lane(sources[i::LANES]) for i in range(min(LANES, len(sources)))]
    for _, source, row, text in heapq.merge(*lanes, key=lambda item: item[0]):
        yield source, row, text


def shuffle(texts, seed, max_texts=10_000, max_chars=32_000_000):
    """Seeded shuffle through a buffer, so memory is constant and neighbours in a source are not neighbours here."""
    rng, buffer, held = random.Random(seed), [], 0
    for text in texts:
        buffer.append(text)
        held += len(text)
        while len(buffer) > max_texts or held > max_chars:
            i = rng.randrange(len(buffer))
            buffer[i], buffer[-1] = buffer[-1], buffer[i]
            held -= len(buffer[-1])
            yield buffer.pop()
    rng.shuffle(buffer)
    yield from buffer


class HoldOut:
    """Holds out the n distinct documents of smallest seeded hash, at most `share` of all; passes on the others.

    By hash, not by position: copies of a document fall on the same side, whatever the order. Constant memory.
    `seen` holds the hashes of held-out documents of other splits: their copies are dropped and counted.
    """

    def __init__(self, n, share, seed, seen=()):
        self.n, self.share, self.key, self.seen = n, share, str(seed).encode(), set(seen)
        self.heap, self.copies, self.total, self.dropped = [], {}, 0, 0

    def filter(self, texts):
        for text in texts:
            key = hashlib.blake2b(text.encode(), digest_size=16, key=self.key).digest()
            key = int.from_bytes(key, "big")
            if key in self.seen:
                self.dropped += 1
                continue
            self.total += 1
            if key in self.copies:
                self.copies[key] += 1
            elif len(self.heap) < self.n or (self.heap and key < -self.heap[0][0]):
                heapq.heappush(self.heap, (-key, text))
                self.copies[key] = 1
                yield from self.shrink(self.n)
            else:
                yield text
        yield from self.shrink(max(1, int(self.share * self.total)))

    def shrink(self, n):
        """Put back the documents of largest hash until n are held."""
        while len(self.heap) > n:
            key, text = heapq.heappop(self.heap)
            yield from [text] * self.copies.pop(-key)

    def texts(self):
        return [text for _, text in sorted(self.heap, reverse=True)]


# ---- tokenise and write ----


def write_tokens(texts, path, encoding, dtype, max_tokens=None, label=""):
    """Tokenise on all cores and stream to `path`.tmp. Returns (tokens, documents, sha256).

    Threads, since tiktoken leaves Python's lock while it works. Reading, tokenising and writing overlap; a
    constant number of chunks is under way, so memory is constant and the result is the same on any machine.
    """

    def encode(chunk):
        documents = []
        for text in chunk:
            tokens = encoding.encode_to_numpy(text, disallowed_special=())
            documents.append(np.concatenate(([encoding.eot_token], tokens)).astype(dtype))
        return documents

    def chunks():
        chunk, size = [], 0
        for text in texts:
            chunk.append(text)
            size += len(text)
            if size > 1 << 17:
                yield chunk
                chunk, size = [], 0
        yield chunk

    def encoded(pool):
        pending = deque()
        for chunk in chunks():
            pending.append(pool.submit(encode, chunk))
            if len(pending) > 64:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()

    tokens, documents, digest = 0, 0, hashlib.sha256()
    bar = tqdm(desc=label, unit=" tokens", unit_scale=True, total=max_tokens)
    with open(f"{path}.tmp", "wb") as file, ThreadPoolExecutor(os.cpu_count()) as pool, bar:
        for document in encoded(pool):
            data = document.tobytes()
            file.write(data)
            digest.update(data)
            tokens += len(document)
            documents += 1
            bar.update(len(document))
            if max_tokens and tokens >= max_tokens:
                break
        pool.shutdown(cancel_futures=True)
        os.fsync(file.fileno())
    return tokens, documents, digest.hexdigest()


def write_all(folder, sources, args, spec):
    """Tokenise all sources into folder/*.bin, then write meta.json."""
    encoding = get_tokenizer(spec)
    dtype = "uint16" if spec["n_vocab"] <= 65536 else "uint32"
    result = {}

    def write(name, texts, limit=None):
        result[name] = write_tokens(texts, folder / f"{name}.bin", encoding, dtype, limit, name)
        if result[name][0] < (MIN_TOKENS if name in ("ref", "train") else 1):
            raise InputError(f"{name}.bin would hold {result[name][0]} tokens: too short")

    def texts(role):
        chosen = [source for source in sources if source.info["role"] == role]
        return (text for _, _, text in interleave(chosen, args.skip_bad, args.seed))

    explicit = HoldOut(sys.maxsize, 1, args.seed)
    list(explicit.filter(texts("val")))
    target = HoldOut(args.val_docs if not explicit.heap else 0, 0.1, args.seed, explicit.copies)
    write("ref", shuffle(target.filter(texts("reference")), args.seed), args.max_ref_tokens)
    held = explicit if explicit.heap else target
    write("val", held.texts())
    corpus = HoldOut(200, 0.05, args.seed, held.copies)
    write("train", shuffle(corpus.filter(texts("corpus")), args.seed), args.max_tokens)
    write("val_corpus", corpus.texts())
    meta = {
        "tokenizer": spec,
        "dtype": dtype,
        "tokens": {name: result[name][0] for name in FILES},
        "documents": {name: result[name][1] for name in FILES},
        "sources": [source.info | {"sha256": source.hash.hexdigest()} for source in sources],
        "seed": args.seed,
        "copies_of_val_dropped": target.dropped + corpus.dropped,
        "files": {f"{name}.bin": result[name][2] for name in FILES},
    }
    for name in FILES:
        os.replace(folder / f"{name}.bin.tmp", folder / f"{name}.bin")
    write_meta(folder, meta)


def write_meta(folder, meta):
    temporary = Path(folder, "meta.json.tmp")
    with open(temporary, "w") as file:
        json.dump(meta, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, Path(folder, "meta.json"))


def load_meta(folder):
    """meta.json of a prepared folder, after checking that the files are as it says. InputError if not."""
    folder = Path(folder)
    if not (folder / "meta.json").is_file():
        raise InputError(f"{folder}/meta.json not found. Run: python prepare_data.py")
    try:
        meta = json.loads((folder / "meta.json").read_text())
        width = np.dtype(meta["dtype"]).itemsize
        sizes = {f"{name}.bin": n * width for name, n in meta["tokens"].items()}
        command = meta.get("command", "python prepare_data.py")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}/meta.json is damaged. Run: python prepare_data.py") from error
    for name, size in sizes.items():
        found = os.path.getsize(folder / name) if (folder / name).is_file() else 0
        if found != size:
            raise InputError(
                f"{folder / name}: {found} bytes, meta.json says {size}. Run: {command}"
            )
    return meta


# ---- the embedded default: demo ----


def prepare_demo(folder, seed=1337):
    raise NotImplementedError


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--reference", nargs="+", metavar="PATH", default=[], help="clean reference text")
    add("--corpus", nargs="+", metavar="PATH", default=[], help="noisy corpus")
    add(
        "--val",
        nargs="+",
        metavar="PATH",
        default=[],
        help="held-out target text (default: split off the reference)",
    )
    add("--out", help="folder to write")
    add("--field", default="text", help="field with the text")
    add("--tokenizer", default="gpt2")
    add("--val_docs", type=int, default=500)
    add("--max_tokens", type=lambda s: int(float(s)))
    add("--max_ref_tokens", type=lambda s: int(float(s)))
    add("--skip_bad", action="store_true")
    add("--seed", type=int, default=1337)
    args = parser.parse_args(argv)
    try:
        if not args.reference:
            prepare_demo(args.out or "data/demo", args.seed)
            return
        fields = args.field.split(",")
        roles = {"reference": args.reference, "corpus": args.corpus, "val": args.val}
        sources = [s for role, paths in roles.items() for s in file_sources(role, paths, fields)]
        folder = Path(args.out)
        folder.mkdir(parents=True, exist_ok=True)
        write_all(folder, sources, args, tokenizer_spec(args.tokenizer))
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
