"""Text goes in, token files come out: data/<name>/{ref,train,val,val_corpus}.bin and meta.json

ref: clean reference text.  train: the noisy corpus.  val: held-out *target* text, split off the
reference by document.  val_corpus: held-out corpus documents.  Each is a flat stream of uint16
(uint32 for a large vocabulary); a document is its tokens with end-of-text in front.

  python prepare_data.py                        the embedded default, data/demo; needs no network
  python prepare_data.py --reference good.jsonl --corpus pages/ more.parquet --out data/mine
  python prepare_data.py --recipe math --max_tokens 1e9      the paper's sets, streamed from the hub

A PATH is a .jsonl, .parquet or .txt file (.txt: one document, cut at a line end each MB), also .gz,
.xz or .zst, or a folder. PATH:0.3 takes a random 30 % of its rows, PATH:-0.3 the other 70 %.
"""

import argparse
import base64
import bisect
import hashlib
import heapq
import json
import logging
import os
import random
import re
import shlex
import shutil
import sys
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import regex
import tiktoken
from tqdm import tqdm

NGRAM = 13  # words in a row that make a document contaminated if a question has them too
MIN_TOKENS = 100  # a stream with less is no text to learn or to measure on
SEPARATORS = bytes(b if b > 127 or chr(b).isalnum() else 32 for b in range(256))
RECIPES = {  # role, share of what is read, dataset on the hub, config, fields, split
    "math": (
        ("reference", 6, "meta-math/MetaMathQA", None, "query,response", "train"),
        ("reference", 4, "TIGER-Lab/MathInstruct", None, "instruction,output", "train"),
        ("reference", 0.1, "openai/gsm8k", "main", "question,answer", "train"),
        ("corpus", 1, "open-web-math/open-web-math", None, "text", "train"),
        ("questions", 1, "openai/gsm8k", "main", "question,answer", "test"),
    ),
    "general": (
        ("reference", 1, "allenai/tulu-v2-sft-mixture", None, "messages", "train"),
        ("reference", 1, "teknium/OpenHermes-2.5", None, "conversations", "train"),
        ("corpus", 6, "cerebras/SlimPajama-627B", None, "text", "train"),
        ("corpus", 3, "bigcode/starcoderdata", None, "content", "train"),
        ("corpus", 1, "open-web-math/open-web-math", None, "text", "train"),
        ("questions", 1, "openai/gsm8k", "main", "question,answer", "test"),
    ),
}


class InputError(Exception):
    """Something the user can mend: one line naming file or flag. Scripts print it and exit 2."""


def get_tokenizer(spec):
    """meta["tokenizer"] -> tiktoken.Encoding, by name or from its ranks. InputError if neither."""
    try:
        if "ranks" not in spec:
            return tiktoken.get_encoding(spec["name"])
        ranks = {base64.b64decode(token): rank for rank, token in enumerate(spec["ranks"])}
        options = {"mergeable_ranks": ranks, "special_tokens": {"<|endoftext|>": spec["eot"]}}
        return tiktoken.Encoding(spec["name"], pat_str=spec["pat_str"], **options)
    except (KeyError, TypeError, ValueError, OSError) as error:  # OSError: no network
        names = ", ".join(tiktoken.list_encoding_names())
        problem = f"--tokenizer {spec.get('name')}: {type(error).__name__}; tiktoken has {names}"
        raise InputError(f"{problem}; without a network it needs TIKTOKEN_CACHE_DIR") from error


# ---- reading: a source is a dict, the one that meta.json shows ----


def new_source(role, path, fields):
    """One PATH of the command line -> source. InputError if it holds no text file."""
    path, share = re.fullmatch(r"(.+?)(?::(-?0?\.\d+))?", path).groups()
    files = sorted(Path(path).rglob("*")) if os.path.isdir(path) else [Path(path)]
    files = [f for f in files if re.search(r"\.(jsonl|txt|parquet)(\.(gz|xz|zst))?$", f.name)]
    if not files:
        raise InputError(f"--{role} {path}: no .jsonl, .txt or .parquet file (.gz, .xz, .zst)")
    source = {"role": role, "name": path, "fields": fields, "share": float(share or 1)}
    return source | {"files": [str(f) for f in files], "size": sum(f.stat().st_size for f in files)}


