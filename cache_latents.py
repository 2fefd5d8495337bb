"""The latent cache: a phase 1 encoder run once over the training set, or MUX's fixed latents.

    python cache_latents.py --phase1 runs/phase1 --data train.jsonl --out runs/cache
    python cache_latents.py --model runs/cot --data train.jsonl --out runs/cache

OUT/shard-00000.safetensors ... hold `probs` float16 [sum N, k], `ids` int32 [sum N, k] and `sizes`
int64 [examples], the N of each example (MUX: k is r). OUT/cache.json is written last.
"""

import lib.errors  # noqa: F401  from here on an error is one line

from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import distribute, load_examples, num_latents, num_tokens, pack_examples
from data import row_shape, to_device
from lib.cli import Count, Share, parse, settings
from lib.errors import UserError
from lib.files import file_hash, read_json, read_tensors, write_json, write_tensors
from lib.run import barrier, join, output_directory
from lib.tokenizer import Tokenizer
from load_hf_weights import Reasoning, fingerprint, load_model, resolve
from train_phase1 import finished_phase1, load_encoder
from trainer import make_runner

SHARD = 1024  # examples


@settings
class Settings:
    data: str  # the training file of phase 2
    out: str  # directory of the cache; the same command goes on where it stopped
    phase1: str = ""  # the phase 1 run whose encoder makes the latents
    model: str = ""  # addition to the paper (MUX): no encoder; phase 2 starts from this model
    multiplex: Share = 0.5  # with --model: token j of a segment weighs multiplex^j
    compression: Count = 2  # with --model: chain tokens per latent, r
    row_tokens: Count = 8192  # tokens of a packed row
    device: str = ""  # cpu, cuda or cuda:N; default: a GPU if there is one


def start_of(s):
    """What the student starts from: a phase 1 run, or a model."""
    if bool(s.phase1) == bool(s.model):
        raise UserError("name either --phase1 or --model")
    return s.phase1 or s.model


def identity(s, count):
    """What a cache depends on. Phase 2 compares it with what it is about to train on."""
    found = {
        "count": count,
        "data_hash": file_hash(s.data),
        "encoder": None,
        "tokenizer": file_hash(resolve(start_of(s))[0] / "tokenizer.json"),
    }
    if s.phase1:
        config = finished_phase1(s.phase1)
        file = Path(s.phase1) / config["steps"][-1] / "encoder.safetensors"
        found |= {"compression": config["compression"], "top_k": config["top_k"]}
        found["encoder"] = fingerprint(config["start"], file)
    return found


def multiplexed(example, r, rho):
    """Not in the paper: alpha as in MUX (arXiv 2607.18264), like `encode` but without an encoder.

    Token number j of a segment has the weight rho^j. A token that occurs twice has both weights.
    """
    n = len(example.chain)
    ids = F.pad(torch.tensor(example.chain).int(), (0, -n % r)).view(-1, r)
    weights = rho ** torch.arange(r) * (torch.arange(ids.numel()).view(-1, r) < n)
    same = ids[:, :, None] == ids[:, None]
    masses = (same * weights[:, None]).sum(-1)
    masses *= ~same.tril(-1).any(-1)  # at the first place of each token
    return (masses / masses.sum(-1, keepdim=True)).half(), ids


@torch.no_grad()
def encode(encoder, examples, shape):
    """(probs float16 [N, k], ids int32 [N, k]) of each example, on the CPU.

    Rows are packed in `shape` (data.row_shape).
    """
    cached = [None] * len(examples)
    r = encoder.r
    lengths = [num_tokens("encoder", e, r) for e in examples]
    for group in distribute(lengths, 1, shape.tokens, shape.examples):
        row = pack_examples("encoder", [examples[i] for i in group], r, shape)
        probs, ids, _ = encoder(to_device(row, encoder.latent_query.device))
        sizes = [num_latents(examples[i], r) for i in group]
        alphas = zip(probs.half().cpu().split(sizes), ids.int().cpu().split(sizes))
        for i, alpha in zip(group, alphas):
            cached[i] = alpha
    return cached


def read_cache(directory, expected):
    """cache.json, and the latents of every example of the data file, as `encode` gives them.

    Raises UserError that names the value in which the cache differs from `expected` (identity).
    """
    path = Path(directory) / "cache.json"
    if not path.exists():
        raise UserError(f"{directory}: is not a finished cache; make one with cache_latents.py")
    found = read_json(path)
    for key, value in expected.items():
        if found.get(key) != value:
            raise UserError(
                f"{directory}: {key} is {found.get(key)} in the cache and {value} here; "
                "make a cache for this start and this data"
            )
    cached = []
    for shard in sorted(path.parent.glob("shard-*.safetensors")):
        tensors, _ = read_tensors(shard)
        sizes = tensors["sizes"].tolist()
        cached += zip(tensors["probs"].split(sizes), tensors["ids"].split(sizes))
    if len(cached) != found["count"]:
        raise UserError(f"{directory}: shards are missing; delete the cache and make it again")
    return found, cached


def main():
    s = parse(Settings, __doc__)
    process = join(s.device)
    start = start_of(s)
    examples = load_examples(s.data, Tokenizer(resolve(start)[0]), process.say)
    made_from = identity(s, len(examples))
    if s.model:  # top_k is for inference: alpha has at most r tokens
        made_from |= dict(compression=s.compression, multiplex=s.multiplex, top_k=Reasoning.top_k)
    else:
        model = load_model(finished_phase1(start)["start"], process.device, process.dtype)[0]
        encoder = load_encoder(start, make_runner(model, process))
        # all shards have rows of one shape, so a GPU compiles and records once
        lengths = [num_tokens("encoder", e, encoder.r) for e in examples]
        shape = row_shape(lengths, min(SHARD, len(lengths)), s.row_tokens, process.device)
    with output_directory(s.out, s, command="cache_latents", **made_from) as out:
        process.say(f"{out}: latents of {len(examples)} examples, on {process.device}")
        numbers = range(process.rank, -(-len(examples) // SHARD), process.world)
        for number in tqdm(numbers, out.name, disable=not process.main):
            path = out / f"shard-{number:05d}.safetensors"
            if not path.exists():
                part = examples[number * SHARD : (number + 1) * SHARD]
                if s.model:
                    cached = [multiplexed(e, s.compression, s.multiplex) for e in part]
                else:
                    cached = encode(encoder, part, shape)
                sizes = torch.tensor([len(probs) for probs, _ in cached])
                probs, ids = map(torch.cat, zip(*cached))
                write_tensors(path, {"probs": probs, "ids": ids, "sizes": sizes})
        barrier()
        write_json(out / "cache.json", made_from)


if __name__ == "__main__":
    main()
