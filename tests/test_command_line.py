"""The command line: every flag on every recipe, and errors of one line that name what is wrong."""

import io
import json
import re
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

from scalelong import __main__ as cli
from scalelong.model.skip_scale import SKIP_SCALE_NAMES, ConstantScale, LearnedScale, make_skip_scale
from scalelong.train.command_line import parse_train_arguments
from scalelong.train.config import TrainConfig
from scalelong.train.config_json import config_differences, config_from_dict, config_to_dict, flag_values
from scalelong.train.errors import EXIT_USER_ERROR, RankError, UserError, run_command
from scalelong.train.loop import command_to_resume
from scalelong.train.objective_config import ObjectiveConfig
from scalelong.train.recipes import RECIPES
from scalelong.train.usage import DESCRIPTIONS, OFTEN_USED

FLAT_FLAGS = {
    "--run": ("elsewhere/run", Path("elsewhere/run")),
    "--total-images": ("12345", 12345),
    "--images-per-step": ("64", 64),
    "--images-per-checkpoint": ("999", 999),
    "--seed": ("7", 7),
    "--skip-scale": ("ls", "ls"),
    "--zero-stage": ("3", 3),
    "--precision": ("fp16", "fp16"),
}
# The sizes of DiT are one recipe but for its sizes: the largest stands for them.
each_recipe = pytest.mark.parametrize(
    "recipe", [name for name in RECIPES if "-dit-" not in name or name.endswith("-dit-xl2")]
)


def one_line_error(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        parse_train_arguments(list(argv))
    message = str(caught.value)
    assert not set(message) & set("\n│╭╰─"), message
    return message


@each_recipe
def test_a_recipe_alone_is_itself(recipe):
    assert parse_train_arguments([recipe]) == RECIPES[recipe]


@each_recipe
@pytest.mark.parametrize("flag", FLAT_FLAGS)
def test_a_flat_flag_changes_its_field_and_no_other(recipe, flag):
    text, value = FLAT_FLAGS[flag]
    if flag == "--skip-scale" and not RECIPES[recipe].model.has_skips:
        text = value = "none"
    expected = replace(RECIPES[recipe], **{flag[2:].replace("-", "_"): value})
    assert parse_train_arguments([recipe, flag, text]) == expected


def test_flags_combine_in_any_order():
    forwards = [f"{flag}={text}" for flag, (text, _) in FLAT_FLAGS.items()]
    changes = {flag[2:].replace("-", "_"): value for flag, (_, value) in FLAT_FLAGS.items()}
    assert parse_train_arguments(["digits-uvit", *forwards]) == replace(RECIPES["digits-uvit"], **changes)
    assert parse_train_arguments(["digits-uvit", *forwards[::-1]]) == replace(RECIPES["digits-uvit"], **changes)


@pytest.mark.parametrize("flag", ["--total_images", "--total-images"])
def test_underscores_and_hyphens_are_the_same(flag):
    assert parse_train_arguments(["digits-uvit", f"{flag}=500"]).total_images == 500


@pytest.mark.parametrize(
    ("flag", "text", "part", "name", "value"),
    [
        ("--model.depth", "6", "model", "depth", 6),
        ("--model.final-conv", "False", "model", "final_conv", False),
        ("--optimizer.learning-rate", "3e-5", "optimizer", "learning_rate", 3e-5),
        ("--data.path", "some/folder", "data", "path", "some/folder"),
        ("--data.flip", "True", "data", "flip", True),
        ("--sample.sampler", "ddim", "sample", "sampler", "ddim"),
    ],
)
def test_nested_flags_reach_their_part(flag, text, part, name, value):
    base = RECIPES["digits-uvit"]
    expected = replace(base, **{part: replace(getattr(base, part), **{name: value})})
    assert parse_train_arguments(["digits-uvit", flag, text]) == expected


@pytest.mark.parametrize("name", SKIP_SCALE_NAMES)
def test_every_skip_scale_can_be_asked_for(name):
    for flag in ("--skip-scale", "--skip-scale.kind"):
        assert parse_train_arguments(["digits-uvit", flag, name]).skip_scale == make_skip_scale(name)


@pytest.mark.parametrize(
    "flags",
    [
        ["--skip-scale", "cs", "--kappa", "0.7"],
        ["--skip-scale.kind", "cs", "--skip-scale.kappa", "0.7"],
        ["--skip_scale.kind=cs", "--kappa=0.70"],
        ["--skip-scale=cs", "--skip-scale.kind", "cs", "--skip-scale.kappa", "0.70", "--kappa", "0.7"],
        ["--kappa", "0.7"],
    ],
    ids=" ".join,
)
def test_short_forms_and_long_ones_say_the_same(flags):
    expected = replace(RECIPES["digits-uvit"], skip_scale=ConstantScale(0.7))
    assert parse_train_arguments(["digits-uvit", *flags]) == expected


@pytest.mark.parametrize("flag", ["--objective", "--objective.noise"])
def test_the_noise_has_a_short_form(flag):
    config = parse_train_arguments(["digits-uvit", flag, "linear", "--objective.weighting", "min-snr"])
    assert config == replace(RECIPES["digits-uvit"], objective=ObjectiveConfig(noise="linear", weighting="min-snr"))
    both = parse_train_arguments(["digits-uvit", "--objective=linear", "--objective.noise=linear"])
    assert both == replace(RECIPES["digits-uvit"], objective="linear")
    assert parse_train_arguments(["imagenet64-adm", "--objective.prediction", "v"]).objective.noise == "cosine"


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--objective sine", ["--objective", "sine", "scaled-linear"]),
        ("--objective linear --objective.noise cosine", ["--objective linear", "--objective.noise cosine", "disagree"]),
        ("--objective linear --objective.prediction flow", ["--objective linear", "flow", "noise of its own"]),
        ("--objective.prediction score", ["--objective.prediction", "score", "flow"]),
        ("--objective.weighting magic", ["--objective.weighting", "magic", "uncertainty"]),
        ("--objective.min-snr-gamma 0", ["min_snr_gamma", "0.0", "positive"]),
        ("--objective.prediction flow --sample.sampler euler-maruyama", ["euler-maruyama", "vp-sde", "flow"]),
        ("--objective cosine --sample.sampler euler-maruyama", ["euler-maruyama", "vp-sde", "cosine"]),
        ("--sample.guidance-interval 2 1", ["guidance_interval", "LOW < HIGH"]),
        ("--sample.skip-tuning 0 1", ["skip_tuning", "two positive factors"]),
        ("--optimizer.schedule linear", ["--optimizer.schedule", "linear", "warmup-stable-decay"]),
        ("--optimizer.final-factor 2", ["final_factor", "2.0", "[0, 1]"]),
        ("--optimizer.horizon-images -1", ["horizon_images", "-1", "not negative"]),
    ],
)
def test_what_is_no_objective_or_schedule_is_named(flags, named):
    message = one_line_error("digits-uvit", *flags.split())
    assert all(part in message for part in named), message


