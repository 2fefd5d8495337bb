"""The superposition sampler, as a library (`Sampler.generate`) and as a command.

    python sample.py --model runs/latent --prompt "If 3 pens cost 6 dollars, what do 7 cost?"

A sequence reads Q <think>. While it thinks, it feeds itself superpositions. Then it reads all of
</think> and samples its answer. One device step serves all sequences of a batch; the host decides
what each reads next.
"""

import lib.errors  # noqa: F401  from here on an error is one line

from collections import deque
from functools import partial

import numpy as np
import torch

from attention import KVCache
from data import Example, pack_examples, to_device
from latents import add_noise, superpose, top_probs
from lib.cli import Count, Positive, Share, parse, settings
from lib.errors import UserError
from lib.fast import recorded
from lib.run import join
from load_hf_weights import load_model
from masks import BLOCK

PREFILL = 2**14  # tokens of prompts that are read at a time
SHOWN = 10  # tokens of a full-vocabulary latent that a result keeps
DONE, THOUGHT = -2, -1  # what a sequence reads next, if not a token
GREEDY = 1e-4  # below this temperature the most likely token is taken
# With one sequence, reading weights dominates: tuned and merged kernels pay.
ONE_SLOT = {"options": {"coordinate_descent_tuning": True, "combo_kernels": True}}


@settings
class SamplingParams:
    model: str  # checkpoint directory or run
    max_latents: int = 256  # latent budget; then </think> is fed
    max_new_tokens: Count = 512  # budget of sampled tokens
    temperature: float = 0.6  # 0: greedy
    top_p: Share = 0.95  # share of the probability that is sampled from
    noise: float = 0.0  # scale of the Gumbel noise on the latents
    noise_temperature: Positive = 1.0  # temperature of the noisy softmax
    seed: int = 1  # of every random choice
    device: str = ""  # cpu, cuda or cuda:N; default: a GPU if there is one


@settings
class Settings(SamplingParams):
    prompt: tuple[str, ...]  # one problem, or several


class Sequence:
    """Where one prompt is: it thinks, then closes (reads </think>), then answers.

    latents: numpy (probs float32 [k], ids int64 [k]) of each that it read, likeliest token first.
    tokens: what it sampled, without the end-of-turn token. finished: that token came in time.
    """

    def __init__(self, prompt, number, sampler):
        self.prompt, self.number, self.sampler = prompt, number, sampler
        self.thinks = sampler.thinking == "latent"
        self.closing = [] if sampler.thinking == "text" else [*sampler.end_think]
        self.rng = np.random.default_rng((sampler.params.seed, number))  # of noise and arms
        self.latents, self.tokens, self.finished = [], [], False

    def advance(self, token, top, latent):
        """What it reads next: a token, THOUGHT or DONE.

        token: the id that was sampled. top: the most likely id. latent: the superposition, (probs
        [k], ids [k]). Thinking ends where the first token of </think> is most likely, or at the
        budget.
        """
        p = self.sampler.params
        stop = self.sampler.end_think[0]
        if self.thinks and top != stop and len(self.latents) < p.max_latents:
            self.latents.append(latent)
            return THOUGHT
        self.thinks = False
        if self.closing:
            return self.closing.pop(0)
        self.finished = token == self.sampler.end_of_turn
        if self.finished:
            return DONE
        self.tokens.append(token)
        return DONE if len(self.tokens) >= p.max_new_tokens else token


def pick(logits, uniform, temperature, top_p):
    """A token id [B] from each row of logits [B, V]: the quantile `uniform` [B] of the nucleus.

    The nucleus is the smallest set of most likely tokens that holds `top_p` of the probability.
    """
    probs, ids = (logits / temperature).softmax(-1).sort(-1, descending=True)
    cumulative = probs.cumsum(-1)
    nucleus = cumulative - probs < top_p
    total = (cumulative * nucleus).amax(-1, keepdim=True)
    place = (nucleus & (cumulative < uniform[:, None] * total)).sum(-1, keepdim=True)
    return ids.gather(-1, place).squeeze(-1)


