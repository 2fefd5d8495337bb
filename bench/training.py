"""Training speed, ours beside the reference, in one run on the same examples.

    python bench/training.py --model DIR --data gsm8k-nl-train.jsonl
    python bench/training.py --model DIR --data gsm8k-nl-train.jsonl --shape 1.24b --batch-size 32 --reference-batch-size 8 16 32
    torchrun --nproc_per_node=2 bench/training.py --model DIR --data gsm8k-nl-train.jsonl --shape 1.24b --batch-size 512     # two GPUs beside one

DIR gives tokenizer and weights; with --shape it gives the tokenizer only, and the weights are random. A step is forward,
backward and AdamW on --batch-size examples; the reference may take another number at a time, its best one counts. First both
sides take the loss of the same examples without dropout, and the difference is printed. Real tokens are counted (both layouts of
phase 1; padding not), and the floating-point operations that LoRA training cannot do without: see `flops`. Under torchrun every rank
first takes the steps alone, then all share them; with --shard, which spreads the frozen layers over the ranks, they share them only.
"""

import argparse
from contextlib import contextmanager, redirect_stdout
from functools import partial
import json
import math
import os
from pathlib import Path
import statistics
import sys
import tempfile
import time

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

import data  # noqa: E402
from load_hf_weights import base_dtype, hf_name, load_checkpoint, read_config  # noqa: E402
import lora  # noqa: E402
from masks import causal, dense, induction, supervision  # noqa: E402
from model import Model, rotary_frequencies  # noqa: E402
from runs import start  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402
from train_phase1 import LEARNS, Encoder, Phase1  # noqa: E402
from train_phase2 import LatentExample, Phase2  # noqa: E402
from trainer import deal, flat_gradients, shard  # noqa: E402
import reference  # noqa: E402

LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}
SHAPES = {  # the config.json of SmolLM2-135M, Llama-3.2-1B and Qwen2.5-7B, as far as it matters
    "135m": dict(model_type="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                 num_attention_heads=9, num_key_value_heads=3, rms_norm_eps=1e-5, rope_theta=100000.0, tie_word_embeddings=True),
    "1.24b": dict(model_type="llama", vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                  num_attention_heads=32, num_key_value_heads=8, head_dim=64, rms_norm_eps=1e-5, rope_theta=500000.0,
                  rope_scaling=LLAMA3, tie_word_embeddings=True),
    "7b": dict(model_type="qwen2", vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
               num_attention_heads=28, num_key_value_heads=4, rms_norm_eps=1e-6, rope_theta=1000000.0, tie_word_embeddings=False),
}
PEAK = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}  # FLOP/s in dense bf16, from the data sheets
ADAPTERS = {1: ("encoder", "decoder"), 2: ("student",)}
WARM_UP = {"cuda": 4, "cpu": 1}  # steps
RULES = {1: {"encoder": induction, "decoder": supervision}, 2: {"latent": causal}}


def flops(config, phase: int, examples, args) -> float:
    """Of one step, the operations that cannot be left out.

    A frozen weight costs 4 per token (forward, and the gradient of its input), a LoRA weight 6, an allowed pair of query and key
    12 per channel and layer, a vocabulary weight 4 per label (in phase 2 per latent too) and 2 where an encoder asks for its top k.
    """
    d, ff, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    shapes = [(d, heads), (d, kv), (d, kv), (heads, d), (d, ff), (d, ff), (ff, d)]
    weights = config.num_hidden_layers * sum(a * b for a, b in shapes)
    lora_weights = config.num_hidden_layers * sum(args.lora_rank * (a + b) for a, b in shapes)
    rows = [(rule, data.pack_row(layout, [e], args.compression)) for layout, rule in RULES[phase].items() for e in examples]
    tokens, pairs = sum(len(row.ids) for _, row in rows), sum(int(dense(rule, row.labels).sum()) for rule, row in rows)
    labels = sum(data.num_targets(layout, e, args.compression) for layout in RULES[phase] if layout != "encoder" for e in examples)
    latents = sum(data.num_latents(e, args.compression) for e in examples)
    head = config.vocab_size * d * (4 * labels + (2 if phase == 1 else 4) * latents)
    return tokens * (4 * weights + 6 * lora_weights) + 12 * pairs * heads * config.num_hidden_layers + head


