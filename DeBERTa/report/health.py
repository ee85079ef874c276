"""What is usual in a run and what is not, in words.

A check returns None where the run does not have the metrics for it.
"""

import math
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import NamedTuple

from DeBERTa.data.token_store import StoreFile, TokenStore, find_store, list_parts
from DeBERTa.data.tokenizer import CONTINUES_WORD, STARTS_WORD, Tokenizer
from DeBERTa.errors import DebertaError
from DeBERTa.presets import PRESETS, guess_preset
from DeBERTa.report.read import RunRecord, format_duration, format_number

TEXT_TOKENS = 10_000_000  # of the training text that are counted
MOST_UNKNOWN, MOST_CUT = 0.01, 0.6  # shares above which a vocabulary does not fit
MOST_PREDICTED = 0.97  # share of the masked tokens; no text is that easy
REPLACED = (0.005, 0.16)  # usual shares; 15 % of the tokens are masked
LARGE_DRIFT = 1.0  # the residual outweighs the table; deberta-v3-tiny had 0.37 after 300 steps
PROBLEM, NOTE, USUAL = "problem", "note", "usual"


class Finding(NamedTuple):
    """The result of one check; the level is PROBLEM, NOTE or USUAL."""

    level: str
    title: str
    text: str


def examine(run: RunRecord) -> list[Finding]:
    """Return the findings of all checks, problems first."""
    checks = (
        check_vocabulary, check_masking, check_generator, check_discriminator, check_replaced, check_residual,
        check_rate, check_stability, check_cost,
    )  # fmt: skip
    found = [finding for check in checks if (finding := check(run))]
    return sorted(found, key=lambda finding: (PROBLEM, NOTE, USUAL).index(finding.level))


def compute_onset(run: RunRecord) -> int:
    """Return the step until which it is usual that a model has learned little.

    A rule of thumb: twice the warm-up, at least 2,000 steps, at most half of the run.
    """
    warmup = run.train.get("warmup") or 0
    steps = warmup if warmup >= 1 else warmup * run.total_steps
    return int(min(max(2 * steps, 2000), run.total_steps / 2))


def judge_chance(run: RunRecord, who: str, shown: str) -> Finding:
    """Return the finding for a model at chance."""
    onset = compute_onset(run)
    until = f"{shown} That is usual until about step {onset:,}."
    if run.step <= onset:
        return Finding(NOTE, f"{who} is still at chance", until)
    advice = "Look at the learning rate (too high is as bad as too low), the warm-up, and the text."
    return Finding(PROBLEM, f"{who} is at chance", f"{until} {advice}")


@lru_cache(maxsize=8)
def measure_text(data_dir: str, vocab_path: str) -> tuple[float, float, float] | None:
    """Return statistics of the training text, or None where it is not on this machine.

    They are the entropy of the distribution of tokens (nats), and the shares of [UNK] and of pieces that
    continue a word, in its first `TEXT_TOKENS` tokens.
    """
    try:
        tokenizer = Tokenizer(vocab_path)
        parts = list_parts(Path(data_dir) / "train.txt")
    except (DebertaError, OSError):
        return None
    files: list[StoreFile] = []
    for part in parts:
        if (file := find_store(part, tokenizer.fingerprint)) is None:
            return None
        files.append(file)
        if sum(file.meta.num_tokens for file in files) >= TEXT_TOKENS:
            break
    counts = TokenStore(files).count_ids(len(tokenizer), TEXT_TOKENS)
    shares = counts / counts.sum()
    starts, cut = (float(shares[tokenizer.piece_kinds == k].sum()) for k in (STARTS_WORD, CONTINUES_WORD))
    entropy = sum(share * math.log(1 / share) for share in shares.tolist() if share)
    # Scripts without spaces have no pieces that start a word.
    return entropy, float(shares[tokenizer.unk_id]), cut if starts > 0.05 else 0.0


