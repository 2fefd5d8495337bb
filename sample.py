"""The superposition sampler, as a library (`generate`) and a command.

    python sample.py --model runs/latent --prompt "If 3 pens cost 6 dollars, what do 7 cost?"
    python sample.py --model runs/latent                                  # asks for problems

A row reads Q <think>, feeds itself top-k superpositions while it thinks, then all of </think>, then samples its answer; all
rows do whatever is theirs to do in the same step, on one KV cache. See docs/METHOD.md.
"""

from dataclasses import dataclass, replace

import torch

from attention import KVCache
import latents
from load_hf_weights import base_dtype, load_model
from masks import PROMPT, Labels
from model import Model
from runs import UserError, at_least, free_memory, parser, run_main, start
from tokenizer import Tokenizer

OPENING = "\\boxed{"  # what a forced answer begins with
SHOWN = 10  # tokens of a full-vocabulary latent that are kept in a result
BARS = "▁▂▃▄▅▆▇█"


@dataclass
class Sampling:
    """How to think and answer.

    thinking: "latent", or "text" (the chain is written, as part of the answer), or "none" (</think> at once).
    top_k: tokens in a superposition, 0 for the full vocabulary. temperature 0 is greedy. noise, noise_temperature: those of
    latents.perturb while thinking; 0: none. `latents`: "own", or what is fed in the place of every latent's own: "random"
    tokens with the same probabilities, or its "argmax" alone. forced: the answer begins with OPENING, which is not in the result.
    """
    thinking: str = "latent"
    top_k: int = 10
    max_latents: int = 256
    max_new_tokens: int = 512
    temperature: float = 0.6
    top_p: float = 0.95
    noise: float = 0.0
    noise_temperature: float = 1.0
    latents: str = "own"
    forced: bool = False
    seed: int = 1


@dataclass
class Result:
    """probs float32 [n, k] and ids int64 [n, k]: the n latents that were fed (the SHOWN likeliest tokens if top_k is 0).

    tokens: what was sampled, without the end-of-turn token. finished: whether that token came within the budget.
    """
    probs: torch.Tensor
    ids: torch.Tensor
    tokens: list[int]
    finished: bool


