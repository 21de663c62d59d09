"""Judges `configs/approximation.py`: random features, low rank, and patterns of blocks."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from experiments import setup
from experiments.studies import estimates
from experiments.studies.study import Findings, Line, Run, by_kind
from qkv_jax import data, nn, viz
from qkv_jax.models import attention_inputs
from qkv_jax.viz import Dots, Panel

COUNTS = (4, 16, 64, 256, 1024)  # features
MANY = 16  # features from which on slopes and quotients are taken
ROWS = 4  # of the validation text, whose attention is approximated
RADIUS, FEATURES, DIM = 1.5, 64, 16  # of the kernel's estimates
SLOPE = (-1.2, -0.8)  # of the squared error against the features, that counts as 1 / m
# Of which the error is taken; the law of 1 / m is judged by the first, where m is large enough.
DEVIATIONS = {"q, k ~ N(0, 1/9)": 1 / 3, "q, k ~ N(0, 1)": 1.0}
GAUSSIAN, TRAINED = next(iter(DEVIATIONS)), "trained model"

# Zaheer et al. 2020, table 1, rows of 512 tokens: accuracy of masked words, per cent.
PUBLISHED = {"full": 64.2, "random": 60.1, "window": 58.3, "random + window": 62.7}

CAPTIONS = {
    "features": "Claimed: both lines fall as steeply as 1 / m, the orthogonal one below. "
    "Squared error of attention's output, in its own size. The law is judged on the left, where "
    "queries and keys are small; the larger they are, the more features it takes to begin.",
    "kernel": "Claimed: trigonometric features blow up on the right, where exp(q . k) is "
    "small, which is where most weights are; positive ones vanish with it.",
    "rank": "Claimed: errors fall with the rank. Squared error of the trained model's "
    "attention; a matrix of that rank has at least about the error of the best one.",
    "patterns": "Claimed: random blocks and a window together are to the right of either "
    "alone, near full attention. Accuracy of hidden characters and of digits, with the "
    "range over seeds; the paper's is of hidden words.",
}

NOTE = (
    "Likely reasons where it differs. Nystrom's method inverts the landmarks' attention to one "
    "another, which is nearly singular where the many landmarks of a high rank are alike and "
    "weights are sharp: iterating its pseudo-inverse for longer makes that error larger, not "
    "smaller. And a text's hidden characters follow from those beside them, so a window alone is "
    "as good as full attention there; a digit's pixels do not, and there the random blocks help."
)


@dataclasses.dataclass(frozen=True)
class Measured:
    """What `experiments.studies.estimates` says.

    Args:
      features: of which queries and keys -> kind of features -> their number -> relative error.
      kernel: kind of features -> angle in degrees -> relative error.
      ranks: name -> rank -> relative error.
    """

    features: Mapping[str, Mapping[str, Mapping[int, float]]]
    kernel: Mapping[str, Mapping[float, float]]
    ranks: Mapping[str, Mapping[int, float]]

    def rows(self) -> list[dict[str, float | str]]:
        """Every number: what was estimated, how, at what number, angle or rank, and the error."""
        found = {
            **{f"attention, {name}": of_kind for name, of_kind in self.features.items()},
            "exp(q . k), root of the squared error": self.kernel,
            f"attention, {TRAINED}, low rank": self.ranks,
        }
        return [
            {"what": what, "by": kind, "at": at, "relative_error": error}
            for what, kinds in found.items()
            for kind, errors in kinds.items()
            for at, error in errors.items()
        ]


def judge(lines: Sequence[Line]) -> Findings:
    """Measures the estimates, and finds whether all is as claimed."""
    return find(lines, measure(by_kind(lines)["text"]["full"].results[0].run))


def measure(run: Run) -> Measured:
    """The errors of all estimates, of Gaussian queries and keys and of a trained run's."""
    trained = trained_inputs(run)
    length = trained[0].shape[1]
    ranks = tuple(2**i for i in range(1, length.bit_length()) if 2**i < length)
    inputs = {
        name: estimates.gaussian(128, DIM, deviation=deviation)
        for name, deviation in DEVIATIONS.items()
    }
    return Measured(
        {
            name: {kind: estimates.performer_errors(qkv, kind, COUNTS) for kind in estimates.DRAWS}
            for name, qkv in (inputs | {TRAINED: trained}).items()
        },
        estimates.kernel_errors(num_features=FEATURES, radius=RADIUS, dim=DIM),
        estimates.rank_errors(trained, ranks),
    )


def trained_inputs(run: Run) -> estimates.QKV:
    """Queries, keys and values of all layers, [L B, T, N, H], on rows of the validation text."""
    trained = setup.load_run(str(run.workdir))
    batch = data.random_windows(
        trained.task.text.validation, step=0, stream=data.TEST,
        **(trained.settings.windows | {"batch_size": ROWS}),
    )  # fmt: skip
    model = trained.task.stack(nn.merge(trained.graphdef, trained.params))
    inputs = attention_inputs(model, batch["inputs"])
    return tuple(x.reshape(-1, *x.shape[2:]).astype("float32") for x in inputs)


