"""The paper's claim on a real model, from a checkpoint and the data to the table and the pictures.

    python reproduce.py --model SmolLM2-135M-Instruct --data DIR --out results/smollm2 --minutes 60
    python reproduce.py --model SmolLM2-135M-Instruct --data DIR --out results/smollm2 --seeds 1 2 --jobs 8     # two GPUs, four jobs on each
    python reproduce.py --model SmolLM2-135M-Instruct --data DIR --out smoke --smoke          # a CPU, a few rows, minutes

DIR holds gsm8k-train.jsonl and the files of TESTS; gsm8k-sub-train.jsonl.gz is trained on too where it is. All is
done by the project's own scripts; what is finished is not done again. Of each Latent variant the model is chosen, out of three along
phase 2, that is right most often on gsm8k-valid (of an ablation, the last). --minutes scale the epochs: about those of one H100 for the
MAIN variants and one seed, as far as the speed of each stage tells. Writes OUT/results.json, and by report.py OUT/table.md and two pictures.
"""

import argparse
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
import gzip
import json
import math
import os
from pathlib import Path
import re
import signal
import subprocess
import sys
import time

import torch

from analyze import load_solutions
from data import read_jsonl, training_fields
from eval import load_problems
from grade import boxed
from load_hf_weights import read_config, resolve
from report import TESTS, report
from runs import UserError, at_least, call, file_hash, locked, open_run, parser, read_json, run_main, write_json, write_text

EPOCHS = {"sft": 4.0, "encoder": 0.35, "decoder": 0.15, "joint": 1.0, "phase2": 12.0}  # in 60 minutes
SFT = "--lr 5e-4 --batch-size 128"
PHASE1 = "--lr 5e-4 --warmup 0.1 --batch-size 128"
ANCHOR = "--w-anchor 1"
PHASE2 = "--lr 5e-4 --batch-size 128"
OWN = "--own-share 0.5"
EVAL = "--temperature 0 --max-latents 64 --max-new-tokens 160 --batch-size 512"
SHORT = 0.4
CUE = 3  # words of a problem, from which a model goes on to a new one
WRITER = "--lr 5e-4 --batch-size 128 --epochs 3"
WRITE = "--temperature 0.8 --top-p 0.95 --max-new-tokens 256 --batch-size 512 --samples 14"
KEEP = "--keep 2"  # models of phase 2, and the end: what is right most often on gsm8k-valid is chosen
ROWS = "--row-tokens 17408"
SETTINGS = {"sft": SFT, "phase1": PHASE1, "phase2": PHASE2, "eval": EVAL, "cue": CUE, "writer": WRITER, "write": WRITE, "keep": KEEP, "rows": ROWS}
SMOKE = "--max-steps 2 --batch-size 4"
SMOKE_EVAL = "--max-latents 8 --max-new-tokens 8 --batch-size 4"  # behind those of EVAL or WRITE, and instead of them
ARMS = "forced floor random other argmax top-2 top-4 cut-4"  # what the latents are good for, on gsm8k-test


@dataclass
class Variant:
    """A row of the table. r None: trained on text; phase1, phase2, sft: flags of these scripts; arms: whether to try ARMS too.

    epochs: times those of phase 2, or of a model of text; an ablation has SHORT of them, to be compared with r2-short. after: the variant
    whose model phase 2 starts from instead of phase 1's decoder, a curriculum over r. data: what phase 2, or a model of text, is
    trained on, in as many steps whatever that is: train; small (gsm8k-train alone); fresh (train, and fresh problems with the chains that
    CoT-SFT writes for them); own (these alone)."""
    r: int | None = 2
    phase1: str = ANCHOR
    phase2: str = f"--all-weights {OWN}"
    sft: str = ""
    arms: bool = False
    epochs: float = 1.0
    data: str = "train"
    after: str = ""

    @property
    def latents(self) -> str:
        """Names phase 1 and its latents, which variants share that differ in phase 2 alone."""
        return f"r{self.r}{self.phase1.replace(' ', '')}"

    @property
    def fresh(self) -> bool:
        return self.data in ("fresh", "own")

    @property
    def ceiling(self) -> bool:
        """Whether latents can be handed to a model from outside: superpositions of a few tokens can."""
        return "--top-k 0" not in self.phase1 and "--top-k -1" not in self.phase1