def read_rows(source):
    """Yield the rows of a source, each a dict, a text, or the bytes of a line of JSON."""
    for name in source["files"]:
        source["place"] = name
        if "hub" in source or name.endswith(".parquet"):
            from datasets import load_dataset  # imported here: it takes a second

            logging.getLogger("huggingface_hub").setLevel("ERROR")  # the last error is enough
            parquet = {"path": "parquet", "data_files": name, "split": "train"}
            rows = load_dataset(**source.get("hub", parquet), streaming=True)
        elif name.endswith(".zst") and "zst" not in fsspec.utils.compressions:
            raise ImportError("needs one more package: pip install zstandard")
        else:
            rows = file = fsspec.open(name, "rb", compression="infer").open()
            if ".txt" in name[-8:]:
                pieces = iter(partial(file.readlines, 1 << 20), [])
                rows = (b"".join(lines).decode() for lines in pieces)
        for number, row in enumerate(rows, 1):
            source["place"] = f"{name}:{number}"
            if row not in (b"\n", b"\r\n"):
                yield row


def row_texts(row, fields):
    """The texts of the fields of a row. ValueError and the like say what is wrong with it."""
    row = json.loads(row) if isinstance(row, bytes) else row
    row = {fields[0]: row} if isinstance(row, str) else row
    texts = [row[field] for field in fields if field in row]
    if len(texts) < len(fields):
        raise ValueError(f"no field {', '.join(fields)} (--field); there are {', '.join(row)}")
    for i, text in enumerate(texts):
        if isinstance(text, list):  # a chat, turn by turn
            text = "\n".join(turn.get("content") or turn["value"] for turn in text)
        texts[i] = text.encode(errors="replace").decode()  # there are no tokens for lone surrogates
    return texts


def read_source(source, args):
    """Yield (progress, place, texts) of each row, and count. InputError says where it is bad."""
    source |= {"rows": 0, "skipped": 0}
    rng, digest, done = random.Random(f"{args.seed} {source['name']}"), hashlib.sha256(), 0
    hint = "no hub? Give --reference FILE --corpus FILE" if "hub" in source else "damaged?"
    try:
        for row in read_rows(source):
            if (rng.random() < abs(source["share"])) != (source["share"] > 0):
                continue
            source["rows"] += 1
            try:
                texts = row_texts(row, source["fields"])
            except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
                if not args.skip_bad:
                    hint = "--skip_bad skips and counts bad rows"
                    raise
                source["skipped"] += 1
                continue
            digest.update("\0".join(texts).encode())
            source["sha256"] = digest.hexdigest()
            done += sum(map(len, texts))
            yield done / source["size"], source["place"], texts
    except Exception as error:  # of JSON, gzip, pyarrow, the hub: whatever it is, say where
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"{source['place']}: {reason}; {hint}") from error


# ---- evaluation questions in training text ----


def words_of(text):
    """Lower case, punctuation stripped; as bytes, which is three times faster."""
    text = re.sub(rb"\xe2[\x80-\x8b].", b" ", text.lower().encode())  # curly quotes, dashes
    return text.translate(SEPARATORS).split()


def ngrams(words, n):
    return zip(*(words[i:] for i in range(n)), strict=False)