def pick(logits: torch.Tensor, uniform: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """A token id [B] from each row of logits [B, V]: the arg-max at temperature 0, else the quantile `uniform` [B] of the
    smallest set of most likely tokens that holds at least `top_p` of the probability."""
    if temperature == 0:
        return logits.argmax(-1)
    probs, ids = (logits / temperature).softmax(-1).sort(-1, descending=True)
    cumulative = probs.cumsum(-1)
    cumulative = cumulative.masked_fill(cumulative - probs >= top_p, 0).cummax(-1).values  # flat behind the set
    place = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(-1, keepdim=True)
    return ids.gather(-1, place.clamp(max=probs.shape[-1] - 1)).squeeze(-1)


class Sampler:
    """`batch_size` rows that think and answer side by side; a finished row's place is given to the next problem.

    `end_think` are the tokens fed when thinking ends: </think>, and whatever else an answer is to begin with.
    """

    def __init__(self, model: Model, end_think: list[int], end_of_turn: int, settings: Sampling, batch_size: int):
        self.model, self.settings, self.end_of_turn, self.batch_size = model, settings, end_of_turn, batch_size
        self.device = model.embed_tokens.weight.device
        self.end_think = torch.tensor(end_think, device=self.device)
        self.steps = 8 if self.device.type == "cuda" else 1  # between two looks at who has finished: a look waits for the GPU

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], numbers=None, progress=lambda i, result: None, given=None,
                 watch=None) -> list[Result]:
        """A Result for each prompt (ids of Q <think>), in order; `progress(i, result)` is called as each one ends.

        A prompt's random numbers depend on the seed and its number (its place in the list, or `numbers`), not on the batch
        it runs in. `given`: for each prompt the latents (probs [n, k], ids [n, k]) to be fed, all n and no others.
        `watch(i, result)` is called with the unfinished results, again and again.
        """
        self.numbers, self.given = range(len(prompts)) if numbers is None else numbers, given
        s, config, dtype = self.settings, self.model.config, self.model.embed_tokens.weight.dtype
        thoughts = max((len(ids) for _, ids in given), default=0) if given else s.max_latents
        length = max(map(len, prompts)) + thoughts + len(self.end_think) + s.max_new_tokens + self.steps
        fitting = 0.8 * free_memory(self.device) / KVCache.bytes_per_row(config, length, dtype)
        B, results = max(1, int(min(self.batch_size, len(prompts), fitting))), [None] * len(prompts)  # others wait for a row
        self.cache = KVCache(config, B, length, self.device, dtype)
        zeros = lambda *shape, dtype=torch.long: torch.zeros(B, *shape, dtype=dtype, device=self.device)
        self.active, self.thinking = zeros(dtype=torch.bool), zeros(dtype=torch.bool)
        self.closed, self.num_latents, self.num_tokens = zeros(), zeros(), zeros()  # `closed`: tokens of </think> fed
        self.budget, self.rows = zeros(), torch.arange(B, device=self.device)  # budget: of latents
        k = s.top_k or min(SHOWN, config.vocab_size)
        self.probs, self.ids = zeros(thoughts + 1, k, dtype=torch.float32), zeros(thoughts + 1, k)
        self.tokens, self.uniform = zeros(s.max_new_tokens), zeros(s.max_new_tokens, dtype=torch.float32)
        self.gumbel = zeros(thoughts + 1, k, dtype=torch.float32) if s.noise else None
        self.other_ids = zeros(thoughts + 1, k) if given or s.latents == "random" else None
        self.other_probs = zeros(thoughts + 1, k, dtype=torch.float32) if given else None
        self.hidden = zeros(config.hidden_size, dtype=dtype)
        running, waiting = {}, list(range(len(prompts)))[::-1]  # running: row -> [place of its prompt, tokens read]

        while waiting or running:
            free = [row for row in range(B) if row not in running]
            fresh = {row: waiting.pop() for row in free[:len(waiting)]}
            if fresh:
                self._admit(fresh, prompts)
                running |= {row: [i, len(prompts[i])] for row, i in fresh.items()}
            for _ in range(self.steps):
                self._step(max(read for _, read in running.values()) + 1)
                for state in running.values():
                    state[1] += 1
            active = self.active.tolist()
            for row in [r for r in running if not active[r]]:
                i, _ = running.pop(row)
                results[i] = self._result(row)
                progress(i, results[i])
            for row in running if watch else ():
                watch(running[row][0], self._result(row))
        return results

    def _admit(self, fresh: dict[int, int], prompts) -> None:
        """Reads the prompts of `fresh` {row: place} into the cache, leaves their last hidden states in self.hidden."""
        rows, s = torch.tensor(list(fresh), device=self.device), self.settings
        lengths = [len(prompts[i]) for i in fresh.values()]
        sizes = torch.tensor(lengths, device=self.device)
        ids = torch.tensor([t for i in fresh.values() for t in prompts[i]], device=self.device)
        document = torch.arange(len(rows), device=self.device).repeat_interleave(sizes)
        position_ids = torch.arange(len(ids), device=self.device) - (sizes.cumsum(0) - sizes)[document]
        labels = Labels(document, torch.full_like(document, PROMPT), torch.zeros_like(document), len(lengths), max(lengths))
        h = self.model(self.model.embed_tokens(ids), position_ids, self.cache.prefill(rows, labels, position_ids))
        self.hidden[rows] = h[sizes.cumsum(0) - 1]
        self.active[rows], self.thinking[rows] = True, s.thinking == "latent"
        self.closed[rows] = len(self.end_think) if s.thinking == "text" else 0
        self.num_latents[rows] = self.num_tokens[rows] = 0
        self.budget[rows] = s.max_latents
        for row, i in fresh.items():
            generator = torch.Generator().manual_seed(hash((s.seed, self.numbers[i])))
            self.uniform[row] = torch.rand(s.max_new_tokens, generator=generator)
            if s.latents == "random":
                self.other_ids[row] = torch.randint(self.model.config.vocab_size, self.other_ids.shape[1:], generator=generator)
            if self.gumbel is not None:
                exponential = torch.empty(self.gumbel.shape[1:]).exponential_(generator=generator)
                self.gumbel[row] = -exponential.log()
            if self.given:
                probs, ids = self.given[i]
                self.budget[row] = len(ids)
                self.other_probs[row, :len(ids)], self.other_ids[row, :len(ids)] = probs.to(self.device), ids.to(self.device)

    def _step(self, longest: int) -> None:
        """Every row reads its next token, whatever that is. `longest`: no row has read more with it. Nobody waits for the GPU."""
        s, E = self.settings, self.model.embed_tokens.weight
        logits = (self.hidden @ self.model.head.T).float()
        wants_to_end = logits.argmax(-1) == self.end_think[0] if not self.given else torch.zeros_like(self.active)
        self.thinking &= ~wants_to_end & (self.num_latents < self.budget)
        thinking = self.active & self.thinking
        closing = self.active & ~self.thinking & (self.closed < len(self.end_think))
        answering = self.active & ~thinking & ~closing

        at = self.rows, self.num_tokens.clamp(max=s.max_new_tokens - 1)
        sampled = pick(logits, self.uniform[at], s.temperature, s.top_p)
        token = torch.where(closing, self.end_think[self.closed.clamp(max=len(self.end_think) - 1)], sampled)
        inputs_embeds = E[token]
        if s.thinking == "latent":
            place = self.rows, self.num_latents.clamp(max=self.probs.shape[1] - 1)
            probs, ids = self._latent(logits, place)
            inputs_embeds = torch.where(thinking[:, None], latents.superpose(probs, ids, E), inputs_embeds)
            if ids is None:
                probs, ids = probs.topk(self.ids.shape[-1])
            for kept, new in ((self.probs, probs), (self.ids, ids)):
                kept[place] = torch.where(thinking[:, None], new, kept[place])
        self.tokens[at] = torch.where(answering, sampled, self.tokens[at])
        self.closed += closing
        self.num_latents += thinking
        self.num_tokens += answering
        self.active &= ~(answering & ((sampled == self.end_of_turn) | (self.num_tokens == s.max_new_tokens)))
        position_ids = self.cache.lengths.clone()
        self.hidden = self.model(inputs_embeds, position_ids, self.cache.decode(self.active, longest))

    def _latent(self, logits, place):
        """(probs, ids) of what each row would think next; `place` is where a row's given or random tokens lie."""
        s = self.settings
        if self.given:
            return self.other_probs[place], self.other_ids[place]
        probs, ids = latents.top_probs(logits, SHOWN if s.latents == "random" and not s.top_k else s.top_k)
        if s.noise:
            noisy, ends = latents.perturb(probs, ids, self.gumbel[place], self.end_think[0], s.noise, s.noise_temperature)
            probs = torch.where(ends[:, None], probs, noisy)  # </think> is never thought
        if s.latents == "random":
            ids = self.other_ids[place]
        elif s.latents == "argmax":
            probs = torch.zeros_like(probs).scatter(-1, probs.argmax(-1, keepdim=True), 1.0)
        return probs, ids

    def _result(self, row: int) -> Result:
        n, tokens = int(self.num_latents[row]), self.tokens[row, :int(self.num_tokens[row])].tolist()
        finished = tokens[-1:] == [self.end_of_turn]
        probs, ids = (x[row, :n].cpu().clone() for x in (self.probs, self.ids))
        return Result(probs, ids, tokens[:-1] if finished else tokens, finished)


