# SPDX-License-Identifier: BSD-3-Clause
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from ssmkernels import trainers
from ssmkernels.trainers.checkpoint import load_checkpoint
from ssmkernels.trainers.cli import METHODS, config_names, main, parse_config

SMALL = [
    "--config",
    "digits",
    "--model",
    "wrn-10-1",
    "--batch_size",
    "4",
    "--mu",
    "2",
    "--run.accelerator",
    "cpu",
    "--run.bar",
    "false",
]


def test_every_shipped_configuration_is_valid():
    names = config_names("simmatch")
    assert {"cifar10-40", "cifar10-250", "cifar10-4000", "cifar100-400", "cifar100-2500", "cifar100-10000"} <= set(
        names
    )
    assert {
        "imagenet-1",
        "imagenet-10",
        "svhn-40",
        "svhn-250",
        "svhn-1000",
        "digits",
        "mnist5k",
        "cifar10-small",
    } <= set(names)
    for name in names:
        config, resume = parse_config("simmatch", ["--config", name])
        assert config.run.out is None
        assert not resume


def test_table_1_and_2_recipes():
    config, _ = parse_config("simmatch", ["--config", "cifar100-400"])
    assert (config.model, config.weight_decay, config.batch_size, config.mu, config.steps) == (
        "wrn-28-8",
        1e-3,
        64,
        7,
        2**20,
    )
    assert (config.data.name, config.data.labels, config.threshold, config.alpha, config.temperature) == (
        "cifar100",
        400,
        0.95,
        0.9,
        0.1,
    )
    config, _ = parse_config("simmatch", ["--config", "imagenet-10"])
    assert (config.model, config.mu, config.lambda_u, config.lambda_in, config.threshold) == ("resnet50", 5, 10, 5, 0.7)
    assert (config.memory, config.ema_buffers, config.alignment_queue, config.decay_all) == (
        "teacher",
        "own",
        256,
        True,
    )


def test_every_mixed_lp_configuration_is_the_papers_but_for_the_small_ones():
    names = config_names("mixed-lp")
    paper = {
        "cub200",
        "cars196",
        "aircraft-variant",
        "aircraft-family",
        "aircraft-manufacturer",
        "cifar100",
        "dogs",
        "pets",
    }
    assert set(names) == paper | {"cub200-bf16", "digits", "flowers17"}
    for name in names:
        config, _ = parse_config("mixed-lp", ["--config", name])
        shared = config.pseudo_labels, config.gamma, config.beta, config.logit_scale, config.epsilon, config.margin
        assert (*shared, config.batch_size, config.mu) == ("mixed-lp", 3, 1, 4, 32, 0.1, 32, 1 / 99)
        if name in paper:
            assert config.k == 50
            assert (config.data.name, config.model, config.embedding_dim, config.data.labels_per_class) == (
                name,
                "bn-inception",
                64,
                5,
            )
            assert (config.labeled_epochs, config.epochs, config.learning_rate, config.weight_decay) == (
                5,
                20,
                1e-4,
                1e-4,
            )
            assert config.data.fractions == (0.4, 0.2, 0.4)