def question_grams(questions):
    """{n: ({n-gram: question}, their pieces)}; n is 13, or all words of a shorter question."""
    grams = {}
    for question in questions:
        words = words_of(question["question"])
        n = min(NGRAM, len(words))
        full, pieces = grams.setdefault(n, ({}, set()))
        full.update(dict.fromkeys(ngrams(words, n), question["question"]))
        pieces.update(ngrams(words, (n + 1) // 2))
    return grams


def find_question(text, grams):
    """A question of which the text holds an n-gram, or None.

    Cut a text into pieces of (n+1)//2 words: wherever an n-gram lies, it covers a whole piece. So
    one look per piece clears nearly all texts.
    """
    words = words_of(text) if grams else []
    for n, (full, pieces) in grams.items():
        if not pieces.isdisjoint(zip(*[iter(words)] * ((n + 1) // 2), strict=False)):
            for gram in ngrams(words, n):
                if gram in full:
                    return full[gram]
    return None


# ---- splitting, tokenising, writing ----


def hold_out(texts, n, share, held, seed, avoid=()):
    """Yield texts, but keep in `held` the n (at most that share) of smallest seeded hash, sorted.

    The hash decides, so copies of held-out texts do not get through, nor do those in `avoid`.
    """
    total, avoid = 0, {key for key, _ in avoid}
    for text in texts:
        total += 1
        item = (hashlib.blake2b(text.encode(), key=str(seed).encode()).digest(), text)
        i = bisect.bisect_left(held, item)
        if item[0] not in avoid and held[i : i + 1] != [item]:
            held.insert(i, item)
            if len(held) > n:
                yield held.pop()[1]
    while len(held) > max(1, share * total):
        yield held.pop()[1]


def write_tokens(path, texts, encoding, dtype, max_tokens=None):
    """Tokenise on all cores and stream to `path`. Returns the numbers of tokens and documents.

    Threads, since tiktoken lets go of Python's lock. The number of texts under way is fixed: memory
    is constant, and what is read for max_tokens is the same on any machine.
    """

    def encode(text):
        tokens = encoding.encode_to_numpy(text, disallowed_special=())
        return np.append(np.uint32(encoding.eot_token), tokens).astype(dtype)

    def encoded(pool):
        pending = deque()
        for text in texts:
            pending.append(pool.submit(encode, text))
            if len(pending) > 256:
                yield pending.popleft().result()
        yield from (future.result() for future in pending)

    tokens, documents = 0, 0
    bar = tqdm(desc=path.stem, unit=" tokens", unit_scale=True, total=max_tokens, mininterval=0.5)
    with open(path, "wb") as file, ThreadPoolExecutor(os.cpu_count()) as pool, bar:
        for document in encoded(pool):
            file.write(document.tobytes())
            documents += 1
            tokens += len(document)
            bar.update(len(document))
            if max_tokens and tokens >= max_tokens:
                break
        pool.shutdown(cancel_futures=True)
    return tokens, documents


def prepare_text(work, folder, sources, questions, args, meta):
    """Tokenise the sources in folder `work`; when all is well, move it to `folder`."""
    spec = {"name": args.tokenizer}
    if args.tokenizer.endswith(".json"):
        spec = load_meta(Path(args.tokenizer).parent)["tokenizer"]
    encoding = get_tokenizer(spec)
    spec |= {"n_vocab": encoding.n_vocab, "eot": encoding.eot_token}
    dtype = np.dtype("<u2" if encoding.n_vocab <= 1 << 16 else "<u4")
    meta |= {"tokenizer": spec, "dtype": dtype.name, "tokens": {}, "documents": {}}
    grams, found = question_grams(questions), []

    def texts(role):  # all sources of a role in step, in proportion to their size
        chosen = [read_source(source, args) for source in sources if source["role"] == role]
        for _, place, texts in heapq.merge(*chosen, key=lambda item: item[0]):
            text = texts[0] if len(texts) == 1 else "Question: {}\nAnswer: {}".format(*texts)
            question = find_question(text, grams) if role != "val" else None
            if question is not None:
                found.append({"document": place, "question": question})
            if text.strip() and (question is None or args.keep_contaminated):
                yield text

    given, split, corpus = [], [], []  # held-out texts: named by --val or split off, of the corpus
    list(hold_out(texts("val"), sys.maxsize, 1, given, args.seed))
    val, n = (given, 0) if args.val else (split, args.val_docs)
    reference = hold_out(texts("reference"), n, 0.1, split, args.seed, given)
    dirty = hold_out(texts("corpus"), 200, 0.05, corpus, args.seed, val)
    for name, flag, documents, limit in (
        ("ref", "--reference", reference, args.max_ref_tokens),
        ("val", "--val", (text for _, text in val), None),
        ("train", "--corpus", dirty, args.max_tokens),
        ("val_corpus", "--corpus", (text for _, text in corpus), None),
    ):
        tokens, count = write_tokens(work / f"{name}.bin", documents, encoding, dtype, limit)
        if tokens < MIN_TOKENS:
            skipped = sum(source.get("skipped", 0) for source in sources)
            reason = f"{name}.bin would hold {tokens} tokens, {skipped} rows were skipped"
            raise InputError(f"{flag}: too little text; {reason}")
        meta["tokens"][name], meta["documents"][name] = tokens, count
    if questions:
        lines = [json.dumps(question) + "\n" for question in questions]
        Path(work, "questions.jsonl").write_text("".join(lines))
    contamination = {"questions": len(questions), "ngram": NGRAM, "found": len(found)}
    contamination |= {"dropped": not args.keep_contaminated, "documents": found[:100]}
    meta |= {"sources": sources, "seed": args.seed, "contamination": contamination}
    finish(work, folder, meta)


@contextmanager
def workplace(folder):
    """An empty folder beside `folder` to write in; nothing of it is left behind."""
    work = Path(f"{folder}.tmp")
    shutil.rmtree(work, ignore_errors=True)  # of a run that was killed
    try:
        work.mkdir(parents=True)
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def finish(work, folder, meta):
    """Move the files of `work` to `folder`, meta.json last: without it a folder is not prepared."""
    files, folder = sorted(Path(work).iterdir()), Path(folder)
    meta["files"] = {f.name: hashlib.sha256(np.memmap(f, mode="r")).hexdigest() for f in files}
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("meta.json", "train.kind.bin", "questions.jsonl"):  # of an earlier preparation
        Path(folder, name).unlink(missing_ok=True)
    with open(Path(work, "meta.json"), "w") as file:
        json.dump(meta, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    for path in [*files, Path(file.name)]:
        os.replace(path, folder / path.name)


def load_meta(folder):
    """meta.json of a prepared folder. InputError if it is missing or the files disagree with it."""
    path, command = Path(folder, "meta.json"), "python prepare_data.py"
    try:
        meta = json.loads(path.read_text())
        command = meta.get("command", command)
        for name, tokens in meta["tokens"].items():
            file, size = path.with_name(f"{name}.bin"), tokens * np.dtype(meta["dtype"]).itemsize
            if file.stat().st_size != size:
                raise InputError(f"{file} has not the {size} bytes of meta.json. Run: {command}")
    except FileNotFoundError as error:
        raise InputError(f"{error.filename} not found. Run: {command}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged. Run: {command}") from error
    return meta


# ---- the embedded default: demo ----
# Clean grade-school problems with worked steps for the reference, and a crawl of web-like pages in
# which such problems are hidden. Its dirt is what real crawls hold, of five kinds: worked answers
# that are wrong (half of what students post), chatter, articles about something else (they can be
# learned, so they cost capacity), page furniture, and strings without meaning.
KINDS = ("target", "wrong", "chatter", "article", "furniture", "noise")
PATTERN = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # a digit is a token of its own
NAMES = "Ann Ben Cara Dan Eva Finn Gina Hugo Ivy Jack Kate Leo Mia Noah Olga Paul Rosa Sam".split()
THINGS = "apples books cards coins eggs flowers marbles pens plums shells stamps toys".split()
MENU = "Home About Contact Login Register Search Help Forum Shop News Terms Privacy RSS".split()
CRAFTS = "glass cheese bells lace paper salt rope wool honey clocks boats tiles".split()
SYLLABLES = "ar ben cor del en far gol hem is jor kal lun mir nor os pel quin ros sul tor".split()
CHATTER = (
    "thanks please help with my homework due tomorrow i think you should check the sign again lol "
    "same here can anyone explain this step got it now nice one not sure why but works for me did "
    "you try the other way sorry see above good luck everyone reply soon"
).split()
STARTS = ("{name} has {a} {thing}.", "There are {a} {thing} in the box of {name}.")
PACKS = ("{name} has {a} bags of {b} {thing}.", "{name} fills {a} boxes with {b} {thing} each.")
ASKS = ("How many {thing} does {name} have now?", "How many {thing} are left with {name}?")
VERBS = {
    "+": ("{name} buys {b} more.", "{name} finds {b} more.", "{other} brings {b} more."),
    "-": ("{name} gives {b} to {other}.", "{name} loses {b}.", "{other} takes {b}."),
    "*": ("Then the pile grows {b} times.", "{other} makes it {b} times as many."),
    "/": ("{name} shares them among {b} and keeps a part.", "{name} keeps one of {b} parts."),
}
APPLY = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}


def problem(rng):
    """(question, [(operation, number), ...]): a start value, then one to three steps."""
    name, other = rng.sample(NAMES, 2)
    fill = {"name": name, "other": other, "thing": rng.choice(THINGS)}
    n_steps = rng.choice((1, 1, 1, 2, 2, 3))
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    if rng.random() < 0.3:
        steps, text = [("", a), ("*", b)], [rng.choice(PACKS).format(a=a, b=b, **fill)]
    else:
        a = rng.randint(2, 30)
        steps, text = [("", a)], [rng.choice(STARTS).format(a=a, **fill)]
    value = a * b if len(steps) == 2 else a
    while len(steps) <= n_steps:
        parts = [p for p in (2, 3, 4, 5) if value % p == 0 and value > p]
        ways = {"+": rng.randint(1, 20), "-": rng.randint(1, min(20, max(1, value - 1)))}
        ways |= {"*": rng.randint(2, 4)} if value <= 20 else {}
        ways |= {"/": rng.choice(parts)} if parts else {}
        operation = rng.choice([*ways])
        b = ways[operation]
        steps.append((operation, b))
        text.append(rng.choice(VERBS[operation]).format(b=b, **fill))
        value = APPLY[operation](value, b)
    return " ".join([*text, rng.choice(ASKS).format(**fill)]), steps


def slip(rng, value, operation, b, result):
    """A wrong result of the sorts that people make: off by one or ten, the wrong operation, digits
    swapped, or a guess."""
    other = APPLY["-" if operation == "+" else "+"](value, b)
    sorts = [result + rng.choice((-1, 1)), result + rng.choice((-10, 10)), other]
    sorts += [int(str(abs(result))[::-1]), rng.randint(1, 99)]
    return rng.choice([s for s in sorts if s > 0 and s != result])


def worked(rng, question, steps, wrong=False):
    """[(text, kind), ...] of a problem with its worked answer; from a slip on it is "wrong"."""
    bad, segments = rng.randrange(1, len(steps)) if wrong else 0, []
    text, kind, value = f"Question: {question}\nAnswer:", 0, steps[0][1]
    for i, (operation, b) in enumerate(steps[1:], 1):
        result = APPLY[operation](value, b)
        text += f" {value}{operation}{b}=<<{value}{operation}{b}="
        if i == bad:
            segments, text, kind = [(text, 0)], "", 1
            result = slip(rng, value, operation, b, result)
        text, value = f"{text}{result}>>{result}.", result
    return [*segments, (f"{text}\n#### {value}\n", kind)]


def towns(rng, n=400):
    """Invented towns: what an article says of one is the same on every page, so can be learned."""
    word = lambda k: "".join(rng.choices(SYLLABLES, k=k)).capitalize()  # noqa: E731
    for _ in range(n):
        town, river, year = word(3), word(2), rng.randint(1100, 1950)
        yield (
            f"{town} lies on the river {river}. ",
            f"The town of {town} was founded in {year}. ",
            f"{town} is known for its {rng.choice(CRAFTS)}. ",
            f"In {year} the people of {town} built a bridge over the {river}. ",
        )


def dirt(rng, facts):
    """One piece of what surrounds a problem on a page: (text, kind)."""
    user, chance = f"{rng.choice(NAMES)}{rng.randint(1, 999)}", rng.random()
    if chance < 0.4:
        return "".join(s for town in rng.sample(facts, 2) for s in rng.sample(town, 2)) + "\n", 3
    if chance < 0.65:
        return f"{user} wrote: " + " ".join(rng.choices(CHATTER, k=14)) + "\n", 2
    if chance < 0.8:
        date = f"{rng.randint(2005, 2023)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"
        return f"Posted by {user} on {date}. Views: {rng.randint(1, 99999)}\n", 4
    link = f"https://{rng.choice(SYLLABLES)}.com/{rng.getrandbits(64):x}?id={rng.getrandbits(40)}\n"
    picture = "data:image/png;base64," + base64.b64encode(rng.randbytes(36)).decode() + "\n"
    return rng.choice((link, picture, f"sha1: {rng.getrandbits(160):040x}\n")), 5


def train_bpe(texts, n_vocab):
    """Ranks of a byte-level BPE: the most frequent pair is merged until the vocabulary is full."""
    words = Counter(word for text in texts for word in regex.findall(PATTERN, text))
    words = {tuple(bytes([b]) for b in word.encode()): n for word, n in words.items()}
    ranks = [bytes([b]) for b in range(256)]
    while len(ranks) < n_vocab - 1:  # the last id is end-of-text
        pairs = Counter()
        for word, n in words.items():
            for pair in zip(word, word[1:], strict=False):
                pairs[pair] += n
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks.append(b"".join(best))
        for word in [w for w in words if best in zip(w, w[1:], strict=False)]:
            parts, i = [], 0
            while i < len(word):
                parts.append(ranks[-1] if word[i : i + 2] == best else word[i])
                i += 1 + (word[i : i + 2] == best)
            words[tuple(parts)] = words.pop(word)
    return ranks


def prepare_demo(folder, seed=1337, n_ref=5000, n_train=1_250_000, wrong=0.6, dirty=2, n_vocab=768):
    """Write the demo: n_ref clean problems, pages of n_train tokens, 500 held-out questions.

    wrong: share of the pages' problems whose worked answer is wrong. dirty: pieces of dirt beside
    each problem. train.kind.bin says of each token of train.bin which of KINDS it is.
    """
    rng, held, folder = random.Random(seed), {}, Path(folder)
    while len(held) < 500:
        held.update([problem(rng)])
    facts = list(towns(rng))

    def fresh():
        question, steps = problem(rng)
        return fresh() if question in held else (question, steps)

    def page():
        segments = [(" | ".join(rng.sample(MENU, 6)) + "\n", 4)]
        for _ in range(rng.randint(2, 4)):
            segments += worked(rng, *fresh(), wrong=rng.random() < wrong)
            segments += [dirt(rng, facts) for _ in range(dirty)]
        return segments

    clean = [worked(rng, *fresh()) for _ in range(n_ref)]
    target = [worked(rng, question, steps) for question, steps in held.items()]
    sample = clean[:1500] + [page() for _ in range(300)]
    ranks = train_bpe(["".join(text for text, _ in document) for document in sample], n_vocab)
    spec = {"name": "demo", "n_vocab": n_vocab, "eot": n_vocab - 1, "pat_str": PATTERN}
    spec["ranks"] = [base64.b64encode(token).decode() for token in ranks]
    encoding = get_tokenizer(spec)

    def tokenise(documents, amount):
        tokens, kinds, count = [], [], 0
        while len(tokens) < amount and (document := next(documents, None)):
            count += 1
            for text, kind in [("", 0), *document]:
                ids = encoding.encode_ordinary(text) if text else [spec["eot"]]
                tokens += ids
                kinds += [kind] * len(ids)
        return np.array(tokens, np.uint16), np.array(kinds, np.uint8), count

    meta = {"tokenizer": spec, "dtype": "uint16", "seed": seed, "kinds": KINDS, "sources": []}
    meta |= {"wrong": wrong, "dirty": dirty, "tokens": {}, "documents": {}}
    pages = iter(page, None)
    with workplace(folder) as work:
        for name, documents, amount in (
            ("ref", iter(clean), np.inf),
            ("train", pages, n_train),
            ("val", iter(target), np.inf),
            ("val_corpus", pages, n_train // 40),
        ):
            tokens, kinds, meta["documents"][name] = tokenise(documents, amount)
            tokens.tofile(work / f"{name}.bin")
            meta["tokens"][name] = len(tokens)
            if name == "train":
                kinds.tofile(work / "train.kind.bin")
        questions = ("".join(text for text, _ in d).split("\nAnswer: ") for d in target)
        rows = ({"question": q.removeprefix("Question: "), "answer": a} for q, a in questions)
        (work / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        finish(work, folder, meta)


# ---- the command line ----


def prepare(args, command):
    """Make the folder that the flags ask for, unless it is there. Raises InputError."""
    folder, fields = Path(args.out), args.field.split(",")
    paths = {"reference": args.reference, "corpus": args.corpus, "val": args.val}
    sources = [new_source(role, path, fields) for role in paths for path in paths[role]]
    asked = [new_source("questions", path, ["question", "answer"]) for path in args.questions]
    for role, size, hub, config, fields, split in RECIPES.get(args.recipe, ()):
        source = {"role": role, "name": hub, "fields": fields.split(","), "share": 1, "size": size}
        source |= {"files": [hub], "hub": {"path": hub, "name": config, "split": split}}
        (asked if role == "questions" else sources).append(source)
    if not sources:
        return prepare_demo(folder, args.seed)
    if missing := {"reference", "corpus"} - {source["role"] for source in sources}:
        raise InputError(f"--{missing.pop()} is missing: your own text needs both")
    try:
        old = load_meta(folder)
    except InputError:
        old = {}
    meta = {"command": command, "sizes": [source["size"] for source in sources + asked]}
    if not args.force and meta == {key: old.get(key) for key in meta}:
        return print(f"{folder} is up to date; --force makes it again")
    rows = [row for source in asked for _, _, row in read_source(source, args)]
    questions = [{"question": question, "answer": answer} for question, answer in rows]
    with workplace(folder) as work:
        prepare_text(work, folder, sources, questions, args, meta)
    print(f"{folder}: " + ", ".join(f"{name} {n:,} tokens" for name, n in meta["tokens"].items()))


def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add, paths = parser.add_argument, {"nargs": "+", "metavar": "PATH", "default": []}
    count = {"type": lambda n: int(f"{float(n):.0f}"), "metavar": "N"}  # 1e9 too; inf is refused
    add("--reference", **paths, help="clean text: the target")
    add("--corpus", **paths, help="the noisy text")
    add("--val", **paths, help="held-out target text; otherwise it is split off the reference")
    add("--recipe", choices=RECIPES, help="the paper's sets from the hub instead of PATHs")
    add("--out", help="folder to write (default: data/RECIPE, data/mine or data/demo)")
    add("--field", default="text", help="field of a row with the text, or QUESTION,ANSWER")
    add("--tokenizer", default="gpt2", help="name in tiktoken, or FOLDER/meta.json for the same")
    add("--max_tokens", **count, help="stop the corpus here")
    add("--max_ref_tokens", **count, help="stop the reference here")
    add("--val_docs", **count, default=500, help="documents split off, at most a tenth")
    add("--questions", **paths, help=".jsonl with question, answer: kept out of all training text")
    add("--keep_contaminated", action="store_true", help="count documents with questions, no more")
    add("--skip_bad", action="store_true", help="skip and count rows that cannot be read")
    add("--force", action="store_true", help="make it again although it is up to date")
    add("--seed", type=int, default=1337, help="of the splits and of PATH:SHARE")
    args = parser.parse_args(argv)
    args.out = args.out or "data/" + (args.recipe or ("mine" if args.corpus else "demo"))
    argv = [flag for flag in (sys.argv[1:] if argv is None else argv) if flag != "--force"]
    try:
        prepare(args, shlex.join(["python", "prepare_data.py", *argv]))
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a full disk, a file that is not there or may not be read
        place = error.filename or f"--out {args.out}"
        print(f"{place}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