def find(lines: Sequence[Line], measured: Measured) -> Findings:
    """Whether the claim's four parts hold: features, kernel, rank, patterns."""
    kinds = by_kind(lines)
    slopes = {kind: _slope(errors) for kind, errors in measured.features[GAUSSIAN].items()}
    ratio = {name: _ratio(of_kind) for name, of_kind in measured.features.items()}
    widest = max(measured.kernel["positive"])  # the angle at which the kernel is smallest
    small = {kind: errors[widest] for kind, errors in measured.kernel.items()}
    falls = {
        name: errors[min(errors)] / max(errors[max(errors)], 1e-12)
        for name, errors in measured.ranks.items()
    }
    gains = {
        kind: named["random + window"].mean("accuracy")
        - max(named[name].mean("accuracy") for name in ("random", "window"))
        for kind, named in kinds.items()
    }
    parts = {
        "1 / m": all(SLOPE[0] <= slope <= SLOPE[1] for slope in slopes.values()),
        "the gain of orthogonal features": ratio[GAUSSIAN] < 1,
        "positive features' small weights": small["positive"] < min(1, small["trigonometric"]),
        **{f"the fall with the rank of {name}": fall > 1 for name, fall in falls.items()},
        **{f"random + window together ({kind})": gain > 0 for kind, gain in gains.items()},
    }
    found = (
        f"Squared error for {GAUSSIAN} ~ m^"
        + ", m^".join(f"{slope:.2f} ({kind})" for kind, slope in slopes.items())
        + "".join(
            f", for {name} m^{_slope(of_kind['orthogonal']):.2f}"
            for name, of_kind in measured.features.items()
            if name != GAUSSIAN
        )
        + "; orthogonal features' error is "
        + " and ".join(f"{value:.2f} ({name})" for name, value in ratio.items())
        + f" of independent ones'. Where the kernel is smallest, positive features err by "
        f"{small['positive']:.2f} of it, trigonometric ones by {small['trigonometric']:.2f}. From "
        "the smallest rank to the largest the squared error falls by a factor of "
        + ", ".join(f"{value:.3g} ({name})" for name, value in falls.items())
        + ". Random blocks with a window are "
        + ", ".join(f"{100 * gain:+.1f} points ({kind})" for kind, gain in gains.items())
        + " from the better of the two alone."
    )
    return Findings(
        parts=parts,
        ours=f"MSE ~ m^{slopes['orthogonal']:.2f}; accuracy, %: "
        + "; ".join(
            f"{kind}: "
            + ", ".join(f"{name} {100 * line.mean('accuracy'):.1f}" for name, line in named.items())
            for kind, named in kinds.items()
        ),
        found=found,
        figures={
            "features": _features_figure(measured.features),
            "kernel": _kernel_figure(measured.kernel),
            "rank": _rank_figure(measured.ranks),
            "patterns": _patterns_figure(kinds),
        },
        captions=CAPTIONS,
        notes=(NOTE,),
        tables={"errors": measured.rows()},
    )


def _slope(errors: Mapping[int, float]) -> float:
    """Of the logarithm of the error against that of the number of features."""
    x, y = np.log([(m, error) for m, error in errors.items() if m >= MANY]).T
    return float(np.polyfit(x, y, 1)[0])


def _ratio(of_kind: Mapping[str, Mapping[int, float]]) -> float:
    """Orthogonal features' error in independent ones', the geometric mean over numbers."""
    numbers = [m for m in of_kind["orthogonal"] if m >= MANY]
    logs = [math.log(of_kind["orthogonal"][m] / of_kind["independent"][m]) for m in numbers]
    return math.exp(np.mean(logs))


def _features_figure(found: Mapping[str, Mapping[str, Mapping[int, float]]]):
    panels = []
    for name, of_kind in found.items():
        lines = {kind: _log10(errors) for kind, errors in of_kind.items()}
        first = of_kind["independent"][COUNTS[0]]
        lines["1 / m"] = _log10({m: first * COUNTS[0] / m for m in (COUNTS[0], COUNTS[-1])})
        panels.append(Panel(name, lines, "random features m"))
    return viz.lines_figure(
        panels, y_label="log10 of relative squared error", log_x=True,
        title="Performer's error",
    )  # fmt: skip


def _kernel_figure(found: Mapping[str, Mapping[float, float]]):
    lines = {kind: _log10(errors) for kind, errors in found.items()}
    title = f"|q| = |k| = {RADIUS:g}, {FEATURES} features"
    return viz.lines_figure(
        [Panel(title, lines, "angle of q and k, degrees", {"100 %": 0.0})],
        y_label="log10 of relative error", title="Estimates of exp(q . k)",
    )  # fmt: skip


def _rank_figure(found: Mapping[str, Mapping[int, float]]):
    lines = {name: _log10(errors) for name, errors in found.items()}
    return viz.lines_figure(
        [Panel("trained model", lines, "rank")],
        y_label="log10 of relative squared error", log_x=True, title="Low rank",
    )  # fmt: skip


def _log10(values: Mapping[float, float]) -> list[tuple[float, float]]:
    return [(x, math.log10(max(y, 1e-8))) for x, y in values.items()]


def _patterns_figure(kinds: Mapping[str, Mapping[str, Line]]):
    panels = [
        Dots(
            f"ours, {kind}",
            {
                "ours": {
                    name: (100 * line.mean("accuracy"), 100 * line.spread("accuracy"))
                    for name, line in named.items()
                }
            },
            "accuracy, %",
        )
        for kind, named in kinds.items()
    ]
    return viz.dots_figure(
        [*panels, Dots("BigBird, words", {"paper": PUBLISHED}, "accuracy, %")],
        title="BigBird's building blocks",
    )
