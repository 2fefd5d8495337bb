"""Decoding speed, ours beside two loops on Transformers, in one run on the same problems.

    python bench/sampling.py --model DIR --data gsm8k-test.jsonl --shape 1.24b \\
        --problems 1319 --batch-size 1319

All do the same work for each problem, greedily: --latents superpositions, one token that ends
thinking, --answer tokens. The references are the loop that the field evaluates with, one problem at
a time, and the same on left-padded batches; both keep a KV cache. The first problems warm up. In
bf16, rounding parts the results: it is printed how many agree.

Then it is measured what a shorter chain is worth: the time of --chain written tokens, and of half
and a quarter as many latents. The time of reading the problem is taken off.
"""

from pathlib import Path
import sys
import time

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
from training import base_model, parser, shape_of, timed  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from lib.files import read_jsonl  # noqa: E402
from lib.run import join  # noqa: E402
from lib.tokenizer import Tokenizer  # noqa: E402
from load_hf_weights import Reasoning, hf_name, read_config  # noqa: E402
from sample import Sampler, SamplingParams  # noqa: E402


@torch.no_grad()
def reference(hf, prompts, k: int, num_latents: int, end: int, num_tokens: int) -> list[tuple]:
    """(top token of each latent, answer tokens) of every prompt, in one left-padded batch."""
    device, E, B = hf.device, hf.get_input_embeddings().weight, len(prompts)
    longest = max(map(len, prompts))
    pads = [longest - len(p) for p in prompts]
    ids = torch.tensor([[0] * n + p for n, p in zip(pads, prompts)], device=device)
    mask = torch.tensor([[0] * n + [1] * len(p) for n, p in zip(pads, prompts)], device=device)
    embeds, position_ids, cache = E[ids], (mask.cumsum(-1) - 1).clamp(min=0), None
    thoughts, tokens = [], []
    for step in range(num_latents + 1 + num_tokens):
        out = hf(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache, logits = out.past_key_values, out.logits[:, -1].float()
        if step < num_latents:
            top, top_ids = logits.topk(k)
            embeds = torch.einsum("bk,bkd->bd", top.softmax(-1).to(E.dtype), E[top_ids])[:, None]
            thoughts.append(top_ids[:, 0])
        else:
            ending = torch.full((B,), end, device=device)
            token = ending if step == num_latents else logits.argmax(-1)
            embeds = E[token][:, None]
            tokens += [token] * (step > num_latents)
        mask = torch.cat([mask, mask.new_ones(B, 1)], dim=1)
        position_ids = position_ids[:, -1:] + 1
    return list(zip(*(torch.stack(x, dim=1).tolist() for x in (thoughts, tokens))))


def params_of(latents: int, tokens: int) -> SamplingParams:
    return SamplingParams(model="", max_latents=latents, max_new_tokens=tokens, temperature=0.0)


def main():
    p = parser(__doc__)
    p.add_argument("--problems", type=int, default=32)
    p.add_argument("--batch-size", type=int, default=32)
    p.add_argument("--one-by-one", type=int, default=8, help="problems taken one at a time")
    p.add_argument("--latents", type=int, default=17)
    p.add_argument("--answer", type=int, default=12)
    p.add_argument("--chain", type=int, default=128, help="written tokens to compare with")
    p.add_argument("--top-k", type=int, default=10)
    p.add_argument("--ours", action="store_true", help="leave Transformers out")
    args = p.parse_args()
    process, tokenizer = join(args.device), Tokenizer(args.model)
    device = process.device
    rows = read_jsonl(args.data)[: args.problems]
    prompts = [tokenizer.prompt(row["problem"]) for row in rows]
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {args.shape or args.model}")
    with shape_of(args) as args.directory:
        args.config = read_config(args.directory)
        model = base_model(args, process)
        end = args.config.vocab_size - 1  # nobody chooses it, and no end of turn comes

        def make(thinking, params, size):
            return Sampler(model, Reasoning(thinking, args.top_k), ([end], -1), params, size)

        beside_transformers(make, model, prompts, end, args)
    for batch, size in ((prompts[:1], 1), (prompts, args.batch_size)):
        shorter_chains(make, batch, size, args)


def beside_transformers(make, model, prompts, end: int, args) -> None:
    """Prints problems per second of ours and of the references, and how many results agree."""
    work = params_of(args.latents, args.answer)
    many, single = (make("latent", work, size) for size in (args.batch_size, 1))
    few = prompts[: args.one_by_one]

    def ours(sampler, batch):
        found = sorted(sampler.generate(batch), key=lambda x: x[0])
        return [([int(ids[0]) for _, ids in r.latents], r.tokens) for _, r in found]

    sides = [
        (f"ours, {args.batch_size} at a time", prompts, lambda: ours(many, prompts)),
        ("ours, one at a time", few, lambda: [ours(single, [p])[0] for p in few]),
    ]
    if not args.ours:
        with model.embed_tokens.weight.device:
            config = AutoConfig.from_pretrained(args.directory)
            hf = AutoModelForCausalLM.from_config(config, dtype=model.head.dtype).eval()
        weights = {hf_name(n): p for n, p in model.named_parameters()}
        hf.load_state_dict(weights, strict=False)

        def theirs(batches):
            settings = args.top_k, args.latents, end, args.answer
            return [x for batch in batches for x in reference(hf, batch, *settings)]

        n = args.batch_size
        parts = [prompts[i : i + n] for i in range(0, len(prompts), n)]
        sides += [
            (f"Transformers, {n} at a time", prompts, lambda: theirs(parts)),
            ("Transformers, one at a time", few, lambda: theirs([[p] for p in few])),
        ]
    first = None
    for what, problems, run in sides:
        run()
        begin = time.perf_counter()
        result = run()
        seconds = time.perf_counter() - begin
        first, count = first or result, len(problems)
        same = sum(a == b for a, b in zip(result, first)) / count
        print(
            f"{what}: {count} problems in {seconds:.2f} s, {count / seconds:.2f} problems/s, "
            f"{1000 * seconds / count:.2f} ms each, {same:.0%} as ours",
            flush=True,
        )


def shorter_chains(make, batch, size: int, args) -> None:
    """Prints the time of a chain of --chain tokens, and of half and a quarter as many latents."""
    text = thinking(make, "text", args.chain, batch, size, args)
    line = f"{1000 * text / len(batch):.2f} ms for {args.chain} tokens of chain"
    for r in (2, 4):
        seconds = thinking(make, "latent", args.chain // r, batch, size, args)
        line += f", {1000 * seconds / len(batch):.2f} for {args.chain // r} latents"
        line += f" ({seconds / text:.2f} of that)"
    print(f"{len(batch)} problems, {size} at a time, each: {line}", flush=True)


def thinking(make, mode: str, steps: int, prompts, size: int, args) -> float:
    """Seconds in which a batch thinks for so many steps, in text or in latents."""
    seconds = []
    for n in (steps + 2, 2):
        sampler = make(mode, params_of(n, n + 2 if mode == "text" else 2), size)

        def run(sampler=sampler):
            dict(sampler.generate(prompts))

        run()
        seconds.append(min(timed(run, sampler.device) for _ in range(3)))
    return seconds[0] - seconds[1]


if __name__ == "__main__":
    main()