VARIANTS = {
    "answer-only": Variant(None, sft="--no-chain"),
    "CoT-SFT": Variant(None),
    "Latent-r2": Variant(2, arms=True),
    "Latent-r2-long": Variant(2, epochs=2.0, arms=True),
    "Latent-r3": Variant(3),
    "Latent-r4": Variant(4, arms=True),
    "CoT-SFT-fresh": Variant(None, data="fresh"),
    "CoT-SFT-fresh-long": Variant(None, data="fresh", epochs=4.0),
    "Latent-r2-fresh": Variant(2, data="fresh", arms=True),
    "Latent-r2-fresh-long": Variant(2, data="fresh", epochs=2.0, arms=True),
    "Latent-r2-own": Variant(2, data="own"),
    "Latent-r4-fresh": Variant(4, data="fresh", arms=True),
    "r1-short": Variant(1, epochs=SHORT),  # as many latents as tokens: the price of latents without that of compression
    "Latent-r2-curriculum": Variant(2, data="fresh", epochs=2.0, arms=True, after="r1-short"),
    "r2-short": Variant(2, epochs=SHORT),
    "r2-no-anchor": Variant(phase1="", epochs=SHORT),
    "r2-no-own": Variant(phase2="--all-weights", epochs=SHORT),
    "r2-paper": Variant(phase1="", phase2="--all-weights --noise 1", epochs=SHORT),  # neither of these, which the paper does not have
    "r2-noise": Variant(phase2=f"--all-weights {OWN} --noise 1", epochs=SHORT),
    "r2-LoRA": Variant(phase2=OWN, epochs=SHORT),
    "r2-top1": Variant(phase1=f"{ANCHOR} --top-k 1", epochs=SHORT),
    "r2-full-vocabulary": Variant(phase1=f"{ANCHOR} --top-k 0", epochs=SHORT, data="small"),  # a cache of the whole vocabulary is large
    "r2-hidden-states": Variant(phase1=f"{ANCHOR} --top-k -1", epochs=SHORT),
    "r2-no-induction": Variant(phase1=f"{ANCHOR} --no-induction", epochs=SHORT),
    "r2-no-segments": Variant(phase1=f"{ANCHOR} --no-segments", epochs=SHORT),
}
MAIN = ("answer-only", "CoT-SFT", "Latent-r2", "Latent-r4")


def lines_of(path: Path) -> list[str]:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as f:
        return [line for line in f.read().split("\n") if line.strip()]


def write_lines(path: Path, lines: list[str]) -> None:
    write_text(path, "".join(line + "\n" for line in lines))


def write_data(source: Path, out: Path, smoke: bool) -> None:
    """train.jsonl (gsm8k-train three times and gsm8k-sub-train), small.jsonl (the former alone), valid.jsonl (gsm8k-valid where it has
    chains), and the evaluation files, in `out`; cues.jsonl: of each problem of gsm8k-train the first words, with the others as a chain."""
    plain, more = source / "gsm8k-train.jsonl", source / "gsm8k-sub-train.jsonl.gz"
    small = lines_of(plain)[:48 if smoke else None]
    write_lines(out / "small.jsonl", small)
    write_lines(out / "train.jsonl", small if smoke else 3 * small + (lines_of(more) if more.exists() else []))
    rows = [json.loads(line) for line in small]
    cues = [(*row["problem"].split(maxsplit=CUE), row["cot_answer"]) for row in rows if len(row["problem"].split()) > CUE]
    write_lines(out / "cues.jsonl", [json.dumps({"problem": " ".join(words), "cot": rest, "cot_answer": answer}) for *words, rest, answer in cues])
    for name in TESTS:
        lines = lines_of(source / f"{name}.jsonl")[:4 if smoke else None]
        if name == "gsm8k-valid":
            write_lines(out / "valid.jsonl", [line for line in lines if json.loads(line).get("cot")])
        write_lines(out / f"{name}.jsonl", lines)