def test_the_command_line_wins_over_the_configuration(tmp_path):
    (tmp_path / "mine.yaml").write_text("steps: 5\nmu: 3\ndata: {labels: 30}\n")
    config, resume = parse_config(
        "simmatch", [f"--config={tmp_path / 'mine.yaml'}", "--mu", "4", "--data.root", "D", "--resume"]
    )
    assert (config.steps, config.mu, config.data.labels, config.data.root, config.data.name) == (
        5,
        4,
        30,
        "D",
        "digits",
    )
    assert resume


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--config", "cifar11"],
            "--config is 'cifar11', which is neither a YAML file nor comes with the package; did you mean cifar10-",
        ),
        (["--temperature", "0"], "temperature is 0.0; it should be positive"),
    ],
)
def test_bad_settings_are_one_line(capsys, arguments, message):
    assert main(["simmatch", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "content", "message"),
    [
        (["--thresholds", "0.9"], "", "unrecognized arguments: --thresholds 0.9; did you mean threshold?"),
        (["--run.accelerators=cpu"], "", "--run.accelerators=cpu; did you mean run.accelerator?"),
        (["--qqqq", "3"], "", "unrecognized arguments: --qqqq 3\n"),
        (["--config", "{file}"], "thresholds: 0.9", "Option 'thresholds' is not accepted; did you mean threshold?"),
        (["--config", "{file}"], "run: {evalevery: 3}", "'evalevery'; did you mean run.eval_every or run.log_every?"),
    ],
)
def test_a_misspelt_setting_lists_the_near_ones(tmp_path, capsys, arguments, content, message):
    file = tmp_path / "settings.yaml"
    file.write_text(content)
    with pytest.raises(SystemExit):
        main(["simmatch", *(argument.format(file=file) for argument in arguments)])
    assert message in capsys.readouterr().err


def test_unknown_method(capsys):
    assert main(["simmatsch"]) == 2
    assert capsys.readouterr().err == ("ssmkernels train: there is no method 'simmatsch'; did you mean simmatch?\n")


