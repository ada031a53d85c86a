"""Measure what the parts of LESA's predictor are worth: one MLP, one KAN, an MLP for each stage, a KAN for each stage.

    python benchmarks/ablation.py --data out/runs --schedule paper:5

The same four as in the paper's ablation (arXiv 2602.20497, interval 5), trained on the runs that `lesa collect` wrote.
Each network turns the differences t_s - grid into alpha; an MLP has as many parameters as the KAN that it stands for,
and all start as near as they come to the straight line through the newest two full steps. They are trained themselves,
as in the paper, on the loss on the latents, at each of the learning rates, and the one that ends nearest to the
validation runs is taken. The last row is the recipe of this package, which fits the alphas and lets the KANs take them
up. Drift is how far runs of the validation prompts end from their reference runs; PSNR is against the same model's
held-out pictures with every step full, and the difference is to one MLP, pair by pair; both with bootstrap 95 %
intervals.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import lesa
from lesa.bench.benchmark import compare
from lesa.bench.methods import Method, fewer_steps, forecast
from lesa.bench.report import markdown
from lesa.host.head import head
from lesa.host.tap import tap_of
from lesa.learn.call_files import read_prompts
from lesa.learn.collect import record
from lesa.learn.collecting import VALIDATION_SEED
from lesa.learn.metrics import interval
from lesa.learn.training import Config, Lesson, train
from lesa.learn.trajectory import Store, Trajectory
from lesa.predictors import LESA, Origin, configuration
from lesa.rows.forecasters import Taylor

MODEL = "models/emoji-flux"
MEMORY = 8  # of the newest features that one expert for all stages combines
HEADS = ("method", "parameters", "learning rate", "drift, dB", "PSNR, dB [95 %]", "difference, dB [95 %]")


class WithMLP(LESA):
    """LESA with an MLP in the place of each KAN, of as many parameters."""

    method = "lesa-mlp"

    def __init__(self, origin: Origin, *, width: int = 256, **options: Any):
        super().__init__(origin, **options)
        inputs = len(self.grid)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for stream in origin.streams:
                for expert in self.stage_experts(stream):
                    layers = nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
                    expert.kan = nn.Sequential(*layers, nn.Linear(width, 1))
                self._start_at(self.slopes(), stream)

    @torch.no_grad()
    def _start_at(self, alphas: torch.Tensor, stream: str) -> None:
        """Fit every stage's last layer to alphas: the nearest that it comes to them with small weights."""
        for stage, expert in enumerate(self.stage_experts(stream)):
            mine = [step for step, other in enumerate(self.stages) if other == stage]
            *first, last = list(expert.kan)
            x = nn.Sequential(*first)(self._differences(mine)).double()
            x = torch.cat([x, torch.ones(len(mine), 1)], dim=1)
            solved = torch.linalg.pinv(x, rtol=1e-3) @ alphas[mine].double()
            last.weight.copy_(solved[None, :-1])
            last.bias.copy_(solved[-1:])


class Trained(NamedTuple):
    predictor: LESA
    rate: float
    drift: float


