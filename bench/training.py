"""Training speed, ours beside the reference, in one run on the same examples.

    python bench/training.py --model DIR --data gsm8k-nl-train.jsonl
    python bench/training.py --model DIR --data gsm8k-nl-train.jsonl --shape 1.24b \\
        --batch-size 512 --row-tokens 16384 --reference-batch-size 16 32
    torchrun --nproc_per_node=2 bench/training.py ...      # also two GPUs beside one

DIR gives tokenizer and weights. With --shape it gives the tokenizer only, and weights are random. A
step is a step of the product's Trainer. The reference may take another number of examples a step;
its best one counts. First both sides take the loss of the same examples without dropout, and the
difference is printed. Real tokens are counted (both layouts of phase 1; no padding).
"""

import argparse
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from functools import partial
import gc
import json
import math
import os
from pathlib import Path
import statistics
import sys
import tempfile
import time

sys.path.insert(0, str(Path(__file__).parent.parent))

import reference  # noqa: E402
import torch  # noqa: E402

import data  # noqa: E402
from experiments.demo import initialize  # noqa: E402
from lib.run import Process, join  # noqa: E402
from lib.tokenizer import Tokenizer  # noqa: E402
from load_hf_weights import (  # noqa: E402
    Reasoning,
    hf_name,
    load_checkpoint,
    read_config,
)
import lora  # noqa: E402
from masks import RULES, dense  # noqa: E402
from model import Model, rotary_frequencies  # noqa: E402
from train_phase1 import LEARNS, Encoder, Phase1  # noqa: E402
import train_phase2  # noqa: E402
from train_phase2 import Phase2  # noqa: E402
from trainer import Trainer, TrainingSettings, make_runner  # noqa: E402

LLAMA3 = dict(rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA3["original_max_position_embeddings"] = 8192
SHAPES = {  # what matters in the config.json of SmolLM2-135M, Llama-3.2-1B and Qwen2.5-7B
    "135m": dict(
        model_type="llama",
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        rms_norm_eps=1e-5,
        rope_theta=100000.0,
        tie_word_embeddings=True,
    ),
    "1.24b": dict(
        model_type="llama",
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=LLAMA3,
        tie_word_embeddings=True,
    ),
    "7b": dict(
        model_type="qwen2",
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        rms_norm_eps=1e-6,
        rope_theta=1000000.0,
        tie_word_embeddings=False,
    ),
}
PEAK = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}  # FLOP/s, dense bf16, data sheet
ADAPTERS = {1: ("encoder", "decoder"), 2: ("student",)}
LAYOUTS = {1: ("encoder", "decoder"), 2: ("latent",)}
WARM_UP = {"cuda": 4, "cpu": 1}  # steps


def flops(config, phase: int, examples, args) -> float:
    """The operations of one step that cannot be left out.

    4 per frozen weight and token (forward, gradient of the input), 6 per LoRA weight, 12 per
    channel, layer and allowed pair of query and key, 4 per vocabulary weight and target (and latent
    in phase 2), 2 per vocabulary weight where an encoder looks for its top k.
    """
    d, ff, r = config.hidden_size, config.intermediate_size, args.compression
    heads = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    shapes = [(d, heads), (d, kv), (d, kv), (heads, d), (d, ff), (d, ff), (ff, d)]
    weights = config.num_hidden_layers * sum(a * b for a, b in shapes)
    lora_weights = config.num_hidden_layers * sum(args.lora_rank * (a + b) for a, b in shapes)
    rows = [(n, data.pack_examples(n, [e], r)) for n in LAYOUTS[phase] for e in examples]
    tokens = sum(len(row.ids) for _, row in rows)
    pairs = sum(int(dense(RULES[name], row.labels).sum()) for name, row in rows)
    targets = sum(data.num_targets(LAYOUTS[phase][-1], e, r) for e in examples)
    latents = sum(data.num_latents(e, r) for e in examples)
    head = config.vocab_size * d * (4 * targets + (2 if phase == 1 else 4) * latents)
    per_token = 4 * weights + 6 * lora_weights
    return tokens * per_token + 12 * pairs * heads * config.num_hidden_layers + head


