"""The superposition sampler, as a library (`generate`) and a command.

    python sample.py --model runs/latent --prompt "If 3 pens cost 6 dollars, what do 7 cost?"
    python sample.py --model runs/latent                                  # asks for problems

A row reads Q <think>, feeds itself top-k superpositions while it thinks, then all of </think>, then samples its answer; all
rows do whatever is theirs to do in the same step, on one KV cache. See docs/METHOD.md.
"""

from dataclasses import dataclass
import itertools

import torch

from attention import BLOCK, KVCache
from graphs import recorded
import latents
from load_hf_weights import base_dtype, load_model
from masks import PROMPT, Labels
from model import Model
from runs import UserError, at_least, free_memory, fused, parser, run_main, start
from tokenizer import Tokenizer

OPENING = "\\boxed{"  # what a forced answer begins with
PREFILL = 2**14  # tokens of prompts that are read at a time
SHOWN = 10  # tokens of a full-vocabulary latent that are kept in a result
BARS = "▁▂▃▄▅▆▇█"


@dataclass
class Sampling:
    """How to think and answer.

    thinking: "latent", or "text" (the chain is written, as part of the answer), or "none" (</think> at once).
    top_k: tokens in a superposition, 0 for the full vocabulary, latents.HIDDEN to think in hidden states. temperature 0 is
    greedy. noise, noise_temperature: those of latents.perturb while thinking; 0: none. `latents`: "own", or what is fed in the
    place of every latent's own: "random" tokens with the same probabilities, or those that are "given" to `generate`, all of them and
    no others.
    forced: the answer begins with OPENING, which is not in the result. Raises UserError where that does not go together.
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

    def __post_init__(self):
        if self.top_k <= 0 and (self.noise or self.latents in ("random", "given")):
            what = "noise" if self.noise else f"{self.latents} latents"
            raise UserError(f"{what}: for superpositions of the top k tokens; choose another --top-k than {self.top_k}")


@dataclass
class Result:
    """probs float32 [n, k] and ids int64 [n, k]: the n latents that were fed (the SHOWN likeliest tokens if top_k is not positive).

    tokens: what was sampled, without the end-of-turn token. finished: whether that token came within the budget.
    """
    probs: torch.Tensor
    ids: torch.Tensor
    tokens: list[int]
    finished: bool


@dataclass
class State:
    """Where each of B rows is, and what it has thought and said; closed: how many tokens of </think> it has read."""
    active: torch.Tensor  # bool [B], as thinking
    thinking: torch.Tensor
    closed: torch.Tensor  # int64 [B], as those to come
    num_latents: torch.Tensor
    num_tokens: torch.Tensor
    budget: torch.Tensor  # of latents
    probs: torch.Tensor  # [B, more than the largest budget, k], as ids
    ids: torch.Tensor
    tokens: torch.Tensor  # [B, max_new_tokens]

    def latent_at(self):
        """Where in `probs` and `ids` a row's next latent lies; the last place is nobody's."""
        return torch.arange(len(self.budget), device=self.budget.device), self.num_latents.clamp(max=self.probs.shape[1] - 1)

    def token_at(self):
        return torch.arange(len(self.budget), device=self.budget.device), self.num_tokens.clamp(max=self.tokens.shape[1] - 1)


def _turn(rows: State, likeliest, sampled, probs, ids, z, E, stop, end_think, end_of_turn: int) -> torch.Tensor:
    """What each row reads next, [B, hidden_size], noted in `rows`: a latent (probs, ids), a token of </think>, or what it says.

    Thinking ends where the token `stop` is the likeliest [B]; `sampled` [B] is what a row would say. probs None: nobody thinks.
    z: what is fed for a latent, if not its superposition.
    """
    rows.thinking &= (likeliest != stop) & (rows.num_latents < rows.budget)
    thinks = rows.active & rows.thinking
    closes = rows.active & ~rows.thinking & (rows.closed < len(end_think))
    says = rows.active & ~rows.thinking & ~closes
    inputs_embeds = E[torch.where(closes, end_think[rows.closed.clamp(max=len(end_think) - 1)], sampled)]
    if probs is not None:
        inputs_embeds = torch.where(thinks[:, None], latents.superpose(probs, ids, E) if z is None else z, inputs_embeds)
        if ids is None:
            probs, ids = probs.topk(rows.ids.shape[-1])
        at = rows.latent_at()
        rows.probs[at] = torch.where(thinks[:, None], probs, rows.probs[at])
        rows.ids[at] = torch.where(thinks[:, None], ids, rows.ids[at])
    at = rows.token_at()
    rows.tokens[at] = torch.where(says, sampled, rows.tokens[at])
    rows.closed += closes
    rows.num_latents += thinks
    rows.num_tokens += says
    rows.active &= ~(says & ((sampled == end_of_turn) | (rows.num_tokens == rows.tokens.shape[1])))
    return inputs_embeds


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
        self.stop = self.end_think[0] if settings.latents != "given" else self.end_think.new_tensor(-1)  # ends thinking
        self.shown = settings.top_k if settings.top_k > 0 else min(SHOWN, model.config.vocab_size)
        self.steps = 16 if self.device.type == "cuda" else 1  # between two looks at who has finished: a look waits for the GPU
        self.room = self.replay = None

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], numbers=None, progress=lambda i, result: None, given=None,
                 watch=None) -> list[Result]:
        """A Result for each prompt (ids of Q <think>), in order; `progress(i, result)` is called as each one ends.

        A prompt's random numbers depend on the seed and its number (its place in the list, or `numbers`), not on the batch
        it runs in. `given`: the latents (probs [n, k], ids [n, k]) of each prompt, where the settings ask for it.
        `watch(i, result)` is called with the unfinished results, again and again.
        """
        if not prompts:
            return []
        s, results, numbers = self.settings, [None] * len(prompts), range(len(prompts)) if numbers is None else numbers
        self.make_room(prompts, given)
        self.state.active.zero_()
        running, waiting = {}, list(range(len(prompts)))[::-1]  # running: row -> [place of its prompt, tokens read]

        while waiting or running:
            free = [row for row in range(len(self.state.active)) if row not in running]
            while free and waiting:
                fresh, tokens = {}, 0
                while free and waiting and (not fresh or tokens + len(prompts[waiting[-1]]) <= PREFILL):
                    fresh[free.pop()] = i = waiting.pop()
                    tokens += len(prompts[i])
                self._admit(list(fresh), [prompts[i] for i in fresh.values()], [numbers[i] for i in fresh.values()],
                            [given[i] for i in fresh.values()] if s.latents == "given" else None)
                running |= {row: [i, len(prompts[i])] for row, i in fresh.items()}
            for _ in range(self.steps):
                self.replay() if self.replay else self._step(max(read for _, read in running.values()) + 1)
                for state in running.values():
                    state[1] += 1
            active = self.state.active.tolist()
            finished = [row for row in running if not active[row]]
            for row, result in zip(finished, self._results(finished)) if finished else ():
                i, _ = running.pop(row)
                results[i] = result
                progress(i, result)
            for row, result in zip(running, self._results(list(running))) if watch else ():
                watch(running[row][0], result)
        return results

    @torch.no_grad()
    def make_room(self, prompts: list[list[int]], given=None) -> None:
        """Cache and state for as many rows as are wanted and fit, others wait; what is there from before is kept if it will do.

        On a GPU a step is compiled and recorded here. `generate` does it anyway; call it first where time is taken.
        """
        s, config, dtype, wanted = self.settings, self.model.config, self.model.embed_tokens.weight.dtype, min(self.batch_size, len(prompts))
        thoughts = max(len(ids) for _, ids in given) if s.latents == "given" else s.max_latents if s.thinking == "latent" else 0
        length = -(-(max(map(len, prompts)) + thoughts + len(self.end_think) + s.max_new_tokens + self.steps) // BLOCK) * BLOCK
        if self.room and self.room[0] == wanted and self.room[1] >= length and self.room[2] >= thoughts:
            return
        self.room, self.cache, self.replay = (wanted, length, thoughts), None, None
        fitting = 0.8 * free_memory(self.device) / KVCache.bytes_per_row(config, length, dtype)
        B, k = max(1, int(min(wanted, fitting))), self.shown
        self.cache = KVCache(config, B, length, self.device, dtype)
        zeros = lambda *shape, dtype=torch.long: torch.zeros(B, *shape, dtype=dtype, device=self.device)
        self.state = State(zeros(dtype=torch.bool), zeros(dtype=torch.bool), zeros(), zeros(), zeros(), zeros(),
                           zeros(thoughts + 1, k, dtype=torch.float32), zeros(thoughts + 1, k), zeros(s.max_new_tokens))
        self.uniform = zeros(s.max_new_tokens, dtype=torch.float32)
        self.gumbel = zeros(thoughts + 1, k, dtype=torch.float32) if s.noise else None
        self.other_probs = zeros(thoughts + 1, k, dtype=torch.float32) if s.latents == "given" else None
        self.other_ids = zeros(thoughts + 1, k) if s.latents in ("given", "random") else None
        self.hidden = zeros(config.hidden_size, dtype=dtype)
        if self.device.type == "cuda":  # steps of no active row change nothing
            self.replay = recorded(lambda: self._step(length))

    def _admit(self, rows: list[int], prompts: list[list[int]], numbers: list[int], given) -> None:
        """Reads `prompts` into the cache's `rows`, leaves their last hidden states in self.hidden."""
        s, lengths, send = self.settings, [len(p) for p in prompts], lambda x: torch.as_tensor(x).to(self.device)
        rows, sizes, ids = send(rows), send(lengths), send([t for p in prompts for t in p])
        document = torch.arange(len(rows), device=self.device).repeat_interleave(sizes)
        position_ids = torch.arange(len(ids), device=self.device) - (sizes.cumsum(0) - sizes)[document]
        labels = Labels(document, torch.full_like(document, PROMPT), torch.zeros_like(document), len(lengths), max(lengths))
        with torch.compiler.set_stance("force_eager"):  # ever new lengths
            h = self.model(self.model.embed_tokens(ids), position_ids, self.cache.prefill(rows, labels, position_ids))
        self.hidden[rows] = h[sizes.cumsum(0) - 1]
        state = self.state
        state.active[rows], state.thinking[rows] = True, s.thinking == "latent"
        state.closed[rows] = len(self.end_think) if s.thinking == "text" else 0
        state.num_latents[rows] = state.num_tokens[rows] = 0
        state.budget[rows] = send([len(ids) for _, ids in given]) if given else s.max_latents

        generators = [torch.Generator().manual_seed(hash((s.seed, number))) for number in numbers]
        draw = lambda function: send(torch.stack([function(g) for g in generators]))
        self.uniform[rows] = draw(lambda g: torch.rand(s.max_new_tokens, generator=g))
        shape = state.probs.shape[1:]
        if s.latents == "random":
            self.other_ids[rows] = draw(lambda g: torch.randint(self.model.config.vocab_size, shape, generator=g))
        if s.noise:
            self.gumbel[rows] = -draw(lambda g: torch.empty(shape).exponential_(generator=g)).log()
        if given:
            for row, (probs, ids) in zip(rows, given):
                self.other_probs[row, :len(ids)], self.other_ids[row, :len(ids)] = send(probs), send(ids)

    def _step(self, longest: int) -> None:
        """Every row reads its next token, whatever that is. `longest`: no row has read more with it. Nobody waits for the GPU."""
        s, state = self.settings, self.state
        logits = (self.hidden @ self.model.head.T).float()
        hidden = s.thinking == "latent" and s.top_k == latents.HIDDEN
        probs, ids = fused(latents.top_probs, logits)(logits, self.shown if hidden else s.top_k) if s.thinking == "latent" else (None, None)
        likeliest = logits.argmax(-1) if ids is None else ids[:, 0]
        sampled = pick(logits, self.uniform[state.token_at()], s.temperature, s.top_p) if s.temperature else likeliest
        probs, ids = self._intervene(probs, ids)
        inputs_embeds = fused(_turn, sampled)(state, likeliest, sampled, probs, ids, self.hidden if hidden else None,
                                              self.model.embed_tokens.weight, self.stop, self.end_think, self.end_of_turn)
        position_ids = self.cache.lengths.clone()  # decode moves on from there
        self.hidden.copy_(self.model(inputs_embeds, position_ids, self.cache.decode(state.active, longest)))

    def _intervene(self, probs, ids):
        """(probs, ids) of what each row is to think, given its own."""
        s, at = self.settings, self.state.latent_at()
        if probs is None:  # nobody thinks
            return probs, ids
        if s.latents == "given":
            return self.other_probs[at], self.other_ids[at]
        if s.noise:
            noisy, ends = latents.perturb(probs, ids, self.gumbel[at], self.end_think[0], s.noise, s.noise_temperature)
            probs = torch.where(ends[:, None], probs, noisy)  # </think> is never thought
        if s.latents == "random":
            ids = self.other_ids[at]
        return probs, ids

    def _results(self, rows: list[int]) -> list[Result]:
        """What these rows have so far."""
        chosen = torch.tensor(rows, dtype=torch.long, device=self.device)
        s, results = self.state, []
        for num_latents, num_tokens, tokens, probs, ids in zip(*(x[chosen].cpu() for x in (s.num_latents, s.num_tokens, s.tokens, s.probs, s.ids))):
            tokens = tokens[:num_tokens].tolist()
            probs, order = probs[:num_latents].sort(descending=True, stable=True)  # noise changes which is the likeliest
            finished = tokens[-1:] == [self.end_of_turn]
            results.append(Result(probs, ids[:num_latents].gather(-1, order), tokens[:-1] if finished else tokens, finished))
        return results


