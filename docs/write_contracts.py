"""Prints docs/contracts.md, which `make reference` writes: which tests prove which contract, clause by clause."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = """\
# Tests of the contracts

This page says which tests prove which clause of the [contracts](design.md#contracts). It is made from the names of the
tests by `make reference`: `test_contract_3_…` is a test of contract 3, and `docs/write_contracts.py` says which clauses
it proves. A clause that no test names is a **gap**. `make test ARGS="-k contract_3"` runs the tests of one contract.

{total}

{contracts}
"""
# Each clause by the words that it begins with, and the names of tests that prove it: parts of the names of the
# contract's own tests, or whole names of others. Tests of a contract that no clause claims stand at its first one.
# Those of a contract that is not here stand at the clause whose words their names and docstrings have most of.
CLAUSES = {
    1: {
        "The ids": "ids_that_were_sampled scores_what_was_sampled first_stop_token last_place",
        "Nothing is": "what_is_learned_from trl_trains test_contract_14_nothing_is_tokenised_again",
        "Masks come": "only_the_mask masks_come is_the_padding padding_may",
    },
    2: {
        "`logprobs[t]`": "stock says_what_the_learner trls both_kernels models_own as_the_learner comes_with quantised "
        "greedy_tokens under_the_temperature",
        "The learner": "the_old_policy the_kl sampler_and_learner",
        "Top-p": "test_impossible_values_are_refused_by_name test_a_name_without_counterpart_is_told_why",
    },
    3: {
        "With the": "same change costs_no over",
        "The lossy": "test_margin_is_counted_and_named test_margin_says_so_and_is_counted "
        "test_impossible_values_are_refused_by_name",
    },
    4: {
        "`draw`": "a_refill a_late_worker that_dies",
        "Noise is": "new_noise same_noise in_the_key the_key_is",
        "Work is": "the_shards one_engine_samples replaced after_one_is_killed",
        "What happens": "test_contract_9_what_became_of_the_drafts_of_a_step_is_what_the_next_one_expects "
        "test_costs_are_measured_once_and_kept test_draft_costs_are_measured_once_a_run_and_reused_on_resume",
        "The same": "processes workers",
        "Another draft": "without_drafts beside_them batch group_size change_no_token waited whoever",
    },
    5: {
        "A worker": "every_call worker never_samples every_worker",
        "The digests": "derived adapters_of adapters_arrive vocabulary holds matrices rounds_anew taken_over fused",
        "Where one": "is_named differs",
    },
    6: {
        "A reward": "naming each_policy failing_environment all_kept agent_that_fails no_finite judges",
        "The default": "aborts",
        "`None`": "without_a_mark missing test_none_abstains_and_is_left_out_of_the_sum "
        "test_none_is_no_failure_under_any_policy",
    },
    7: {"In GRPO": "never_touches refuses", "Its inputs": "never_touches"},
    8: {
        "The sampler": "stay_out",
        "The old": "compared",
        "The importance": "correction corrected decide",
        "`canary/*`": "test_contract_5_each_publication_rounds_anew_and_the_correction_is_on",
    },
    9: {
        "A checkpoint": "killed_save kill_9 reach_the_disk came_after",
        "Files are": "test_a_checkpoint_is_safetensors_and_json_only test_pickled_weights_are_not_read",
    },
    10: {
        "Groups": "packed",
        "A packed": "packed every_mtp_depth split_rows",
        "Rows that": "trees branch",
        "This equals": "packed padded",
        "The denominator": "micro_batch micro_batches denominator bnpo",
        "Tied groups": "tied tie_teach",
    },
    11: {"Ratios are": ""},
    12: {
        "With `rollout.ahead": "schedule",
        "Its prompts": "evaluation rates",
        "Timing": "deaths disturbed in_flight "
        "test_contract_9_a_batch_whose_weights_are_gone_is_sampled_with_them_again",
    },
    13: {
        "Each sampler": "every_worker",
        "The learner scores": "is_not_the_learner beyond_rounding",
        "A line": "temperature",
        "Otherwise": "named by_name first_token",
        "Canaries that": "test_canaries_that_fail_once_are_made_again",
        "Where samplers": "stale_scale decoder_itself",
        "A worker": "has_passed of_the_others",
        "Canaries have": "change_no_token",
    },
    14: {
        "An environment": "as_trl_documents",
        "What tools": "tools_wrote writes_next tokenised_again keeps_its_tokens",
    },
    15: {"Several": "two_ranks norm"},
    16: {
        "No problem": "trains shows_the_solution worked trained_on share_is link under_every is_not_learned "
        "on_that_share",
        "What cannot": "refused one_file",
    },
    17: {"Everything": "primitives supervises two_ranks"},
    18: {
        "A command": "test_what_a_command_does_not_use_is_refused_unless_it_is_its_default",
        "What goes": "test_all_contradictions_are_found_at_once",
    },
}


@dataclass(frozen=True)
class Test:
    """One test, by its name, its file and the first line of its docstring."""

    name: str
    file: str
    says: str


def tests() -> list[Test]:
    """Every test of the tree, in the order of files and lines."""
    found = []
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                says = (ast.get_docstring(node) or "").partition("\n")[0]
                found.append(Test(node.name, file.relative_to(ROOT / "tests").as_posix(), says))
    return found


def clauses() -> Iterator[tuple[int, list[str]]]:
    """The number of each contract in docs/design.md and its sentences, without emphasis."""
    text = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    text = text.partition("\n## Contracts\n")[2].partition("\n## ")[0]
    for number, body in re.findall(r"^(\d+)\. (.*?)(?=^\d+\. |\Z)", text, re.MULTILINE | re.DOTALL):
        body = re.sub(r"\s+", " ", body).replace("**", "").strip()
        yield int(number), re.split(r"(?<=\.) (?=[A-Z`])", body)


def named(word: str, number: int, everything: list[Test]) -> list[Test]:
    """The tests of that whole name, or those of a contract whose names hold the word."""
    if word.startswith("test_"):
        return [test for test in everything if test.name == word]
    return [test for test in everything if f"contract_{number}_" in test.name and word in test.name]


def words_of(text: str) -> set[str]:
    """The words of a text that mean something, without their endings."""
    return {re.sub(r"(?:s|ed|ing|e)$", "", word) for word in re.findall(r"[a-z]{4,}", text.lower().replace("_", " "))}


def proofs(number: int, sentences: list[str], everything: list[Test]) -> list[list[Test]]:
    """The tests of each clause of a contract."""
    found: list[list[Test]] = [[] for _ in sentences]
    for beginning, words in CLAUSES.get(number, {}).items():
        for place, sentence in enumerate(sentences):
            if sentence.startswith(beginning):
                proving = [test for word in words.split() for test in named(word, number, everything)]
                found[place] = list(dict.fromkeys(proving))
    claimed = {test for some in found for test in some}
    own = [test for test in everything if f"contract_{number}_" in test.name and test not in claimed]
    if number in CLAUSES:
        found[0] = own + found[0]
    else:
        for test in own:
            shared = [len(words_of(sentence) & words_of(f"{test.name} {test.says}")) for sentence in sentences]
            found[shared.index(max(shared))].append(test)
    return found


def stale() -> list[str]:
    """What `CLAUSES` says of clauses and tests that are not there."""
    everything, contracts = tests(), dict(clauses())
    lost = []
    for number, parts in CLAUSES.items():
        for beginning, words in parts.items():
            if not any(sentence.startswith(beginning) for sentence in contracts.get(number, [])):
                lost.append(f"{number}: {beginning}")
            lost += [f"{number}: {word}" for word in words.split() if not named(word, number, everything)]
    return lost


def shown(some: list[Test]) -> str:
    files: dict[str, list[str]] = {}
    for test in some:
        names = files.setdefault(test.file, [])
        names += [test.name] if test.name not in names else []
    return "<br>".join(f"`{file}`: {', '.join(f'`{name}`' for name in names)}" for file, names in files.items())


def page() -> str:
    everything, parts, gaps, count = tests(), [], [], 0
    known = set()
    for number, sentences in clauses():
        known.add(number)
        rows = ["| clause | tests |", "|---|---|"]
        found = proofs(number, sentences, everything)
        whole = any(found)
        for place, (sentence, some) in enumerate(zip(sentences, found, strict=True)):
            count += 1
            proof = shown(some) or ("its other clauses" if place == 0 and whole else "**gap**")
            gaps += [f"{number}.{place + 1}"] if proof == "**gap**" else []
            rows.append(f"| {number}.{place + 1} {sentence.replace('|', chr(92) + '|')} | {proof} |")
        table = "\n".join(rows)
        parts.append(f"## Contract {number}\n\n{table}")
    numbered = {int(number) for test in everything for number in re.findall(r"contract_(\d+)_", test.name)}
    for number in sorted(numbered - known):
        own = [test for test in everything if f"contract_{number}_" in test.name]
        parts.append(f"## Contract {number}\n\n**Gap**: design.md has no contract of this number. Tests: {shown(own)}.")
        gaps.append(f"{number} (not in design.md)")
    total = f"{len(known)} contracts have {count} clauses. Gaps: {', '.join(gaps) or 'none'}."
    return PAGE.format(total=total, contracts="\n\n".join(parts))


if __name__ == "__main__":
    print(page(), end="")