def generate(model: Model, tokenizer: Tokenizer, problems: list[str], settings: Sampling, batch_size: int = 64,
             numbers=None, progress=lambda i, result: None, given=None, watch=None) -> list[Result]:
    """Thinks about and answers each problem; results in order. The other arguments are those of Sampler.generate."""
    end_think = tokenizer.end_think + (tokenizer.encode(OPENING) if settings.forced else [])
    sampler = Sampler(model, end_think, tokenizer.end_of_turn, settings, batch_size)
    return sampler.generate([tokenizer.prompt(p) for p in problems], numbers, progress, given, watch)


def add_sampling_arguments(p) -> None:
    p.add_argument("--model", required=True, help="checkpoint directory or run")
    p.add_argument("--thinking", choices=["latent", "text", "none"], help="how to reason; default: what the model learned")
    p.add_argument("--top-k", type=at_least(0), help="tokens in a superposition, 0 for all; default: what the model learned")
    p.add_argument("--max-latents", type=at_least(0), default=256, help="latent budget; then </think> is fed")
    p.add_argument("--max-new-tokens", type=at_least(1), default=512, help="budget of sampled tokens")
    p.add_argument("--noise", type=at_least(0, float), default=0.0, help="scale of Gumbel noise on the latents; 0: none")
    p.add_argument("--noise-temperature", type=at_least(0.01, float), default=1.0, help="temperature of the noisy softmax")
    p.add_argument("--temperature", type=at_least(0, float), default=0.6, help="0: greedy")
    p.add_argument("--top-p", type=at_least(1e-6, float), default=0.95, help="share of probability that is sampled from")


