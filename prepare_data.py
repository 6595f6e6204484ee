"""Text goes in, token files come out: data/<name>/{ref,train,val,val_corpus}.bin and meta.json

ref: clean reference text.  train: the noisy corpus.  val: held-out *target* text, split off the
reference by document.  val_corpus: held-out corpus documents.  Each is a flat stream of uint16
(uint32 for a large vocabulary); a document is its tokens with end-of-text in front.

  python prepare_data.py                        the embedded default, data/demo; needs no network
  python prepare_data.py --reference good.jsonl --corpus pages/ more.parquet --out data/mine
  python prepare_data.py --recipe math --max_tokens 1e9      the paper's sets, streamed from the hub

A PATH is a .jsonl, .parquet or .txt file (.txt: one document, cut at a line end each MB), also .gz,
.xz or .zst, or a folder of such files.
"""

import argparse
import base64
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
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path

import fsspec
import numpy as np
import regex
import tiktoken
from tqdm import tqdm

NGRAM = 13  # words in a row that make a document contaminated if a question has them too
MIN_TOKENS = 100  # a stream with less is no text to learn or to measure on
RECIPES = """
math     reference  6    meta-math/MetaMathQA         train  query,response
math     reference  4    TIGER-Lab/MathInstruct       train  instruction,output
math     reference  0.1  openai/gsm8k:main            train  question,answer
math     corpus     1    open-web-math/open-web-math  train  text
math     questions  1    openai/gsm8k:main            test   question,answer
general  reference  1    allenai/tulu-v2-sft-mixture  train  messages
general  reference  1    teknium/OpenHermes-2.5       train  conversations
general  corpus     6    cerebras/SlimPajama-627B     train  text
general  corpus     3    bigcode/starcoderdata        train  content
general  corpus     1    open-web-math/open-web-math  train  text
general  questions  1    openai/gsm8k:main            test   question,answer
"""  # recipe, role, share of what is read in that role, dataset on the hub, split, fields


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
        problem = f"--tokenizer {spec.get('name')}: {type(error).__name__}; tiktoken has "
        problem += ", ".join(tiktoken.list_encoding_names())
        raise InputError(f"{problem}; without a network it needs TIKTOKEN_CACHE_DIR") from error


def find_sources(args):
    """The flags -> [source, ...], as meta.json shows them. InputError if a path holds no text."""
    sources, ending = [], re.compile(r"\.(jsonl|txt|parquet)(\.(gz|xz|zst))?$")
    for role in ("reference", "corpus", "val", "questions"):
        fields = ["question", "answer"] if role == "questions" else args.field.split(",")
        for name in getattr(args, role):
            files = sorted(Path(name).rglob("*")) if os.path.isdir(name) else [Path(name)]
            files = [f for f in files if ending.search(f.name)]
            if not files:
                raise InputError(f"--{role} {name}: no .jsonl, .txt, .parquet (.gz, .xz, .zst)")
            source = {"role": role, "name": name, "fields": fields, "files": [*map(str, files)]}
            sources.append(source | {"size": sum(f.stat().st_size for f in files)})
    for recipe, role, size, name, split, fields in map(str.split, RECIPES.strip().split("\n")):
        if recipe == args.recipe:
            source = {"role": role, "name": name, "fields": fields.split(","), "files": [name]}
            sources.append(source | {"size": float(size), "split": split})
    return sources


def read_rows(source):
    """Yield the rows of a source: dicts, lines of JSON, or pieces of a .txt."""
    from datasets import load_dataset  # here, since it takes a second that the demo need not wait

    logging.getLogger("huggingface_hub").setLevel("ERROR")  # the last error is enough
    for name in source["files"]:
        source["place"] = name
        if "split" in source:  # on the hub
            rows = load_dataset(*name.split(":"), split=source["split"], streaming=True)
        elif name.endswith(".parquet"):
            rows = load_dataset("parquet", data_files=name, split="train", streaming=True)
        else:
            compression = "zst" if name.endswith(".zst") else "infer"
            rows = file = fsspec.open(name, "rb", compression=compression).open()
            if ".txt" in name[-8:]:
                rows = map(bytes.decode, map(b"".join, iter(partial(file.readlines, 1 << 20), [])))
        for number, row in enumerate(rows, 1):
            source["place"] = f"{name}:{number}"
            if row not in (b"\n", b"\r\n"):
                yield row


