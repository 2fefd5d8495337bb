"""The superposition sampler, as a library (`Sampler.generate`) and as a command.

    python sample.py --model runs/latent --prompt "If 3 pens cost 6 dollars, what do 7 cost?"
    python sample.py --model runs/latent                       # asks for problems

A sequence reads Q <think>. While it thinks, it feeds itself superpositions. Then it reads all of
</think> and samples its answer. One device step serves all sequences of a batch; the host decides
what each reads next.
"""

import lib.errors  # noqa: F401  from here on an error is one line

from collections import deque
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from attention import BLOCK, KVCache
from data import Example, distribute, pack_examples, to_device
from latents import add_noise, gumbel_like, superpose
from lib.cli import one_of, parse
from lib.errors import UserError
from lib.fast import recorded
from lib.run import free_memory, join
from load_hf_weights import base_dtype, load_model

PREFILL = 2**14  # tokens of prompts that are read at a time
SHOWN = 10  # tokens of a full-vocabulary latent that a result keeps
DONE, LATENT = -2, -1  # what a sequence reads next, if not a token
GREEDY = 1e-4  # below this temperature the most likely token is taken
# Of one row all products read weights only: tuned kernels, and small ones joined, pay.
ONE_ROW = {"options": {"coordinate_descent_tuning": True, "combo_kernels": True}}
BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    model: str  # checkpoint directory or run
    thinking: one_of("", "latent", "text", "none") = ""  # how to reason; default: as it learned
    top_k: int = -1  # tokens in a superposition, 0 for all; -1: as it learned
    max_latents: int = 256  # latent budget; then </think> is fed
    max_new_tokens: int = 512  # budget of sampled tokens
    temperature: float = 0.6  # 0: greedy
    top_p: float = 0.95  # share of the probability that is sampled from
    noise: float = 0.0  # scale of the Gumbel noise on the latents
    noise_temperature: float = 1.0  # temperature of the noisy softmax
    seed: int = 1  # of every random choice
    device: str = ""  # cpu, cuda or cuda:N; default: a GPU if there is one


@dataclass(frozen=True, kw_only=True)
class Settings(SamplingParams):
    prompt: str = ""  # the problem; without it, problems are read from the keyboard, one a line


@dataclass
class Result:
    """probs, ids: [n, k], the latents that were fed, the most likely token first.

    tokens: what was sampled, without the end-of-turn token. finished: that token came in time.
    """

    probs: torch.Tensor
    ids: torch.Tensor
    tokens: list[int]
    finished: bool


class Sequence:
    """Where one prompt is: it thinks, then closes (reads </think>), then answers."""

    def __init__(self, index, prompt, number, params, end_think, end_of_turn):
        self.index, self.prompt, self.number, self.params = index, prompt, number, params
        self.stop, self.end_of_turn = end_think[0], end_of_turn
        self.thinking = params.thinking == "latent"
        self.closing = [] if params.thinking == "text" else list(end_think)
        self.generator = torch.Generator().manual_seed(hash((params.seed, number)))
        self.uniform = torch.rand(params.max_new_tokens, generator=self.generator).tolist()
        self.latents, self.tokens = [], []

    def advance(self, token, top, latent):
        """What it reads next: a token, LATENT or DONE.

        The model would say `token`; `top` is the most likely one. It would think `latent`. Thinking
        ends where the first token of </think> is most likely, or at the budget.
        """
        if self.thinking and top != self.stop and len(self.latents) < self.params.max_latents:
            self.latents.append(latent)
            return LATENT
        self.thinking = False
        if self.closing:
            return self.closing.pop(0)
        self.tokens.append(token)
        done = token == self.end_of_turn or len(self.tokens) >= self.params.max_new_tokens
        return DONE if done else token

    def result(self, k):
        """What it has so far; k: the width of its latents."""
        latents = torch.tensor(np.array(self.latents, np.int32).reshape(-1, 2 * k))
        finished = self.tokens[-1:] == [self.end_of_turn]
        tokens = self.tokens[: len(self.tokens) - finished]
        return Result(latents[:, k:].view(torch.float32), latents[:, :k].long(), tokens, finished)


