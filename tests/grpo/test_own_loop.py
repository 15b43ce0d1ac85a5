"""Loops of one's own: what a call means follows from what it is given, never from the call before it."""

import json
import math
from dataclasses import replace

import pytest
import torch
import zstandard
from safetensors.torch import load_file

from grpo import Session
from grpo.algorithm.dynamic_sampling import Drawn
from grpo.config.loss import LossOptions
from grpo.data.trained_on import trained_on
from grpo.learner.terms.custom import as_term
from grpo.run.stop import Stopped
from grpo.steps.callback import Callback
from review.readers.run_folder import read_metrics
from rewards.data.examples import Example
from rewards.group_score import GroupScore
from rewards.records import rollout_path

QUICK = {"sft.steps": 0, "eval.limit": 2}
SHORT = QUICK | {"steps": 4, "checkpoint.every": 10}


@pytest.fixture(scope="module")
def opened(micro_config, tmp_path_factory):
    """A session in its only step, and its checkpoint from before."""
    folder = tmp_path_factory.mktemp("opened")
    given = {"steps": 1, "rollout.temperature": 0.7, "balance.bias_rate": 0.1, "loss.epsilon": 0.05}
    with Session.open(micro_config(folder / "run", **QUICK | given)) as session:
        for _ in session.run.steps():
            yield session, session.save(folder / "start")


@pytest.fixture
def session(opened):
    """That session as it was at the beginning of the step."""
    session, start = opened
    session.load(start)
    session.step.batches.clear()
    session.step.metrics.clear()
    return session


def alternating(groups):
    """Scores of 1 and 0 in turn."""
    return [GroupScore([float(i % 2) for i in range(len(group.completions))], {}) for group in groups]


def sampled(session):
    return session.sample(session.prompts(session.step), step=session.step)


def rollouts(folder, step):
    file = folder / f"rollouts/step_{step:06d}.jsonl.zst"
    return [json.loads(line) for line in zstandard.ZstdDecompressor().decompress(file.read_bytes()).splitlines()]


def learn(session, step, groups=None):
    groups = groups or session.sample(session.prompts(step), step=step)
    metrics = session.forward_backward(session.prepare(groups, alternating(groups))) | session.optim_step(1e-3)
    session.sync_weights()
    session.record(step, metrics)


def lines_of(folder):
    """The lines of steps in metrics.jsonl."""
    return [line for line in read_metrics(folder) if "time/step" in line]


def weights_of(session):
    return {name: parameter.detach().clone() for name, parameter in session.policy.named_parameters()}


def same(one, other):
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


# ---- what a batch keeps ----------------------------------------------------------------------------------------------


def test_each_loss_on_a_batch_keeps_the_policy_from_before_its_first_update(session):
    """Two losses in every update, two updates: in the second both clip a ratio that is no longer 1."""
    groups = sampled(session)
    batch = session.prepare(groups, alternating(groups))
    losses, ratios = (LossOptions(epsilon=0.2), LossOptions(epsilon=0.01)), []
    for _ in range(2):
        ratios.append([session.forward_backward(batch, loss)["policy/ratio_mean"] for loss in losses])
        session.optim_step(0.01)
    assert ratios[0] == pytest.approx([1.0, 1.0], abs=1e-5)
    assert ratios[1][0] != pytest.approx(1.0, abs=1e-4)
    assert ratios[1][0] == pytest.approx(ratios[1][1], abs=1e-6)


def test_what_comes_between_two_updates_of_a_batch_changes_neither_of_them(session, opened):
    """The same two updates, alone and with another batch, another loss and an evaluation between them."""
    groups, others = sampled(session), session.sample(session.prompts(1, draw=1), step=1, draw=1)
    ends = []
    for disturbed in (False, True):
        session.load(opened[1])
        batch, other = (session.prepare(each, alternating(each)) for each in (groups, others))
        session.forward_backward(batch)
        session.optim_step(0.01)
        session.sync_weights()
        if disturbed:
            session.logprobs([groups[0].prompt], [[groups[0].completions[0].token_ids]])
            session.learner.forward_backward(other, "reinforce")
            session.learner.drop()
            session.evaluate(session.task.held_out[:1])
        metrics = session.forward_backward(batch)
        ends.append(metrics["policy/ratio_mean"])
    assert ends[0] == pytest.approx(ends[1], abs=1e-7)
    assert ends[0] != pytest.approx(1.0, abs=1e-4)


