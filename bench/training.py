"""Training speed, ours beside the reference, in one run on the same examples.

    python bench/training.py --model DIR --data gsm8k-nl-train.jsonl [--batch-size 8] [--steps 3] [--phase 1 2]

Prints real tokens per second (both layouts of phase 1 counted, padding not), peak memory on a GPU, and the ratio. A step is
forward, backward and AdamW. Both sides are warmed up by one step; rounds alternate, and the median round counts.
"""

import argparse
from pathlib import Path
import statistics
import sys
import time

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402

import data  # noqa: E402
from load_hf_weights import base_dtype, load_model  # noqa: E402
import lora  # noqa: E402
from train_phase1 import LEARNS, Encoder, Phase1  # noqa: E402
from train_phase2 import LatentExample, Phase2  # noqa: E402
import reference  # noqa: E402


def ours(directory, phase: int, examples, args, device):
    """(step function, tokens per step)."""
    model, _, _ = load_model(directory, device, base_dtype(device))
    for name in ("encoder", "decoder") if phase == 1 else ("student",):
        lora.add_adapter(model, name, args.lora_rank, 2 * args.lora_rank, 0.1)
    task = Phase1(Encoder(model), args.compression, args.top_k, LEARNS["joint"]) if phase == 1 else \
        Phase2(model, args.compression, 1.0, 1.0, 0.0, 1.0)
    task.to(device).train()
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=1e-5, fused=device.type == "cuda")

    def step():
        counts = task.counts(examples)
        for indices in data.pack([task.length(e) for e in examples], args.row_tokens):
            row = task.row([examples[i] for i in indices]).to(device)
            with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
                sum(part / counts[k] for k, part in task(row).items()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step, sum(task.length(e) for e in examples)


def theirs(directory, phase: int, examples, args, device):
    """The reference's step function."""
    names = ("encoder", "decoder") if phase == 1 else ("student",)
    model = reference.load(directory, names, args.lora_rank, base_dtype(device), device)
    for n, p in model.named_parameters():
        p.requires_grad_("lora_" in n)
    query = torch.nn.Parameter(reference.backbone(model).get_input_embeddings().weight.float().mean(0))
    learned = [query] + [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-5)

    def step():
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            loss = reference.phase1_loss(model, query, examples, args.compression, args.top_k, device) if phase == 1 else \
                reference.phase2_loss(model, examples, args.compression, device)
        for p in learned:  # set_adapter freezes the adapters that are not in use
            p.requires_grad_(True)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def timed(step, device) -> tuple[float, float]:
    """Seconds of one step, and peak GiB."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    begin = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin, torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True)
    p.add_argument("--data", required=True)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--phase", type=int, nargs="+", default=[1, 2])
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--steps", type=int, default=3)
    p.add_argument("--row-tokens", type=int, default=8192)
    p.add_argument("--compression", type=int, default=2)
    p.add_argument("--top-k", type=int, default=10)
    p.add_argument("--lora-rank", type=int, default=64)
    args = p.parse_args()
    device = torch.device(args.device)
    _, tokenizer, _ = load_model(args.model)
    examples = data.load_examples(args.data, tokenizer)[:args.batch_size]
    with_latents = [LatentExample(**vars(e), probs=torch.rand(n, args.top_k).softmax(-1), ids=torch.randint(1000, (n, args.top_k)))
                    for e in examples for n in [data.num_latents(e, args.compression)]]
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, {args.batch_size} examples a step, r = {args.compression}, LoRA rank {args.lora_rank}")
    print("| phase | ours, tokens/s | reference, tokens/s | ratio | ours, GiB | reference, GiB |\n| --- | --- | --- | --- | --- | --- |")
    for phase in args.phase:
        batch = examples if phase == 1 else with_latents
        mine, tokens = ours(args.model, phase, batch, args, device)
        reference_step = theirs(args.model, phase, batch, args, device)
        mine(), reference_step()
        rounds = [(timed(mine, device), timed(reference_step, device)) for _ in range(args.steps)]
        a, b = (statistics.median(x[i][0] for x in rounds) for i in (0, 1))
        memory = [max(x[i][1] for x in rounds) for i in (0, 1)]
        print(f"| {phase} | {tokens / a:,.0f} | {tokens / b:,.0f} | {b / a:.2f} | {memory[0]:.1f} | {memory[1]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
