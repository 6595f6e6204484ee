"""Text goes in, token files come out: data/<name>/{ref,train,val,val_corpus}.bin and meta.json

ref: clean text. train: the noisy corpus. val: target text held out of ref. val_corpus: of train.
Each is one stream of uint16 or uint32, with end-of-text before each document. A PATH is a .jsonl,
.parquet or .txt (64 kB up to a line end: a document), also .gz, .xz, .zst, or a folder of them.

  python prepare_data.py                        the embedded default, data/demo; needs no network
  python prepare_data.py --reference good.jsonl --corpus pages/ more.parquet --out data/mine
  python prepare_data.py --recipe math --max_tokens 1e9      the paper's sets, streamed from the hub
"""

import base64
import glob
import hashlib
import heapq
import json
import os
import random
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import fsspec
import numpy as np
import regex
import tiktoken
from tqdm import tqdm

NGRAM = 13  # words in a row that make a document contaminated if a question has them too
RECIPES = """
recipe        role       size name                         split  fields
math          reference  6    meta-math/MetaMathQA         train  query,response
math          reference  4    TIGER-Lab/MathInstruct       train  instruction,output
math          reference  0.1  openai/gsm8k:main            train  question,answer
general       reference  1    allenai/tulu-v2-sft-mixture  train  messages
general       reference  1    teknium/OpenHermes-2.5       train  conversations
general       corpus     6    cerebras/SlimPajama-627B     train  text
general       corpus     3    bigcode/starcoderdata        train  content
math,general  corpus     1    open-web-math/open-web-math  train  text
math,general  questions  1    openai/gsm8k:main            test   question,answer
"""  # all on the hub; size: share of what is read in that role
MENDING = "a bad row? --skip_bad. A .zst? pip install zstandard. No hub? --reference, --corpus FILE"


class InputError(ValueError):
    """Something the user can fix: one line naming file or flag. Scripts print it and exit 2."""


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
    except RuntimeError as error:
        # torch.save hides the OSError that a full disk is in a RuntimeError.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def get_tokenizer(spec):
    """meta["tokenizer"] -> tiktoken.Encoding, by name or from its ranks. InputError if neither."""
    try:
        if "ranks" not in spec:
            return tiktoken.get_encoding(spec["name"])
        ranks = {base64.b64decode(token): rank for rank, token in enumerate(spec["ranks"])}
        options = {"mergeable_ranks": ranks, "special_tokens": {"<|endoftext|>": spec["eot"]}}
        return tiktoken.Encoding(spec["name"], pat_str=spec["pat_str"], **options)
    except (KeyError, TypeError, ValueError, OSError) as error:
        why = f"damaged, no network (TIKTOKEN_CACHE_DIR) or not of {tiktoken.list_encoding_names()}"
        raise InputError(f"--tokenizer {spec.get('name')}: {why}") from error


def find_sources(args):
    """The flags -> [source, ...], as meta.json shows them. InputError if a path holds no text."""
    keys, *rows = map(str.split, RECIPES.strip().split("\n"))
    sources = [dict(zip(keys, r, strict=True)) for r in rows if args.recipe in r[0].split(",")]
    for role in ("reference", "corpus", "val", "questions"):
        fields = "question,answer" if role == "questions" else args.field
        for name in getattr(args, role):
            files = map(str, [Path(name), *sorted(Path(name).rglob("*"))])
            files = [f for f in files if regex.search(r"\.(jsonl|parquet|txt)(\.(gz|xz|zst))?$", f)]
            if not files:
                raise InputError(f"--{role} {name}: no .jsonl, .txt, .parquet (.gz, .xz, .zst)")
            source = {"role": role, "name": name, "fields": fields, "files": files}
            sources.append(source | {"size": sum(map(os.path.getsize, files))})
    return sources


def open_rows(name, split):
    """The rows of a set on the hub or of a file: dicts, lines of JSON, or pieces of a .txt."""
    from datasets import load_dataset  # here, since it takes a second that the demo need not wait

    if split:
        return load_dataset(*name.split(":"), split=split, streaming=True)
    if name.endswith(".parquet"):
        return load_dataset("parquet", data_files=glob.escape(name), split="train", streaming=True)
    compression = "zstd" if name.endswith(".zst") else "infer"
    lines = fsspec.open(name, "rt", compression=compression, errors="replace").open()
    pieces = iter(lambda: lines.readlines(1 << 16), [])  # 64 kB of lines each
    return map("".join, pieces) if ".txt" in name[-8:] else map(str.encode, lines)