def test_a_loss_by_name_keeps_the_other_options_of_the_configuration(session):
    term = as_term("grpo", session.learner.terms[0])
    assert (term.options.loss_type, term.options.epsilon) == ("grpo", 0.05)
    assert as_term("reinforce", session.learner.terms[0]).options.epsilon == LossOptions().epsilon  # it reads none
    configured = LossOptions(loss_type="dapo", epsilon_high=0.28, beta=0.1)
    assert configured.with_loss_type("cispo").epsilon_high is None
    assert configured.with_loss_type("bnpo") == LossOptions(loss_type="bnpo", epsilon_high=0.28, beta=0.1)


def test_gold_solutions_are_scored_at_temperature_1(session):
    """By hand from the logits, in a session whose rollouts have another temperature."""
    [row] = session.solutions(1)
    [sample] = row.samples
    loss = session.forward_backward(session.prepare_solutions([row]), "supervised")["loss/sft"]
    ids = torch.tensor([[*row.prompt_token_ids, *sample.token_ids]])
    with torch.no_grad():
        logits = session.policy.trunk(ids).logits[0].float()
    first = len(row.prompt_token_ids)
    logprobs = logits.log_softmax(-1)[first - 1 : -1].gather(1, ids[0, first:, None])
    assert loss == pytest.approx(-logprobs.mean().item(), abs=1e-5)


# ---- what prepare refuses --------------------------------------------------------------------------------------------


def _of_tokens(groups, value=0.5):
    return [[[value] * len(c.token_ids) for c in group.completions] for group in groups]


WRONG = {
    "scores: 3 for 4 groups": lambda groups, given: given.update(scores=given["scores"][:-1]),
    "group 1: 5 rewards for 4 completions": lambda groups, given: given["scores"][1].rewards.append(0.0),
    "group 1, sample 2: its reward is nan": lambda groups, given: put(given["scores"][1].rewards, 2, math.nan),
    r"group 1, sample 2: its reward is 1e\+300; give a number between": lambda groups, given: put(
        given["scores"][1].rewards, 2, 1e300
    ),
    "advantages: 3 for 4 groups": lambda groups, given: given.update(advantages=[[0.0] * 4] * 3),
    "group 0: 3 advantages for 4 completions": lambda groups, given: given.update(advantages=[[0.0] * 3] * 4),
    "group 0, sample 0: an advantage is": lambda groups, given: given.update(advantages=torch.full((4, 4), math.inf)),
    r"group 2, sample 1: advantages of shape \[\d+\]": lambda groups, given: given["advantages"][2][1].append(0.0),
    r"group 0, sample 0: advantages of shape \[0\]": lambda groups, given: put(given["advantages"][0], 0, []),
    "group 2, sample 1: an advantage is": lambda groups, given: put(given["advantages"][2][1], 0, math.nan),
    "some are of completions and some of tokens": lambda groups, given: put(given["advantages"][2], 1, 0.5),
    "group 0 has no completions": lambda groups, given: groups[0].completions.clear(),
    "group 3 has 3 completions, and group 0 has 4": lambda groups, given: groups[3].completions.pop(),
    r"group 3, sample 0: \d+ log-probabilities": lambda groups, given: groups[3].completions[0].logprobs.pop(),
    "group 3, sample 1: one of its": lambda groups, given: put(groups[3].completions[1].logprobs, 0, math.nan),
}


def put(values, place, value):
    values[place] = value


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_together_or_is_not_finite_is_refused_with_its_place(session, message):
    groups = sampled(session)
    given = {"scores": alternating(groups), "advantages": _of_tokens(groups)}
    WRONG[message](groups, given)
    with pytest.raises(ValueError, match=message):
        session.prepare(groups, **given)


def test_what_was_sampled_at_another_temperature_is_refused(session):
    groups = session.sample(session.prompts(1), step=1, temperature=0.5)
    assert {c.temperature for group in groups for c in group.completions} == {0.5}
    with pytest.raises(ValueError, match=r"group 0, sample 0 was sampled at temperature 0.5, and .*temperature=0.7"):
        session.prepare(groups, alternating(groups))


