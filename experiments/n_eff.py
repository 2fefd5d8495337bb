"""What latents hold: ECR@K, entropy, and how many written solutions a chain follows (N_eff).

    python -m experiments.n_eff --model runs/latent --data gsm8k-train.jsonl gsm8k-nl-train.jsonl \\
        --out runs/n_eff

Lets the model think about the problems of the files (training lines). Writes OUT/n_eff.json, the
means, and OUT/n_eff.problems.jsonl, one line a problem. N_eff is for problems for which the
files have two different chains or more; the model's latents are compared with the
latents that the encoder of its phase 1 makes of the chains. See docs/METHOD.md.
"""

import lib.errors  # noqa: F401  from here on an error is one line

from dataclasses import dataclass
import json

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from attention import BLOCK, Runner
from data import Example, RowShape, layout, pack, segments, text_field, to_device, written_chain
from latents import entropy, superpose
from lib.cli import parse
from lib.files import read_json, read_jsonl, reading, write_json, write_text
from lib.run import join, output_directory
from load_hf_weights import base_dtype, load_model
from masks import RULES
from sample import Sampler, SamplingParams
from train_phase1 import load_encoder

TOP = 100  # tokens of a latent's distribution that count
DRAWS = 64  # random matchings that N_eff is compared with
ECR = (5, 10, 50)  # the K of ECR@K; the paper reports 50


@dataclass(frozen=True, kw_only=True)
class Settings:
    model: str  # a run of train_phase2.py
    data: tuple[str, ...]  # training .jsonl files; several may solve the same problems differently
    out: str  # directory of results
    problems: int = 200  # how many to take, the first ones
    max_latents: int = 256  # latent budget
    batch_size: int = 64  # sequences side by side
    seed: int = 1  # of the random matchings
    device: str = ""  # cpu, cuda or cuda:N; default: a GPU if there is one


def load_solutions(paths) -> dict[str, list[str]]:
    """{problem: its different chains}, in the order of the files."""
    solutions = {}
    for path in paths:
        for row in read_jsonl(path):
            with reading(row["_place"]):
                chain = written_chain(row).strip()
                chains = solutions.setdefault(text_field(row, "problem"), [])
                chains += [chain] * (chain not in chains)
    return solutions


def span_ends(n, count):
    """Where `count` spans end that share n tokens as equally as can be, int [count]."""
    return np.arange(1, count + 1) * n // count


def greedy_matching(generated, references):
    """For each latent [N, d] in turn the closest (cosine) unused reference of [N, d]."""
    similarity, matching = F.normalize(generated, dim=-1) @ F.normalize(references, dim=-1).T, []
    for row in similarity:
        row[matching] = -torch.inf
        matching.append(int(row.argmax()))
    return matching


def path_score(mass, matching):
    """Mean over latents of the log of mass[n, m], what latent n puts on the tokens of its match."""
    return float(mass[range(len(matching)), matching].clamp(min=1e-10).log().mean())


def effective_paths(scores):
    """N_eff = exp(entropy(softmax(scores)))."""
    return float(entropy(torch.tensor(scores, dtype=torch.float64).softmax(0)).exp())


