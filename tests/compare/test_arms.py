"""Arms, sweeps and seeds of `vineppo compare`; greedy accuracies; the best arm against the best baseline, by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.compare.test_compare import buffer_console, compare_module, load_all, make_spec, points, write_run
from vineppo.cli.main import main
from vineppo.compare.arms import load_arms, parse_arm, swept
from vineppo.compare.checklist import checklist
from vineppo.compare.comparison import compare
from vineppo.compare.curves import difference_at_equal_tokens
from vineppo.compare.directory import open_directory
from vineppo.compare.figures import analyse
from vineppo.compare.plots import styles_of
from vineppo.compare.records import load_run
from vineppo.compare.runs import plan_runs
from vineppo.compare.spec import Arm, CompareSpec, arms_of, check_same, parse_seeds
from vineppo.compare.tables import conclusions, format_interval, header, table_rows
from vineppo.types import UserError

pytestmark = pytest.mark.usefixtures("drawn_figures")

GRPO320 = "grpo320=algorithm=grpo,rollouts.num_problems=80,rollouts.group_size=4,learner.lr=4e-4"


# --- arms, sweeps and seeds -------------------------------------------------------------------------------------------


def test_an_arm_of_the_command_line() -> None:
    settings = {"rollouts.num_problems": "80", "rollouts.group_size": "4", "learner.lr": "4e-4"}
    assert parse_arm(GRPO320) == Arm("grpo320", "grpo", settings)
    assert parse_arm(GRPO320).label == "GRPO (grpo320)" and parse_arm("grpo=algorithm=grpo").label == "GRPO"


def test_a_comma_ends_a_value_only_before_the_next_key() -> None:
    arm = parse_arm("x=algorithm=ppo,model.lora.targets=q_proj,v_proj,task.options={a: [1, 2], b: 3},model.lora.r=4")
    assert arm.overrides == {
        "model.lora.targets": "q_proj,v_proj",
        "task.options": "{a: [1, 2], b: 3}",
        "model.lora.r": "4",
    }


def test_arms_of_a_file_with_nested_and_dotted_keys(tmp_path: Path) -> None:
    file = tmp_path / "arms.yaml"
    file.write_text(
        "wide:\n  algorithm: reinforce\n  cells: 12\n  rollouts: {num_problems: 160, group_size: 1}\n"
        "  learner.lr: 4e-4\nvines:\n  algorithm: vineppo\n  vineppo.alternatives: false\n"
        "  task: {options: {min_terms: 2}, rewards: [a, 'b,c']}\n"
    )
    wide, vines = load_arms(file)
    wide_settings = {"rollouts.num_problems": "160", "rollouts.group_size": "1", "learner.lr": "4e-4"}
    assert wide == Arm("wide", "reinforce", wide_settings, 12)
    assert vines.overrides == {
        "vineppo.alternatives": "false",
        "task.options": '{"min_terms": 2}',
        "task.rewards": '["a", "b,c"]',
    }


def test_sweeps_replace_the_arms_to_which_the_key_applies() -> None:
    arms = swept(arms_of(("vineppo", "ppo")), ["vineppo.num_mc_rollouts=1,9", "learner.lr=1e-4,2e-4"])
    assert [arm.name for arm in arms] == [
        "vineppo-num_mc_rollouts=1-lr=1e-4",
        "vineppo-num_mc_rollouts=1-lr=2e-4",
        "vineppo-num_mc_rollouts=9-lr=1e-4",
        "vineppo-num_mc_rollouts=9-lr=2e-4",
        "ppo-lr=1e-4",
        "ppo-lr=2e-4",
    ]
    assert arms[3].overrides == {"vineppo.num_mc_rollouts": "9", "learner.lr": "2e-4"}
    assert arms[3].label == "VinePPO (num_mc_rollouts=9-lr=2e-4)"
    assert arms[5].overrides == {"learner.lr": "2e-4"}


def test_the_names_of_a_sweep_can_name_directories() -> None:
    (arm,) = swept(arms_of(("vineppo",)), ["vineppo.splitter=tokens:4"])
    assert arm.name == "vineppo-splitter=tokens_4" and arm.overrides == {"vineppo.splitter": "tokens:4"}


@pytest.mark.parametrize(
    ("text", "seeds"),
    [
        ("1", (0,)),
        ("3", (0, 1, 2)),
        ("3,7,9", (3, 7, 9)),
        ("100-104", (100, 101, 102, 103, 104)),
        ("7-7", (7,)),
        ("0-2, 9", (0, 1, 2, 9)),
    ],
)
def test_seeds(text: str, seeds: tuple[int, ...]) -> None:
    assert parse_seeds(text) == seeds


def test_runs_of_arms_have_the_settings_of_their_arm(tmp_path: Path) -> None:
    """The settings that all arms share lose against those of an arm; the section of PPO is for its arm only."""
    arms = (*arms_of(("ppo",)), parse_arm(GRPO320))
    shared = {"learner.lr": "1e-4", "ppo.value_lr": "1e-3", "eval.greedy": "false"}
    plans = plan_runs(make_spec(tmp_path, arms=arms, seeds=(3, 7), overrides=shared))
    names = ["ppo-seed3", "grpo320-seed3", "ppo-seed7", "grpo320-seed7"]
    assert [plan.directory.name for plan in plans] == names
    own = [part for part in plans[3].command if "=" in part]
    assert own == [
        "--eval.greedy=false",
        "--learner.lr=4e-4",
        "--rollouts.num_problems=80",
        "--rollouts.group_size=4",
    ]
    command = plans[3].command
    assert command[command.index("--algorithm") + 1] == "grpo" and command[command.index("--run.seed") + 1] == "7"
    assert {part for part in plans[0].command if "=" in part} == {f"--{key}={value}" for key, value in shared.items()}


def test_arms_may_be_added_to_a_comparison_but_not_changed(tmp_path: Path) -> None:
    first = make_spec(tmp_path, arms=(parse_arm(GRPO320), *arms_of(("ppo",))))
    recorded = first.identity()
    added = make_spec(tmp_path, arms=arms_of(("ppo", "rloo")), seeds=(5,))
    kept = check_same(recorded, added.identity(), tmp_path, "comparison")
    assert list(kept["arms"]) == ["grpo320", "ppo", "rloo"]
    for text in (GRPO320.replace("4e-4", "2e-4"), GRPO320.replace("algorithm=grpo", "algorithm=rloo")):
        changed = make_spec(tmp_path, arms=(parse_arm(text),))
        with pytest.raises(UserError, match="contains a comparison with arm grpo320 --algorithm=grpo"):
            check_same(kept, changed.identity(), tmp_path, "comparison")
    order = parse_arm("grpo320=learner.lr=4e-4,rollouts.group_size=4,rollouts.num_problems=80,algorithm=grpo")
    check_same(kept, make_spec(tmp_path, arms=(order,)).identity(), tmp_path, "comparison")


COMPARE = ["compare", "judgement", "--out", "o"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--arm", "grpo320"], "write --arm NAME=algorithm=A"),
        (["--arm", "a=b"], "write --arm NAME=algorithm=A"),
        (["--arm", "a=learner.lr=1e-4"], "algorithm is not set in --arm a"),
        (["--arm", "a=algorithm=grop"], "did you mean grpo?"),
        (["--arm", "a=algorithm=grop"], "(in --arm a)"),
        (["--arm", "a/b=algorithm=grpo"], "the name of an arm is 'a/b'"),
        (["--arm", "a=algorithm=grpo,learner.lrr=1"], "unknown key learner.lrr in --arm a; did you mean learner.lr?"),
        (["--arm", "a=algorithm=grpo,learner.lr=1,learner.lr=2"], "--arm a sets learner.lr twice"),
        (["--arm", "a=algorithm=grpo,learner.lr=fast"], "arm a: learner.lr is 'fast'"),
        (["--arm", "a=algorithm=grpo,rollouts.group_size=1"], "arm a: rollouts.group_size is 1"),
        (["--arm", "a=algorithm=grpo,ppo.value_lr=1e-3"], "ppo.value_lr"),
        (["--arm", "a=algorithm=grpo,run.dir=x"], "run.dir is set by `vineppo compare`"),
        (["--algorithms", "ppo", "--arm", "ppo=algorithm=grpo"], "contains ppo more than once"),
        (["--arms", "absent.yaml"], "--arms absent.yaml is not a file"),
        (["--sweep", "learner.lrr=1,2"], "learner.lrr"),
        (["--sweep", "learner.lr"], "write --sweep KEY=A,B,C"),
        (["--sweep", "learner.lr=1,1"], "a value occurs twice"),
        (["--sweep", "learner.lr=1,2", "--sweep", "learner.lr=3,4"], "learner.lr more than once"),
        (["--algorithms", "ppo", "--sweep", "vineppo.num_mc_rollouts=1,3"], "no compared arm uses vineppo"),
        (["--baselines", "pppo"], "baselines has pppo, which is not compared"),
        (["--seeds", "3-1"], "a range ends before it begins"),
        (["--seeds", "3,3"], "a seed occurs twice"),
        (["--seeds", "1-2-3"], "--seeds is '1-2-3'"),
        (["--seeds", "0-999999"], "at most 1000"),
    ],
)
def test_a_wrong_arm_is_one_line_before_any_run(
    arguments: list[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*COMPARE, *arguments]) == 2
    printed = capsys.readouterr().err
    assert named in printed and printed.count("\n") == 1
    assert not Path("o").exists()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (
            "a: {algorithm: grpo}\na: {algorithm: rloo}\n",
            "--arms arms.yaml is not valid YAML in line 2: key a is repeated",
        ),
        ("a:\n  learner.lr: 1\n  learner.lr: 2\n", "in line 3: key learner.lr is repeated"),
        ("a: {algorithm: grop}\n", "allowed: vineppo, "),
        ("a: {algorithm: grop}\n", "(in arms.yaml, arm a)"),
        (
            "a: {algorithm: grpo, learner.lrr: 1}\n",
            "unknown key learner.lrr in arms.yaml, arm a; did you mean learner.lr?",
        ),
        ("", "--arms arms.yaml contains no arms"),
        ("- a\n- b\n", "--arms arms.yaml contains no arms"),
        ("a: grpo\n", "the arm is 'grpo' in arms.yaml, arm a"),
        ("a: {learner.lr: 1}\n", "algorithm is not set in arms.yaml, arm a"),
        ("a: {algorithm: grpo, cells: 0}\n", "cells of arm a is 0"),
        ("a: {algorithm: grpo}\nA: {algorithm: rloo}\n", "the comparison contains A, a more than once"),
        ("a: {algorithm: grpo, rollouts.group_size: 1}\n", "arm a: rollouts.group_size is 1"),
    ],
)
def test_a_wrong_file_of_arms_is_one_line_before_any_run(
    content: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("arms.yaml").write_text(content)
    assert main([*COMPARE, "--arms", "arms.yaml"]) == 2
    printed = capsys.readouterr().err
    assert named in printed and printed.count("\n") == 1
    assert not Path("o").exists()


def test_the_options_of_arms_keep_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--algorithms, --arm and --arms can be mixed: the first one on the command line is the first arm."""
    seen: list[CompareSpec] = []

    def record(spec: CompareSpec) -> dict[str, list[str]]:
        seen.append(spec)
        return {"missing": []}

    monkeypatch.setattr(compare_module, "compare", record)
    (tmp_path / "arms.yaml").write_text("tuned: {algorithm: reinforce, cells: 4}\n")
    given = ["--arm", GRPO320, "--algorithms", "ppo,rloo", "--arms", str(tmp_path / "arms.yaml"), "--seeds", "4,6"]
    assert main(["compare", "judgement", "--out", str(tmp_path / "o"), *given]) == 0
    assert [arm.name for arm in seen[0].arms] == ["grpo320", "ppo", "rloo", "tuned"]
    assert seen[0].seeds == (4, 6) and seen[0].arms[3].cells == 4
    assert seen[0].baseline_names == ("grpo320", "ppo", "rloo", "tuned")