def base_model(args, device) -> Model:
    if not args.shape:
        return load_checkpoint(args.model, device, base_dtype(device))
    with torch.device("meta"):
        model = Model(args.config)
    model = model.to_empty(device=device).to(base_dtype(device))
    model.rope_frequencies = rotary_frequencies(args.config).to(device)
    return model.initialize(torch.Generator(device).manual_seed(1)).requires_grad_(False)


def our_task(phase: int, args, device):
    torch.manual_seed(1)
    model = base_model(args, device)
    for name in ADAPTERS[phase]:
        lora.add_adapter(model, name, args.lora_rank, 2 * args.lora_rank, 0.1)
        for key, p in lora.adapter_parameters(model, name).items():
            if key.endswith("lora_B"):
                p.data.normal_(0, 0.01)  # as if training had gone on for a while
    task = Phase1(Encoder(model), args.compression, args.top_k, LEARNS["joint"]) if phase == 1 else Phase2(model, args.compression, args.top_k)
    model.checkpoint_activations = args.checkpoint_activations
    return task.to(device)


def ours(phase: int, ranks: int, batches, args, device):
    """(step function of a batch's number, loss of the first batch without dropout). Rows are built beforehand: see trainer.py.

    `ranks` share each batch; 1: this one has it alone.
    """
    task, rank = our_task(phase, args, device), dist.get_rank() if ranks > 1 else 0
    if args.shard and ranks > 1:
        shard(task.model, device, ranks)
        if device.type == "cuda":  # so far each rank had all weights
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    learned, shape = [p for p in task.parameters() if p.requires_grad], None
    gradients, optimizer = flat_gradients(learned), torch.optim.AdamW(learned, lr=1e-6, fused=device.type == "cuda")
    if device.type == "cuda":
        shape = data.row_shape([task.length(e) for batch in batches for e in batch], len(batches[0]) / ranks, args.row_tokens)
        task.model.graphs = None if args.checkpoint_activations or args.shard else {}
        print(f"    rows of {shape.tokens} tokens")
    dealt = [deal(task, batch, args.row_tokens, shape, rank, ranks) for batch in batches]
    rows = [[(task.row(row), real) for row, real in mine] for mine in dealt]

    def step(i, learn=True):
        counts, total = task.counts(batches[i]), torch.zeros((), device=device)
        for row, real in rows[i]:
            loss = real * task.loss(task(data.to_device(row, device, shape)), counts)
            total += loss.detach()
            if learn:
                loss.backward()
        if ranks > 1:
            dist.all_reduce(total)
        if learn:
            if ranks > 1:
                dist.all_reduce(gradients)
            torch.nn.utils.clip_grad_norm_(learned, 1.0)
            optimizer.step()
            gradients.zero_()
        return float(total)
    with torch.no_grad():
        loss = task.eval() and step(0, learn=False)
    task.train()
    return step, loss


def theirs(phase: int, batches, args, device):
    """The same of the reference, with the weights of ours. Batches are padded beforehand."""
    source = our_task(phase, args, device)
    weights = {hf_name(n): p for n, p in source.model.named_parameters() if ".adapters." not in n}
    model = reference.build(args.directory, weights, ADAPTERS[phase], args.lora_rank, base_dtype(device), device)
    adapters = {f"{key}.{name}.weight": p for name in ADAPTERS[phase]
                for key, p in lora.adapter_parameters(source.model, name).items()}
    for n, p in model.named_parameters():
        p.requires_grad_("lora_" in n)
        if "lora_" in n:
            p.data.copy_(adapters[n.removeprefix("base_model.model.model.")])
    query = torch.nn.Parameter(source.encoder.latent_query.detach().clone()) if phase == 1 else None
    del source, weights, adapters
    learned = [p for p in [query, *model.parameters()] if p is not None and p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-6, fused=device.type == "cuda")
    padded = [[reference.padded(layout, batch, args.compression, rule, device) for layout, rule in RULES[phase].items()]
              for batch in batches]

    def step(i, learn=True):
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            loss = reference.phase1_loss(model, query, *padded[i], args.top_k) if phase == 1 else \
                reference.phase2_loss(model, *padded[i], batches[i])
        if learn:
            for p in learned:  # set_adapter freezes the adapters that are not in use
                p.requires_grad_(True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learned, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())
    with torch.no_grad():
        model.eval()
        loss = step(0, learn=False)
    model.train()
    return step, loss