def row_text(row, fields):
    """The text of a row; of two fields, a question with its answer. Any exception: a bad row."""
    row = json.loads(row) if isinstance(row, bytes) else row
    row = {fields[0]: row} if isinstance(row, str) else row
    if not all(field in row for field in fields):
        raise ValueError(f"no field {', '.join(fields)} (--field); there are {', '.join(row)}")
    texts = [row[field] for field in fields]
    if isinstance(texts[0], list):  # a chat, turn by turn
        texts = ["\n".join(turn.get("content", turn.get("value")) for turn in texts[0])]
    text = "Question: " * (len(texts) > 1) + "\nAnswer: ".join(texts)
    return text.encode(errors="replace").decode()  # there are no tokens for lone surrogates


def read_source(source, skip_bad):
    """Yield (progress, place, text) of each row, and count. InputError says where it is bad."""
    source |= {"rows": 0, "skipped": 0}
    done, digest = 0, hashlib.sha256()
    hint = "damaged? (.zst needs: pip install zstandard)"
    hint = "no hub? Give --reference FILE --corpus FILE" if "split" in source else hint
    try:
        for row in read_rows(source):
            source["rows"] += 1
            try:
                text = row_text(row, source["fields"])
            except Exception:
                if not skip_bad:
                    hint = "--skip_bad skips and counts bad rows"
                    raise
                source["skipped"] += 1
                continue
            digest.update(text.encode())
            source["sha256"] = digest.hexdigest()
            done += len(text)
            yield done / source["size"], source["place"], text
    except Exception as error:  # of JSON, gzip, pyarrow, the hub: whatever it is, say where
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"{source['place']}: {reason}; {hint}") from error


def words_of(text):
    return re.findall(r"\w+", text.lower())


def ngrams(words, n):
    return zip(*(words[i:] for i in range(n)), strict=False)


def question_grams(questions):
    """Questions -> {n: {n-gram: question}}; n is 13, or all words of a shorter question."""
    grams = {}
    for question in questions:
        words = words_of(question)
        n = min(NGRAM, len(words))
        grams.setdefault(n, {}).update(dict.fromkeys(ngrams(words, n), question))
    return grams


def find_question(text, grams):
    """A question of which the text holds an n-gram, or None."""
    words = words_of(text) if grams else []
    for n, known in grams.items():
        if not known.keys().isdisjoint(ngrams(words, n)):  # in C, it clears nearly all texts
            return next(known[gram] for gram in ngrams(words, n) if gram in known)
    return None


def hold_out(texts, n, share, held, seed, avoid=()):
    """Yield texts, but keep the n (at most that share) of smallest seeded hash: held[hash] = text.

    The hash decides, so copies of held-out texts do not get through, nor do those in `avoid`.
    """
    total = 0
    for text in texts:
        total += 1
        key = hashlib.sha256(f"{seed} {text}".encode()).digest()
        if key not in avoid:
            held[key] = text
            if len(held) > n:
                yield held.pop(max(held))
    while len(held) > max(1, share * total):
        yield held.pop(max(held))


def write_tokens(path, texts, encoding, dtype, max_tokens=None):
    """Tokenise on all cores and stream to `path`. Returns the numbers of tokens and documents.

    Threads, since tiktoken lets go of Python's lock. Batches, so that memory is constant.
    """

    def encode(text):
        tokens = encoding.encode_to_numpy(text, disallowed_special=())
        return np.append(np.uint32(encoding.eot_token), tokens).astype(dtype)

    tokens, documents, texts = 0, 0, iter(texts)
    bar = tqdm(desc=path.stem, unit=" tokens", unit_scale=True, total=max_tokens, mininterval=0.5)
    with open(path, "wb") as file, ThreadPoolExecutor(os.cpu_count()) as pool, bar:
        while batch := list(islice(texts, 256)):
            for document in pool.map(encode, batch):
                file.write(document.tobytes())
                documents += 1
                tokens += len(document)
                bar.update(len(document))
                if max_tokens and tokens >= max_tokens:
                    return tokens, documents
    return tokens, documents


