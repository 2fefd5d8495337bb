"""The paper's claim on a real model, from a checkpoint and the data to the table and the pictures.

    python reproduce.py --model SmolLM2-135M-Instruct --data DIR --out results/smollm2 --minutes 60
    python reproduce.py --model SmolLM2-135M-Instruct --data DIR --out smoke --smoke          # a CPU, a few rows, minutes
    python reproduce.py --out results/smollm2 --report                                        # table and pictures again

DIR holds gsm8k-train.jsonl, gsm8k-valid.jsonl and the files of TESTS; gsm8k-sub-train.jsonl.gz is trained on too where it is. All is
done by the project's own scripts; what is finished is not done again. Of each variant the model is chosen, out of three along its
training, that is right most often on gsm8k-valid. --minutes scale the epochs: about those of one H100 for the MAIN
variants and one seed, as far as the speed of each stage tells. Writes OUT/results.json, OUT/table.md, OUT/length.svg and OUT/time.svg.
"""

from dataclasses import dataclass
from functools import partial
import gzip
import json
from pathlib import Path

import torch

from data import read_jsonl
from figures import draw_points
from load_hf_weights import read_config
from runs import UserError, at_least, call, file_hash, open_run, parser, read_json, run_main, write_json, write_text

TESTS = ("gsm8k-valid", "gsm8k-test", "svamp-test", "multiarith-test", "gsm-hard-test")
EPOCHS = {"sft": 3.0, "encoder": 0.25, "decoder": 0.25, "joint": 1.5, "phase2": 12.0}  # in 60 minutes
SFT = "--lr 5e-4 --batch-size 256"
PHASE1 = "--lr 3e-4 --warmup 0.1 --batch-size 256"  # at 1e-3 the latents collapsed onto one token (entropy 0)
PHASE2 = "--lr 5e-4 --batch-size 256"
EVAL = "--temperature 0 --max-latents 64 --max-new-tokens 160 --batch-size 512"
KEEP = "--keep 2"  # and the end: what is right most often on gsm8k-valid is chosen
SMOKE = "--max-steps 2 --batch-size 4"
ARMS = "forced floor random other argmax cut-4"  # what the latents are good for, on gsm8k-test


@dataclass
class Variant:
    """A row of the table. r = 0: trained on text (train_sft.py); phase1, phase2: flags of these scripts; arms: whether
    to try ARMS too."""
    r: int = 2
    phase1: str = ""
    phase2: str = "--all-weights"
    sft: str = ""
    arms: bool = False
    small: bool = False  # on gsm8k-train alone

    @property
    def ceiling(self) -> bool:
        """Whether latents can be handed to a model from outside: superpositions of a few tokens can."""
        return "--top-k 0" not in self.phase1 and "--top-k -1" not in self.phase1


VARIANTS = {
    "answer-only": Variant(0, sft="--no-chain"),
    "CoT-SFT": Variant(0),
    "Latent-r2": Variant(2, arms=True),
    "Latent-r3": Variant(3),
    "Latent-r4": Variant(4, arms=True),
    "r2-top1": Variant(2, "--top-k 1"),
    "r2-full-vocabulary": Variant(2, "--top-k 0", small=True),  # a cache of the whole vocabulary is large
    "r2-hidden-states": Variant(2, "--top-k -1"),
    "r2-no-induction": Variant(2, "--no-induction"),
    "r2-no-segments": Variant(2, "--no-segments"),
    "r2-noise": Variant(2, phase2="--all-weights --noise 1"),
    "r2-LoRA": Variant(2, phase2=""),
}
MAIN = ("answer-only", "CoT-SFT", "Latent-r2", "Latent-r4")


def write_data(source: Path, out: Path, smoke: bool) -> None:
    """train.jsonl (gsm8k-train three times and gsm8k-sub-train), small.jsonl (the former alone), valid.jsonl (gsm8k-valid where it has
    chains) and the evaluation files, in `out`."""
    plain, more = source / "gsm8k-train.jsonl", source / "gsm8k-sub-train.jsonl.gz"

    def lines_of(path: Path) -> list[str]:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as f:
            return [line for line in f.read().split("\n") if line.strip()]

    def write(name: str, lines: list[str]) -> None:
        write_text(out / f"{name}.jsonl", "".join(line + "\n" for line in lines))

    small = lines_of(plain)[:48 if smoke else None]
    write("small", small)
    write("train", small if smoke else 3 * small + (lines_of(more) if more.exists() else []))
    for name in TESTS:
        lines = lines_of(source / f"{name}.jsonl")[:4 if smoke else None]
        if name == "gsm8k-valid":
            write("valid", [line for line in lines if json.loads(line).get("cot")])
        write(name, lines)


