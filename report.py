"""What reproduce.py measured, as a table and two pictures: accuracy over the length of chains, and over the time that a problem takes.

    python report.py results/smollm2-14min

Reads DIR/results.json; writes DIR/table.md, DIR/length.svg and DIR/time.svg (of variants timed alone, where there are any).
"""

from pathlib import Path

from figures import draw_points, table
from runs import UserError, parser, read_json, run_main, write_text

TESTS = ("gsm8k-valid", "gsm8k-test", "svamp-test", "multiarith-test", "gsm-hard-test")  # the columns, and what reproduce.py evaluates on


def report(out: Path) -> None:
    found = read_json(out / "results.json")
    if not isinstance(found.get("runs"), dict) or not found["runs"]:
        raise UserError(f"{out}/results.json: holds no runs of reproduce.py; name another directory, or train a variant first")
    runs = [(name, seed.removeprefix("seed"), s) for name, seeds in found["runs"].items() for seed, s in seeds.items()]
    for name, seed, s in runs:
        if not {"gsm8k-test", "made"} <= s.keys():
            raise UserError(f"{out}/results.json: {name}, seed {seed}, lacks \"gsm8k-test\" or \"made\"; let reproduce.py make it again")
    tests = [t for t in TESTS if any(t in s for *_, s in runs)]
    percent = lambda s: f"{s['accuracy']:.1f} ± {s['interval']:.1f}"
    rows, arms, held, points = [], [], [], []
    for name, seed, s in runs:
        test, alone, made = s["gsm8k-test"], s.get("alone.gsm8k-test"), s["made"]
        seconds = (alone or test)["seconds_per_problem"]
        points.append((name, bool(alone), test | {"seconds_per_problem": seconds}))
        ceilings = [f"{s[key]['accuracy']:.1f}" if key in s else "" for key in ("phase1.valid.written", "student.valid.written")]
        rows.append([name, seed, *(percent(s[t]) if t in s else "" for t in tests), f"{test['chain_length']:.1f}",
                     f"{1000 * seconds:.2f}{' alone' * bool(alone)}", *ceilings, made["device"]])
        arms += [[name, seed, key.split(".", 1)[1], percent(x), f"{x['chain_length']:.1f}", f"{x['answer_tokens']:.1f}"]
                 for key, x in s.items() if key.startswith("gsm8k-test.")]
        if "ecr@5" in (own := s.get("gsm8k-valid", {})):
            paths = s.get("n_eff", {})
            held.append([name, seed, *(f"{own[key]:.2f}" if key in own else "" for key in ("ecr@5", "ecr@10", "entropy")),
                         *(f"{paths[key]:.3f}" if key in paths else "" for key in ("n_eff", "random")), str(paths.get("problems", ""))])
    parts = [f"{found['model']}, " + ("SMOKE: two steps of everything" if found["smoke"] else f"a budget of {found['minutes']:g} minutes") + "\n",
             table(["", "seed", *(f"{t} %" for t in tests), "#L, gsm8k-test", "ms per problem", "phase 1 on valid %",
                    "student, its latents", "on"], rows)]
    if arms:
        parts.append(table(["gsm8k-test", "seed", "arm", "accuracy %", "#L", "answer tokens"], arms))
    if held:
        parts.append(table(["latents, gsm8k-valid", "seed", "ECR@5", "ECR@10", "entropy, nats", "N_eff", "random", "problems"], held))
    write_text(out / "table.md", text := "\n".join(parts))
    timed = [point for point in points if point[1]] or points  # beside other work a time means little
    for file, key, scale, label, of in (("length.svg", "chain_length", 1, "chain length, tokens or latents", points),
                                        ("time.svg", "seconds_per_problem", 1000, "milliseconds per problem", timed)):
        draw_points(out / file, [(name, scale * s[key], s["accuracy"], s["interval"]) for name, _, s in of], label, "accuracy on gsm8k-test, %")
    print(f"\n{text}\n{out}/table.md, {out}/length.svg, {out}/time.svg")


def main():
    p = parser(__doc__, seed=False, device=False)
    p.add_argument("directory", help="what was --out of reproduce.py")
    report(Path(p.parse_args().directory))


if __name__ == "__main__":
    run_main(main)