def test_no_groups_are_an_empty_batch(session):
    before = weights_of(session)
    for batch in (
        session.prepare([]),
        session.prepare([], []),
        session.prepare_solutions([]),
        session.prepare_lessons([]),
    ):
        metrics = session.forward_backward(batch) | session.optim_step()
        assert metrics["learner/updates"] == 0
    assert same(before, weights_of(session))


def test_a_loop_of_version_0_2_prepares_rows_as_before(session):
    rows = session.solutions(2)
    with pytest.warns(FutureWarning, match="prepare_solutions"):
        batch = session.prepare(rows)
    assert (batch.kind, batch.rows) == ("solutions", session.prepare_solutions(rows).rows)


# ---- what a step is --------------------------------------------------------------------------------------------------


def test_a_step_records_all_of_its_batches_with_the_log_probabilities_of_each(micro_config, tmp_path):
    with Session.open(micro_config(tmp_path, **SHORT)) as session:
        for step in session.run.steps():
            groups = session.sample(session.prompts(step), step=step)
            for part in (groups[:2], groups[2:]):
                session.forward_backward(session.prepare(part, alternating(part)))
                session.optim_step(0.01)
            session.record(step, {})
            break
    completions = [completion for group in groups for completion in group.completions]
    lines = rollouts(tmp_path, 1)
    assert [line["token_ids"] for line in lines] == [completion.token_ids for completion in completions]
    far = [
        max(abs(one - other) for one, other in zip(line["policy_logprobs"], line["logprobs"], strict=True))
        for line in lines
    ]
    assert max(far[:8]) < 1e-4  # before the first update; the second batch after it
    assert max(far[8:]) > 1e-4
    [line] = lines_of(tmp_path)
    assert line["reward/mean"] == pytest.approx(0.5)
    assert line["completion/tokens"] == sum(len(completion.token_ids) for completion in completions)


def test_groups_without_scores_have_no_rewards_and_what_was_sampled_is_counted(micro_config, tmp_path):
    with Session.open(micro_config(tmp_path, **SHORT)) as session:
        for step in session.run.steps():
            groups = session.sample(session.prompts(step), step=step)
            if step == 1:
                session.forward_backward(session.prepare(groups, advantages=[[1.0, -1.0, 0.0, 0.0]] * 4))
            metrics = session.optim_step()
            session.sync_weights()
            session.record(step, metrics)
            if step == 2:
                break
    first, second = lines_of(tmp_path)
    assert not [name for name in first if name.startswith(("reward/", "group/"))]
    assert first["completion/length_mean"] > 0
    assert first["completion/tokens"] > 0
    assert second["completion/tokens"] > 0  # though nothing was learned
    assert second["speed/completion_tokens_per_second"] > 0


def test_what_is_drawn_later_and_not_learned_from_is_not_in_the_rewards_of_a_step(micro_config, tmp_path):
    with Session.open(micro_config(tmp_path, **SHORT)) as session:
        for step in session.run.steps():
            groups = session.sample(session.prompts(step), step=step)
            session.forward_backward(session.prepare(groups, alternating(groups)))
            drawn = session.draw(step)
            session.record(step, session.optim_step())
            break
    [line] = lines_of(tmp_path)
    assert line["reward/mean"] == 0.5 != drawn.metrics["reward/mean"]


def test_the_completions_of_an_attempt_that_was_undone_are_not_those_of_the_step(micro_config, tmp_path):
    with Session.open(micro_config(tmp_path, **SHORT)) as session:
        for step in session.run.steps():
            groups = session.sample(session.prompts(step), step=step)
            session.forward_backward(session.prepare(groups, alternating(groups)))
            assert rollout_path(session.config.output_dir, step).exists()
            break
        for step in session.run.steps():
            assert step == 1
            session.record(step, {})
            break
    assert not rollout_path(session.config.output_dir, 1).exists()