# --- analysis ---------------------------------------------------------------------------------------------------------


def write_greedy(run: Path, before: float, after: float) -> None:
    """Add greedy accuracies to the summary of a run."""
    summary = json.loads((run / "summary.json").read_text())
    intervals = {name: {"mean": value, "low": None, "high": None} for name, value in (("b", before), ("a", after))}
    summary |= {"greedy_before": intervals["b"], "greedy_after": intervals["a"]}
    (run / "summary.json").write_text(json.dumps(summary))


def write_four_arms(out: Path) -> None:
    """Two vines and two baselines. The best are `vines` and `rloo`, with .8 and .6 at the end.

    Per update, `vines` uses 200 and `rloo` 100 tokens. The baseline reaches its best, .6, after 40 updates.
    """
    for seed, shift in ((0, 0.0), (1, 0.1)):
        write_run(out, "vines", seed, points([0.2, 0.4 + shift, 0.6 + shift, 0.7, 0.8], 200, 2))
        write_run(out, "few", seed, points([0.2, 0.3, 0.4, 0.5, 0.5], 200, 2))
        write_run(out, "rloo", seed, points([0.2, 0.3, 0.4, 0.5, 0.6], 100, 1))
        write_run(out, "grpo", seed, points([0.2, 0.3, 0.4, 0.4, 0.4], 100, 1))