@contextmanager
def new_folder(folder, meta, questions):
    """Gives an empty folder to write in; its files move to `folder` when all is well.

    meta.json moves last: without it a folder is not prepared. A failure leaves nothing behind.
    """
    work, folder = Path(f"{folder}.tmp"), Path(folder)
    shutil.rmtree(work, ignore_errors=True)  # of a run that was killed
    try:
        work.mkdir(parents=True)
        yield work
        if questions:
            lines = [json.dumps(question) + "\n" for question in map(split_question, questions)]
            (work / "questions.jsonl").write_text("".join(lines))
        files = sorted(work.iterdir())
        meta["files"] = {f.name: hashlib.sha256(np.memmap(f, mode="r")).hexdigest() for f in files}
        (work / "meta.json").write_text(json.dumps(meta, indent=1))
        folder.mkdir(parents=True, exist_ok=True)
        for old in ("meta.json", "questions.jsonl", "train.kind.bin", "val_corpus.kind.bin"):
            (folder / old).unlink(missing_ok=True)
        for path in [*files, work / "meta.json"]:
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def split_question(text):
    question, _, answer = text.removeprefix("Question: ").partition("\nAnswer: ")
    return {"question": question, "answer": answer}


def load_meta(folder):
    """meta.json of a prepared folder. InputError if it is missing or the files disagree with it."""
    path, command = Path(folder, "meta.json"), "python prepare_data.py"
    try:
        meta = json.loads(path.read_text())
        command = meta.get("command", command)
        sizes = {n: k * np.dtype(meta["dtype"]).itemsize for n, k in meta["tokens"].items()}
        if wrong := [n for n in sizes if path.with_name(f"{n}.bin").stat().st_size != sizes[n]]:
            raise InputError(f"{path}: {wrong[0]}.bin has another size. Run: {command}")
    except FileNotFoundError as error:
        raise InputError(f"{error.filename} not found. Run: {command}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged. Run: {command}") from error
    return meta


def prepare_text(args, sources, meta):
    """Tokenise the sources into the folder args.out. InputError if one is bad or too short."""
    if missing := {"reference", "corpus"} - {source["role"] for source in sources}:
        raise InputError(f"--{missing.pop()} is missing: your own text needs both")
    spec = {"name": args.tokenizer}
    if args.tokenizer.endswith(".json"):
        spec = load_meta(Path(args.tokenizer).parent)["tokenizer"]
    encoding = get_tokenizer(spec)
    spec |= {"n_vocab": encoding.n_vocab, "eot": encoding.eot_token}
    dtype = np.dtype("<u2" if encoding.n_vocab <= 1 << 16 else "<u4")
    grams, found = {}, []

    def texts(role):  # all sources of a role in step, in proportion to their size
        chosen = [read_source(s, args.skip_bad) for s in sources if s["role"] == role]
        for _, place, text in heapq.merge(*chosen, key=lambda item: item[0]):
            if question := find_question(text, grams):
                found.append({"document": place, "question": question})
            if text.strip() and (not question or args.keep_contaminated):
                yield text

    given, split, held = {}, {}, {}  # held-out texts: of --val, of the reference, of the corpus
    questions = list(texts("questions"))
    list(hold_out(texts("val"), np.inf, 1, given, args.seed))  # may hold questions: not searched
    grams = question_grams(split_question(text)["question"] for text in questions)
    val, n = (given, 0) if args.val else (split, args.val_docs)
    ref = hold_out(texts("reference"), n, 0.1, split, args.seed, given)
    train = hold_out(texts("corpus"), 200, 0.1, held, args.seed, val)
    meta |= {"tokenizer": spec, "dtype": dtype.name, "tokens": {}, "documents": {}}
    meta |= {"sources": sources, "seed": args.seed}
    with new_folder(args.out, meta, questions) as work:
        streams = {"ref": ref, "val": val.values(), "train": train, "val_corpus": held.values()}
        for name, stream in streams.items():
            limit = args.max_tokens if name == "train" else None
            tokens, count = write_tokens(work / f"{name}.bin", stream, encoding, dtype, limit)
            if tokens < MIN_TOKENS:
                skipped = sum(source.get("skipped", 0) for source in sources)
                flag = {"ref": "--reference", "val": "--val, --reference"}.get(name, "--corpus")
                reason = f"{name}.bin would hold {tokens} tokens, {skipped} rows were skipped"
                raise InputError(f"{flag}: too little text; {reason}")
            meta["tokens"][name], meta["documents"][name] = tokens, count
        contamination = {"questions": len(questions), "ngram": NGRAM, "found": len(found)}
        contamination |= {"dropped": not args.keep_contaminated, "documents": found[:100]}
        meta["contamination"] = contamination
    print(f"{args.out}: " + ", ".join(f"{name} {n:,} tokens" for name, n in meta["tokens"].items()))