def timed(function, device) -> float:
    """Seconds that a call takes."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def measured(sides, args, device, profile_to=None) -> list:
    """(seconds of all timed steps, peak GiB, loss) for each (make, batches) of `sides`, which take their steps in turn.

    Nones if they do not fit. The first WARM_UP batches warm up, each of the others is timed once. Memory is what was taken
    from the GPU, the allocator's reserve included.
    """
    torch._dynamo.reset()  # what others had compiled does not count towards the limit of versions, beyond which functions run uncompiled
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        steps, losses = zip(*(make(batches, args, device) for make, batches in sides))
        seconds = [[timed(partial(step, i), device) for step in steps] for i in range(WARM_UP[device.type] + args.rounds)]
        memory = torch.cuda.max_memory_reserved() / 2**30 if device.type == "cuda" else float("nan")
        if profile_to:
            profile(partial(steps[0], 0), profile_to)
    except torch.cuda.OutOfMemoryError:
        if dist.is_initialized():  # the others are waiting for this rank
            raise
        return [None] * len(sides)
    return [(sum(times), memory, loss) for times, loss in zip(zip(*seconds[WARM_UP[device.type]:]), losses)]


def matmul_rate(device, dtype) -> float:
    """FLOP/s of a large matrix product of random numbers: what the floor is reckoned with."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    return 2 * n**3 / statistics.median(timed(lambda: a @ b, device) for _ in range(20))


def profile(step, path: Path) -> None:
    """Writes where the GPU's time of one step goes, kernel by kernel, and prints the sum by kind of kernel."""
    path.parent.mkdir(parents=True, exist_ok=True)
    from torch.profiler import ProfilerActivity
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as p:
        timed(step, torch.device("cuda"))
    kernels = [(e.key, e.count, e.self_device_time_total / 1000) for e in p.key_averages() if e.self_device_time_total and e.device_type.name == "CUDA"]
    kernels.sort(key=lambda x: -x[2])
    path.write_text("".join(f"{ms:10.3f} ms {count:6d} x {name}\n" for name, count, ms in kernels))
    kinds = {"flex attention": ("flex",), "flash attention": ("flash",), "top k": ("topk", "radix", "sort", "bitonic"),
             "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitK"), "optimizer": ("multi_tensor", "Adam"),
             "fused pointwise": ("triton",), "copies": ("Memcpy", "copy")}
    sums = dict.fromkeys([*kinds, "other"], 0.0)
    for name, _, ms in kernels:
        sums[next((kind for kind, words in kinds.items() if any(w in name for w in words)), "other")] += ms
    spans = sorted((e.time_range.start, e.time_range.end) for e in p.events() if e.device_type.name == "CUDA")  # in microseconds
    idle, end = 0.0, spans[0][0]
    for start, stop in spans:
        idle, end = idle + max(0, start - end), max(end, stop)
    print("    GPU time, ms: " + ", ".join(f"{kind} {ms:.1f}" for kind, ms in sums.items()) + f"; all {sum(sums.values()):.1f}, "
          f"and {idle / 1000:.1f} idle between {sum(count for _, count, _ in kernels)} kernels")


@contextmanager
def shape_of(args):
    """A directory whose config.json has the shape of the model: --model, or a temporary one for --shape."""
    with tempfile.TemporaryDirectory() as directory:
        if args.shape:
            (Path(directory) / "config.json").write_text(json.dumps(SHAPES[args.shape]))
        yield directory if args.shape else args.model


def tokenizer_of(args) -> Tokenizer:
    return Tokenizer(args.model, json.loads((Path(args.model) / "config.json").read_text())["model_type"])


def parser(description: str) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True)
    p.add_argument("--data", required=True)
    p.add_argument("--shape", choices=SHAPES)
    p.add_argument("--device", help="default: cuda where there is one")
    return p


def main():
    p = parser(__doc__)
    p.add_argument("--phase", type=int, nargs="+", default=[1, 2])
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--reference-batch-size", type=int, nargs="*", help="none: ours alone; default: --batch-size")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--row-tokens", type=int, default=8192)
    p.add_argument("--compression", type=int, default=2)
    p.add_argument("--top-k", type=int, default=10)
    p.add_argument("--lora-rank", type=int, default=64)
    p.add_argument("--checkpoint-activations", action="store_true", help="ours only")
    p.add_argument("--shard", action="store_true", help="under torchrun: every rank keeps a share of the frozen layers only")
    p.add_argument("--profile", metavar="DIR", help="also write a kernel table of a step of ours; CUDA only")
    args = p.parse_args()
    rank, world, device = start(args.device)
    sizes = [args.batch_size] if args.reference_batch_size is None and world == 1 else args.reference_batch_size or []
    if world > 1 and sizes:
        p.error("--reference-batch-size: the reference runs on one GPU; leave torchrun out, or this")
    if world > 1 and args.profile:
        p.error("--profile: is for one process; leave torchrun out")
    if world == 1 and args.shard:
        p.error("--shard: spreads the layers over ranks; start it with torchrun")
    with shape_of(args) as args.directory, open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if rank else sys.stdout):
        args.config = read_config(args.directory)
        run(args, sizes, world, device, tokenizer_of(args))
    if world > 1:
        dist.destroy_process_group()