def test_help_says_what_the_methods_are(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(re.search(rf"^  {name} +{re.escape(METHODS[name].summary)}$", out, re.MULTILINE) for name in METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_help_has_no_markup(method, capsys):
    with pytest.raises(SystemExit) as stop:
        main([method, "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "--run.accelerator" in out
    assert not re.search(r"``|:\w+:`", out)


def test_a_gpu_that_is_not_there(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["simmatch", "--config", "digits", "--run.accelerator", "cuda"]) == 1
    message = "--run.accelerator is cuda, but torch sees no CUDA device; give cpu or auto"
    assert capsys.readouterr().err == f"ssmkernels train: {message}\n"


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "run"
    assert main(["mlsn", "--config", "digits", "--run.accelerator", "cpu", "--run.out", str(out)]) == 1
    assert capsys.readouterr().err.endswith(
        f"ssmkernels train: {out} cannot be written (Not a directory); give another folder with --run.out\n"
    )


def test_a_missing_package_is_left_to_the_command(monkeypatch):
    def train(config, **options):
        raise ModuleNotFoundError("No module named 'tqdm'", name="tqdm")

    monkeypatch.setitem(METHODS, "mlsn", METHODS["mlsn"]._replace(train=train))
    with pytest.raises(ModuleNotFoundError):
        main(["mlsn", "--config", "digits"])


def test_a_finished_run_reports_its_medians(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["simmatch", *SMALL, "--steps", "2", "--seed", "7"]) == 0
    reported = re.findall(
        r"(\w+): (0\.\d{4}) as the median of the last 1 evaluations, (0\.\d{4}) at the end", capsys.readouterr().out
    )
    assert [name for name, _, _ in reported] == ["ema_accuracy", "student_accuracy"]
    assert all(median == end for _, median, end in reported)
    assert (tmp_path / "runs" / "simmatch" / "digits-seed7" / "checkpoint.pt").exists()


def test_a_finished_mixed_lp_run_reports_its_best_evaluation(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = ["--labeled_epochs", "1", "--epochs", "2", "--run.accelerator", "cpu", "--run.bar", "false"]
    assert main(["mixed-lp", "--config", "digits", *short, "--seed", "3"]) == 0
    out = capsys.readouterr().out
    folder = tmp_path / "runs" / "mixed-lp" / "digits-seed3"
    history = load_checkpoint(folder / "checkpoint.pt")["history"]
    assert len(history) == 2
    best = max(history, key=lambda record: record["validation_P@8"])
    assert f"validation_P@8: {best['validation_P@8']:.4f}, the best of 2 evaluations, after step {best['step']}" in out
    reported = dict(re.findall(r"^(test_\S+): (0\.\d{4})$", out, flags=re.MULTILINE))
    assert {"test_NMI", "test_R@1", "test_R@8", "test_P@8", "test_MAP@R"} <= reported.keys()
    assert all(value == f"{best[name]:.4f}" for name, value in reported.items())
    assert load_checkpoint(folder / "best.pt")["evaluation"] == best
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in logged if line["group"] == "train"][-1]
    assert {"pseudo_label_accuracy", "pseudo_label_confidence", "undecided", "cg_iterations"} <= last.keys()


def test_a_mixed_lp_run_without_a_configuration_is_named_after_its_images(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = [
        "--model",
        "convnet-small",
        "--freeze_bn",
        "false",
        "--labeled_epochs",
        "1",
        "--epochs",
        "0",
        "--pseudo_labels",
        "none",
    ]
    assert main(["mixed-lp", *small, "--run.accelerator", "cpu", "--run.bar", "false"]) == 0
    assert (tmp_path / "runs" / "mixed-lp" / "digits-none-seed1" / "best.pt").exists()


STEPS = 30
STEADY = [*SMALL, "--steps", str(STEPS), "--first_epoch_steps", "5", "--run.log_every", "1", "--run.eval_every", "15"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The checkpoint of a run that nothing stops."""
    folder = tmp_path_factory.mktemp("whole")
    assert main(["simmatch", *STEADY, "--run.out", str(folder)]) == 0
    return load_checkpoint(folder / "checkpoint.pt")


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_then_resume_gives_the_same_bits(whole, tmp_path, number):
    command = [sys.executable, "-m", "ssmkernels", "train", "simmatch", *STEADY, "--run.out", str(tmp_path)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    log = tmp_path / "metrics.jsonl"
    while process.poll() is None and (not log.exists() or log.read_text().count("\n") < 3):
        time.sleep(0.005)
    os.killpg(process.pid, number)  # the whole group, as a terminal or a scheduler does: data-loading processes too
    out, error = process.communicate(timeout=120)
    assert process.returncode == 128 + number, error
    stopped_at = load_checkpoint(tmp_path / "checkpoint.pt")["step"]
    assert 3 <= stopped_at < STEPS
    assert f"Stopped after step {stopped_at} of {STEPS}" in out
    assert out.strip().endswith("--resume")
    assert "Traceback" not in error

    assert main(["simmatch", *STEADY, "--run.out", str(tmp_path), "--resume"]) == 0
    resumed = load_checkpoint(tmp_path / "checkpoint.pt")
    assert resumed["step"] == whole["step"] == STEPS
    assert resumed["history"] == whole["history"]
    torch.testing.assert_close(resumed["trainer"], whole["trainer"], rtol=0, atol=0)
    logged = [json.loads(line)["step"] for line in log.read_text().splitlines() if '"train"' in line]
    assert logged == list(range(1, STEPS + 1))


class UniqueKeys(yaml.SafeLoader):
    """YAML takes the last of several values of a key without a word."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key) for key, _ in node.value]
        assert len(set(keys)) == len(keys), f"a key stands twice: {keys}"
        return super().construct_mapping(node, deep)


@pytest.mark.parametrize("method", METHODS)
def test_configurations_have_each_key_once(method):
    """And those in bfloat16 are the others but for their precision."""
    folder = Path(trainers.__file__).parent / "configs" / method
    configs = {path.stem: yaml.load(path.read_text(), UniqueKeys) for path in folder.glob("*.yaml")}
    assert configs
    for name, config in configs.items():
        if name.endswith("-bf16"):
            assert config == configs[name.removesuffix("-bf16")] | {"precision": "bf16-mixed"}


def test_configurations_of_one_parser_share_nothing():
    first, second = (parse_config("simmatch", ["--config", "digits"])[0] for _ in range(2))
    assert first == second
    first.data.labels, first.run.out = 17, "elsewhere"
    assert first != second == parse_config("simmatch", ["--config", "digits"])[0]