def adds_up(chain: str, answer: str) -> bool:
    """Whether a chain is equations <<a+b=c>> and nothing else, all of them right, and the last of them gives the answer."""
    equation = r"<<([\d.+*/()-]+)=(-?[\d.]+)>>"
    equations = re.findall(equation, chain)
    if not equations or re.sub(equation, "", chain).strip() or re.search(r"\*\*|//|[\d.)]\(", chain):  # Python's powers, floors and calls
        return False
    equations.append((equations[-1][1], boxed(answer)))
    try:
        return all(math.isclose(eval(left), float(right), abs_tol=0.01) for left, right in equations)
    except (ArithmeticError, MemoryError, RecursionError, SyntaxError, TypeError, ValueError):
        return False


def stage(script: str, flags: str, out: Path, *done: str, **paths) -> None:
    """Calls a script that makes the directory `out`, unless the files `done` in it are there. A second reproduce.py that wants the same
    waits until it is made."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with locked(out.parent / f".{out.name}.lock") as lock:
        if not all((out / name).exists() for name in done):
            call(script, flags, lock, out=out, **paths)


def evaluation(flags: str, out: Path, model: Path, data: list[Path], arms: str = "free") -> None:
    """Evaluates `model` on the files `data` in the given arms; each has its summary in `out`."""
    names = [f"{file.stem}.json" if arm == "free" else f"{file.stem}.{arm}.json" for file in data for arm in arms.split()]
    stage("eval.py", f"{flags} --arms {arms}", out, *names, model=model, data=data)


def written(flags: str, out: Path, **paths) -> list[dict]:
    """What distill.py writes with these flags."""
    stage("distill.py", flags, out, "chains.jsonl", **paths)
    return [json.loads(line) for line in lines_of(out / "chains.jsonl")]


def fresh_problems(model: Path, data: Path, home: Path, device: str, smoke: bool) -> Path:
    """home/problems.jsonl: problems that are in no file of `data`, by a model that learned to go on from the first words of gsm8k-train's.

    Words are parted by single spaces. In smoke mode, those of train.jsonl: two steps teach nobody to write."""
    problems, cues = home / "problems.jsonl", data / "cues.jsonl"
    if not problems.exists():
        stage("train_sft.py", f"{WRITER} {SMOKE if smoke else ROWS} {device}", home / "writer", "finished.json", model=model, data=cues)
        flags = f"{WRITE} {device} " + (f"{SMOKE_EVAL} --samples 1" if smoke else "")
        rows = written(flags, home / "written", model=home / "writer", data=cues)
        spaced = lambda text: " ".join(text.split())
        texts = dict.fromkeys(spaced(f"{row['problem']} {row['cot']}") for row in rows)
        given, *tests = ({spaced(row["problem"]) for row in read_jsonl(data / f"{name}.jsonl")} for name in ("train", *TESTS))
        known = given.union(*tests)
        new = sorted(given) if smoke else [text for text in texts if text.endswith("?") and text not in known]
        if not new:
            raise UserError(f"{home}/written: holds no new question; take more data, in another --out")
        write_lines(problems, [json.dumps({"problem": text}) for text in new])
    return problems


def own_chains(cot_sft: Path, problems: Path, data: Path, home: Path, flags: str, smoke: bool) -> None:
    """home/own.jsonl: fresh problems with those chains that CoT-SFT writes for them which add up (in smoke mode, train.jsonl);
    home/fresh.jsonl: train.jsonl and these. `flags`: as of an evaluation."""
    if not (home / "fresh.jsonl").exists():
        rows, given = written(flags, home / "written", model=cot_sft, data=problems), lines_of(data / "train.jsonl")
        own = given if smoke else [json.dumps(row) for row in rows if adds_up(row["cot"], row["cot_answer"])]
        if not own:
            raise UserError(f"{home}/written: holds no chain that adds up; take more data or --minutes, in another --out")
        write_lines(home / "own.jsonl", own)
        write_lines(home / "fresh.jsonl", given + own)


def phase1_run(v: Variant, cot_sft: Path, home: Path, data: Path, training_flags) -> Path:
    """The phase 1 run of a variant, in `home`; `training_flags(v, step, files)`: of a step of training on these files."""
    phase1, files, origin = home / "phase1" / v.latents, {"data": data / "train.jsonl", "valid": data / "valid.jsonl"}, {"model": cot_sft}
    for step in ("encoder", "decoder", "joint"):
        flags = f"--step {step} --compression {v.r} {v.phase1} {PHASE1} {training_flags(v, step, files)}"
        stage("train_phase1.py", flags, phase1 / step, "finished.json", **origin, **files)
        origin = {"init": phase1 / step}
    return phase1 / "joint"


def phase2_run(v: Variant, phase1: Path, out: Path, after: Path | None, files: dict, device: str, training_flags) -> None:
    """Trains a variant's model, which starts from `after` or the decoder of `phase1`, into `out`."""
    cached, origin = phase1.parent / f"cache-{v.data}", {"init": after} if after else {}
    stage("cache_latents.py", device, cached, "cache.json", phase1=phase1, data=files["data"])
    flags = f"{PHASE2} {KEEP if v.epochs >= 1 else ''} {v.phase2} {training_flags(v, 'phase2', files)}"
    stage("train_phase2.py", flags, out, "finished.json", phase1=phase1, cache=cached, **origin, **files)