def base_model(args, process) -> Model:
    device = process.device
    if not args.shape:
        return load_checkpoint(args.model, device, process.dtype)
    with torch.device("meta"):
        model = Model(args.config)
    model = model.to_empty(device=device).to(process.dtype)
    model.rope_frequencies = rotary_frequencies(args.config).to(device)
    generator = torch.Generator(device).manual_seed(1)
    return initialize(model, generator, 0.02).requires_grad_(False)


def our_task(phase: int, args, process):
    """A task of the product with random adapters, as if training had gone on for a while."""
    torch.manual_seed(1)
    model = base_model(args, process)
    for name in ADAPTERS[phase]:
        lora.add_adapter(model, name, args.lora_rank, 2 * args.lora_rank, 0.1)
        for key, p in lora.adapter_parameters(model, name).items():
            if key.endswith("lora_B"):
                p.data.normal_(0, 0.01)
    runner = make_runner(
        model, process, args.shard and process.world > 1, args.checkpoint_activations
    )
    if phase == 1:
        return Phase1(runner, Encoder(runner, args.compression, args.top_k), LEARNS["joint"])
    s = train_phase2.Settings(data="", out="", phase1="", cache="")
    return Phase2(runner, s, Reasoning("latent", args.top_k, args.compression), 0)


def ours(phase: int, world: int, batches, args, process):
    """(function that takes step i, loss of the first batch without dropout); `world` ranks share.

    Rows are packed beforehand, as the product packs them while the GPU is busy.
    """
    process = Process(process.rank if world > 1 else 0, world, process.device)
    task = our_task(phase, args, process)
    if args.shard and process.device.type == "cuda":  # so far each rank had all weights
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    s = TrainingSettings(
        data="",
        out="",
        lr=1e-6,
        max_steps=100,
        batch_size=len(batches[0]),
        row_tokens=args.row_tokens,
        warmup=0.0,
    )
    trainer = Trainer(task, sum(batches, []), s, process, Path(tempfile.mkdtemp()))
    trainer.announce(0)
    rows = [trainer.rows(batch) for batch in batches]
    for row in sum(rows, []):
        row.result()  # packed
    loss = without_dropout(trainer, batches[0], rows[0])
    return lambda i: trainer.step(i, batches[i], rows[i]), loss


@torch.no_grad()
def without_dropout(trainer, examples, rows) -> float:
    """The loss of `examples`, of which this rank has `rows`."""
    task, process, total = trainer.task.eval(), trainer.process, 0.0
    counts = task.counts(examples)
    for row in rows:
        parts = task(data.to_device(row.result(), process.device))
        total += sum(float(w * parts[k] / counts[k]) for k, w in task.weights.items())
    task.train()
    return process.sum([total])[0]


def theirs(phase: int, batches, args, process):
    """The same of the reference, with the weights of ours. Batches are padded beforehand."""
    device, source = process.device, our_task(phase, args, process)
    named = source.model.named_parameters()
    weights = {hf_name(n): p for n, p in named if ".adapters." not in n}
    dtype, rank = process.dtype, args.lora_rank
    model = reference.build(args.directory, weights, ADAPTERS[phase], rank, dtype, device)
    adapters = {
        f"{key}.{name}.weight": p
        for name in ADAPTERS[phase]
        for key, p in lora.adapter_parameters(source.model, name).items()
    }
    for n, p in model.named_parameters():
        p.requires_grad_("lora_" in n)
        if "lora_" in n:
            p.data.copy_(adapters[n.removeprefix("base_model.model.model.")])
    query = torch.nn.Parameter(source.encoder.latent_query.detach().clone()) if phase == 1 else None
    del source, weights, adapters
    learned = [p for p in [query, *model.parameters()] if p is not None and p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-6, fused=device.type == "cuda")
    padded = [
        [reference.padded(name, batch, args.compression, device) for name in LAYOUTS[phase]]
        for batch in batches
    ]

    def step(i, learn=True):
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            if phase == 1:
                loss = reference.phase1_loss(model, query, *padded[i], args.top_k)
            else:
                loss = reference.phase2_loss(model, *padded[i], batches[i])
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