def train_variant(v: Variant, base: Path, out: Path, data: Path, device: str, how) -> Path:
    """The run directory of a variant, trained in `out`; `how(stage)` are the flags of a stage."""
    files = {"data": data / ("small.jsonl" if v.small else "train.jsonl"), "valid": data / "valid.jsonl"}
    if not v.r:
        call("train_sft.py", f"{SFT} {KEEP} {v.sft} {how('sft')}", model=base, out=out / "sft", **files)
        return out / "sft"
    steps = {step: out / step for step in ("encoder", "decoder", "joint", "cache", "latent")}
    for step, flags in (("encoder", f"--compression {v.r} {v.phase1}"), ("decoder", ""), ("joint", "")):
        origin = {"model": base} if step == "encoder" else {"init": steps["encoder" if step == "decoder" else "decoder"]}
        call("train_phase1.py", f"--step {step} {flags} {PHASE1} {how(step)}", **origin, out=steps[step], **files)
    call("cache_latents.py", device, phase1=steps["joint"], data=files["data"], out=steps["cache"])
    call("train_phase2.py", f"{PHASE2} {KEEP} {v.phase2} {how('phase2')}", phase1=steps["joint"], cache=steps["cache"], out=steps["latent"], **files)
    return steps["latent"]


def choose(run: Path, home: Path, flags: str, valid: Path) -> tuple[Path, dict[str, float]]:
    """Of a run and what it kept on its way, the model that is right most often on gsm8k-valid; accuracy in % of each."""
    models, found = [run, *sorted(run.glob("step-*"))], {}
    for model in models:
        call("eval.py", flags, model=model, data=valid, out=home / f"valid-{model.name}")
        found[model.name] = read_json(home / f"valid-{model.name}" / f"{valid.stem}.json")["accuracy"]
    return max(models, key=lambda model: found[model.name]), found


def summaries(directory: Path) -> dict[str, dict]:
    """{file or file.arm: summary} of an evaluation's directory."""
    return {path.stem: read_json(path) for path in sorted(directory.glob("*.json")) if path.name != "settings.json"}


def main():
    p = parser(__doc__, seed=False)
    p.add_argument("--model", help="checkpoint directory to start from")
    p.add_argument("--data", help="directory of the data files")
    p.add_argument("--out", required=True, help="directory of everything that is made")
    p.add_argument("--minutes", type=at_least(1, float), default=60,
                   help="scale the epochs; an estimate of one H100's for the main variants and one seed")
    p.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(MAIN), help="what to train")
    p.add_argument("--tests", nargs="+", choices=TESTS, default=list(TESTS), help="what to evaluate on; gsm8k-test always")
    p.add_argument("--seeds", type=at_least(0), nargs="+", default=[1], help="all variants once for each")
    p.add_argument("--smoke", action="store_true", help="two steps on a few rows, to see that everything runs")
    p.add_argument("--report", action="store_true", help="only table and pictures, from results.json")
    args = p.parse_args()
    out, results = Path(args.out), Path(args.out) / "results.json"
    if not args.report:
        if not (args.model and args.data):
            raise UserError("--model, --data: name the checkpoint directory and that of the data (or --report)")
        train_all(args, out, results)
    report(read_json(results), out)


