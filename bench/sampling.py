"""Decoding speed, ours beside two reference loops on Transformers, in one run on the same problems.

    python bench/sampling.py --model DIR --data gsm8k-test.jsonl --problems 32 --batch-size 32
    python bench/sampling.py --model DIR --data gsm8k-test.jsonl --shape 1.24b --problems 1319 --batch-size 512

Everybody does the same work for each problem, greedily: --latents superpositions, one token that ends thinking, --answer tokens. The
references are the loop that the field evaluates with, one problem at a time, and the same on left-padded batches; both keep a KV
cache. The first problems warm up. How many first thoughts, and how many of all thoughts and answers, are as ours is printed: rounding
parts them in bf16.

Then what shorter chains are worth: the time in which a chain of --chain tokens is written, beside that of as many latents divided by
2 and by 4; reading the problem and the token after the chain are measured alone and taken off.
"""

from pathlib import Path
import sys
import time

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from attention import KVCache  # noqa: E402
from data import read_jsonl  # noqa: E402
from latents import largest  # noqa: E402
from load_hf_weights import hf_name, read_config  # noqa: E402
from runs import start  # noqa: E402
from sample import Sampler, Sampling  # noqa: E402
from training import base_model, parser, shape_of, timed, tokenizer_of  # noqa: E402


@torch.no_grad()
def reference(hf, prompts, k: int, num_latents: int, end: int, num_tokens: int) -> list[tuple[list, list]]:
    """(top token of each latent, answer tokens) of every prompt, in one left-padded batch."""
    device, E, B = hf.device, hf.get_input_embeddings().weight, len(prompts)
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    embeds, position_ids, cache = E[ids], (mask.cumsum(-1) - 1).clamp(min=0), None
    thoughts, tokens = [], []
    for step in range(num_latents + 1 + num_tokens):
        out = hf(inputs_embeds=embeds, attention_mask=mask, position_ids=position_ids, past_key_values=cache, use_cache=True,
                 logits_to_keep=1)
        cache, logits = out.past_key_values, out.logits[:, -1].float()
        if step < num_latents:
            top, top_ids = largest(logits, k)  # faster than topk; and logits in bf16 often tie, which both sides are to break alike
            embeds = torch.einsum("bk,bkd->bd", top.softmax(-1).to(E.dtype), E[top_ids])[:, None]
            thoughts.append(top_ids[:, 0])
        else:
            token = torch.full((B,), end, device=device) if step == num_latents else logits.argmax(-1)
            embeds = E[token][:, None]
            tokens += [token] * (step > num_latents)
        mask = torch.cat([mask, mask.new_ones(B, 1)], dim=1)
        position_ids = position_ids[:, -1:] + 1
    return list(zip(*(torch.stack(x, dim=1).tolist() for x in (thoughts, tokens))))