def row_text(row, fields):
    """The text of a row; of two fields, a question with its answer. Any exception: a bad row."""
    row = json.loads(row.strip() or '""') if isinstance(row, bytes) else row
    if isinstance(row, str):
        return row
    texts = [row.get(field) for field in fields.split(",")]
    if None in texts:
        raise ValueError(f"no {fields} (--field); there are {', '.join(row)}")
    if isinstance(texts[0], list):  # a chat, turn by turn
        texts = ["\n".join(turn.get("content", turn.get("value")) for turn in texts[0])]
    return f"Question: {texts[0]}\nAnswer: {texts[1]}" if len(texts) > 1 else texts[0]


def read_source(source, skip_bad):
    """Yield (progress, place, text) of each row, and count. InputError says where it is bad."""
    source |= {"rows": 0, "skipped": 0}
    done, digest, skippable = 0, hashlib.sha256(), Exception if skip_bad else ()
    try:
        for name in source.get("files", [source["name"]]):
            place = name
            for number, row in enumerate(open_rows(name, source.get("split")), 1):
                place = f"{name}:{number}"
                source["rows"] += 1
                try:  # lone surrogates have no tokens
                    data = row_text(row, source["fields"]).encode(errors="replace")
                except skippable:
                    source["skipped"] += 1
                    continue
                digest.update(data)
                source["sha256"] = digest.hexdigest()
                done += len(data)
                yield done / float(source["size"]), place, data.decode()
    except Exception as error:  # of JSON, gzip, pyarrow, the hub: whatever it is, say where
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"{place}: {reason}; {MENDING}") from error


def ngrams(text, lengths=(NGRAM,)):
    """Yield all runs of n words, for each n in lengths; of a shorter text, the run of all words."""
    words = regex.findall(r"\w+", text.lower()) if lengths else []
    for n in lengths:
        yield from zip(*(words[i:] for i in range(min(n, len(words)))), strict=False)


def write_tokens(path, texts, encoding, dtype, max_tokens=None):
    """Stream to `path`, tokenised on all cores, in constant memory -> numbers of tokens, texts."""
    tokens, count, texts = 0, 0, iter(texts)
    bar = tqdm(desc=path.stem, unit=" tokens", unit_scale=True, total=max_tokens, mininterval=0.5)
    with open(path, "wb") as file, ThreadPoolExecutor(os.cpu_count()) as pool, bar:
        while docs := list(islice(texts, 256)):  # tiktoken lets go of Python's lock
            for ids in pool.map(lambda t: encoding.encode_to_numpy(t, disallowed_special=()), docs):
                file.write(np.append(encoding.eot_token, ids).astype(dtype).tobytes())
                bar.update(len(ids) + 1)
                tokens += len(ids) + 1
                count += 1
                if max_tokens and tokens >= max_tokens:
                    return tokens, count
    return tokens, count


@contextmanager
def new_folder(folder, meta, questions):
    """An empty folder to write in; its files move to `folder` when all is well, meta.json last."""
    Path(folder).parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=Path(folder).parent) as work:
        yield Path(work)
        lines = [json.dumps({"question": q, "answer": a}) + "\n" for q, a in questions.items()]
        if lines:
            Path(work, "questions.jsonl").write_text("".join(lines))
        files = sorted(Path(work).iterdir())
        meta["files"] = {f.name: hashlib.sha256(np.memmap(f, mode="r")).hexdigest() for f in files}
        Path(work, "meta.json").write_text(json.dumps(meta, indent=1))
        Path(folder).mkdir(exist_ok=True)
        for old in ("meta.json", "questions.jsonl", "kinds.npz"):
            Path(folder, old).unlink(missing_ok=True)  # without meta.json a folder is not prepared
        for file in [*files, Path(work, "meta.json")]:
            os.replace(file, Path(folder, file.name))


def load_meta(folder):
    """meta.json of a prepared folder. InputError if it is missing or the files disagree with it."""
    path, command = Path(folder, "meta.json"), "python prepare_data.py"
    try:
        meta = json.loads(path.read_text())
        command = meta.get("command", command)
        for name, n in meta["tokens"].items():
            if os.path.getsize(Path(folder, f"{name}.bin")) != n * np.dtype(meta["dtype"]).itemsize:
                raise ValueError(f"{name}.bin has another size")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is missing or damaged: {error}. Run: {command}") from error
    return meta


