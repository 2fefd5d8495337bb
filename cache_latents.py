"""The latent cache: a phase 1 encoder run once over the training set, alpha of every latent written to shards.

    python cache_latents.py --phase1 runs/joint --data train.jsonl --out runs/cache

OUT/shard-00000.safetensors ... hold `probs` float16 [sum N, k], `ids` int32 [sum N, k] (none with top-k 0: probs cover the
vocabulary, with -1 they are hidden states) and `offsets` int64 [examples + 1]; OUT/cache.json says what they were made from and is written last.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from data import Example, RowShape, load_examples, num_latents, num_tokens, pack, pack_row, row_shape, to_device
from load_hf_weights import base_dtype, fingerprint, load_model, resolve
from runs import (UserError, at_least, file_hash, finished_run, from_rank0, hold, open_run, parser, read_json, read_tensors,
                  run_main, start, write_json, write_tensors)
from train_phase1 import Encoder, load_encoder

SHARD = 1024  # examples


def identity(phase1: str | Path, data: str | Path, count: int, compression: int, top_k: int) -> dict:
    """What a cache depends on; phase 2 compares it, value by value, with what it is about to train on."""
    base = read_json(Path(phase1) / "config.json")["model"]
    return {"compression": compression, "top_k": top_k, "count": count, "data_hash": file_hash(data),
            "model": fingerprint(base, Path(phase1) / "encoder.safetensors"),
            "tokenizer": file_hash(resolve(base)[0] / "tokenizer.json")}


@torch.no_grad()
def encode(encoder: Encoder, examples: list[Example], r: int, k: int, row_tokens: int, device,
           shape: RowShape | None = None) -> list[tuple]:
    """(probs float16 [N, k], ids int32 [N, k] or None) of each example, on the CPU; rows have `shape`, or else are as long as needed."""
    cached = [None] * len(examples)
    lengths = [num_tokens("encoder", e, r) for e in examples]
    tokens, most = (shape.tokens, shape.examples) if shape else (max(row_tokens, max(lengths)), None)
    groups = pack(lengths, tokens, most=most)
    with ThreadPoolExecutor(1) as builder:  # while the GPU is busy
        rows = builder.map(lambda indices: pack_row("encoder", [examples[i] for i in indices], r), groups)
        for indices, row in zip(groups, rows):
            probs, ids = encoder(to_device(row, device, shape), k)
            sizes = [num_latents(examples[i], r) for i in indices]
            all_ids = [None] * len(indices) if ids is None else ids.int().cpu().split(sizes)
            for i, alpha in zip(indices, zip(probs.half().cpu().split(sizes), all_ids)):
                cached[i] = alpha
    return cached


def read_cache(directory: str | Path, expected: dict) -> list[tuple]:
    """The latents of every example, in the data file's order, as `encode` gives them.

    Raises UserError, naming the value, if the cache was not made from what `expected` (see `identity`) says.
    """
    directory = Path(directory)
    if not (directory / "cache.json").exists():
        raise UserError(f"{directory}: no latent cache here (no cache.json); make or finish one with cache_latents.py")
    found = read_json(directory / "cache.json")
    for key, value in expected.items():
        if found.get(key) != value:
            raise UserError(f"{directory}: this cache does not fit: {key} is {found.get(key)} in the cache and {value} here; make a cache "
                            "of this phase 1 run and this data")
    cached = []
    for path in sorted(directory.glob("shard-*.safetensors")):
        tensors, _ = read_tensors(path)
        sizes = tensors["offsets"].diff().tolist()
        ids = tensors["ids"].split(sizes) if "ids" in tensors else [None] * len(sizes)
        cached += zip(tensors["probs"].split(sizes), ids)
    if len(cached) != found["count"]:
        raise UserError(f"{directory}: {len(cached)} examples in the shards instead of {found['count']}; "
                        "delete the cache and make it again")
    return cached


def main():
    p = parser(__doc__, seed=False)
    p.add_argument("--phase1", required=True, help="the phase 1 run whose encoder makes the latents")
    p.add_argument("--data", required=True, help="the training file of phase 2")
    p.add_argument("--out", required=True, help="directory of the cache; a stopped run goes on")
    p.add_argument("--row-tokens", type=at_least(1), default=8192, help="tokens of a packed row, about")
    args = p.parse_args()
    rank, world, device = start(args.device)
    config = finished_run(args.phase1, "train_phase1")
    r, k, out = config["compression"], config["top_k"], Path(args.out)
    model, tokenizer, _ = load_model(config["model"], device, base_dtype(device))
    encoder = load_encoder(args.phase1, model).to(device).eval()
    examples = load_examples(args.data, tokenizer)
    made_from = identity(args.phase1, args.data, len(examples), r, k)
    from_rank0(lambda: open_run(out, made_from))
    if (out / "cache.json").exists():
        if rank == 0:
            print(f"{out}: is finished already")
        return
    if rank == 0:
        print(f"cache_latents: {len(examples)} examples, r = {r}, top-k = {k}, on {world} x {device}")
    shape = None
    if device.type == "cuda":  # rows of one size, replayed as CUDA graphs
        shape = row_shape([num_tokens("encoder", e, r) for e in examples], min(SHARD, len(examples)), args.row_tokens)
        model.graphs = {}
    shards = range(0, len(examples), SHARD)
    with hold(out):
        for number in tqdm(range(rank, len(shards), world), desc=out.name, disable=rank > 0):
            path = out / f"shard-{number:05d}.safetensors"
            if path.exists():
                continue
            probs, ids = zip(*encode(encoder, examples[shards[number]:shards[number] + SHARD], r, k, args.row_tokens, device, shape))
            offsets = torch.tensor([0] + [len(x) for x in probs]).cumsum(0)
            tensors = {"probs": torch.cat(probs), "offsets": offsets}
            write_tensors(path, tensors if k <= 0 else tensors | {"ids": torch.cat(ids)})
        if dist.is_initialized():
            dist.barrier()
        if rank == 0:
            write_json(out / "cache.json", made_from)
            print(f"{out}: {sum(num_latents(e, r) for e in examples)} latents of {len(examples)} examples")


if __name__ == "__main__":
    run_main(main)
