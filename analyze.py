"""What a latent chain holds: how many different written solutions it follows at once (N_eff), and a picture of one.

    python analyze.py --model runs/latent --data gsm8k-train.jsonl gsm8k-nl-train.jsonl --out runs/n_eff

Takes the problems for which the files (training lines) have two different chains or more, lets the model think about each, and
compares its latents with those that the encoder of its phase 1 makes of the chains. Writes OUT/n_eff.jsonl, one line a
problem, OUT/n_eff.json, the means, and OUT/latents.svg, the first problem's latents beside its first chain. See docs/METHOD.md.
"""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import Example, pack_row, read_jsonl, segments, text_field, to_device, written_chain
from eval import Problem, prediction
from figures import draw_latents
from grade import Grader, boxed
from graphs import run_row
import latents
from load_hf_weights import base_dtype, load_model
from masks import causal
from model import Model
from runs import UserError, at_least, finished_run, is_free, parser, run_main, start, write_json, write_text
from sample import Sampling, generate
from train_phase1 import Encoder, finished_encoder

TOP = 100  # tokens of a latent's distribution that count
DRAWS = 64  # random matchings that N_eff is compared with


def load_solutions(paths: list[str]) -> list[tuple[Problem, list[str]]]:
    """Every problem that has at least two different chains, and these, in the order of the files."""
    solutions = {}
    for path in paths:
        for row in read_jsonl(path):
            chain = written_chain(row, path)
            problem = Problem(text_field(row, "problem", path), boxed(text_field(row, "cot_answer", path)) or "", chain)
            _, chains = solutions.setdefault(problem.text, (problem, []))
            if chain.strip() and chain.strip() not in map(str.strip, chains):
                chains.append(chain)
    several = [(problem, chains) for problem, chains in solutions.values() if len(chains) > 1]
    if not several:
        raise UserError(f"{', '.join(paths)}: no problem has two different chains; name files that solve the same problems differently")
    return several


def span_ends(n: int, count: int) -> np.ndarray:
    """Where `count` spans end that share n tokens as equally as can be, int [count]."""
    return np.arange(1, count + 1) * n // count


def greedy_matching(generated: torch.Tensor, references: torch.Tensor) -> list[int]:
    """For each of N latents [N, d] in turn, the closest (cosine) of N references [N, d] that no earlier one has taken."""
    similarity, matching = F.normalize(generated, dim=-1) @ F.normalize(references, dim=-1).T, []
    for row in similarity:
        row[matching] = -torch.inf
        matching.append(int(row.argmax()))
    return matching


def path_score(mass: torch.Tensor, matching: list[int]) -> float:
    """Mean over latents of the log of mass[n, m], what latent n puts on the tokens of span m, its match."""
    return float(mass[range(len(matching)), matching].clamp(min=1e-10).log().mean())


def effective_paths(scores: list[float]) -> float:
    """N_eff = exp(entropy(softmax(scores)))."""
    p = torch.tensor(scores, dtype=torch.float64).softmax(0)
    return float(latents.entropy(p).exp())