def test_what_was_drawn_in_an_attempt_that_was_undone_is_measured_where_it_is_learned_from(micro_config, tmp_path):
    with Session.open(micro_config(tmp_path, **SHORT)) as session:
        for step in session.run.steps():
            drawn = session.draw(step)
            break
        for step in session.run.steps():
            session.learn(session.prepare(drawn))
            session.record(step, {})
            break
    [line] = lines_of(tmp_path)
    assert line["reward/mean"] == drawn.metrics["reward/mean"]


def test_a_step_is_recorded_once_and_by_its_number(micro_config, tmp_path):
    with Session.open(micro_config(tmp_path, **SHORT)) as session:
        for step in session.run.steps():
            for act in (session.save_if_due, session.evaluate_if_due, lambda other: session.record(other, {})):
                with pytest.raises(ValueError, match=f"step={step + 1}: step {step} is in progress"):
                    act(step + 1)
            learn(session, step)
            with pytest.raises(ValueError, match=f"step {step} has its line"):
                session.record(step, {})
            if step == 2:
                break
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2]


@pytest.mark.parametrize("moved", [True, False])
def test_a_second_loop_goes_on_after_the_last_whole_step(micro_config, tmp_path, moved):
    with Session.open(micro_config(tmp_path, **SHORT)) as session:
        for step in session.run.steps():
            groups = session.sample(session.prompts(step), step=step)
            if step == 2 and moved:
                session.forward_backward(session.prepare(groups, alternating(groups)))
                session.optim_step()
                session.sync_weights()
            if step == 2:
                break
            learn(session, step, groups)
        left = [group.prompt.prompt_id for group in groups]
        again = []
        for step in session.run.steps():
            prompts = session.prompts(step)
            again.append((int(step), [prompt.prompt_id for prompt in prompts] == left))
            learn(session, step, session.sample(prompts, step=step))
        session.finish()
    assert again == ([(3, False), (4, False)] if moved else [(2, True), (3, False), (4, False)])
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 3, 4]


def test_a_loop_whose_step_was_ended_by_another_one_is_told(micro_config, tmp_path):
    with Session.open(micro_config(tmp_path, **SHORT)) as session:
        steps = session.run.steps()
        next(steps)
        next(session.run.steps())
        with pytest.raises(RuntimeError, match="step 1 has ended, since .* another loop"):
            next(steps)


def test_what_is_done_once_a_step_is_done_however_its_updates_end(micro_config, tmp_path):
    """The second update of the step is skipped, as nothing is learned from its batch; a loop is left in its step."""
    given = {"balance.bias_rate": 0.1, "learner.updates_per_batch": 2}
    ends = []
    for place in ("recorded", "left"):
        folder = tmp_path / place
        with Session.open(micro_config(folder, **SHORT | given)) as session:
            for step in session.run.steps():
                groups = session.sample(session.prompts(step), step=step)
                session.forward_backward(session.prepare(groups, alternating(groups)))
                session.optim_step()
                tied = session.prepare(groups, [GroupScore([1.0] * 4, {}) for _ in groups])
                metrics = session.forward_backward(tied) | session.optim_step()
                if place == "recorded":
                    session.record(step, metrics)
                break
        [line] = lines_of(folder)
        assert line["policy/approx_kl"] > 0
        assert any(name.startswith("moe/") for name in line)
        assert any(each["policy_logprobs"] for each in rollouts(folder, 1))
        ends.append(load_file(folder / "checkpoints/step_000001/policy.safetensors"))
    biases = [name for name in ends[0] if name.endswith("correction_bias")]
    assert any(tensor.any() for name, tensor in ends[0].items() if name in biases)
    assert same(*ends)


def test_samplers_sleep_when_the_learner_begins_to_work(session, monkeypatch):
    asleep = []
    monkeypatch.setattr(type(session.pool), "sleep", lambda pool: asleep.append(True), raising=False)
    groups = sampled(session)
    batch = session.prepare(groups, alternating(groups))
    session.prepare(groups, alternating(groups))
    assert not asleep
    session.forward_backward(batch)
    assert asleep


# ---- back to an earlier state ----------------------------------------------------------------------------------------