@pytest.mark.parametrize("flags", [["--checkpointing", "blocks"], ["--checkpointing=blocks"]])
def test_flags_of_earlier_versions_are_read_under_their_new_names(flags):
    assert parse_train_arguments(["digits-uvit", *flags]).recompute == "blocks"


def test_a_policy_has_its_own_fields():
    config = parse_train_arguments(["digits-unet", "--skip-scale", "ls-separate", "--skip-scale.reduction", "4"])
    assert config.skip_scale == LearnedScale(reduction=4, shared=False)
    assert parse_train_arguments(["digits-unet", "--skip-scale", "ls"]).skip_scale == LearnedScale()


@pytest.mark.parametrize("flag", ["--skip-position", "--model.skip-position"])
def test_the_position_is_that_of_a_unet(flag):
    base = RECIPES["digits-unet"]
    expected = replace(base, model=replace(base.model, skip_position="after-norm"))
    assert parse_train_arguments(["digits-unet", flag, "after-norm"]) == expected
    same = parse_train_arguments(["digits-uvit", "--skip-position", "before-norm"])
    assert same == RECIPES["digits-uvit"]


@pytest.mark.parametrize(
    ("recipe", "flags", "named"),
    [
        (
            "digits-uvit",
            "--skip-scale ls --skip-scale.kind cs",
            ["--skip-scale ls", "--skip-scale.kind cs", "disagree"],
        ),
        ("digits-uvit", "--kappa 0.5 --skip-scale.kappa 0.7", ["--kappa 0.5", "--skip-scale.kappa 0.7", "disagree"]),
        ("digits-uvit", "--skip-scale.kappa=0.7 --kappa=1", ["--kappa 1.0", "--skip-scale.kappa 0.7", "disagree"]),
        (
            "digits-unet",
            "--skip-position before-norm --model.skip-position after-norm",
            ["--skip-position before-norm", "--model.skip-position after-norm", "disagree"],
        ),
        ("digits-uvit", "--skip-scale ls-separate --skip-scale.shared True", ["'ls-separate'", "shared"]),
        ("digits-uvit", "--skip-scale ls --skip-scale.kappa 0.5", ["--skip-scale.kappa"]),
        ("digits-uvit", "--skip-scale.kappa 2", ["kappa", "2.0", "(0, 1]"]),
        ("digits-uvit", "--skip-scale.kind magic", ["--skip-scale.kind", "magic", "ls-separate"]),
        ("digits-uvit", "--seed 1 --skip-scale", ["--skip-scale", "expected a name", "ls-separate"]),
        ("digits-uvit", "--skip-position after-norm", ["UViT", "no norm"]),
        ("digits-uvit", "--skip-position sideways", ["--skip-position", "sideways", "after-norm"]),
        ("digits-uvit", "--model.skip-position after-norm", ["--model.skip-position"]),
        ("digits-unet", "--model.context-tokens 4", ["context_tokens 4", "UNet"]),
    ],
)
def test_what_a_policy_or_a_network_does_not_take_is_named(recipe, flags, named):
    message = one_line_error(recipe, *flags.split())
    assert all(part in message for part in named), message