def get_prefix(run: RunRecord) -> str:
    """Return the prefix of the metrics of the model that predicts masked tokens."""
    return "generator_" if any("generator_loss" in row for row in run.rows) else ""


def check_vocabulary(run: RunRecord) -> Finding | None:
    """Check that vocabulary, text and initial weights belong together."""
    first = next(iter(run.list_values(f"{get_prefix(run)}loss")), (0, 0.0))
    model = run.settings.get("model", {})
    uniform = math.log(model.get("generator", model).get("vocab_size") or 1)
    weights = run.train.get("init_model") or run.train.get("init_generator")
    is_new = run.train.get("fresh_head")  # a new head starts there
    if weights and not is_new and first[0] == 1 and first[1] > 0.9 * uniform:
        shown = f"The loss of {weights} is {first[1]:.2f} at step 1; a uniform guess has {uniform:.2f}."
        advice = "They were trained with another vocabulary: pass theirs, and prepare the text with it."
        return Finding(PROBLEM, "The vocabulary does not fit the weights", f"{shown} {advice}")
    text = measure_text(str(run.train.get("data_dir")), str(run.train.get("vocab_path")))
    if text is None:
        return None
    _, unknown, cut = text
    shown = f"{unknown:.2%} of the tokens are [UNK], and {cut:.0%} continue a word."
    if unknown > MOST_UNKNOWN or cut > MOST_CUT:
        advice = "It was made for other text; prepare_data.py --train_vocab trains one."
        return Finding(PROBLEM, "The vocabulary does not fit the text", f"{shown} {advice}")
    return Finding(USUAL, "Vocabulary", shown)


def check_masking(run: RunRecord) -> Finding | None:
    """Check that tokens are masked, and that the model does not see them."""
    name = f"{get_prefix(run)}accuracy"
    if not any(name in row for row in run.rows if row["kind"] == "train"):
        return None
    accuracy = run.get_last(name)
    if accuracy is None:  # null: nothing is counted
        return Finding(PROBLEM, "No token is masked", "The model has nothing to predict.")
    shown = f"{accuracy:.1%} of the masked tokens are predicted."
    if accuracy > MOST_PREDICTED:
        advice = "The model sees the tokens that it should predict, or the text repeats itself."
        return Finding(PROBLEM, "Masked tokens are visible", f"{shown} {advice}")
    return Finding(USUAL, "Masking", shown)


def check_generator(run: RunRecord) -> Finding | None:
    """Check that the loss on masked tokens is below what counting tokens gives."""
    loss = run.get_last(f"{get_prefix(run)}loss")
    text = measure_text(str(run.train.get("data_dir")), str(run.train.get("vocab_path")))
    if not loss or text is None or not text[0]:
        return None
    who = "The generator" if get_prefix(run) else "The model"
    shown = f"Its training loss is {loss:.2f} nats; "
    shown += f"the frequencies of tokens in the training text alone give {text[0]:.2f}."
    if loss < 0.97 * text[0]:
        return Finding(USUAL, f"{who} learns", shown)
    return judge_chance(run, who, shown)


def check_discriminator(run: RunRecord) -> Finding | None:
    """Check that the discriminator finds more than the share of replaced tokens tells."""
    weight = run.train.get("rtd_lambda", 1)
    if get_prefix(run) and (weight == 0 or run.get_last("discriminator_grad_norm") == 0):
        shown = f"Its gradient is 0; --rtd_lambda is {weight:g}. The default is 10, the paper's value 50."
        return Finding(PROBLEM, "The discriminator is not trained", shown)
    names = ("loss", "auc", "recall", "replaced_entropy")
    values = [run.list_values(f"discriminator_{name}", "valid") for name in names]
    if not all(values):
        return None
    loss, auc, recall, entropy = (points[-1][1] for points in values)
    shown = f"ROC AUC {auc:.3f}, 0.5 is chance; loss {loss:.3f}, a constant answer has {entropy:.3f}; "
    shown += f"{recall:.1%} of the replaced tokens are found."
    if auc < 0.55 or loss >= entropy:
        return judge_chance(run, "The discriminator", shown)
    if recall < 0.01:
        onset = compute_onset(run)
        shown += f" It ranks them already. That is usual until about step {onset:,}."
        level = NOTE if run.step <= onset else PROBLEM
        return Finding(level, "The discriminator predicts “original” alone", shown)
    return Finding(USUAL, "The discriminator learns", shown)


