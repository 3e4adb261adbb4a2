# SPDX-License-Identifier: BSD-3-Clause
"""``ssmkernels train METHOD``: a trainer's configuration from YAML and the command line, by jsonargparse."""

from __future__ import annotations

import functools
import re
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter, set_parsing_settings

from ssmkernels._names import unknown
from ssmkernels.distributed import is_of_lost_rank
from ssmkernels.trainers.checkpoint import one_line
from ssmkernels.trainers.classifier import DataConfig
from ssmkernels.trainers.loop import RunResult
from ssmkernels.trainers.mixed_lp import SELECTED_BY, MixedLPConfig, train_mixed_lp
from ssmkernels.trainers.mlsn import MLSNConfig, train_mlsn
from ssmkernels.trainers.ranks import this_rank
from ssmkernels.trainers.simmatch import SimMatchConfig, train_simmatch
from ssmkernels.trainers.slade import SELECTED_BY as SLADE_SELECTED_BY
from ssmkernels.trainers.slade import train_slade
from ssmkernels.trainers.slade_config import SladeConfig
from ssmkernels.trainers.swav import SwAVConfig, train_swav

CONFIGS = Path(__file__).parent / "configs"


class Method(NamedTuple):
    summary: str
    config: type
    train: Callable[..., RunResult]
    run_name: Callable[[Any], str]  # of a run without a --config
    reported: tuple[str, ...]  # the evaluation figures that are printed: their medians,
    best: str | None = None  # or what they were when this one was best


METHODS = {
    "mixed-lp": Method(
        "mixed label propagation: embeddings from few labels (CVPR 2023)",
        MixedLPConfig,
        train_mixed_lp,
        lambda config: f"{config.data.name}-{config.pseudo_labels}",
        ("test_NMI", *(f"test_{figure}@{k}" for figure in "RP" for k in (1, 2, 4, 8)), "test_MAP@R"),
        best=SELECTED_BY,
    ),
    "mlsn": Method(
        "Mean Teacher with a similarity network (2020)",
        MLSNConfig,
        train_mlsn,
        lambda config: f"{config.data.name}-{_labels_name(config.data)}",
        ("ema_error", "student_error"),
    ),
    "simmatch": Method(
        "SimMatch; FixMatch and supervised training are settings of it (CVPR 2022)",
        SimMatchConfig,
        train_simmatch,
        lambda config: f"{config.data.name}-{_labels_name(config.data)}",
        ("ema_accuracy", "student_accuracy"),
    ),
    "slade": Method(
        "SLADE: self-training for metric learning (2021)",
        SladeConfig,
        train_slade,
        lambda config: f"{config.data.name}-{config.student}",
        ("test_MAP@R", "test_RP", "test_P@1"),
        best=SLADE_SELECTED_BY,
    ),
    "swav": Method(
        "SwAV, from which SLADE starts (NeurIPS 2020)",
        SwAVConfig,
        train_swav,
        lambda config: f"{config.data.name}-{Path(config.model).name}",
        ("test_MAP@R", "test_RP", "test_P@1"),
    ),
}


def _labels_name(images: DataConfig) -> str:
    return str(images.labels) if images.labels_file is None else Path(images.labels_file).stem


def config_names(method: str) -> list[str]:
    """The configurations that come with the package."""
    return sorted(path.stem for path in (CONFIGS / method).glob("*.yaml"))


def parse_config(method: str, argv: Sequence[str]) -> tuple[Any, bool]:
    """The configuration that ``argv`` describes, and whether ``--resume`` is in it. Later arguments win over earlier
    ones.
    """
    parser = _parser(method)
    values = vars(parser.instantiate(parser.parse_args(_find_configs(method, argv))))
    config_type = METHODS[method].config
    config = config_type(**{setting.name: values[setting.name] for setting in fields(config_type)})
    config.run.compile |= values["compile"]
    return config, values["resume"]