@torch.no_grad()
def distributions(model: Model, prompt: list[int], probs: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of a model that thinks the latents (probs, ids): z [N, hidden_size], and (probs [N, TOP], ids [N, TOP]) of its next-token
    distribution before each, of which `probs` sum to less than 1."""
    E = model.embed_tokens.weight
    example = Example(prompt, [0] * len(probs), [], [])
    row = to_device(pack_row("latent", [example]), E.device)
    z = latents.superpose(probs.to(E.device), ids.to(E.device), E)
    h = run_row(model, E[row.ids].index_copy(0, row.latent_index, z.to(E.dtype)), row, causal)
    top, top_ids = (h[row.latent_index - 1] @ model.head.T).float().softmax(-1).topk(min(TOP, len(E)))
    return z.float().cpu(), top.cpu(), top_ids.cpu()


@torch.no_grad()
def references(encoder: Encoder, example: Example, count: int, k: int) -> torch.Tensor:
    """The encoder's latents of the chain's `count` equal spans, [count, hidden_size]."""
    E = encoder.model.embed_tokens.weight
    row = pack_row("encoder", [example], ends=[span_ends(len(example.chain), count)])
    return latents.superpose(*encoder(to_device(row, E.device), k), E).float().cpu()


def n_eff(model: Model, encoder: Encoder, prompt: list[int], chains: list[list[int]], end_think: list[int], probs, ids, k: int,
          rng: np.random.Generator) -> tuple[float, float]:
    """N_eff of latents (probs, ids) [N, k] for chains of N tokens or more, and the mean of its DRAWS values with random matchings."""
    z, top, top_ids = distributions(model, prompt, probs, ids)
    N, scores, random_scores = len(z), [], []
    for chain in chains:
        spans = np.split(np.array(chain), span_ends(len(chain), N)[:-1])
        mass = torch.stack([(top * torch.isin(top_ids, torch.from_numpy(span))).sum(-1) for span in spans], dim=1)
        scores.append(path_score(mass, greedy_matching(z, references(encoder, Example(prompt, chain, end_think, []), N, k))))
        random_scores.append([path_score(mass, rng.permutation(N).tolist()) for _ in range(DRAWS)])
    return effective_paths(scores), float(np.mean([effective_paths(list(draw)) for draw in zip(*random_scores)]))


def main():
    p = parser(__doc__)
    p.add_argument("--model", required=True, help="a run of train_phase2.py")
    p.add_argument("--data", nargs="+", required=True, help="training .jsonl files that solve the same problems differently")
    p.add_argument("--out", required=True, help="directory of results")
    p.add_argument("--problems", type=at_least(1), default=200, help="how many to take, the first ones")
    p.add_argument("--max-latents", type=at_least(1), default=256, help="latent budget")
    p.add_argument("--batch-size", type=at_least(1), default=64, help="rows that run side by side")
    args = p.parse_args()
    rank, _, device = start(args.device)
    if rank:
        return  # these few problems are rank 0's
    run, out = finished_run(args.model, "train_phase2"), Path(args.out)
    if run["top_k"] <= 0:
        raise UserError(f"{args.model}: was trained with top-k {run['top_k']}; N_eff is for superpositions of a few tokens")
    if not (is_free(out) or out.is_dir() and {file.name for file in out.iterdir()} <= {"latents.svg", "n_eff.jsonl"}):  # of a stopped call
        raise UserError(f"{out}: is there already and not empty; choose another --out")
    solutions = load_solutions(args.data)[:args.problems]
    model, tokenizer, _ = load_model(args.model, device, base_dtype(device))
    encoder = finished_encoder(run["phase1"], device)
    settings = Sampling("latent", run["top_k"], args.max_latents, 64, temperature=0, seed=args.seed)
    results = generate(model, tokenizer, [problem.text for problem, _ in solutions], settings, args.batch_size)
    rng, lines = np.random.default_rng(args.seed), []
    for (problem, chains), result in tqdm(list(zip(solutions, results)), desc="comparing", mininterval=1, dynamic_ncols=True):
        tokens = [c for c in map(tokenizer.encode, chains) if len(c) >= len(result.ids)]
        if len(result.ids) and len(tokens) > 1:  # else there is nothing to tell apart
            value, random = n_eff(model, encoder, tokenizer.prompt(problem.text), tokens, tokenizer.end_think, result.probs, result.ids,
                                  run["top_k"], rng)
            lines.append({"problem": problem.text, "chains": chains, "latents": len(result.ids), "paths": len(tokens), "n_eff": value,
                          "random": random})
    (problem, _), r = solutions[0], run["compression"]
    with Grader() as grader:
        draw_latents(out / "latents.svg", problem.text, list(map(tokenizer.decode, segments(tokenizer.encode(problem.chain), r))),
                     prediction(problem, results[0], tokenizer, settings, r, grader))
    write_text(out / "n_eff.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    if not lines:
        write_json(out / "n_eff.json", {"model": args.model, "data": args.data, "problems": 0})
        print(f"{args.model}: thought nothing that could be compared with two chains, in {len(results)} problems; {out}/latents.svg")
        return
    mean = lambda key: float(np.mean([line[key] for line in lines]))
    write_json(out / "n_eff.json", {"model": args.model, "data": args.data, "problems": len(lines), "paths": mean("paths"),
                                    "n_eff": mean("n_eff"), "random": mean("random"), "ratio": mean("n_eff") / mean("random")})
    print(f"N_eff {mean('n_eff'):.3f}, with random matching {mean('random'):.3f}, over {len(lines)} problems of {mean('paths'):.1f} chains; "
          f"{out}/n_eff.json, {out}/latents.svg")


if __name__ == "__main__":
    run_main(main)