VINES = (Arm("vines", "vineppo"), Arm("few", "vineppo", {"vineppo.num_mc_rollouts": "3"}), *arms_of(("grpo", "rloo")))


def load_arms_of(out: Path) -> list:
    return [load_run(run, run.name.partition("-seed")[0]) for run in sorted((out / "runs").iterdir())]


def test_best_versus_baseline_by_hand(tmp_path: Path) -> None:
    write_four_arms(tmp_path)
    result = analyse(load_arms_of(tmp_path), VINES, ("grpo", "rloo"))["best_vs_baseline"]
    assert (result["arm"], result["baseline"], result["reason"]) == ("vines", "rloo", None)
    # The mean of vines is .2 .45 .65 .7 .8, so .6 is reached three quarters of the way from 10 to 20 updates: at 17.5,
    # with 3,500 generated and 875 trained tokens and 35 seconds. The baseline needs 40, 4,000, 1,000 and 40.
    assert result["updates_ratio"] == pytest.approx(40 / 17.5)
    assert result["tokens_ratio"] == pytest.approx(4000 / 3500)
    assert result["trained_ratio"] == pytest.approx(1000 / 875)
    assert result["seconds_ratio"] == pytest.approx(40 / 35)
    # Without seed 0, .6 is reached after 10 + 10 * .1 / .2 = 15 updates, without seed 1 after 20. The baseline's runs
    # are equal. The variance is (1 / 2) * 2 * (log(20 / 15) / 2)^2, with 1 degree of freedom.
    factor = math.exp(12.706205 * math.log(20 / 15) / 2)
    interval = {"low": 4000 / 3500 / factor, "high": 4000 / 3500 * factor}
    assert result["tokens_ratio_interval"] == pytest.approx(interval, rel=1e-6)
    assert set(result["seconds_ratio_interval"]) == {"low", "high"}
    # After 4,000 tokens the vines have done 20 updates, with .6 and .7; the baseline has .6 with both seeds.
    half = 12.706205 * 0.05
    assert result["difference_at_equal_tokens"] == pytest.approx(
        {"tokens": 4000, "mean": 0.05, "low": 0.05 - half, "high": 0.05 + half}, rel=1e-6
    )