def choose(v: Variant, run: Path, home: Path, flags: str, valid: Path, gpu: str) -> Path:
    """Of a run and what it kept on its way, the model that is right most often on gsm8k-valid; home/chosen.json tells of all, and how it was
    made."""
    chosen = home / "chosen.json"
    if chosen.exists():
        before = read_json(chosen)
        if before["variant"] != vars(v):
            raise UserError(f"{home}: was made when this variant was {before['variant']}; choose another --out")
        return run if before["chosen"] == run.name else run / before["chosen"]
    models, found = [run, *sorted(run.glob("step-*"))], {}
    for model in models if len(models) > 1 else ():
        evaluation(flags, home / f"valid-{model.name}", model, [valid])
        found[model.name] = read_json(home / f"valid-{model.name}" / f"{valid.stem}.json")["accuracy"]
    best = max(models, key=lambda model: found.get(model.name, 0))
    write_json(chosen, {"chosen": best.name, "on_valid": found, "device": gpu, "torch": torch.__version__, "variant": vars(v)})
    return best


def solve_differently(cot_sft: Path, home: Path, flags: str, valid: Path) -> Path | None:
    """A file of right solutions to problems of gsm8k-valid: the written ones, and those among 16 samples of each by CoT-SFT; None
    where all do it alike."""
    stage("eval.py", flags.replace("--temperature 0", "--temperature 1 --top-p 1") + " --samples 16", home / "sampled", f"{valid.stem}.json",
          model=cot_sft, data=valid)
    right = [p for p in read_jsonl(home / "sampled" / f"{valid.stem}.predictions.jsonl") if p["correct"] and p["chain"].strip()]
    lines = [{"problem": p["problem"], "cot": p["chain"], "cot_answer": p["answer"]} for p in right]
    write_text(home / "solutions.jsonl", valid.read_text(encoding="utf-8") + "".join(json.dumps(line) + "\n" for line in lines))
    with suppress(UserError):
        load_solutions([str(home / "solutions.jsonl")])
        return home / "solutions.jsonl"


def collect(out: Path) -> dict:
    """What lies in `out`, as results.json has it: {variant: {seed: {what was measured: its summary}}}."""
    runs = {}
    homes = [home for name in VARIANTS for home in sorted(out.glob(f"seed*/{name}")) if (home / "eval" / "gsm8k-test.json").exists()]
    for home in homes:
        parts = {"": home / "eval", "student.": home / "student", "alone.": home / "alone",
                 "phase1.": home.parent / "phase1" / VARIANTS[home.name].latents / "eval"}
        files = [(part, file) for part, directory in parts.items() for file in sorted(directory.glob("*.json"))]
        found = {part + file.stem: read_json(file) for part, file in files if file.name != "settings.json"}
        if (home / "n_eff" / "n_eff.json").exists():
            found["n_eff"] = read_json(home / "n_eff" / "n_eff.json")
        made = read_json(home / "chosen.json")
        if VARIANTS[home.name].fresh:
            made["own_chains"] = len(lines_of(home.parent / "fresh" / "own.jsonl"))
        runs.setdefault(home.name, {})[home.parent.name] = found | {"made": made}
    return runs