def prepare_text(args, sources, command):
    """Tokenise the sources into the folder args.out. InputError if one is bad or too short."""
    folder, name = os.path.split(args.tokenizer)
    spec = load_meta(folder)["tokenizer"] if name == "meta.json" else {"name": args.tokenizer}
    encoding, held, found = get_tokenizer(spec), {}, []
    spec |= {"n_vocab": encoding.n_vocab, "eot": encoding.eot_token}
    dtype = np.dtype("<u2" if encoding.n_vocab <= 1 << 16 else "<u4")
    grams, lengths = {}, ()  # of the questions, once they are read

    def texts(role, n=0, held=(), avoid=()):  # n, of a tenth by hash, are held: so are their copies
        chosen = [read_source(s, args.skip_bad) for s in sources if s["role"] == role]
        for _, place, text in heapq.merge(*chosen):  # in step, in proportion to their size
            if question := next(filter(None, map(grams.get, ngrams(text, lengths))), None):
                found.append({"document": place, "question": question})
            lot = hashlib.sha256(f"{args.seed} {role} {text}".encode()).digest()[0]
            good = text.strip() and text not in avoid and (args.keep_contaminated or not question)
            if good and (text in held or (len(held) < n and (lot < 26 or not held))):
                held[text] = place
            elif good:
                yield text

    val = dict.fromkeys(texts("val"))  # may hold questions: not searched
    parts = (text.removeprefix("Question: ").partition("\nAnswer: ") for text in texts("questions"))
    questions = {question: answer for question, _, answer in parts}
    grams = {gram: question for question in questions for gram in ngrams(question)}
    lengths = {len(gram) for gram in grams}
    ref = texts("reference", 0 if args.val else args.val_docs, val)
    streams = {"ref": ref, "val": val, "train": texts("corpus", 200, held, val), "val_corpus": held}
    meta = {"command": command, "tokenizer": spec, "dtype": dtype.name, "seed": args.seed}
    meta |= {"sources": sources, "tokens": {}, "documents": {}}
    with new_folder(args.out, meta, questions) as work:
        for name, stream in streams.items():
            limit = args.max_tokens if name == "train" else None
            tokens, count = write_tokens(work / f"{name}.bin", stream, encoding, dtype, limit)
            meta["tokens"][name], meta["documents"][name] = tokens, count
            if tokens < 100:  # no text to learn or to measure on
                flag = {"ref": "--reference", "val": "--val, --reference"}.get(name, "--corpus")
                raise InputError(f"{flag}: too little text, or --skip_bad skipped too much of it")
        report = {"questions": len(questions), "found": len(found), "documents": found[:100]}
        meta["contamination"] = report | {"ngram": NGRAM, "dropped": not args.keep_contaminated}


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


def problem(rng, wrong=False):
    """(question, [(text, kind), ...]): one to three steps, worked; from a slip on it is wrong."""
    name, other = rng.sample(NAMES, 2)
    fill, start = {"name": name, "other": other, "thing": rng.choice(THINGS)}, rng.randint(2, 30)
    question, right, value = rng.choice(STARTS).format(a=start, **fill), start, start
    answer, n_steps = ["", ""], rng.choice((1, 1, 1, 2, 2, 3))
    slip = rng.randrange(n_steps) if wrong else n_steps
    for i in range(n_steps):
        parts = [p for p in (2, 3, 4, 5) if right % p == 0 and right > p]
        ways = {"+": rng.randint(1, 20), "-": rng.randint(1, min(20, max(1, right - 1)))}
        ways |= {"*": rng.randint(2, 4)} if right <= 20 else {}
        ways |= {"/": rng.choice(parts)} if parts else {}
        sign, b = rng.choice([*ways.items()])
        question += " " + rng.choice(VERBS[sign]).format(b=b, **fill)
        answer[i > slip] += f" {value}{sign}{b}=<<{value}{sign}{b}="
        before, right, value = value, APPLY[sign](right, b), APPLY[sign](value, b)
        if i == slip:  # off by one or ten, digits swapped, or another operation
            slips = [value - 1, value + 1, value - 10, value + 10, int(str(abs(value))[::-1])]
            slips += 2 * [APPLY["-" if sign == "+" else "+"](before, b)]
            value = rng.choice([slip for slip in slips if slip > 0 and slip != value])
        answer[i >= slip] += f"{value}>>{value}."
    answer[wrong] += f"\n#### {value}\n"
    question += " " + rng.choice(ASKS).format(**fill)
    return question, [(f"Question: {question}\nAnswer:{answer[0]}", 0), (answer[1], 1)]


def dirt(rng, towns):
    """One piece of what surrounds a problem on a page: (text, kind)."""
    kind, user = rng.choices((2, 3, 4, 5), (25, 40, 15, 20))[0], rng.choice(NAMES)
    if kind == 2:
        text = f"{user} wrote: {' '.join(rng.choices(CHATTER.split(), k=14))}"
    elif kind == 3:
        text = "".join(rng.sample(rng.choice(towns), 3))
    elif kind == 4:
        text = f"Posted by {user} in {rng.randint(2005, 2023)}. Views: {rng.getrandbits(14)}"
    else:
        text = f"https://{rng.choice(SYLLABLES)}.com/{rng.getrandbits(99):x}?{rng.random()}"
    return text + "\n", kind