def bandwidth(device) -> float:
    """Bytes per second, read and written, of a large copy."""
    x = torch.empty(2**28 if device.type == "cuda" else 2**25, dtype=torch.float32, device=device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / min(timed(lambda: y.copy_(x), device) for _ in range(10))


def main():
    p = parser(__doc__)
    p.add_argument("--problems", type=int, default=32)
    p.add_argument("--batch-size", type=int, default=32)
    p.add_argument("--one-by-one", type=int, default=8, help="problems for the loop that takes one at a time")
    p.add_argument("--latents", type=int, default=17)
    p.add_argument("--answer", type=int, default=12)
    p.add_argument("--chain", type=int, default=128, help="tokens of the written chain that latents are compared with")
    p.add_argument("--top-k", type=int, default=10)
    args = p.parse_args()
    device = start(args.device)[2]
    tokenizer = tokenizer_of(args)
    prompts = [tokenizer.prompt(row["problem"]) for row in read_jsonl(args.data)[:args.problems]]
    few = prompts[:args.one_by_one]
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, {args.shape or args.model}, {args.latents} latents and {args.answer} answer tokens")
    with shape_of(args) as args.directory:
        args.config = read_config(args.directory)
        model = base_model(args, device)
        end = args.config.vocab_size - 1  # of thinking: nobody chooses it, and no end of turn comes
        sampler = lambda settings, size: Sampler(model, [end], -1, settings, size)
        beside_transformers(sampler, model, prompts, few, end, args)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    bandwidth_share(sampler, model, few[0], args)
    for batch, size in ((few[:1], 1), (prompts, args.batch_size)):
        shorter_chains(sampler, batch, size, args)


def beside_transformers(sampler, model, prompts, few, end: int, args) -> None:
    """Prints the problems per second of ours and of the references, and how many thoughts and answers agree."""
    with model.embed_tokens.weight.device:
        hf = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.directory), dtype=model.embed_tokens.weight.dtype).eval()
    hf.load_state_dict({hf_name(n): p for n, p in model.named_parameters()}, strict=False)
    work = Sampling("latent", args.top_k, args.latents, args.answer, temperature=0)
    many, single = sampler(work, args.batch_size), sampler(work, 1)
    ours = lambda sampler, batch: [(r.ids[:, 0].tolist(), r.tokens) for r in sampler.generate(batch)]
    theirs = lambda batch: reference(hf, batch, args.top_k, args.latents, end, args.answer)
    batched = lambda: [x for i in range(0, len(prompts), args.batch_size) for x in theirs(prompts[i:i + args.batch_size])]
    one_by_one = lambda step: [x for prompt in few for x in step([prompt])]
    first = None
    for what, count, run, warm_up in (
            (f"ours, {args.batch_size} at a time", len(prompts), lambda: ours(many, prompts), lambda: ours(many, prompts)),
            ("ours, one at a time", len(few), lambda: one_by_one(lambda p: ours(single, p)), lambda: ours(single, [max(few, key=len)])),
            (f"Transformers, {args.batch_size} at a time", len(prompts), batched, lambda: theirs(prompts[:args.batch_size])),
            ("Transformers, one at a time", len(few), lambda: one_by_one(theirs), lambda: theirs(few[:1]))):
        warm_up()
        begin = time.perf_counter()
        result = run()
        seconds = time.perf_counter() - begin  # results are on the host: the device has finished
        first = first or result
        begun = sum(a[0][0] == b[0][0] for a, b in zip(result, first)) / count
        same = sum(a == b for a, b in zip(result, first)) / count
        print(f"{what}: {count} problems in {seconds:.2f} s, {count / seconds:.2f} problems/s, {1000 * seconds / count:.1f} ms each, "
              f"{begun:.0%} begin and {same:.0%} go on as ours, {len(set(map(str, result)))} differ from one another", flush=True)


def bandwidth_share(sampler, model, prompt, args) -> None:
    """Prints how near a single row's step comes to reading weights and cache once."""
    E, steps = model.embed_tokens.weight, args.chain
    rate = bandwidth(E.device)
    seconds = thinking(sampler, "latent", steps, [prompt], 1, args)
    weights = sum(p.nbytes for n, p in model.named_parameters() if model.lm_head is None or "embed" not in n)
    cache = KVCache.bytes_per_row(args.config, len(prompt) + steps // 2, E.dtype)
    print(f"one at a time, {1000 * seconds / steps:.2f} ms a latent; {(weights + cache) / rate * steps / seconds:.0%} of the floor: "
          f"{weights / 2**30:.2f} GiB of weights and {cache / 2**30:.2f} of cache, at the {rate / 1e12:.2f} TB/s of a copy", flush=True)


def shorter_chains(sampler, batch, size: int, args) -> None:
    """Prints what a chain of --chain tokens takes, and half and a quarter as many latents."""
    text, *latent = (thinking(sampler, mode, args.chain // r, batch, size, args) for mode, r in (("text", 1), ("latent", 2), ("latent", 4)))
    print(f"{len(batch)} problems, {size} at a time: {1000 * text / len(batch):.2f} ms each for {args.chain} tokens of chain, " + ", ".join(
        f"{1000 * s / len(batch):.2f} for {args.chain // r} latents ({text / s:.2f} times less)" for r, s in zip((2, 4), latent)), flush=True)


def thinking(sampler, mode: str, steps: int, prompts, size: int, args) -> float:
    """Seconds in which a batch thinks for so many steps, in text or in latents."""
    seconds = []
    for n in (steps + 2, 2):
        one = sampler(Sampling(mode, args.top_k, n, n + 2 if mode == "text" else 2, temperature=0), size)
        one.generate(prompts)
        seconds.append(min(timed(lambda: one.generate(prompts), one.device) for _ in range(3)))
    return seconds[0] - seconds[1]


if __name__ == "__main__":
    main()
