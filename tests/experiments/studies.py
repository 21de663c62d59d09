"""Studies for tests: of any config, with results that were never trained."""

from experiments.studies import STUDIES, Result, Study, by_run, config_of


def study_of(name, folder, size="small", **fields):
    config = config_of(name, size)
    config.update_from_flattened_dict(fields)
    return Study.from_config(config, folder)


def result_of(run, accuracy=0.5, loss=1.0, state_size=100):
    return Result(
        run, {"loss": loss, "accuracy": accuracy}, parameters=7, steps=3, seconds=2.0,
        milliseconds_per_step=1.5, peak_memory_bytes=10**8, state_size=state_size,
    )  # fmt: skip


def judged(name, folder, of_run):
    study = study_of(name, folder)
    lines = by_run(of_run(run) for run in study.runs)
    return study, lines, STUDIES[name](lines)