def main():
    p = parser(__doc__, seed=False)
    p.add_argument("--model", required=True, help="checkpoint directory to start from")
    p.add_argument("--data", required=True, help="directory of the data files")
    p.add_argument("--out", required=True, help="directory of everything that is made")
    p.add_argument("--minutes", type=at_least(1, float), default=60,
                   help="scale the epochs; an estimate of one H100's for the main variants and one seed")
    p.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(MAIN), help="what to train")
    p.add_argument("--tests", nargs="+", choices=TESTS, default=list(TESTS), help="what to evaluate on; gsm8k-test always")
    p.add_argument("--seeds", type=at_least(0), nargs="+", default=[1], help="all variants once for each")
    p.add_argument("--jobs", type=at_least(1), default=1, help="variants at a time, GPUs taken in turn; each writes to a log file in OUT")
    p.add_argument("--alone", action=argparse.BooleanOptionalAction, default=False,
                   help="take the seconds per problem anew, with --jobs, where variants disturb each other, after all are trained, one by one")
    p.add_argument("--smoke", action="store_true", help="two steps on a few rows, to see that everything runs")
    args = p.parse_args()
    out = Path(args.out)
    if args.jobs > 1 and args.device not in (None, "cpu", "cuda"):
        raise UserError(f"--device {args.device}: leave it out, --jobs takes the GPUs in turn")
    prepare(args, out)
    failed = side_by_side(args, out) if args.jobs > 1 else []
    if args.jobs == 1 or args.alone and not failed:
        train_all(args, out)
    write_json(out / "results.json", {
        "model": Path(args.model).name, "minutes": args.minutes, "smoke": args.smoke,
        "epochs": {stage: epochs * args.minutes / 60 for stage, epochs in EPOCHS.items()},
        "settings": SETTINGS, "runs": collect(out)})
    if failed:
        raise UserError(f"{len(failed)} calls failed, of which {', '.join(failed)} tell; mend that and start the command again")
    report(out)


def check_chains(path: Path) -> None:
    """Raises UserError where a line is none to train on; gsm8k-valid may have some without a chain."""
    rows = [row for row in read_jsonl(path) if row.get("cot") or path.stem != "gsm8k-valid"]
    if not rows:
        raise UserError(f"{path}: no line has a chain; name another file")
    for row in rows:
        training_fields(row, path)


def prepare(args, out: Path) -> None:
    """Makes `out` with its data, or checks that it belongs to the same model, data and budget."""
    source = Path(args.data)
    files = [source / "gsm8k-train.jsonl", *filter(Path.exists, [source / "gsm8k-sub-train.jsonl.gz"]), *(source / f"{t}.jsonl" for t in TESTS)]
    read_config(resolve(args.model)[0])
    for file in () if (out / "config.json").exists() else files:  # said before OUT belongs to them; later their hash is compared
        if file.stem in TESTS:
            load_problems(file)
        if file.stem == "gsm8k-valid" or file.stem not in TESTS:
            check_chains(file)
    open_run(out, {"command": "reproduce", "model": str(Path(args.model).resolve()), "minutes": args.minutes, "smoke": args.smoke,
                   "data_hash": file_hash(*files), "epochs": EPOCHS, "settings": SETTINGS})
    if not (out / "data" / "gsm-hard-test.jsonl").exists():  # the last to be written
        write_data(source, out / "data", args.smoke)


