"""The embedded default (`make demo`): a made-up task, a small model from scratch, the whole pipeline through the scripts.

    python demo.py --out demo --rates 2 4

The task: a machine with ten states and four buttons, each button a permutation of the states. `4abda=` asks where the
machine ends that starts in state 4; the written chain says button and new state at each step, `a3b9d1a7`. Without steps a
small model cannot compose 5 to 8 permutations; with them it can. A stopped demo goes on where it was.
"""

import json
from pathlib import Path
import random
import time

import torch

from data import Example, read_jsonl
from figures import draw_latents, draw_masks, table
from load_hf_weights import hf_name, read_config
from model import Model
from runs import at_least, call, open_run, parser, read_json, run_main, write_json, write_tensors, write_text
from tokenizer import END_THINK, THINK, Tokenizer, byte_alphabet

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 264, "hidden_size": 96,
          "intermediate_size": 288, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
          "rms_norm_eps": 1e-6, "rope_theta": 300.0, "hidden_act": "silu", "tie_word_embeddings": True,
          "max_position_embeddings": 512, "dtype": "float32"}
SFT = "--lr 3e-3 --max-steps 200 --batch-size 128"
PHASE1 = "--lora-rank 16 --lora-dropout 0 --batch-size 64"  # and steps and learning rates of its three steps:
ENCODER, DECODER, JOINT = "--lr 1e-3 --max-steps 30", "--lr 5e-3 --max-steps 120", "--lr 4e-3 --max-steps 300"
PHASE2 = "--lora-rank 16 --lora-dropout 0 --batch-size 128 --lr 5e-3 --max-steps 1000"
EVAL = "--temperature 0 --max-latents 20 --max-new-tokens 40 --batch-size 250"


def make_example(rng: random.Random, buttons: dict[str, list[int]]) -> dict:
    """One line of the task, in the schema of training and of evaluation data."""
    state = rng.randrange(10)
    problem, chain = str(state), ""
    for _ in range(rng.randint(5, 8)):
        button = rng.choice(sorted(buttons))
        state = buttons[button][state]
        problem, chain = problem + button, f"{chain}{button}{state}"
    return {"problem": problem + "=", "cot": chain, "cot_answer": f"\\boxed{{{state}}}", "answer": str(state)}


def write_task(out: Path, seed: int) -> None:
    """train, valid and test .jsonl of 20,000, 200 and 500 different problems about one machine."""
    rng, seen = random.Random(seed), set()
    buttons = {name: rng.sample(range(10), 10) for name in "abcd"}
    for name, count in (("train", 20000), ("valid", 200), ("test", 500)):
        lines = []
        while len(lines) < count:
            example = make_example(rng, buttons)
            if example["problem"] not in seen:
                seen.add(example["problem"])
                lines.append(json.dumps(example) + "\n")
        write_text(out / f"{name}.jsonl", "".join(lines))


def write_tokenizer(directory: Path) -> None:
    """A byte-level BPE tokenizer.json of 263 tokens: the bytes, the steps to `boxed`, and three special tokens."""
    vocab, merges = {c: i for i, c in enumerate(byte_alphabet())}, ["b o", "bo x", "box e", "boxe d"]
    vocab |= {m.replace(" ", ""): len(vocab) + i for i, m in enumerate(merges)}
    added = [{"id": len(vocab) + i, "content": t, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False} for i, t in enumerate(("<|endoftext|>", THINK, END_THINK))]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    write_json(directory / "tokenizer.json", {
        "version": "1.0", "added_tokens": added, "normalizer": None, "pre_tokenizer": byte_level, "post_processor": None,
        "decoder": byte_level, "model": {"type": "BPE", "vocab": vocab, "merges": merges}})


def write_model(directory: Path, seed: int) -> None:
    """A checkpoint directory with random weights, in Hugging Face's layout."""
    write_json(directory / "config.json", CONFIG)
    write_tokenizer(directory)
    model = Model(read_config(directory)).initialize(torch.Generator().manual_seed(seed), std=0.08)
    write_tensors(directory / "model.safetensors", {hf_name(n): p for n, p in model.named_parameters()}, {"format": "pt"})