def whole_row(name, example, parts, device):
    """One example as a packed row on `device`."""
    laid = layout(name, example, parts)
    tokens = -(-len(laid[0]) // BLOCK) * BLOCK
    return to_device(pack(name, [laid], RowShape(tokens, 1, 2, tokens)), device)


@torch.no_grad()
def distributions(run, prompt, probs, ids):
    """Of a model that thinks the latents (probs, ids): z [N, hidden_size], and (probs [N, TOP],
    ids [N, TOP]) of its next-token distribution before each, the most likely first."""
    E = run.model.embed_tokens.weight
    row = whole_row("latent", Example(prompt, [], [], []), [[0]] * len(probs), E.device)
    z = superpose(probs.to(E.device), ids.to(E.device), E)
    h = run(E[row.ids].index_copy(0, row.latent_index, z.to(E.dtype)), row, RULES["latent"])
    logits = (h[row.latent_index - 1] @ run.model.head.T).float()
    top, top_ids = logits.softmax(-1).topk(min(TOP, len(E)))
    return z.float().cpu(), top.cpu(), top_ids.cpu()


@torch.no_grad()
def references(encoder, example, count):
    """The encoder's latents of the chain's `count` equal spans, [count, hidden_size]."""
    E = encoder.model.embed_tokens.weight
    spans = np.split(np.array(example.chain), span_ends(len(example.chain), count)[:-1])
    probs, ids, _ = encoder(whole_row("encoder", example, [x.tolist() for x in spans], E.device))
    return superpose(probs, ids, E).float().cpu()


def n_eff(encoder, prompt, chains, end_think, z, top, top_ids, rng):
    """N_eff of N latents for chains of N tokens or more, and its mean with random matchings."""
    N, scores, random_scores = len(z), [], []
    for chain in chains:
        spans = np.split(np.array(chain), span_ends(len(chain), N)[:-1])
        masses = [(top * torch.isin(top_ids, torch.from_numpy(x))).sum(-1) for x in spans]
        mass, example = torch.stack(masses, dim=1), Example(prompt, chain, end_think, [])
        scores.append(path_score(mass, greedy_matching(z, references(encoder, example, N))))
        random_scores.append([path_score(mass, rng.permutation(N).tolist()) for _ in range(DRAWS)])
    random_values = [effective_paths(draw) for draw in zip(*random_scores)]
    return effective_paths(scores), float(np.mean(random_values))


def ecr(top_ids, parts):
    """{K: mean over latents of how many tokens of its segment are among its K most likely ones}."""
    pairs = list(zip(top_ids.tolist(), parts))
    return {K: sum(t in ids[:K] for ids, part in pairs for t in part) / len(pairs) for K in ECR}


def measure(problem, chains, prompt, result, tokenizer, encoder, run, rng):
    """The line of results about one problem: a dictionary of numbers."""
    probs, ids = (torch.from_numpy(np.stack(x)) for x in zip(*result.latents))
    found = distributions(run, prompt, probs, ids)
    line = {"problem": problem, "entropy": float(entropy(probs).mean())}
    line |= {f"ecr@{K}": x for K, x in ecr(found[2], segments(chains[0], encoder.r)).items()}
    long = [c for c in chains if len(c) >= len(ids)]
    if len(long) > 1:  # else there is nothing to tell apart
        value, chance = n_eff(encoder, prompt, long, tokenizer.end_think, *found, rng)
        line |= {"paths": len(long), "n_eff": value, "random": chance}
    return line


def main():
    s = parse(Settings, __doc__)
    device = join(s.device).device
    dtype, solutions = base_dtype(device), [*load_solutions(s.data).items()][: s.problems]
    model, tokenizer, reasoning = load_model(s.model, device, dtype)
    phase1 = read_json(f"{s.model}/config.json")["phase1"]
    base, _, _ = load_model(read_json(f"{phase1}/config.json")["start"], device, dtype)
    encoder, run = load_encoder(phase1, Runner(base)), Runner(model.eval())
    budgets = dict(max_latents=s.max_latents, max_new_tokens=64, temperature=0.0)
    params, ends = (
        SamplingParams(model=s.model, **budgets),
        (tokenizer.end_think, tokenizer.end_of_turn),
    )
    prompts = [tokenizer.prompt(problem) for problem, _ in solutions]
    results = dict(Sampler(model, reasoning, ends, params, s.batch_size).generate(prompts))
    with output_directory(s.out, s) as out:
        lines, rng = [], np.random.default_rng(s.seed)
        for i, ((problem, texts), prompt) in enumerate(zip(tqdm(solutions), prompts)):
            if (result := results[i]).latents:
                chains = [tokenizer.encode(text) for text in texts]
                models = tokenizer, encoder, run
                lines.append(measure(problem, chains, prompt, result, *models, rng))
        write_text(out / "n_eff.problems.jsonl", "".join(json.dumps(x) + "\n" for x in lines))
        summary = {"problems": len(lines)}
        for key in {key for line in lines for key in line} - {"problem"}:
            summary[key] = float(np.mean([line[key] for line in lines if key in line]))
        if "n_eff" in summary:
            summary["ratio"] = summary["n_eff"] / summary["random"]
        write_json(out / "n_eff.json", summary)
        print(f"{out}: {json.dumps(summary)}")


if __name__ == "__main__":
    main()