def test_a_step_that_fails_after_a_load_goes_back_to_what_was_loaded(micro_config, tmp_path):
    """Weights and the order of the data."""
    config, asked = micro_config(tmp_path / "run", **SHORT), []

    def roll_back():
        with Session.open(config) as session:
            start = session.save(tmp_path / "kept")
            for step in session.run.steps():
                prompts = session.prompts(step)
                asked.append([prompt.prompt_id for prompt in prompts])
                if step == 3:
                    session.load(start)
                    session.prompts(step)
                    raise OSError("gone")
                learn(session, step, session.sample(prompts, step=step))

    with pytest.raises(OSError, match="gone"):
        roll_back()
    loaded = load_file(tmp_path / "kept/step_000000/policy.safetensors")
    with Session.open(config, resume="auto") as session:
        assert session.step == 2
        assert same(loaded, dict(session.learner.state()[0]["policy"]))
        for step in session.run.steps():
            assert [prompt.prompt_id for prompt in session.prompts(step)] == asked[0]
            break


def test_a_load_drops_what_waits_and_what_is_not_finished_of_the_step(session, opened):
    groups = sampled(session)
    session.forward_backward(session.prepare(groups, alternating(groups)))
    session.optim_step(0.01)
    session.forward_backward(session.prepare(groups, alternating(groups)))
    session.load(opened[1])
    expected = {name: tensor.clone() for name, tensor in session.learner.state()[0]["policy"].items()}
    session.optim_step(0.01)
    session.sync_weights()  # the routers' biases are those that were loaded
    assert same(expected, session.learner.state()[0]["policy"])


def test_the_policy_of_a_result_is_the_one_at_the_end_and_the_best_is_beside_it(micro_config, tmp_path, monkeypatch):
    given = {"checkpoint.keep_best": True, "checkpoint.every": 1, "eval.every": 1}
    with Session.open(micro_config(tmp_path, **QUICK | given, steps=3)) as session:
        for step in session.run.steps():
            learn(session, step)
            session.save_if_due(step)
        at_the_end = weights_of(session)
        monkeypatch.setattr(session.run, "best_step", lambda *_: 1)
        result = session.finish()
    assert same(at_the_end, dict(result.policy.named_parameters()))
    best, first = (
        load_file(tmp_path / "best_policy/model.safetensors"),
        load_file(tmp_path / "policy/model.safetensors"),
    )
    assert not same(best, first)


# ---- evaluation ------------------------------------------------------------------------------------------------------


def problem(number):
    return Example(f"mine/{number}", f"What is {number} and {number} more?", f"#### {2 * number}")


def test_an_evaluation_of_other_problems_answers_and_is_recorded_nowhere(micro_config, tmp_path):
    seen = []

    class Heeds(Callback):
        def on_evaluate(self, step, results):
            seen.append(step)

    with Session.open(micro_config(tmp_path, **SHORT | {"eval.every": 1})) as session:
        session.collector.callbacks.append(Heeds())
        for step in session.run.steps():
            learn(session, step)
            files = [(tmp_path / name).read_bytes() for name in ("metrics.jsonl", "events.jsonl", "held_out.jsonl")]
            results = session.evaluate([problem(1), problem(2)], when="mine")
            assert results["sampled"].prompts == 2
            assert files == [
                (tmp_path / name).read_bytes() for name in ("metrics.jsonl", "events.jsonl", "held_out.jsonl")
            ]
            assert not seen
            assert not session.held_out.done(step)
            session.evaluate_if_due(step)
            assert seen == [1]
            break
        result = session.finish()
    assert not [name for name in result.evaluations if "mine" in name]


def test_contract_16_is_kept_for_whatever_a_loop_of_ones_own_learns_from(micro_config, tmp_path):
    """Also after a resume, by the text of a prompt of one's own, and whatever an environment has added to it."""
    config = micro_config(tmp_path, **SHORT | {"checkpoint.every": 1})
    with Session.open(config) as session:
        for step in session.run.steps():
            groups = [session.group(problem(1).question, ["#### 2", "#### 3"])]
            learn(session, step, groups)
            with pytest.raises(ValueError, match="1 of 2 problems that are to be evaluated were trained on"):
                session.evaluate([problem(1), problem(2)])
            session.evaluate([problem(3)])
            with pytest.raises(ValueError, match="mine/3 is held out, and nothing may be learned from it"):
                session.prepare([session.group(problem(3).question, ["#### 6"])])
            drawn = session.draw(step)
            held_out = session.held_out.prompts[0]
            added = replace(held_out, text=held_out.text + " Use the tool.", token_ids=[*held_out.token_ids, 5])
            drawn.groups[0].prompt = added
            with pytest.raises(ValueError, match="is held out, and nothing may be learned from it"):
                session.prepare(drawn)
            break
    assert set(trained_on(tmp_path)) - session.task.trained_on
    with Session.open(config, resume="auto") as session, pytest.raises(ValueError, match="were trained on"):
        session.evaluate([problem(1)])