def side_by_side(args, out: Path) -> list[str]:
    """Trains each variant by a call of its own, --jobs at a time; where two want the same, one waits (see `stage`). Returns the logs of
    those that failed."""
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    waiting = [(name, seed) for name in sorted(args.variants, key=lambda name: name != "CoT-SFT") for seed in args.seeds][::-1]
    running, failed, free = {}, [], list(range(args.jobs))[::-1]
    old = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while waiting or running:
            while waiting and free:
                (name, seed), slot = waiting.pop(), free.pop()
                log = out / f"{name}-{seed}.log"
                command = [sys.executable, __file__, *sys.argv[1:], "--variants", name, "--seeds", str(seed), "--jobs", "1", "--no-alone"]
                environment = os.environ | {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]}
                with open(log, "a", encoding="utf-8") as f:
                    running[slot] = log, subprocess.Popen(command, stdout=f, stderr=f, env=environment)
                print(f"{name}, seed {seed}: {log}", flush=True)
            time.sleep(0.5)
            for slot in [slot for slot, (_, process) in running.items() if process.poll() is not None]:
                log, process = running.pop(slot)
                free.append(slot)
                failed += [str(log)] * (process.returncode != 0)
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.wait()
        signal.signal(signal.SIGTERM, old)
    return failed


def train_all(args, out: Path) -> None:
    data, device = out / "data", f"--device {args.device}" if args.device else ""
    num_lines = cache(lambda path: len(lines_of(path)))
    of = lambda *names: [data / f"{name}.jsonl" for name in names]
    tests = of(*(test for test in TESTS if test in (*args.tests, "gsm8k-test")))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() and args.device != "cpu" else "CPU"
    flags = f"{EVAL} {device} " + (SMOKE_EVAL if args.smoke else "")
    needed = list(args.variants)
    for name in needed:  # and, as it grows, what others start from
        v = VARIANTS[name]
        needed += [v.after] * bool(v.after) + ["CoT-SFT"] * bool(v.r or v.fresh)  # phase 1 starts there, and it writes chains
    for seed in args.seeds:
        def training_flags(v, step, files):
            epochs = EPOCHS[step] * args.minutes / 60 * num_lines(data / "train.jsonl") / num_lines(files["data"])  # as many steps
            epochs *= v.epochs if step in ("phase2", "sft") else 1
            return f"--seed {seed} {device} " + (SMOKE if args.smoke else f"--epochs {epochs:.4g} {ROWS}")
        seeded, trained = out / f"seed{seed}", {}
        for name in (name for name in VARIANTS if name in needed):
            v, home = VARIANTS[name], seeded / name
            print(f"\n{name}, seed {seed}", flush=True)
            run, chains = home / "model", data
            phase1 = phase1_run(v, trained["CoT-SFT"], seeded, data, training_flags) if v.r else None
            if v.fresh:
                chains, problems = seeded / "fresh", fresh_problems(Path(args.model), data, out / "fresh", device, args.smoke)
                own_chains(trained["CoT-SFT"], problems, data, chains, flags, args.smoke)
            files = {"data": chains / f"{v.data}.jsonl", "valid": data / "valid.jsonl"}
            if phase1:
                phase2_run(v, phase1, run, trained.get(v.after), files, device, training_flags)
            else:
                stage("train_sft.py", f"{SFT} {v.sft} {training_flags(v, 'sft', files)}", run, "finished.json", model=args.model, **files)
            run = trained[name] = choose(v, run, home, flags, *of("gsm8k-valid"), gpu)
            if name not in args.variants:
                continue  # trained for others to start from
            evaluation(flags, home / "eval", run, tests)
            if phase1 and v.ceiling:  # what phase 1's decoder does with its encoder's latents of the written chains
                evaluation(flags, phase1.parent / "eval", phase1, of("valid"), "written")
            if v.arms:
                evaluation(flags, home / "eval", run, of("gsm8k-test"), ARMS)
                evaluation(flags, home / "student", run, of("valid"), "written top-2 top-4")
                if solutions := solve_differently(trained["CoT-SFT"], seeded / "CoT-SFT", flags, *of("valid")):
                    stage("analyze.py", f"--seed {seed} --max-latents 64 {device}", home / "n_eff", "n_eff.json", model=run,
                          data=solutions)
            if args.alone:
                evaluation(flags, home / "alone", run, of("gsm8k-test"))


if __name__ == "__main__":
    run_main(main)