def test_a_kappa_for_a_policy_without_one_is_ignored_with_a_word(capsys):
    """So it was before each policy had its own fields, and so commands of that time go on."""
    config = parse_train_arguments(["digits-uvit", "--skip-scale", "ls", "--kappa", "0.7"])
    assert config == replace(RECIPES["digits-uvit"], skip_scale=LearnedScale())
    assert capsys.readouterr().err == "warning: --kappa is ignored: the skip scale 'ls' has none\n"


LAUNCHERS = [["--local_rank=0"], ["--local_rank", "0"], ["--local-rank=3"], ["--local-rank", "3"]]


@pytest.mark.parametrize("added", LAUNCHERS, ids=" ".join)
def test_the_launchers_flag_is_accepted_wherever_it_stands(added):
    expected = parse_train_arguments(["digits-uvit", "--seed", "5"])
    assert parse_train_arguments([*added, "digits-uvit", "--seed", "5"]) == expected
    assert parse_train_arguments(["digits-uvit", *added, "--seed", "5"]) == expected
    assert parse_train_arguments(["digits-uvit", "--seed", "5", *added]) == expected


@pytest.mark.parametrize("argv", [["no-such-recipe"], [], ["--seed", "1"]])
def test_without_a_known_recipe_all_are_listed(argv):
    message = one_line_error(*argv)
    assert all(recipe in message for recipe in RECIPES)