# The embedded default, demo:
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
FACTS = (  # on towns; what an article says of one is the same on every page, so can be learned
    "{town} lies on the river {river}. ",
    "The town of {town} was founded in {year}. ",
    "{town} is known for its {craft}. ",
    "In {year} the people of {town} built a bridge over the {river}. ",
)
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
    n_steps, a, b = rng.choice((1, 1, 1, 2, 2, 3)), rng.randint(2, 9), rng.randint(2, 9)
    if rng.random() < 0.3:
        steps, value, start = [("", a), ("*", b)], a * b, PACKS
    else:
        a = value = rng.randint(2, 30)
        steps, start = [("", a)], STARTS
    text = [rng.choice(start).format(a=a, b=b, **fill)]
    while len(steps) <= n_steps:
        parts = [p for p in (2, 3, 4, 5) if value % p == 0 and value > p]
        ways = {"+": rng.randint(1, 20), "-": rng.randint(1, min(20, max(1, value - 1)))}
        ways |= {"*": rng.randint(2, 4)} if value <= 20 else {}
        ways |= {"/": rng.choice(parts)} if parts else {}
        operation, b = rng.choice([*ways.items()])
        steps.append((operation, b))
        text.append(rng.choice(VERBS[operation]).format(b=b, **fill))
        value = APPLY[operation](value, b)
    return " ".join([*text, rng.choice(ASKS).format(**fill)]), steps


def worked(rng, question, steps, wrong=False):
    """[(text, kind), ...] of a problem with its worked answer; from a slip on it is "wrong"."""
    bad, segments = rng.randrange(1, len(steps)) if wrong else 0, []
    text, kind, value = f"Question: {question}\nAnswer:", 0, steps[0][1]
    for i, (operation, b) in enumerate(steps[1:], 1):
        result = APPLY[operation](value, b)
        text += f" {value}{operation}{b}=<<{value}{operation}{b}="
        if i == bad:  # off by one or ten, another operation, digits swapped, or a guess
            other = APPLY["-" if operation == "+" else "+"](value, b)
            slips = [result + rng.choice((-1, 1)), result + rng.choice((-10, 10)), other]
            slips += [int(str(abs(result))[::-1]), rng.randint(1, 99)]
            segments, text, kind = [(text, 0)], "", 1
            result = rng.choice([slip for slip in slips if slip > 0 and slip != result])
        text, value = f"{text}{result}>>{result}.", result
    return [*segments, (f"{text}\n#### {value}\n", kind)]


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
    counts = Counter(word for text in texts for word in regex.findall(PATTERN, text))
    words = {word.encode().decode("latin1"): n for word, n in counts.items()}  # token i is chr(i)
    ranks = [bytes([b]) for b in range(256)]
    while len(ranks) < n_vocab - 1:  # the last id is end-of-text
        pairs = Counter()
        for word, n in words.items():
            for i in range(len(word) - 1):
                pairs[word[i : i + 2]] += n
        best = max(pairs, key=lambda pair: (pairs[pair], [ranks[ord(c)] for c in pair]))
        words = {word.replace(best, chr(len(ranks))): n for word, n in words.items()}
        ranks.append(b"".join(ranks[ord(c)] for c in best))
    return ranks