def check_replaced(run: RunRecord) -> Finding | None:
    """Check the share of tokens that the generator replaces."""
    share = run.get_last("discriminator_replaced", "valid")
    if share is None:
        return None
    level = USUAL if REPLACED[0] < share < REPLACED[1] else PROBLEM
    usual = f"{REPLACED[0]:.1%} to {REPLACED[1]:.0%} are usual."
    return Finding(level, "Replaced tokens", f"{share:.1%} of the validation tokens are replaced; {usual}")


def check_residual(run: RunRecord) -> Finding | None:
    """Check that the GDES residual moves, and stays small.

    It is compared with the generator's table.
    """
    values = [drift for step, drift in run.list_values("residual_drift", "valid") if step]  # it starts at 0
    if not values:
        return None
    drift = values[-1]
    shown = f"Its norm is {drift:.3f} of the generator's table; up to {LARGE_DRIFT:g} is usual, but not 0."
    level = PROBLEM if drift == 0 else NOTE if drift > LARGE_DRIFT else USUAL
    return Finding(level, "Drift of the GDES residual", shown)


def check_rate(run: RunRecord) -> Finding | None:
    """Compare the peak learning rate with that of the preset."""
    rate, name = run.train.get("learning_rate"), guess_preset(run.train)
    if name is None or not rate:
        return None
    usual = PRESETS[name].flags["learning_rate"]
    level = USUAL if 0.2 < rate / usual < 5 else PROBLEM
    return Finding(level, "Learning rate", f"Its peak is {rate:g}; that of {name} is {usual:g}.")


def check_stability(run: RunRecord) -> Finding:
    """Check for spikes, skipped updates, and a loss that rises or is null.

    The loss is that on masked tokens.
    """
    name = f"{get_prefix(run)}loss"
    spikes, skipped = sum(row["kind"] == "spike" for row in run.rows), run.get_last("skipped_steps") or 0
    is_logged = any(name in row for row in run.rows)
    # Where no loss of an interval was finite, its line has none.
    missing = {"train": None} if is_logged else {}
    lost = sum(row.get(name, missing.get(row["kind"], 0)) is None for row in run.rows)
    shown = f"{spikes} spikes, {skipped:.0f} skipped updates, {lost} losses that are null."
    if lost:
        shown += " They were not finite, or no token of theirs was masked."
    values = [value for _, value in run.list_values(name)]
    means = [median(values[i : i + 5]) for i in range(len(values) % 5, len(values), 5)]
    if means and means[-1] > 1.1 * min(means):
        advice = "Start over with a lower --learning_rate or a longer --warmup."
        rise = f"The loss on masked tokens has risen from {min(means):.3f} to {means[-1]:.3f}."
        return Finding(PROBLEM, "Training diverges", f"{shown} {rise} {advice}")
    return Finding(NOTE if spikes or skipped or lost else USUAL, "Stability", shown)


def check_cost(run: RunRecord) -> Finding | None:
    """Return the time so far and the time left."""
    seconds, tokens = run.rows[-1].get("elapsed_seconds"), run.get_last("tokens_seen") or 0
    if not seconds or not run.step:
        return None
    left = format_duration(seconds / run.step * (run.total_steps - run.step))
    hours = seconds * run.environment.get("processes", 1) / 3600
    shown = f"{format_duration(seconds)} so far ({hours:.3g} process-hours), {left} to go"
    return Finding(USUAL, "Cost", f"{shown}; {format_number(tokens)} tokens seen.")