def test_gradients_of_a_step_that_is_undone_reach_no_other_step(micro_config, tmp_path):
    """The step is made again with the gradient of one batch, not of two."""
    norms = []
    with Session.open(micro_config(tmp_path, **SHORT)) as session:
        for leaves in (True, False):
            for step in session.run.steps():
                groups = session.sample(session.prompts(step), step=step)
                session.forward_backward(session.prepare(groups, alternating(groups)))
                if leaves:
                    norms.append(session.learner.update._clip(session.policy.trunk))
                    break
                norms.append(session.optim_step()["learner/grad_norm"])
                break
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


TAKES = {
    "prompts twice": lambda session, step: [*session.prompts(step, 2), *session.prompts(step, 2)],
    "draw twice": lambda session, step: [group.prompt for _ in range(2) for group in session.draw(step).groups],
    "solutions": lambda session, step: session.solutions(2),
}


@pytest.mark.parametrize("takes", TAKES)
def test_a_step_that_is_undone_gives_back_all_that_it_took_from_the_data(micro_config, tmp_path, takes):
    taken = []
    with Session.open(micro_config(tmp_path, **SHORT)) as session:
        for _ in range(3):
            for step in session.run.steps():
                taken.append([getattr(each, "prompt_id", each) for each in TAKES[takes](session, step)])
                break
    assert taken[0] == taken[1] == taken[2]


def test_what_is_done_outside_of_a_step_moves_nothing_and_is_registered(micro_config, tmp_path):
    with Session.open(micro_config(tmp_path, **SHORT)) as session:
        groups = [session.group(problem(1).question, ["#### 2", "#### 3"])]
        session.forward_backward(session.prepare(groups, alternating(groups)))
        before = weights_of(session)
        with pytest.raises(RuntimeError, match="an update outside of a step"):
            session.optim_step()
        assert same(before, weights_of(session))
        with pytest.raises(ValueError, match="were trained on"):
            session.evaluate([problem(1)])


def test_a_drawn_may_be_filtered_scored_anew_or_made_by_hand(micro_config, tmp_path):
    with Session.open(micro_config(tmp_path, **SHORT)) as session:
        for step in session.run.steps():
            drawn = session.draw(step)
            other = alternating(drawn.groups)
            assert session.prepare(drawn, other).drawn.scores == other
            some = Drawn(drawn.groups[:2], other[:2])
            session.forward_backward(session.prepare(some))
            session.forward_backward(session.prepare(replace(drawn, groups=drawn.groups[2:], scores=other[2:])))
            session.record(step, session.optim_step())
            break
    assert [line["reward"] for line in rollouts(tmp_path, 1)] == [0.0, 1.0] * 8
    assert lines_of(tmp_path)[0]["reward/mean"] == 0.5


def test_the_metrics_of_a_step_do_not_depend_on_the_order_of_its_batches(micro_config, tmp_path):
    measured = []
    for order in (1, -1):
        folder = tmp_path / str(order)
        with Session.open(micro_config(folder, **SHORT)) as session:
            for step in session.run.steps():
                groups = [session.group(problem(n).question, ["#### 2", "#### 3"]) for n in (1, 2)]
                batches = [session.prepare(session.draw(step)), session.prepare(groups, alternating(groups))]
                for batch in batches[::order]:
                    session.forward_backward(batch)
                session.record(step, session.optim_step())
                break
        [line] = lines_of(folder)
        measured.append({name: line[name] for name in ("reward/mean", "completion/length_mean", "reward/std")})
    assert measured[0] == pytest.approx(measured[1])