def measured(sides, args, process, profile_to=None) -> list:
    """(seconds of all timed steps, peak GiB, loss) for each (make, batches) of `sides`.

    They take their steps in turn. None if they do not fit. The first WARM_UP batches warm up, each
    of the others is timed once. Memory includes the allocator's reserve.
    """
    device = process.device
    torch._dynamo.reset()
    gc.collect()  # recorded graphs of the phase before
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    warm = WARM_UP[device.type]
    try:
        steps, losses = zip(*(make(batches, args, process) for make, batches in sides))
        rounds = range(warm + args.rounds)
        seconds = [[timed(partial(step, i), device) for step in steps] for i in rounds]
        memory = math.nan
        if device.type == "cuda":
            memory = torch.cuda.max_memory_reserved() / 2**30
        if profile_to:
            profile(partial(steps[0], 0), profile_to)
    except torch.cuda.OutOfMemoryError:
        if process.world > 1:  # the others wait for this rank
            raise
        return [None] * len(sides)
    times = zip(*seconds[warm:])
    return [(sum(t), memory, loss) for t, loss in zip(times, losses)]


def matmul_rate(device, dtype) -> float:
    """FLOP/s of a large matrix product of random numbers."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    return 2 * n**3 / statistics.median(timed(lambda: a @ b, device) for _ in range(20))


def profile(step, path: Path) -> None:
    """Writes the kernels of one step and their time, and prints the sum by kind of kernel."""
    path.parent.mkdir(parents=True, exist_ok=True)
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as p:
        timed(step, torch.device("cuda"))
    kernels = [
        (e.key, e.count, e.self_device_time_total / 1000)
        for e in p.key_averages()
        if e.self_device_time_total and e.device_type.name == "CUDA"
    ]
    kernels.sort(key=lambda x: -x[2])
    lines = (f"{ms:10.3f} ms {count:6d} x {name}\n" for name, count, ms in kernels)
    path.write_text("".join(lines))
    kinds = {
        "flex attention": ("flex",),
        "flash attention": ("flash",),
        "top k": ("topk", "radix", "sort", "bitonic"),
        "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitK"),
        "optimizer": ("multi_tensor", "Adam"),
        "fused pointwise": ("triton",),
        "copies": ("Memcpy", "copy"),
    }
    sums = dict.fromkeys([*kinds, "other"], 0.0)
    for name, _, ms in kernels:
        kind = next((kind for kind, words in kinds.items() if any(w in name for w in words)), "")
        sums[kind or "other"] += ms
    total = sum(sums.values())
    print("    GPU time, ms: " + ", ".join(f"{kind} {ms:.1f}" for kind, ms in sums.items()))
    print(f"    all {total:.1f}, in {sum(count for _, count, _ in kernels)} kernels")


@contextmanager
def shape_of(args):
    """A directory whose config.json has the shape of the model."""
    with tempfile.TemporaryDirectory() as directory:
        if args.shape:
            (Path(directory) / "config.json").write_text(json.dumps(SHAPES[args.shape]))
        yield directory if args.shape else args.model


def parser(description: str) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", required=True)
    p.add_argument("--data", required=True)
    p.add_argument("--shape", choices=SHAPES)
    p.add_argument("--device", default="")
    return p


def latent_examples(examples, args) -> list[data.Example]:
    """The examples with random alpha."""
    generator = torch.Generator().manual_seed(1)

    def alpha(n):
        probs = torch.rand(n, args.top_k, generator=generator).softmax(-1)
        ids = [torch.randperm(1000, generator=generator)[: args.top_k] for _ in range(n)]
        return probs, torch.stack(ids)

    return [replace(e, alpha=alpha(data.num_latents(e, args.compression))) for e in examples]


def main():
    p = parser(__doc__)
    p.add_argument("--phase", type=int, nargs="+", default=[1, 2])
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--reference-batch-size", type=int, nargs="*", help="none: ours alone")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--row-tokens", type=int, default=8192)
    p.add_argument("--compression", type=int, default=2)
    p.add_argument("--top-k", type=int, default=10)
    p.add_argument("--lora-rank", type=int, default=64)
    p.add_argument("--checkpoint-activations", action="store_true", help="ours only")
    p.add_argument("--shard", action="store_true", help="under torchrun: spread frozen layers")
    p.add_argument("--profile", metavar="DIR", help="also write a table of the kernels of a step")
    args = p.parse_args()
    process = join(args.device)
    sizes = args.reference_batch_size or []
    if args.reference_batch_size is None and process.world == 1:
        sizes = [args.batch_size]
    if process.world > 1 and (sizes or args.profile) or process.world == 1 and args.shard:
        p.error("under torchrun leave the reference and --profile out; --shard needs torchrun")
    with shape_of(args) as args.directory, open(os.devnull, "w") as nowhere:
        with redirect_stdout(sys.stdout if process.main else nowhere):
            args.config = read_config(args.directory)
            run(args, sizes, process, Tokenizer(args.model))


def run(args, sizes, process, tokenizer) -> None:
    device, world, warm = process.device, process.world, WARM_UP[process.device.type]
    wanted = max([args.batch_size, *sizes]) * (warm + args.rounds)
    examples = data.load_examples(args.data, tokenizer)[:wanted]
    if len(examples) < wanted:
        sys.exit(f"{args.data}: has {len(examples)} examples, {wanted} are needed")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    rate = matmul_rate(device, process.dtype)
    print(
        f"{name}, torch {torch.__version__}, {args.shape or args.model}, r = {args.compression}, "
        f"LoRA rank {args.lora_rank}, matrix products at {rate / 1e12:.3g} TFLOP/s"
    )
    for phase in args.phase:
        pool = examples if phase == 1 else latent_examples(examples, args)
        n, path = args.batch_size, args.profile and Path(args.profile) / f"phase{phase}.txt"

        def batches(size, pool=pool):
            return [pool[size * i : size * (i + 1)] for i in range(warm + args.rounds)]

        def tokens(size, phase=phase, batches=batches):
            timed_examples = sum(batches(size)[warm:], [])
            r, names = args.compression, LAYOUTS[phase]
            return sum(data.num_tokens(x, e, r) for e in timed_examples for x in names)

        sides = [] if args.shard else [("ours", n, partial(ours, phase, 1))]
        sides += [(f"ours on {world}", n, partial(ours, phase, world))] if world > 1 else []
        sides += [("reference", m, partial(theirs, phase)) for m in sizes]
        makers = [(make, batches(m)) for _, m, make in sides]
        if device.type == "cpu" and world == 1:  # other work on the machine slows both alike
            results = measured(makers, args, process)
        else:
            results = [
                measured([maker], args, process, None if i else path)[0]
                for i, maker in enumerate(makers)
            ]
        needed = sum(flops(args.config, phase, batch, args) for batch in batches(n)[warm:])
        speeds = []
        for (side, m, _), result in zip(sides, results):
            line = f"phase {phase}, {side}, {m} examples a step: "
            if result is None:
                print(line + "out of memory", flush=True)
                speeds.append(0.0)
                continue
            seconds, memory, loss = result
            if not math.isfinite(loss):
                sys.exit(f"{line}the loss is {loss}")
            speeds.append(tokens(m) / seconds)
            line += f"{speeds[-1]:,.0f} tokens/s, {memory:.1f} GiB, loss {loss:.4f}"
            if side.startswith("ours"):
                each = needed / seconds / (1 if side == "ours" else world)
                line += f", {1000 * seconds / args.rounds:.1f} ms a step, "
                line += f"{each / rate:.1%} of the matrix products' rate"
                if name in PEAK:
                    line += f", {each / PEAK[name]:.1%} of the data sheet's peak"
            elif m == n and results[0]:
                difference = abs(loss - results[0][2]) / loss
                line += f", which differs from ours by {difference:.1e} of it"
            print(line, flush=True)
        if len(speeds) > 1 and speeds[0] and max(speeds[1:]):
            ratio = speeds[1] / speeds[0] if world > 1 else speeds[0] / max(speeds[1:])
            more = f" on {world}" if world > 1 else ""
            print(f"phase {phase}: ours is {ratio:.2f} times as fast{more}", flush=True)


if __name__ == "__main__":
    main()