def test_the_named_baselines_are_the_baselines(tmp_path: Path) -> None:
    write_four_arms(tmp_path)
    result = analyse(load_arms_of(tmp_path), VINES, ("few",))["best_vs_baseline"]
    assert (result["arm"], result["baseline"]) == ("vines", "few")
    none = analyse(load_arms_of(tmp_path), VINES, ())["best_vs_baseline"]
    assert (none["arm"], none["baseline"], none["reason"]) == (
        "vines",
        None,
        "no finished run of a baseline was evaluated during training",
    )
    assert none["tokens_ratio"] is None and none["difference_at_equal_tokens"]["mean"] is None


def test_an_arm_with_few_finished_runs_is_not_the_best(tmp_path: Path) -> None:
    """`once` has the highest accuracy, but 1 run where `vines` has 3; with 2 runs it would count."""
    write_four_arms(tmp_path)
    write_run(tmp_path, "vines", 2, points([0.2, 0.4, 0.6, 0.7, 0.8], 200, 2))
    write_run(tmp_path, "once", 0, points([0.2, 0.9, 0.9, 0.9, 0.9], 200, 2))
    arms = (*VINES, Arm("once", "vineppo"))
    one = analyse(load_arms_of(tmp_path), arms, ("grpo", "rloo"))
    # Among the arms other than the first one, two runs are the most.
    assert (one["best_vs_baseline"]["arm"], one["vs_best"]["baseline"]) == ("vines", "once")
    last = analyse(load_arms_of(tmp_path), (arms[-2], *arms[:-2], arms[-1]))  # now `vines` is another arm
    assert last["vs_best"]["baseline"] == "vines"
    write_run(tmp_path, "once", 1, points([0.2, 0.9, 0.9, 0.9, 0.9], 200, 2))
    assert analyse(load_arms_of(tmp_path), arms, ("grpo", "rloo"))["best_vs_baseline"]["arm"] == "once"


def test_the_printed_bounds_of_an_accuracy_are_shares() -> None:
    assert format_interval({"mean": 0.98, "low": 0.957, "high": 1.003}) == "98.0% [95.7, 100.0]"
    assert format_interval({"mean": 0.01, "low": -0.02, "high": 0.04}) == "1.0% [0.0, 4.0]"