def test_the_configured_loss_is_the_same_by_name_and_by_options(session):
    groups = sampled(session)
    batch = session.prepare(groups, alternating(groups))
    session.forward_backward(batch)
    session.optim_step(0.01)
    losses = (None, session.config.loss, session.config.loss.loss_type)
    ratios = [session.forward_backward(batch, loss)["policy/ratio_mean"] for loss in losses]
    assert ratios[0] != pytest.approx(1.0, abs=1e-4)
    assert ratios == pytest.approx(ratios[:1] * 3)


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, Stopped])
def test_a_loop_that_exits_keeps_its_step(micro_config, tmp_path, kind):
    """A step counts from its line on. With the last kind nothing was learned in it."""

    def loop():
        with Session.open(micro_config(tmp_path, **SHORT)) as session:
            for step in session.run.steps():
                if kind is Stopped:
                    session.record(step, {"mine": 1.0})
                else:
                    learn(session, step)
                raise kind

    with pytest.raises(kind):
        loop()
    assert [line["step"] for line in lines_of(tmp_path)] == [1]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000001"]


def test_a_supervised_loss_leaves_out_what_is_masked(micro_config, tmp_path):
    """Truncated completions change neither its mean nor, where there are only such, anything at all."""
    with Session.open(micro_config(tmp_path, **SHORT | {"loss.mask_truncated_completions": True})) as session:
        for _ in session.run.steps():
            groups = sampled(session)
            for i, completion in enumerate(completion for group in groups for completion in group.completions):
                completion.finish_reason = "length" if i % 2 else "stop"
            left_out = [GroupScore([None if i % 2 else 1.0 for i in range(4)], {}) for _ in groups]
            batches = [session.prepare(groups, alternating(groups)), session.prepare(groups, left_out)]
            losses = [session.forward_backward(batch, "supervised")["loss/sft"] for batch in batches]
            assert losses[0] == pytest.approx(losses[1])
            for group in groups:
                for completion in group.completions:
                    completion.finish_reason = "length"
            assert session.forward_backward(session.prepare(groups), "supervised")["loss/sft"] == 0.0
            break


def test_a_checkpoint_after_a_load_has_no_weights_from_before_it(session, opened, tmp_path):
    """With `rollout.staleness: 2` the weights that a batch ahead needs were kept; `load` gives up the batch."""
    session.batches._older = (1, session.learner.copy_weights())
    session.load(opened[1])
    assert not (session.save(tmp_path) / "ahead.safetensors").exists()


def test_several_tied_batches_of_one_step_are_one_step_that_taught_nothing(micro_config, tmp_path):
    with Session.open(micro_config(tmp_path, **SHORT)) as session:
        for step in session.run.steps():
            groups = session.sample(session.prompts(step), step=step)
            tied = [GroupScore([1.0] * 4, {}) for _ in groups]
            for _ in range(6):
                session.forward_backward(session.prepare(groups, tied))
            session.record(step, session.optim_step())
            break
    assert "nothing_learned" not in (tmp_path / "events.jsonl").read_text()


def test_no_checkpoint_has_half_a_step(micro_config, tmp_path):
    """A step that does not count yet is not saved as the one before it, with the data of both."""
    config = micro_config(tmp_path, **SHORT | {"checkpoint.every": 1})
    with Session.open(config) as session:
        for step in session.run.steps():
            prompts = session.prompts(step)
            if step == 2:
                session.save_if_due(step)
                break
            learn(session, step, session.sample(prompts, step=step))
    with Session.open(config, resume="auto") as session:
        for step in session.run.steps():
            assert session.prompts(step) == prompts
            break


def test_a_step_whose_gradient_waits_for_a_later_one_records_its_logprobs(micro_config, tmp_path):
    with Session.open(micro_config(tmp_path, **SHORT | {"steps": 2})) as session:
        for step in session.run.steps():
            groups = session.sample(session.prompts(step), step=step)
            metrics = session.forward_backward(session.prepare(groups, alternating(groups)))
            if step == 2:
                metrics |= session.optim_step()
            session.record(step, metrics)
    assert all(line["policy_logprobs"] for line in rollouts(tmp_path, 1))