class Sampler:
    """Up to `batch_size` sequences side by side; a finished one's slot goes to the next prompt.

    ends: the ids that are fed when thinking ends, and the end-of-turn id. replace(sequence,
    probs, ids): an intervention. It gets a latent, numpy (probs [k], ids [k]), and returns what is
    fed instead. The default is the noise.
    """

    def __init__(self, model, reasoning, ends, params, batch_size=1, replace=None):
        self.model, self.device, self.cache = model, model.head.device, None
        self.params, self.batch_size, self.k = params, batch_size, reasoning.top_k
        self.thinking = reasoning.thinking
        self.end_think, self.end_of_turn = ends
        self.replace = replace or (self.noisy if params.noise else None)
        if self.k == 0 and self.replace:
            raise UserError("latents of the full vocabulary (top_k = 0) cannot be replaced")

    def noisy(self, sequence, probs, ids):
        p = self.params
        noise = torch.from_numpy(sequence.rng.gumbel(size=len(probs)))
        alpha = torch.from_numpy(probs), torch.from_numpy(ids)
        probs = add_noise(*alpha, noise, self.end_think[0], p.noise, p.noise_temperature).numpy()
        order = (-probs).argsort()
        return probs[order], ids[order]

    @torch.no_grad()
    def generate(self, prompts, numbers=None, watch=None):
        """Yields (number, Sequence) of each prompt (ids of Q <think>) as it ends.

        A prompt's random numbers depend on the seed and its number (its place, or `numbers`), not
        on the batch. After each step watch(sequence) is called with each unfinished one.
        """
        numbers = numbers or range(len(prompts))
        running = {}
        waiting = deque(Sequence(*x, self) for x in zip(prompts, numbers))
        self.prepare(prompts)
        while waiting or running:
            free = [slot for slot in range(len(self.token)) if slot not in running]
            if new := {slot: waiting.popleft() for slot in free[: len(waiting)]}:
                self._read(new)
                running |= new
            reads = self._advance(running)
            for slot in [slot for slot in running if reads[slot] == DONE]:
                s = running.pop(slot)
                yield s.number, s
            for s in running.values() if watch else ():
                watch(s)
            if running:
                self.token.copy_(torch.tensor(reads))
                self.step()

    def _advance(self, running):
        """Lets each sequence decide. Returns what each slot reads next."""
        reads = [DONE] * len(self.token)
        proposed = self.proposed.tolist()
        probs, ids = (x.cpu().numpy().copy() for x in (self.probs, self.ids))
        for slot, s in running.items():
            reads[slot] = s.advance(*proposed[slot], (probs[slot], ids[slot]))
            if self.replace and reads[slot] == THOUGHT:  # the one place where a latent is replaced
                probs[slot], ids[slot] = self.replace(s, probs[slot], ids[slot])
                s.latents[-1] = probs[slot], ids[slot]
        if self.replace:
            alpha = (torch.from_numpy(x).to(self.device) for x in (probs, ids))
            self.z.copy_(superpose(*alpha, self.model.embed_tokens.weight))
        return reads

    @torch.no_grad()
    def prepare(self, prompts):
        """Memory for `batch_size` slots. A GPU compiles and records its step here.

        The memory of an earlier call is kept if it is large enough.
        """
        p, device, model = self.params, self.device, self.model
        longest = max(map(len, prompts), default=0) + len(self.end_think)
        length = -(-(longest + p.max_latents + p.max_new_tokens) // BLOCK) * BLOCK
        B = min(self.batch_size, len(prompts))
        if not prompts or self.cache and self.cache.kv.shape[-2] >= length and len(self.token) >= B:
            return
        self.cache = None
        self.cache = KVCache(model.config, B, length, device, model.head.dtype)
        zeros = partial(torch.zeros, device=device)
        whole = partial(zeros, dtype=torch.long)
        self.slots = torch.arange(B, device=device)
        self.token = whole(B) + DONE
        self.proposed = whole(B, 2)  # the token that each would say, and its most likely one
        self.uniform = zeros(B, length)  # a random number for each position
        k = self.k or SHOWN
        self.probs, self.ids = zeros(B, k), whole(B, k)
        self.z = model.head.new_zeros(B, model.config.hidden_size)  # what they would think
        self.step = self._step
        if device.type == "cuda":
            model.compile_layers(**(ONE_SLOT if B == 1 else {}))
            self.step = recorded(self._step)  # slots that are done change nothing

    def _read(self, new):
        """Reads the prompts of new sequences into their slots."""
        longest = max(len(s.prompt) for s in new.values())
        for part in torch.tensor([*new]).split(max(1, PREFILL // longest)):
            sequences = [new[slot] for slot in part.tolist()]
            slots = part.to(self.device)
            if self.params.temperature >= GREEDY:
                rngs = (np.random.default_rng((self.params.seed, s.number, 1)) for s in sequences)
                draws = [rng.random(self.uniform.shape[1], dtype=np.float32) for rng in rngs]
                self.uniform[slots] = torch.from_numpy(np.stack(draws)).to(self.device)
            examples = [Example(s.prompt, [], [], []) for s in sequences]
            packed = to_device(pack_examples("cot", examples), self.device)
            with torch.compiler.set_stance("force_eager"):  # ever new lengths
                attend = self.cache.prefill(slots, packed.labels, packed.position_ids)
                x = self.model.embed_tokens(packed.ids)
                h = self.model(x, packed.position_ids, attend)
            self._propose(h[packed.labels.starts[1:].long() - 1], slots)

    def _step(self):
        """Every slot reads `token`: a token, the latent that it made last, or nothing."""
        x = self.model.embed_tokens(self.token.clamp(0))
        x = torch.where((self.token == THOUGHT)[:, None], self.z, x)
        position_ids = self.cache.lengths.clone()  # decode() advances the lengths
        attend = self.cache.decode(self.token != DONE)
        self._propose(self.model(x, position_ids, attend), self.slots)

    def _propose(self, h, slots):
        """What `slots` would think and say next, from their last hidden states [n, hidden_size]."""
        p = self.params
        logits = h @ self.model.head.T
        probs, ids = top_probs(logits, self.k)
        if self.thinking == "latent":
            self.z[slots] = superpose(probs, ids, self.model.embed_tokens.weight)
        if self.k == 0:
            probs, ids = probs.topk(self.ids.shape[1])
        token = ids[:, 0]
        self.probs[slots], self.ids[slots] = probs.float(), ids
        if p.temperature >= GREEDY:
            uniform = self.uniform[slots, self.cache.lengths[slots]]
            token = pick(logits.float(), uniform, p.temperature, p.top_p)
        self.proposed[slots] = torch.stack((token, ids[:, 0]), dim=1)


class Display:
    """Prints a sequence as it grows: each latent's tokens with their weights, then the answer."""

    def __init__(self, tokenizer):
        self.decode, self.latents, self.text = tokenizer.decode, 0, ""

    def __call__(self, sequence):
        for n, (probs, ids) in enumerate(sequence.latents[self.latents :], self.latents + 1):
            words = (f"{self.decode([i])!r} {p:.2f}" for p, i in zip(probs[:3], ids))
            print(f"{n:4d}  " + "  ".join(words))
        text = self.decode(sequence.tokens).rstrip("\N{REPLACEMENT CHARACTER}")
        print(text[len(self.text) :], end="", flush=True)
        self.latents, self.text = len(sequence.latents), text


def main():
    s = parse(Settings, __doc__)
    process = join(s.device)
    model, tokenizer, reasoning = load_model(s.model, process.device, process.dtype)
    sampler = Sampler(model, reasoning, (tokenizer.end_think, tokenizer.end_of_turn), s)
    for number, problem in enumerate(s.prompt if process.main else ()):
        show = Display(tokenizer)
        for _, sequence in sampler.generate([tokenizer.prompt(problem)], [number], show):
            show(sequence)
            print("" if sequence.finished else " [budget used up]")


if __name__ == "__main__":
    main()