def prepare_demo(folder, seed=1337, n_ref=5000, n_train=1_250_000, wrong=0.6, dirty=2, n_vocab=768):
    """Write the demo: n_ref clean problems, pages of n_train tokens, 500 held-out questions.

    wrong: share of the pages' problems whose worked answer is wrong. dirty: pieces of dirt beside
    each problem. train.kind.bin says of each token of train.bin which of KINDS it is; so for
    val_corpus.
    """
    rng, held = random.Random(seed), {}
    while len(held) < 500:
        held.update([problem(rng)])
    facts = []
    for _ in range(400):
        town, river = ("".join(rng.choices(SYLLABLES, k=k)).capitalize() for k in (3, 2))
        fill = {"town": town, "river": river, "year": rng.randint(1100, 1950)}
        fill["craft"] = rng.choice(CRAFTS)
        facts.append([fact.format(**fill) for fact in FACTS])
    fresh = (p for p in iter(lambda: problem(rng), None) if p[0] not in held)

    def page(dirty=dirty):
        segments = [(" | ".join(rng.sample(MENU, 6)) + "\n", 4)]
        for _ in range(rng.randint(2, 4)):
            segments += worked(rng, *next(fresh), wrong=rng.random() < wrong)
            segments += [dirt(rng, facts) for _ in range(dirty)]
        return segments

    clean = [worked(rng, *next(fresh)) for _ in range(n_ref)]
    target = [worked(rng, question, steps) for question, steps in held.items()]
    sample = clean[:1500] + [page(dirty=2) for _ in range(300)]
    ranks = train_bpe(["".join(text for text, _ in document) for document in sample], n_vocab)
    spec = {"name": "demo", "n_vocab": n_vocab, "eot": n_vocab - 1, "pat_str": PATTERN}
    spec["ranks"] = [base64.b64encode(token).decode() for token in ranks]
    encoding, pages = get_tokenizer(spec), iter(page, None)
    meta = {"tokenizer": spec, "dtype": "uint16", "seed": seed, "kinds": KINDS, "sources": []}
    meta |= {"wrong": wrong, "dirty": dirty, "tokens": {}, "documents": {}}
    streams = {"ref": clean, "train": pages, "val": target, "val_corpus": pages}
    limits = {"train": n_train, "val_corpus": n_train // 40}
    questions = ["".join(text for text, _ in document) for document in target]
    with new_folder(folder, meta, questions) as work:
        for name, documents in streams.items():
            tokens, kinds, count = [], [], 0
            for document in documents:
                count += 1
                for text, kind in [("<|endoftext|>", 0), *document]:
                    ids = encoding.encode(text, allowed_special="all")
                    tokens += ids
                    kinds += [kind] * len(ids)
                if len(tokens) >= limits.get(name, np.inf):
                    break
            np.array(tokens, np.uint16).tofile(work / f"{name}.bin")
            meta["tokens"][name], meta["documents"][name] = len(tokens), count
            if name in limits:
                np.array(kinds, np.uint8).tofile(work / f"{name}.kind.bin")


def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add, paths = parser.add_argument, {"nargs": "+", "metavar": "PATH", "default": []}
    add("--reference", **paths, help="clean text: the target")
    add("--corpus", **paths, help="the noisy text")
    add("--val", **paths, help="held-out target text; otherwise it is split off the reference")
    recipes = sorted({line.split()[0] for line in RECIPES.strip().split("\n")})
    add("--recipe", choices=recipes, help="the paper's sets from the hub instead of PATHs")
    add("--out", help="folder to write (default: data/RECIPE, data/mine or data/demo)")
    add("--field", default="text", help="field of a row with the text, or QUESTION,ANSWER")
    add("--tokenizer", default="gpt2", help="name in tiktoken, or FOLDER/meta.json for the same")
    add("--max_tokens", type=float, metavar="N", help="stop the corpus here; 1e9 is a number")
    add("--val_docs", type=int, default=500, metavar="N", help="documents split off, at most")
    add("--questions", **paths, help=".jsonl with question, answer: kept out of all training text")
    add("--keep_contaminated", action="store_true", help="count documents with questions, no more")
    add("--skip_bad", action="store_true", help="skip and count rows that cannot be read")
    add("--seed", type=int, default=1337, help="of the splits, and of the demo")
    add("--n_ref", type=int, default=5000, help="demo: clean problems for the reference")
    add("--wrong", type=float, default=0.6, help="demo: share of the pages' answers that are wrong")
    add("--dirty", type=int, default=2, help="demo: pieces of dirt beside each problem")
    args = parser.parse_args(argv)
    args.out = args.out or "data/" + (args.recipe or ("mine" if args.corpus else "demo"))
    argv = sys.argv[1:] if argv is None else argv
    try:
        if sources := find_sources(args):
            command = shlex.join(["python", "prepare_data.py", *argv])
            prepare_text(args, sources, {"command": command})
        else:
            n_train = int(args.max_tokens or 1_250_000)
            if args.n_ref < 1 or n_train < MIN_TOKENS or not 0 <= args.wrong <= 1 or args.dirty < 0:
                raise InputError(
                    "--n_ref, --max_tokens, --wrong or --dirty is out of range: see -h"
                )
            prepare_demo(args.out, args.seed, args.n_ref, n_train, args.wrong, args.dirty)
    except InputError as error:
        parser.exit(2, f"{error}\n")
    except OSError as error:  # a full disk, a file that is not there or may not be read
        parser.exit(2, f"{error.filename or f'--out {args.out}'}: {error.strerror or error}\n")


if __name__ == "__main__":
    main()