class Training:
    """The runs that all are trained and validated on, and how they are."""

    def __init__(self, options: argparse.Namespace, pipe: Any):
        self.pipe, self.tap, store = pipe, tap_of(pipe.transformer), Store.open(options.data)
        self.call, self.batch = store.collection.call, options.batch_size
        reference = list(store)
        self.tokens = reference[0].tokens
        self.prompts = read_prompts(Path(options.model) / "prompts" / "validation.txt")[: options.validation]
        self.seeds = range(VALIDATION_SEED, VALIDATION_SEED + len(self.prompts))
        self.lesson = Lesson(reference, self.runs(self.prompts, self.seeds))
        self.config = Config(rounds=options.rounds, updates=tuple(options.updates))
        self.origin = Origin(
            model=options.model,
            transformer=type(pipe.transformer).__name__,
            config=configuration(pipe.transformer),
            tap=self.tap,
            grid=tuple(reference[0].grid.tolist()),
            schedule=str(options.schedule),
            streams=reference[0].streams,
        )

    def runs(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Trajectory]:
        recorded: list[Trajectory] = []
        for k in range(0, len(prompts), self.batch):
            part = slice(k, k + self.batch)
            recorded += record(self.pipe, prompts[part], seeds[part], self.tokens, self.tap, **self.call)
        return recorded

    def record_runs(self, predictor: Any, lesson: Lesson) -> tuple[list[Trajectory], list[Trajectory]]:
        with lesa.accelerate(self.pipe, predictor):
            trained = self.runs([run.prompt for run in lesson.reference], [run.seed for run in lesson.reference])
            return trained, self.runs(self.prompts, self.seeds)

    def best(self, predictor: LESA, rates: Sequence[float], free_alphas: bool = False) -> Trained:
        """Train a predictor at each learning rate, and return the one whose validation runs drift least."""
        found = []
        for rate in rates:
            config = replace(self.config, learning_rate=rate, free_alphas=free_alphas)
            result = train(predictor, [self.lesson], head(self.pipe.transformer, self.tap), self.record_runs, config)
            assert isinstance(result.predictor, LESA)
            found.append(Trained(result.predictor, rate, min(result.scores)))
        return min(found, key=lambda one: one.drift)


def networks(predictor: LESA) -> int:
    """Count the parameters of a predictor's networks."""
    stream = predictor.origin.streams[0]
    return sum(p.numel() for expert in predictor.stage_experts(stream) for p in expert.kan.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--data", type=Path, default=Path("out/runs"), help="what lesa collect wrote (out/runs)")
    parser.add_argument("--schedule", type=lesa.Schedule.parse, default="paper:5", help="(paper:5)")
    parser.add_argument("--rates", type=float, nargs="+", default=(1e-3, 5e-3), help="learning rates (0.001 0.005)")
    parser.add_argument("--rounds", type=int, default=2, help="of each training's closed-loop phase (2)")
    parser.add_argument("--updates", type=int, nargs=2, default=(200, 200), help="in each phase or round (200 200)")
    parser.add_argument("--validation", type=int, default=24, help="how many validation prompts (24)")
    parser.add_argument("--pairs", type=int, default=100, help="how many held-out prompts, the k-th with seed k (100)")
    parser.add_argument("--batch-size", type=int, default=16)
    options = parser.parse_args()

    pipe = lesa.load(options.model)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.requires_grad_(False)
    training = Training(options, pipe)
    origin = training.origin
    one: dict[str, Any] = dict(bounds=(), memories=(MEMORY,))
    found = {
        "one MLP": training.best(WithMLP(origin, **one), options.rates),
        "one KAN": training.best(LESA(origin, **one), options.rates),
        "staged MLP": training.best(WithMLP(origin), options.rates),
        "staged KAN": training.best(LESA(origin), options.rates),
        "LESA": training.best(LESA(origin), [Config.learning_rate], free_alphas=True),
    }
    plain = {f"Taylor-{order} (our tap)": Taylor(order) for order in (1, 2)}
    methods = [fewer_steps(len(found["LESA"].predictor.full))]
    methods += [forecast(name, taylor, options.schedule) for name, taylor in plain.items()]
    methods += [forecast(name, trained.predictor, options.schedule) for name, trained in found.items()]
    prompts = read_prompts(Path(options.model) / "prompts" / "heldout.txt")[: options.pairs]
    compared = compare(pipe, methods, prompts, range(len(prompts)), timed=0, shown=0, batch_size=options.batch_size)

    def row(method: Method) -> tuple[str, ...]:
        psnr = f"{interval([one.psnr for one in compared.records[method.key]]):.2f}"
        if method.name not in found:
            return method.name, "-", "-", "-", psnr, "-"
        trained, base = found[method.name], ("one MLP", str(options.schedule))
        apart = "-" if method.key == base else f"{compared.difference(method.key, base):+.2f}"
        return method.name, str(networks(trained.predictor)), f"{trained.rate:g}", f"{trained.drift:.2f}", psnr, apart

    print(f"\n{options.model}, {options.schedule}, {len(prompts)} held-out pairs\n")
    print(markdown(HEADS, [row(method) for method in methods], text=1))


if __name__ == "__main__":
    main()