def sampling(args, reasons: dict, vocab_size: int) -> Sampling:
    """The settings of a command line, completed by what the model says of itself."""
    top_k = reasons["top_k"] if args.top_k is None else args.top_k
    if top_k > vocab_size:
        raise UserError(f"--top-k {top_k}: the vocabulary has only {vocab_size} tokens")
    if args.noise and not top_k:
        raise UserError("--noise: is for superpositions of the top k tokens, not of all (--top-k 0)")
    return Sampling(args.thinking or reasons["thinking"], top_k, args.max_latents, args.max_new_tokens, args.temperature,
                    args.top_p, args.noise, args.noise_temperature, seed=args.seed)


class Display:
    """Shows one result while it grows: each latent's likeliest tokens with bars for their weights, then the answer."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.latents, self.text = tokenizer, 0, ""

    def __call__(self, i: int, result: Result) -> None:
        for n in range(self.latents, len(result.ids)):
            top = sorted(zip(result.probs[n].tolist(), result.ids[n].tolist()), reverse=True)[:5]
            print(f"{n + 1:4d}  " + "  ".join(f"{self.tokenizer.decode([i])!r} {BARS[min(7, int(8 * p))]}{p:.2f}" for p, i in top))
        text = self.tokenizer.decode(result.tokens).rstrip("\N{REPLACEMENT CHARACTER}")  # half a character may be the last
        print(text[len(self.text):], end="", flush=True)
        self.latents, self.text = len(result.ids), text


def answer(model: Model, tokenizer: Tokenizer, problem: str, settings: Sampling) -> None:
    """Thinks about one problem and answers it, on the screen."""
    display = Display(tokenizer)
    result, = generate(model, tokenizer, [problem], settings, 1, progress=display, watch=display)
    print("" if result.finished else " [budget used up]")


def main():
    p = parser(__doc__)
    add_sampling_arguments(p)
    p.add_argument("--prompt", help="the problem; without it, problems are read from the keyboard, one a line")
    args = p.parse_args()
    _, _, device = start(args.device)
    model, tokenizer, reasons = load_model(args.model, device, base_dtype(device))
    settings = sampling(args, reasons, model.config.vocab_size)
    if args.prompt is not None:
        if not args.prompt.strip():
            raise UserError("--prompt: the problem is empty")
        answer(model, tokenizer, args.prompt, settings)
        return
    while True:
        try:
            problem = input("problem> ")
        except EOFError:
            print()
            return
        if problem.strip():
            answer(model, tokenizer, problem, settings)
            settings = replace(settings, seed=settings.seed + 1)


if __name__ == "__main__":
    run_main(main)