def test_the_difference_at_equal_tokens_uses_common_seeds_only(tmp_path: Path) -> None:
    """Seed 2 has a run of one arm only, whose few tokens must not shorten the comparison."""
    write_four_arms(tmp_path)
    write_run(tmp_path, "rloo", 2, points([0.9, 0.9], 1, 1))
    runs = load_arms_of(tmp_path)
    by_arm = [[run for run in runs if run.arm == name] for name in ("vines", "rloo")]
    assert difference_at_equal_tokens(*by_arm)["mean"] == pytest.approx(0.05)


def test_the_difference_at_equal_tokens_without_evaluations_during_training(tmp_path: Path) -> None:
    """One arm ends at 0.8 after 2,000 tokens, so at 0.5 after 1,000, where the other one ends at 0.4."""
    for arm, tokens, after in (("vines", 2000, 0.8), ("rloo", 1000, 0.4)):
        write_run(tmp_path, arm, 0, points([0.2, 0.2], 1, 1))
        (tmp_path / "runs" / f"{arm}-seed0" / "metrics.jsonl").write_text("")
        path = tmp_path / "runs" / f"{arm}-seed0" / "summary.json"
        summary = json.loads(path.read_text())
        summary |= {name: {"mean": value} for name, value in (("accuracy_before", 0.2), ("accuracy_after", after))}
        path.write_text(json.dumps(summary | {"tokens": {"generated": tokens, "trained": 1}, "updates": 3}))
    runs = load_arms_of(tmp_path)
    by_arm = [[run for run in runs if run.arm == name] for name in ("vines", "rloo")]
    difference = difference_at_equal_tokens(*by_arm)
    assert difference["tokens"] == 1000
    assert difference["mean"] == pytest.approx(0.1)
    result = analyse(runs, (Arm("vines", "vineppo"), *arms_of(("rloo",))), ("rloo",))["best_vs_baseline"]
    assert result["difference_at_equal_tokens"] == difference
    assert result["tokens_ratio"] is None


def test_two_arms_of_one_algorithm_are_told_apart(tmp_path: Path) -> None:
    write_four_arms(tmp_path)
    result = analyse(load_arms_of(tmp_path), VINES, ())
    styles = styles_of(result)
    assert len({style.colour for style in styles.values()}) == 4
    assert styles["vines"].colour == VINES[0].method.colour
    assert [style.label for style in styles.values()] == ["VinePPO (vines)", "VinePPO (few)", "GRPO", "RLOO"]


def test_fifteen_arms_have_fifteen_styles() -> None:
    figures = {f"a{i}": {"colour": "", "label": f"a{i}"} for i in range(15)}
    styles = styles_of({"arms": figures})
    assert len({(style.colour, style.marker) for style in styles.values()}) == 15


def test_greedy_accuracies_show_sharpening(tmp_path: Path) -> None:
    for seed, before in ((0, 0.5), (1, 0.6)):
        write_greedy(write_run(tmp_path, "ppo", seed, points([0.2, 0.55], 100, 1)), before, 0.7)
    result = analyse(load_all(tmp_path), arms_of(("ppo",)))
    figures = result["arms"]["ppo"]
    assert figures["greedy_before"]["mean"] == pytest.approx(0.55) and figures["greedy_after"]["mean"] == 0.7
    # .55 - .5 and .55 - .6: sampling after training is on average what greedy decoding was before.
    half = 12.706205 * 0.05
    expected = {"mean": 0.0, "low": -half, "high": half}
    assert figures["above_greedy_start"] == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert [run["greedy_before"] for run in figures["per_seed"]] == [0.5, 0.6]


def test_a_ratio_without_interval_says_why(tmp_path: Path) -> None:
    """Without seed 0, `vines` starts at the best accuracy of `rloo`, so there is no ratio."""
    write_run(tmp_path, "vines", 0, points([0.2, 0.8], 200, 2))
    write_run(tmp_path, "vines", 1, points([0.6, 0.8], 200, 2))
    for seed in (0, 1):
        write_run(tmp_path, "rloo", seed, points([0.2, 0.6], 100, 1))
    result = analyse(load_arms_of(tmp_path), (VINES[0], VINES[3]), ("rloo",))
    assert result["best_vs_baseline"]["tokens_ratio_interval"] == {"low": None, "high": None}
    spec = {"budget": "updates=10", "jobs": 1}
    (sentence, *_) = conclusions({**result, "spec": spec, "cpu_count": 2})
    assert "updates 2.00" in sentence and "t interval" not in sentence
    assert sentence.endswith(
        "(no interval: without one of the runs, VinePPO (vines) starts at or above it, or no ratio changes)."
    )