def train_all(args, out: Path, results: Path) -> None:
    source = Path(args.data)
    files = [source / "gsm8k-train.jsonl", *filter(Path.exists, [source / "gsm8k-sub-train.jsonl.gz"]), *(source / f"{t}.jsonl" for t in TESTS)]
    for check, path in [(read_config, args.model), *((read_jsonl, file) for file in files)]:
        check(path)  # says so if it is no good, before OUT belongs to it
    open_run(out, {"command": "reproduce", "model": str(Path(args.model).resolve()), "minutes": args.minutes, "smoke": args.smoke,
                   "data_hash": file_hash(*files)})
    data, device = out / "data", f"--device {args.device}" if args.device else ""
    if not (data / "gsm-hard-test.jsonl").exists():  # the last to be written
        write_data(source, data, args.smoke)
    small, whole = (sum(1 for _ in open(data / f"{name}.jsonl", encoding="utf-8")) for name in ("small", "train"))
    found = read_json(results) if results.exists() else {"runs": {}}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() and args.device != "cpu" else "CPU"
    found |= {"model": Path(args.model).name, "minutes": args.minutes, "smoke": args.smoke,
              "epochs": {stage: epochs * args.minutes / 60 for stage, epochs in EPOCHS.items()},
              "settings": {"sft": SFT, "phase1": PHASE1, "phase2": PHASE2, "eval": EVAL}}
    for seed in args.seeds:
        def how(stage, v):
            epochs = EPOCHS.get(stage, 0) * args.minutes / 60 * (whole / small if v.small else 1)  # as many steps on little data
            return f"--seed {seed} {device} " + (SMOKE if args.smoke else f"--epochs {epochs:.4g} --row-tokens 16384")
        home = out / f"seed{seed}"
        names = [name for name in VARIANTS if name in args.variants]
        if any(VARIANTS[name].r for name in names) and "CoT-SFT" not in names:
            names.insert(0, "CoT-SFT")  # phase 1 starts there
        cot_sft = None
        for name in names:
            v = VARIANTS[name]
            print(f"\n{name}, seed {seed}", flush=True)
            run = train_variant(v, cot_sft if v.r else Path(args.model), home / name, data, device, partial(how, v=v))
            flags = f"{EVAL} {device}" + (" --max-latents 8 --max-new-tokens 8 --batch-size 4" if args.smoke else "")
            of = lambda test: data / f"{test}.jsonl"
            run, on_valid = choose(run, home / name, flags, of("gsm8k-valid"))
            cot_sft = run if name == "CoT-SFT" else cot_sft
            call("eval.py", flags, model=run, data=[of(test) for test in TESTS if test in (*args.tests, "gsm8k-test")], out=home / name / "eval")
            if v.r and v.ceiling:  # what the decoder of phase 1 and the student can do, given the encoder's latents
                for stage, model in (("joint", home / name / "joint"), ("latent", run)):
                    call("eval.py", f"{flags} --arms written", model=model, data=of("valid"), out=home / name / f"eval-{stage}")
            if v.arms:
                call("eval.py", f"{flags} --arms {ARMS}", model=run, data=of("gsm8k-test"), out=home / name / "eval")
            found["runs"].setdefault(name, {})[f"seed{seed}"] = summaries(home / name / "eval") | {
                f"{stage}.{key}": s for stage in ("joint", "latent") for key, s in summaries(home / name / f"eval-{stage}").items()} | {
                "made": {"device": gpu, "torch": torch.__version__, "chosen": run.name, "on_valid": on_valid}}
            write_json(results, found)


def report(found: dict, out: Path) -> None:
    """table.md, length.svg and time.svg from results.json."""
    tests = [t for t in TESTS if any(t in s for seeds in found["runs"].values() for s in seeds.values())]
    lines = [f"{found['model']}, " + ("SMOKE: two steps of everything" if found["smoke"] else f"a budget of {found['minutes']:g} minutes") + "\n",
             "| | seed | " + " | ".join(f"{t} %" for t in tests) + " | #L, gsm8k-test | ms per problem | phase 1 on valid % "
             "| student, its latents | on |",
             "| --- | --- |" + " --- |" * (len(tests) + 5)]
    points = []
    for name, seeds in found["runs"].items():
        for seed, s in seeds.items():
            test = s["gsm8k-test"]
            cells = [f"{s[t]['accuracy']:.1f} ± {s[t]['interval']:.1f}" if t in s else "" for t in tests]
            ceilings = [f"{s[key]['accuracy']:.1f}" if key in s else "" for key in ("joint.valid.written", "latent.valid.written")]
            lines.append(f"| {name} | {seed.removeprefix('seed')} | " + " | ".join(cells) + f" | {test['chain_length']:.1f} | "
                         f"{1000 * test['seconds_per_problem']:.2f} | " + " | ".join(ceilings) + f" | {s['made']['device']} |")
            points.append((name, test))
    arms = [(name, seed, key.split(".", 1)[1], s[key]) for name, seeds in found["runs"].items() for seed, s in seeds.items()
            for key in s if key.startswith("gsm8k-test.")]
    if arms:
        lines += ["", "| gsm8k-test | seed | arm | accuracy % | #L | answer tokens |", "| --- | --- | --- | --- | --- | --- |"]
        lines += [f"| {name} | {seed.removeprefix('seed')} | {arm} | {s['accuracy']:.1f} ± {s['interval']:.1f} | {s['chain_length']:.1f} | "
                  f"{s['answer_tokens']:.1f} |" for name, seed, arm, s in arms]
    write_text(out / "table.md", table := "\n".join(lines) + "\n")
    for file, key, scale, label in (("length.svg", "chain_length", 1, "chain length, tokens or latents"),
                                    ("time.svg", "seconds_per_problem", 1000, "milliseconds per problem")):
        draw_points(out / file, [(name, scale * s[key], s["accuracy"], s["interval"]) for name, s in points], label, "accuracy on gsm8k-test, %")
    print(f"\n{table}\n{out}/results.json, {out}/table.md, {out}/length.svg, {out}/time.svg")


if __name__ == "__main__":
    run_main(main)