def run(args, sizes, world, device, tokenizer) -> None:
    warm_up = WARM_UP[device.type]
    wanted = max([args.batch_size, *sizes]) * (warm_up + args.rounds)
    examples = data.load_examples(args.data, tokenizer)[:wanted]
    if len(examples) < wanted:
        sys.exit(f"{args.data}: has {len(examples)} examples, and {wanted} are needed for {warm_up} + {args.rounds} steps")
    generator = torch.Generator().manual_seed(1)
    alpha = lambda n: dict(probs=torch.rand(n, args.top_k, generator=generator).softmax(-1),
                           ids=torch.stack([torch.randperm(1000, generator=generator)[:args.top_k] for _ in range(n)]))
    with_latents = [LatentExample(**vars(e), **alpha(data.num_latents(e, args.compression))) for e in examples]
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    rate = matmul_rate(device, base_dtype(device))
    print(f"{name}, torch {torch.__version__}, {args.shape or args.model}, r = {args.compression}, LoRA rank {args.lora_rank}, "
          f"{base_dtype(device)}, matrix products at {rate / 1e12:.3g} TFLOP/s")
    for phase in args.phase:
        pool = examples if phase == 1 else with_latents
        batches = lambda n: [pool[n * i:n * (i + 1)] for i in range(warm_up + args.rounds)]
        tokens = lambda n: sum(len(data.layout(layout, e, args.compression)[0]) for layout in RULES[phase]
                               for batch in batches(n)[warm_up:] for e in batch)
        n = args.batch_size
        path = args.profile and Path(args.profile) / f"{args.shape}-phase{phase}.txt"
        sides = [("ours", n, partial(ours, phase, 1))] if not args.shard else []
        sides += [(f"ours on {world}", n, partial(ours, phase, world))] if world > 1 else []
        sides += [("reference", m, partial(theirs, phase)) for m in sizes]
        makers = [(make, batches(m)) for _, m, make in sides]
        if device.type == "cpu" and world == 1:  # others may be at work on the machine: both sides suffer alike
            results = measured(makers, args, device)
        else:
            results = [measured([maker], args, device, None if i else path)[0] for i, maker in enumerate(makers)]
        needed = sum(flops(args.config, phase, batch, args) for batch in batches(n)[warm_up:])
        speeds = []
        for (side, m, _), result in zip(sides, results):
            line = f"phase {phase}, {side}, {m} examples a step: "
            if result is None:
                print(line + "out of memory", flush=True)
                speeds.append(0.0)
                continue
            seconds, memory, loss = result
            if not math.isfinite(loss):
                raise SystemExit(f"{line}the loss is {loss}; what was timed is not worth a figure")
            speeds.append(tokens(m) / seconds)
            line += f"{speeds[-1]:,.0f} tokens/s, {memory:.1f} GiB, loss {loss:.4f}"
            if side.startswith("ours"):
                per_rank = needed / seconds / (1 if side == "ours" else world)
                line += f", {1000 * seconds / args.rounds:.1f} ms a step, {per_rank / rate:.1%} of the matrix products' rate"
                line += f", {per_rank / PEAK[name]:.1%} of the data sheet's peak" if name in PEAK else ""
            if len(speeds) > 1 and m == n and results[0]:
                line += f", which differs from ours by {abs(loss - results[0][2]) / loss:.1e} of it"
            print(line, flush=True)
        if len(speeds) > 1 and speeds[0] and max(speeds[1:]):
            ratio = speeds[1] / speeds[0] if world > 1 else speeds[0] / max(speeds[1:])
            print(f"phase {phase}: ours is {ratio:.2f} times as fast" + (f" on {world}" if world > 1 else ""), flush=True)


if __name__ == "__main__":
    main()