def main():
    p = parser(__doc__, device=False)
    p.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")  # the model is small, its settings were chosen for float32
    p.add_argument("--out", default="demo", help="directory of everything that is made")
    p.add_argument("--rates", type=at_least(1), nargs="+", default=[2], help="compression rates to train")
    args = p.parse_args()
    out, begin = Path(args.out), time.time()
    open_run(out, {"command": "demo", "seed": args.seed})
    if not (out / "base" / "model.safetensors").exists():
        write_task(out, args.seed)
        write_model(out / "base", args.seed)
    seed = f"--seed {args.seed}"

    def stage(what: str, script: str, settings: str, **paths):
        print(f"\n[{time.time() - begin:4.0f} s] {what}", flush=True)
        call(script, f"{settings} --device {args.device}", **paths)

    def evaluate(name: str, run: Path, arm: str = "free") -> dict:
        where = out / "eval" / name
        summary = where / ("test.json" if arm == "free" else f"test.{arm}.json")
        if not summary.exists():
            stage(f"{name}, {arm}: 500 unseen problems", "eval.py", f"{EVAL} --arms {arm}", model=run, data=out / "test.jsonl",
                 out=where)
        return read_json(summary)

    base, cot, answer_only = out / "base", out / "cot", out / "answer-only"
    data = {"data": out / "train.jsonl", "valid": out / "valid.jsonl"}
    stage("CoT-SFT: learn to write the chain", "train_sft.py", f"{SFT} {seed}", model=base, out=cot, **data)
    stage("answer-only: the same without chains", "train_sft.py", f"{SFT} {seed} --no-chain", model=base, out=answer_only, **data)
    rows = {"answer-only": evaluate("answer-only", answer_only), "CoT-SFT": evaluate("CoT-SFT", cot)}
    for r in args.rates:
        encoder, decoder, joint, cache, latent = (
            out / f"r{r}-{stage}" for stage in ("encoder", "decoder", "joint", "cache", "latent"))
        phase1 = lambda step, settings, **paths: stage(f"r = {r}, phase 1: {step}", "train_phase1.py",
                                                      f"--step {step} {PHASE1} {settings} {seed}", **paths, **data)
        phase1("encoder", f"{ENCODER} --compression {r}", model=cot, out=encoder)
        phase1("decoder", DECODER, init=encoder, out=decoder)
        phase1("joint", JOINT, init=decoder, out=joint)
        stage(f"r = {r}: latent cache", "cache_latents.py", "", phase1=joint, data=data["data"], out=cache)
        stage(f"r = {r}, phase 2: learn to think", "train_phase2.py", f"{PHASE2} {seed}", phase1=joint, cache=cache,
             out=latent, **data)
        rows[f"Latent r={r}"] = evaluate(f"latent-r{r}", latent)
        rows[f"Latent r={r}, its latents replaced by random ones"] = evaluate(f"latent-r{r}", latent, "random")

    draw(out, args.rates[0])
    cells = [[name, f"{s['accuracy']:.1f}% ± {s['interval']:.1f}", f"{s['chain_length']:.1f}",
              f"{s['chain_length'] / rows['CoT-SFT']['chain_length']:.2f}", f"{s['seconds_per_problem']:.4f}"] for name, s in rows.items()]
    text = table(["", "accuracy (95% interval)", "chain length", "of CoT's", "seconds per problem"], cells)
    write_text(out / "table.md", text)
    print(f"\n[{time.time() - begin:4.0f} s] {out}/masks.svg, {out}/latents.svg, {out}/table.md:\n\n{text}", end="")


def draw(out: Path, r: int) -> None:
    """masks.svg of a short example, and latents.svg of a short test problem that the latent model got right (if any)."""
    tokenizer = Tokenizer(out / "base")
    texts = [["4", "a", "b", "d", "=", THINK], list("a3b9d1"), [END_THINK], ["1"]]
    ids = [[tokenizer.added.get(t) or tokenizer.encode(t)[0] for t in part] for part in texts]
    draw_masks(out / "masks.svg", Example(*ids), sum(texts, []), r)
    tests = read_jsonl(out / "test.jsonl")
    predictions = read_jsonl(out / "eval" / f"latent-r{r}" / "test.predictions.jsonl")
    problem, prediction = min(zip(tests, predictions), key=lambda x: (not x[1]["correct"], len(x[0]["cot"])))
    chain = problem["cot"]
    draw_latents(out / "latents.svg", problem["problem"], [chain[i:i + r] for i in range(0, len(chain), r)], prediction)


if __name__ == "__main__":
    run_main(main)
