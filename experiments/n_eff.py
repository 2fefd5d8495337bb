"""What latents hold: ECR@K, and how many written solutions a chain follows (N_eff).

    python -m experiments.n_eff --model runs/latent --data gsm8k-train.jsonl gsm8k-nl-train.jsonl \\
        --out runs/n_eff

Lets the model think about the problems of the files (training lines). Writes OUT/n_eff.json, the
means, and OUT/n_eff.problems.jsonl, one line a problem. N_eff is for problems for which the
files have two different chains or more; the model's latents are compared with the
latents that the encoder of its phase 1 makes of the chains. See docs/METHOD.md.
"""

import lib.errors  # noqa: F401  from here on an error is one line

from itertools import pairwise
import json

import numpy as np
import torch
from torch.distributions import Categorical
import torch.nn.functional as F
from tqdm import tqdm

from attention import Runner
from data import Example, layout, pack, segments, text_field, to_device, written_chain
from experiments.pipeline import write_jsonl
from latents import superpose
from lib.cli import Count, parse, settings
from lib.errors import UserError
from lib.files import read_json, read_jsonl, reading, write_json
from lib.run import join, output_directory
from load_hf_weights import fingerprint, load_model
from masks import RULES
from sample import Sampler, SamplingParams
from train_phase1 import load_encoder

TOP = 100  # tokens of a latent's distribution that count
DRAWS = 64  # random matchings that N_eff is compared with
ECR = (5, 10, 50)  # the K of ECR@K; the paper reports 50


@settings
class Settings(SamplingParams):
    data: tuple[str, ...]  # training .jsonl files; several may solve the same problems differently
    out: str  # directory of results
    problems: Count = 200  # how many to take, the first ones
    batch_size: Count = 64  # sequences side by side


def load_solutions(paths):
    """{problem: its different chains}, in the order of the files."""
    solutions = {}
    for path in paths:
        for line in read_jsonl(path):
            with reading(line["_place"]):
                if text := written_chain(line).strip():
                    solutions.setdefault(text_field(line, "problem"), {})[text] = ()
    return solutions


def spans_of(tokens, count):
    """The chain `tokens` in `count` spans, as equal as can be."""
    ends = [i * len(tokens) // count for i in range(count + 1)]
    return [tokens[a:b] for a, b in pairwise(ends)]


def greedy_matching(generated, references):
    """For each latent [N, d] in turn the closest (cosine) unused reference of [N, d]."""
    similarity = F.normalize(generated, dim=-1) @ F.normalize(references, dim=-1).T
    matching = []
    for row in similarity:
        row[matching] = -torch.inf
        matching.append(int(row.argmax()))
    return matching


def one_row(name, example, parts, device):
    """One example as a packed row on `device`."""
    return to_device(pack(name, [layout(name, example, parts)]), device)


@torch.no_grad()
def distributions(run, prompt, probs, ids):
    """Of a model that thinks the latents (probs, ids): z [N, hidden_size], and (probs [N, TOP],
    ids [N, TOP]) of its next-token distribution before each, the most likely first."""
    E = run.model.embed_tokens.weight
    row = one_row("latent", Example(prompt, [], [], []), [[0]] * len(probs), E.device)
    z = superpose(probs.to(E.device), ids.to(E.device), E)
    h = run(E[row.ids].index_copy(0, row.latent_index, z.to(E.dtype)), row, RULES["latent"])
    logits = (h[row.latent_index - 1] @ run.model.head.T).float()
    top, top_ids = logits.softmax(-1).topk(min(TOP, len(E)))
    return z.float().cpu(), top.cpu(), top_ids.cpu()


@torch.no_grad()
def references(encoder, example, count):
    """The encoder's latents of the chain's `count` equal spans, [count, hidden_size]."""
    E = encoder.model.embed_tokens.weight
    row = one_row("encoder", example, spans_of(example.chain, count), E.device)
    probs, ids, _ = encoder(row)
    return superpose(probs, ids, E).float().cpu()


def n_eff(encoder, prompt, chains, z, top, top_ids, rng):
    """N_eff of N latents for chains of N tokens or more, and its mean with random matchings.

    A path's score is the mean over latents of the log of what each puts on the tokens of its match.
    """
    N = len(z)
    scores = []
    for tokens in chains:
        spans = map(torch.tensor, spans_of(tokens, N))
        masses = [(top * torch.isin(top_ids, span)).sum(-1) for span in spans]
        logs = torch.stack(masses, dim=1).clamp(min=1e-10).log()
        found = references(encoder, Example(prompt, tokens, [], []), N)
        matchings = [greedy_matching(z, found), *(rng.permutation(N) for _ in range(DRAWS))]
        scores.append([float(logs[range(N), matching].mean()) for matching in matchings])
    value, *random_values = (
        Categorical(logits=torch.tensor(scores).double().T).entropy().exp().tolist()
    )
    return value, float(np.mean(random_values))


def ecr(top_ids, parts):
    """{"ecr@K": mean over latents: how many tokens of its segment are among its K most likely}."""
    pairs = list(zip(top_ids.tolist(), parts))
    return {
        f"ecr@{K}": sum(t in ids[:K] for ids, part in pairs for t in part) / len(pairs) for K in ECR
    }


def measure(prompt, chains, result, encoder, run, rng):
    """What is found about one problem: a dictionary of numbers."""
    probs, ids = (torch.from_numpy(np.stack(x)) for x in zip(*result.latents))
    found = distributions(run, prompt, probs, ids)
    line = ecr(found[2], segments(chains[0], encoder.r))
    long = [c for c in chains if len(c) >= len(ids)]
    if len(long) > 1:  # else there is nothing to tell apart
        value, chance = n_eff(encoder, prompt, long, *found, rng)
        line |= {"paths": len(long), "n_eff": value, "random": chance}
    return line


def main():
    s = parse(Settings, __doc__)
    process = join(s.device)
    where = process.device, process.dtype
    solutions = [*load_solutions(s.data).items()][: s.problems]
    model, tokenizer, reasoning = load_model(s.model, *where)
    config = read_json(f"{s.model}/config.json")
    if not (config.get("phase1") and reasoning.top_k):
        raise UserError(f"{s.model}: N_eff needs an encoder, and latents with a top_k")
    base, _, _ = load_model(read_json(f"{config['start']}/config.json")["start"], *where)
    models = load_encoder(config["start"], Runner(base)), Runner(model.eval())
    ends = tokenizer.end_think, tokenizer.end_of_turn
    prompts = [tokenizer.prompt(problem) for problem, _ in solutions]
    with output_directory(s.out, s, command="n_eff", weights=fingerprint(s.model)) as out:
        results = dict(Sampler(model, reasoning, ends, s, s.batch_size).generate(prompts))
        rng = np.random.default_rng(s.seed)
        lines = []
        for i, (problem, texts) in enumerate(tqdm(solutions)):
            if results[i].latents:
                chains = [*map(tokenizer.encode, texts)]
                found = measure(prompts[i], chains, results[i], *models, rng)
                lines.append({"problem": problem} | found)
        write_jsonl(out / "n_eff.problems.jsonl", lines)
        summary = {"problems": len(lines)}
        for key in {key: 0 for line in lines for key in [*line][1:]}:
            summary[key] = float(np.mean([line[key] for line in lines if key in line]))
        if "n_eff" in summary:
            summary["ratio"] = summary["n_eff"] / summary["random"]
        write_json(out / "n_eff.json", summary)
        print(f"{out}: {json.dumps(summary)}")


if __name__ == "__main__":
    main()
