"""Runs README's commands at full size with random weights, and prints what each costs.

    python bench/rehearse.py --config bench/configs/Llama-3.2-1B-Instruct.json \\
        --tokenizer DIR --data DIR --out DIR
    ... --config bench/configs/DeepSeek-R1-Distill-Qwen-7B.json --join 40 \\
        --train "--max-steps 4 --batch-size 8 --checkpoint-activations"

A line for each command: seconds, GiB in use on the fullest GPU (with a CUDA context of this
process), GB of files made. A line for each training: seconds from the start of the command to the
first step, seconds per step, tokens/s of the last step.
"""

from pathlib import Path
import re
import shlex
import shutil
import subprocess
import sys
import time

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from experiments.demo import initialize  # noqa: E402
from experiments.pipeline import write_jsonl  # noqa: E402
from lib.cli import parse, settings  # noqa: E402
from lib.files import read_jsonl, write_tensors  # noqa: E402
from lib.run import output_directory  # noqa: E402
from load_hf_weights import hf_name, read_config  # noqa: E402
from model import Model  # noqa: E402

LONG = "--max-latents 2048 --max-new-tokens 4096"
LOAD = "import transformers as t; print(t.AutoModelForCausalLM.from_pretrained('exported').dtype)"


@settings
class Settings:
    config: str  # a config.json with the name of its model
    tokenizer: str  # directory of its tokenizer
    data: str  # directory of gsm8k-nl-train.jsonl and gsm8k-test.jsonl
    out: str  # new directory of everything that is made
    join: int = 1  # written chains that make one chain
    problems: int = 8  # to evaluate
    train: str = "--max-steps 6 --batch-size 512"  # added to commands that train; two words or more
    all_weights: bool = False  # also phase 2 with all weights
    gpus: int = 1  # for torchrun


def write_checkpoint(directory, s):
    """A hub directory with random weights in shards of 5 GB."""
    directory.mkdir(exist_ok=True)
    for path in Path(s.tokenizer).glob("tokenizer*.json"):
        shutil.copy(path, directory)
    shutil.copy(s.config, directory / "config.json")
    with torch.device("meta"):
        model = Model(read_config(directory)).bfloat16()
    initialize(model.to_empty(device="cpu"), torch.Generator().manual_seed(1), 0.02)
    shards, size = {}, 0
    for name, p in model.named_parameters():
        shards.setdefault(int(size // 5e9) + 1, {})[hf_name(name)] = p
        size += 2 * p.numel()
    for i, shard in shards.items():
        write_tensors(directory / f"model-{i:05}-of-{len(shards):05}.safetensors", shard)


def joined(lines, count):
    """Training lines. The chain of each is the chains of `count` successive ones."""
    groups = [lines[i : i + count] for i in range(0, len(lines) - count + 1, count)]
    return [group[-1] | {"cot": "\n".join(line["cot"] for line in group)} for group in groups]


def commands(s, name):
    """README's commands for the model `name`: lists of words."""
    text = (ROOT / "README.md").read_text().replace("\\\n", "")
    lines = re.findall(r"^    python (.*runs/\w.*)$", text, re.M)
    if name not in lines[0]:  # it reasons already: no CoT-SFT
        lines = [line.replace("runs/cot", name) for line in lines[1:]]
    for script, *words in map(shlex.split, lines):
        words += shlex.split({"train": s.train, "eval.": LONG}.get(script[:5], ""))
        yield [script, *words]
        if script == "train_phase2.py" and s.all_weights:
            yield [script, *(w.replace("runs/latent", "runs/all") for w in words), "--all-weights"]


def run(s, out, script, *words):
    """Runs a script in the directory `out` and prints what it costs."""
    start = [sys.executable, ROOT / script]
    if s.gpus > 1 and script.startswith(("train", "cache", "eval")):
        start[1:1] = ["-m", "torch.distributed.run", f"--nproc_per_node={s.gpus}"]
    made = out / words[words.index("--out") + 1] if "--out" in words else out / "none"
    begin, used, times = time.time(), 0, {}
    process = subprocess.Popen([*start, *words], cwd=out)
    while process.poll() is None:
        time.sleep(0.05)
        for free, total in map(torch.cuda.mem_get_info, range(torch.cuda.device_count())):
            used = max(used, (total - free) / 2**30)
        for path in made.rglob("metrics.jsonl"):
            seen = times.setdefault(path, [])
            seen += [time.time() - begin] * (path.read_text().count("\n") - len(seen))
    if process.returncode:
        sys.exit(1)
    size = sum(x.stat().st_size for x in made.rglob("*") if x.is_file()) / 1e9
    print(f"{script}: {time.time() - begin:.1f} s, {used:.1f} GiB, {size:.2f} GB")
    for path, seen in times.items():
        speed = read_jsonl(path)[-1]["tokens_per_s"]
        each = (seen[-1] - seen[0]) / max(1, len(seen) - 1)
        print(f"  {path.parent.name}: {seen[0]:.1f} s, {each:.2f} s per step, {speed:,} tokens/s")


def main():
    s = parse(Settings, __doc__)
    with output_directory(s.out, s) as out:
        name = Path(s.config).stem
        write_checkpoint(out / name, s)
        train, test = (read_jsonl(f"{s.data}/gsm8k-{x}.jsonl") for x in ("nl-train", "test"))
        write_jsonl(out / "train.jsonl", joined(train, s.join))
        write_jsonl(out / "gsm8k-test.jsonl", test[: s.problems])
        for words in commands(s, name):
            run(s, out, *words)
        subprocess.run([sys.executable, "-c", LOAD], cwd=out, check=True)


if __name__ == "__main__":
    main()