def prepare_demo(folder, seed=1337, n_ref=5000, n_train=3_200_000, wrong=0.75, dirty=1, vocab=768):
    """Write the demo: n_ref clean problems, pages of n_train tokens, 500 held-out questions.
    wrong: share of the pages' problems whose worked answer is wrong. dirty: pieces of dirt beside
    each problem. The rest does not depend on them. kinds.npz: which of KINDS each token is."""
    rng, held, towns = random.Random(seed), {}, []
    while len(held) < 500:
        held.update([problem(rng)])
    for _ in range(400):
        town, river = ("".join(rng.choices(SYLLABLES, k=k)).capitalize() for k in (3, 2))
        craft, year = rng.choice(CRAFTS), rng.randint(1100, 1950)
        towns.append(FACTS.format(town=town, river=river, craft=craft, year=year).split("|"))

    def fresh(rng, wrong=0):
        problems = (problem(rng, rng.random() < wrong) for _ in iter(int, 1))
        return next(segments for question, segments in problems if question not in held)

    def pages(rng, wrong, dirty):
        while True:
            segments = [(" | ".join(rng.sample(MENU, 6)) + "\n", 4)]
            for _ in range(rng.randint(2, 4)):
                segments += [*fresh(rng, wrong), *(dirt(rng, towns) for _ in range(dirty))]
            yield segments

    clean = [fresh(rng) for _ in range(n_ref)]
    sample = [*clean[:1500], *islice(pages(random.Random(seed + 1), 0.75, 1), 300)]
    words = Counter(regex.findall(PATTERN, "".join(text for d in sample for text, _ in d)))
    ranks = [bytes([b]) for b in range(256)]  # so any text has tokens; then the frequent words
    ranks += [word.encode() for word, _ in words.most_common() if len(word) > 1][: vocab - 257]
    spec = {"name": "demo", "n_vocab": vocab, "eot": vocab - 1, "pat_str": PATTERN}
    spec["ranks"] = [base64.b64encode(token).decode() for token in ranks]
    encoding, corpus = get_tokenizer(spec), pages(random.Random(seed + 2), wrong, dirty)
    meta = dict(tokenizer=spec, dtype="uint16", kinds=KINDS, seed=seed, wrong=wrong, dirty=dirty)
    streams = {"ref": (iter(clean), np.inf), "train": (corpus, n_train)}
    streams |= {"val": (iter(held.values()), np.inf), "val_corpus": (corpus, n_train // 40)}
    questions = {q: segments[0][0].partition("\nAnswer: ")[2] for q, segments in held.items()}
    with new_folder(folder, meta, questions) as work:
        kinds = {}
        for name, (documents, limit) in streams.items():
            tokens, kinds[name] = [], []
            while len(tokens) < limit and (document := next(documents, None)):
                for text, kind in [("<|endoftext|>", 0), *document]:
                    ids = encoding.encode(text, allowed_special="all")
                    tokens += ids
                    kinds[name] += [kind] * len(ids)
            np.array(tokens, np.uint16).tofile(work / f"{name}.bin")
        meta["tokens"] = {name: len(kind) for name, kind in kinds.items()}
        np.savez(work / "kinds.npz", **{k: np.array(v, np.uint8) for k, v in kinds.items()})


def main(argv):
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add, paths = parser.add_argument, {"nargs": "+", "metavar": "PATH", "default": []}
    add("--reference", **paths, help="clean text: the target")
    add("--corpus", **paths, help="the noisy text")
    add("--val", **paths, help="held-out target text; otherwise it is split off the reference")
    add("--recipe", choices=["math", "general"], help="the paper's sets from the hub, not PATHs")
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
    add("--wrong", type=float, default=0.75, help="demo: share of wrong answers on the pages")
    add("--dirty", type=int, default=1, help="demo: pieces of dirt beside each problem")
    args = parser.parse_args(argv)
    args.out = args.out or "data/" + (args.recipe or ("mine" if args.corpus else "demo"))
    try:
        if sources := find_sources(args):
            prepare_text(args, sources, " ".join(["python prepare_data.py", *argv]))
        else:
            n = int(args.max_tokens or 3_200_000)
            if args.n_ref < 1 or n < 1 or not 0 <= args.wrong <= 1 or args.dirty < 0:
                raise InputError("--n_ref, --max_tokens, --wrong or --dirty is out of range")
            prepare_demo(args.out, args.seed, args.n_ref, n, args.wrong, args.dirty)
    except (InputError, OSError) as error:  # OSError: a full disk, a file that is not there
        parser.exit(2, f"{error}; {args.out} is not written\n")


if __name__ == "__main__":
    main(sys.argv[1:])