# --- reports ----------------------------------------------------------------------------------------------------------


def test_reports_of_arms(tmp_path: Path) -> None:
    """The table has the tuning cells and the greedy accuracies; the checklist the settings and the missing run."""
    arms = (Arm("vines", "vineppo", {}, 12), *VINES[1:])
    spec = make_spec(tmp_path, arms=arms, seeds=(0, 1))
    open_directory(tmp_path, "compare-spec.json", spec.identity(), "comparison")
    write_four_arms(tmp_path)
    write_greedy(tmp_path / "runs" / "vines-seed0", 0.5, 0.9)
    (tmp_path / "runs" / "grpo-seed1" / "summary.json").unlink()
    config = (
        "model: {path: embedded:judgement, dtype: float32, device: cpu}\n"
        "task: {name: chain, level: judgement, num_steps: 10}\n"
        "rollouts: {num_problems: 32, group_size: 1, max_new_tokens: 128, temperature: 1.0}\n"
        "learner: {minibatch_size: 32, epochs: 2, lr: 0.0003, kl: {coefficient: 0.001}}\n"
        "eval: {num_problems: 64, final_num_problems: 512, num_samples: 1, temperature: 1.0, greedy: true,\n"
        "  split: test}\n"
    )
    for run in (tmp_path / "runs").iterdir():
        (run / "config.yaml").write_text(config)
    (tmp_path / "runs" / "few-seed0" / "config.yaml").write_text(config.replace("num_problems: 32", "num_problems: 80"))
    short = config.replace("final_num_problems: 512", "final_num_problems: 128")
    for seed in (0, 1):
        (tmp_path / "runs" / f"rloo-seed{seed}" / "config.yaml").write_text(short)
    plans = plan_runs(spec)
    # The run without a summary would be started again: let its process fail.
    broken = next(i for i, plan in enumerate(plans) if plan.directory.name == "grpo-seed1")
    plans[broken] = type(plans[broken])(**{**vars(plans[broken]), "command": ("false",)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare_module, "plan_runs", lambda _: plans)
        result = compare(spec, buffer_console())
    names = header(result)
    assert names[:7] == (
        "arm",
        "runs",
        "tuning cells",
        "accuracy before",
        "accuracy after",
        "greedy before",
        "greedy after",
    )
    rows = {row[0]: dict(zip(names, row, strict=True)) for row in table_rows(result)}
    assert (rows["vines"]["tuning cells"], rows["few"]["tuning cells"]) == ("12", "-")
    assert rows["vines"]["greedy before"] == "50.0%" and rows["few"]["greedy after"] == "-"
    assert rows["grpo"]["runs"] == "1 of 2 (1 failed)"
    best = next(line for line in conclusions(result) if line.startswith("Best arm that is no baseline"))
    assert "VinePPO (vines). Best baseline: RLOO." in best and "(4,000 a run): +5.0 points" in best
    answers = dict(checklist(result))
    assert answers["tuning: combinations of settings tried"].startswith("vines: 12; few: not recorded")
    assert "few: 80 problems x 1, minibatch 32, 2 epochs, lr 0.0003, KL 0.001" in answers["batch and step size"]
    assert answers["task and splits"].startswith(
        "chain judgement, 10 steps; 64 validation problems during training, 512 (vines, few, grpo), 128 (rloo) test"
    )
    assert "and 1 greedy response" in answers["decoding in the evaluation"]
    never = {**result, "spec": {**result["spec"], "common": {**result["spec"]["common"], "eval.every": 0}}}
    assert "during training" not in dict(checklist(never))["task and splits"]
    assert answers["runs failed, stopped or skipped"].startswith("FAILED: grpo seed 1")
    assert answers["seeds"] == "0, 1, the same for every arm"
    assert answers["budget of each run"] == "40 updates"
    table = (tmp_path / "table.md").read_text()
    assert "## Checklist" in table and "| baselines | grpo, rloo |" in table
    stored = json.loads((tmp_path / "compare.json").read_text())
    assert stored["best_vs_baseline"]["tokens_ratio"] == pytest.approx(4000 / 3500)
    assert stored["spec"]["arms"]["few"] == ["--algorithm=vineppo", "--vineppo.num_mc_rollouts=3"]