def pick(logits, uniform, temperature, top_p):
    """A token id [B] from each row of logits [B, V]: the quantile `uniform` [B] of the nucleus.

    The nucleus is the smallest set of most likely tokens that holds `top_p` of the probability.
    """
    probs, ids = (logits / temperature).softmax(-1).sort(-1, descending=True)
    cumulative = probs.cumsum(-1)
    outside = cumulative - probs >= top_p
    cumulative = cumulative.masked_fill(outside, 0).cummax(-1).values  # flat behind the nucleus
    place = (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(-1, keepdim=True)
    return ids.gather(-1, place.clamp(max=probs.shape[-1] - 1)).squeeze(-1)


class Sampler:
    """Up to `batch_size` sequences side by side; a finished one's row goes to the next prompt.

    end_think: the tokens that are fed when thinking ends. replace(sequence, probs [k], ids [k]):
    an intervention, (probs, ids) of what is fed instead of a latent.
    """

    def __init__(self, model, end_think, end_of_turn, params, batch_size=1, replace=None):
        self.model, self.params, self.batch_size, self.replace = model, params, batch_size, replace
        self.ends, self.device, self.cache = (end_think, end_of_turn), model.head.device, None
        self.k = params.top_k or min(SHOWN, len(model.head))  # of a result
        if params.top_k == 0 and (params.noise or replace):
            raise UserError("--top-k 0: noise and other latents need a superposition of few tokens")

    @torch.no_grad()
    def generate(self, prompts, numbers=None, done=None, watch=None):
        """A Result for each prompt (ids of Q <think>), in order.

        A prompt's random numbers depend on the seed and its number (its place, or `numbers`), not
        on the batch. done(i, result) is called as each one ends, watch(i, result) after each step
        with the unfinished ones.
        """
        results, running = [None] * len(prompts), {}
        if prompts:
            self.prepare(prompts)
        each = zip(range(len(prompts)), prompts, numbers or range(len(prompts)))
        waiting = deque(Sequence(*x, self.params, *self.ends) for x in each)
        while waiting or running:
            free = [row for row in range(len(self.token)) if row not in running]
            new = {row: waiting.popleft() for row in free[: len(waiting)]}
            self._read(new)
            running |= new
            reads = self._advance(running)
            for row in [row for row in running if reads[row] == DONE]:
                s = running.pop(row)
                results[s.index] = s.result(self.k)
                if done:
                    done(s.index, results[s.index])
            for s in running.values() if watch else ():
                watch(s.index, s.result(self.k))
            if running:
                self.token.copy_(torch.from_numpy(reads))
                self._draw(running)
                self.step()
        return results

    def _advance(self, running):
        """Lets each sequence decide. Returns what each row reads next, int64 [B]."""
        out = self.out.to("cpu", copy=True).numpy()
        tokens, tops, reads = out[:, 0].tolist(), out[:, 1].tolist(), np.full(len(out), DONE)
        for row, s in running.items():
            reads[row] = s.advance(tokens[row], tops[row], out[row, 1:])
            if reads[row] == LATENT and (self.replace or self.params.noise):
                self.probs[row], self.ids[row] = self._replaced(s)
        return reads

    def _replaced(self, s):
        """The one place where a latent is replaced: the last one of a sequence."""
        p, latent = self.params, torch.from_numpy(s.latents[-1])
        probs, ids = latent[self.k :].view(torch.float32), latent[: self.k].long()
        if p.noise:
            noise = gumbel_like(probs, s.generator), s.stop, p.noise, p.noise_temperature
            probs = add_noise(probs, ids, *noise)
        if self.replace:
            probs, ids = self.replace(s, probs, ids)
        probs, order = probs.sort(descending=True)
        latent.copy_(torch.cat([ids[order].int(), probs.view(torch.int32)]))
        return probs, ids[order]

    @torch.no_grad()
    def prepare(self, prompts):
        """Memory for as many rows as are wanted and fit. A GPU compiles and records its step here.

        What is there from before is kept if it will do.
        """
        p, device, model, k = self.params, self.device, self.model, self.k
        longest = max(map(len, prompts)) + p.max_latents + len(self.ends[0]) + p.max_new_tokens
        length = -(-longest // BLOCK) * BLOCK
        if self.cache and self.cache.kv.shape[-2] >= length:
            return
        self.cache, dtype = None, model.head.dtype
        fitting = 0.8 * free_memory(device) / KVCache.bytes_per_row(model.config, length, dtype)
        B = int(max(1, min(self.batch_size, len(prompts), fitting)))
        self.cache = KVCache(model.config, B, length, device, dtype)
        zeros = partial(torch.zeros, device=device)
        self.token, self.uniform = zeros(B, dtype=torch.long) + DONE, zeros(B)
        self.probs = zeros(B, p.top_k or len(model.head))
        self.ids = zeros(B, p.top_k, dtype=torch.long)
        self.out = zeros(B, 1 + 2 * k, dtype=torch.int32)
        self.step = self._step
        if device.type == "cuda":
            model.compile_layers(**(ONE_ROW if B == 1 else {}))
            self.step = recorded(self._step)  # rows that are done change nothing

    def _read(self, new):
        """Reads the prompts of new sequences into their rows."""
        self._draw(new)
        rows, lengths = [*new], [len(s.prompt) for s in new.values()]
        for part in distribute(lengths, 1, max(PREFILL, *lengths), len(rows)) if new else ():
            examples = [Example(new[rows[i]].prompt, [], [], []) for i in part]
            packed = to_device(pack_examples("cot", examples), self.device)
            at = torch.tensor([rows[i] for i in part], device=self.device)
            with torch.compiler.set_stance("force_eager"):  # ever new lengths
                attend = self.cache.prefill(at, packed.labels, packed.position_ids)
                x = self.model.embed_tokens(packed.ids)
                h = self.model(x, packed.position_ids, attend)
            self._look(h[packed.labels.starts[1:].long() - 1], at)

    def _draw(self, sequences):
        """Sends the random numbers that choose the next tokens."""
        if self.params.temperature >= GREEDY:
            uniform = np.zeros(len(self.uniform), np.float32)
            for row, s in sequences.items():
                uniform[row] = s.uniform[len(s.tokens)]
            self.uniform.copy_(torch.from_numpy(uniform))

    def _step(self):
        """Every row reads `token`: a token, the latent that it made last, or nothing."""
        E, p = self.model.embed_tokens.weight, self.params
        x = E[self.token.clamp(min=0)]
        if p.thinking == "latent":
            z = superpose(self.probs, self.ids if p.top_k else None, E)
            x = torch.where((self.token == LATENT)[:, None], z, x)
        position_ids, attend = self.cache.lengths.clone(), self.cache.decode(self.token != DONE)
        self._look(self.model(x, position_ids, attend), slice(None))

    def _look(self, h, rows):
        """What `rows` would think and say next, from their last hidden states [n, hidden_size]."""
        p, logits = self.params, h @ self.model.head.T
        top, ids = logits.topk(self.k)
        token, probs = ids[:, :1], (top if p.top_k else logits).float().softmax(-1)
        self.probs[rows], self.ids[rows] = probs, ids[:, : p.top_k]
        probs = probs if p.top_k else probs.gather(-1, ids)
        if p.temperature >= GREEDY:
            token = pick(logits.float(), self.uniform[rows], p.temperature, p.top_p)[:, None]
        self.out[rows] = torch.cat([token.int(), ids.int(), probs.view(torch.int32)], dim=1)


def complete(params, reasoning):
    """`params` with what they leave to the model."""
    top_k = reasoning.top_k if params.top_k < 0 else params.top_k
    return replace(params, thinking=params.thinking or reasoning.thinking, top_k=top_k)


class Display:
    """Prints a result as it grows: each latent's tokens with bars, then the answer."""

    def __init__(self, tokenizer):
        self.decode, self.latents, self.text = tokenizer.decode, 0, ""

    def __call__(self, i, result):
        for n in range(self.latents, len(result.ids)):
            top = list(zip(result.probs[n].tolist(), result.ids[n].tolist()))[:5]
            words = (f"{self.decode([t])!r} {BARS[min(7, int(8 * p))]}{p:.2f}" for p, t in top)
            print(f"{n + 1:4d}  " + "  ".join(words))
        text = self.decode(result.tokens).rstrip("\N{REPLACEMENT CHARACTER}")
        print(text[len(self.text) :], end="", flush=True)
        self.latents, self.text = len(result.ids), text


def answer(sampler, tokenizer, problem, number=0):
    """Thinks about one problem and answers it, on the screen."""
    show = Display(tokenizer)
    (result,) = sampler.generate([tokenizer.prompt(problem)], [number], show, show)
    print("" if result.finished else " [budget used up]")


def typed():
    """The lines that a user types."""
    while True:
        try:
            yield input("problem> ")
        except EOFError:
            return print()


def main():
    s = parse(Settings, __doc__)
    process = join(s.device)
    model, tokenizer, reasoning = load_model(s.model, process.device, base_dtype(process.device))
    ends = tokenizer.end_think, tokenizer.end_of_turn
    sampler = Sampler(model, *ends, complete(s, reasoning))
    for number, problem in enumerate([s.prompt] if s.prompt else typed()):
        if process.main and problem.strip():
            answer(sampler, tokenizer, problem, number)


if __name__ == "__main__":
    main()