def sampler(model: Model, tokenizer: Tokenizer, settings: Sampling, batch_size: int = 64) -> Sampler:
    end_think = tokenizer.end_think + (tokenizer.encode(OPENING) if settings.forced else [])
    return Sampler(model, end_think, tokenizer.end_of_turn, settings, batch_size)


def generate(model: Model, tokenizer: Tokenizer, problems: list[str], settings: Sampling, batch_size: int = 64,
             **others) -> list[Result]:
    """Thinks about and answers each problem; results in order. `others` are arguments of Sampler.generate."""
    return sampler(model, tokenizer, settings, batch_size).generate([tokenizer.prompt(p) for p in problems], **others)


def add_sampling_arguments(p) -> None:
    p.add_argument("--model", required=True, help="checkpoint directory or run")
    p.add_argument("--thinking", choices=["latent", "text", "none"], help="how to reason; default: what the model learned")
    p.add_argument("--top-k", type=at_least(latents.HIDDEN),
                   help="tokens in a superposition, 0 for all, -1 for hidden states instead; default: what the model learned")
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


def answer(single: Sampler, tokenizer: Tokenizer, problem: str, number: int = 0) -> None:
    """Thinks about one problem and answers it, on the screen; `number` makes its random numbers others than the last one's."""
    display = Display(tokenizer)
    result, = single.generate([tokenizer.prompt(problem)], [number], progress=display, watch=display)
    print("" if result.finished else " [budget used up]")


def main():
    p = parser(__doc__)
    add_sampling_arguments(p)
    p.add_argument("--prompt", help="the problem; without it, problems are read from the keyboard, one a line")
    args = p.parse_args()
    rank, _, device = start(args.device)
    if rank:
        return  # there is one prompt
    model, tokenizer, reasons = load_model(args.model, device, base_dtype(device))
    single = sampler(model, tokenizer, sampling(args, reasons, model.config.vocab_size), 1)
    if args.prompt is not None:
        if not args.prompt.strip():
            raise UserError("--prompt: the problem is empty")
        answer(single, tokenizer, args.prompt)
        return
    for number in itertools.count():
        try:
            problem = input("problem> ")
        except EOFError:
            print()
            return
        except UnicodeDecodeError:
            raise UserError("the problem is not UTF-8; type it anew") from None
        if problem.strip():
            answer(single, tokenizer, problem, number)


if __name__ == "__main__":
    run_main(main)