def test_a_misspelt_recipe_is_suggested():
    assert "perhaps you meant digits-uvit" in one_line_error("digits-uvti")


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--no-such-flag", "1"], ["--no-such-flag"]),
        (["--model.no-such-flag", "1"], ["--model.no-such-flag"]),
        (["surplus"], ["surplus"]),
        (["--seed"], ["--seed"]),
        (["--seed", "many"], ["--seed", "many"]),
        (["--total-images", "1.5"], ["--total-images", "1.5"]),
        (["--kappa", "half"], ["--kappa", "half"]),
        (["--optimizer.learning-rate", "fast"], ["--optimizer.learning-rate", "fast"]),
        (["--precision", "fp8"], ["--precision", "fp8", "bf16"]),
        (["--zero-stage", "4"], ["--zero-stage", "4", "3"]),
        (["--skip-scale", "cos"], ["--skip-scale", "cos", "ls-separate"]),
        (["--sample.sampler", "dpm"], ["--sample.sampler", "dpm", "ddim"]),
        (["--data.flip", "perhaps"], ["--data.flip", "perhaps", "True"]),
        (["--kappa", "0"], ["kappa", "0.0", "(0, 1]"]),
        (["--kappa", "1.5"], ["kappa", "1.5", "(0, 1]"]),
        (["--kappa", "nan"], ["kappa", "nan"]),
        (["--total-images", "0"], ["total_images", "0", "at least 1"]),
        (["--seed", "-1"], ["seed", "-1", "not negative"]),
        (["--seed", str(2**63)], ["seed", str(2**63)]),
        (["--keep-checkpoints", "1"], ["keep_checkpoints", "1", "at least 2"]),
        (["--profile", "0"], ["profile", "0", "at least 1"]),
        (["--profile", "-3"], ["profile", "-3", "at least 1"]),
        (["--compile", "all"], ["--compile", "all", "blocks"]),
        (["--log.wand", "p"], ["--log.wand", "perhaps you meant", "--log.wandb"]),
        (["--label-drop", "1"], ["label_drop", "1.0", "[0, 1)"]),
        (["--optimizer.learning-rate", "0"], ["learning_rate", "0.0", "positive"]),
        (["--optimizer.ema-decay", "1"], ["ema_decay", "1.0", "[0, 1)"]),
        (["--optimizer.ema-rampup", "2"], ["ema_rampup", "2.0", "[0, 1]"]),
        (["--sample.steps", "0"], ["steps", "0", "1 .. 1000"]),
        (["--sample.guidance", "-1"], ["guidance", "-1.0", "not negative"]),
        (["--label-drop", "0"], ["guidance", "label_drop"]),
        (["--model.num-classes", "0"], ["label_drop", "num_classes"]),
        (["--model.depth", "3"], ["depth", "3", "even"]),
        (["--model.num-heads", "5"], ["width", "96", "num_heads", "5"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("-") else "",
)
def test_what_does_not_fit_is_named(argv, named):
    message = one_line_error("digits-uvit", *argv)
    assert all(part in message for part in named), message


def test_a_misspelt_flag_is_suggested():
    assert "perhaps you meant --images-per-checkpoint" in one_line_error("digits-uvit", "--images-per-chekpoint", "3")


@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_the_width_of_the_terminal_does_not_cut_errors(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    message = one_line_error("digits-uvit", "--optimizer.lerning-rate", "1")
    assert "--optimizer.lerning-rate" in message
    assert "perhaps you meant --optimizer.learning-rate" in message


def test_a_long_value_is_quoted_as_it_was_given(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    value = "a-value-" * 12
    assert value in one_line_error("digits-uvit", "--precision", value)


def test_errors_are_one_line_where_the_terminal_knows_no_utf8(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert "--seed" in one_line_error("digits-uvit", "--seed", "many")


def help_of(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        parse_train_arguments(list(argv))
    assert stopped.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("flag", ["-h", "--help", "--help-all"])
def test_help_lists_the_recipes_with_a_word_on_each(flag, capsys):
    shown = help_of(capsys, flag)
    assert all(f"{recipe} " in shown and DESCRIPTIONS[recipe] in shown for recipe in RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_short_help_of_a_recipe_is_a_screen(recipe, capsys):
    shown = help_of(capsys, recipe, "--seed", "3", "-h").splitlines()
    assert len(shown) <= 30
    assert max(map(len, shown)) <= 110
    values = dict(flag_values(RECIPES[recipe]))
    listed = dict(re.findall(r"(--[a-z][\w.-]*)  +\w.* \[(.*)\]$", "\n".join(shown), re.MULTILINE))
    assert 18 <= len(listed) <= 25
    assert {flag: str(values[flag] if values[flag] not in (None, "") else "-") for flag in listed} == listed
    # Whatever a recipe lacks of those that are used most, another one has.
    everything = {flag for config in RECIPES.values() for flag, _ in flag_values(config)}
    assert {f"--{name}" for group in OFTEN_USED.values() for name in group} <= everything


@each_recipe
def test_help_of_a_recipe_says_something_of_every_flag_and_its_value(recipe, capsys):
    shown = re.sub(r"[│╭╮╰╯─\s]+", " ", help_of(capsys, recipe, "--help-all"))
    entries = dict(re.findall(r"(--[a-z][\w.-]*) (.*?)(?= --[a-z]| \w+ options |$)", shown))
    assert FLAT_FLAGS.keys() <= entries.keys()
    for flag in FLAT_FLAGS:
        entry = re.fullmatch(r"(?:[A-Z]+|\{.*?\}) (.*) \(default: (.*?)\)", entries[flag])
        assert entry, entries[flag]
        described, default = entry.groups()
        assert len(described.split()) >= 3, f"{flag}: {described!r}"
        value = getattr(RECIPES[recipe], flag[2:].replace("-", "_"))
        assert default == (value.kind if flag == "--skip-scale" else str(value))
    assert {"--kappa", "--skip-position", "--base-width"} <= entries.keys()
    assert ("--skip-scale.kappa" in entries) == RECIPES[recipe].model.has_skips


def exit_of(main) -> object:
    with pytest.raises(SystemExit) as stopped:
        run_command(main)
    return stopped.value.code


def raises(error: BaseException):
    def main() -> None:
        raise error

    return main


def test_a_user_error_becomes_one_line_and_an_exit_code(capsys):
    assert exit_of(raises(UserError("no such thing"))) == EXIT_USER_ERROR == 2
    assert capsys.readouterr() == ("", "error: no such thing\n")


def test_of_many_processes_one_says_what_all_met_and_each_what_it_met_alone(capsys, monkeypatch):
    monkeypatch.setattr("scalelong.train.errors._main_process", False)
    assert exit_of(raises(UserError("met by all"))) == EXIT_USER_ERROR
    assert exit_of(raises(RankError("met alone"))) == EXIT_USER_ERROR
    assert capsys.readouterr().err == "error: met alone\n"


def test_an_interrupt_exits_as_shells_expect():
    assert exit_of(raises(KeyboardInterrupt())) == 130


def test_errors_of_the_program_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run_command(raises(ZeroDivisionError()))


def test_the_console_script_lists_its_commands(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scalelong"])
    cli.main()
    shown = capsys.readouterr().out
    assert all(name in shown and description in shown for name, (_, description) in cli.COMMANDS.items())


def test_the_console_script_names_an_unknown_command(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scalelong", "tarin"])
    assert exit_of(cli.main) == EXIT_USER_ERROR
    assert capsys.readouterr().err.startswith("error: unknown command 'tarin'; there are train, launch, sample")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["/x/scalelong/train/__main__.py", "digits-uvit"], "python -m scalelong.train digits-uvit"),
        (["/x/scalelong/__main__.py", "train", "digits-uvit"], "python -m scalelong train digits-uvit"),
        (["/x/bin/scalelong", "train", "digits-uvit", "--run", "a b"], "scalelong train digits-uvit --run 'a b'"),
        (["/x/my_script.py", "--local_rank=0", "digits-uvit"], "my_script.py digits-uvit"),
    ],
)
def test_the_command_that_resumes_is_the_one_that_was_given(argv, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", argv)
    assert command_to_resume() == expected


@pytest.mark.parametrize("command", ["sample", "evaluate", "export"])
def test_the_other_commands_miss_a_run_in_one_line(command, tmp_path, capsys, monkeypatch):
    arguments = [str(tmp_path / "no-run")] + (["--out", str(tmp_path / "out")] if command == "export" else [])
    monkeypatch.setattr(sys, "argv", ["scalelong", command, *arguments])
    assert exit_of(cli.main) == EXIT_USER_ERROR
    assert re.fullmatch(r"error: .*no-run.*\n", capsys.readouterr().err)


@each_recipe
def test_a_configuration_survives_json(recipe):
    config = replace(RECIPES[recipe], skip_scale="ls-separate", run=Path("a/b"))
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


@pytest.mark.parametrize("part", [None, "model", "objective", "optimizer", "data", "sample"])
def test_a_field_of_another_version_is_named(part):
    values = config_to_dict(RECIPES["digits-uvit"])
    (values if part is None else values[part])["from_the_future"] = 1
    with pytest.raises(UserError, match=r"config\.json.*from_the_future") as caught:
        config_from_dict(values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "flags",
    [
        ["--run", "elsewhere"],
        ["--total-images", "1000000"],
        ["--zero-stage", "2"],
        ["--accumulation-steps", "4"],
        ["--data.reader", "pillow"],
        ["--data.path", "elsewhere"],
        ["--sample.steps", "7"],
        ["--compile", "blocks", "--profile", "3", "--log.wandb", "p"],
        ["--sample.guidance-interval", "0.1", "5"],
        ["--optimizer.schedule", "cosine"],  # where the rates that were used stay as they are
    ],
    ids=" ".join,
)
def test_bookkeeping_may_differ(flags):
    assert config_differences(RECIPES["digits-uvit"], parse_train_arguments(["digits-uvit", *flags])) == []


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        (["--seed", "1"], "--seed 0 -> 1"),
        (["--images-per-step", "32"], "--images-per-step 64 -> 32"),
        (["--kappa", "0.9"], "--skip-scale.kappa 0.5 -> 0.9"),
        (["--skip-scale", "ls"], "--skip-scale cs -> ls"),
        (["--objective", "linear"], "--objective.noise vp-sde -> linear"),
        (["--objective.prediction", "v"], "--objective.prediction eps -> v"),
        (["--model.depth", "6"], "--model.depth 4 -> 6"),
        (["--optimizer.beta2", "0.9"], "--optimizer.beta2 0.99 -> 0.9"),
        (["--data.flip", "True"], "--data.flip False -> True"),
        (["--precision", "bf16"], "--precision fp32 -> bf16"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_difference_in_what_is_computed_is_named_as_flags(flags, difference):
    assert config_differences(RECIPES["digits-uvit"], parse_train_arguments(["digits-uvit", *flags])) == [difference]


def test_every_field_of_a_configuration_is_compared_or_marked_as_bookkeeping():
    kept = {f.name for f in fields(TrainConfig) if f.metadata.get("bookkeeping")}
    computed = {"images_per_step", "seed", "skip_scale", "objective", "label_drop", "sparse_images"}
    assert {f.name for f in fields(TrainConfig)} - kept == computed | {
        "precision",
        "model",
        "optimizer",
        "data",
        "sample",
    }