def main(argv: Sequence[str]) -> int:
    method = argv[0] if argv else "--help"
    if method in ("-h", "--help"):
        print(_usage())
        return 0 if argv else 2
    if method not in METHODS:
        print(f"ssmkernels train: {unknown(f'there is no method {method!r}', method, METHODS)}", file=sys.stderr)
        return 2
    try:
        config, resume = parse_config(method, argv[1:])
        if config.run.out is None:
            config.run.out = f"runs/{method}/{_config_name(argv) or METHODS[method].run_name(config)}-seed{config.seed}"
        result = METHODS[method].train(config, resume=resume)
    except ModuleNotFoundError:
        raise  # ssmkernels.cli says what to install
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
        print(f"ssmkernels train: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if not is_of_lost_rank(error):
            raise
        print(
            f"ssmkernels train: another rank ended, or did not answer for {config.run.timeout:g} s (--run.timeout);"
            f" --resume goes on from the last checkpoint. ({one_line(error)})",
            file=sys.stderr,
        )
        return 1
    if this_rank()[0] > 0:  # torchrun's first rank speaks for all
        return 0
    if not result.finished:
        again = shlex.join(
            ["ssmkernels", "train", *(argument for argument in argv if argument != "--resume"), "--resume"]
        )
        print(
            f"Stopped after step {result.step} of {result.steps}; the checkpoint is in {config.run.out}. To go on:"
            f" {again}"
        )
        return 128 + (result.stopped_by or signal.SIGINT)
    _report(METHODS[method], result)
    print(f"The run is in {config.run.out}.")
    return 0


def _usage() -> str:
    width = max(map(len, METHODS))
    methods = "\n".join(f"  {name:<{width}}  {method.summary}" for name, method in METHODS.items())
    return (
        f"usage: ssmkernels train METHOD [--config NAME] [--resume] ...\n\n{methods}\n\n"
        "ssmkernels train METHOD --help says what its settings are."
    )


def _report(method: Method, result: RunResult) -> None:
    if method.best is None or method.best not in result.history[-1]:  # nothing to select by without validation
        last, end = min(20, len(result.history)), result.history[-1]
        for name in method.reported:
            print(
                f"{name}: {result.median(name):.4f} as the median of the last {last} evaluations, {end[name]:.4f} at"
                " the end"
            )
        return
    record, count = result.best(method.best), len(result.history)
    print(
        f"{method.best}: {record[method.best]:.4f}, the best of {count} evaluations, after step {record['step']}; there"
    )
    for name in method.reported:
        print(f"{name}: {record[name]:.4f}")


class PlainHelp(DefaultHelpFormatter):
    """Docstrings without the markup of Sphinx."""

    def format_help(self) -> str:
        text = re.sub(r":\w+:`~?([^`]+)`", r"\1", super().format_help())
        return text.replace("``", "")


class NearNames(ArgumentParser):
    """Says which settings a misspelt one is near to."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        wrong = re.match(r"unrecognized arguments: --(?P<name>[^\s=]+)", message)
        wrong = wrong or re.match(r"(Group '(?P<group>[^']+)' does not accept o|O)ption '(?P<name>[^']+)'", message)
        if wrong:
            parts = wrong.groupdict()
            name = f"{parts['group']}.{parts['name']}" if parts.get("group") else parts["name"]
            names = [option.removeprefix("--") for action in self._actions for option in action.option_strings]
            near = get_close_matches(name, names, n=3, cutoff=0.7)
            message += f"; did you mean {' or '.join(near)}?" if near else ""
        super().error(message, ex)


@functools.cache  # to make it takes four times as long as to parse, and experiments parse hundreds of configurations
def _parser(method: str) -> ArgumentParser:
    if find_spec("docstring_parser") is not None:  # the help then says what each setting is
        set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = NearNames(
        prog=f"ssmkernels train {method}",
        formatter_class=PlainHelp,
        usage=(
            f"ssmkernels train {method} [--config NAME] [--data.root DIR] [--seed N] [--resume] [--SETTING VALUE ...]"
        ),
        epilog=f"Configurations that come with the package: {', '.join(config_names(method))}.",
    )
    parser.add_argument(
        "--config", action=ActionConfigFile, help="one of the configurations below, or the path of a YAML file"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in run.out, if there is one")
    parser.add_argument("--compile", action="store_true", help="the same as --run.compile true")
    parser.add_class_arguments(METHODS[method].config)
    return parser


def _find_configs(method: str, argv: Sequence[str]) -> list[str]:
    """``argv`` with the name of a shipped configuration after ``--config`` turned into its path."""
    arguments = _arguments(argv)
    for position in range(1, len(arguments)):
        name = arguments[position]
        if arguments[position - 1] == "--config" and not Path(name).is_file():
            path = CONFIGS / method / f"{name}.yaml"
            if not path.exists():
                what = f"--config is {name!r}, which is neither a YAML file nor comes with the package"
                raise ValueError(unknown(what, name, config_names(method)))
            arguments[position] = str(path)
    return arguments


def _arguments(argv: Sequence[str]) -> list[str]:
    """``argv`` with ``--config=NAME`` in two."""
    arguments: list[str] = []
    for argument in argv:
        arguments += argument.split("=", 1) if argument.startswith("--config=") else [argument]
    return arguments


def _config_name(argv: Sequence[str]) -> str | None:
    """The name after ``--config``."""
    arguments = _arguments(argv)
    return Path(arguments[arguments.index("--config") + 1]).stem if "--config" in arguments[:-1] else None
